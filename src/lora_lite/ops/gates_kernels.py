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
# One wave: four programs of each kernel fit a multiprocessor.
PROGRAMS = 528
STAGES = 3


def gate(z: Tensor, g: Tensor) -> Tensor:
    rows, y, d = as_rows(z), empty(z), len(g)
    across = cdiv(d, BLOCK)
    launch(
        _gate, (across * cdiv(rows.shape[0], BLOCK_T),),
        (rows, g.contiguous(), y), rows.shape[0], d, across,
        BLOCK_T, BLOCK,
    )  # fmt: skip
    return y


def gate_backward(dy: Tensor, z: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(dz, dg)."""
    rows, dz, d = as_rows(z), empty(z), len(g)
    across = cdiv(d, BLOCK)
    splits, tokens = shares(rows.shape[0], across, BLOCK_T)
    parts = g.new_empty(splits, d, dtype=torch.float32)
    launch(
        _gate_backward, (across, splits),
        (as_rows(dy), rows, g.contiguous(), dz, parts), rows.shape[0], d, tokens,
        BLOCK_T, BLOCK, STAGES,
    )  # fmt: skip
    return dz, parts.sum(0).to(g.dtype)


def turn(z: Tensor, c: Tensor, s: Tensor) -> Tensor:
    rows, y, (n, two, h) = as_rows(z), empty(z), c.shape
    across = cdiv(n * h, BLOCK)
    launch(
        _turn, (across * cdiv(rows.shape[0], BLOCK_T),),
        (rows, c.contiguous(), s.contiguous(), y), rows.shape[0], n * h, across,
        h, two == 2, BLOCK_T, BLOCK,
    )  # fmt: skip
    return y


def turn_backward(dy: Tensor, z: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, dc, ds)."""
    rows, dz, (n, two, h) = as_rows(z), empty(z), c.shape
    across = cdiv(n * h, BLOCK)
    splits, tokens = shares(rows.shape[0], across, BLOCK_T // 2)
    parts = c.new_empty(splits, 2, n, two, h, dtype=torch.float32)
    launch(
        _turn_backward, (across, splits),
        (as_rows(dy), rows, c.contiguous(), s.contiguous(), dz, parts),
        rows.shape[0], n * h, tokens,
        h, two == 2, BLOCK_T // 2, BLOCK, STAGES,
    )  # fmt: skip
    dc, ds = parts.sum(0).to(c.dtype)
    return dz, dc, ds


def polar(alpha: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    n, parts, rows, h = alpha.shape
    out = alpha.new_empty(2, n, rows, h)
    size = out.numel() // 2
    launch(
        _polar, (cdiv(size, 512),),
        (alpha.contiguous(), theta.contiguous(), out),
        size, rows * h, parts, 512,
    )  # fmt: skip
    return out[0], out[1]


def polar_backward(dc: Tensor, ds: Tensor, alpha: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """(dalpha, dtheta)."""
    _, parts, rows, h = alpha.shape
    dalpha, dtheta = empty(alpha), empty(theta)
    size = dc.numel()
    launch(
        _polar_backward, (cdiv(size, 512),),
        (*(t.contiguous() for t in (dc, ds, alpha, theta)), dalpha, dtheta),
        size, rows * h, parts, 512,
    )  # fmt: skip
    return dalpha, dtheta


def as_rows(z: Tensor) -> Tensor:
    return z.reshape(-1, z.shape[-1]).contiguous()


def empty(z: Tensor) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def shares(T: int, across: int, block_t: int) -> tuple[int, int]:
    """(into how many parts the tokens are divided, tokens of each)."""
    tokens = cdiv(cdiv(T, max(1, PROGRAMS // across)), block_t) * block_t
    return cdiv(T, tokens), tokens


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
    dy, z, g, dz, parts, T, d, tokens,
    block_t: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    i = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    split = tl.program_id(1).to(tl.int64)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    gain = tl.load(g + i, mask=i < d, other=0.0).to(tl.float32)
    total = tl.zeros((block_t, block), tl.float32)
    for first in tl.range(begin, end, block_t, num_stages=stages):
        t = (first + tl.arange(0, block_t)).to(tl.int64)[:, None]
        inside = (t < end) & (i < d)
        grad = tl.load(dy + t * d + i, mask=inside, other=0.0).to(tl.float32)
        total += grad * tl.load(z + t * d + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(dz + t * d + i, (gain * grad).to(dz.dtype.element_ty), mask=inside)
    tl.store(parts + split * d + i, tl.sum(total, 0)[None, :], mask=i < d)


@triton.jit
def _places(j, h: tl.constexpr, two: tl.constexpr):
    """Where plane j's coordinate a stands (b is h further), and where the c and s of a and b do."""
    i = j // h * (2 * h) + j % h
    return i, i if two else j, i + h if two else j


@triton.jit
def _tables(c, s, at_a, at_b, inside):
    c_a = tl.load(c + at_a, mask=inside, other=0.0).to(tl.float32)
    c_b = tl.load(c + at_b, mask=inside, other=0.0).to(tl.float32)
    s_a = tl.load(s + at_a, mask=inside, other=0.0).to(tl.float32)
    s_b = tl.load(s + at_b, mask=inside, other=0.0).to(tl.float32)
    return c_a, c_b, s_a, s_b


@triton.jit
def _turn(
    z, c, s, y, T, m, across,
    h: tl.constexpr, two: tl.constexpr, block_t: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    j = (tl.program_id(0) % across * block + tl.arange(0, block))[None, :]
    first = (tl.program_id(0) // across).to(tl.int64) * block_t
    t = (first + tl.arange(0, block_t))[:, None]
    inside = (t < T) & (j < m)
    i, at_a, at_b = _places(j, h, two)
    c_a, c_b, s_a, s_b = _tables(c, s, at_a, at_b, j < m)
    here = t * (2 * m) + i
    a = tl.load(z + here, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(z + here + h, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + here, (c_a * a - s_a * b).to(y.dtype.element_ty), mask=inside)
    tl.store(y + here + h, (c_b * b + s_b * a).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _turn_backward(
    dy, z, c, s, dz, parts, T, m, tokens,
    h: tl.constexpr, two: tl.constexpr, block_t: tl.constexpr, block: tl.constexpr,
    stages: tl.constexpr,
):  # fmt: skip
    j = (tl.program_id(0) * block + tl.arange(0, block))[None, :]
    split = tl.program_id(1).to(tl.int64)
    begin = split * tokens
    end = tl.minimum(begin + tokens, T)
    i, at_a, at_b = _places(j, h, two)
    # Read as whole tiles, so that threads hold them as they hold z's.
    rows = tl.zeros((block_t, 1), tl.int32)
    c_a, c_b, s_a, s_b = _tables(c, s, at_a + rows, at_b + rows, j + rows < m)
    zeros = tl.zeros((block_t, block), tl.float32)
    dc_a, dc_b, ds_a, ds_b = zeros, zeros, zeros, zeros
    for first in tl.range(begin, end, block_t, num_stages=stages):
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
    out = parts + split * 2 * size + at_a
    tl.store(out, tl.sum(dc_a, 0)[None, :], mask=j < m)
    tl.store(out + size, tl.sum(ds_a, 0)[None, :], mask=j < m)
    if two:
        tl.store(out + h, tl.sum(dc_b, 0)[None, :], mask=j < m)
        tl.store(out + size + h, tl.sum(ds_b, 0)[None, :], mask=j < m)


@triton.jit
def _polar_places(size, group: tl.constexpr, parts: tl.constexpr, block: tl.constexpr):
    """Places in c and s, those of the angles of c and of s, and which of them there are."""
    o = tl.program_id(0) * block + tl.arange(0, block)
    at_c = o // group * (parts * group) + o % group
    return o, at_c, at_c + (parts - 1) * group, o < size


@triton.jit
def _polar(
    alpha, theta, out, size, group: tl.constexpr, parts: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    o, at_c, at_s, inside = _polar_places(size, group, parts, block)
    c = tl.load(alpha + at_c, mask=inside) * tl.cos(tl.load(theta + at_c, mask=inside))
    s = tl.load(alpha + at_s, mask=inside) * tl.sin(tl.load(theta + at_s, mask=inside))
    tl.store(out + o, c, mask=inside)
    tl.store(out + size + o, s, mask=inside)


@triton.jit
def _polar_backward(
    dc, ds, alpha, theta, dalpha, dtheta, size,
    group: tl.constexpr, parts: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    o, at_c, at_s, inside = _polar_places(size, group, parts, block)
    dc, ds = tl.load(dc + o, mask=inside), tl.load(ds + o, mask=inside)
    angle_c, angle_s = tl.load(theta + at_c, mask=inside), tl.load(theta + at_s, mask=inside)
    dalpha_c, dalpha_s = dc * tl.cos(angle_c), ds * tl.sin(angle_s)
    dtheta_c = -dc * tl.sin(angle_c) * tl.load(alpha + at_c, mask=inside)
    dtheta_s = ds * tl.cos(angle_s) * tl.load(alpha + at_s, mask=inside)
    if parts == 1:
        dalpha_c += dalpha_s
        dtheta_c += dtheta_s
    else:
        tl.store(dalpha + at_s, dalpha_s, mask=inside)
        tl.store(dtheta + at_s, dtheta_s, mask=inside)
    tl.store(dalpha + at_c, dalpha_c, mask=inside)
    tl.store(dtheta + at_c, dtheta_c, mask=inside)
