"""Triton kernels of `selection`: a coordinate's energy in one pass over the tokens."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_lite.ops.launch import cdiv, launch
from lora_lite.ops.selection import Squares

PROGRAMS = 528
BLOCK = 128


def ema_(samples: list[tuple[Tensor, Tensor | Squares]], beta: float) -> None:
    found = [(average, x if isinstance(x, Squares) else squares(x)) for average, x in samples]
    found = [(average, sums) for average, sums in found if sums.tokens]
    if not found:
        return
    tensors, numbers, splits = [], [], []
    for average, (parts, tokens) in (found[0], found[-1]):
        tensors += [parts, average]
        numbers += [parts.shape[1], parts.stride(0), 1 / tokens]
        splits.append(parts.shape[0])
    # One program each: whether every coordinate is finite decides for all.
    launch(_mix, (len(found),), tensors, *numbers, beta, *splits, 4096, warps=16)


def squares(x: Tensor) -> Squares:
    x = x.reshape(-1, x.shape[-1])
    x = x if x.stride(-1) == 1 else x.contiguous()
    T, d = x.shape
    columns = cdiv(d, BLOCK)
    splits = max(1, min(cdiv(T, 64), cdiv(PROGRAMS, columns)))
    parts = x.new_empty(splits, d, dtype=torch.float32)
    launch(
        _squares, (columns, splits),
        (x, parts), T, d, cdiv(T, splits), x.stride(0), 16, BLOCK,
    )  # fmt: skip
    return Squares(parts, T)


@triton.jit
def _squares(x, parts, T, d, tokens, stride, block_t: tl.constexpr, block: tl.constexpr):
    i = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    split = tl.program_id(1).to(tl.int64)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    total = tl.zeros((block_t, block), tl.float32)
    for first in range(begin, end, block_t):
        t = (first + tl.arange(0, block_t)).to(tl.int64)[:, None]
        value = tl.load(x + t * stride + i, mask=(t < end) & (i < d), other=0.0).to(tl.float32)
        total += value * value
    tl.store(parts + split * d + i, tl.sum(total, 0)[None, :], mask=i < d)


@triton.jit
def _mix(
    one, average_one, two, average_two, d_one, stride_one, share_one, d_two, stride_two, share_two,
    beta, splits_one: tl.constexpr, splits_two: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) == 0:
        _mix_one(one, average_one, d_one, stride_one, share_one, beta, splits_one, block)
    else:
        _mix_one(two, average_two, d_two, stride_two, share_two, beta, splits_two, block)


@triton.jit
def _mix_one(
    parts, average, d, stride, share, beta, splits: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    largest = 0.0
    for first in range(0, d, block):
        i = first + tl.arange(0, block)
        total = tl.zeros((block,), tl.float32)
        for split in tl.static_range(splits):  # all loads under way at once
            total += tl.load(parts + split * stride + i, mask=i < d, other=0.0)
        tl.store(parts + i, total, mask=i < d)
        # Neither NaN nor infinity is below infinity.
        bad = tl.where(total < float("inf"), 0.0, 1.0)
        largest = tl.maximum(largest, tl.max(bad, 0))
    tl.debug_barrier()
    keep = tl.where(largest > 0, 1.0, beta)
    add = tl.where(largest > 0, 0.0, (1 - beta) * share)
    for first in range(0, d, block):
        i = first + tl.arange(0, block)
        energy = tl.load(parts + i, mask=i < d, other=0.0)
        energy = tl.where(energy < float("inf"), energy, 0.0)
        old = tl.load(average + i, mask=i < d, other=0.0)
        tl.store(average + i, keep * old + add * energy, mask=i < d)
