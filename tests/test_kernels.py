"""Each kernel beside its plain twin, values and gradients: on a GPU, or by Triton's interpreter.

The interpreter has no bfloat16 products, so that the CPU tries float16 in its place.
"""

import pytest
import torch

import lora_lite as ll
from lora_lite.ops import (
    blocks,
    cayley,
    cores,
    energy,
    gates,
    givens,
    launch,
    reflections,
    selection,
    skinny,
)
from lora_lite.testing import move

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16
ROUNDING = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 2e-6}


@pytest.fixture(autouse=True)
def _served(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", not CUDA)


def random(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape) * scale).to(DEVICE, dtype)


def agree(got, want, tolerance):
    assert got.shape == want.shape
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    assert error <= tolerance, f"off by {error:.1e}"


def plain(monkeypatch, f, *args):
    """f without kernels, on float64 copies."""
    with monkeypatch.context() as patch:
        for module in (
            launch,
            blocks,
            cayley,
            cores,
            energy,
            gates,
            givens,
            reflections,
            selection,
            skinny,
        ):
            for serves in ("kernels_serve", "ops_serve"):
                patch.setattr(module, serves, lambda t: False, raising=False)
        return f(*(wide(a) for a in args))


def wide(a):
    return a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a


def twins(monkeypatch, f, args, tolerance):
    """f's outputs and gradients with its kernel against those of its plain form."""
    args = [
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
        for a in args
    ]
    exact = [wide(a).detach().requires_grad_() if wide(a) is not a else a for a in args]
    got, want = f(*args), plain(monkeypatch, f, *exact)
    got, want = (y if isinstance(y, tuple) else (y,) for y in (got, want))
    leaves = [i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.requires_grad]
    for y, z in zip(got, want):
        if y.is_floating_point():
            agree(y, z, tolerance)
        else:
            assert torch.equal(y, z)
    pairs = [(y, z) for y, z in zip(got, want) if y.requires_grad]
    seeds = [random(*z.shape) for _, z in pairs]
    ours = torch.autograd.grad(
        [y for y, _ in pairs],
        [args[i] for i in leaves],
        [s.to(y.dtype) for s, (y, _) in zip(seeds, pairs)],
    )
    theirs = torch.autograd.grad(
        [z for _, z in pairs],
        [exact[i] for i in leaves],
        [s.to(y.dtype).double() for s, (y, _) in zip(seeds, pairs)],
    )
    for i, a, b in zip(leaves, ours, theirs):
        assert a.dtype == args[i].dtype
        agree(a, b, tolerance)


@pytest.fixture
def poisoned():
    """Memory that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3, device=DEVICE).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("wide_factors", [False, True])
@pytest.mark.parametrize(
    "T, n, r",
    [
        (1, 63, 5),
        (40, 129, 16),
        (300, 129, 16),
        (513, 200, 33),
        (519, 64, 128),
        (256, 1000, 8),
        (1100, 300, 1),
    ],
)
def test_skinny_products(monkeypatch, poisoned, T, n, r, wide_factors):
    small = torch.float32 if wide_factors else HALF
    g, out, z = (random(T, n, dtype=HALF) for _ in range(3))
    h, A, B = random(T, r, dtype=HALF), random(r, n, dtype=small), random(n, r, dtype=small)
    g_1, b = random(n, dtype=small, scale=0.3), random(n, dtype=HALF)
    tolerance = ROUNDING[HALF]
    assert skinny.has_kernel(g, r)
    calls = [
        (skinny.down, (g, A, 0.5)),
        (skinny.down, (g, B.T, 0.5)),
        (skinny.up, (h, B, b)),
        (skinny.up, (h, A.T, None)),
        (skinny.up, (h, B, out)),
        (skinny.outer, (h, g, A)),
        (skinny.outer, (h, g, A.float()[: (r + 1) // 2])),
        (lambda g, B, h: skinny.down_and_outer(g, B, h, 2.0, torch.float32), (g, B, h)),
        (skinny.scaled_down_and_outer, (g, out, B, h, g_1, 0.5, False)),
        (skinny.scaled_down_and_outer, (g, out, B, h, g_1, 0.5, True)),
    ]
    if r % 2 == 0:
        calls.append((skinny.down_and_outer, (g, B, h, 1.0, small, r // 2)))
    for f, args in calls:
        got, want = f(*args), plain(monkeypatch, f, *args)
        for y, x in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, want)), strict=True):
            assert (y is None) == (x is None)
            if x is not None:
                agree(y, x, tolerance)
    dB, _ = skinny.outer(h, g, B.T)
    assert dB.dtype == small and dB.stride() == B.T.stride()
    agree(dB, plain(monkeypatch, skinny.outer, h, g, B.T)[0], tolerance)
    for seen in (
        skinny.outer(h, g, A, True),
        skinny.down_and_outer(g, B, h, 2.0, small, energies=True),
        skinny.scaled_down_and_outer(g, out, B, h, g_1, 0.5, True, True),
    ):
        parts, tokens = seen[-1]
        assert tokens == T and parts.shape[1] == n
        agree(parts.sum(0), g.double().square().sum(0), 1e-6)
    for bias in (None, b):
        got = skinny.scaled_up(z.clone(), h, B, g_1, bias)
        want = plain(monkeypatch, skinny.scaled_up, z, h, B, g_1, bias)
        agree(got[0], want[0], tolerance)
        agree(got[1], want[1], tolerance)


def test_skinny_sums_over_many_tokens_of_one_program(monkeypatch):
    from lora_lite.ops import skinny_kernels

    monkeypatch.setattr(skinny_kernels, "PROGRAMS", 4)
    for name in ("tiles_of_outer", "tiles_of_both"):
        uncached = getattr(skinny_kernels, name).__wrapped__
        monkeypatch.setattr(skinny_kernels, name, uncached)
    T, n, r = 430, 300, 8
    g, out, h = (random(T, k, dtype=HALF) for k in (n, n, r))
    B, g_1 = random(n, r), random(n, scale=0.3)
    for f, *args in (
        (skinny.outer, h, g, B.T, True),
        (skinny.down_and_outer, g, B, h, 2.0, torch.float32, r // 2, True),
        (skinny.scaled_down_and_outer, g, out, B, h, g_1, 0.5, True, True),
    ):
        *got, squares = f(*args)
        *want, _ = plain(monkeypatch, f, *args)
        for y, x in zip(got, want, strict=True):
            agree(y, x, ROUNDING[HALF])
        agree(squares.parts.sum(0), g.double().square().sum(0), 1e-6)


def test_skinny_products_take_strided_rows(monkeypatch):
    x = random(300, 80, dtype=HALF)[:, ::2]
    y = random(300, 80, dtype=HALF)[:, :40]
    A = random(8, 40)
    for strided in (x, y):
        assert not strided.is_contiguous()
        agree(skinny.down(strided, A), plain(monkeypatch, skinny.down, strided, A), ROUNDING[HALF])
        h = random(300, 8, dtype=HALF)
        want = plain(monkeypatch, skinny.up, h, A.T, strided)
        agree(skinny.up(h, A.T, strided), want, ROUNDING[HALF])


def test_skinny_sums_are_the_same_in_every_run():
    g, out, h = (random(2100, k, dtype=HALF) for k in (300, 300, 8))
    B, g_1 = random(300, 8), random(300)
    run = lambda: skinny.scaled_down_and_outer(g, out, B, h, g_1, 0.5, True, True)
    (*first, squares), (*second, others) = run(), run()
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.equal(squares.parts, others.parts)


def test_a_scale_of_zero_has_no_gradient(monkeypatch):
    """The output tells nothing of what it scaled, and what lies behind it gets none either."""
    g, out, h = (random(300, k, dtype=HALF) for k in (40, 40, 4))
    B, g_1 = random(40, 4), random(40)
    g_1[7] = -1
    du, dp, dB, dg, _ = skinny.scaled_down_and_outer(g, out, B, h, g_1, 0.5, True)
    assert not du[:, 7].any() and not dB[7].any() and dg[7] == 0
    for t in (du, dp, dB, dg):
        assert t.isfinite().all()


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("n, d, r", [(33, 63, 1), (70, 1000, 8), (31, 300, 33), (64, 129, 128)])
def test_row_norms(poisoned, n, d, r, dtype):
    from lora_lite.ops import skinny_kernels

    W, B, A = random(n, d, dtype=dtype), random(n, r), random(r, d)
    B[3] = 0
    norms = random(n).abs()
    want = (W.double() + 0.25 * B.double() @ A.double()).norm(dim=1)
    for weight in (W, W.T.contiguous().T):
        got = skinny_kernels.row_norms(weight, B, A, norms, 0.25)
        assert got[3] == norms[3]
        got[3] = want[3]
        agree(got, want, 1e-3 if CUDA and dtype != torch.float32 else 1e-6)


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("T, n, b", [(70, 3, 32), (129, 5, 4), (64, 7, 6), (33, 1, 64), (1, 9, 2)])
def test_block_rows(monkeypatch, T, n, b, dtype):
    if dtype == torch.float32:
        monkeypatch.setattr(blocks, "has_kernel", lambda x, b: launch.kernels_serve(x))
        if CUDA:
            pytest.skip("float32 takes the plain form there")
    x, R = random(T, n * b, dtype=dtype), random(n, b, b, dtype=dtype, scale=0.1)
    with monkeypatch.context() as patch:
        used = []
        from lora_lite.ops import blocks_kernels

        real = blocks_kernels.butterflies
        patch.setattr(blocks_kernels, "butterflies", lambda *a: used.append(1) or real(*a))
        for f in (blocks.add_block_rows, blocks.block_rows, blocks.block_columns):
            twins(patch, f, [x, R], ROUNDING[dtype])
    assert len(used) == 3
    f, dy = blocks.block_columns_backward, random(T, n * b, dtype=dtype)
    for got, want in zip(f(dy, x, R), plain(monkeypatch, f, dy, x, R)):
        agree(got, want, ROUNDING[dtype])


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
# The tile's 64 columns hold all levels of a butterfly, or all but the last, two or three; whole
# groups do not fill them, or there are more of these than one tile holds.
@pytest.mark.parametrize(
    "n, b, m",
    [(4, 4, 2), (8, 2, 4), (6, 6, 2), (16, 6, 5), (20, 8, 3), (4, 64, 2), (8, 32, 4), (96, 2, 6)],
)
def test_butterflies(monkeypatch, poisoned, n, b, m, dtype):
    if dtype == torch.float32:
        monkeypatch.setattr(blocks, "has_kernel", lambda x, b: launch.kernels_serve(x))
        if CUDA:
            pytest.skip("float32 takes the plain form there")
    x, R = random(70, n * b, dtype=dtype), random(m, n, b, b, scale=0.3 / b**0.5)
    twins(monkeypatch, blocks.add_butterflies, [x, R], ROUNDING[dtype])


@pytest.mark.parametrize("d, b, m, passes", [(64, 8, 4, 1), (128, 8, 5, 2), (256, 64, 3, 3)])
def test_passes_of_butterflies(monkeypatch, d, b, m, passes):
    from lora_lite.ops import blocks_kernels

    real, seen = blocks_kernels.butterflies, []
    monkeypatch.setattr(
        blocks_kernels, "butterflies", lambda *args: seen.append(args) or real(*args)
    )
    x = random(5, d, dtype=HALF)
    assert torch.equal(blocks.add_butterflies(x, torch.zeros(m, d // b, b, b, device=DEVICE)), x)
    assert len(seen) == passes


def test_one_block_serves_all(monkeypatch):
    x, R = random(40, 24, dtype=HALF), random(1, 8, 8, dtype=HALF, scale=0.1)
    twins(monkeypatch, blocks.add_block_rows, [x, R], ROUNDING[HALF])


def test_block_rows_of_nothing():
    x = random(0, 24, dtype=HALF).requires_grad_()
    blocks.add_block_rows(x, random(3, 8, 8, dtype=HALF)).sum().backward()
    assert x.grad.shape == (0, 24)


@pytest.mark.parametrize("scale", [1e-4, 0.1])
@pytest.mark.parametrize("n, b", [(3, 32), (2, 5), (4, 4), (2, 2), (1, 64)])
def test_small_rotations(monkeypatch, n, b, scale):
    q = random(n, b * (b - 1) // 2, scale=scale)
    twins(monkeypatch, lambda q: cayley.cayley(q, b), [q], 4e-6)
    for terms in (2, 3, 5, 8):
        twins(monkeypatch, lambda q, t=terms: cayley.cayley_neumann(q, b, t), [q], 4e-6)


@pytest.mark.parametrize("turned", ["U", "V", "both"])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 8.0])
@pytest.mark.parametrize("n, b, L", [(3, 32, 0.02), (5, 4, 0.5), (2, 2, 20.0), (1, 33, 0.5)])
def test_turned_shifts(monkeypatch, poisoned, n, b, L, scale, turned):
    """Of angles in the middle of their bounds, near none, and at the bound."""
    S = random(n * b).abs()
    P = [random(n, b * (b - 1) // 2, scale=scale * L) for _ in range(1 + (turned == "both"))]
    sides = dict(U=lambda P: (P, None), V=lambda P: (None, P), both=lambda *P: P)

    def core(delta, *P):
        return cores.turned_shift(S.to(delta), delta, *sides[turned](*P), b, L)

    assert cores.has_rotation_kernel(P[0], b)
    twins(monkeypatch, core, [random(n * b, scale=0.1), *P], 4e-6)


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("shape", [(40, 40), (70,), (20, 4, 4), (3, 64, 64), (2, 65, 65)], ids=str)
@pytest.mark.parametrize("T", [1, 63, 300])
def test_cores(monkeypatch, poisoned, T, shape, dtype):
    """What autograd finds, in twice the plain form's own rounding."""
    r = shape[0] if len(shape) < 3 else shape[0] * shape[1]
    h, dy, core = random(T, r, dtype=dtype), random(T, r, dtype=dtype), random(*shape)

    def found(h, dy, core):
        h, core = h.detach().requires_grad_(), core.detach().requires_grad_()
        y = cores.core_columns(h, core)
        return y.detach(), *torch.autograd.grad(y, (h, core), dy)

    want = plain(monkeypatch, found, h, dy, core)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "ops_serve", lambda t: False)
        rounded = found(h, dy, core)
    got = cores.core_columns_forward(h, core), *cores.core_columns_backward(dy, h, core)
    for y, own, exact in zip(got, rounded, want):
        assert y.dtype == own.dtype
        rounding = (own.double() - exact).norm() / exact.norm()
        agree(y, exact, max(2 * rounding, 1e-6))


def columns(d, r, distance):
    """Pairs of neighbouring columns that differ by `distance`; at 1 all are independent."""
    U = random(d, r)
    pairs = random(d, (r + 1) // 2).repeat_interleave(2, 1)[:, :r]
    return U if distance == 1 else pairs + distance * U


@pytest.mark.parametrize("distance", [0.1, 1])
@pytest.mark.parametrize(
    "d, r", [(5, 1), (64, 2), (333, 3), (5000, 8), (63, 13), (130, 32), (300, 63), (129, 64)]
)
def test_reflections(monkeypatch, poisoned, d, r, distance):
    from lora_lite.ops import reflections_kernels

    real, seen = reflections_kernels.backward, []
    monkeypatch.setattr(
        reflections_kernels, "backward", lambda *args: seen.append(args) or real(*args)
    )
    twins(monkeypatch, reflections.reflections, [columns(d, r, distance)], 5e-6)
    assert len(seen) == 1
    # In another order in memory.
    U = columns(d, r, distance).T.contiguous().T
    twins(monkeypatch, lambda U: reflections.reflections(U)[1].T, [U], 5e-6)


@pytest.mark.parametrize("r", [2, 8, 24, 64])
def test_reflections_of_equal_columns_leave_nothing(r):
    for d in (64, 333):
        A, B = reflections.reflections(columns(d, r, 0))
        assert not (B @ A).any()


@pytest.mark.parametrize("r", [2, 9, 64])
@pytest.mark.parametrize("distance", [1e-5, 1e-3])
def test_small_turns_keep_their_digits(monkeypatch, r, distance):
    U = columns(200, r - r % 2, distance)
    A, B = reflections.reflections(U)
    want = plain(monkeypatch, lambda U: torch.mm(*reversed(reflections.reflections(U))), U)
    agree(B.bfloat16().double() @ A.bfloat16().double(), want, 2e-2)


def test_more_columns_than_a_tile_has_are_reflected_in_the_plain_form():
    assert not reflections.has_kernel(random(100, 65)) and reflections.has_kernel(random(100, 64))


@pytest.mark.parametrize("bound", [0.0, 0.4])
@pytest.mark.parametrize("by_cayley", [True, False])
@pytest.mark.parametrize("d, S", [(40, 9), (301, 20)])
def test_rotation_tables(monkeypatch, d, S, by_cayley, bound):
    pairs = givens.random_pairs(d, S - 2, S, torch.Generator().manual_seed(1)).to(DEVICE)
    active = (torch.arange(S, device=DEVICE) % 3 > 0) & (pairs[:, 0] >= 0)
    theta, k = random(S), S - 3
    theta[1] = 0  # a pair that has just entered
    rotation = lambda theta: givens.Rotation(theta, pairs, active, k, d, by_cayley, bound)
    tables = lambda theta: givens.rotation_tables(rotation(theta))
    if by_cayley and bound and not CUDA or bound and not CUDA:
        pytest.skip("the interpreter has no tanh")
    twins(monkeypatch, tables, [theta], 2e-6)


@pytest.mark.parametrize("by_cayley", [True, False])
@pytest.mark.parametrize("d, S, r", [(40, 9, 8), (301, 90, 3), (70, 20, 100)])
def test_factors_turned_back(monkeypatch, d, S, r, by_cayley):
    pairs = givens.random_pairs(d, S - 2, S, torch.Generator().manual_seed(1)).to(DEVICE)
    active = (torch.arange(S, device=DEVICE) % 3 > 0) & (pairs[:, 0] >= 0)
    theta = random(S)
    theta[1] = 0

    def turn(A, theta):
        rotation = givens.Rotation(theta, pairs, active, S - 3, d, by_cayley, 0.0)
        return givens.turned_back(A, rotation)

    assert "_TurnedBack" in turn(random(d, r), theta.clone().requires_grad_()).grad_fn.name()
    twins(monkeypatch, turn, [random(d, r), theta], 2e-6)
    resting = torch.ones(d, dtype=torch.bool, device=DEVICE)
    resting[pairs[: S - 3][active[: S - 3]].flatten()] = False
    A = random(d, r)
    assert torch.equal(turn(A, theta)[resting], A[resting])


@pytest.mark.parametrize("T, d, S", [(70, 63, 9), (33, 300, 40), (1, 5, 2)])
def test_pairs_applied(monkeypatch, T, d, S):
    pairs = givens.random_pairs(d, S, S, torch.Generator().manual_seed(1)).to(DEVICE)
    assert givens.has_kernel(random(T, d, dtype=HALF))

    def turn(x, blocks):
        return givens.apply_pairs(x, *givens.pair_tables(pairs, blocks, rest=1.0, d=d))

    twins(monkeypatch, turn, [random(T, d, dtype=HALF), random(S, 2, 2)], ROUNDING[HALF])
    strided = random(d, T, dtype=HALF).T
    blocks = random(S, 2, 2)
    agree(turn(strided, blocks), plain(monkeypatch, turn, strided, blocks), ROUNDING[HALF])
    assert turn(strided[:0], blocks).shape == (0, d)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("n", [5, 63, 1023])
def test_row_energy(monkeypatch, n, temperature):
    norms = random(n).abs()
    norms[2] = 0
    oer = lambda g: energy.oer_softmax(g, norms.to(g.dtype), temperature)
    twins(monkeypatch, oer, [random(n)], 4e-6)
    assert not oer(torch.zeros(n, device=DEVICE)).any()


def ema(average, x):
    average = average.float().clone()
    selection.ema_([(average, x)], 0.9)
    return average


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("T, d", [(100, 63), (300, 1500), (1, 5)])
def test_energies_averaged_over_time(monkeypatch, T, d, bad, dtype):
    x, average = random(T, d, dtype=dtype), random(d).abs()
    if bad is not None:
        x[0, 2] = bad
    before = average.clone()
    want = plain(monkeypatch, ema, before, x)
    selection.ema_([(average, x)], 0.9)
    agree(average, want, 2e-6)
    assert torch.equal(average, before) == (bad is not None)


def test_no_energies_change_nothing():
    average = random(5).abs()
    before = average.clone()
    selection.ema_([(average, random(0, 5))], 0.9)
    assert torch.equal(average, before)


@pytest.fixture
def used(monkeypatch):
    """The names of the kernels of gates that ran."""
    from lora_lite.ops import gates_kernels

    names = []

    def noted(name, real):
        return lambda *args: names.append(name) or real(*args)

    for name in ("gate", "gate_backward", "turn", "turn_backward", "polar", "polar_backward"):
        monkeypatch.setattr(gates_kernels, name, noted(name, getattr(gates_kernels, name)))
    return names


def planes(n, rows, h):
    """c and s of rotations and stretches of 2nh coordinates."""
    return random(n, rows, h, scale=0.5), random(n, rows, h, scale=0.5)


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("T, d", [(1, 5), (63, 1000), (1000, 63), (129, 1023), (1023, 24)])
def test_gates(monkeypatch, poisoned, used, T, d, dtype):
    args = [random(T, d, dtype=dtype), random(d, scale=0.5)]
    twins(monkeypatch, gates.gate, args, ROUNDING[dtype])
    assert used == ["gate", "gate_backward"]


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "T, n, h", [(1, 3, 1), (63, 125, 4), (1000, 9, 3), (129, 1, 63), (33, 511, 1), (1023, 4, 32)]
)
def test_turned_planes(monkeypatch, poisoned, used, T, n, h, rows, dtype):
    args = [random(T, 2 * n * h, dtype=dtype), *planes(n, rows, h)]
    twins(monkeypatch, gates.turn, args, ROUNDING[dtype])
    assert used == ["turn", "turn_backward"]


@pytest.mark.parametrize("parts, rows", [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("n, h", [(1, 1), (3, 5), (63, 4), (40, 32)])
def test_polar_tables(monkeypatch, poisoned, used, n, h, parts, rows):
    alpha, theta = (random(n, parts, rows, h) for _ in range(2))
    twins(monkeypatch, gates.polar, [alpha, theta], ROUNDING[torch.float32])
    assert used == ["polar", "polar_backward"]
    alpha, theta = (t.transpose(0, 3) for t in (alpha, theta))
    twins(monkeypatch, gates.polar, [alpha, theta], ROUNDING[torch.float32])


def test_no_polar_tables(used):
    nothing = random(0, 1, 1, 4)
    assert gates.polar(nothing, nothing)[0].shape == (0, 1, 4) and not used


AS_ARGUMENTS = [
    (gates.gate, lambda: (random(24, scale=0.5),)),
    (gates.turn, lambda: planes(3, 1, 4)),
    (gates.turn, lambda: planes(3, 2, 4)),
]


@pytest.mark.parametrize("f, numbers", AS_ARGUMENTS)
def test_gates_take_any_layout(monkeypatch, poisoned, f, numbers):
    numbers = numbers()
    for z in (random(3, 24, 50).mT, random(40, 48)[:, ::2], random(24), random(2, 1, 24)):
        twins(monkeypatch, f, [z, *numbers], ROUNDING[torch.float32])
    z, ours = random(3, 24, 50).mT.requires_grad_(), [t.requires_grad_() for t in numbers]
    # A gradient of stride 0, and one in another order.
    for y_grad in (random(1).expand(3, 50, 24), random(3, 24, 50).mT):
        got = torch.autograd.grad(f(z, *ours), [z, *ours], y_grad)
        exact = [a.detach().double().requires_grad_() for a in (z, *ours)]
        want = torch.autograd.grad(plain(monkeypatch, f, *exact), exact, y_grad.double())
        for a, b in zip(got, want):
            agree(a, b, ROUNDING[torch.float32])


@pytest.mark.parametrize("f, numbers", AS_ARGUMENTS)
def test_gates_of_nothing(used, f, numbers):
    z, numbers = random(0, 24, dtype=HALF).requires_grad_(), [t.requires_grad_() for t in numbers()]
    f(z, *numbers).sum().backward()
    assert not used and z.grad.shape == (0, 24)
    assert all(t.grad.shape == t.shape and not t.grad.any() for t in numbers)


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_gates_at_the_identity_leave_z_as_it_is(poisoned, dtype):
    z, ones = random(70, 24, dtype=dtype, scale=1e3), torch.ones(3, 1, 4, device=DEVICE)
    assert torch.equal(gates.gate(z, torch.ones(24, device=DEVICE)), z)
    assert torch.equal(gates.turn(z, ones, 0 * ones), z)


@pytest.mark.parametrize("f, numbers", AS_ARGUMENTS)
def test_sums_of_gates_are_the_same_in_every_run(f, numbers):
    args = [random(2000, 24, dtype=HALF), *numbers()]
    args = [t.requires_grad_() for t in args]
    first, second = (torch.autograd.grad(f(*args).square().sum(), args) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize(
    "f, numbers",
    [
        *AS_ARGUMENTS,
        (
            lambda z, *how: gates.turn(z, *gates.polar(*how)),
            lambda: (random(3, 2, 2, 4), random(3, 2, 2, 4)),
        ),
    ],
)
def test_gates_are_differentiated_twice_in_their_plain_form(monkeypatch, f, numbers):
    def second(*args):
        args = [t.requires_grad_() for t in args]
        first = torch.autograd.grad(f(*args).square().sum(), args, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), args)

    args = [random(7, 24), *numbers()]
    want = plain(monkeypatch, second, *args)
    for a, b in zip(second(*args), want):
        agree(a, b, ROUNDING[torch.float32])


@pytest.mark.parametrize(
    "variant, hyper, kernel",
    [
        ("ia3", {}, "gate"),
        ("ia3_ff", {}, "gate"),
        ("road", dict(group_size=8), "turn"),
        ("road", dict(group_size=4, form=4), "turn"),
    ],
)
def test_layers_run_on_them(monkeypatch, poisoned, used, variant, hyper, kernel):
    layer = torch.nn.Linear(24, 40, device=DEVICE)
    ll.attach(layer, variant, **hyper)
    move(layer, scale=0.5)
    x, y_grad = random(2, 30, 24), random(2, 30, 40)

    def run(x, y_grad):
        y = layer(x.requires_grad_())
        trained = [p for p in layer.parameters() if p.requires_grad]
        return y, *torch.autograd.grad(y, [x, *trained], y_grad)

    got = run(x, y_grad)
    tables = ["polar"] if variant == "road" else []
    assert used == [*tables, kernel, f"{kernel}_backward", *(f"{t}_backward" for t in tables)]
    layer.double()
    for a, b in zip(got, plain(monkeypatch, run, x.detach(), y_grad)):
        agree(a, b, 4e-6)
