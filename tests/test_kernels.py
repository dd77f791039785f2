"""Each kernel beside its plain twin, values and gradients: on a GPU, or by Triton's interpreter.

The interpreter has no bfloat16 products, so that the CPU tries float16 in its place.
"""

import pytest
import torch

from lora_lite.ops import blocks, cayley, energy, givens, launch, selection, skinny

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
        patch.setattr(launch, "kernels_serve", lambda t: False)
        for module in (blocks, cayley, energy, givens, selection, skinny):
            patch.setattr(module, "kernels_serve", lambda t: False)
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


@pytest.mark.parametrize("wide_factors", [False, True])
@pytest.mark.parametrize("T, n, r", [(256, 63, 5), (300, 129, 16), (513, 200, 33), (1023, 64, 128)])
def test_skinny_products(monkeypatch, T, n, r, wide_factors):
    small = torch.float32 if wide_factors else HALF
    g, out, z = (random(T, n, dtype=HALF) for _ in range(3))
    h, A, B = random(T, r, dtype=HALF), random(r, n, dtype=small), random(n, r, dtype=small)
    g_1, b = random(n, dtype=small, scale=0.3), random(n, dtype=HALF)
    tolerance = ROUNDING[HALF]
    assert skinny.has_kernel(g, r)
    calls = [
        (skinny.down, (g, A, 0.5)),
        (skinny.up, (h, B, b)),
        (skinny.up, (h, A.T, None)),
        (lambda g, h: skinny.outer(g, h, torch.float32), (g, h)),
        (skinny.down_and_outer, (g, B, h, 2.0)),
        (skinny.scaled_down_and_outer, (g, out, B, h, g_1, 0.5, False)),
        (skinny.scaled_down_and_outer, (g, out, B, h, g_1, 0.5, True)),
    ]
    for f, args in calls:
        got, want = f(*args), plain(monkeypatch, f, *args)
        for y, x in zip(*((v if isinstance(v, tuple) else (v,)) for v in (got, want))):
            agree(y, x, tolerance)
    for bias in (None, b):
        got = skinny.scaled_up(z.clone(), h, B, g_1, bias)
        want = plain(monkeypatch, skinny.scaled_up, z, h, B, g_1, bias)
        agree(got[0], want[0], tolerance)
        agree(got[1], want[1], tolerance)


def test_skinny_products_take_strided_rows(monkeypatch):
    x = random(300, 80, dtype=HALF)[:, ::2]
    y = random(300, 80, dtype=HALF)[:, :40]
    A = random(8, 40)
    for strided in (x, y):
        assert not strided.is_contiguous()
        agree(skinny.down(strided, A), plain(monkeypatch, skinny.down, strided, A), ROUNDING[HALF])


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

        real = blocks_kernels.add_block_rows
        patch.setattr(blocks_kernels, "add_block_rows", lambda *a: used.append(1) or real(*a))
        twins(patch, blocks.add_block_rows, [x, R], ROUNDING[dtype])
    assert used


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


@pytest.mark.parametrize("bound", [0.0, 0.4])
@pytest.mark.parametrize("by_cayley", [True, False])
@pytest.mark.parametrize("d, S", [(40, 9), (301, 20)])
def test_rotation_tables(monkeypatch, d, S, by_cayley, bound):
    pairs = givens.random_pairs(d, S - 2, S, torch.Generator().manual_seed(1)).to(DEVICE)
    active = (torch.arange(S, device=DEVICE) % 3 > 0) & (pairs[:, 0] >= 0)
    theta = random(S)
    theta[1] = 0  # a pair that has just entered
    tables = lambda theta: givens.rotation_tables(theta, pairs, active, d, by_cayley, bound)
    if by_cayley and bound and not CUDA or bound and not CUDA:
        pytest.skip("the interpreter has no tanh")
    twins(monkeypatch, tables, [theta], 2e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("n", [5, 63, 1023])
def test_row_energy(monkeypatch, n, temperature):
    norms = random(n).abs()
    norms[2] = 0
    oer = lambda g: energy.oer_softmax(g, norms.to(g.dtype), temperature)
    twins(monkeypatch, oer, [random(n)], 4e-6)
    assert not oer(torch.zeros(n, device=DEVICE)).any()


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("T, d", [(100, 63), (300, 1500), (1, 5)])
def test_energies_averaged_over_time(monkeypatch, T, d, bad, dtype):
    x, average = random(T, d, dtype=dtype), random(d).abs()
    if bad is not None:
        x[0, 2] = bad
    before = average.clone()
    want = plain(monkeypatch, lambda a, x: selection.ema_(a.float(), x, 0.9), before, x)
    selection.ema_(average, x, 0.9)
    agree(average, want, 2e-6)
    assert torch.equal(average, before) == (bad is not None)


def test_no_energies_change_nothing():
    average = random(5).abs()
    before = average.clone()
    selection.ema_(average, random(0, 5), 0.9)
    assert torch.equal(average, before)
