"""Triton kernels of `givens`: the tables of a side's rotations, and what their gradients give back
to the angles, in one launch each; the tables applied in one pass, and one backward."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from lora_lite.ops.launch import cdiv, launch, power_of_2

Side = tuple[Tensor, Tensor, Tensor, int]
"""θ, pairs and active of a side's slots, and how many of the first of them may turn."""
BLOCK, SLOTS = 32, 64
ROWS, COLUMNS, PROGRAMS = 16, 128, 528


def tables(
    sides: Sequence[Side], sizes: Sequence[int], cayley: bool, max_angle: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(c, s, p) of one side or of two, the second's behind the first's; the sides' coordinates are
    as many as `sizes` says."""
    (theta, pairs, _, k), (*_, k_2) = sides[0], sides[-1]
    n, d = sizes[0], sum(sizes)
    c, s, p = theta.new_empty(d), theta.new_empty(d), pairs.new_empty(d)
    launch(
        _tables, (cdiv(n, BLOCK) + cdiv(d - n, BLOCK),),
        (*sides[0][:3], *sides[-1][:3], c, s, p), n, d, k, k_2, max_angle,
        cayley, max_angle > 0, BLOCK, min(SLOTS, block_slots(max(k, k_2))),
    )  # fmt: skip
    return c, s, p


def tables_backward(
    dc: Tensor,
    ds: Tensor,
    sides: Sequence[Side],
    ends: Sequence[int],
    n: int,
    cayley: bool,
    max_angle: float,
) -> list[Tensor]:
    """The gradients to the sides' θ, the second side's numbers being n behind the first's. dc and
    ds have them for a side's coordinates below its end, beyond which they are zero."""
    out = [torch.empty_like(theta) for theta, *_ in sides]
    first, last = sides[0], sides[-1]
    launch(
        _tables_backward, (len(sides),),
        (dc, ds, *first[:3], *last[:3], out[0], out[-1]),
        first[0].numel(), last[0].numel(), first[3], last[3], n, ends[0], ends[-1], max_angle,
        cayley, max_angle > 0, block_slots(max(first[0].numel(), last[0].numel())),
    )  # fmt: skip
    return out


def turned_back(
    A: Tensor, theta: Tensor, pairs: Tensor, active: Tensor, k: int, cayley: bool, max_angle: float
) -> Tensor:
    """Rᵀ A."""
    (d, r), out = A.shape, torch.empty_like(A)
    block, wide = rows_of(r)
    launch(
        _turned_back, (cdiv(d, block),),
        (A, theta, pairs, active, out), d, k, max_angle, -1.0,
        r, cayley, max_angle > 0, block, min(SLOTS, block_slots(k)), wide,
    )  # fmt: skip
    return out


def turned_back_backward(
    G: Tensor,
    A: Tensor,
    theta: Tensor,
    pairs: Tensor,
    active: Tensor,
    k: int,
    cayley: bool,
    max_angle: float,
) -> tuple[Tensor, Tensor]:
    """(dA, dθ)."""
    (d, r), S = A.shape, theta.numel()
    dA, dtheta = torch.empty_like(A), torch.empty_like(theta)
    block, wide = rows_of(r)
    launch(
        _turned_back_backward, (cdiv(d, block) + cdiv(S, block),),
        (G, A, theta, pairs, active, dA, dtheta), d, S, k, max_angle,
        r, cayley, max_angle > 0, block, min(SLOTS, block_slots(k)), wide,
    )  # fmt: skip
    return dA, dtheta


def rows_of(r: int) -> tuple[int, int]:
    """Rows of a tile of factors r wide, and its columns."""
    wide = power_of_2(r)
    return max(1, min(BLOCK, 2048 // wide)), wide


def block_slots(n: int) -> int:
    """The tile for so many slots, of which there may be none."""
    return power_of_2(max(n, 1))


def apply_pairs(x: Tensor, c: Tensor, s: Tensor, p: Tensor) -> Tensor:
    (T, d), y = x.shape, torch.empty_like(x)
    launch(_apply, (cdiv(d, COLUMNS), cdiv(T, ROWS)), (x, c, s, p, y), T, d, ROWS, COLUMNS)
    return y


def apply_pairs_backward(
    g: Tensor, x: Tensor, c: Tensor, s: Tensor, p: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dc, ds)."""
    (T, d), dx = x.shape, torch.empty_like(x)
    columns = cdiv(d, COLUMNS)
    splits = max(1, min(cdiv(T, 4 * ROWS), cdiv(PROGRAMS, columns)))
    parts = c.new_empty(splits, 2, d, dtype=torch.float32)
    launch(
        _apply_backward, (columns, splits),
        (g, x, c, s, p, dx, parts), T, d, cdiv(T, splits), ROWS // 2, COLUMNS,
    )  # fmt: skip
    dc, ds = parts.sum(0).to(c.dtype)
    return dx, dc, ds


@triton.jit
def _apply(x, c, s, p, y, T, d, block_t: tl.constexpr, block: tl.constexpr):
    i = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    t = (tl.program_id(1).to(tl.int64) * block_t + tl.arange(0, block_t))[:, None]
    inside = (t < T) & (i < d)
    partner = tl.load(p + i, mask=i < d, other=0)
    own = tl.load(x + t * d + i, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + t * d + partner, mask=inside & (partner != i), other=0.0).to(tl.float32)
    out = tl.load(c + i, mask=i < d, other=0.0).to(tl.float32) * own
    out += tl.load(s + i, mask=i < d, other=0.0).to(tl.float32) * other
    tl.store(y + t * d + i, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _apply_backward(
    g, x, c, s, p, dx, parts, T, d, tokens, block_t: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    i = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    split = tl.program_id(1).to(tl.int64)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    partner = tl.load(p + i, mask=i < d, other=0)
    own_c = tl.load(c + i, mask=i < d, other=0.0).to(tl.float32)
    # (Tᵀ g)_i = c_i g_i + s_{p_i} g_{p_i}: p is its own inverse.
    other_s = tl.load(s + partner, mask=(i < d) & (partner != i), other=0.0).to(tl.float32)
    sum_c = tl.zeros((block_t, block), tl.float32)
    sum_s = tl.zeros((block_t, block), tl.float32)
    for first in range(begin, end, block_t):
        t = (first + tl.arange(0, block_t)).to(tl.int64)[:, None]
        inside = (t < end) & (i < d)
        there = inside & (partner != i)
        grad = tl.load(g + t * d + i, mask=inside, other=0.0).to(tl.float32)
        sum_c += grad * tl.load(x + t * d + i, mask=inside, other=0.0).to(tl.float32)
        sum_s += grad * tl.load(x + t * d + partner, mask=there, other=0.0).to(tl.float32)
        out = own_c * grad
        out += other_s * tl.load(g + t * d + partner, mask=there, other=0.0).to(tl.float32)
        tl.store(dx + t * d + i, out.to(dx.dtype.element_ty), mask=inside)
    to = parts + split * 2 * d + i
    tl.store(to, tl.sum(sum_c, 0)[None, :], mask=i < d)
    tl.store(to + d, tl.sum(sum_s, 0)[None, :], mask=i < d)


@triton.jit
def _rotation(theta, most, cayley: tl.constexpr, bounded: tl.constexpr):
    """(cos φ, sin φ, dφ/dθ)."""
    t = theta / 2
    if cayley and not bounded:
        # No angle is needed: cos φ = (1 − t²)/(1 + t²), sin φ = 2t/(1 + t²).
        slope = 1 / (1 + t * t)
        return (1 - t * t) * slope, 2 * t * slope, slope
    phi, slope = theta, tl.full(theta.shape, 1.0, tl.float32)
    if cayley:
        slope = 1 / (1 + t * t)
        phi = 2 * libdevice.atan(t)
    if bounded:
        share = libdevice.tanh(phi / most)
        phi, slope = most * share, slope * (1 - share * share)
    return tl.cos(phi), tl.sin(phi), slope


@triton.jit
def _tables(
    theta, pairs, active, theta_2, pairs_2, active_2, c, s, p, n, d, S, S_2, most,
    cayley: tl.constexpr, bounded: tl.constexpr, block: tl.constexpr, slots: tl.constexpr,
):  # fmt: skip
    program, first = tl.program_id(0), tl.cdiv(n, block)
    if program < first:
        _tables_of(
            theta, pairs, active, c, s, p, program, n, S, most, cayley, bounded, block, slots
        )  # fmt: skip
    else:
        _tables_of(
            theta_2, pairs_2, active_2, c + n, s + n, p + n, program - first, d - n, S_2, most,
            cayley, bounded, block, slots,
        )  # fmt: skip


@triton.jit
def _tables_of(
    theta, pairs, active, c, s, p, program, d, S, most,
    cayley: tl.constexpr, bounded: tl.constexpr, block: tl.constexpr, slots: tl.constexpr,
):  # fmt: skip
    k = program * block + tl.arange(0, block)
    cos, sin, partner = _turn_of(
        k, theta, pairs, active, S, most, cayley, bounded, block, slots
    )  # fmt: skip
    tl.store(c + k, cos, mask=k < d)
    tl.store(s + k, sin, mask=k < d)
    tl.store(p + k, partner.to(tl.int64), mask=k < d)


@triton.jit
def _turn_of(
    k, theta, pairs, active, S, most,
    cayley: tl.constexpr, bounded: tl.constexpr, block: tl.constexpr, slots: tl.constexpr,
):  # fmt: skip
    """(c, s, p) of some coordinates, by the first S slots."""
    cos, sin = tl.zeros((block,), tl.float32), tl.zeros((block,), tl.float32)
    partner, paired = tl.zeros((block,), tl.int32), tl.zeros((block,), tl.int32)
    # Every coordinate looks at many slots at once; pairs are disjoint, so one at most is its own.
    for first in range(0, S, slots):
        slot = first + tl.arange(0, slots)
        on = (slot < S) & (tl.load(active + slot, mask=slot < S, other=0) != 0)
        angle = tl.load(theta + slot, mask=on, other=0.0)
        cos_phi, sin_phi, _ = _rotation(angle, most, cayley, bounded)
        i = tl.where(on, tl.load(pairs + 2 * slot, mask=on, other=-1).to(tl.int32), -1)
        j = tl.where(on, tl.load(pairs + 2 * slot + 1, mask=on, other=-1).to(tl.int32), -1)
        is_i, is_j = k[:, None] == i[None, :], k[:, None] == j[None, :]
        cos += tl.sum(tl.where(is_i | is_j, cos_phi[None, :], 0.0), 1)
        signed = tl.where(is_i, sin_phi[None, :], tl.where(is_j, -sin_phi[None, :], 0.0))
        sin += tl.sum(signed, 1)
        partner += tl.sum(tl.where(is_i, j[None, :], tl.where(is_j, i[None, :], 0)), 1)
        paired += tl.sum((is_i | is_j).to(tl.int32), 1)
    return tl.where(paired > 0, cos, 1.0), sin, tl.where(paired > 0, partner, k)


@triton.jit
def _turned_back(
    A, theta, pairs, active, out, d, S, most, sign,
    r: tl.constexpr, cayley: tl.constexpr, bounded: tl.constexpr,
    block: tl.constexpr, slots: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """Rᵀ A for sign −1, R A for 1."""
    k, q = tl.program_id(0) * block + tl.arange(0, block), tl.arange(0, wide)[None, :]
    cos, sin, partner = _turn_of(
        k, theta, pairs, active, S, most, cayley, bounded, block, slots
    )  # fmt: skip
    inside, moves = (k[:, None] < d) & (q < r), (partner != k)[:, None] & (q < r)
    own = tl.load(A + k[:, None] * r + q, mask=inside, other=0.0)
    other = tl.load(A + partner[:, None] * r + q, mask=inside & moves, other=0.0)
    turned = cos[:, None] * own + sign * sin[:, None] * other
    tl.store(out + k[:, None] * r + q, turned, mask=inside)


@triton.jit
def _turned_back_backward(
    G, A, theta, pairs, active, dA, dtheta, d, S, k, most,
    r: tl.constexpr, cayley: tl.constexpr, bounded: tl.constexpr,
    block: tl.constexpr, slots: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    rows = tl.cdiv(d, block)
    if tl.program_id(0) < rows:
        _turned_back(
            G, theta, pairs, active, dA, d, k, most, 1.0, r, cayley, bounded, block, slots, wide
        )  # fmt: skip
    else:
        slot = (tl.program_id(0) - rows) * block + tl.arange(0, block)
        on = (slot < k) & (tl.load(active + slot, mask=slot < k, other=0) != 0)
        angle = tl.load(theta + slot, mask=slot < S, other=0.0)
        cos, sin, slope = _rotation(angle, most, cayley, bounded)
        i = tl.load(pairs + 2 * slot, mask=on, other=0)[:, None]
        j = tl.load(pairs + 2 * slot + 1, mask=on, other=0)[:, None]
        q = tl.arange(0, wide)[None, :]
        here = on[:, None] & (q < r)
        A_i = tl.load(A + i * r + q, mask=here, other=0.0)
        A_j = tl.load(A + j * r + q, mask=here, other=0.0)
        G_i = tl.load(G + i * r + q, mask=here, other=0.0)
        G_j = tl.load(G + j * r + q, mask=here, other=0.0)
        across, along = tl.sum(G_j * A_i - G_i * A_j, 1), tl.sum(G_i * A_i + G_j * A_j, 1)
        out = tl.where(on, slope * (cos * across - sin * along), 0.0)
        tl.store(dtheta + slot, out, mask=slot < S)


@triton.jit
def _tables_backward(
    dc, ds, theta, pairs, active, theta_2, pairs_2, active_2, dtheta, dtheta_2,
    S, S_2, k, k_2, n, end, end_2, most,
    cayley: tl.constexpr, bounded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        _angles_of(dc, ds, theta, pairs, active, dtheta, S, k, end, most, cayley, bounded, block)
    else:
        _angles_of(
            dc + n, ds + n, theta_2, pairs_2, active_2, dtheta_2, S_2, k_2, end_2, most,
            cayley, bounded, block,
        )  # fmt: skip


@triton.jit
def _angles_of(
    dc, ds, theta, pairs, active, dtheta, S, k, end, most,
    cayley: tl.constexpr, bounded: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    slot = tl.arange(0, block)
    on = (slot < k) & (tl.load(active + slot, mask=slot < k, other=0) != 0)
    angle = tl.load(theta + slot, mask=slot < S, other=0.0)
    cos, sin, slope = _rotation(angle, most, cayley, bounded)
    i = tl.load(pairs + 2 * slot, mask=on, other=0)
    j = tl.load(pairs + 2 * slot + 1, mask=on, other=0)
    in_i, in_j = on & (i < end), on & (j < end)
    cosines = tl.load(dc + i, mask=in_i, other=0.0) + tl.load(dc + j, mask=in_j, other=0.0)
    sines = tl.load(ds + i, mask=in_i, other=0.0) - tl.load(ds + j, mask=in_j, other=0.0)
    out = tl.where(on, slope * (cos * sines - sin * cosines), 0.0)
    tl.store(dtheta + slot, out, mask=slot < S)
