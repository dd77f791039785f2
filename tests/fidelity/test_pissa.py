"""PiSSA (arXiv:2404.02948 §3 eqs. 2–5, App. C eqs. 9–10) against W' = W_res + s B A."""

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
    rank,
    settings,
    singular_values,
    tensors,
    updated_weight,
    with_and_without_bias,
)

import lora_lite as ll

LAWS = {"pissa": [{}, dict(r=4, svd="randomised")]}
KEPT = {"pissa": (dict(r=8), 96 + 16)}


def residual(W, r):
    """Eq. 4, by a decomposition of its own."""
    U, S, Vh = torch.linalg.svd(W.detach(), full_matrices=False)
    return U[:, r:] @ torch.diag(S[r:]) @ Vh[r:]


@on_layers
@in_dtypes
@settings(
    default=dict(s=1, r=8),
    alpha=dict(s=12 / 5, r=5, alpha=12.0),
    rslora=dict(s=3 / math.sqrt(5), r=5, alpha=3.0, rslora=True),
    rank_one=dict(s=1, r=1),
    full_rank=dict(s=1, r=24),
)
def test_matches_eq_5(d_in, d_out, bias, dtype, hyper):
    hyper = dict(hyper)
    s = hyper.pop("s")
    model = adapted("pissa", d_in, d_out, bias, dtype=dtype, **hyper)

    def dense(W, A, B, A0, B0):
        return residual(W, hyper["r"]) + s * B @ A

    assert_follows(model, dense, {"A", "B"}, TOLERANCE[dtype])


@on_layers
def test_matches_the_difference_form(d_in, d_out, bias):
    """App. C eq. 9, with whatever start the adapter holds."""
    model = adapted("pissa", d_in, d_out, bias, r=5, alpha=12.0)
    for key in ("A0", "B0"):
        tensors(model)[key].normal_()
    dense = lambda W, A, B, A0, B0: W + 12 / 5 * (B @ A - B0 @ A0)
    assert_follows(model, dense, {"A", "B"}, 1e-10)
    assert rank(updated_weight(model) - model.weight) == 10


@with_and_without_bias
@pytest.mark.parametrize("svd", ["exact", "randomised"])
def test_starts_as_identity(bias, svd):
    assert_starts_as_identity("pissa", bias, svd=svd)


def test_first_step_moves_A_and_B():
    grads = first_gradients("pissa")
    assert grads["A"].any() and grads["B"].any()


def test_first_gradients_are_those_of_the_residual_form():
    """§3: ∂L/∂A = Xᵀ (∂L/∂Y) Bᵀ and ∂L/∂B = Aᵀ Xᵀ (∂L/∂Y), in the paper's transposed letters."""
    model = adapted("pissa", moved=0)
    x = inputs(24, batch=(6,))
    y = model(x)
    y.square().sum().backward()
    dy = 2 * y.detach()
    A, B = tensors(model)["A"], tensors(model)["B"]
    assert_close(A.grad.T, x.T @ dy @ B)
    assert_close(B.grad.T, A @ x.T @ dy)


@on_layers
@pytest.mark.parametrize("alpha", [None, 12.0])
def test_start_is_balanced_and_leaves_the_residual(d_in, d_out, bias, alpha):
    r, s = 5, 1 if alpha is None else alpha / 5
    model = adapted("pissa", d_in, d_out, bias, moved=0, r=r, alpha=alpha)
    A, B, W = tensors(model)["A"], tensors(model)["B"], model.weight
    S = singular_values(W)
    assert_close(A @ A.T, torch.diag(S[:r] / s))
    assert_close(B.T @ B, torch.diag(S[:r] / s))
    W_res = W - s * B @ A
    assert_close(W_res, residual(W, r))
    assert_close(singular_values(W_res)[: 24 - r], S[r:])
    assert (W_res.T @ B).abs().max() < 1e-12
    assert (W_res @ A.T).abs().max() < 1e-12


def test_alpha_changes_the_factors_and_not_the_function():
    model = adapted("pissa", moved=0, r=5)
    one, many = tensors(model), tensors(adapted("pissa", moved=0, r=5, alpha=20.0))
    assert_close(many["A"], one["A"] / 2)
    assert_close(4 * many["B"] @ many["A"], one["B"] @ one["A"])


def test_shapes_and_parameter_count():
    chart = ll.plan(linear(24, 40), "pissa", r=5)
    assert chart.sites[0].shapes == {"A": (5, 24), "B": (40, 5), "A0": (5, 24), "B0": (40, 5)}
    assert chart.trainable == chart.frozen == 5 * (24 + 40)


def test_a_change_of_gauge_changes_nothing():
    model = adapted("pissa", r=4)
    A, B = tensors(model)["A"], tensors(model)["B"]
    before = updated_weight(model)
    G = torch.randn(4, 4, dtype=torch.float64) + 3 * torch.eye(4)
    A.data, B.data = G @ A.data, B.data @ G.inverse()
    assert_close(updated_weight(model), before)


def test_randomised_svd_finds_the_principal_part():
    model = linear(64, 48)
    U, _, Vh = torch.linalg.svd(model.weight.detach(), full_matrices=False)
    model.weight.data = U @ torch.diag(0.7 ** torch.arange(48.0).double()) @ Vh
    W = model.weight.detach().clone()
    found = []
    for seed in (0, 0, 1):
        ll.attach(model, "pissa", svd="randomised", seed=seed, dtype=torch.float64)
        found.append(tensors(model)["B"] @ tensors(model)["A"])
        ll.detach(model)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    for principal in found:
        assert_close(principal, W - residual(W, 8), 1e-6)


def test_a_step_too_small_for_the_products_is_still_seen():
    """B A and B₀A₀ agree to float32's last digit; their difference keeps its own digits."""
    model = linear(24, 40, False, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    model.weight.data = torch.diag_embed(torch.ones(24)).new_zeros(40, 24)
    model.weight.data[:8, :8] = torch.diag(torch.arange(1.0, 9.0))
    ll.attach(model, "pissa", r=8)
    own = tensors(model)
    with torch.no_grad():
        own["A"][:, 8:] = 1e-9 * torch.randn(8, 16, generator=generator)
    x = torch.zeros(1, 24)
    x[:, 8:] = 1
    want = x.double() @ (own["B0"].double() @ (own["A"].double() - own["A0"].double())).T
    assert_close(model(x), want.float(), 1e-5)


def test_more_rank_than_the_layer_has_is_refused():
    with pytest.raises(ValueError, match="24 singular values, fewer than r=25"):
        ll.attach(linear(), "pissa", r=25)
