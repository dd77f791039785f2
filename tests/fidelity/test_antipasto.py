"""AntiPaSTO's bounded gain: W' = W_res + U diag(S (1 + ELU(c g))) Vᵀ in the basis of
arXiv:2601.07473 §3.4 eq. 3. The choice of the triplets is in test_singular_basis.py."""

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

LAWS = {
    "antipasto": [dict(r=16), dict(r=8, coeff=0.5, suppress_only=True, svd="randomised")],
}
KEPT = {"antipasto": (dict(r=32), 32)}


def gain(g, coeff=1.0, suppress_only=False):
    """1 + ELU(c g): e^z below zero, 1 + z above."""
    z = coeff * (torch.minimum(g, torch.zeros_like(g)) if suppress_only else g)
    return torch.where(z > 0, 1 + z, z.exp())


def dense(*how):
    def W_new(W, U, S, Vh, g):
        W_res = W - U @ torch.diag(S) @ Vh
        return W_res + U @ torch.diag(S * gain(g, *how)) @ Vh

    return W_new


@on_layers
@in_dtypes
@pytest.mark.parametrize("coeff", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("suppress_only", [False, True])
def test_matches_its_definition(d_in, d_out, bias, dtype, coeff, suppress_only):
    hyper = dict(r=8, coeff=coeff, suppress_only=suppress_only)
    model = adapted("antipasto", d_in, d_out, bias, dtype=dtype, **hyper)
    assert (tensors(model)["g"] > 0).any() and (tensors(model)["g"] < 0).any()
    assert_follows(model, dense(coeff, suppress_only), {"g"}, TOLERANCE[dtype])


@settings(one=dict(r=1), all=dict(r=24))
def test_matches_with_one_triplet_and_with_all(hyper):
    assert_follows(adapted("antipasto", **hyper), dense(), {"g"}, 1e-10)


@on_layers
def test_matches_on_triplets_that_calibration_chose(d_in, d_out, bias):
    _, S, Vh = torch.linalg.svd(linear(d_in, d_out).weight.detach(), full_matrices=False)
    x = (inputs(len(S), batch=(50,)) / S**2) @ Vh
    model = adapted("antipasto", d_in, d_out, bias, r=8, calibration=[x])
    assert not torch.allclose(tensors(model)["S"], singular_values(model.weight)[:8])
    assert_follows(model, dense(), {"g"}, 1e-10)


@with_and_without_bias
@pytest.mark.parametrize("suppress_only", [False, True])
def test_starts_as_identity(bias, suppress_only):
    assert_starts_as_identity("antipasto", bias, r=8, suppress_only=suppress_only)


def test_every_gain_moves_at_the_first_step():
    for suppress_only in (False, True):
        assert first_gradients("antipasto", r=8, suppress_only=suppress_only)["g"].all()


def test_the_gradient_is_the_sheets():
    """dg_i = c S_i e(c g_i) Σ_t p_ti γ_ti with p = x V, γ = y_grad U; e = 1 above 0, e^z below."""
    model = adapted("antipasto", r=8, coeff=0.7)
    own, x, y_grad = tensors(model), inputs(24), inputs(40)
    model(x).backward(y_grad)
    z = 0.7 * own["g"].detach()
    overlap = ((x @ own["Vh"].T) * (y_grad @ own["U"])).sum((0, 1))
    assert_close(own["g"].grad, 0.7 * own["S"] * torch.where(z > 0, 1, z.exp()) * overlap)


def test_shapes_and_parameter_count():
    chart = ll.plan(linear(24, 40), "antipasto", r=8)
    assert chart.sites[0].shapes == dict(g=(8,), U=(40, 8), S=(8,), Vh=(8, 24))
    assert chart.trainable == 8


def core(model):
    """Uᵀ W' V, r × r."""
    return tensors(model)["U"].T @ updated_weight(model) @ tensors(model)["Vh"].T


@on_layers
def test_singular_vectors_and_signs_stay(d_in, d_out, bias):
    model = adapted("antipasto", d_in, d_out, bias, r=8, moved=5)
    own = tensors(model)
    kept = core(model)
    assert_close(kept, torch.diag(own["S"] * gain(own["g"].detach())))
    assert (kept.diagonal() > 0).all()
    assert rank(updated_weight(model) - model.weight) == 8
    others = model.weight - own["U"] @ torch.diag(own["S"]) @ own["Vh"]
    assert_close(updated_weight(model) - own["U"] @ kept @ own["Vh"], others)


def test_suppress_only_never_amplifies():
    model = adapted("antipasto", r=8, suppress_only=True, moved=5)
    got, g = core(model).diagonal() / tensors(model)["S"], tensors(model)["g"]
    assert (got <= 1 + 1e-12).all() and (got < 0.99).any()
    assert torch.equal(g > 0, (got - 1).abs() < 1e-12)


def test_coeff_zero_is_the_identity():
    model = adapted("antipasto", r=8, coeff=0.0)
    assert_close(updated_weight(model), model.weight, 1e-15)


def test_signs_of_singular_vectors_are_a_convention():
    model = adapted("antipasto", r=8)
    own, before = tensors(model), updated_weight(model)
    D = torch.tensor([1, -1, -1, 1, -1, 1, 1, -1]).double()
    own["U"].mul_(D)
    own["Vh"].mul_(D[:, None])
    assert_close(updated_weight(model), before)


def test_a_gain_too_small_for_the_products_is_still_seen():
    """Nothing is cropped out of W and put back: in bfloat16 a gain of 1e-5 keeps its own digits."""
    model = linear(24, 40, False, dtype=torch.bfloat16)
    ll.attach(model, "antipasto", r=8)
    own, x = tensors(model), inputs(24, torch.bfloat16)
    with torch.no_grad():
        own["g"].fill_(1e-5)
        model.weight.zero_()
    want = 1e-5 * (x.float() @ own["Vh"].T * own["S"]) @ own["U"].T
    assert_close(model(x).float(), want, 2e-2)


@settings(
    too_many=(dict(r=25), "24 singular values, fewer than r=25; use r ≤ 24"),
    none=(dict(r=0), "r=0 must be ≥ 1"),
    calibration=(dict(r=8, calibration=[inputs(24)]), "saw 6 calibration tokens, fewer than r=8"),
)
def test_what_cannot_work_is_refused(hyper):
    hyper, match = hyper
    with pytest.raises(ValueError, match=f"^antipasto: .*{match}"):
        ll.attach(linear(), "antipasto", **hyper)


def test_broken_weights_are_refused():
    model = linear()
    model.weight.data[3, 4] = float("nan")
    with pytest.raises(ValueError, match="antipasto: the model has NaN or infinite weights"):
        ll.attach(model, "antipasto", r=8)
