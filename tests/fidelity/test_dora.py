"""DoRA (arXiv:2402.09353 §4.1 eq. 5, §4.3 eq. 11) against its dense W'."""

import math

import pytest
import torch
from reference import (
    TOLERANCE,
    adapted,
    assert_close,
    assert_follows,
    assert_starts_as_identity,
    first_gradients,
    in_dtypes,
    inputs,
    linear,
    on_layers,
    rel_error,
    settings,
    tensors,
    updated_weight,
    with_and_without_bias,
)

import lora_lite as ll

LAWS = {"dora": [{}]}
KEPT = {"dora": (dict(r=8), 96 + 8 + 160)}


def dense(s, detach=True):
    """Eq. 5, the norm of each output row held constant as §4.3 has it."""

    def W_new(W, A, B, m, m0):
        V = W + s * B @ A
        norm = V.norm(dim=1, keepdim=True)
        return m[:, None] * V / (norm.detach() if detach else norm)

    return W_new


@on_layers
@in_dtypes
@settings(
    default=dict(s=16 / 8),
    equal=dict(s=1, r=4, alpha=4.0),
    odd=dict(s=7 / 3, r=3, alpha=7.0),
    rslora=dict(s=5 / math.sqrt(3), r=3, alpha=5.0, rslora=True),
)
def test_matches_eq_5_with_the_norm_detached(d_in, d_out, bias, dtype, hyper):
    hyper = dict(hyper)
    s = hyper.pop("s")
    model = adapted("dora", d_in, d_out, bias, dtype=dtype, **hyper)
    assert_follows(model, dense(s), {"A", "B", "m"}, TOLERANCE[dtype])


def test_gradients_through_the_norm_would_differ():
    model = adapted("dora")
    with pytest.raises(AssertionError, match="the gradient to x|the gradient to [AB]"):
        assert_follows(model, dense(2, detach=False), {"A", "B", "m"}, 0.1)


@with_and_without_bias
def test_starts_as_identity(bias):
    assert_starts_as_identity("dora", bias)


def test_first_step_moves_B_and_m():
    grads = first_gradients("dora")
    assert not grads["A"].any()
    assert grads["B"].any() and grads["m"].any()


def test_m_starts_as_the_row_norms():
    model = adapted("dora", moved=0)
    assert_close(tensors(model)["m"], model.weight.norm(dim=1))
    assert not tensors(model)["B"].any()


def test_shapes_and_parameter_count():
    chart = ll.plan(linear(24, 40), "dora", r=5)
    shapes = chart.sites[0].shapes
    assert (shapes["A"], shapes["B"], shapes["m"]) == ((5, 24), (40, 5), (40,))
    assert chart.trainable == 5 * (24 + 40) + 40


@on_layers
def test_row_norms_are_the_magnitudes(d_in, d_out, bias):
    model = adapted("dora", d_in, d_out, bias)
    m = tensors(model)["m"]
    assert (m < 0).any()
    assert_close(updated_weight(model).norm(dim=1), m.abs())


@on_layers
def test_is_lora_where_m_is_the_norm(d_in, d_out, bias):
    model, lora = (adapted(name, d_in, d_out, bias, r=4) for name in ("dora", "lora"))
    A, B, m = (tensors(model)[key] for key in "ABm")
    m.data = (model.weight + 16 / 4 * B @ A).norm(dim=1)
    tensors(lora)["A"].data, tensors(lora)["B"].data = A.data, B.data
    assert_close(model(inputs(d_in)), lora(inputs(d_in)))


def test_a_change_of_gauge_changes_nothing():
    model = adapted("dora", r=4)
    A, B = tensors(model)["A"], tensors(model)["B"]
    before = updated_weight(model)
    G = torch.randn(4, 4, dtype=torch.float64) + 3 * torch.eye(4)
    A.data, B.data = G @ A.data, B.data @ G.inverse()
    assert_close(updated_weight(model), before)


@pytest.mark.parametrize("left", [1e-1, 1e-3, 1e-5])
def test_norm_keeps_its_digits_where_the_update_cancels_rows(left):
    """16 rows of W lie in the span of A and s B A takes all but `left` of them away."""
    model = linear(24, 40, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    A = torch.randn(8, 24, generator=generator)
    C = torch.randn(16, 8, generator=generator)
    model.weight.data[:16] = C @ A
    ll.attach(model, "dora", alpha=8.0)
    with torch.no_grad():
        tensors(model)["A"].copy_(A)
        tensors(model)["B"][:16] = (left - 1) * C
    A, B, m = (tensors(model)[key].double() for key in "ABm")
    V = model.weight.double() + B @ A
    # The rows left over are themselves float32 numbers minus float32 numbers.
    tolerance = max(1e-5, 1e-6 / left)
    want = (m / V.norm(dim=1))[:, None] * V
    assert_close(updated_weight(model).norm(dim=1), want.norm(dim=1).float(), tolerance)


def test_stays_finite_where_the_update_cancels_every_row():
    model = linear(24, 40, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    A, C = torch.randn(1, 24, generator=generator), torch.randn(40, 1, generator=generator)
    model.weight.data = C @ A
    ll.attach(model, "dora", r=1, alpha=1.0)
    with torch.no_grad():
        tensors(model)["A"].copy_(A)
        tensors(model)["B"].copy_(-(1 - 1e-6) * C)
    assert model(inputs(24, torch.float32)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_magnitudes_keep_their_digits(dtype):
    layer = torch.nn.Linear(48, 40, dtype=dtype)
    ll.attach(layer, "dora", r=4, seed=0)
    with torch.no_grad():
        layer.adapters.default.m.mul_(torch.logspace(-3, 0, 40))
    x = torch.randn(30, 48, dtype=dtype)
    y, want = layer(x), layer.double()(x.double())
    off = (y.double() - want).norm(dim=0) / want.norm(dim=0)
    assert off.max() < 4 * torch.finfo(dtype).eps


def test_a_row_of_zeros_has_no_direction():
    model = linear()
    model.weight.data[7] = 0
    with pytest.raises(ValueError, match=r"zero row \(7\)"):
        ll.attach(model, "dora")


def test_dropout_acts_on_the_branch_alone_and_in_training_alone():
    model = adapted("dora", dropout=0.75)
    x = torch.eye(24, dtype=torch.float64).repeat(20, 1)
    A, B, m = (tensors(model)[key] for key in "ABm")
    V = model.weight + 2 * B @ A
    g = m / V.norm(dim=1)
    assert_close(model.eval()(x), x @ (g[:, None] * V).T + model.bias)
    # With one coordinate per row, the branch of a row is dropped whole or scaled by 1/(1 − p).
    branch = model.train()(x) - (g * (x @ model.weight.T) + model.bias)
    ratio = branch.norm(dim=1) / (g * (x @ (2 * B @ A).T)).norm(dim=1)
    kept = ratio > 2
    assert rel_error(ratio, 4 * kept.double()) < 1e-10
    assert 0.15 < kept.double().mean() < 0.35
