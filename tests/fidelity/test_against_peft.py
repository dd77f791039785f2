"""The methods against PEFT 0.21.2 with the same tensors: outputs and every gradient."""

import math

import peft
import pytest
import torch
from peft_reference import assert_agree, both, peft_layer, scatter
from reference import assert_close, in_dtypes, inputs, linear, on_layers, settings, tensors
from torch import nn

import lora_lite as ll


def test_the_version_these_conventions_are_of():
    assert peft.__version__ == "0.21.2"


def lora_tensors(other: nn.Module) -> dict[str, nn.Parameter]:
    return {"A": other.lora_A["default"].weight, "B": other.lora_B["default"].weight}


@on_layers
@in_dtypes
@settings(
    plain=dict(r=8, alpha=16.0),
    odd=dict(r=3, alpha=7.0),
    rslora=dict(r=6, alpha=5.0, rslora=True),
)
def test_lora(d_in, d_out, bias, dtype, hyper):
    config = peft.LoraConfig(
        r=hyper["r"], lora_alpha=hyper["alpha"], use_rslora=hyper.get("rslora", False)
    )
    layer, other = both("lora", config, d_in, d_out, bias, dtype, **hyper)
    scatter(lora_tensors(other))
    assert_agree(layer, other, lora_tensors(other))


@on_layers
@in_dtypes
@settings(
    plain=dict(r=8, alpha=16.0),
    odd=dict(r=3, alpha=7.0),
    rslora=dict(r=6, alpha=5.0, rslora=True),
)
def test_dora(d_in, d_out, bias, dtype, hyper):
    config = peft.LoraConfig(
        use_dora=True,
        r=hyper["r"],
        lora_alpha=hyper["alpha"],
        use_rslora=hyper.get("rslora", False),
    )
    layer, other = both("dora", config, d_in, d_out, bias, dtype, **hyper)
    m = other.lora_magnitude_vector["default"].weight
    # PEFT's magnitudes start in float32.
    assert_close(tensors(layer)["m"], m, 1e-6)
    pairs = {**lora_tensors(other), "m": m}
    scatter(pairs)
    assert_agree(layer, other, pairs)


PISSA = settings(
    plain=dict(r=8),
    alpha=dict(r=5, alpha=12.0),
    rslora=dict(r=5, alpha=3.0, rslora=True),
)


def pissa_config(r, alpha=None, rslora=False):
    return peft.LoraConfig(init_lora_weights="pissa", r=r, lora_alpha=alpha or r, use_rslora=rslora)


@on_layers
@PISSA
def test_pissa_from_the_start_of_each(d_in, d_out, bias, hyper):
    """PEFT decomposes in float32 alone, and so do we here; the trained tensors move alike."""
    layer, other = both("pissa", pissa_config(**hyper), d_in, d_out, bias, torch.float32, **hyper)
    ours, theirs = tensors(layer), lora_tensors(other)
    assert_close(ours["B"] @ ours["A"], theirs["B"] @ theirs["A"], 1e-5)
    scatter(theirs)
    assert_agree(layer, other, theirs)


@on_layers
@PISSA
def test_pissa_on_the_same_residual(d_in, d_out, bias, hyper):
    """In float64, PEFT's base weight being our residual."""
    layer, other = both("pissa", pissa_config(**hyper), d_in, d_out, bias, torch.float64, **hyper)
    s = hyper.get("alpha", hyper["r"]) / (
        math.sqrt(hyper["r"]) if "rslora" in hyper else hyper["r"]
    )
    ours = tensors(layer)
    other.base_layer.weight.data = layer.weight - s * ours["B0"] @ ours["A0"]
    scatter(lora_tensors(other))
    assert_agree(layer, other, lora_tensors(other))


def oft_pair(d_in, d_out, bias, dtype, block_size, share, scale=1, coft=False, **peft_hyper):
    """PEFT's OFT layer and its rotation entries, moved; `scale` of the noise."""
    config = peft.OFTConfig(
        r=0, oft_block_size=block_size, block_share=share, coft=coft, **peft_hyper
    )
    base = linear(d_in, d_out, bias, dtype=torch.float32)
    other = peft_layer(base, config, dtype)
    q = other.oft_R["default"].weight
    scatter({"q": q}, 0.2 * scale)
    return base.to(dtype), other, q


on_blocks = pytest.mark.parametrize("block_size, share", [(2, False), (4, True), (8, False)])


@on_layers
@in_dtypes
@on_blocks
@pytest.mark.parametrize("terms", [4, 5, 6])
def test_oft_series(d_in, d_out, bias, dtype, block_size, share, terms):
    layer, other, q = oft_pair(
        d_in, d_out, bias, dtype, block_size, share, num_cayley_neumann_terms=terms
    )
    hyper = dict(block_size=block_size, block_share=share, terms=terms)
    ll.attach(layer, "oft", dtype=dtype, **hyper)
    assert_agree(layer, other, {"q": q})


@on_layers
@on_blocks
def test_oft_with_three_terms_is_our_four(d_in, d_out, bias, block_size, share):
    """PEFT adds Q³ to three terms as well: I + 2Q + 2Q² + Q³."""
    layer, other, q = oft_pair(
        d_in, d_out, bias, torch.float64, block_size, share, num_cayley_neumann_terms=3
    )
    hyper = dict(block_size=block_size, block_share=share, terms=4)
    ll.attach(layer, "oft", dtype=torch.float64, **hyper)
    assert_agree(layer, other, {"q": q})


def test_oft_with_two_terms_is_ours_at_twice_the_entries():
    """PEFT's two terms are I + 2Q, where (I + Q)(I + … ) stops at I + Q."""
    layer, other, q = oft_pair(24, 40, True, torch.float64, 8, False, num_cayley_neumann_terms=2)
    ll.attach(layer, "oft", dtype=torch.float64, block_size=8, terms=2)
    tensors(layer)["q"].data.copy_(2 * q)
    assert_close(layer(inputs(24)), other(inputs(24)))


@on_layers
@in_dtypes
@on_blocks
def test_oft_exact_has_the_opposite_sign(d_in, d_out, bias, dtype, block_size, share):
    layer, other, q = oft_pair(
        d_in, d_out, bias, dtype, block_size, share, use_cayley_neumann=False
    )
    hyper = dict(block_size=block_size, block_share=share, exact=True)
    ll.attach(layer, "oft", dtype=dtype, **hyper)
    assert_agree(layer, other, {"q": q}, sign=-1)


@pytest.mark.parametrize("eps", [1e-3, 0.1])
@pytest.mark.parametrize("share", [False, True])
def test_coft_projects_as_peft_does(eps, share):
    """PEFT within its forward, we after the step."""
    layer, other, q = oft_pair(24, 40, True, torch.float64, 8, share, 1, coft=True, eps=eps)
    ll.attach(
        layer, "oft", dtype=torch.float64, block_size=8, block_share=share, coft=True, eps=eps
    )
    tensors(layer)["q"].data.copy_(q)
    ll.step(layer)
    y = other(inputs(24))
    # PEFT's radius is a float32 number.
    assert_close(tensors(layer)["q"], q, 1e-6)
    assert_close(layer(inputs(24)), y, 1e-6)
