"""Triton kernels of `gates`: one pass over z forward, one over z and its gradient backward.

Sums over tokens are made in two steps, so that they are the same in every run: each program sums
its own tokens, and the sums are summed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_lite.ops.launch import cdiv, launch

BLOCK_T, BLOCK = 16, 128
PROGRAMS = 1056


def gate(z: Tensor, g: Tensor) -> Tensor:
    rows, y, d = as_rows(z), empty(z), len(g)
    across = cdiv(d, BLOCK)
    launch(
        _gate, (across * cdiv(len(rows), BLOCK_T),),
        rows, g.contiguous(), y, len(rows), d, across,
        BLOCK_T, BLOCK,
    )  # fmt: skip
    return y


def gate_backward(dy: Tensor, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(dz, dg)."""
    rows, dz, d = as_rows(z), empty(z), len(g)
    across = cdiv(d, BLOCK)
    splits = splits_of(len(rows), across)
    parts = g.new_empty(splits, d, dtype=torch.float32)
    launch(
        _gate_backward, (across, splits),
        as_rows(dy), rows, g.contiguous(), dz, parts, len(rows), d, cdiv(len(rows), splits),
        BLOCK_T, BLOCK,
    )  # fmt: skip
    return dz, parts.sum(0).to(g.dtype)


def turn(z: Tensor, c: Tensor, s: Tensor) -> Tensor:
    rows, y, (n, two, h) = as_rows(z), empty(z), c.shape
    across = cdiv(n * h, BLOCK)
    launch(
        _turn, (across * cdiv(len(rows), BLOCK_T),),
        rows, c.contiguous(), s.contiguous(), y, len(rows), n * h, across,
        h, two == 2, BLOCK_T, BLOCK,
    )  # fmt: skip
    return y


def turn_backward(dy: Tensor, z: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dc, ds)."""
    rows, dz, (n, two, h) = as_rows(z), empty(z), c.shape
    across = cdiv(n * h, BLOCK)
    splits = splits_of(len(rows), across)
    parts = c.new_empty(splits, 2, n, two, h, dtype=torch.float32)
    launch(
        _turn_backward, (across, splits),
        as_rows(dy), rows, c.contiguous(), s.contiguous(), dz, parts,
        len(rows), n * h, cdiv(len(rows), splits),
        h, two == 2, BLOCK_T, BLOCK,
    )  # fmt: skip
    dc, ds = parts.sum(0).to(c.dtype)
    return dz, dc, ds


def as_rows(z: Tensor) -> Tensor:
    return z.reshape(-1, z.shape[-1]).contiguous()


def empty(z: Tensor) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def splits_of(T: int, across: int) -> int:
    """Into how many parts the tokens are divided."""
    return max(1, min(cdiv(T, 4 * BLOCK_T), cdiv(PROGRAMS, across)))


@triton.jit
def _gate(z, g, y, T, d, across, block_t: tl.constexpr, block: tl.constexpr):
    # Neighbouring programs take neighbouring columns.
    i = (tl.program_id(0) % across * block + tl.arange(0, block))[None, :]
    first = (tl.program_id(0) // across).to(tl.int64) * block_t
    t = (first + tl.arange(0, block_t))[:, None]
    inside = (t < T) & (i < d)
    gain = tl.load(g + i, mask=i < d, other=0.0).to(tl.float32)
    out = gain * tl.load(z + t * d + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + t * d + i, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward(
    dy, z, g, dz, parts, T, d, tokens, block_t: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    i = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    split = tl.program_id(1).to(tl.int64)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    gain = tl.load(g + i, mask=i < d, other=0.0).to(tl.float32)
    total = tl.zeros((block_t, block), tl.float32)
    for first in range(begin, end, block_t):
        t = (first + tl.arange(0, block_t)).to(tl.int64)[:, None]
        inside = (t < end) & (i < d)
        grad = tl.load(dy + t * d + i, mask=inside, other=0.0).to(tl.float32)
        total += grad * tl.load(z + t * d + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(dz + t * d + i, (gain * grad).to(dz.dtype.element_ty), mask=inside)
    tl.store(parts + split * d + i, tl.sum(total, 0)[None, :], mask=i < d)


@triton.jit
def _planes(j, m, h: tl.constexpr, two: tl.constexpr, c, s):
    """Where plane j's coordinate a stands (b is h further), where its c and s do, and these."""
    i = j // h * (2 * h) + j % h
    at_a = i if two else j
    at_b = i + h if two else j
    c_a = tl.load(c + at_a, mask=j < m, other=0.0).to(tl.float32)
    c_b = tl.load(c + at_b, mask=j < m, other=0.0).to(tl.float32)
    s_a = tl.load(s + at_a, mask=j < m, other=0.0).to(tl.float32)
    s_b = tl.load(s + at_b, mask=j < m, other=0.0).to(tl.float32)
    return i, at_a, c_a, c_b, s_a, s_b


@triton.jit
def _turn(
    z, c, s, y, T, m, across,
    h: tl.constexpr, two: tl.constexpr, block_t: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    j = (tl.program_id(0) % across * block + tl.arange(0, block))[None, :]
    first = (tl.program_id(0) // across).to(tl.int64) * block_t
    t = (first + tl.arange(0, block_t))[:, None]
    inside = (t < T) & (j < m)
    i, _, c_a, c_b, s_a, s_b = _planes(j, m, h, two, c, s)
    here = t * (2 * m) + i
    a = tl.load(z + here, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(z + here + h, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + here, (c_a * a - s_a * b).to(y.dtype.element_ty), mask=inside)
    tl.store(y + here + h, (c_b * b + s_b * a).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _turn_backward(
    dy, z, c, s, dz, parts, T, m, tokens,
    h: tl.constexpr, two: tl.constexpr, block_t: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    j = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    split = tl.program_id(1).to(tl.int64)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    i, at, c_a, c_b, s_a, s_b = _planes(j, m, h, two, c, s)
    zeros = tl.zeros((block_t, block), tl.float32)
    dc_a, dc_b, ds_a, ds_b = zeros, zeros, zeros, zeros
    for first in range(begin, end, block_t):
        t = (first + tl.arange(0, block_t)).to(tl.int64)[:, None]
        inside = (t < end) & (j < m)
        here = t * (2 * m) + i
        a = tl.load(z + here, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(z + here + h, mask=inside, other=0.0).to(tl.float32)
        da = tl.load(dy + here, mask=inside, other=0.0).to(tl.float32)
        db = tl.load(dy + here + h, mask=inside, other=0.0).to(tl.float32)
        tl.store(dz + here, (c_a * da + s_b * db).to(dz.dtype.element_ty), mask=inside)
        tl.store(dz + here + h, (c_b * db - s_a * da).to(dz.dtype.element_ty), mask=inside)
        if two:
            dc_a += da * a
            dc_b += db * b
            ds_a -= da * b
            ds_b += db * a
        else:
            dc_a += da * a + db * b
            ds_a += db * a - da * b
    size = 2 * m if two else m
    out = parts + split * 2 * size + at
    tl.store(out, tl.sum(dc_a, 0)[None, :], mask=j < m)
    tl.store(out + size, tl.sum(ds_a, 0)[None, :], mask=j < m)
    if two:
        tl.store(out + h, tl.sum(dc_b, 0)[None, :], mask=j < m)
        tl.store(out + size + h, tl.sum(ds_b, 0)[None, :], mask=j < m)
