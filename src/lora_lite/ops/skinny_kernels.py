"""Triton kernels of `skinny`. Sums run in float32 in a fixed order, so results repeat."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_lite.ops.launch import cdiv, known_again, launch, power_of_2, shared_memory_bytes
from lora_lite.ops.selection import Squares


def down(x: Tensor, A: Tensor, scale: float) -> Tensor:
    x = rows_together(x)
    (T, d), r = x.shape, A.shape[0]
    h = x.new_empty(T, r)
    block_t = 32
    launch(
        _down, (cdiv(T, block_t),),
        (x, A, h), T, d, x.stride(0), *A.stride(), scale,
        r, block_t, 256 if r <= 32 else 64, block_rows(r),
        stages=5 if r <= 32 else 3,
    )  # fmt: skip
    return h


def up(h: Tensor, B: Tensor, b: Tensor | None) -> Tensor:
    h = h.contiguous()
    (T, r), n, axes = h.shape, B.shape[0], 0 if b is None else b.ndim
    b = h if b is None else rows_together(b)
    y = h.new_empty(T, n)
    block_t, block_n = 64, 128
    launch(
        _up, (cdiv(T, block_t), cdiv(n, block_n)),
        (h, B, b, y), T, n, *B.stride(), b.stride(0),
        r, axes, block_t, block_n, block_rows(r),
    )  # fmt: skip
    return y


def outer(h: Tensor, x: Tensor, like: Tensor, energies: bool) -> tuple[Tensor, Squares | None]:
    h, x = h.contiguous(), rows_together(x)
    (T, d), r, rows = x.shape, h.shape[1], like.shape[0]
    tiles, splits = tiles_of_outer(T, d)
    out = torch.empty_like(like)
    parts = out if splits == 1 else x.new_empty(splits, rows * d, dtype=torch.float32)
    squares = x.new_empty(splits, d, dtype=torch.float32) if energies else parts
    launch(
        _outer, (tiles, splits),
        (h, x, parts, squares), T, d, cdiv(T, splits), x.stride(0), *out.stride(),
        r, rows, energies, 128 if r <= 32 else 64, OUTER_COLUMNS, block_rows(r),
        stages=4,
    )  # fmt: skip
    if splits > 1:
        sums = [(parts, out)]
        if energies:
            sums.append((squares, squares := x.new_empty(1, d, dtype=torch.float32)))
        fold(*sums)
    return out, Squares(squares, T) if energies else None


def down_and_outer(
    g: Tensor, B: Tensor, h: Tensor, scale: float, dtype: torch.dtype, q: int, energies: bool
) -> tuple[Tensor, Tensor, Squares | None]:
    _, dp, dB, squares = _both(g, None, B, h, None, scale, False, dtype, q, energies)
    return dp, dB, squares


def scaled_down_and_outer(
    dy: Tensor,
    out: Tensor,
    B: Tensor,
    h: Tensor,
    g_1: Tensor,
    scale: float,
    scaled: bool,
    energies: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Squares | None]:
    return _both(dy, out, B, h, g_1, scale, scaled, B.dtype, h.shape[1], energies)


def _both(
    g: Tensor,
    out: Tensor | None,
    B: Tensor,
    h: Tensor,
    g_1: Tensor | None,
    scale: float,
    divide: bool,
    dtype: torch.dtype,
    q: int,
    energies: bool,
) -> tuple[Any, ...]:
    g, B, h = g.contiguous(), B.contiguous(), h.contiguous()
    (T, n), r, scaled = g.shape, h.shape[1], out is not None
    tiles, splits, tokens, *tile = tiles_of_both(T, n, r, q, scaled, is_roomy(g))
    dp_parts = g.new_empty(tiles, T, r, dtype=torch.float32)
    dB_parts = g.new_empty(splits, n, q, dtype=torch.float32)
    du = torch.empty_like(g) if scaled else g
    wanted = scaled + energies  # dg and the squares, of each split
    sums_parts = g.new_empty(splits, wanted, n, dtype=torch.float32) if wanted else dp_parts
    launch(
        _down_and_outer, (tiles, splits),
        (
            g, out if scaled else g, g_1 if scaled else g, B, h, du, dp_parts, dB_parts,
            sums_parts,
        ),
        T, n, tokens, scale,
        r, q, scaled, divide, energies, *tile, block_rows(r),
        warps=8,
    )  # fmt: skip
    dp, dB = g.new_empty(T, r), g.new_empty(n, q, dtype=dtype)
    if not wanted:
        fold((dp_parts, dp), (dB_parts, dB))
        return du, dp, dB, None
    sums = g.new_empty(wanted, n, dtype=torch.float32)
    fold((dp_parts, dp), (dB_parts, dB), (sums_parts, sums))
    squares = Squares(sums[-1:], T) if energies else None
    return du, dp, dB, *([sums[0].to(g_1.dtype)] if scaled else []), squares


@known_again
def tiles_of_outer(T: int, d: int) -> tuple[int, int]:
    """How many tiles of columns there are, and into how many parts the tokens go."""
    tiles = cdiv(d, OUTER_COLUMNS)
    # Programs that go through all tokens need no sum after them, which pays where they keep every
    # multiprocessor busy, or half of them for a short time.
    whole = tiles >= PROGRAMS // 2 or (tiles >= PROGRAMS // 4 - 2 and T <= 8192)
    return tiles, 1 if whole else max(1, min(cdiv(T, 256), cdiv(PROGRAMS, tiles)))


@known_again
def tiles_of_both(T: int, n: int, r: int, q: int, scaled: bool, roomy: bool) -> tuple[int, ...]:
    """How many tiles of columns there are, into how many parts the tokens go, how many each has;
    stages, and the tokens and columns of a tile."""
    block_t, block_n = 32 if scaled else 64, (256 if r <= 32 else 128) // (1 if roomy else 2)
    tiles = cdiv(n, block_n)
    tokens = cdiv(cdiv(T, max(1, PROGRAMS // 2 // tiles)), block_t) * block_t
    stages = (4 if roomy else 2) - (roomy and scaled) - (r > max(q, 64))
    return tiles, cdiv(T, tokens), tokens, stages, block_t, block_n


def scaled_up(
    z: Tensor, h: Tensor, B: Tensor, g_1: Tensor, b: Tensor | None
) -> tuple[Tensor, Tensor]:
    h, B = h.contiguous(), B.contiguous()
    (T, n), r, biased = z.shape, h.shape[1], b is not None
    y = torch.empty_like(z) if biased else z
    block_t, block_n = 64, 128
    launch(
        _scaled_up, (cdiv(T, block_t), cdiv(n, block_n)),
        (z, h, B, g_1, b if biased else g_1, y), T, n,
        r, biased, block_t, block_n, block_rows(r),
    )  # fmt: skip
    return y, z


def row_norms(W: Tensor, B: Tensor, A: Tensor, norms: Tensor, scale: float) -> Tensor:
    """‖(W + scale · B A)_i‖, with `norms` where B's row is zero."""
    (n, d), r = W.shape, A.shape[0]
    out = torch.empty_like(norms)
    block_i, block_r = 32, block_rows(r)
    launch(
        _row_norms, (cdiv(n, block_i),),
        (W, B.contiguous(), A.contiguous(), norms, out), n, d, *W.stride(), scale,
        r, "ieee" if W.dtype == torch.float32 else "tf32", 4 if is_roomy(W) else 3,
        block_i, 4096 // block_r, block_r,
        warps=8,
    )  # fmt: skip
    return out


def change(
    A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """[A − A0; A0] and [B, B − B0], differences in float32, in one launch."""
    A, B, A0, B0 = (t.contiguous() for t in (A, B, A0, B0))
    (r, d), n = A.shape, B.shape[0]
    A_2, B_2 = A.new_empty(2 * r, d, dtype=dtype), A.new_empty(n, 2 * r, dtype=dtype)
    block = 1024
    grid = (cdiv(r * d, block) + cdiv(n * r, block),)
    launch(_change, grid, (A, B, A0, B0, A_2, B_2), r * d, n * r, r, block)
    return A_2, B_2


def fold(*sums: tuple[Tensor, Tensor]) -> None:
    """Write into the second of each pair, of which there are up to three, the sum of the first,
    float32, over its first axis; in one launch."""
    tensors, sizes, ends = [], [], [0]
    for parts, out in sums:
        size = out.numel()
        tensors += parts, out
        sizes += parts.shape[0], size
        ends.append(ends[-1] + cdiv(size, FOLDED))
    for _ in range(3 - len(sums)):
        tensors += tensors[-2:]
        sizes += sizes[-2:]
        ends.append(ends[-1])
    launch(_fold, (ends[-1],), tensors, *sizes, ends[1], ends[2], FOLDED)


OUTER_COLUMNS, FOLDED = 64, 128
# About two programs for each multiprocessor of a large GPU.
PROGRAMS = 264


def is_roomy(t: Tensor) -> bool:
    """Whether a block has shared memory for all the stages of two tiles, as on large GPUs."""
    return shared_memory_bytes(t) >= 160 * 1024


def rows_together(x: Tensor) -> Tensor:
    """x with neighbouring numbers in each row; a copy only where they are not."""
    return x if x.stride(-1) == 1 else x.contiguous()


def block_rows(r: int) -> int:
    """The least tile of at least r rows that the matrix units take."""
    return max(16, power_of_2(r))


@triton.jit
def _down(
    x, A, h, T, d, stride, A_row, A_column, scale,
    r: tl.constexpr, block_t: tl.constexpr, block_d: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * block_t + tl.arange(0, block_t)
    k, q = tl.arange(0, block_d), tl.arange(0, block_r)
    total = tl.zeros((block_t, block_r), tl.float32)
    for first in range(0, d, block_d):
        column = first + k
        x_tile = tl.load(
            x + t[:, None] * stride + column, mask=(t[:, None] < T) & (column < d), other=0.0
        )
        at = A + q[None, :] * A_row + column[:, None] * A_column
        A_tile = tl.load(at, mask=(q < r) & (column[:, None] < d), other=0.0)
        total = tl.dot(x_tile, A_tile.to(x_tile.dtype), total)
    out = (total * scale).to(h.dtype.element_ty)
    tl.store(h + t[:, None] * r + q, out, mask=(t[:, None] < T) & (q < r))


@triton.jit
def _up(
    h, B, b, y, T, n, B_row, B_column, b_row, r: tl.constexpr, axes: tl.constexpr,
    block_t: tl.constexpr, block_n: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * block_t + tl.arange(0, block_t)
    i = tl.program_id(1) * block_n + tl.arange(0, block_n)
    q = tl.arange(0, block_r)
    h_tile = tl.load(h + t[:, None] * r + q, mask=(t[:, None] < T) & (q < r), other=0.0)
    at = B + i[None, :] * B_row + q[:, None] * B_column
    B_tile = tl.load(at, mask=(i < n) & (q[:, None] < r), other=0.0)
    out = tl.dot(h_tile, B_tile.to(h_tile.dtype))
    inside = (t[:, None] < T) & (i < n)
    if axes == 1:
        out += tl.load(b + i, mask=i < n, other=0.0).to(tl.float32)
    if axes == 2:
        out += tl.load(b + t[:, None] * b_row + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + t[:, None] * n + i, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _change(A, B, A0, B0, A_2, B_2, size, size_B, r: tl.constexpr, block: tl.constexpr):
    program, first = tl.program_id(0), tl.cdiv(size, block)
    at = tl.arange(0, block)
    if program < first:
        at += program * block
        a = tl.load(A + at, mask=at < size, other=0.0)
        start = tl.load(A0 + at, mask=at < size, other=0.0)
        tl.store(A_2 + at, (a - start).to(A_2.dtype.element_ty), mask=at < size)
        tl.store(A_2 + size + at, start.to(A_2.dtype.element_ty), mask=at < size)
    else:
        at += (program - first) * block
        b = tl.load(B + at, mask=at < size_B, other=0.0)
        start = tl.load(B0 + at, mask=at < size_B, other=0.0)
        to = at // r * (2 * r) + at % r
        tl.store(B_2 + to, b.to(B_2.dtype.element_ty), mask=at < size_B)
        tl.store(B_2 + to + r, (b - start).to(B_2.dtype.element_ty), mask=at < size_B)


@triton.jit
def _fold(
    one, out_one, two, out_two, three, out_three, parts_one, size_one, parts_two, size_two,
    parts_three, size_three, end_one, end_two, block: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < end_one:
        _fold_block(one, out_one, parts_one, size_one, program, block)
    elif program < end_two:
        _fold_block(two, out_two, parts_two, size_two, program - end_one, block)
    else:
        _fold_block(three, out_three, parts_three, size_three, program - end_two, block)


@triton.jit
def _fold_block(parts, out, count, size, program, block: tl.constexpr):
    at = program * block + tl.arange(0, block)
    total = tl.zeros((16, block), tl.float32)
    for first in range(0, count, 16):
        part = (first + tl.arange(0, 16)).to(tl.int64)[:, None]
        total += tl.load(parts + part * size + at, mask=(part < count) & (at < size), other=0.0)
    tl.store(out + at, tl.sum(total, 0).to(out.dtype.element_ty), mask=at < size)


@triton.jit
def _row_norms(
    W, B, A, norms, out, n, d, W_row, W_column, scale,
    r: tl.constexpr, precision: tl.constexpr, stages: tl.constexpr,
    block_i: tl.constexpr, block_j: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * block_i + tl.arange(0, block_i)
    q, k = tl.arange(0, block_r), tl.arange(0, block_j)
    B_tile = tl.load(B + i[:, None] * r + q, mask=(i[:, None] < n) & (q < r), other=0.0)
    total = tl.zeros((block_i, block_j), tl.float32)
    # As in _down_and_outer: W is no factor of a product.
    for first in tl.range(0, d, block_j, num_stages=stages):
        j = first + k
        A_tile = tl.load(A + q[:, None] * d + j, mask=(q[:, None] < r) & (j < d), other=0.0)
        at = W + i[:, None].to(tl.int64) * W_row + j * W_column
        w = tl.load(at, mask=(i[:, None] < n) & (j < d), other=0.0).to(tl.float32)
        w = tl.dot(scale * B_tile, A_tile, w, input_precision=precision)
        total += w * w
    moved = tl.max(tl.abs(B_tile), 1) > 0
    norm = tl.where(moved, tl.sqrt(tl.sum(total, 1)), tl.load(norms + i, mask=i < n, other=0.0))
    tl.store(out + i, norm, mask=i < n)


@triton.jit
def _outer(
    h, x, part, squares, T, d, tokens, x_row, part_row, part_column,
    r: tl.constexpr, rows: tl.constexpr, energies: tl.constexpr,
    block_t: tl.constexpr, block_d: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * block_d + tl.arange(0, block_d)
    split = tl.program_id(1).to(tl.int64)
    q = tl.arange(0, block_r)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    total = tl.zeros((block_d, block_r), tl.float32)
    sums = tl.zeros((16, block_d), tl.float32)
    for first in range(begin, end, block_t):
        t = first + tl.arange(0, block_t)
        x_tile = tl.load(x + t[:, None] * x_row + i, mask=(t[:, None] < end) & (i < d), other=0.0)
        h_tile = tl.load(h + t[:, None] * r + q, mask=(t[:, None] < end) & (q < r), other=0.0)
        total = tl.dot(tl.trans(x_tile), h_tile, total)
        if energies:
            sums += _squares(x_tile, block_t, block_d)
    if energies:
        tl.store(squares + split * d + i, tl.sum(sums, 0), mask=i < d)
    at = part + split * rows * d + i[:, None] * part_column + q * part_row
    tl.store(at, total.to(part.dtype.element_ty), mask=(i[:, None] < d) & (q < rows))


@triton.jit
def _over_rows(terms, block_t: tl.constexpr, block_n: tl.constexpr):
    """Sums over rows that lie 16 apart, which are one thread's."""
    return tl.sum(tl.reshape(terms, (block_t // 16, 16, block_n)), 0)


@triton.jit
def _squares(tile, block_t: tl.constexpr, block_n: tl.constexpr):
    wide = tile.to(tl.float32)
    return _over_rows(wide * wide, block_t, block_n)


@triton.jit
def _down_and_outer(
    g, out, g_1, B, h, du, dp, dB, sums, T, n, tokens, scale,
    r: tl.constexpr, width: tl.constexpr, scaled: tl.constexpr, divide: tl.constexpr,
    energies: tl.constexpr, stages: tl.constexpr,
    block_t: tl.constexpr, block_n: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    column, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    i, q = column * block_n + tl.arange(0, block_n), tl.arange(0, block_r)
    of_B = (i[:, None] < n) & (q < r)
    factor = tl.load(B + i[:, None] * r + q, mask=of_B, other=0.0)
    if scaled:
        # The factor goes to B and to the sum over the tokens: both products then take the tile of
        # g as it came into shared memory.
        s = 1 + tl.load(g_1 + i, mask=i < n, other=0.0).to(tl.float32)
        of_rows = 1 + tl.load(g_1 + i[:, None], mask=i[:, None] < n, other=0.0).to(tl.float32)
        factor = of_rows * factor.to(tl.float32)
        dg = tl.zeros((16, block_n), tl.float32)
    factor = factor.to(g.dtype.element_ty)
    total = tl.zeros((block_n, block_r), tl.float32)
    energy = tl.zeros((16, block_n), tl.float32)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    # With its own number of stages a loop also fetches ahead what no product takes: out.
    for first in tl.range(begin, end, block_t, num_stages=stages):
        t = first + tl.arange(0, block_t)[:, None]
        at, inside, of_h = t * n + i, (t < end) & (i < n), (t < end) & (q < r)
        h_tile = tl.load(h + t * r + q, mask=(t < end) & (q < width), other=0.0)
        for part in tl.static_range(1, r // width):
            at_part = h + t * r + part * width + q
            h_tile += tl.load(at_part, mask=(t < end) & (q < width), other=0.0)
        g_tile = tl.load(g + at, mask=inside, other=0.0)
        if scaled:
            wide = g_tile.to(tl.float32)
            terms = wide * tl.load(out + at, mask=inside, other=0.0).to(tl.float32)
            dg += _over_rows(terms, block_t, block_n)
            tl.store(du + at, (s * wide).to(g_tile.dtype), mask=inside)
        share = tl.dot(g_tile, factor)
        tl.store(dp + (column * T + t) * r + q, scale * share, mask=of_h)
        total = tl.dot(tl.trans(g_tile), h_tile, total)
        if energies:
            energy += _squares(g_tile, block_t, block_n)
    wanted: tl.constexpr = scaled + energies
    sums += split * wanted * n + i
    if energies:
        tl.store(sums + scaled * n, tl.sum(energy, 0), mask=i < n)
    if scaled:
        total = of_rows * total
        dg = tl.sum(dg, 0)
        if divide:
            dg = tl.where(s == 0, 0.0, dg / s)
        tl.store(sums, dg, mask=i < n)
    to = dB + (split * n + i[:, None]) * width + q
    tl.store(to, total, mask=(i[:, None] < n) & (q < width))


@triton.jit
def _scaled_up(
    z, h, B, g_1, b, y, T, n, r: tl.constexpr, biased: tl.constexpr,
    block_t: tl.constexpr, block_n: tl.constexpr, block_r: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * block_t + tl.arange(0, block_t)
    i = tl.program_id(1) * block_n + tl.arange(0, block_n)
    q = tl.arange(0, block_r)
    at, inside = t[:, None] * n + i, (t[:, None] < T) & (i < n)
    h_tile = tl.load(h + t[:, None] * r + q, mask=(t[:, None] < T) & (q < r), other=0.0)
    B_tile = tl.load(B + i[None, :] * r + q[:, None], mask=(i < n) & (q[:, None] < r), other=0.0)
    u = tl.dot(h_tile, B_tile.to(h_tile.dtype)) + tl.load(z + at, mask=inside, other=0.0).to(
        tl.float32
    )
    out = u * (1 + tl.load(g_1 + i, mask=i < n, other=0.0).to(tl.float32))
    if biased:
        tl.store(z + at, u.to(z.dtype.element_ty), mask=inside)
        out += tl.load(b + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
