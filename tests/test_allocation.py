"""Sizes by layer, chosen for all layers together from what calibration saw."""

import dataclasses

import pytest
import torch
from jaxtyping import Float
from models import MLP
from torch import Tensor

import lora_lite as ll
from lora_lite.testing import snapshot, unchanged
from lora_lite.variant import kaiming_uniform, zeros


class Loudest(ll.Variant, name="loudest_test"):
    """A rank of one for each time that a layer's input is twice as loud; none below 1."""

    needs_calibration = True
    r: int = 3

    A: Float[Tensor, "r d_in"] = ll.ParamSpec(kaiming_uniform)
    B: Float[Tensor, "d_out r"] = ll.ParamSpec(zeros)

    def check(self, d_in, d_out):
        if self.r > d_in:
            raise ValueError(f"has no room for r={self.r}")

    def statistic(self, x, W):
        return x.square().mean(1).sum()

    @classmethod
    def allocate(cls, variants, stats):
        if {v.r for v in variants.values()} & {7}:
            raise ValueError("r=7 is unlucky")
        if not stats:
            return variants
        ranks = {name: int(seen.mean.sqrt().log2().floor()) + 1 for name, seen in stats.items()}
        return {
            name: dataclasses.replace(variants[name], r=r) for name, r in ranks.items() if r > 0
        }

    def init(self, W, generator, stats):
        assert stats is not None and stats.count == 5
        return {}

    def forward(self, x, W, A, B):
        return W(x) + (x @ A.T) @ B.T


def loud(up, down):
    """A model and a batch whose inputs to `up` and `down` have these root mean squares."""
    model = MLP()
    x = up * torch.ones(5, 24)
    model.block["up"].weight.data.zero_()
    model.block["up"].bias.data.fill_(100.0)  # tanh gives 1
    model.block["down"].register_forward_pre_hook(lambda layer, args: (args[0] * down,))
    return model, x


def test_layers_get_the_sizes_that_calibration_gives_them():
    model, x = loud(16.0, 4.0)
    assert ll.plan(model, "loudest_test").sites[0].shapes["A"] == (3, 24)
    chart = ll.attach(model, "loudest_test", ["up", "down"], calibration=[x])
    ranks = {site.name: site.variant.r for site in chart.sites}
    assert ranks == {"block.up": 5, "block.down": 3}
    assert model.block["up"].adapters.default.A.shape == (5, 24)
    assert chart.trainable == 5 * 64 + 3 * 64
    assert "A[5, 24] B[40, 5] (r=5)" in str(chart) and "no adapter" not in str(chart)


def test_a_layer_left_out_gets_no_adapter_and_the_plan_says_so():
    model, x = loud(16.0, 0.1)
    before = snapshot(model)
    chart = ll.attach(model, "loudest_test", ["up", "down"], calibration=[x])
    assert [site.name for site in chart.sites] == ["block.up"]
    assert chart.left_out == ("block.down",)
    assert "no adapter: block.down" in str(chart) and "1 layers, 320 trained" in str(chart)
    assert not hasattr(model.block["down"], "adapters")
    assert not model.block["down"].weight.requires_grad
    ll.detach(model)
    unchanged(model, before)


def test_sizes_and_gaps_survive_a_file(tmp_path):
    model, x = loud(16.0, 0.1)
    ll.attach(model, "loudest_test", calibration=[x])
    model.block["up"].adapters.default.B.data.normal_()
    ll.save(model, tmp_path / "x.safetensors")
    fresh, _ = loud(16.0, 0.1)
    fresh.load_state_dict(model.state_dict(), strict=False)
    chart = ll.load(fresh, tmp_path / "x.safetensors")
    assert [(site.name, site.variant.r) for site in chart.sites] == [("block.up", 5)]
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize(
    "arguments, match",
    [
        (dict(), "loudest_test starts from what the layers see; pass calibration="),
        (dict(r=7, calibration=[torch.ones(5, 24)]), "loudest_test: r=7 is unlucky"),
        (dict(calibration=[1e-3 * torch.ones(5, 24)], targets=["up"]), "leaves no layer"),
        (dict(calibration=[2.0**30 * torch.ones(5, 24)]), "block.up has no room for r=31"),
    ],
    ids=["needs", "together", "none-left", "too-large"],
)
def test_what_cannot_be_allocated_is_refused_before_anything_changes(arguments, match):
    model, _ = loud(1.0, 1.0)
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        ll.attach(model, "loudest_test", **arguments)
    unchanged(model, before)


def test_a_plan_needs_no_calibration():
    with pytest.raises(ValueError, match="loudest_test: r=7 is unlucky"):
        ll.plan(MLP(), "loudest_test", r=7)
    assert len(ll.plan(MLP(), "loudest_test").sites) == 2
