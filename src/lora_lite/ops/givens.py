"""Rotations of disjoint pairs of coordinates."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Tables = tuple[Tensor, Tensor, Tensor]


def random_pairs(d: int, n: int, slots: int, generator: torch.Generator) -> Int64[Tensor, "S 2"]:
    """n disjoint random pairs of 0 … d−1 in the first of `slots` rows, −1 in the others."""
    pairs = torch.full((slots, 2), -1)
    pairs[:n] = torch.randperm(d, generator=generator)[: 2 * n].view(n, 2)
    return pairs


def givens_tables(
    pairs: Int64[Tensor, "S 2"],
    active: Bool[Tensor, " S"],
    cos: Float[Tensor, " S"],
    sin: Float[Tensor, " S"],
    d: int,
) -> tuple[Float[Tensor, " {d}"], Float[Tensor, " {d}"], Int64[Tensor, " {d}"]]:
    """(c, s, p) with (R x)_i = c_i x_i + s_i x_{p_i}: for an active pair (i, j)
    R takes (x_i, x_j) to (cos x_i + sin x_j, −sin x_i + cos x_j); other indices stay."""
    i, j = torch.where(active[:, None], pairs, d).unbind(1)
    ij = torch.cat([i, j])
    c = cos.new_ones(d + 1).scatter(0, ij, torch.cat([cos, cos]))
    s = sin.new_zeros(d + 1).scatter(0, ij, torch.cat([sin, -sin]))
    p = torch.arange(d + 1, device=pairs.device).scatter(0, ij, torch.cat([j, i]))
    return c[:d], s[:d], p[:d]


def rotate(
    x: Float[Tensor, "*batch d"],
    c: Float[Tensor, " d"],
    s: Float[Tensor, " d"],
    p: Int64[Tensor, " d"],
) -> Float[Tensor, "*batch d"]:
    """R x by the tables of `givens_tables`; −s rotates back. Saves x alone for backward."""
    return _Rotate.apply(x, c, s, p)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, s: Tensor, p: Tensor) -> Tensor:
        ctx.save_for_backward(x, c, s, p)
        return c * x + s * x[..., p]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, c, s, p = ctx.saved_tensors
        # p is its own inverse, and s_{p_i} = −s_i.
        dx = c * g - s * g[..., p] if ctx.needs_input_grad[0] else None
        tokens = tuple(range(x.dim() - 1))
        dc = (g * x).sum(tokens, dtype=_wide(c)).to(c.dtype)
        ds = (g * x[..., p]).sum(tokens, dtype=_wide(s)).to(s.dtype)
        return dx, dc, ds, None


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)
