"""Diagonal plus low rank: arXiv:2106.09685 §4.1 eq. 3 within the basis of arXiv:2601.07473 §3.4."""

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
    linear,
    on_layers,
    rank,
    settings,
    tensors,
    updated_weight,
    with_and_without_bias,
)

import lora_lite as ll

LAWS = {"dplr": [dict(r=16), dict(r=8, lora_rank=2, coeff=0.5, suppress_only=True)]}
KEPT = {"dplr": (dict(r=32, lora_rank=4), 32 + 4)}

SMALL = dict(r=8, lora_rank=3)


def dense(coeff, suppress_only):
    """W' = W_res + U (diag(S (1 + ELU(c g))) + c B A) Vᵀ, W_res = W − U diag(S) Vᵀ."""

    def W_new(W, U, S, Vh, g, A, B):
        z = coeff * (torch.minimum(g, torch.zeros_like(g)) if suppress_only else g)
        gain = torch.where(z > 0, 1 + z, z.exp())
        return W + U @ (torch.diag(S * gain) - torch.diag(S) + coeff * B @ A) @ Vh

    return W_new


@on_layers
@in_dtypes
@pytest.mark.parametrize("coeff", [1.0, 0.5, -1.0])
@pytest.mark.parametrize("suppress_only", [False, True])
def test_matches_its_definition(d_in, d_out, bias, dtype, coeff, suppress_only):
    hyper = dict(coeff=coeff, suppress_only=suppress_only, **SMALL)
    model = adapted("dplr", d_in, d_out, bias, dtype=dtype, **hyper)
    assert (tensors(model)["g"] > 0).any() and (tensors(model)["g"] < 0).any()
    assert_follows(model, dense(coeff, suppress_only), {"g", "A", "B"}, TOLERANCE[dtype])


def test_matches_with_all_triplets_and_full_core():
    model = adapted("antipasto_dplr", 40, 24, r=24, lora_rank=24)
    assert_follows(model, dense(1, False), {"g", "A", "B"}, 1e-10)


@with_and_without_bias
@pytest.mark.parametrize("suppress_only", [False, True])
def test_starts_as_identity(bias, suppress_only):
    assert_starts_as_identity("dplr", bias, suppress_only=suppress_only, **SMALL)


def test_first_step_moves_B_and_g():
    grads = first_gradients("dplr", **SMALL)
    assert not grads["A"].any()
    assert grads["B"].abs().min() > 0 and grads["g"].abs().min() > 0


def test_start_of_A_is_uniform_over_its_fan_in():
    model = linear(300, 280)
    ll.attach(model, "dplr", r=256, seed=0, dtype=torch.float64)
    A = tensors(model)["A"]
    assert 0.99 / 16 < A.abs().max() <= 1 / 16
    assert_close(A.square().mean(), torch.full((), 1 / 768, dtype=torch.float64), 0.05)


def test_shapes_and_parameter_count():
    chart = ll.plan(linear(24, 40), "dplr", **SMALL)
    own = dict(g=(8,), A=(3, 8), B=(8, 3), U=(40, 8), S=(8,), Vh=(8, 24))
    assert chart.sites[0].shapes == own
    assert chart.trainable == 8 + 2 * 8 * 3


def test_coeff_zero_is_the_identity():
    model = adapted("dplr", coeff=0.0, **SMALL)
    assert_close(updated_weight(model), model.weight, 1e-15)


@on_layers
def test_update_stays_in_the_kept_subspaces(d_in, d_out, bias):
    model = adapted("dplr", d_in, d_out, bias, **SMALL)
    U, Vh = tensors(model)["U"], tensors(model)["Vh"]
    update = updated_weight(model) - model.weight
    assert rank(update) == 8
    assert_close(U @ U.T @ update, update)
    assert_close(update @ Vh.T @ Vh, update)


def core(model):
    """Uᵀ W' V, r × r."""
    return tensors(model)["U"].T @ updated_weight(model) @ tensors(model)["Vh"].T


def test_core_is_B_A_of_rank_k_beside_the_gains():
    model = adapted("dplr", coeff=0.5, **SMALL)
    own = tensors(model)
    g = own["g"].detach()
    gains = own["S"] * torch.where(g > 0, 1 + g / 2, (g / 2).exp())
    low_rank = core(model) - torch.diag(gains)
    assert rank(low_rank) == 3
    assert_close(low_rank, 0.5 * own["B"] @ own["A"])


def test_gain_alone_keeps_singular_vectors_and_signs():
    model = adapted("dplr", **SMALL)
    own = tensors(model)
    own["B"].data.zero_()
    own["g"].data.mul_(6)
    kept = core(model)
    assert_close(kept, torch.diag(kept.diagonal()))
    assert (kept.diagonal() > 0).all()


def test_suppress_only_never_amplifies():
    model = adapted("dplr", suppress_only=True, **SMALL)
    own = tensors(model)
    own["B"].data.zero_()
    gain = core(model).diagonal() / own["S"]
    assert (gain <= 1 + 1e-12).all()
    assert (gain < 0.99).any()
    assert torch.equal(own["g"] > 0, (gain - 1).abs() < 1e-12)


def test_gain_scales_with_W_and_the_core_does_not():
    one, three = linear(), linear()
    three.weight.data *= 3
    parts = []
    for model in (one, three):
        ll.attach(model, "dplr", dtype=torch.float64, seed=0, **SMALL)
        own = tensors(model)
        # The same basis, whatever signs the second decomposition chose.
        own["U"].copy_(tensors(one)["U"])
        own["Vh"].copy_(tensors(one)["Vh"])
        own["g"].data.fill_(0.3)
        gain = updated_weight(model) - model.weight
        own["B"].data.fill_(1)
        parts.append((gain, updated_weight(model) - model.weight - gain))
    (gain, low_rank), (gain_3, low_rank_3) = parts
    assert_close(gain_3, 3 * gain)
    assert_close(low_rank_3, low_rank)


def test_signs_of_singular_vectors_are_a_convention():
    model = adapted("dplr", **SMALL)
    own, before = tensors(model), updated_weight(model)
    D = torch.tensor([1, -1, -1, 1, -1, 1, 1, -1]).double()
    own["U"].mul_(D)
    own["Vh"].mul_(D[:, None])
    own["A"].data.mul_(D)
    own["B"].data.mul_(D[:, None])
    assert_close(updated_weight(model), before)


@settings(
    core_over_r=dict(r=8, lora_rank=9),
    no_core=dict(r=8, lora_rank=0),
    too_many=dict(r=25),
)
def test_what_cannot_work_is_refused(hyper):
    with pytest.raises(ValueError, match="^dplr: "):
        ll.attach(linear(), "dplr", **hyper)
