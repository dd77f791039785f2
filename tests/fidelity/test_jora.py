"""JORA against its definition written out densely, and against the public code's numbers."""

import itertools
import json
from pathlib import Path

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from reference import assert_close
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_lite as ll
from lora_lite.adapted import adapters
from lora_lite.ops import energy, givens
from lora_lite.shapes import unchecked
from lora_lite.variant import configure

LAWS = {
    "jora": [
        {},
        dict(core="block", rotation_param="angle", magnitude="ecd_tanh"),
        dict(core="lowrank", magnitude="none", single_sided="left", max_angle=0.5),
        dict(zero_init_core=False, magnitude_on="delta", single_sided="right"),
        dict(S_L=0, S_R=0),
        dict(clip="tanh", magnitude="none"),
        dict(selection="random", warmup_ratio=0.5, k=4),
        dict(selection="none", ecd_temp_annealing=True),
        dict(t_stat=1, pairing_strategy="high_low", use_gumbel=True),
        dict(warmup_steps=2, pairs_freeze_after_warmup=True, ema_beta=0.5),
    ]
}
SQUARE = {
    "jora": [
        dict(core="selective", magnitude="none", selection="random", theta_init_std=0.0, k=4),
        dict(core="coupled", magnitude="none", selection="random", k=4),
    ]
}
KEPT = {"jora": (dict(magnitude="none"), 96 + 96 + 160)}

DATA = Path(__file__).parents[1] / "data" / "jora"
INDEX = json.loads((DATA / "index.json").read_text())
CASES = {case["name"]: case for case in INDEX["cases"]}
GOLDEN_NAMES = {
    "theta_L": "theta_L",
    "theta_R": "theta_R",
    "core.diag_params": "d",
    "core.blocks": "blocks",
    "core.diag_remainder": "rem",
    "core.A": "A",
    "core.B": "B",
    "core.delta": "delta",
    "mag_logits": "g_mag",
}
SELECTED = ("selective", "coupled")
STATIC = dict(magnitude="none", selection="random")


class Model(nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.q_proj = layer

    def forward(self, x):
        return self.q_proj(x)


def adapted(layer, dtype=torch.float64, seed=0, **hyper):
    """A model of this one layer with JORA on it, and the adapter's tensors by name."""
    model = Model(layer)
    ll.attach(model, "jora", seed=seed, dtype=dtype, **hyper)
    (_, _, adapter) = adapters(model)[0]
    return model, adapter.tensors()


def linear(d_in, d_out, bias=True, dtype=torch.float64):
    layer = nn.Linear(d_in, d_out, bias=bias, dtype=dtype)
    nn.init.normal_(layer.weight, std=0.3)
    return layer


def scatter_about(tensors, std=0.5):
    """Random numbers in every trained tensor."""
    with torch.no_grad():
        for tensor in tensors.values():
            if isinstance(tensor, nn.Parameter):
                tensor.normal_(std=std)


def close(got, want, tolerance, what):
    """`assert_close`, which takes no reference of zeros: there ours must be zeros too."""
    if want.any():
        assert_close(got, want, tolerance, what)
    else:
        assert torch.equal(got, want), what


def gradients(y, gy, x, tensors, **how):
    """dL/dx and dL/dt of every trained tensor, for L = Σ gy y."""
    trained = {key: t for key, t in tensors.items() if t.requires_grad}
    found = torch.autograd.grad((gy * y).sum(), [x, *trained.values()], **how)
    return dict(zip(["x", *trained], found))


# The definition, dense and plain: y = s ⊙ (W x + Δ) + b or W x + b + s ⊙ Δ, Δ = clip(ΔW x).


def dense_rotation(pairs, active, theta, d, v):
    R = torch.eye(d, dtype=torch.float64)
    for (i, j), on, angle in zip(pairs.tolist(), active.tolist(), theta):
        if not on:
            continue
        if v.max_angle == 0 and v.rotation_param == "cayley":
            t = angle / 2
            cos, sin = (1 - t**2) / (1 + t**2), 2 * t / (1 + t**2)
        else:
            phi = 2 * torch.atan(angle / 2) if v.rotation_param == "cayley" else angle
            if v.max_angle:
                phi = v.max_angle * torch.tanh(phi / v.max_angle)
            cos, sin = torch.cos(phi), torch.sin(phi)
        G = torch.eye(d, dtype=torch.float64)
        G[i, i], G[i, j], G[j, i], G[j, j] = cos, sin, -sin, cos
        R = R @ G
    return R


def dense_core(t, n, m, v):
    C = torch.zeros(n, m, dtype=torch.float64)
    if v.core == "diag":
        for i in range(min(n, m)):
            C[i, i] = t["d"][i]
    elif v.core == "block":
        b = v.block_size
        for p, block in enumerate(t["blocks"]):
            C[p * b : (p + 1) * b, p * b : (p + 1) * b] = block
        for i, value in enumerate(t["rem"], start=min(n, m) // b * b):
            C[i, i] = value
    elif v.core == "lowrank":
        sigma = 1.0 if v.lowrank_alpha is None else v.lowrank_alpha / v.lowrank_r
        C = sigma * t["A"] @ t["B"].T
    elif v.core == "selective":
        for u, value in zip(t["support"].tolist(), t["delta"]):
            if u >= 0:
                C[u, u] = 1 + value
    else:
        for (i, j), M in zip(t["support"].view(-1, 2).tolist(), t["M"]):
            D = torch.eye(2, dtype=torch.float64) + M
            for a, row in enumerate((i, j)):
                for b, column in enumerate((i, j)):
                    if row >= 0 and column >= 0:
                        C[row, column] = D[a, b]
    return C


def dense_delta(t, n, m, v):
    """ΔW (n, m)."""
    R_L, R_R = torch.eye(n, dtype=torch.float64), torch.eye(m, dtype=torch.float64)
    if "theta_L" in t:
        R_L = dense_rotation(t["pairs_L"], t["active_L"], t["theta_L"], n, v)
    if "theta_R" in t:
        R_R = dense_rotation(t["pairs_R"], t["active_R"], t["theta_R"], m, v)
    delta = R_L.T @ dense_core(t, n, m, v) @ R_R
    if v.core in SELECTED:
        P = torch.zeros(n, dtype=torch.float64)
        P[t["support"][t["support"] >= 0]] = 1
        delta = delta - torch.diag(P)
    return delta


def dense_scale(g, W, v):
    if v.magnitude == "none":
        return torch.ones(len(W), dtype=torch.float64)
    energy_i = (W * W).sum(1)
    if v.magnitude == "oer_softmax":
        p0 = energy_i / energy_i.sum()
        p = torch.softmax(torch.log(p0) + g / v.oer_temperature, 0)
        return torch.sqrt(p / p0)
    a = 1 + v.ecd_alpha * torch.tanh(g / v.ecd_temperature)
    return a * torch.sqrt(energy_i.sum() / (energy_i * a * a).sum())


def dense_weight(t, W, v):
    s, delta = dense_scale(t.get("g_mag"), W, v)[:, None], dense_delta(t, *W.shape, v)
    return W + s * delta if v.magnitude_on == "delta" else s * (W + delta)


def dense_forward(x, t, W, b, v):
    delta = x @ dense_delta(t, *W.shape, v).T
    delta = torch.tanh(delta) if v.clip == "tanh" else delta
    s = dense_scale(t.get("g_mag"), W, v)
    y = x @ W.T + s * delta if v.magnitude_on == "delta" else s * (x @ W.T + delta)
    return y if b is None else y + b


def twin(tensors):
    """The same numbers, apart and in float64."""
    return {
        key: (t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t)
        for key, t in tensors.items()
    }


def check_against_dense(layer, **hyper):
    model, tensors = adapted(layer, **hyper)
    scatter_about(tensors)
    v, W = configure("jora", **hyper), layer.weight.detach()
    W = W.T if isinstance(layer, Conv1D) else W
    n, m = W.shape
    x = torch.randn(2, 3, m, dtype=torch.float64, requires_grad=True)
    gy = torch.randn(2, 3, n, dtype=torch.float64)
    b, plain = layer.bias, twin(tensors)
    y, want = model(x), dense_forward(x, plain, W, b, v)
    close(y, want, 1e-10, "y")
    got_grads = gradients(y, gy, x, tensors)
    # The loops over an empty `rem` or `blocks` never touch it.
    want_grads = gradients(want, gy, x, plain, materialize_grads=True)
    assert got_grads.keys() == want_grads.keys()
    for key, grad in got_grads.items():
        close(grad, want_grads[key], 1e-10, f"dL/d{key}")
    if v.clip == "none":
        close(W + ll.delta_weights(model)["q_proj"], dense_weight(plain, W, v), 1e-10, "W'")


SIDES = dict(
    both={},
    left=dict(single_sided="left"),
    right=dict(single_sided="right"),
    S_0=dict(S_L=0, S_R=0),
)
MAGNITUDES = dict(
    none=dict(magnitude="none"),
    oer=dict(magnitude="oer_softmax", oer_temperature=1.7),
    oer_delta=dict(magnitude="oer_softmax", oer_temperature=0.6, magnitude_on="delta"),
    ecd=dict(magnitude="ecd_tanh", ecd_temperature=1.7, ecd_alpha=0.3),
    ecd_delta=dict(magnitude="ecd_tanh", ecd_temperature=0.6, magnitude_on="delta"),
)
CORES = dict(
    diag=dict(core="diag"),
    block=dict(core="block", block_size=4),
    block_3=dict(core="block", block_size=3),
    lowrank=dict(core="lowrank", lowrank_r=3, lowrank_alpha=5.0),
)


@pytest.mark.parametrize("max_angle", [0.0, 0.7])
@pytest.mark.parametrize("rotation_param", ["cayley", "angle"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("core", CORES)
def test_layer_equals_the_dense_definition(core, magnitude, side, rotation_param, max_angle):
    hyper = CORES[core] | MAGNITUDES[magnitude] | SIDES[side]
    hyper |= dict(rotation_param=rotation_param, max_angle=max_angle)
    hyper = dict(S_L=5, S_R=6, k=5) | hyper
    for (d_in, d_out), bias in (((24, 40), True), ((40, 24), False)):
        check_against_dense(linear(d_in, d_out, bias), **hyper)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("magnitude", MAGNITUDES)
def test_odd_sizes_tanh_and_conv1d_equal_the_dense_definition(core, magnitude):
    hyper = dict(S_L=32, S_R=32, k=5) | CORES[core] | MAGNITUDES[magnitude]
    for d_in, d_out in ((13, 7), (7, 13), (9, 9)):
        check_against_dense(linear(d_in, d_out), **hyper)
        check_against_dense(linear(d_in, d_out), clip="tanh", **hyper)
        check_against_dense(linear(d_in, d_out), selection="none", **hyper)
    conv = Conv1D(24, 14).double()
    nn.init.normal_(conv.bias)
    check_against_dense(conv, **hyper)


@pytest.mark.parametrize("max_angle", [0.0, 0.7])
@pytest.mark.parametrize("rotation_param", ["cayley", "angle"])
@pytest.mark.parametrize("single_sided", ["none", "left", "right"])
@pytest.mark.parametrize("core", SELECTED)
def test_selected_cores_equal_the_dense_definition(core, single_sided, rotation_param, max_angle):
    hyper = dict(core=core, **STATIC, single_sided=single_sided, S_L=8, S_R=8, k=6)
    hyper |= dict(rotation_param=rotation_param, max_angle=max_angle)
    for d in (24, 13):  # of 13 coordinates, the pairs of both sides must share some
        check_against_dense(linear(d, d), **hyper)


def test_blocks_wider_than_the_layer_leave_a_diagonal():
    check_against_dense(linear(24, 6), core="block", block_size=8, S_L=2, k=4)


# The public code's numbers.


def golden(case, dtype):
    """The layer of a golden case with its adapter, the adapter's tensors and the stored data."""
    stored = load_file(DATA / case["file"])
    n, m = case["n"], case["m"]
    layer = Conv1D(n, m) if case["layer"] == "conv1d" else nn.Linear(m, n, bias=case["bias"])
    layer = layer.to(torch.float64)
    with torch.no_grad():
        layer.weight.copy_(stored["W"])
        if case["bias"]:
            layer.bias.copy_(stored["bias"])
    core = case["core"].removesuffix("_diag")
    keys = ("rotation_param", "single_sided", "magnitude", "magnitude_on", "block_size")
    hyper = {key: case[key] for key in (*keys, "lowrank_r", "oer_temperature") if key in case}
    hyper |= {key: case[key] for key in ("ecd_alpha", "ecd_temperature") if key in case}
    if case.get("lowrank_scaling", 1.0) != 1.0:
        hyper["lowrank_alpha"] = case["lowrank_scaling"] * case["lowrank_r"]
    sides = {side: len(stored.get(f"pairs_{side}", ())) for side in "LR"}
    model, tensors = adapted(
        layer.to(dtype),
        dtype,
        S_L=sides["L"],
        S_R=sides["R"],
        k=sum(sides.values()) if core in SELECTED else 0,
        selection="random",
        core=core,
        clip="tanh" if case["tanh_clip"] else "none",
        **hyper,
    )
    with torch.no_grad():
        for name, ours in GOLDEN_NAMES.items():
            value = stored.get("mag_offset" if name == "mag_logits" else name, stored.get(name))
            if value is not None and ours in tensors:
                tensors[ours].zero_()
                tensors[ours][: len(value)] = value
        for side in set("LR") & {key[-1] for key in tensors if "pairs" in key}:
            tensors[f"pairs_{side}"].copy_(stored[f"pairs_{side}"])
        if "support" in stored:
            tensors["support"].fill_(-1)[: len(stored["support"])] = stored["support"]
    return model, tensors, stored


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward_equal_the_public_code(name, dtype):
    case = CASES[name]
    tolerance = 1e-5 if dtype == torch.float32 else 5e-8 if "eps" in case else 1e-10
    model, tensors, stored = golden(case, dtype)
    x, gy = stored["x"].to(dtype).requires_grad_(), stored["gy"].to(dtype)
    y = model(x)
    # The old code scaled the bias too; the data has the output without that as well.
    want = stored.get("y_bias_unscaled", stored["y"])
    close(y, want.to(dtype), tolerance, "y")
    grads = gradients(y, gy, x, tensors)
    close(grads.pop("x"), stored["grad_x"].to(dtype), tolerance, "dL/dx")
    for golden_name, ours in GOLDEN_NAMES.items():
        if f"grad.{golden_name}" not in stored:
            assert ours not in grads
        elif ours not in grads:
            assert not stored[f"grad.{golden_name}"].any(), "the side is off"
        elif not (ours == "g_mag" and "y_bias_unscaled" in stored):
            want = stored[f"grad.{golden_name}"].to(dtype)
            close(grads[ours][: len(want)], want, tolerance, f"dL/d{ours}")
            assert not grads[ours][len(want) :].any()
    if "base_row_norms" in stored:
        close(tensors["row_norm"], stored["base_row_norms"].to(dtype), tolerance, "row norms")


@pytest.mark.parametrize("name", CASES)
def test_merge_equals_the_public_code(name):
    case = CASES[name]
    model, _, stored = golden(case, torch.float64)
    if case["tanh_clip"]:
        with pytest.raises(
            ValueError, match="jora: q_proj can't be merged: clip='tanh' is not lin"
        ):
            ll.merge(model)
        return
    ll.merge(model)
    weight = model.q_proj.weight.detach()
    weight = weight.T if case["layer"] == "conv1d" else weight
    close(weight, stored["W_merged"], 5e-8 if "eps" in case else 1e-10, "W'")
    if case["bias"]:
        assert torch.equal(model.q_proj.bias, stored["bias"]), "the bias is not ours to change"


def test_scaling_the_bias_too_would_give_the_old_codes_numbers():
    case = CASES["legacy_output_oer_bias"]
    model, tensors, stored = golden(case, torch.float64)
    W, v = stored["W"], configure("jora", oer_temperature=case["oer_temperature"])
    y = model(stored["x"]) + (dense_scale(tensors["g_mag"], W, v) - 1) * stored["bias"]
    close(y, stored["y"], 5e-8, "y with the bias scaled")
    (grad,) = torch.autograd.grad((stored["gy"] * y).sum(), tensors["g_mag"])
    close(grad, stored["grad.mag_logits"], 5e-8, "dL/dg_mag with the bias scaled")


# What must hold whatever the numbers are.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("magnitude", MAGNITUDES)
@pytest.mark.parametrize("core", CORES)
def test_fresh_adapter_is_the_identity_bit_for_bit(core, magnitude, dtype):
    layer, x = linear(24, 40, dtype=dtype), torch.randn(2, 3, 24).to(dtype)
    base = layer(x)
    hyper = CORES[core] | MAGNITUDES[magnitude]
    model, tensors = adapted(layer, torch.float32, theta_init_std=1.0, **hyper)
    assert tensors["theta_L"].any()
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("core", SELECTED)
def test_selected_core_starts_as_the_identity_and_rotates_at_once(core):
    layer, x = linear(24, 24, dtype=torch.float32), torch.randn(2, 3, 24, requires_grad=True)
    base = layer(x)
    model, tensors = adapted(layer, core=core, **STATIC, theta_init_std=0.0)
    y = model(x)
    assert torch.equal(y, base)
    grads = gradients(y, torch.randn_like(y), x, tensors)
    assert all(grad.any() for grad in grads.values())
    assert configure("jora", core=core, **STATIC, theta_init_std=0.0).starts_as_identity()
    assert not configure("jora", core=core, **STATIC).starts_as_identity()
    ll.detach(model)
    assert not torch.equal(adapted(layer, core=core, **STATIC)[0](x), base)


@pytest.mark.parametrize("core", CORES)
def test_zero_core_holds_theta_still_for_one_step_and_nothing_else(core):
    layer = linear(24, 40, dtype=torch.float32)
    model, tensors = adapted(layer, torch.float32, selection="random", **CORES[core])
    x = torch.randn(2, 3, 24, requires_grad=True)
    optimizer = torch.optim.SGD(ll.param_groups(model, lr=0.1))
    for first in (True, False):
        y = model(x)
        grads = gradients(y, torch.randn_like(y), x, tensors)
        for key in grads:
            waits = key.startswith("theta") or key == "B"
            assert grads[key].any() != (first and waits) or not grads[key].numel(), key
            if key != "x":
                tensors[key].grad = grads[key]
        optimizer.step()


def test_inactive_slots_turn_nothing_and_get_no_gradient():
    model, tensors = adapted(linear(24, 40), S_L=8, S_R=8, k=4, zero_init_core=False)
    x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
    y = model(x)
    grads = gradients(y, torch.randn_like(y), x, tensors)
    for side in "LR":
        active = tensors[f"active_{side}"]
        assert active.tolist() == [True] * 2 + [False] * 6
        assert grads[f"theta_{side}"][active].all() and not grads[f"theta_{side}"][~active].any()
        assert (tensors[f"pairs_{side}"][~active] == -1).all()
    with torch.no_grad():
        tensors["theta_L"][2:] = 9.0
        # A slot that was active remembers its pair.
        tensors["pairs_L"][2:4] = tensors["pairs_L"][:2].flip(0)
    assert torch.equal(model(x), y)


def test_outside_all_pairs_the_diagonal_core_scales():
    model, tensors = adapted(linear(24, 24), S_L=4, S_R=4, k=4, magnitude="none")
    scatter_about(tensors)
    used = torch.cat([tensors["pairs_L"], tensors["pairs_R"]]).flatten()
    outside = [i for i in range(24) if i not in used.tolist()]
    delta = ll.delta_weights(model)["q_proj"]
    want = torch.diag(tensors["d"].detach())
    close(delta[outside], want[outside], 1e-14, "rows outside the pairs")
    assert len(outside) >= 8


@pytest.mark.parametrize("side", ["left", "right"])
def test_single_sided_keeps_its_own_side_only(side):
    other = dict(left="R", right="L")[side]
    _, tensors = adapted(linear(24, 40), single_sided=side)
    assert not [key for key in tensors if key.endswith(f"_{other}")]
    assert tensors[f"active_{side[0].upper()}"].sum() == 8


def test_delta_is_linear_in_x_and_the_bias_stands_apart():
    for hyper in (*MAGNITUDES.values(), dict(core="block"), dict(core="lowrank")):
        model, tensors = adapted(linear(24, 40), **hyper)
        scatter_about(tensors)
        x, z = torch.randn(2, 5, 24, dtype=torch.float64)
        b = model(torch.zeros(24, dtype=torch.float64))
        close(b, model.q_proj.bias, 1e-14, "f(0)")
        want = 2 * (model(x) - b) - 3 * (model(z) - b)
        close(model(2 * x - 3 * z) - b, want, 1e-12, "f(2x − 3z)")


def test_a_single_vector_has_the_gradients_of_a_batch_of_one():
    model, tensors = adapted(linear(24, 40), zero_init_core=False)
    x = torch.randn(24, dtype=torch.float64, requires_grad=True)
    gy = torch.randn(40, dtype=torch.float64)
    one, batch = gradients(model(x), gy, x, tensors), gradients(model(x[None]), gy, x, tensors)
    for key, grad in one.items():
        close(grad, batch[key], 1e-12, f"dL/d{key}")


def test_small_delta_is_not_lost_in_bfloat16():
    layer = nn.Linear(24, 24, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(layer.weight)
    hyper = dict(core="selective", **STATIC, theta_init_std=0.0)
    model, tensors = adapted(layer, torch.float32, **hyper)
    nn.init.constant_(tensors["delta"], 1e-3)
    x = torch.randn(2, 3, 24).bfloat16()
    U = tensors["support"][tensors["support"] >= 0]
    want = torch.zeros(2, 3, 24).index_copy(-1, U, 1e-3 * x[..., U].float())
    close(model(x).float(), want, 1e-2, "Δ")


@pytest.mark.parametrize("magnitude", ["oer_softmax", "ecd_tanh"])
def test_rows_without_energy_stay_finite(magnitude):
    x = torch.randn(2, 3, 24, requires_grad=True)
    layer = linear(24, 40, dtype=torch.float32)
    nn.init.zeros_(layer.weight)
    model, tensors = adapted(layer, torch.float32, magnitude=magnitude, zero_init_core=False)
    y = model(x)
    assert torch.isfinite(y).all()
    grads = gradients(y, torch.randn_like(y), x, tensors)
    assert all(grad.isfinite().all() for grad in grads.values())


def test_oer_leaves_rows_without_energy_alone():
    norms = torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64)
    g = torch.tensor([0.3, 9.0, -0.4, 0.1], dtype=torch.float64)
    s = 1 + energy.oer_softmax(g, norms, 1.0)
    kept = [0, 2, 3]
    assert s[1] == 1
    close(s[kept], 1 + energy.oer_softmax(g[kept], norms[kept], 1.0), 1e-12, "the other rows' s")


# Rotations and energy, for any numbers.

TEMPERATURES = st.floats(0.05, 20)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.integers(2, 31), st.floats(0, 1), st.floats(-8, 8), st.integers(0, 2**31))
def test_rotation_is_orthogonal_and_theta_signs_invert_it(d, share, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    n = round(share * (d // 2))
    pairs = givens.random_pairs(d, n, d // 2, generator)
    used = pairs[:n].flatten()
    assert len(used.unique()) == 2 * n and (pairs[n:] == -1).all()
    assert n == 0 or (used.min() >= 0 and used.max() < d)
    phi = spread * torch.randn(d // 2, generator=generator, dtype=torch.float64)
    x = torch.randn(4, d, generator=generator, dtype=torch.float64)
    tables = givens.pair_tables(pairs, givens.rotations(phi), 1.0, d)
    R = givens.apply_pairs(torch.eye(d, dtype=torch.float64), *tables).T
    close(R @ R.T, torch.eye(d, dtype=torch.float64), 1e-13, "R Rᵀ")
    close(givens.apply_pairs(x, *tables), x @ R.T, 1e-13, "R x")
    back = givens.pair_tables(pairs, givens.rotations(-phi), 1.0, d)
    close(givens.apply_pairs(torch.eye(d, dtype=torch.float64), *back), R, 1e-13, "R(−θ)ᵀ")
    swapped = givens.pair_tables(pairs.flip(1), givens.rotations(-phi), 1.0, d)
    order = torch.randperm(d // 2, generator=generator)
    permuted = givens.pair_tables(pairs[order], givens.rotations(phi[order]), 1.0, d)
    for other in (swapped, permuted):
        assert torch.equal(givens.apply_pairs(x, *other), givens.apply_pairs(x, *tables))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.integers(1, 40), TEMPERATURES, st.floats(0, 5), st.floats(-0.99, 0.99), st.integers(0, 99)
)
def test_magnitude_keeps_the_energy(n, temperature, spread, alpha, seed):
    generator = torch.Generator().manual_seed(seed)
    g, noise = spread * torch.randn(2, n, generator=generator, dtype=torch.float64)
    norms = noise.exp()
    for f, more in ((energy.oer_softmax, ()), (energy.ecd_tanh, (alpha,))):
        s = 1 + f(g, norms, temperature, *more)
        close((s * norms).square().sum(), norms.square().sum(), 1e-10, "Σ (s_i ‖w_i‖)²")
        assert (s >= 0).all()
        for dtype in (torch.float64, torch.float32):
            zero = f(torch.zeros(n, dtype=dtype), norms.to(dtype), temperature, *more)
            assert not zero.any(), "g = 0 is the identity at every temperature"


def test_oer_moves_energy_and_its_gradient_makes_none():
    for hyper in (MAGNITUDES["oer"], MAGNITUDES["oer_delta"]):
        model, tensors = adapted(linear(24, 40), zero_init_core=False, **hyper)
        scatter_about(tensors)
        x = torch.randn(2, 3, 24, dtype=torch.float64, requires_grad=True)
        y = model(x)
        grad = gradients(y, torch.randn_like(y), x, tensors)["g_mag"]
        assert abs(grad.sum()) < 1e-12 * grad.abs().sum()


# Finite differences.


def test_apply_pairs_passes_gradcheck():
    pairs = torch.tensor([[3, 0], [-1, -1], [5, 2], [-1, 6]])
    x = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    blocks = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    phi = torch.randn(4, dtype=torch.float64, requires_grad=True)
    any_blocks = lambda x, T: givens.apply_pairs(x, *givens.pair_tables(pairs, T, 0.0, 7))
    turned = lambda x, phi: givens.apply_pairs(
        x, *givens.pair_tables(pairs[:3], givens.rotations(phi[:3]), 1.0, 7)
    )
    assert torch.autograd.gradcheck(any_blocks, (x, blocks))
    assert torch.autograd.gradcheck(turned, (x, phi))


@pytest.mark.parametrize(
    "hyper",
    [
        dict(core="diag", max_angle=0.4),
        dict(core="block", magnitude="ecd_tanh", clip="tanh"),
        dict(core="lowrank", lowrank_r=2, magnitude_on="delta", oer_temperature=2.0),
        dict(core="selective", **STATIC),
        dict(core="coupled", **STATIC, rotation_param="angle"),
    ],
    ids=lambda hyper: hyper["core"],
)
def test_whole_layer_passes_gradcheck(hyper):
    d_in = 8 if hyper["core"] in SELECTED else 10
    model, tensors = adapted(linear(d_in, 8), S_L=3, S_R=3, k=4, **hyper)
    scatter_about(tensors)
    x = torch.randn(2, d_in, dtype=torch.float64, requires_grad=True)
    trained = [t for t in tensors.values() if t.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *trained))


# Pairs.


@pytest.mark.parametrize(
    "hyper, sizes, slots, active",
    [
        (dict(), (64, 64), (32, 32), (4, 4)),
        (dict(S_L=96, S_R=96, k=24), (4096, 4096), (96, 96), (12, 12)),
        (dict(S_L=96, S_R=32, k=24), (400, 400), (96, 32), (18, 6)),
        (dict(S_L=32, S_R=32, k=7), (400, 400), (32, 32), (3, 4)),
        (dict(S_L=1, S_R=32, k=8), (400, 400), (1, 32), (1, 7)),
        (dict(S_L=32, S_R=1, k=8), (400, 400), (32, 1), (7, 1)),
        (dict(k=1), (64, 64), (32, 32), (1, 1)),
        (dict(k=8), (7, 40), (20, 3), (5, 3)),
        (dict(k=8), (40, 5), (2, 20), (2, 6)),
        (dict(k=23), (7, 40), (20, 3), (20, 3)),
        (dict(k=0), (13, 40), (20, 6), (20, 6)),
        (dict(selection="none"), (64, 9), (4, 32), (4, 32)),
        (dict(single_sided="left"), (64, 64), (32, 0), (8, 0)),
        (dict(single_sided="right"), (64, 64), (0, 32), (0, 8)),
        (dict(S_R=0), (64, 64), (32, 0), (8, 0)),
        (dict(S_L=0, S_R=0), (64, 64), (0, 0), (0, 0)),
    ],
)
def test_k_pairs_turn_and_all_their_coordinates_differ(hyper, sizes, slots, active):
    d_in, d_out = sizes
    v = configure("jora", **hyper)
    assert v.slots(d_in, d_out) == slots
    assert v.active_pairs(d_in, d_out) == active
    if max(sizes) > 1000:
        return
    _, tensors = adapted(linear(d_in, d_out), **hyper)
    for side, d, S, count in zip("LR", (d_out, d_in), slots, active):
        if not S:
            assert f"theta_{side}" not in tensors
            continue
        pairs, on = tensors[f"pairs_{side}"], tensors[f"active_{side}"]
        assert tensors[f"theta_{side}"].shape == (S,) and pairs.shape == (S, 2)
        assert on.sum() == count and on[:count].all()
        used = pairs[on].flatten()
        assert len(used.unique()) == 2 * count and 0 <= used.min() and used.max() < d
        assert (pairs[~on] == -1).all()


def test_pairs_follow_the_seed_and_differ_between_layers():
    def pairs(seed):
        model = nn.Module()
        model.q_proj, model.v_proj = linear(64, 64), linear(64, 64)
        ll.attach(model, "jora", seed=seed)
        return [a.tensors()["pairs_L"] for _, _, a in adapters(model)]

    (a, b), (again, _), (other, _) = pairs(0), pairs(0), pairs(1)
    assert torch.equal(a, again) and not torch.equal(a, b) and not torch.equal(a, other)


@pytest.mark.parametrize("core", SELECTED)
def test_support_is_the_coordinates_that_turn_each_once(core):
    _, tensors = adapted(linear(13, 13), core=core, **STATIC, S_L=6, S_R=6, k=8)
    pairs = torch.cat([tensors[f"pairs_{side}"][tensors[f"active_{side}"]] for side in "LR"])
    support = tensors["support"]
    kept = support[support >= 0]
    assert sorted(kept.tolist()) == pairs.unique().tolist()
    assert len(kept) < len(support) == 16, "the two sides share coordinates here"
    # Block p acts on rotation pair p.
    assert torch.equal(support[support >= 0], pairs.flatten()[support >= 0])


# Starts, rates and counts.


def test_starts_are_as_stated():
    wide, big = linear(1024, 1024, dtype=torch.float32), dict(S_L=512, S_R=512)
    std = lambda t: float(t.detach().std())
    _, t = adapted(wide, torch.float32, zero_init_core=False, **big)
    assert std(t["theta_L"]) == pytest.approx(0.02, rel=0.2)
    assert std(t["d"]) == pytest.approx(0.01, rel=0.2) and not t["g_mag"].any()
    _, t = adapted(nn.Linear(1024, 1024), torch.float32, force_random_rotation_init=False, **big)
    assert std(t["theta_R"]) == pytest.approx(1e-3, rel=0.2) and not t["d"].any()
    _, t = adapted(nn.Linear(1024, 1024), torch.float32, theta_init_std=0.0, **big)
    assert not t["theta_L"].any() and not t["theta_R"].any()
    _, t = adapted(nn.Linear(1024, 1024), torch.float32, core="block", zero_init_core=False)
    assert std(t["blocks"]) == pytest.approx(0.1, rel=0.2)
    _, t = adapted(nn.Linear(1024, 1023), torch.float32, core="block", core_init_std=5e-3)
    assert t["rem"].shape == (3,) and not t["blocks"].any() and not t["rem"].any()
    _, t = adapted(nn.Linear(1024, 1024), torch.float32, core="lowrank", core_init_std=5e-3)
    assert not t["A"].any() and std(t["B"]) == pytest.approx(5e-3, rel=0.2)
    _, t = adapted(nn.Linear(1024, 1024), torch.float32, core="lowrank", zero_init_core=False)
    assert std(t["A"]) == pytest.approx(0.1, rel=0.2) == std(t["B"])


def rates(lr=None, **hyper):
    model, tensors = adapted(linear(64, 64), **hyper)
    groups = ll.param_groups(model, lr, weight_decay=0.3)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    return {key: found[id(t)] for key, t in tensors.items() if t.requires_grad}


def test_learning_rates_are_absolute_or_in_the_public_codes_ratio():
    own = rates()
    assert own["theta_L"] == own["theta_R"] == (pytest.approx(0.05), 0.0)
    assert own["d"] == (pytest.approx(0.01), 0.3)
    assert own["g_mag"] == (pytest.approx(0.01), 0.0)
    public = INDEX["lr_groups"]
    keys = ("lr_theta", "lr_core", "magnitude_lr_scale")
    scaled = rates(public["base_lr"], **{key: public[key] for key in keys})
    assert scaled["theta_L"][0] == pytest.approx(public["groups"]["jora_theta"])
    assert scaled["d"][0] == pytest.approx(public["groups"]["jora_core"])
    assert scaled["g_mag"][0] == pytest.approx(public["groups"]["jora_magnitude"])
    assert rates(magnitude_lr_scale=3.0)["g_mag"][0] == pytest.approx(0.03)


def test_a_rate_of_zero_freezes():
    assert "d" not in rates(lr_core=0.0) and rates(lr_core=0.0)["theta_L"][0] == pytest.approx(0.05)
    assert rates(lr_core=0.0)["g_mag"][0] == pytest.approx(0.01)
    assert rates(lr_theta=0.0).keys() == {"d", "g_mag"}
    assert "g_mag" not in rates(magnitude_lr_scale=0.0)


@pytest.mark.parametrize(
    "hyper, each",
    [
        (dict(core="diag"), 192 + 4096 + 4096),
        (dict(core="diag", magnitude="none"), 192 + 4096),
        (dict(core="block", block_size=4), 192 + 4 * 4096 + 4096),
        (dict(core="block", block_size=5), 192 + 819 * 25 + 1 + 4096),
        (dict(core="lowrank", lowrank_r=8), 192 + 8 * 8192 + 4096),
        (dict(core="selective", **STATIC), 192 + 48),
        (dict(core="coupled", magnitude="none", t_stat=9), 192 + 96),
        (dict(single_sided="left"), 96 + 8192),
    ],
)
def test_llama_2_7b_trains_as_many_parameters_as_the_formulas_say(hyper, each):
    names = [f"layers_{i}_{x}_proj" for i in range(32) for x in "qv"]
    with torch.device("meta"):
        model = nn.ModuleDict({name: nn.Linear(4096, 4096, bias=False) for name in names})
    chart = ll.plan(model, "jora", S_L=96, S_R=96, k=24, **hyper)
    assert chart.trainable == 64 * each
    if hyper == dict(core="diag"):
        assert chart.trainable == 536_576


# Bad input.


@pytest.mark.parametrize(
    "hyper, message",
    [
        (dict(S_L=-1), r"jora: S_L=-1 must be ≥ 0"),
        (dict(S_R=-2), r"jora: S_R=-2 must be ≥ 0"),
        (dict(k=-1), r"jora: k=-1 must be ≥ 0"),
        (dict(max_angle=-0.1), r"jora: max_angle=-0.1 must be ≥ 0"),
        (dict(theta_init_std=-1.0), r"jora: theta_init_std=-1.0 must be ≥ 0"),
        (dict(lr_theta=-1.0), r"jora: lr_theta=-1.0 must be ≥ 0"),
        (dict(lr_core=-1.0), r"jora: lr_core=-1.0 must be ≥ 0"),
        (dict(magnitude_lr_scale=-1.0), r"jora: magnitude_lr_scale=-1.0 must be ≥ 0"),
        (dict(warmup_steps=-1), r"jora: warmup_steps=-1 must be ≥ 0"),
        (dict(t_stat=-1), r"jora: t_stat=-1 must be ≥ 0"),
        (dict(update_interval=0), r"jora: update_interval=0 must be ≥ 1"),
        (dict(ema_beta=1.0), r"jora: ema_beta=1.0 must be in \[0, 1\)"),
        (dict(ema_beta=-0.1), r"jora: ema_beta=-0.1 must be in \[0, 1\)"),
        (dict(warmup_ratio=1.5), r"jora: warmup_ratio=1.5 must be in \[0, 1\]"),
        (dict(gumbel_tau=0.0), r"jora: gumbel_tau=0.0 must be positive"),
        (dict(ecd_temp_start=0.0), r"jora: ecd_temp_start=0.0 must be positive"),
        (dict(ecd_temp_end=-1.0), r"jora: ecd_temp_end=-1.0 must be positive"),
        (dict(pairing_strategy="high-low"), r"did you mean 'high_low'"),
        (dict(t_stat=3, selection="random"), r"jora: t_stat=3 gathers what selection='topk_ema'"),
        (dict(t_stat=3, warmup_ratio=0.1), r"jora: t_stat=3 is the warm-up itself"),
        (
            dict(core="selective", magnitude="none", pairs_freeze_after_warmup=True),
            r"jora: core='selective' belongs to pairs that stay; use t_stat ≥ 1, .*='random'",
        ),
        (dict(block_size=0), r"jora: block_size=0 must be ≥ 1"),
        (dict(core="block", block_size=0), r"jora: block_size=0 must be ≥ 1"),
        (dict(lowrank_r=0), r"jora: lowrank_r=0 must be ≥ 1"),
        (dict(oer_temperature=0.0), r"jora: oer_temperature=0.0 must be positive"),
        (dict(ecd_temperature=-1.0), r"jora: ecd_temperature=-1.0 must be positive"),
        (dict(core_init_std=0.0), r"jora: core_init_std=0.0 must be positive"),
        (dict(ecd_alpha=1.0), r"jora: ecd_alpha=1.0 must be in \(−1, 1\)"),
        (dict(ecd_alpha=-1.5), r"jora: ecd_alpha=-1.5 must be in \(−1, 1\)"),
        (dict(core="diagonal"), r"jora: core='diagonal' must be one of .*'diag'"),
        (dict(rotation_param="caylay"), r"did you mean 'cayley'"),
        (dict(single_sided="both"), r"single_sided='both' must be one of 'none', 'left', 'right'"),
        (dict(selection="topk"), r"selection='topk' must be one of"),
        (dict(magnitude="oer"), r"magnitude='oer' must be one of"),
        (dict(magnitude_on="weight"), r"magnitude_on='weight' must be one of 'output', 'delta'"),
        (dict(clip="relu"), r"clip='relu' must be one of 'none', 'tanh'"),
        (dict(max_angle=float("nan")), r"max_angle=nan must be finite"),
        (dict(k=65), r"jora: q_proj has room for 64 pairs in all, fewer than k=65; lower k"),
        (dict(k=33, single_sided="left"), r"q_proj has room for 32 pairs in all, fewer than k=33"),
        (dict(core="selective"), r"jora: core='selective' goes with clip='none' and magnitude='no"),
        (dict(core="coupled", magnitude="none", clip="tanh"), r"core='coupled' goes with clip='no"),
        (dict(core="selective", **STATIC, k=0), r"jora: k=0 must be ≥ 1"),
        (
            dict(core="selective", **STATIC, k=1),
            r"q_proj has 2 active pairs, and core='selective' needs k=1; .* k ≥ 2 with both",
        ),
        (
            dict(core="coupled", magnitude="none", selection="none"),
            r"q_proj has 64 active pairs, and core='coupled' needs k=8; use another selection than",
        ),
        (
            dict(core="selective", magnitude="none", S_L=0, S_R=0),
            r"q_proj has 0 active pairs, and core='selective' needs k=8; .*S_L or S_R above 0",
        ),
    ],
)
def test_settings_that_cannot_work_are_refused(hyper, message):
    with unchecked(), pytest.raises(ValueError, match=message):
        adapted(linear(64, 64), **hyper)


@pytest.mark.parametrize("core", SELECTED)
def test_selected_core_needs_a_square_layer(core):
    with pytest.raises(
        ValueError, match=f"jora: q_proj is 40×24, and core='{core}' needs a square"
    ):
        adapted(linear(24, 40), core=core, **STATIC)


def test_row_norms_need_a_finite_float_weight():
    layer = linear(24, 40)
    with torch.no_grad():
        layer.weight[3, 4] = float("nan")
    with pytest.raises(ValueError, match="jora: q_proj has NaN or infinite weights, .* repair"):
        adapted(layer)
    layer.weight = nn.Parameter(torch.ones(40, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"jora: q_proj has a torch.int8 weight, .* dequantise"):
        adapted(layer)
    adapted(layer, magnitude="none")


def test_slots_beyond_half_the_layer_are_clipped_and_the_plan_says_so():
    chart = ll.plan(Model(linear(13, 40)), "jora")
    shapes = chart.sites[0].shapes
    assert shapes["theta_L"] == (20,) and shapes["theta_R"] == (6,)
    assert "theta_L[20]" in str(chart)


# float16.


@pytest.mark.parametrize(
    "hyper",
    [
        *({"core": core} | MAGNITUDES[m] for core, m in itertools.product(CORES, MAGNITUDES)),
        *(dict(core=core, **STATIC) for core in SELECTED),
    ],
    ids=lambda hyper: "-".join(map(str, hyper.values())),
)
def test_float16_follows_the_definition(hyper):
    hyper = hyper | CORES.get(hyper["core"], {})
    layer = linear(24, 24, dtype=torch.float16)
    model, tensors = adapted(layer, torch.float32, **hyper)
    scatter_about(tensors)
    x, v = torch.randn(2, 3, 24).half(), configure("jora", **hyper)
    W, b = layer.weight.detach().double(), layer.bias.detach().double()
    want = dense_forward(x.double(), twin(tensors), W, b, v)
    close(model(x), want.half(), 3e-3, "y")


@pytest.mark.parametrize(
    "hyper",
    [
        *({"core": core} | MAGNITUDES[m] for core, m in itertools.product(CORES, MAGNITUDES)),
        *(dict(core=core, **STATIC, theta_init_std=0.0) for core in SELECTED),
    ],
    ids=lambda hyper: "-".join(map(str, hyper.values())),
)
def test_fresh_adapter_is_finite_where_a_float16_layer_is(hyper):
    hyper = hyper | CORES.get(hyper["core"], {})
    layer = nn.Linear(64, 64).half()
    nn.init.normal_(layer.weight, std=0.02)
    layer.bias.data[0], layer.weight.data[0] = -40000.0, 90000 / 60000 / 64
    signs = torch.sign(torch.randn(20, 64))
    x = torch.cat([signs, torch.ones(1, 64), -torch.ones(1, 64)])
    x = torch.cat([60000 * x, 60000 * torch.rand(20, 64) * signs]).half()
    base = layer(x)
    x, base = x[base.isfinite().all(-1)], base[base.isfinite().all(-1)]
    assert len(x) > 20 and x.abs().max() > 59000
    assert (base - layer.bias).isinf().any(), "W x alone passes 65504 somewhere"
    model, tensors = adapted(layer, torch.float32, **{"theta_init_std": 1.0} | hyper)
    assert torch.equal(model(x), base)
