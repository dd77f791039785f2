"""Layers that are no plain linear ones: norms, embeddings with what is tied to them, and blocks."""

import copy

import pytest
import torch
from models import IDS, llama, t5
from safetensors.torch import load_file
from torch import nn

import lora_lite as ll
from lora_lite.testing import move, snapshot, unchanged

TOKENS = dict(token_indices=(3, 5))


class GatedNorm(nn.Module):
    """A norm that takes a second argument, as Mamba's do."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x, gate=None):
        gated = x if gate is None else x * gate
        return self.weight * gated / gated.square().mean(-1, keepdim=True).sqrt()


class FrozenBatchNorm(nn.Module):
    """By channel, and its weight is a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.ones(8))


def test_a_norm_gets_the_other_arguments_of_its_call():
    norm, x, gate = GatedNorm(), torch.randn(2, 8), torch.randn(2, 8)
    plain = norm(x, gate)
    ll.attach(norm, "ln_tuning")
    assert torch.equal(norm(x, gate), plain) and torch.equal(norm(x, gate=gate), plain)
    assert not torch.equal(norm(x), plain)
    move(norm)
    gamma = norm.adapters.default.weight
    assert torch.allclose(norm(x, gate), gamma * plain)
    ll.attach(norm, "ln_tuning", name="second")
    assert torch.allclose(norm(x, gate=gate), gamma * plain)


@pytest.mark.parametrize(
    "norm",
    [
        nn.LayerNorm(8, elementwise_affine=False),
        nn.LayerNorm((4, 8)),
        nn.GroupNorm(2, 8),
        nn.BatchNorm1d(8),
        nn.InstanceNorm1d(8, affine=True),
        FrozenBatchNorm(),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_norms_of_another_kind_are_named(norm):
    model = nn.ModuleDict({"inner": nn.ModuleDict({"norm": norm}), "other": nn.LayerNorm(8)})
    assert [s.name for s in ll.plan(model, "ln_tuning").sites] == ["other"]
    kind = type(norm).__name__
    with pytest.raises(ValueError, match=f"targets: 'norm' matches only inner.norm, a {kind}, "):
        ll.attach(model, "ln_tuning", targets=["norm"])


@pytest.mark.parametrize("variant, hyper", [("ln_tuning", {}), ("trainable_tokens", TOKENS)])
def test_what_is_offloaded_is_refused(variant, hyper, tmp_path):
    from accelerate import dispatch_model

    where = {"model.embed_tokens": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    where |= {"model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "cpu"}
    options = dict(main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    model = dispatch_model(llama(), where, **options)
    with pytest.raises(ValueError, match=rf"{variant}: model\.\S* is offloaded between calls"):
        ll.attach(model, variant, **hyper)
    assert not any("adapters" in name for name, _ in model.named_modules())


def sites(model, variant, **arguments):
    return [site.name for site in ll.plan(model, variant, **arguments).sites]


def adapted(model, variant="trainable_tokens", **hyper):
    ll.attach(model, variant, seed=0, **(hyper or TOKENS))
    move(model)
    return model


def test_a_table_of_several_layers_is_adapted_at_all_of_them():
    """T5 looks tokens up by its encoder's and its decoder's embedding, never by the shared one."""
    model, other = adapted(t5()), t5()
    chart = ll.plan(other, "trainable_tokens", **TOKENS)
    tied = ["encoder.embed_tokens", "decoder.embed_tokens", "lm_head"]
    assert [(s.name, list(s.tied)) for s in chart.sites] == [("shared", tied)]
    assert "shared + encoder.embed_tokens + decoder.embed_tokens + lm_head" in str(chart)
    assert chart.trainable == 2 * 32
    with torch.no_grad():
        other.shared.weight[[3, 5]] = model.shared.adapters.default.tokens
    want, got = (m(input_ids=IDS, labels=IDS.flip(1)).logits for m in (other, model))
    torch.testing.assert_close(got, want)
    for each in ("encoder.embed_tokens", r".*embed_tokens", lambda name, layer: "tok" in name):
        assert len(sites(t5(), "trainable_tokens", targets=each, **TOKENS)) == 1
    assert sites(t5(), "trainable_tokens", targets=["embed_tokens"], **TOKENS) == tied[:1]


def test_a_borrowed_adapter_is_saved_once_and_by_transformers_too(tmp_path):
    model = adapted(llama(tie=True))
    names = [name for name in model.state_dict() if "adapters" in name]
    assert names == [f"model.embed_tokens.adapters.default.{t}" for t in ("tokens", "index", "slot")]
    model.save_pretrained(tmp_path)
    assert torch.equal(
        load_file(tmp_path / "model.safetensors")[names[0]],
        model.model.embed_tokens.adapters.default.tokens,
    )
    assert model.lm_head.borrowed["default"] is model.model.embed_tokens.adapters.default
    ll.save(model, tmp_path / "a.safetensors")
    assert list(load_file(tmp_path / "a.safetensors")) == ["model.embed_tokens.tokens"]


def test_copies_and_pickles_borrow_from_their_own(tmp_path):
    model = adapted(llama(tie=True))
    logits = model(IDS).logits
    torch.save(model, tmp_path / "model.pt")
    for twin in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(twin(IDS).logits, logits)
        own = twin.model.embed_tokens.adapters.default
        assert twin.lm_head.borrowed["default"] is own
        assert own is not model.model.embed_tokens.adapters.default
        own.tokens.data.zero_()
        assert not torch.equal(twin(IDS).logits, logits)
        ll.detach(twin)
        assert type(twin.lm_head) is nn.Linear and not hasattr(twin.lm_head, "borrowed")
        assert torch.equal(twin(IDS).logits, llama(tie=True)(IDS).logits)
    assert torch.equal(model(IDS).logits, logits)
    double = model.double()
    assert double(IDS).logits.dtype == torch.float64


@pytest.mark.parametrize("order", ["head first", "head second"])
def test_a_tied_head_carries_an_adapter_of_its_own_beside_the_borrowed_one(order, tmp_path):
    """They compose in the order attached, which a rotation of the input tells apart."""
    model = llama(tie=True)
    before = snapshot(model)
    own = dict(targets=["lm_head"], name="head", block_size=8)
    steps = [("oft", own), ("trainable_tokens", TOKENS)]
    for variant, arguments in steps if order == "head first" else steps[::-1]:
        ll.attach(model, variant, seed=0, **arguments)
    move(model, scale=0.3)
    h = torch.randn(2, 3, 32)
    tokens, head = model.model.embed_tokens.adapters.default, model.lm_head
    alone = nn.Linear(32, 64, bias=False)
    alone.weight = nn.Parameter(head.weight.detach().clone())
    ll.attach(alone, "oft", block_size=8)
    alone.adapters["default"].q.data.copy_(head.adapters["head"].q)
    E, turned = alone.weight.detach().clone(), alone(h)
    delta = torch.zeros_like(E).index_copy(0, torch.tensor([3, 5]), tokens.tokens - E[[3, 5]])
    if order == "head first":
        want = turned + h @ delta.T
    else:
        alone.weight.data += delta
        want = alone(h)
    torch.testing.assert_close(head(h), want)
    assert not torch.allclose(turned + h @ delta.T, alone(h)) or order == "head first"
    with pytest.raises(ValueError, match="weight is shared by .*embed_tokens.*lm_head"):
        ll.merge(model)
    assert [row["layer"] for row in ll.diagnose(model).rows] == ["model.embed_tokens", "lm_head"]
    assert list(ll.delta_weights(model)) == ["model.embed_tokens", "lm_head"]
    ll.save(model, tmp_path / "tokens.safetensors", "default")
    ll.save(model, tmp_path / "head.safetensors", "head")
    fresh = llama(tie=True)
    for name in ("head", "tokens") if order == "head first" else ("tokens", "head"):
        ll.load(fresh, tmp_path / f"{name}.safetensors")
    assert torch.equal(fresh(IDS).logits, model(IDS).logits)
    ll.detach(model, "default")
    torch.testing.assert_close(model.lm_head(h), turned)
    ll.detach(model, "head")
    unchanged(model, before)
