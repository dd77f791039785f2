"""Triton kernels of `blocks`: one pass over x forward, one over x and its gradient backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_lite.ops.launch import cdiv, launch, power_of_2

PROGRAMS = 264


def block_rows(x: Tensor, R: Tensor, apart: int, plus: bool) -> Tensor:
    """x blockdiag(R), and x more with `plus`; a block's halves lie `apart` halves apart in x."""
    (T, d), b = x.shape, R.shape[-1]
    y = torch.empty_like(x)
    wide, width = tile(b)
    block_t = 128
    launch(
        _rows, (cdiv(d, width), cdiv(T, block_t)),
        x, R, y, T, d,
        b, apart, plus, width, wide, block_t,
    )  # fmt: skip
    return y


def block_rows_backward(
    dy: Tensor, x: Tensor, R: Tensor, apart: int, plus: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dR)."""
    (T, d), (n, b, _) = x.shape, R.shape
    dx = torch.empty_like(x)
    wide, width = tile(b)
    block_t = 64
    groups = cdiv(d, width)
    splits = max(1, min(cdiv(T, block_t), PROGRAMS // groups))
    tokens = cdiv(cdiv(T, splits), block_t) * block_t
    dR = x.new_empty(splits, n, b, b, dtype=torch.float32)
    launch(
        _rows_backward, (groups, splits),
        dy, x, R, dx, dR, T, d, n, tokens,
        b, apart, plus, width, wide, block_t,
    )  # fmt: skip
    return dx, dR.sum(0).to(R.dtype)


def tile(b: int) -> tuple[int, int]:
    """(columns of a tile, how many of them whole blocks fill)."""
    wide = max(64, power_of_2(b))
    return wide, wide // b * b


@triton.jit
def _block_tile(R, first, d, b: tl.constexpr, width: tl.constexpr, wide: tl.constexpr):
    """The square piece of blockdiag(R) whose columns begin at `first`."""
    i, j = tl.arange(0, wide)[:, None], tl.arange(0, wide)[None, :]
    inside = (i // b == j // b) & (i < width) & (first + i < d)
    at = ((first + i) // b).to(tl.int64) * b * b + (i % b) * b + j % b
    return tl.load(R + at, mask=inside, other=0.0)


@triton.jit
def _column(j, b: tl.constexpr, apart: tl.constexpr):
    """Where x has column j of the blocks, whose two halves are `apart` halves from one another."""
    at = j
    if apart > 1:
        block, second = j // b, j % b // (b // 2)
        at = ((block // apart * 2 + second) * apart + block % apart) * (b // 2) + j % (b // 2)
    return at


@triton.jit
def _rows(
    x, R, y, T, d,
    b: tl.constexpr, apart: tl.constexpr, plus: tl.constexpr,
    width: tl.constexpr, wide: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * width
    t = tl.program_id(1).to(tl.int64) * block_t + tl.arange(0, block_t)
    k = tl.arange(0, wide)
    inside = (t[:, None] < T) & (k < width) & (first + k < d)
    at = t[:, None] * d + _column(first + k, b, apart)
    x_tile = tl.load(x + at, mask=inside, other=0.0)
    total = tl.dot(x_tile, _block_tile(R, first, d, b, width, wide))
    if plus:
        total += x_tile.to(tl.float32)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _rows_backward(
    dy, x, R, dx, dR, T, d, n, tokens,
    b: tl.constexpr, apart: tl.constexpr, plus: tl.constexpr,
    width: tl.constexpr, wide: tl.constexpr, block_t: tl.constexpr,
):  # fmt: skip
    first, split = tl.program_id(0) * width, tl.program_id(1).to(tl.int64)
    k = tl.arange(0, wide)
    Rt = tl.trans(_block_tile(R, first, d, b, width, wide))
    total = tl.zeros((wide, wide), tl.float32)
    begin = split * tokens
    for start in range(begin, tl.minimum(begin + tokens, T), block_t):
        t = start + tl.arange(0, block_t)
        inside = (t[:, None] < T) & (k < width) & (first + k < d)
        at = t[:, None] * d + _column(first + k, b, apart)
        x_tile = tl.load(x + at, mask=inside, other=0.0)
        dy_tile = tl.load(dy + at, mask=inside, other=0.0)
        total = tl.dot(tl.trans(x_tile), dy_tile, total)
        out = tl.dot(dy_tile, Rt)
        if plus:
            out += dy_tile.to(tl.float32)
        tl.store(dx + at, out.to(dx.dtype.element_ty), mask=inside)
    i, j = k[:, None], k[None, :]
    inside = (i // b == j // b) & (i < width) & (first + i < d)
    at = split * n * b * b + ((first + i) // b).to(tl.int64) * b * b + (i % b) * b + j % b
    tl.store(dR + at, total, mask=inside)
