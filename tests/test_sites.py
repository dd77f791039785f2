"""Layers that are no plain linear ones: norms, embeddings with what is tied to them, and blocks."""

import pytest
import torch
from models import llama
from torch import nn

import lora_lite as ll
from lora_lite.testing import move

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
