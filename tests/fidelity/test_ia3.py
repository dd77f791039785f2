"""(IA)³ (arXiv:2205.05638 §3.3) against W' = diag(l) W, b' = l ⊙ b and W' = W diag(l)."""

import json

import pytest
import torch
import torch.nn.functional as F
from affine_reference import assert_follows, updated_bias
from models import MLP, llama
from reference import (
    TOLERANCE,
    adapted,
    assert_close,
    assert_starts_as_identity,
    first_gradients,
    in_dtypes,
    inputs,
    linear,
    on_layers,
    settings,
    tensors,
    updated_weight,
    with_and_without_bias,
)
from safetensors.torch import load_file, save_file
from torch import nn

import lora_lite as ll
from lora_lite.checkpoint import digest, read
from lora_lite.shapes import unchecked

LAWS = {"ia3": [{}, dict(side="in")], "ia3_ff": [{}]}
KEPT = {"ia3": ({}, 160), "ia3_ff": ({}, 96)}

on_sides = pytest.mark.parametrize("side", ["out", "in"])


def dense(side):
    """§3.3: the keys and values l ⊙ (W x + b); (l_ff ⊙ γ(W₁ x)) W₂, γ(W₁ x) being the input."""

    def out(W, b, l):  # noqa: E741
        return torch.diag(l) @ W, torch.diag(l) @ b

    def into(W, b, l):  # noqa: E741
        return W @ torch.diag(l), b

    return out if side == "out" else into


@on_layers
@in_dtypes
@on_sides
def test_matches_the_scaled_weight(d_in, d_out, bias, dtype, side):
    model = adapted("ia3", d_in, d_out, bias, dtype=dtype, side=side)
    assert (tensors(model)["l"] < 0).any()
    assert_follows(model, dense(side), {"l"}, TOLERANCE[dtype])


@on_layers
@in_dtypes
def test_ia3_ff_scales_the_input(d_in, d_out, bias, dtype):
    model = adapted("ia3_ff", d_in, d_out, bias, dtype=dtype)
    assert_follows(model, dense("in"), {"l"}, TOLERANCE[dtype])


@on_sides
@with_and_without_bias
def test_starts_as_identity(bias, side):
    assert_starts_as_identity("ia3", bias, side=side)


@settings(out=dict(side="out"), into=dict(side="in"))
def test_every_number_moves_at_the_first_step(hyper):
    assert first_gradients("ia3", **hyper)["l"].all()


def test_shapes_and_parameter_count():
    """§3.3: d_k + d_v + d_ff a block."""
    assert ll.plan(linear(24, 40), "ia3").sites[0].shapes == {"l": (40,)}
    assert ll.plan(linear(24, 40), "ia3", side="in").sites[0].shapes == {"l": (24,)}
    assert ll.plan(linear(24, 40), "ia3_ff").sites[0].shapes == {"l": (24,)}
    chart = ll.plan(
        llama(),
        "ia3",
        ["k_proj", "v_proj", "down_proj"],
        overrides={"down_proj": dict(side="in")},
    )
    assert chart.trainable == 2 * (16 + 16 + 48)


def test_l_is_stored_as_itself_and_starts_at_one():
    model = adapted("ia3", moved=0)
    assert torch.equal(tensors(model)["l"], torch.ones(40, dtype=torch.float64))


@on_sides
def test_weight_decay_leaves_l_alone(side):
    model = adapted("ia3", side=side)
    (group,) = ll.param_groups(model, lr=0.1, weight_decay=0.5)
    assert group["weight_decay"] == 0
    assert [id(p) for p in group["params"]] == [id(tensors(model)["l"])]


def test_an_output_depends_on_its_own_number_alone():
    model = adapted("ia3")
    x, l = inputs(24), tensors(model)["l"]  # noqa: E741
    before = model(x)
    l.data[7] += 1
    moved = (model(x) != before).flatten(0, 1).any(0)
    assert moved.nonzero().tolist() == [[7]]


def test_the_gram_matrix_of_the_outputs_is_scaled_on_both_sides():
    """W'W'ᵀ = diag(l) W Wᵀ diag(l)."""
    model = adapted("ia3")
    W, W_new, l = model.weight, updated_weight(model), tensors(model)["l"]  # noqa: E741
    assert_close(W_new @ W_new.T, l[:, None] * (W @ W.T) * l)


def test_zeros_silence_the_layer_with_its_bias_or_its_input_alone():
    out, into = adapted("ia3"), adapted("ia3", side="in")
    for model in (out, into):
        tensors(model)["l"].data.zero_()
    assert not out(inputs(24)).any()
    assert torch.equal(into(inputs(24)), into.bias.expand(2, 3, 40))


@on_layers
@on_sides
def test_merges_with_its_bias(d_in, d_out, bias, side):
    model = adapted("ia3", d_in, d_out, bias, side=side)
    W, b, l = model.weight.clone(), model.bias, tensors(model)["l"].detach()  # noqa: E741
    want = dense(side)(W, torch.zeros(d_out).double() if b is None else b.clone(), l)
    ll.merge(model)
    assert_close(model.weight, want[0])
    if bias:
        assert_close(model.bias, want[1])


def test_vectors_of_two_adapters_multiply():
    model = adapted("ia3")
    ll.attach(model, "ia3", name="second", dtype=torch.float64)
    ll.attach(model, "ia3_ff", name="third", dtype=torch.float64)
    first, second, third = (model.adapters[name].l for name in ("default", "second", "third"))
    second.data = torch.linspace(-1, 2, 40).double()
    third.data = torch.linspace(-2, 1, 24).double()
    l = first * second  # noqa: E741
    assert_close(updated_weight(model), l[:, None] * model.weight * third)
    assert_close(updated_bias(model), l * model.bias)


class FeedForward(nn.Module):
    """γ(W_g x) ⊙ W_u x, or γ(W_u x), through W_d."""

    def __init__(self, gated):
        super().__init__()
        self.gated = gated
        self.gate, self.up, self.down = linear(24, 40), linear(24, 40), linear(40, 24)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x) if self.gated else F.gelu(self.up(x)))


@pytest.mark.parametrize("gated", [True, False])
def test_output_of_up_is_input_of_down_in_a_gated_network_alone(gated):
    outputs = []
    for target, side in (("up", "out"), ("down", "in")):
        model = FeedForward(gated)
        ll.attach(model, "ia3", [target], side=side, dtype=torch.float64)
        model.get_submodule(target).adapters.default.l.data = torch.linspace(-1, 2, 40).double()
        outputs.append(model(inputs(24)))
    if gated:
        assert_close(*outputs)
    else:
        assert (outputs[0] - outputs[1]).norm() > 0.1 * outputs[0].norm()


@on_sides
def test_a_change_below_bfloat16s_steps_is_still_seen(side):
    """1.003 is 1 in bfloat16, and yet outputs move by 0.3 % on average."""
    model = linear(96, 96, False, dtype=torch.bfloat16)
    model.weight.data = torch.eye(96, dtype=torch.bfloat16)
    ll.attach(model, "ia3", side=side)
    tensors(model)["l"].data.fill_(1.003)
    x = inputs(96, torch.bfloat16, (4096,))
    y, x = model(x).detach().double(), x.double()
    assert ((y - x) * x).sum() / x.square().sum() == pytest.approx(3e-3, rel=0.2)


def test_what_cannot_work_is_refused():
    with (
        unchecked(),
        pytest.raises(ValueError, match="ia3: side='both' must be one of 'out', 'in'"),
    ):
        ll.attach(linear(), "ia3", side="both")
    with pytest.raises(ValueError, match="overrides: 'wo' matches no layer"):
        ll.attach(MLP(), "ia3", ["up"], overrides={"wo": dict(side="in")})


@pytest.mark.parametrize("side, shape", [("out", 40), ("in", 24)])
def test_a_vector_of_the_other_side_is_refused(side, shape, tmp_path):
    path, model = tmp_path / "l.safetensors", MLP()
    ll.attach(model, "ia3", ["up"], side=side)
    ll.save(model, path)
    ll.detach(model)
    assert load_file(path)["block.up.l"].shape == (shape,)
    other = {"block.up.l": torch.ones(24 + 40 - shape)}
    header = read(path)[0] | dict(digest=digest(other))
    save_file(other, path, metadata={"lora-lite": json.dumps(header)})
    with pytest.raises(ValueError, match=rf"block\.up\.l is .*, and should be .* \({shape},\)"):
        ll.load(model, path)


class Flat:
    """PEFT's (d_out, 1) or (1, d_in) parameter as the vector that it holds."""

    def __init__(self, parameter):
        self.parameter = parameter

    data = property(lambda self: self.parameter.data.flatten())
    grad = property(lambda self: self.parameter.grad.flatten())


@on_layers
@in_dtypes
@settings(
    out=("ia3", {}, []), into=("ia3", dict(side="in"), ["0"]), feedforward=("ia3_ff", {}, ["0"])
)
def test_agrees_with_peft(d_in, d_out, bias, dtype, hyper):
    import peft
    from peft_reference import assert_agree, both

    variant, hyper, feedforward = hyper
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=feedforward)
    layer, other = both(variant, config, d_in, d_out, bias, dtype, **hyper)
    theirs = other.ia3_l["default"]
    assert theirs.shape == ((1, d_in) if feedforward else (d_out, 1))
    assert torch.equal(theirs.flatten(), tensors(layer)["l"])
    theirs.data = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(3)).to(theirs)
    assert_agree(layer, other, {"l": Flat(theirs)})
    other.merge()
    ll.merge(layer)
    assert_close(layer.weight, other.base_layer.weight, TOLERANCE[dtype], "the merged weight")
    if bias:
        assert_close(layer.bias, other.base_layer.bias, TOLERANCE[dtype], "the merged bias")
