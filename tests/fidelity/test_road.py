"""RoAd (arXiv:2409.00119 §3.2 eqs. 2–4, Table 1) against W' = R W, b' = R b."""

import pytest
import torch
from affine_reference import assert_follows, updated_bias
from reference import (
    TOLERANCE,
    adapted,
    assert_close,
    assert_starts_as_identity,
    in_dtypes,
    inputs,
    linear,
    on_layers,
    tensors,
    updated_weight,
    with_and_without_bias,
)

import lora_lite as ll
from lora_lite.ops.gates import gate, turn
from lora_lite.shapes import unchecked

LAWS = {
    "road": [dict(group_size=8), dict(form=2, group_size=4), dict(form=4, group_size=2)],
}
KEPT = {"road": (dict(group_size=32), 160)}

on_forms = pytest.mark.parametrize("form", [1, 2, 4])
on_groups = pytest.mark.parametrize("group_size", [2, 4, 8, None], ids=lambda g: f"groups_of_{g}")


def entries(form, group_size, d, t):
    """t_11, t_12, t_21, t_22 of plane number i, by Table 1: a dictionary (i, row, column) → t."""
    h, out = group_size // 2, {}
    for i in range(d // 2):
        group, k = divmod(i, h)
        for row in (0, 1):
            for column in (0, 1):
                if form == 1:
                    at = i
                elif form == 2:
                    at = group * group_size + row * h + k
                else:
                    sine = row != column
                    at = group * 2 * group_size + sine * group_size + row * h + k
                out[i, row, column] = t[at]
    return out


def rotation(form, group_size, d, theta, alpha):
    """R from eq. 3, plane by plane."""
    θ, α = (entries(form, group_size, d, t) for t in (theta, alpha))
    h, R = group_size // 2, torch.zeros(d, d, dtype=theta.dtype)
    for i in range(d // 2):
        group, k = divmod(i, h)
        p = group * group_size + k
        q = p + h
        R[p, p] = α[i, 0, 0] * torch.cos(θ[i, 0, 0])
        R[p, q] = -α[i, 0, 1] * torch.sin(θ[i, 0, 1])
        R[q, p] = α[i, 1, 0] * torch.sin(θ[i, 1, 0])
        R[q, q] = α[i, 1, 1] * torch.cos(θ[i, 1, 1])
    return R


def dense(form, group_size):
    def new(W, b, theta, alpha):
        R = rotation(form, group_size, len(W), theta, alpha)
        return R @ W, R @ b

    return new


@on_layers
@in_dtypes
@on_groups
@on_forms
def test_matches_the_rotated_output(d_in, d_out, bias, dtype, form, group_size):
    group_size = group_size or d_out
    hyper = dict(form=form, group_size=group_size)
    model = adapted("road", d_in, d_out, bias, dtype=dtype, **hyper)
    assert_follows(model, dense(form, group_size), {"theta", "alpha"}, TOLERANCE[dtype])


@on_forms
@with_and_without_bias
def test_starts_as_identity(bias, form):
    assert_starts_as_identity("road", bias, form=form, group_size=4)


@on_forms
def test_starts_from_angle_0_and_scale_1(form):
    own = tensors(adapted("road", moved=0, form=form, group_size=8))
    assert not own["theta"].any() and (own["alpha"] == 1).all()


@on_forms
def test_shapes_and_parameter_count(form):
    """Table 1: d₂, 2 d₂ and 4 d₂ numbers."""
    chart = ll.plan(linear(24, 40), "road", form=form, group_size=8)
    n = {1: 20, 2: 40, 4: 80}[form]
    assert chart.sites[0].shapes == {"theta": (n,), "alpha": (n,)}
    assert chart.trainable == form * 40


@on_forms
def test_weight_decay_leaves_both_alone(form):
    model = adapted("road", form=form, group_size=8)
    (group,) = ll.param_groups(model, lr=0.1, weight_decay=0.5)
    assert group["weight_decay"] == 0 and len(group["params"]) == 2


def test_groups_of_two_are_the_papers_neighbours():
    """Eq. 2: R = diag(R_1, …), R_i = [[cos θ_i, −sin θ_i], [sin θ_i, cos θ_i]]."""
    model = adapted("road", group_size=2)
    tensors(model)["alpha"].data.fill_(1)
    blocks = [
        torch.stack([t.cos(), -t.sin(), t.sin(), t.cos()]).view(2, 2)
        for t in tensors(model)["theta"].detach()
    ]
    assert_close(updated_weight(model), torch.block_diag(*blocks) @ model.weight)


def test_groups_of_two_are_the_papers_vectors():
    """Eq. 4: z = R¹ ⊗ h + R² ⊗ ĥ, ĥ = (−h₂, h₁, −h₄, h₃, …)."""
    model = adapted("road", group_size=2)
    h = linear()(inputs(24))
    theta, alpha = (tensors(model)[key].repeat_interleave(2) for key in ("theta", "alpha"))
    h_hat = torch.empty_like(h)
    h_hat[..., 0::2], h_hat[..., 1::2] = -h[..., 1::2], h[..., 0::2]
    assert_close(model(inputs(24)), alpha * theta.cos() * h + alpha * theta.sin() * h_hat)


@pytest.mark.parametrize("group_size", [2, 8, 40])
def test_form_1_at_scale_1_is_orthogonal(group_size):
    model = adapted("road", group_size=group_size)
    tensors(model)["alpha"].data.fill_(1)
    W, W_new = model.weight, updated_weight(model)
    assert_close(W_new.T @ W_new, W.T @ W)
    assert not torch.allclose(W_new, W)
    y, z = (f(inputs(24)).unflatten(-1, (-1, 2, group_size // 2)) for f in (model, linear()))
    assert_close(y.norm(dim=-2), z.norm(dim=-2), 1e-12, "the norm in each plane")


def test_form_1_scales_each_plane():
    model = adapted("road", group_size=8)
    y, z = (f(inputs(24)).unflatten(-1, (-1, 2, 4)) for f in (model, linear()))
    alpha = tensors(model)["alpha"].abs().view(-1, 4)
    assert_close(y.norm(dim=-2), alpha * z.norm(dim=-2))


def pair(small, large, group_size=8):
    """Two forms, the larger holding the smaller's numbers."""
    models = [adapted("road", form=form, group_size=group_size) for form in (small, large)]
    for key in ("theta", "alpha"):
        t = tensors(models[0])[key].data
        # Of form 1 a number serves the two rows of a plane; of form 2, cosine and sine.
        width = group_size // 2 if small == 1 else group_size
        tensors(models[1])[key].data = t.view(-1, 1, width).expand(-1, 2, -1).flatten()
    return (model(inputs(24)) for model in models)


def test_form_2_with_equal_rows_is_form_1():
    assert_close(*pair(1, 2))


def test_form_4_with_equal_slots_is_form_2():
    assert_close(*pair(2, 4))


def first_gradients(form):
    """Not of a squared norm, which a rotation leaves alone."""
    model = adapted("road", moved=0, form=form, group_size=8)
    model(inputs(24)).backward(inputs(40).flip(0))
    return tensors(model)["theta"].grad, tensors(model)["alpha"].grad


@pytest.mark.parametrize("form", [1, 2])
def test_everything_moves_at_the_first_step(form):
    theta, alpha = first_gradients(form)
    assert theta.all() and alpha.all()


def test_form_4_moves_angles_of_sines_and_scales_of_cosines_first():
    theta, alpha = (grad.view(-1, 2, 8) for grad in first_gradients(4))
    assert not theta[:, 0].any() and theta[:, 1].all()
    assert alpha[:, 0].all() and not alpha[:, 1].any()


@on_layers
@on_forms
def test_merges_with_its_bias(d_in, d_out, bias, form):
    model = adapted("road", d_in, d_out, bias, form=form, group_size=4)
    b = torch.zeros(d_out).double() if model.bias is None else model.bias.clone()
    own = {key: t.detach() for key, t in tensors(model).items()}
    want = dense(form, 4)(model.weight.clone(), b, **own)
    ll.merge(model)
    assert_close(model.weight, want[0])
    if bias:
        assert_close(model.bias, want[1])


def test_two_adapters_compose_in_their_order():
    model = adapted("road", group_size=8)
    ll.attach(model, "road", name="second", dtype=torch.float64, form=2, group_size=4)
    first, second = (dict(model.adapters[name].tensors()) for name in ("default", "second"))
    second["theta"].data = torch.linspace(-1, 2, 40).double()
    R = rotation(2, 4, 40, **second) @ rotation(1, 8, 40, **first)
    assert_close(updated_weight(model), R @ model.weight)
    assert_close(updated_bias(model), R @ model.bias)


def test_a_change_below_bfloat16s_steps_is_still_seen():
    """1.003 is 1 in bfloat16, and yet outputs move by 0.3 % on average."""
    model = linear(96, 96, False, dtype=torch.bfloat16)
    model.weight.data = torch.eye(96, dtype=torch.bfloat16)
    ll.attach(model, "road", group_size=2)
    tensors(model)["theta"].data.fill_(3e-3)
    tensors(model)["alpha"].data.fill_(1.003)
    x = inputs(96, torch.bfloat16, (4096,))
    y, x = model(x).detach().double(), x.double()
    turned = torch.stack([-x[:, 1::2], x[:, ::2]], -1).flatten(-2)
    assert ((y - x) * x).sum() / x.square().sum() == pytest.approx(3e-3, rel=0.2)
    assert ((y - x) * turned).sum() / x.square().sum() == pytest.approx(3e-3, rel=0.2)


@pytest.mark.parametrize("rows", [1, 2])
def test_the_maps_can_be_differentiated_twice(rows):
    z, c, s, g = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 12), (2, rows, 3), (2, rows, 3), (12,))
    )
    assert torch.autograd.gradgradcheck(turn, (z, c, s))
    assert torch.autograd.gradgradcheck(gate, (z, g))


@pytest.mark.parametrize(
    "hyper, message",
    [
        (dict(form=3), "road: form=3 must be one of 1, 2, 4"),
        (dict(form="road_1"), "road: form=.road_1. must be one of 1, 2, 4"),
        (dict(group_size=5), "road: group_size=5 must be even and positive"),
        (dict(group_size=0), "road: group_size=0 must be even and positive"),
        (dict(group_size=-2), "road: group_size=-2 must be even and positive"),
        (dict(), "out_features=40, not a multiple of group_size=64; use 2, 4, 8, 10, 20, 40$"),
        (dict(group_size=12), "out_features=40, not a multiple of group_size=12; use 2, 4, 8,"),
    ],
)
def test_what_cannot_work_is_refused(hyper, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        ll.attach(linear(), "road", **hyper)


def test_an_odd_layer_is_refused_with_its_name():
    model = torch.nn.ModuleDict({"q": linear(24, 15)})
    with pytest.raises(ValueError, match="road: q has out_features=15.*exclude the layer"):
        ll.attach(model, "road", group_size=2)


@on_layers
@in_dtypes
@on_groups
@on_forms
def test_agrees_with_peft(d_in, d_out, bias, dtype, form, group_size):
    import peft
    from peft_reference import assert_agree, both, scatter

    group_size = group_size or d_out
    config = peft.RoadConfig(variant=f"road_{form}", group_size=group_size)
    layer, other = both("road", config, d_in, d_out, bias, dtype, form=form, group_size=group_size)
    pairs = {"theta": other.road_theta["default"], "alpha": other.road_alpha["default"]}
    for key, theirs in pairs.items():
        assert torch.equal(theirs, tensors(layer)[key])
    scatter(pairs)
    assert_agree(layer, other, pairs)
    other.merge()
    ll.merge(layer)
    assert_close(layer.weight, other.base_layer.weight, TOLERANCE[dtype], "the merged weight")
    if bias:
        assert_close(layer.bias, other.base_layer.bias, TOLERANCE[dtype], "the merged bias")
