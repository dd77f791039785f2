"""Merging writes f(I), once, or refuses."""

import pytest
import torch
from jaxtyping import Float
from models import IDS, MLP, gpt2, llama

import lora_lite as ll
from lora_lite.testing import move, snapshot, unchanged


def adapted(variant="lora", dtype=torch.float32, **hyperparameters):
    model = MLP().to(dtype)
    ll.attach(model, variant, **hyperparameters)
    move(model)
    return model


def test_merged_logits_of_a_llama_and_a_gpt2():
    for model in (llama(), gpt2()):
        ll.attach(model, "jora", k=4)
        move(model)
        logits = model(IDS).logits
        ll.merge(model)
        error = (model(IDS).logits - logits).norm() / logits.norm()
        assert error < 1e-5
        assert not any("adapters" in key for key in model.state_dict())


def test_the_report_says_what_rounding_takes():
    fine = ll.merge(adapted(dtype=torch.float32)).layers
    coarse = ll.merge(adapted(dtype=torch.bfloat16)).layers
    for a, b in zip(fine, coarse):
        assert 0.01 < a.change < 10 and abs(a.change - b.change) < 0.1 * a.change
        assert a.lost < 1e-5 < 1e-3 < b.lost < 1
    tiny = MLP().to(torch.bfloat16)
    ll.attach(tiny, "lora")
    move(tiny, scale=1e-4)
    assert ll.merge(tiny).layers[0].lost > 0.5
    assert "lost to rounding" in str(ll.merge(adapted()))


def test_the_merge_rounds_once():
    model = adapted(dtype=torch.bfloat16)
    layer = model.block["up"]
    W, A, B = layer.weight.double(), layer.adapters.default.A, layer.adapters.default.B
    want = (W + 2 * B.double() @ A.double()).bfloat16()
    ll.merge(model)
    assert (layer.weight != want).float().mean() < 0.01


def test_deltas_follow_strength_and_switches():
    model = adapted()
    whole = ll.delta_weights(model)["block.up"]
    with ll.strength(model, 0.5):
        half = ll.delta_weights(model)["block.up"]
    with ll.disabled(model):
        none = ll.delta_weights(model)["block.up"]
    assert torch.allclose(half, whole / 2) and not none.any() and whole.any()


def test_wide_layers_are_probed_in_chunks():
    layer = torch.nn.Linear(2100, 3)
    ll.attach(layer, "lora")
    move(layer)
    x = torch.randn(4, 2100)
    y = layer(x)
    ll.merge(layer)
    assert torch.allclose(layer(x), y, atol=1e-5)


def test_nan_is_refused_and_nothing_is_written():
    model = adapted()
    model.block["down"].adapters.default.A.data[0, 0] = float("nan")
    before = model.block["up"].weight.clone()
    with pytest.raises(ValueError, match="block.down: the merged weight has NaN"):
        ll.merge(model)
    assert torch.equal(model.block["up"].weight, before)
    assert hasattr(model.block["up"], "adapters")


def test_a_tied_weight_is_refused_with_the_ways_out():
    model = llama(tie=True)
    ll.attach(model, "lora", targets=["lm_head"])
    before = snapshot(model)
    with pytest.raises(ValueError, match="shared by .*embed_tokens.*untie it.*keep the adapter"):
        ll.merge(model)
    with pytest.raises(ValueError, match="shared by"), ll.merged(model):
        pass
    unchanged(model, before)


def test_merging_twice_or_with_an_adapter_off_is_refused():
    model = adapted()
    with ll.disabled(model), pytest.raises(ValueError, match="'default' is off"):
        ll.merge(model)
    with ll.merged(model), pytest.raises(ValueError, match="merged already"):
        ll.merge(model)
    ll.merge(model)
    with pytest.raises(ValueError, match="no adapters"):
        ll.merge(model)


def test_what_is_not_linear_is_refused_by_name():
    model = adapted("jora", clip="tanh", magnitude="none")
    with pytest.raises(ValueError, match="jora: block.up can't be merged: .*tanh"):
        ll.merge(model)
    with pytest.raises(ValueError, match="tanh"):
        ll.delta_weights(model)


def test_an_exception_inside_merged_brings_the_base_back():
    model = adapted()
    before = snapshot(model)
    with pytest.raises(RuntimeError), ll.merged(model):
        raise RuntimeError
    unchanged(model, before)


class Shift(ll.Variant):
    """y = W x + c: an affine method whose offset needs a bias to be merged into."""

    c: Float[torch.Tensor, "d_out"] = ll.ParamSpec(lambda shape, generator: torch.ones(shape))

    def forward(self, x, W, c):
        return W(x) + c


def test_an_offset_goes_to_the_bias_or_is_refused():
    model, x = MLP(), torch.randn(2, 24)
    ll.attach(model, Shift, targets=["up"])
    y = model(x)
    ll.merge(model)
    assert torch.allclose(model(x), y, atol=1e-6)
    ll.attach(model, Shift, targets=["down"])
    with pytest.raises(ValueError, match="block.down needs a bias"):
        ll.merge(model)
