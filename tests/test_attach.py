"""Which layers are adapted, and that a refusal changes nothing."""

import re

import pytest
import torch
from models import IDS, MLP, gpt2, llama
from torch import nn

import lora_lite as ll
from lora_lite.shapes import unchecked
from lora_lite.testing import snapshot, unchanged


def sites(model, **arguments):
    return [site.name for site in ll.plan(model, "lora", **arguments).sites]


def test_all_linear_leaves_heads_alone():
    assert sites(MLP()) == ["block.up", "block.down"]
    names = sites(llama())
    assert len(names) == 14 and not any("lm_head" in name for name in names)


def test_all_linear_leaves_weights_shared_with_an_embedding_alone():
    model = nn.ModuleDict({"embed": nn.Embedding(7, 8)})
    model.update({"out": nn.Linear(8, 7), "mid": nn.Linear(8, 8)})
    model["out"].weight = model["embed"].weight
    assert sites(model) == ["mid"]
    assert sites(model, targets=["out"]) == ["out"]


def test_targets_by_suffix_expression_and_predicate():
    model = llama()
    assert len(sites(model, targets=["q_proj", "v_proj"])) == 4
    assert sites(model, targets=["0.self_attn.q_proj"]) == ["model.layers.0.self_attn.q_proj"]
    assert len(sites(model, targets=r".*layers\.1\..*_proj")) == 7
    assert len(sites(model, targets=lambda name, layer: layer.out_features == 48)) == 4
    assert len(sites(model, exclude=["down_proj"])) == 12
    assert len(sites(model, exclude=r".*mlp.*")) == 8


def test_a_suffix_ends_at_a_dot_and_an_expression_matches_the_whole_name():
    with pytest.raises(ValueError, match="'proj' matches no layer; did you mean"):
        sites(llama(), targets=["proj"])
    with pytest.raises(ValueError, match="'q_proj' matches no layer"):
        sites(llama(), targets="q_proj")


def test_a_layer_alone_is_a_model():
    layer = nn.Linear(24, 40)
    assert sites(layer) == [""]
    x = torch.randn(2, 24)
    y = layer(x)
    ll.attach(layer, "lora")
    assert torch.equal(layer(x), y) and torch.equal(layer(input=x), y)
    ll.detach(layer)
    assert type(layer) is nn.Linear and list(layer.state_dict()) == ["weight", "bias"]


def test_conv1d_is_adapted_as_the_linear_layer_it_is():
    model = gpt2()
    logits = model(IDS).logits
    chart = ll.attach(model, "dora", r=4)
    assert {(s.d_in, s.d_out) for s in chart.sites} == {(32, 96), (32, 32), (32, 128), (128, 32)}
    assert torch.equal(model(IDS).logits, logits)


def test_overrides_by_pattern():
    model = llama()
    chart = ll.attach(
        model, "lora", r=8, overrides={"v_proj": dict(r=4), r".*layers\.1\..*": dict(alpha=2.0)}
    )
    by_name = {site.name: site.variant for site in chart.sites}
    assert by_name["model.layers.0.self_attn.v_proj"] == ll.LoRA(r=4)
    assert by_name["model.layers.1.self_attn.v_proj"] == ll.LoRA(r=4, alpha=2.0)
    assert model.model.layers[0].self_attn.v_proj.adapters.default.A.shape == (4, 32)
    assert "r=4" in str(chart)


REFUSED = [
    (dict(variant="lorra"), KeyError, "no variant 'lorra'; did you mean .*'lora'"),
    (dict(variant="lora", rank=4), TypeError, "lora has no hyperparameter 'rank'"),
    (dict(variant="lora", alhpa=4.0), TypeError, "did you mean 'alpha'"),
    (dict(variant="lora", r=0), ValueError, "lora: r=0 must be ≥ 1"),
    (dict(variant="lora", r=2.5), ValueError, "r=2.5 must be int"),
    (dict(variant="lora", r=True), ValueError, "r=True must be int"),
    (dict(variant="lora", alpha=float("nan")), ValueError, "alpha=nan must be finite"),
    (dict(variant="lora", dropout=1.0), ValueError, r"dropout=1.0 must be in \[0, 1\)"),
    (dict(variant="lora", targets=["uq"]), ValueError, "targets: 'uq' matches no layer"),
    (dict(variant="lora", targets=["norm"]), ValueError, "only norm, a LayerNorm"),
    (dict(variant="lora", targets=lambda n, m: False), ValueError, "picks none of 3 layers"),
    (dict(variant="lora", exclude=["downn"]), ValueError, "exclude: 'downn' .* 'down'"),
    (dict(variant="lora", exclude=["up", "down"]), ValueError, "leave no layer"),
    (dict(variant="lora", overrides={"upp": dict(r=2)}), ValueError, "overrides: 'upp'"),
    (dict(variant="lora", overrides={"up": dict(q=2)}), TypeError, "no hyperparameter 'q'"),
    (dict(variant="lora", name="a.b"), ValueError, "without dots"),
    (dict(variant="lora", dtype=torch.int64), ValueError, "dtype=torch.int64"),
    (dict(variant="lora", calibration=[]), ValueError, "lora takes no calibration"),
    (dict(variant="pissa", r=25), ValueError, "pissa: block.up has 24 singular values.* r ≤ 24"),
    (dict(variant="pissa", alpha=-1.0), ValueError, "alpha=-1.0 must be positive"),
    (dict(variant="antipasto_rot"), ValueError, "block.up has 24 singular values.*r=256"),
    (dict(variant="antipasto_rot", r=10), ValueError, "r=10 must be a multiple of block_size=4"),
    (dict(variant="antipasto_rot", r=8, rotate_basis="W"), ValueError, "one of 'V', 'U', 'both'"),
    (dict(variant="antipasto_rot", r=8, max_rotation_angle=4.0), ValueError, "must be in"),
    (dict(variant="dplr", r=8, lora_rank=9), ValueError, "lora_rank=9 exceeds r=8"),
    (dict(variant="dplr", r=16, calibration=[torch.randn(3, 24)]), ValueError, "3 calibration"),
    (dict(variant="oft"), ValueError, "up has in_features=24, .* use 2, 3, 4, 6, 8, 12, 24"),
    (dict(variant="oft", block_size=1), ValueError, "block_size=1 must be ≥ 2"),
    (dict(variant="oft", block_size=4, n_blocks=2), ValueError, "give one of them"),
    (dict(variant="oft", n_blocks=5), ValueError, "n_blocks=5 .* use 1, 2, 3, 4, 6, 8, 12"),
    (dict(variant="oft", block_size=8, terms=1), ValueError, "terms=1 must be ≥ 2"),
    (dict(variant="oft", block_size=8, eps=0.0), ValueError, "eps=0.0 must be positive"),
    (dict(variant="jora", core="diagg"), ValueError, "did you mean 'diag'"),
    (dict(variant="jora", k=33), ValueError, "block.up has room for 32 pairs"),
]  # fmt: skip


@pytest.mark.parametrize("arguments, error, message", REFUSED, ids=[row[-1] for row in REFUSED])
def test_a_refusal_names_the_fault_and_changes_nothing(arguments, error, message):
    model = MLP()
    before = snapshot(model)
    # The shape checker would complain of a mistyped hyperparameter first, in its own words.
    with unchecked(), pytest.raises(error, match=message):
        ll.attach(model, **arguments)
    unchanged(model, before)


@pytest.mark.parametrize("variant", ["pissa", "antipasto_rot", "dplr", "dora", "jora"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_after_other_layers_were_ready(variant, value):
    model = MLP()
    model.block["down"].weight.data[3, 5] = value
    before = snapshot(model)
    r = {} if variant == "jora" else {"r": 8}
    with pytest.raises(ValueError, match=f"{variant}: block.down has NaN or infinite weights"):
        ll.attach(model, variant, **r)
    for key, tensor in before["tensors"].items():
        torch.testing.assert_close(model.state_dict()[key], tensor, rtol=0, atol=0, equal_nan=True)
    assert type(model.block["up"]) is nn.Linear and not hasattr(model.block["up"], "adapters")


def test_dora_refuses_a_row_without_direction():
    model = MLP()
    model.block["up"].weight.data[7] = 0
    with pytest.raises(ValueError, match=r"dora: block.up has a zero row \(7\)"):
        ll.attach(model, "dora")


def test_layers_whose_forward_never_runs_are_refused():
    attention = nn.MultiheadAttention(16, 2)
    with pytest.raises(ValueError, match=r"out_proj is read by the model \(nn.Multihead"):
        ll.attach(attention, "lora")
    block = nn.ModuleDict(
        {"enc": nn.TransformerEncoderLayer(16, 2, 32), "other": nn.Linear(16, 16)}
    )
    with pytest.raises(ValueError, match="enc.linear1 is read by enc .*fast path"):
        ll.attach(block, "lora", targets=["linear1"])
    assert sites(block, exclude=r"enc\..*") == ["other"]


def test_the_same_name_twice_is_refused_and_another_is_not():
    model = MLP()
    ll.attach(model, "lora")
    with pytest.raises(ValueError, match="block.up has an adapter 'default' already"):
        ll.attach(model, "lora")
    ll.attach(model, "lora", name="other")
    with pytest.raises(ValueError, match="no adapter 'third'; it has 'default', 'other'"):
        ll.detach(model, "third")


@pytest.mark.parametrize(
    "call", [ll.detach, ll.enable, ll.merge, ll.step, ll.regulariser, ll.delta_weights]
)
def test_a_model_without_adapters_is_refused(call):
    with pytest.raises(ValueError, match="no adapters; attach one first"):
        call(MLP())


def test_disabled_merged_strength_and_save_refuse_a_model_without_adapters(tmp_path):
    with pytest.raises(ValueError, match="attach one first"), ll.disabled(MLP()):
        pass
    with pytest.raises(ValueError, match="attach one first"), ll.merged(MLP()):
        pass
    with pytest.raises(ValueError, match="attach one first"):
        ll.strength(MLP(), 0.5)
    with pytest.raises(ValueError, match="attach one first"):
        ll.save(MLP(), tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="c=nan must be finite"):
        ll.strength(MLP(), float("nan"))


def test_attach_freezes_the_base_and_detaching_in_any_order_thaws_it():
    for order in (("a", "b"), ("b", "a")):
        model = MLP()
        model.norm.bias.requires_grad_(False)
        before = snapshot(model)
        ll.attach(model, "lora", name="a")
        ll.attach(model, "oft", name="b", block_size=8, targets=["up"])
        assert all("adapters" in n for n, p in model.named_parameters() if p.requires_grad)
        for name in order:
            ll.detach(model, name)
        unchanged(model, before)


def test_what_was_attached_inside_is_detached_from_outside():
    model = MLP()
    before = snapshot(model)
    ll.attach(model.block, "lora", name="inner")
    ll.attach(model, "lora", name="outer", targets=["head"])
    ll.detach(model)
    unchanged(model, before)


def test_detaching_a_part_thaws_that_part():
    model = MLP()
    ll.attach(model, "lora")
    ll.detach(model.block)
    assert all(p.requires_grad for p in model.block.parameters())
    assert not any(p.requires_grad for p in model.norm.parameters())


def test_seeds_make_a_layer_start_alike_whatever_else_is_adapted():
    first, second, third = MLP(), MLP(), MLP()
    ll.attach(first, "lora", seed=3)
    ll.attach(second, "lora", ["down"], seed=3)
    ll.attach(third, "lora", seed=4)
    a, b, c = (m.block["down"].adapters.default.A for m in (first, second, third))
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(5)
    ll.attach(fourth := MLP(), "lora")
    torch.manual_seed(5)
    ll.attach(fifth := MLP(), "lora")
    assert torch.equal(fourth.block["up"].adapters.default.A, fifth.block["up"].adapters.default.A)


def test_a_summary_counts_parameters_and_bytes():
    chart = ll.plan(MLP(), "lora", r=2)
    assert chart.trainable == 2 * 2 * (24 + 40) and chart.bytes == 4 * chart.trainable
    assert ll.plan(MLP(), "lora", r=2, dtype=torch.bfloat16).bytes == 2 * chart.trainable
    text = str(chart)
    assert re.search(r"1 ×\s+up\s+40 × 24\s+128\s+A\[2, 24\] B\[40, 2\]", text)
    assert "2 layers, 256 trained parameters" in text


def test_strength_is_set_for_good_or_for_a_while():
    model, x = MLP(), torch.randn(3, 24)
    ll.attach(model, "lora")
    model.block["up"].adapters.default.B.data.normal_()
    y = model(x)
    ll.strength(model, 0.0)
    base = model(x)
    with ll.strength(model, 1.0):
        assert torch.equal(model(x), y)
    assert torch.equal(model(x), base) and not torch.equal(base, y)
    ll.enable(model, on=False)
    assert torch.equal(model(x), base)


def test_strength_runs_the_frozen_layer_once():
    layer, calls = nn.Linear(8, 8), []
    ll.attach(layer, "lora")
    frozen = layer.frozen
    layer.instance_forward = lambda x: calls.append(1) or nn.functional.linear(x, layer.weight)
    with ll.strength(layer, 0.5):
        layer(torch.randn(2, 8))
    assert len(calls) == 1 and callable(frozen)
