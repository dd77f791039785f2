"""HRA (arXiv:2405.17484 §3) against W' = W H_0 ⋯ H_{r−1}, its reflections one by one, and PEFT."""

import peft
import pytest
import torch
from peft_reference import assert_agree, both, scatter
from reference import (
    TOLERANCE,
    adapted,
    assert_close,
    assert_follows,
    assert_starts_as_identity,
    in_dtypes,
    inputs,
    largest_in_a_step,
    linear,
    on_layers,
    rank,
    settings,
    tensors,
    updated_weight,
    with_and_without_bias,
)

import lora_lite as ll
from lora_lite.ops.reflections import reflections

LAWS = {
    "hra": [
        dict(r=4, lambda_orth=0.1),
        dict(r=3, paired=False),
        dict(r=5, strict=True),
    ]
}
KEPT = {"hra": (dict(r=8), 96 + 8)}


def chain(U):
    """eq. 1: the product from left to right."""
    eye = torch.eye(len(U), dtype=U.dtype)
    R = eye
    for u in U.T:
        R = R @ (eye - 2 * torch.outer(u, u) / (u @ u))
    return R


def gram_schmidt(U):
    """§3.4, λ = ∞."""
    Q = []
    for u in U.T:
        for q in Q:
            u = u - (q @ u) * q
        Q.append(u / u.norm())
    Q = torch.stack(Q, 1)
    return torch.eye(len(U), dtype=U.dtype) - 2 * Q @ Q.T


def dense(hyper):
    rotation = gram_schmidt if hyper.get("strict") else chain
    return lambda W, U: W @ rotation(U)


EVERY = settings(
    default=dict(r=8),
    two=dict(r=2),
    most=dict(r=24),
    one=dict(r=1, paired=False),
    odd=dict(r=7, paired=False),
    unpaired=dict(r=4, paired=False),
    strict=dict(r=8, strict=True),
    strict_odd=dict(r=5, strict=True),
    strict_one=dict(r=1, strict=True),
)


@on_layers
@in_dtypes
@EVERY
def test_matches_the_chain(d_in, d_out, bias, dtype, hyper):
    model = adapted("hra", d_in, d_out, bias, dtype=dtype, **hyper)
    assert_follows(model, dense(hyper), {"U"}, TOLERANCE[dtype])


def near_the_start(distance, **hyper):
    model = adapted("hra", moved=0, **hyper)
    U = tensors(model)["U"]
    noise = torch.randn(U.shape, generator=torch.Generator().manual_seed(5), dtype=U.dtype)
    U.data += distance * noise
    return model


@pytest.mark.parametrize("r", [2, 8, 24])
@pytest.mark.parametrize("distance", [0, 1e-9, 1e-4, 0.1])
def test_matches_the_chain_at_and_near_the_start(r, distance):
    assert_follows(near_the_start(distance, r=r), dense({}), {"U"}, 1e-10)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("r", [2, 4, 8, 16, 24])
def test_starts_as_identity(bias, r):
    assert_starts_as_identity("hra", bias, r=r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("r", [*range(2, 34, 2), 64])
def test_equal_columns_leave_nothing(r, dtype):
    """To the last bit, whatever their number and whatever the length of the vectors."""
    for d in (64, 333):
        half = torch.randn(d, r // 2, dtype=dtype)
        A, B = reflections((half / half.norm(dim=0)).repeat_interleave(2, 1))
        assert not (B @ A).any()


@EVERY
def test_a_step_makes_nothing_of_the_size_of_the_matrix(hyper):
    assert largest_in_a_step("hra", 200, **hyper) <= max(hyper["r"] + 1, 4) * 200


@pytest.mark.parametrize("distance", [1e-1, 1e-3, 1e-5])
def test_a_small_turn_keeps_its_digits_in_bfloat16(distance):
    """Cast as the layer casts them, the factors still give R − I to bfloat16's own precision."""
    half = torch.randn(24, 3, dtype=torch.float64).repeat_interleave(2, 1)
    U = half + distance * torch.randn(24, 6, dtype=torch.float64)
    want = chain(U) - torch.eye(24)
    assert float(want.norm()) < 40 * distance
    u = U / U.norm(dim=0)
    A, B = (t.bfloat16().double() for t in reflections(u))
    assert_close(B @ A, want, 1e-2)
    # The factor u itself does not.
    T = torch.linalg.inv(torch.eye(6) / 2 + (u.T @ u).triu(1))
    short = u.bfloat16().double()
    assert distance == 0.1 or float((want + short @ T @ short.T).norm() / want.norm()) > 0.03


def test_float16_starts_as_identity_for_the_largest_inputs_along_a_column():
    model = linear(24, 40, False, dtype=torch.float16)
    model.weight.data.mul_(1e-3)
    ll.attach(model, "hra", r=4, seed=0)
    x = 60000 * tensors(model)["U"].detach().T.sign().half()
    assert torch.equal(model(x), x @ model.weight.T)


@settings(unpaired=dict(r=6, paired=False), strict=dict(r=6, strict=True), odd=dict(r=5, paired=0))
def test_other_starts_are_of_independent_columns_and_elsewhere(hyper):
    hyper = {key: bool(v) if key == "paired" else v for key, v in hyper.items()}
    model = adapted("hra", moved=0, **hyper)
    assert rank(tensors(model)["U"]) == hyper["r"]
    change = updated_weight(model) - model.weight
    assert float(change.norm() / model.weight.norm()) > 0.3
    assert not ll.HRA(**hyper).starts_as_identity() and ll.HRA(r=6).starts_as_identity()


def test_columns_start_in_equal_pairs():
    """Kaiming-uniform of the half matrix, as the authors' code: bound 1/√(r/2)."""
    U = tensors(adapted("hra", 400, 30, moved=0, r=20))["U"].detach()
    assert torch.equal(U[:, 0::2], U[:, 1::2]) and rank(U) == 10
    assert_close(U.std(), torch.tensor(1 / 30**0.5, dtype=torch.float64), 0.03)
    assert 0.99 < float(U.abs().max()) * 10**0.5 <= 1
    alone = tensors(adapted("hra", 400, 30, moved=0, r=20, paired=False))["U"].detach()
    assert 0.99 < float(alone.abs().max()) * 20**0.5 <= 1


def test_shapes_and_parameter_count():
    chart = ll.plan(linear(24, 40), "hra", r=6)
    assert chart.sites[0].shapes == {"U": (24, 6)}
    # Table 1: r d, d the input's width.
    assert chart.trainable == 6 * 24


def rotation(**hyper):
    model = adapted("hra", 24, 24, False, moved=0, **hyper)
    tensors(model)["U"].data.normal_()
    model.weight.data = torch.eye(24, dtype=torch.float64)
    return updated_weight(model)


@EVERY
def test_is_orthogonal_of_low_rank(hyper):
    R, eye = rotation(**hyper), torch.eye(24, dtype=torch.float64)
    assert_close(R @ R.T, eye)
    assert_close(torch.linalg.det(R), torch.tensor((-1.0) ** hyper["r"], dtype=torch.float64))
    assert rank(R - eye) == hyper["r"]


@on_layers
@EVERY
def test_keeps_norms_and_angles(d_in, d_out, bias, hyper):
    model = adapted("hra", d_in, d_out, bias, **hyper)
    W, W_new = model.weight, updated_weight(model)
    assert_close(W_new @ W_new.T, W @ W.T)
    assert not torch.allclose(W_new, W)


def test_stays_orthogonal_in_float32_with_many_columns():
    for distance in (1.0, 1e-3):
        half = torch.randn(512, 32).repeat_interleave(2, 1)
        U = half + distance * torch.randn(512, 64)
        A, B = reflections(U / U.norm(dim=0))
        R = torch.eye(512) + B @ A
        assert_close(R @ R.T, torch.eye(512), 1e-5)


@EVERY
def test_lengths_of_columns_count_for_nothing(hyper):
    model = adapted("hra", **hyper)
    U, before = tensors(model)["U"], updated_weight(model)
    model(inputs(24)).pow(3).sum().backward()
    along = (U.grad * U).sum(0)
    assert (along.abs() < 1e-12 * U.grad.norm() * U.norm()).all()
    assert U.grad.any()
    U.data *= torch.linspace(0.1, 7, U.shape[1], dtype=torch.float64)
    assert_close(updated_weight(model), before)


def test_a_pair_is_split_by_opposite_gradients():
    model = adapted("hra", moved=0, r=8)
    model(inputs(24)).pow(3).sum().backward()
    grad = tensors(model)["U"].grad
    assert grad.any()
    assert_close(grad[:, 0::2], -grad[:, 1::2], 1e-12)


def test_strict_depends_on_the_span_alone():
    model = adapted("hra", r=5, strict=True)
    U, before = tensors(model)["U"], updated_weight(model)
    U.data = U.data @ torch.randn(5, 5, dtype=torch.float64)
    assert_close(updated_weight(model), before, 1e-9)


def penalty(U, weight):
    """λ ‖I − uᵀu‖_F² entry by entry, eq. 6."""
    u = U / U.square().sum(0).sqrt()
    return weight * sum(
        (int(i == j) - u[:, i] @ u[:, j]) ** 2 for i in range(u.shape[1]) for j in range(u.shape[1])
    )


def test_the_penalty_is_eq_6_summed_over_layers():
    model = torch.nn.Sequential(linear(24, 40), linear(40, 24))
    ll.attach(model, "hra", r=5, paired=False, lambda_orth=0.3, dtype=torch.float64)
    own = [layer.adapters["default"].U for layer in model]
    assert_close(ll.regulariser(model), sum(penalty(U, 0.3) for U in own))
    ll.regulariser(model).backward()
    for U in own:
        want = torch.autograd.grad(penalty(U, 0.3), U)[0]
        assert_close(U.grad, want)
    with torch.no_grad():
        for U in own:
            U.copy_(3 * torch.eye(*U.shape))
    assert ll.regulariser(model) == 0


def test_without_lambda_there_is_no_penalty():
    assert ll.regulariser(adapted("hra", r=4)) == 0


def test_the_penalty_is_in_float32_under_autocast():
    model = adapted("hra", dtype=torch.float32, lambda_orth=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ll.regulariser(model)
    assert torch.equal(inside, ll.regulariser(model)) and inside.dtype == torch.float32


@on_layers
@in_dtypes
@settings(
    one=dict(r=1, paired=False),
    two=dict(r=2),
    three=dict(r=3, paired=False),
    eight=dict(r=8),
    thirteen=dict(r=13, paired=False),
    strict=dict(r=8, strict=True),
    strict_odd=dict(r=5, strict=True),
)
@pytest.mark.filterwarnings("ignore:The symmetric initialization:UserWarning")
def test_against_peft(d_in, d_out, bias, dtype, hyper):
    config = peft.HRAConfig(r=hyper["r"], apply_GS=hyper.get("strict", False))
    layer, other = both("hra", config, d_in, d_out, bias, dtype, **hyper)
    pairs = {"U": other.hra_u["default"]}
    scatter(pairs)
    assert_agree(layer, other, pairs)


@with_and_without_bias
def test_against_pefts_start(bias):
    """PEFT's start is the identity to rounding, and the gradients agree there."""
    layer, other = both("hra", peft.HRAConfig(r=8), 24, 40, bias, torch.float64)
    U = other.hra_u["default"]
    assert torch.equal(U[:, 0::2], U[:, 1::2])
    assert_agree(layer, other, {"U": U})


@settings(
    odd=(dict(r=3), "r=3 is odd and has no pairs; use an even r or paired=False"),
    none=(dict(r=0), "r=0 must be ≥ 1"),
    many=(dict(r=26), "the model has in_features=24, fewer than r=26; use r ≤ 24"),
    negative=(dict(lambda_orth=-1.0), "lambda_orth=-1.0 must be ≥ 0"),
    strict=(dict(strict=True, lambda_orth=0.1), "lambda_orth=0.1 must be 0 with strict"),
)
def test_what_cannot_work_is_refused(hyper):
    hyper, match = hyper
    with pytest.raises(ValueError, match=f"^hra: .*{match}"):
        ll.attach(linear(), "hra", **hyper)


@pytest.mark.parametrize("strict", [False, True])
def test_a_zero_column_is_refused_at_load(tmp_path, strict):
    model = torch.nn.Sequential(linear())
    ll.attach(model, "hra", r=4, strict=strict)
    own = tensors(model[0])["U"]
    own.data[:, 2] = 0
    ll.save(model, tmp_path / "zero.safetensors")
    fresh = torch.nn.Sequential(linear())
    with pytest.raises(ValueError, match=r"hra: 0 has a zero column \(2\) in U"):
        ll.load(fresh, tmp_path / "zero.safetensors")
    assert type(fresh[0]) is torch.nn.Linear
    own.data[3, 2] = 1e-10
    ll.save(model, tmp_path / "short.safetensors")
    ll.load(fresh, tmp_path / "short.safetensors")
    assert_close(updated_weight(fresh[0]), updated_weight(model[0]), 1e-15)


def test_a_file_of_another_width_is_refused(tmp_path):
    """U of an output-side reflection has d_out rows."""
    model = torch.nn.Sequential(linear(40, 24))
    ll.attach(model, "hra", r=4)
    ll.save(model, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="24"):
        ll.load(torch.nn.Sequential(linear(24, 40)), tmp_path / "x.safetensors", force=True)
