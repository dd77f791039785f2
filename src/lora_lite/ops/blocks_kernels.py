"""Triton kernels of `blocks`: one pass over x forward, one over x and its gradient backward.

A tile holds whole groups of blocks, in which all its levels mix: the product of the levels is one
square matrix. Of a level whose groups are larger a tile holds some neighbouring blocks, as two runs
of columns, and these are a group of their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_lite.ops.blocks import MOST_COLUMNS, levels_of_a_tile
from lora_lite.ops.launch import cdiv, launch

PROGRAMS = 264


def butterflies(x: Tensor, R: Tensor, level: int, plus: bool, turned: bool) -> Tensor:
    """x (I + B_{m−1}) ⋯ (I + B_0), or less I without `plus`, `level` that of B_0, which may stand
    alone; `turned` with each block's transpose in its place."""
    (T, d), sizes = x.shape, tile(R, level)
    y = torch.empty_like(x)
    block_t = 128
    launch(
        _rows, (cdiv(d, sizes[0]), cdiv(T, block_t)),
        (x, R, y), T, d,
        *sizes, plus, turned, MOST_COLUMNS, block_t,
    )  # fmt: skip
    return y


def butterflies_backward(
    dy: Tensor, x: Tensor, R: Tensor, level: int, plus: bool, turned: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dR)."""
    (T, d), sizes = x.shape, tile(R, level)
    dx = torch.empty_like(x)
    block_t = 64
    tiles = cdiv(d, sizes[0])
    splits = min(cdiv(T, block_t), max(1, PROGRAMS // tiles))
    tokens = cdiv(cdiv(T, splits), block_t) * block_t
    dR = x.new_empty(splits, *R.shape, dtype=torch.float32)
    launch(
        _rows_backward, (tiles, splits),
        (dy, x, R, dx, dR), T, d, tokens,
        *sizes, plus, turned, MOST_COLUMNS, block_t,
    )  # fmt: skip
    return dx, (dR[0] if splits == 1 else dR.sum(0)).to(R.dtype)


def tile(R: Tensor, level: int) -> tuple[int, ...]:
    """(columns that a tile fills, b, levels, halves between those of the last level's blocks in x,
    and in the tile)."""
    m, b = R.shape[0] if R.ndim == 4 else 1, R.shape[-1]
    far = 2 ** (level + m - 1)
    near = min(far, 2 ** (levels_of_a_tile(b) - 1))
    width = MOST_COLUMNS // (near * b) * (near * b) if near == far else near * b
    return width, b, m, far, near


@triton.jit
def _columns(
    k, d, width: tl.constexpr, b: tl.constexpr, far: tl.constexpr, near: tl.constexpr
):  # fmt: skip
    """Where x has the tile's column k, and whether it has."""
    p = tl.program_id(0)
    if near == far:
        return p * width + k, (k < width) & (p * width + k < d)
    run: tl.constexpr = width // 2
    pieces: tl.constexpr = far // near
    return (p // pieces * 2 * pieces + k // run * pieces + p % pieces) * run + k % run, k < width


@triton.jit
def _places(k, b: tl.constexpr, apart: tl.constexpr):
    """The block of a column, and the place in it, of blocks whose halves lie `apart` halves from
    one another."""
    if apart == 1:
        return k // b, k % b
    half: tl.constexpr = b // 2
    group = k // (apart * b)
    return group * apart + k // half % apart, k // (apart * half) % 2 * half + k % half


@triton.jit
def _at(
    d, width: tl.constexpr, b: tl.constexpr, apart: tl.constexpr, turned: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    """Where R has the entries of the tile's square matrix, and which these are."""
    k = tl.arange(0, wide)
    block, place = _places(k, b, apart)
    first = tl.program_id(0) * (width // b)
    some = (k < width) & (first + block < d // b)
    inside = (block[:, None] == block[None, :]) & some[:, None]
    blocks = (first + block).to(tl.int64) * (b * b)
    if turned:
        return blocks[:, None] + place[None, :] * b + place[:, None], inside
    return blocks[:, None] + place[:, None] * b + place[None, :], inside


@triton.jit
def _matrix(
    R, i: tl.constexpr, d, width: tl.constexpr, b: tl.constexpr, m: tl.constexpr,
    near: tl.constexpr, turned: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """B_i within the tile."""
    at, inside = _at(d, width, b, near >> (m - 1 - i), turned, wide)
    return tl.load(R + i * d * b + at, mask=inside, other=0.0)


@triton.jit
def _product(
    R, d, dtype: tl.constexpr, width: tl.constexpr, b: tl.constexpr, m: tl.constexpr,
    near: tl.constexpr, turned: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    """(I + B_{m−1}) ⋯ (I + B_0) − I, what is small in it kept."""
    total = _matrix(R, m - 1, d, width, b, m, near, turned, wide).to(tl.float32)
    for i in tl.static_range(m - 2, -1, -1):
        B = _matrix(R, i, d, width, b, m, near, turned, wide)
        total += B.to(tl.float32) + tl.dot(total.to(dtype), B.to(dtype))
    return total.to(dtype)


@triton.jit
def _rows(
    x, R, y, T, d,
    width: tl.constexpr, b: tl.constexpr, m: tl.constexpr, far: tl.constexpr, near: tl.constexpr,
    plus: tl.constexpr, turned: tl.constexpr, wide: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    columns, some = _columns(tl.arange(0, wide), d, width, b, far, near)
    t = tl.program_id(1).to(tl.int64) * block_t + tl.arange(0, block_t)
    at, inside = t[:, None] * d + columns, (t[:, None] < T) & some
    x_tile = tl.load(x + at, mask=inside, other=0.0)
    total = tl.dot(x_tile, _product(R, d, x.dtype.element_ty, width, b, m, near, turned, wide))
    if plus:
        total += x_tile.to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rows_backward(
    dy, x, R, dx, dR, T, d, tokens,
    width: tl.constexpr, b: tl.constexpr, m: tl.constexpr, far: tl.constexpr, near: tl.constexpr,
    plus: tl.constexpr, turned: tl.constexpr, wide: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    columns, some = _columns(tl.arange(0, wide), d, width, b, far, near)
    split = tl.program_id(1).to(tl.int64)
    Mt = tl.trans(_product(R, d, x.dtype.element_ty, width, b, m, near, turned, wide))
    dM = tl.zeros((wide, wide), tl.float32)
    begin = split * tokens
    for start in range(begin, tl.minimum(begin + tokens, T), block_t):
        t = start + tl.arange(0, block_t)
        at, inside = t[:, None] * d + columns, (t[:, None] < T) & some
        x_tile = tl.load(x + at, mask=inside, other=0.0)
        dy_tile = tl.load(dy + at, mask=inside, other=0.0)
        dM = tl.dot(tl.trans(x_tile), dy_tile, dM)
        out = tl.dot(dy_tile, Mt)
        if plus:
            out += dy_tile.to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
    # dB_i = ((I + B_{m−1}) ⋯ (I + B_{i+1}))ᵀ dM ((I + B_{i−1}) ⋯ (I + B_0))ᵀ.
    for i in tl.static_range(m):
        dB = dM
        for j in tl.static_range(m - 1, i, -1):
            B = _matrix(R, j, d, width, b, m, near, turned, wide)
            dB += tl.dot(tl.trans(B).to(tl.float32), dB)
        at, inside = _at(d, width, b, near >> (m - 1 - i), turned, wide)
        tl.store(dR + (split * m + i) * d * b + at, dB, mask=inside)
        B = _matrix(R, i, d, width, b, m, near, turned, wide)
        dM += tl.dot(dM, tl.trans(B).to(tl.float32))
