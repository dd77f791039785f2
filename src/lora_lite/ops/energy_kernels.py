"""Triton kernels of `energy`: one program for a layer, in float32."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_lite.ops.launch import launch, power_of_2


def oer_softmax(g: Tensor, norms: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(s − 1, p)."""
    s_1, p = torch.empty_like(g), torch.empty_like(g)
    block = power_of_2(g.numel())
    launch(_oer, (1,), (g, norms, s_1, p), g.numel(), temperature, block, warps=16)
    return s_1, p


def oer_softmax_backward(ds: Tensor, s_1: Tensor, p: Tensor, temperature: float) -> Tensor:
    dg = torch.empty_like(s_1)
    block = power_of_2(s_1.numel())
    launch(_oer_backward, (1,), (ds, s_1, p, dg), s_1.numel(), temperature, block, warps=16)
    return dg


@triton.jit
def _log_sum(a, inside):
    most = tl.max(tl.where(inside, a, float("-inf")), 0)
    return most + tl.log(tl.sum(tl.where(inside, tl.exp(a - most), 0.0), 0))


@triton.jit
def _oer(g, norms, s_1, p, n, temperature, block: tl.constexpr):
    i = tl.arange(0, block)
    norm = tl.load(norms + i, mask=i < n, other=0.0)
    move = tl.load(g + i, mask=i < n, other=0.0) / temperature
    has = (i < n) & (norm > 0)
    energy = 2 * tl.log(tl.where(has, norm, 1.0))
    total = _log_sum(energy + move, has)
    gain = total - _log_sum(energy, has)
    half = (move - gain) / 2
    # exp(a) − 1 loses its digits near 0, where its series has them all.
    series = half * (1 + half / 2 * (1 + half / 3 * (1 + half / 4 * (1 + half / 5))))
    change = tl.where(tl.abs(half) < 0.03, series, tl.exp(half) - 1)
    tl.store(s_1 + i, tl.where(has, change, 0.0), mask=i < n)
    tl.store(p + i, tl.where(has, tl.exp(energy + move - total), 0.0), mask=i < n)


@triton.jit
def _oer_backward(ds, s_1, p, dg, n, temperature, block: tl.constexpr):
    # With r = s ⊙ dL/ds, dL/dg = (r − p Σ r)/(2T).
    i = tl.arange(0, block)
    share = tl.load(p + i, mask=i < n, other=0.0)
    r = tl.load(ds + i, mask=i < n, other=0.0) * (1 + tl.load(s_1 + i, mask=i < n, other=0.0))
    r = tl.where(share > 0, r, 0.0)
    tl.store(dg + i, (r - share * tl.sum(r, 0)) / (2 * temperature), mask=i < n)
