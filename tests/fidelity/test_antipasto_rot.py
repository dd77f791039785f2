"""AntiPaSTO's rotations (arXiv:2601.07473 §3.4 eq. 4, App. A.5 eqs. 6–8) against their dense W'."""

import math

import pytest
import torch
from reference import (
    TOLERANCE,
    adapted,
    assert_close,
    assert_follows,
    assert_starts_as_identity,
    in_dtypes,
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
    "antipasto_rot": [
        dict(r=16),
        dict(r=8, rotate_basis="both", delta_init_mean=0.0, delta_init_std=0.0),
        dict(r=8, rotate_basis="U", block_size=2),
        dict(r=8, rotate_basis="none"),
    ]
}
KEPT = {"antipasto_rot": (dict(r=32), 32)}

EXACT_START = dict(delta_init_mean=0.0, delta_init_std=0.0)
TRAINED = {
    "none": {"delta_s"},
    "V": {"delta_s", "rot_T"},
    "U": {"delta_s", "rot_T"},
    "both": {"delta_s", "rot_T", "rot_T_u"},
}


def bounded(entries, b, max_angle):
    """Eq. 8 on A = ½(P − Pᵀ), P's strict upper triangle given row by row."""
    P = torch.zeros(b, b, dtype=entries.dtype)
    upper = torch.zeros_like(P, dtype=torch.bool)
    for i in range(b):
        for j in range(i + 1, b):
            upper[i, j] = True
    P = P.masked_scatter(upper, entries)
    limit = 2 * math.tan(max_angle / 2)
    return limit * torch.tanh((P - P.T) / 2 / limit)


def rotation(entries, b, max_angle=0.5):
    """Eq. 7 at α = −1: the code's sign."""
    A, eye = bounded(entries, b, max_angle), torch.eye(b, dtype=entries.dtype)
    return (eye + A / 2) @ torch.linalg.inv(eye - A / 2)


def block_diagonal(rot, b, max_angle=0.5):
    return torch.block_diag(*(rotation(entries, b, max_angle) for entries in rot))


def dense(rotate_basis, b, max_angle=0.5):
    """Eq. 6 with the residual of eq. 3: W' = W − U S Vᵀ + (U R_Uᵀ) (S + δ) (R_V Vᵀ)."""

    def W_new(W, U, S, Vh, delta_s, rot_T=None, rot_T_u=None):
        left, right = U, Vh
        if rotate_basis in ("V", "both"):
            right = block_diagonal(rot_T, b, max_angle) @ Vh
        if rotate_basis == "U":
            left = U @ block_diagonal(rot_T, b, max_angle).T
        if rotate_basis == "both":
            left = U @ block_diagonal(rot_T_u, b, max_angle).T
        return W - U @ torch.diag(S) @ Vh + left @ torch.diag(S + delta_s) @ right

    return W_new


@on_layers
@in_dtypes
@pytest.mark.parametrize("rotate_basis", ["V", "U", "both", "none"])
@pytest.mark.parametrize("b", [2, 4])
def test_matches_eq_6(d_in, d_out, bias, dtype, rotate_basis, b):
    hyper = dict(r=8, rotate_basis=rotate_basis, block_size=b)
    model = adapted("antipasto_rot", d_in, d_out, bias, dtype=dtype, **hyper)
    assert_follows(model, dense(rotate_basis, b), TRAINED[rotate_basis], TOLERANCE[dtype])


@settings(
    wide_angle=dict(r=24, block_size=8, max_rotation_angle=3.0),
    narrow_angle=dict(r=6, block_size=3, max_rotation_angle=0.01),
)
def test_matches_eq_6_at_other_angles(hyper):
    model = adapted("antipasto_rot", **hyper)
    W_new = dense("V", hyper["block_size"], hyper["max_rotation_angle"])
    assert_follows(model, W_new, TRAINED["V"], 1e-10)


@with_and_without_bias
@pytest.mark.parametrize("rotate_basis", ["V", "both", "none"])
def test_starts_as_identity_with_a_zero_shift(bias, rotate_basis):
    hyper = dict(r=8, rotate_basis=rotate_basis)
    assert_starts_as_identity("antipasto_rot", bias, **hyper, **EXACT_START)


def test_published_start_is_a_small_shift():
    model = linear(300, 280)
    ll.attach(model, "antipasto_rot", seed=0, dtype=torch.float64)
    own = tensors(model)
    delta = own["delta_s"]
    assert not own["rot_T"].any()
    assert delta.shape == (256,)
    assert abs(delta.mean() - 4e-4) < 5e-5 and abs(delta.std() - 4e-4) < 5e-5
    update = updated_weight(model) - model.weight
    assert_close(update, own["U"] @ torch.diag(delta) @ own["Vh"], 1e-9)
    assert singular_values(update)[0] <= delta.abs().max() * (1 + 1e-9)


def test_the_start_is_seeded():
    starts = []
    for seed in (0, 0, 1):
        model = linear()
        ll.attach(model, "antipasto_rot", r=8, seed=seed)
        starts.append(tensors(model)["delta_s"].detach())
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])


def test_every_trained_tensor_has_a_gradient_at_the_start():
    model = adapted("antipasto_rot", moved=0, r=8, rotate_basis="both", **EXACT_START)
    model(torch.randn(5, 24).double()).square().sum().backward()
    assert all(tensors(model)[key].grad.any() for key in TRAINED["both"])


def test_shapes_and_parameter_count():
    chart = ll.plan(linear(24, 40), "antipasto_rot", r=8, rotate_basis="both")
    own = dict(delta_s=(8,), rot_T=(2, 6), rot_T_u=(2, 6), U=(40, 8), S=(8,), Vh=(8, 24))
    assert chart.sites[0].shapes == own
    assert chart.trainable == 8 + 2 * 12
    assert ll.plan(linear(24, 40), "antipasto_rot", r=8, rotate_basis="none").trainable == 8


def core(model):
    """Uᵀ (W' − W_res) V: what the adapter makes of the kept singular values."""
    U, S, Vh = (tensors(model)[key] for key in ("U", "S", "Vh"))
    return U.T @ (updated_weight(model) - model.weight) @ Vh.T + torch.diag(S)


def rotation_of(model):
    """R_V, of an adapter that rotates V."""
    return core(model) / (tensors(model)["S"] + tensors(model)["delta_s"])[:, None]


@pytest.mark.parametrize("b", [2, 4])
def test_rotates_and_nothing_else(b):
    model = adapted("antipasto_rot", r=8, block_size=b)
    R = rotation_of(model)
    assert_close(R @ R.T, torch.eye(8).double())
    assert_close(torch.linalg.det(R), torch.ones((), dtype=torch.float64))
    assert not torch.allclose(R, torch.eye(8).double(), atol=0.05)
    tensors(model)["rot_T"].data.neg_()
    assert_close(rotation_of(model), R.T)


@pytest.mark.parametrize("b", [2, 4])
def test_sign_is_the_inverse_of_eq_7(b):
    model = adapted("antipasto_rot", r=8, block_size=b)
    A = torch.block_diag(*(bounded(e, b, 0.5) for e in tensors(model)["rot_T"].detach()))
    eye = torch.eye(8).double()
    eq_7 = (eye - A / 2) @ torch.linalg.inv(eye + A / 2)
    assert_close(rotation_of(model), eq_7.T)


@on_layers
@pytest.mark.parametrize("rotate_basis", ["V", "U", "both", "none"])
def test_kept_singular_values_are_shifted_and_the_rest_stays(d_in, d_out, bias, rotate_basis):
    model = adapted("antipasto_rot", d_in, d_out, bias, r=8, rotate_basis=rotate_basis)
    U, S, Vh, delta = (tensors(model)[key] for key in ("U", "S", "Vh", "delta_s"))
    W_res = model.weight - U @ torch.diag(S) @ Vh
    got = singular_values(updated_weight(model) - W_res)
    assert_close(got[:8], (S + delta).abs().sort(descending=True).values)
    assert got[8:].max() < 1e-12
    assert rank(updated_weight(model) - model.weight) <= 8


def angle(model):
    """The largest rotation angle of R_V."""
    return torch.linalg.eigvals(rotation_of(model)).angle().abs().max()


def test_angle_is_bounded_for_planes_alone():
    """Eq. 8 clamps each entry of A, which bounds the angle where a block is one plane."""
    bound = torch.tensor(0.5, dtype=torch.float64)
    planes, blocks = (adapted("antipasto_rot", r=8, block_size=b) for b in (2, 4))
    for model in (planes, blocks):
        tensors(model)["rot_T"].data.fill_(1e3)
    assert_close(angle(planes), bound, 1e-9)
    assert 2 * bound < angle(blocks) < 1.2
    # A small entry p turns its plane by p/2.
    tensors(planes)["rot_T"].data.fill_(1e-4)
    assert_close(angle(planes), bound * 1e-4, 1e-6)


@pytest.mark.parametrize("b", [2, 4])
def test_signs_of_singular_vectors_are_a_convention(b):
    model = adapted("antipasto_rot", r=8, block_size=b, rotate_basis="both")
    own, before = tensors(model), updated_weight(model)
    D = torch.tensor([1, -1, -1, 1, -1, 1, 1, 1]).double()
    own["U"].mul_(D)
    own["Vh"].mul_(D[:, None])
    for k, signs in enumerate(D.view(-1, b)):
        upper = torch.tensor([signs[i] * signs[j] for i in range(b) for j in range(i + 1, b)])
        own["rot_T"].data[k] *= upper
        own["rot_T_u"].data[k] *= upper
    assert (upper < 0).any() or b == 2
    assert_close(updated_weight(model), before)


@settings(
    ragged=dict(r=9, block_size=4),
    one=dict(r=8, block_size=1),
    flat=dict(r=8, max_rotation_angle=0.0),
    half_turn=dict(r=8, max_rotation_angle=math.pi),
    negative=dict(r=8, delta_init_std=-1.0),
)
def test_what_cannot_work_is_refused(hyper):
    with pytest.raises(ValueError, match="antipasto_rot: (r=|max_rotation_angle=|delta_init_std=)"):
        ll.attach(linear(), "antipasto_rot", **hyper)
