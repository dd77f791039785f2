"""Linear maps that mix coordinates in disjoint pairs: Givens rotations, and any 2×2 blocks."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lora_lite.ops.launch import kernels, kernels_serve, ops_serve
from lora_lite.ops.one_op import once_differentiable, one_op

MOST_COLUMNS = 256
"""Of a factor whose rows a launch turns."""

Table = tuple[Float[Tensor, " d"], Float[Tensor, " d"], Int64[Tensor, " d"]]
"""(c, s, p) of a map T of d coordinates with (T x)_i = c_i x_i + s_i x_{p_i}."""


def random_pairs(d: int, n: int, slots: int, generator: torch.Generator) -> Int64[Tensor, "S 2"]:
    """n disjoint random pairs of 0 … d−1 in the first of `slots` rows, −1 in the others."""
    pairs = torch.full((slots, 2), -1)
    pairs[:n] = torch.randperm(d, generator=generator)[: 2 * n].view(n, 2)
    return pairs


def rotations(phi: Float[Tensor, " S"]) -> Float[Tensor, "S 2 2"]:
    """The blocks (x_i, x_j) → (cos φ x_i + sin φ x_j, −sin φ x_i + cos φ x_j)."""
    c, s = phi.cos(), phi.sin()
    return torch.stack([c, s, -s, c], dim=-1).unflatten(-1, (2, 2))


def angles(theta: Float[Tensor, " S"], cayley: bool, max_angle: float) -> Float[Tensor, " S"]:
    """φ = 2 atan(θ/2), or θ, in radians; with a bound a > 0, a tanh(φ/a)."""
    phi = 2 * torch.atan(theta / 2) if cayley else theta
    return max_angle * torch.tanh(phi / max_angle) if max_angle else phi


class Rotation(NamedTuple):
    """The rotation of d coordinates in the active ones of the first k slots' pairs, by φ as
    `angles` has it."""

    theta: Float[Tensor, " S"]
    pairs: Int64[Tensor, "S 2"]
    active: Bool[Tensor, " S"]
    k: int
    d: int
    cayley: bool
    max_angle: float


def rotation_tables(R: Rotation) -> Table:
    """The rotation as a table."""
    if ops_serve(R.theta) and R.theta.dtype == torch.float32:
        return _rotation_tables(*R)
    theta, pairs, active = (t[: R.k] for t in R[:3])
    phi = angles(theta, R.cayley, R.max_angle)
    return pair_tables(torch.where(active[:, None], pairs, -1), rotations(phi), 1.0, R.d)


def pair_tables(
    pairs: Int64[Tensor, "S 2"], blocks: Float[Tensor, "S 2 2"], rest: float, d: int
) -> Table:
    """The table of the map that is the blocks on their pairs (i, j) and `rest` times the identity
    elsewhere. The pairs are disjoint; −1 is no coordinate."""
    # What concerns no coordinate goes to an entry d that is cut off.
    i = (pairs % (d + 1)).flatten()
    ij = torch.where((pairs >= 0).all(1, keepdim=True), pairs, d)
    c = blocks.new_full((d + 1,), rest).scatter(0, i, blocks.diagonal(0, 1, 2).flatten())
    s = blocks.new_zeros(d + 1).scatter(0, ij.flatten(), blocks.flip(2).diagonal(0, 1, 2).flatten())
    p = torch.arange(d + 1, device=pairs.device).scatter(0, ij.flatten(), ij.flip(1).flatten())
    return c[:d], s[:d], p[:d]


def turned_back(A: Float[Tensor, "d r"], R: Rotation | None) -> Float[Tensor, "d r"]:
    """Rᵀ A; A itself where there is no rotation.

    On CUDA one launch, and one backward.
    """
    if R is None:
        return A
    if ops_serve(A) and A.dtype == R.theta.dtype == torch.float32 and A.shape[1] <= MOST_COLUMNS:
        return _turned_back(A, *R[:4], *R[5:])
    c, s, p = rotation_tables(R)
    return apply_pairs(A.T, c, -s, p).T


def apply_pairs(
    x: Float[Tensor, "*batch d"],
    c: Float[Tensor, " d"],
    s: Float[Tensor, " d"],
    p: Int64[Tensor, " d"],
) -> Float[Tensor, "*batch d"]:
    """T x by its tables, in x's dtype. Keeps x alone for backward.

    On CUDA one pass over x, and one backward.
    """
    return _ApplyPairs.apply(x, c, s, p)


class _RotationTables(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        theta: Tensor,
        pairs: Tensor,
        active: Tensor,
        k: int,
        d: int,
        cayley: bool,
        max_angle: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        c, s, p = kernels("givens").tables([(theta, pairs, active, k)], [d], cayley, max_angle)
        ctx.save_for_backward(theta, pairs, active)
        ctx.how = k, d, cayley, max_angle
        ctx.mark_non_differentiable(p)
        return c, s, p

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dc: Tensor, ds: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        k, d, *how = ctx.how
        side = *ctx.saved_tensors, k
        (dtheta,) = kernels("givens").tables_backward(dc, ds, [side], [d], d, *how)
        return dtheta, *[None] * 6


class _TurnedBack(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        A: Tensor,
        theta: Tensor,
        pairs: Tensor,
        active: Tensor,
        k: int,
        cayley: bool,
        max_angle: float,
    ) -> Tensor:
        A = A.contiguous()
        ctx.save_for_backward(A, theta, pairs, active)
        ctx.how = k, cayley, max_angle
        return kernels("givens").turned_back(A, theta, pairs, active, *ctx.how)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        found = kernels("givens").turned_back_backward(G.contiguous(), *ctx.saved_tensors, *ctx.how)
        return *found, *[None] * 5


def has_kernel(x: Tensor) -> bool:
    """Whether the kernels serve x; the compiler fuses the plain form by itself. Tables of a
    coordinate without a partner have s_i = 0 there."""
    return kernels_serve(x) and x.dtype != torch.float64 and x.numel() > 0


class _ApplyPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, c: Tensor, s: Tensor, p: Tensor) -> Tensor:
        if has_kernel(x):
            rows = x.reshape(-1, x.shape[-1]).contiguous()
            ctx.save_for_backward(rows, c, s, p)
            return kernels("givens").apply_pairs(rows, c, s, p).view(x.shape)
        ctx.save_for_backward(x, c, s, p)
        c, s = c.to(x.dtype), s.to(x.dtype)
        return c * x + s * x[..., p]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, c, s, p = ctx.saved_tensors
        if has_kernel(x):
            rows = g.reshape(x.shape).contiguous()
            dx, dc, ds = kernels("givens").apply_pairs_backward(rows, x, c, s, p)
            return dx.view(g.shape), dc, ds, None
        own_c, own_s = c.to(x.dtype), s.to(x.dtype)
        # p is its own inverse.
        dx = own_c * g + (own_s * g)[..., p] if ctx.needs_input_grad[0] else None
        dc = _over_tokens(g * x, c) if ctx.needs_input_grad[1] else None
        ds = _over_tokens(g * x[..., p], s) if ctx.needs_input_grad[2] else None
        return dx, dc, ds, None


def _over_tokens(products: Tensor, like: Tensor) -> Tensor:
    """Their sum over all tokens, in float32 or wider, in the dtype of `like`."""
    wide = torch.promote_types(like.dtype, torch.float32)
    return products.reshape(-1, len(like)).sum(0, dtype=wide).to(like.dtype)


_rotation_tables = one_op(_RotationTables)
_turned_back = one_op(_TurnedBack)
