"""Triton kernels of `rotated`: passes over all tokens as if nothing turned, each with a second
launch for the few coordinates that do.

Forward reads x and the output once; backward reads x, the output and its gradient once, for all
sums over tokens, energies among them, and the input's gradient. A coordinate outside the pairs is
its own partner, p_i = i, and no pass over all gathers anything; where the core has blocks, a tile
gathers in whose columns something turns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_lite.ops.blocks import MOST_COLUMNS
from lora_lite.ops.launch import cdiv, launch, power_of_2
from lora_lite.ops.selection import Squares

Table = tuple[Tensor, Tensor, Tensor]
Pairs = tuple[Tensor, int]
"""The coordinates of the left's pairs and then of the right's, −1 for none; how many are left's."""
PROGRAMS = 528
BLOCK, ROWS = 128, 16
COLUMNS, TOKENS = 16, 64


def forward(
    z: Tensor,
    x: Tensor,
    C: Tensor,
    at: Pairs,
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
    (entries, E_L), (q, width) = at, C.shape
    # Blocks turn their input as they read it, and leave to the second launch what turns after.
    E = len(entries) if width == 1 else E_L
    args = (
        z, x, C, entries, *tables(left, C), *tables(right, C), s_1 if scaled else C,
        b if biased else C, y, T, n, m, q, E, E_L, *how(left, right), scaled,
        on_output, biased, y is not z, width,
    )  # fmt: skip
    if width == 1:
        launch(_forward, (cdiv(n, BLOCK), cdiv(T, ROWS)), *args, ROWS, BLOCK)
    else:
        whole = MOST_COLUMNS // width * width
        grid = cdiv(n, whole), cdiv(T, BLOCK)
        launch(_forward_blocks, grid, *args, whole, MOST_COLUMNS, BLOCK)
    if E:
        launch(_forward_at, (cdiv(E, COLUMNS), cdiv(T, TOKENS)), *args, TOKENS, COLUMNS)
    return y, z


def backward(
    dy: Tensor,
    out: Tensor,
    x: Tensor,
    C: Tensor,
    at: Pairs,
    left: Table | None,
    right: Table | None,
    s_1: Tensor | None,
    on_output: bool,
    divide: bool,
    to_input: bool,
    energies: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, tuple[Squares, Squares] | None]:
    """(du, R_Rᵀ Cᵀ R_L (s ⊙ dy) if `to_input`, dC, sums over tokens (6, n): for s_1, a diagonal C,
    c_L, s_L, c_R and s_R, the last four at the pairs' coordinates; with `energies` x² and dy²)."""
    (T, n), m = dy.shape, x.shape[1]
    scaled = s_1 is not None
    du = torch.empty_like(dy) if scaled and on_output else dy
    dx = dy.new_empty(T, m) if to_input else None
    (entries, E_L), E, (q, width) = at, len(at[0]), C.shape
    whole = MOST_COLUMNS // width * width if width > 1 else BLOCK
    block_t = TOKENS if width > 1 else ROWS
    columns = cdiv(max(n, m), whole)
    splits = max(1, min(cdiv(T, 64), cdiv(PROGRAMS, columns)))
    tokens = cdiv(cdiv(T, splits), block_t) * block_t
    parts = dy.new_empty(splits, 4 if energies else 2, max(n, m), dtype=torch.float32)
    sides = (C, entries, *tables(left, C), *tables(right, C), s_1 if scaled else C)
    sizes = (T, n, m, q, E, E_L)
    flags = (*how(left, right), scaled, on_output)
    args = (dy, out, x, *sides, du, dx if to_input else du, parts)
    more = (*sizes, tokens, *flags, divide, to_input, energies)
    if width == 1:
        launch(_backward, (columns, splits), *args, *more, ROWS, BLOCK)
    else:
        dC = dy.new_empty(splits, q, width, dtype=torch.float32)
        sizes_of_tile = (width, whole, MOST_COLUMNS, block_t)
        launch(_backward_blocks, (columns, splits), *args, dC, *more, *sizes_of_tile)
    sums = dy.new_zeros(6, n, dtype=torch.float32)
    torch.sum(parts[:, :2, :n], 0, out=sums[:2])
    if E:
        columns = cdiv(E, COLUMNS)
        if to_input:
            grid = columns, cdiv(T, TOKENS)
            launch(_input_gradient_at, grid, dy, dx, *sides, *sizes, *flags, width, TOKENS, COLUMNS)
        splits = max(1, min(cdiv(T, TOKENS), cdiv(PROGRAMS, columns)))
        found = dy.new_empty(splits, 6, E, dtype=torch.float32)
        launch(
            _sums_at, (columns, splits),
            dy, x, *sides, found, *sizes, cdiv(T, splits), *flags, width, TOKENS // 2, COLUMNS,
        )  # fmt: skip
        # The sum for s on the output needs no turning, and is there.
        first_row = 0 if scaled and not on_output else 1
        launch(
            _place, (columns, 6 - first_row),
            found, sums, *sides, splits, *sizes, *flags, first_row, power_of_2(splits), COLUMNS,
        )  # fmt: skip
    squares = (Squares(parts[:, 3, :m], T), Squares(parts[:, 2, :n], T)) if energies else None
    return du, dx, sums[1, :q, None] if width == 1 else dC.sum(0), sums, squares


def tables(side: Table | None, unused: Tensor) -> Table:
    return (unused, unused, unused) if side is None else side


def how(left: Table | None, right: Table | None) -> tuple[bool, bool]:
    return left is not None, right is not None


@triton.jit
def _turns(p, i, inside, side: tl.constexpr):
    """Whether a side pairs coordinate i with another."""
    if side:
        return inside & (tl.load(p + i, mask=inside, other=0) != i)
    return inside & (i < 0)


@triton.jit
def _entries(
    at, E_L, p_L, p_R, n, m, E, left: tl.constexpr, right: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """A block of the list: coordinates, whether left and right turn them, and whether the entry
    stands for its coordinate, which may be in a pair of each side, the left's entry then."""
    e = tl.program_id(0) * block + tl.arange(0, block)
    i = tl.load(at + e, mask=e < E, other=-1)
    in_L = _turns(p_L, i, (i >= 0) & (i < n), left)
    in_R = _turns(p_R, i, (i >= 0) & (i < m), right)
    return i[None, :], in_L[None, :], tl.where(e < E_L, in_L, in_R & (in_L == 0))[None, :]


@triton.jit
def _number(t, i, inside):
    return tl.load(t + i, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _mixed(x, row, i, inside, c, s, p, turns: tl.constexpr):
    """(R x)_i of the rows that `row` begins: c_i x_i + s_i x_{p_i}."""
    own = _number(x, row + i, inside)
    if turns:
        other = _number(x, row + tl.load(p + i, mask=inside, other=0), inside)
        own = _number(c, i, inside) * own + _number(s, i, inside) * other
    return own


@triton.jit
def _core(x, row, i, inside, q, C, c, s, p, turns: tl.constexpr, b: tl.constexpr):
    """z_i = (C R_R x)_i."""
    total = tl.where(inside, 0.0, 0.0)
    for j in range(b):
        k = i // b * b + j
        here = inside & (i < q) & (k < q)
        total += _number(C, i * b + j, here) * _mixed(x, row, k, here, c, s, p, turns)
    return total


@triton.jit
def _scaled(dy, row, i, inside, c, s, p, s_1, turns: tl.constexpr, scaled: tl.constexpr):
    """(R_L (s ⊙ dy))_i."""
    own = _number(dy, row + i, inside)
    if scaled:
        own *= 1 + _number(s_1, i, inside)
    if turns:
        partner = tl.load(p + i, mask=inside, other=0)
        other = _number(dy, row + partner, inside)
        if scaled:
            other *= 1 + _number(s_1, partner, inside)
        own = _number(c, i, inside) * own + _number(s, i, inside) * other
    return own


@triton.jit
def _back(
    dy, row, j, inside, q, C, c, s, p, s_1, turns: tl.constexpr, scaled: tl.constexpr,
    b: tl.constexpr,
):  # fmt: skip
    """(Cᵀ R_L (s ⊙ dy))_j."""
    total = tl.where(inside, 0.0, 0.0)
    for k in range(b):
        i = j // b * b + k
        here = inside & (i < q) & (j < q)
        h = _scaled(dy, row, i, here, c, s, p, s_1, turns, scaled)
        total += _number(C, i * b + j % b, here) * h
    return total


@triton.jit
def _finish(
    z, y, at, delta, scale, shift, inside, scaled: tl.constexpr, on_output: tl.constexpr,
    biased: tl.constexpr, apart: tl.constexpr,
):  # fmt: skip
    """Add Δ to z, scale and shift, and store at `at`; with `apart` z keeps what is not scaled."""
    u = _number(z, at, inside)
    if scaled and not on_output:
        delta = scale * delta
    u = u + delta
    if apart:
        tl.store(z + at, u.to(z.dtype.element_ty), mask=inside)
    if scaled and on_output:
        u = scale * u
    if biased:
        u = u + shift
    tl.store(y + at, u.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _forward(
    z, x, C, at, c_L, s_L, p_L, c_R, s_R, p_R, s_1, b, y, T, n, m, q, E, E_L,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    biased: tl.constexpr, apart: tl.constexpr, width: tl.constexpr,
    block_t: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    t = (tl.program_id(1).to(tl.int64) * block_t + tl.arange(0, block_t))[:, None]
    inside = (t < T) & (i < n)
    # What turns keeps its z for now: a store of all columns is a wide one.
    rests = (_turns(p_L, i, i < n, left) | _turns(p_R, i, i < q, right)) == 0
    core = _number(C, i, rests & (i < q))
    scale = 1 + _number(s_1, i, rests & (i < n)) if scaled else 1.0
    shift = _number(b, i, rests & (i < n)) if biased else 0.0
    delta = core * _number(x, t * m + i, (t < T) & (i < q))
    _finish(z, y, t * n + i, delta, scale, shift, inside, scaled, on_output, biased, apart)


@triton.jit
def _core_tile(C, first, q, b: tl.constexpr, whole: tl.constexpr, wide: tl.constexpr):
    """The square piece of Cᵀ whose columns begin at `first`, and where it has entries."""
    k, i = tl.arange(0, wide)[:, None], tl.arange(0, wide)[None, :]
    inside = (k // b == i // b) & (k < whole) & (first + i < q)
    at = (first + i) * b + k % b
    return tl.load(C + at, mask=inside & (first + k < q), other=0.0), at, inside


@triton.jit
def _with_turned(tile, x, row, i, inside, c, s, p, s_1, turns: tl.constexpr, scaled: tl.constexpr):
    """R of a tile of (s ⊙) x, in whose columns i mostly nothing turns."""
    if turns:
        moves = _turns(p, i, inside, turns)
        if tl.max(tl.max(moves.to(tl.int32), 1), 0) > 0:
            partner = tl.load(p + i, mask=moves, other=0)
            other = _number(x, row + partner, moves)
            if scaled:
                other *= 1 + _number(s_1, partner, moves)
            mixed = _number(c, i, moves) * tile + _number(s, i, moves) * other
            tile = tl.where(moves, mixed, tile)
    return tile


@triton.jit
def _forward_blocks(
    z, x, C, at, c_L, s_L, p_L, c_R, s_R, p_R, s_1, b, y, T, n, m, q, E, E_L,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    biased: tl.constexpr, apart: tl.constexpr, width: tl.constexpr,
    whole: tl.constexpr, wide: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * whole
    k = tl.arange(0, wide)[None, :]
    i = first + k
    t = (tl.program_id(1).to(tl.int64) * block_t + tl.arange(0, block_t))[:, None]
    inside = (t < T) & (k < whole) & (i < n)
    there = (t < T) & (k < whole) & (i < q)
    u = _number(x, t * m + i, there)
    u = _with_turned(u, x, t * m, i, there, c_R, s_R, p_R, s_1, right, False)
    core, _, _ = _core_tile(C, first, q, width, whole, wide)
    kind: tl.constexpr = x.dtype.element_ty
    delta = tl.dot(u.to(kind), core.to(kind))
    rests = _turns(p_L, i, i < n, left) == 0
    scale = 1 + _number(s_1, i, rests & (i < n)) if scaled else 1.0
    shift = _number(b, i, rests & (i < n)) if biased else 0.0
    delta = tl.where(rests, delta, 0.0)
    _finish(z, y, t * n + i, delta, scale, shift, inside, scaled, on_output, biased, apart)


@triton.jit
def _forward_at(
    z, x, C, at, c_L, s_L, p_L, c_R, s_R, p_R, s_1, b, y, T, n, m, q, E, E_L,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    biased: tl.constexpr, apart: tl.constexpr, width: tl.constexpr,
    block_t: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i, in_L, counts = _entries(at, E_L, p_L, p_R, n, m, E, left, right, block)
    t = (tl.program_id(1).to(tl.int64) * block_t + tl.arange(0, block_t))[:, None]
    inside = (t < T) & counts & (in_L | (i < q))
    delta = _core(x, t * m, i, inside, q, C, c_R, s_R, p_R, right, width)
    if left:
        partner = tl.load(p_L + i, mask=in_L, other=0)
        other = _core(x, t * m, partner, inside & in_L, q, C, c_R, s_R, p_R, right, width)
        c, s = tl.where(in_L, _number(c_L, i, in_L), 1.0), _number(s_L, i, in_L)
        delta = c * delta - s * other
    scale = 1 + _number(s_1, i, counts & (i < n)) if scaled else 1.0
    shift = _number(b, i, counts & (i < n)) if biased else 0.0
    _finish(z, y, t * n + i, delta, scale, shift, inside, scaled, on_output, biased, apart)


@triton.jit
def _backward(
    dy, out, x, C, at, c_L, s_L, p_L, c_R, s_R, p_R, s_1, du, dx, parts, T, n, m, q, E, E_L, tokens,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    divide: tl.constexpr, to_input: tl.constexpr, energies: tl.constexpr,
    block_t: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    split = tl.program_id(1).to(tl.int64)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    core = _number(C, i, i < q)
    scale = 1 + _number(s_1, i, i < n) if scaled else 1.0
    sum_s = tl.zeros((block_t, block), tl.float32)
    sum_C = tl.zeros((block_t, block), tl.float32)
    squares_g = tl.zeros((block_t, block), tl.float32)
    squares_x = tl.zeros((block_t, block), tl.float32)
    for first in range(begin, end, block_t):
        t = (first + tl.arange(0, block_t)).to(tl.int64)[:, None]
        g = _number(dy, t * n + i, (t < end) & (i < n))
        own = _number(x, t * m + i, (t < end) & (i < (m if energies else q)))
        h = scale * g
        sum_C += h * own
        if energies:
            squares_g += g * g
            squares_x += own * own
        if scaled:
            if on_output:
                sum_s += g * _number(out, t * n + i, (t < end) & (i < n))
                tl.store(du + t * n + i, h.to(du.dtype.element_ty), mask=(t < end) & (i < n))
            else:
                sum_s += g * core * own
        if to_input:
            e = (core * h).to(dx.dtype.element_ty)
            tl.store(dx + t * m + i, e, mask=(t < end) & (i < m))
    width = tl.maximum(n, m)
    to = parts + split * (4 if energies else 2) * width + i
    total = tl.sum(sum_s, 0)[None, :]
    if divide:
        total = tl.where(scale == 0, 0.0, total / scale)
    tl.store(to, total, mask=i < n)
    tl.store(to + width, tl.sum(sum_C, 0)[None, :], mask=i < n)
    if energies:
        tl.store(to + 2 * width, tl.sum(squares_g, 0)[None, :], mask=i < n)
        tl.store(to + 3 * width, tl.sum(squares_x, 0)[None, :], mask=i < m)


@triton.jit
def _backward_blocks(
    dy, out, x, C, at, c_L, s_L, p_L, c_R, s_R, p_R, s_1, du, dx, parts, dC,
    T, n, m, q, E, E_L, tokens,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    divide: tl.constexpr, to_input: tl.constexpr, energies: tl.constexpr,
    width: tl.constexpr, whole: tl.constexpr, wide: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * whole
    k = tl.arange(0, wide)[None, :]
    i, valid = first + k, k < whole
    split = tl.program_id(1).to(tl.int64)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    core, entry, has_entry = _core_tile(C, first, q, width, whole, wide)
    kind: tl.constexpr = x.dtype.element_ty
    core = core.to(kind)
    scale = 1 + _number(s_1, i, valid & (i < n)) if scaled else 1.0
    sum_s = tl.zeros((1, wide), tl.float32)
    squares_g = tl.zeros((1, wide), tl.float32)
    squares_x = tl.zeros((1, wide), tl.float32)
    sum_C = tl.zeros((wide, wide), tl.float32)
    for start in range(begin, end, block_t):
        t = (start + tl.arange(0, block_t)).to(tl.int64)[:, None]
        here = (t < end) & valid
        g = _number(dy, t * n + i, here & (i < n))
        own = _number(x, t * m + i, here & (i < (m if energies else q)))
        h = scale * g
        if energies:
            squares_g += tl.sum(g * g, 0)[None, :]
            squares_x += tl.sum(own * own, 0)[None, :]
        if scaled and on_output:
            sum_s += tl.sum(g * _number(out, t * n + i, here & (i < n)), 0)[None, :]
            tl.store(du + t * n + i, h.to(du.dtype.element_ty), mask=here & (i < n))
        there = here & (i < q)
        h = _with_turned(h, dy, t * n, i, there, c_L, s_L, p_L, s_1, left, scaled)
        u = _with_turned(own, x, t * m, i, there, c_R, s_R, p_R, s_1, right, False)
        h, u = tl.where(i < q, h, 0.0).to(kind), tl.where(i < q, u, 0.0).to(kind)
        sum_C = tl.dot(tl.trans(u), h, sum_C)
        if scaled and not on_output:
            sum_s += tl.sum(g * tl.dot(u, core), 0)[None, :]
        if to_input:
            e = tl.dot(h, tl.trans(core)).to(dx.dtype.element_ty)
            tl.store(dx + t * m + i, e, mask=here & (i < m))
    size = tl.maximum(n, m)
    to = parts + split * (4 if energies else 2) * size + i
    if divide:
        sum_s = tl.where(scale == 0, 0.0, sum_s / scale)
    tl.store(to, sum_s, mask=valid & (i < n))
    if energies:
        tl.store(to + 2 * size, squares_g, mask=valid & (i < n))
        tl.store(to + 3 * size, squares_x, mask=valid & (i < m))
    tl.store(dC + split * q * width + entry, sum_C, mask=has_entry)


@triton.jit
def _input_gradient_at(
    dy, dx, C, at, c_L, s_L, p_L, c_R, s_R, p_R, s_1, T, n, m, q, E, E_L,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    width: tl.constexpr, block_t: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    j, in_L, counts = _entries(at, E_L, p_L, p_R, n, m, E, left, right, block)
    t = (tl.program_id(1).to(tl.int64) * block_t + tl.arange(0, block_t))[:, None]
    inside = (t < T) & counts & (j < m)
    e = _back(dy, t * n, j, inside, q, C, c_L, s_L, p_L, s_1, left, scaled, width)
    if right:
        in_R = _turns(p_R, j, counts & (j < m), right)
        partner = tl.load(p_R + j, mask=in_R, other=0)
        there = inside & in_R
        other = _back(dy, t * n, partner, there, q, C, c_L, s_L, p_L, s_1, left, scaled, width)
        c, s = tl.where(in_R, _number(c_R, j, in_R), 1.0), _number(s_R, j, in_R)
        e = c * e - s * other
    tl.store(dx + t * m + j, e.to(dx.dtype.element_ty), mask=inside)


@triton.jit
def _sums_at(
    dy, x, C, at, c_L, s_L, p_L, c_R, s_R, p_R, s_1, found, T, n, m, q, E, E_L, tokens,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    width: tl.constexpr, block_t: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i, in_L, counts = _entries(at, E_L, p_L, p_R, n, m, E, left, right, block)
    split = tl.program_id(1).to(tl.int64)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    counts = counts & (in_L | (i < q))
    in_R = _turns(p_R, i, counts & (i < q), right)
    left_of = tl.load(p_L + i, mask=in_L, other=0) if left else i
    right_of = tl.load(p_R + i, mask=in_R, other=0) if right else i
    c = tl.where(in_L, _number(c_L, i, in_L), 1.0) if left else 1.0
    s = _number(s_L, i, in_L) if left else 0.0
    scale = 1 + _number(s_1, i, counts & (i < n)) if scaled else 1.0
    zeros = tl.zeros((block_t, block), tl.float32)
    sum_s, sum_C, sum_cl, sum_sl, sum_cr, sum_sr = zeros, zeros, zeros, zeros, zeros, zeros
    for first in range(begin, end, block_t):
        t = (first + tl.arange(0, block_t)).to(tl.int64)[:, None]
        inside = (t < end) & counts
        g = _number(dy, t * n + i, inside)
        z = _core(x, t * m, i, inside, q, C, c_R, s_R, p_R, right, width)
        z_p = zeros
        if left:
            z_p = _core(x, t * m, left_of, inside & in_L, q, C, c_R, s_R, p_R, right, width)
        sum_s += g * (c * z - s * z_p)
        sum_cl += scale * g * z
        sum_sl -= scale * g * z_p
        here = inside & (i < q)
        if width == 1:
            # h = s ⊙ dy, turned by R_L.
            h = _scaled(dy, t * n, i, here, c_L, s_L, p_L, s_1, left, scaled)
            sum_C += h * _mixed(x, t * m, i, here, c_R, s_R, p_R, right)
        if right:
            there = here & in_R
            e = _back(dy, t * n, i, there, q, C, c_L, s_L, p_L, s_1, left, scaled, width)
            sum_cr += e * _number(x, t * m + i, there)
            sum_sr += e * _number(x, t * m + right_of, there)
    e = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    to = found + split * 6 * E + e
    tl.store(to, tl.sum(sum_s, 0)[None, :], mask=e < E)
    tl.store(to + E, tl.sum(sum_C, 0)[None, :], mask=e < E)
    tl.store(to + 2 * E, tl.sum(sum_cl, 0)[None, :], mask=e < E)
    tl.store(to + 3 * E, tl.sum(sum_sl, 0)[None, :], mask=e < E)
    tl.store(to + 4 * E, tl.sum(sum_cr, 0)[None, :], mask=e < E)
    tl.store(to + 5 * E, tl.sum(sum_sr, 0)[None, :], mask=e < E)


@triton.jit
def _place(
    found, sums, C, at, c_L, s_L, p_L, c_R, s_R, p_R, s_1, splits, T, n, m, q, E, E_L,
    left: tl.constexpr, right: tl.constexpr, scaled: tl.constexpr, on_output: tl.constexpr,
    first_row: tl.constexpr, block_s: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) + first_row
    i, in_L, counts = _entries(at, E_L, p_L, p_R, n, m, E, left, right, block)
    counts = counts & (in_L | (i < q))
    e = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    split = tl.arange(0, block_s)[:, None]
    value = _number(found, (split * 6 + row) * E + e, counts & (split < splits))
    tl.store(sums + row * n + i, tl.sum(value, 0)[None, :], mask=counts)
