"""Triton kernels of `rotated`: one pass over x and the output forward; backward one over x, the
output and its gradient for all sums over tokens, and one that makes the input's gradient.

Coordinates outside the pairs are their own partners, p_i = i, and nothing is read twice for them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_lite.ops.launch import cdiv, launch

Table = tuple[Tensor, Tensor, Tensor]
PROGRAMS = 528
BLOCK = 128


def forward(
    z: Tensor,
    x: Tensor,
    C: Tensor,
    left: Table | None,
    right: Table | None,
    s_1: Tensor | None,
    b: Tensor | None,
    on_output: bool,
) -> tuple[Tensor, Tensor]:
    """(y, what backward needs of it), in z's memory: (1 + s_1) ⊙ (z + Δ) + b, or with
    `on_output` off z + (1 + s_1) ⊙ Δ + b."""
    (T, n), m = z.shape, x.shape[1]
    biased, scaled = b is not None, s_1 is not None
    y = torch.empty_like(z) if biased and scaled and on_output else z
    launch(
        _forward, (cdiv(n, BLOCK), cdiv(T, 16)),
        z, x, C, *tables(left, C), *tables(right, C), s_1 if scaled else C, b if biased else C, y,
        T, n, m, len(C),
        left is not None, right is not None, scaled, on_output, biased, y is not z,
        16, BLOCK,
    )  # fmt: skip
    return y, z


def sums(
    dy: Tensor,
    out: Tensor,
    x: Tensor,
    C: Tensor,
    left: Table | None,
    right: Table | None,
    s_1: Tensor | None,
    on_output: bool,
    divide: bool,
) -> tuple[Tensor, Tensor]:
    """(du, sums over tokens (6, n): for s_1, c_L, s_L, c_R, s_R and C)."""
    (T, n), m = dy.shape, x.shape[1]
    scaled = s_1 is not None
    du = torch.empty_like(dy) if scaled and on_output else dy
    blocks = cdiv(n, BLOCK)
    splits = max(1, min(cdiv(T, 64), cdiv(PROGRAMS, blocks)))
    parts = dy.new_empty(splits, 6, n, dtype=torch.float32)
    launch(
        _sums, (blocks, splits),
        dy, out, x, C, *tables(left, C), *tables(right, C), s_1 if scaled else C, du, parts,
        T, n, m, len(C), cdiv(T, splits),
        left is not None, right is not None, scaled, on_output, divide,
        8, BLOCK,
    )  # fmt: skip
    return du, parts.sum(0)


def input_gradient(
    du: Tensor,
    m: int,
    C: Tensor,
    left: Table | None,
    right: Table | None,
    s_1: Tensor | None,
) -> Tensor:
    """R_Rᵀ Cᵀ R_L (s ⊙ du), s = 1 + s_1 or 1."""
    T, n = du.shape
    dx = du.new_empty(T, m)
    launch(
        _input_gradient, (cdiv(m, BLOCK), cdiv(T, 16)),
        du, C, *tables(left, C), *tables(right, C), C if s_1 is None else s_1, dx,
        T, n, m, len(C),
        left is not None, right is not None, s_1 is not None,
        16, BLOCK,
    )  # fmt: skip
    return dx


def tables(side: Table | None, unused: Tensor) -> Table:
    return (unused, unused, unused) if side is None else side


@triton.jit
def _mixed(x, row, i, inside, c, s, p, turns: tl.constexpr):
    """c_i x_i + s_i x_{p_i} of the rows that `row` begins."""
    own = tl.load(x + row + i, mask=inside, other=0.0).to(tl.float32)
    if turns:
        s_i = tl.load(s + i, mask=inside, other=0.0).to(tl.float32)
        p_i = tl.load(p + i, mask=inside, other=0)
        other = tl.load(x + row + p_i, mask=inside & (s_i != 0), other=0.0).to(tl.float32)
        own = tl.load(c + i, mask=inside, other=0.0).to(tl.float32) * own + s_i * other
    return own


@triton.jit
def _core(x, row, i, inside, q, C, c, s, p, turns: tl.constexpr):
    """(C R_R x)_i."""
    inside = inside & (i < q)
    return tl.load(C + i, mask=inside, other=0.0).to(tl.float32) * _mixed(
        x, row, i, inside, c, s, p, turns
    )


@triton.jit
def _forward(
    z, x, C, c_L, s_L, p_L, c_R, s_R, p_R, s_1, b, y, T, n, m, q,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    biased: tl.constexpr, apart: tl.constexpr,
    block_t: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    t = (tl.program_id(1).to(tl.int64) * block_t + tl.arange(0, block_t))[:, None]
    inside = (t < T) & (i < n)
    delta = _core(x, t * m, i, inside, q, C, c_R, s_R, p_R, right)
    if left:
        s = tl.load(s_L + i, mask=i < n, other=0.0).to(tl.float32)
        p = tl.load(p_L + i, mask=i < n, other=0)
        other = _core(x, t * m, p, inside & (s != 0), q, C, c_R, s_R, p_R, right)
        delta = tl.load(c_L + i, mask=i < n, other=0.0).to(tl.float32) * delta - s * other
    u = tl.load(z + t * n + i, mask=inside, other=0.0).to(tl.float32)
    if scaled:
        scale = 1 + tl.load(s_1 + i, mask=i < n, other=0.0).to(tl.float32)
        if on_output:
            u = u + delta
            if apart:
                tl.store(z + t * n + i, u.to(z.dtype.element_ty), mask=inside)
            u = scale * u
        else:
            u = u + scale * delta
    else:
        u = u + delta
    if biased:
        u += tl.load(b + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y + t * n + i, u.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _sums(
    dy, out, x, C, c_L, s_L, p_L, c_R, s_R, p_R, s_1, du, parts, T, n, m, q, tokens,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    divide: tl.constexpr, block_t: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    split = tl.program_id(1).to(tl.int64)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    cl = tl.load(c_L + i, mask=i < n, other=0.0).to(tl.float32) if left else 1.0
    sl = tl.load(s_L + i, mask=i < n, other=0.0).to(tl.float32) if left else 0.0
    pl = tl.load(p_L + i, mask=i < n, other=0) if left else i
    pr = tl.load(p_R + i, mask=i < q, other=0) if right else i
    scale = 1 + tl.load(s_1 + i, mask=i < n, other=0.0).to(tl.float32) if scaled else 1.0
    zeros = tl.zeros((block_t, block), tl.float32)
    sum_s, sum_cl, sum_sl, sum_cr, sum_sr, sum_d = zeros, zeros, zeros, zeros, zeros, zeros
    for first in range(begin, end, block_t):
        t = (first + tl.arange(0, block_t)).to(tl.int64)[:, None]
        inside = (t < end) & (i < n)
        g = tl.load(dy + t * n + i, mask=inside, other=0.0).to(tl.float32)
        z = _core(x, t * m, i, inside, q, C, c_R, s_R, p_R, right)
        z_p = zeros
        if left:
            z_p = _core(x, t * m, pl, inside & (pl != i), q, C, c_R, s_R, p_R, right)
        if scaled:
            if on_output:
                u = tl.load(out + t * n + i, mask=inside, other=0.0).to(tl.float32)
                tl.store(du + t * n + i, (scale * g).to(du.dtype.element_ty), mask=inside)
            else:
                u = cl * z - sl * z_p
            sum_s += g * u
        h = scale * g
        turned = _scaled(dy, t * n, i, inside & (i < q), c_L, s_L, p_L, s_1, left, scaled)
        sum_d += turned * _mixed(x, t * m, i, inside & (i < q), c_R, s_R, p_R, right)
        sum_cl += h * z
        sum_sl -= h * z_p
        if right:
            # e = Cᵀ R_L h, with h = s ⊙ dy taken from dy at every coordinate.
            e = _core_transposed(dy, t * n, i, inside, q, C, c_L, s_L, p_L, s_1, left, scaled)
            here = inside & (i < q)
            own = tl.load(x + t * m + i, mask=here, other=0.0).to(tl.float32)
            other = tl.load(x + t * m + pr, mask=here & (pr != i), other=0.0).to(tl.float32)
            sum_cr += e * own
            sum_sr += e * other
    at = parts + split * 6 * n + i
    total = tl.sum(sum_s, 0)[None, :]
    if divide:
        total = tl.where(scale == 0, 0.0, total / scale)
    tl.store(at, total, mask=i < n)
    tl.store(at + n, tl.sum(sum_cl, 0)[None, :], mask=i < n)
    tl.store(at + 2 * n, tl.sum(sum_sl, 0)[None, :], mask=i < n)
    tl.store(at + 3 * n, tl.sum(sum_cr, 0)[None, :], mask=i < n)
    tl.store(at + 4 * n, tl.sum(sum_sr, 0)[None, :], mask=i < n)
    tl.store(at + 5 * n, tl.sum(sum_d, 0)[None, :], mask=i < n)


@triton.jit
def _scaled(g, row, i, inside, c, s, p, s_1, turns: tl.constexpr, scaled: tl.constexpr):
    """(R (s ⊙ g))_i."""
    own = tl.load(g + row + i, mask=inside, other=0.0).to(tl.float32)
    if scaled:
        own *= 1 + tl.load(s_1 + i, mask=inside, other=0.0).to(tl.float32)
    if turns:
        s_i = tl.load(s + i, mask=inside, other=0.0).to(tl.float32)
        p_i = tl.load(p + i, mask=inside, other=0)
        there = inside & (s_i != 0)
        other = tl.load(g + row + p_i, mask=there, other=0.0).to(tl.float32)
        if scaled:
            other *= 1 + tl.load(s_1 + p_i, mask=there, other=0.0).to(tl.float32)
        own = tl.load(c + i, mask=inside, other=0.0).to(tl.float32) * own + s_i * other
    return own


@triton.jit
def _core_transposed(
    g, row, j, inside, q, C, c, s, p, s_1, turns: tl.constexpr, scaled: tl.constexpr
):  # fmt: skip
    """(Cᵀ R_L (s ⊙ g))_j."""
    inside = inside & (j < q)
    return tl.load(C + j, mask=inside, other=0.0).to(tl.float32) * _scaled(
        g, row, j, inside, c, s, p, s_1, turns, scaled
    )


@triton.jit
def _input_gradient(
    du, C, c_L, s_L, p_L, c_R, s_R, p_R, s_1, dx, T, n, m, q,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr,
    block_t: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    j = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    t = (tl.program_id(1).to(tl.int64) * block_t + tl.arange(0, block_t))[:, None]
    inside = (t < T) & (j < m)
    e = _core_transposed(du, t * n, j, inside, q, C, c_L, s_L, p_L, s_1, left, scaled)
    if right:
        s = tl.load(s_R + j, mask=j < m, other=0.0).to(tl.float32)
        p = tl.load(p_R + j, mask=j < m, other=0)
        other = _core_transposed(
            du, t * n, p, inside & (s != 0), q, C, c_L, s_L, p_L, s_1, left, scaled
        )
        e = tl.load(c_R + j, mask=j < m, other=0.0).to(tl.float32) * e - s * other
    tl.store(dx + t * m + j, e.to(dx.dtype.element_ty), mask=inside)
