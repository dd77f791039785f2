"""Triton kernels of `givens`: the tables of a side's rotations, and what their gradients give back
to the angles, in one launch each."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora_lite.ops.launch import launch

BLOCK = 256


def rotation_tables(
    phi: Tensor, pairs: Tensor, active: Tensor, d: int
) -> tuple[Tensor, Tensor, Tensor]:
    c, s = phi.new_empty(d), phi.new_empty(d)
    p = torch.empty(d, dtype=torch.int64, device=phi.device)
    launch(
        _tables, (triton.cdiv(d, BLOCK),),
        phi, pairs, active, c, s, p, d, len(phi), BLOCK,
    )  # fmt: skip
    return c, s, p


def rotation_tables_backward(
    dc: Tensor, ds: Tensor, phi: Tensor, pairs: Tensor, active: Tensor
) -> Tensor:
    dphi = torch.empty_like(phi)
    block = triton.next_power_of_2(len(phi))
    launch(_tables_backward, (1,), dc, ds, phi, pairs, active, dphi, len(phi), block)
    return dphi


@triton.jit
def _tables(phi, pairs, active, c, s, p, d, S, block: tl.constexpr):
    k = tl.program_id(0) * block + tl.arange(0, block)
    cos, sin, partner = tl.full((block,), 1.0, tl.float32), tl.zeros((block,), tl.float32), k
    for slot in range(S):
        if tl.load(active + slot):
            angle = tl.load(phi + slot)
            i, j = tl.load(pairs + 2 * slot), tl.load(pairs + 2 * slot + 1)
            first, second = k == i, k == j
            cos = tl.where(first | second, tl.cos(angle), cos)
            sin = tl.where(first, tl.sin(angle), tl.where(second, -tl.sin(angle), sin))
            partner = tl.where(first, j.to(tl.int32), tl.where(second, i.to(tl.int32), partner))
    tl.store(c + k, cos, mask=k < d)
    tl.store(s + k, sin, mask=k < d)
    tl.store(p + k, partner.to(tl.int64), mask=k < d)


@triton.jit
def _tables_backward(dc, ds, phi, pairs, active, dphi, S, block: tl.constexpr):
    slot = tl.arange(0, block)
    on = (slot < S) & (tl.load(active + slot, mask=slot < S, other=0) != 0)
    angle = tl.load(phi + slot, mask=slot < S, other=0.0)
    i = tl.load(pairs + 2 * slot, mask=on, other=0)
    j = tl.load(pairs + 2 * slot + 1, mask=on, other=0)
    cosines = tl.load(dc + i, mask=on, other=0.0) + tl.load(dc + j, mask=on, other=0.0)
    sines = tl.load(ds + i, mask=on, other=0.0) - tl.load(ds + j, mask=on, other=0.0)
    out = tl.where(on, tl.cos(angle) * sines - tl.sin(angle) * cosines, 0.0)
    tl.store(dphi + slot, out, mask=slot < S)
