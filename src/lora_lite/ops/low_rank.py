"""The low-rank product that LoRA and its kin add to a layer."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.observer import Observer, shown
from lora_lite.ops import launch
from lora_lite.ops.cores import (
    Core,
    core_columns,
    core_columns_backward,
    core_columns_forward,
)
from lora_lite.ops.launch import kernels, ops_serve
from lora_lite.ops.one_op import once_differentiable, one_op
from lora_lite.ops.skinny import (
    down,
    down_and_outer,
    outer,
    scaled_down_and_outer,
    scaled_up,
    up,
)


def low_rank(
    x: Float[Tensor, "*batch d_in"],
    A: Float[Tensor, "r d_in"],
    B: Float[Tensor, "d_out q"],
    core: float | Core = 1.0,
) -> Float[Tensor, "*batch d_out"]:
    """B core A x in x's dtype, core a factor or a small matrix in one of its forms.

    Nothing wider than r is made besides the result.
    """
    A, B = A.to(x.dtype), B.to(x.dtype)
    if x.dtype == torch.float16:
        # A x can pass 65504 where W x does not, and a zero B would turn the infinity into NaN:
        # for rows of A of norm ≤ 1 a factor √d moved to B keeps it finite.
        c = 2.0 ** math.ceil(math.log2(max(A.shape[1], B.shape[0])) / 2)
        A, B = A / c, B * c
    h = x @ A.T
    if isinstance(core, Tensor):
        return core_columns(h, core) @ B.T
    return (h if core == 1 else h * core) @ B.T


def add_low_rank(
    W: LinearBase,
    x: Float[Tensor, "*batch d_in"],
    A: Float[Tensor, "r d_in"],
    B: Float[Tensor, "d_out q"],
    core: float | Core = 1.0,
    v: Float[Tensor, "*batch d_in"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """W(x) + B core A v, core a factor or a small matrix in one of its forms, v being x unless
    given.

    On CUDA the layer's own product accumulates onto the small one, forward and backward, so that
    the update makes no pass over the output or the input's gradient of its own; what W's observer
    is shown is summed on the way where kernels serve. Keeps x where A trains or x is observed, and
    A x.
    """
    if (v is not None and v is not x) or not (own := accumulated(W, x)):
        return W(x) + low_rank(x if v is None else v, A, B, core)
    if isinstance(core, Tensor):
        return _add_core(x, *own, A, B, core)
    return _add_low_rank(x, *own, A, B, core, taken_over(W))


def add_low_rank_change(
    W: LinearBase,
    x: Float[Tensor, "*batch d_in"],
    A: Float[Tensor, "r d_in"],
    B: Float[Tensor, "d_out r"],
    A0: Float[Tensor, "r d_in"],
    B0: Float[Tensor, "d_out r"],
    scale: float = 1.0,
    v: Float[Tensor, "*batch d_in"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """W(x) + scale · (B A − B₀A₀) v, v being x unless given.

    On CUDA as `add_low_rank`; what is kept beside x and the factors is twice r wide.
    """
    if (v is None or v is x) and A.dtype == torch.float32 and (own := accumulated(W, x)):
        return _add_low_rank_change(x, *own, A, B, A0, B0, scale)
    wide = torch.promote_types(x.dtype, torch.float32)
    factors = change(*(t.to(wide) for t in (A, B, A0, B0)))
    return W(x) + low_rank(x if v is None else v, *factors, scale)


def change(
    A: Float[Tensor, "r d_in"],
    B: Float[Tensor, "d_out r"],
    A0: Float[Tensor, "r d_in"],
    B0: Float[Tensor, "d_out r"],
) -> tuple[Float[Tensor, "2*r d_in"], Float[Tensor, "d_out 2*r"]]:
    """Factors of B A − B₀A₀ = B (A − A₀) + (B − B₀) A₀, in which no large terms cancel."""
    return torch.cat([A - A0, A0]), torch.cat([B, B - B0], dim=1)


def turn_low_rank(
    x: Float[Tensor, "*batch d"], A: Float[Tensor, "r d"], B: Float[Tensor, "d r"]
) -> Float[Tensor, "*batch d"]:
    """x + B A x: what is small in B A stays exact beside the identity.

    On CUDA the result and x's gradient are each written once, and x and A x are kept.
    """
    if accumulates_in(x):
        return _turn_low_rank(x, A, B)
    return x + low_rank(x, A, B)


def scaled_add_low_rank(
    W: LinearBase,
    x: Float[Tensor, "*batch d_in"],
    A: Float[Tensor, "r d_in"],
    B: Float[Tensor, "d_out r"],
    scale: float,
    g_1: Float[Tensor, " d_out"],
    v: Float[Tensor, "*batch d_in"] | None = None,
) -> Float[Tensor, "*batch d_out"]:
    """(1 + g_1) ⊙ (W x + scale · B A v) + b, v being x unless given.

    On CUDA one pass scales the output where it lies, and one pass over its gradient serves g_1, A,
    B and W's observer. Keeps x, A x and the output, which the layer above keeps anyway (with a
    bias, its own).
    """
    if (v is None or v is x) and (own := accumulated(W, x)):
        return _scaled_add_low_rank(x, *own, A, B, scale, g_1, taken_over(W))
    return scaled(W, W(x), low_rank(x if v is None else v, A, B, scale), g_1)


def scaled(
    W: LinearBase,
    z: Float[Tensor, "*batch d_out"],
    Δ: Float[Tensor, "*batch d_out"],
    s_1: Float[Tensor, " d_out"] | None,
    on_output: bool = True,
) -> Float[Tensor, "*batch d_out"]:
    """s ⊙ (z − b + Δ) + b, or off the output z + s ⊙ Δ, for s = 1 + s_1, or 1."""
    y = z + Δ
    if s_1 is None:
        return y
    if not on_output:
        return y + s_1.to(y.dtype) * Δ
    # Near 1 what s differs from it by keeps its digits, elsewhere s itself.
    near = s_1.abs() < 0.5
    s, part = torch.where(near, 1, 1 + s_1).to(y.dtype), torch.where(near, s_1, 0).to(y.dtype)
    # Not s_1 ⊙ (y − b): in float16 the difference can pass 65504 where y does not.
    y = s * y + part * y
    return y if W.bias is None else y - s_1.to(y.dtype) * W.bias.to(y.dtype)


def taken_over(W: LinearBase) -> Observer | None:
    """W's observer, for a function whose backward shows it what it wants."""
    observer, W.observer = W.observer, None
    return observer


def accumulated(
    W: LinearBase, x: Tensor
) -> tuple[Float[Tensor, "d_out d_in"], Float[Tensor, " d_out"] | None] | None:
    """W's matrix and bias where its product may be taken apart: those of a plain layer, where
    kernels serve, in bfloat16. None elsewhere."""
    return W.plain(x) if accumulates_in(x) else None


def accumulates_in(x: Tensor) -> bool:
    """Whether sums may be taken in another order: where kernels serve, in bfloat16.

    In float16 the plain form guards against overflow, and in float32 it leaves a fresh adapter's
    output as it is to the last bit, whatever order of sums the library takes for the other.
    """
    usual = x.dtype == torch.bfloat16 or (launch.INTERPRETED and x.dtype == torch.float32)
    return usual and ops_serve(x)


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        observer: Observer | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h = down(rows, A, scale)
        wanted = ctx.needs_input_grad[3] or observer is not None
        ctx.save_for_backward(rows if wanted else None, W, A, B, h)
        ctx.scale, ctx.observer = scale, observer
        return up(h, B, b).addmm_(rows, W.T).view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h = ctx.saved_tensors
        shape, dy = (*dy.shape[:-1], A.shape[1]), dy.reshape(-1, W.shape[0])
        seen = ctx.observer is not None
        dp, dB, g_squares = down_and_outer(dy, B, h, ctx.scale, B.dtype, energies=seen)
        dx = up(dp, A.T).addmm_(dy, W).view(shape) if ctx.needs_input_grad[0] else None
        dA, x_squares = (None, None) if x is None else outer(dp, x, A, seen)
        of_energies = shown(ctx.observer, x_squares or x, g_squares or dy)
        return dx, None, None, dA, dB, None, of_energies


class _AddLowRankChange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        A0: Tensor,
        B0: Tensor,
        scale: float,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        A_2, B_2 = kernels("skinny").change(A, B, A0, B0, x.dtype)
        h = down(rows, A_2, scale)
        # The factors are made again in backward: kept, they would be as large as A and B.
        ctx.save_for_backward(rows, W, A, B, A0, B0, h)
        ctx.scale = scale
        return up(h, B_2, b).addmm_(rows, W.T).view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, A0, B0, h = ctx.saved_tensors
        shape, dy, r = (*dy.shape[:-1], A.shape[1]), dy.reshape(-1, W.shape[0]), A.shape[0]
        A_2, B_2 = kernels("skinny").change(A, B, A0, B0, x.dtype)
        # Both parts of B_2 are B but for a constant.
        dp, dB, _ = down_and_outer(dy, B_2, h, ctx.scale, B.dtype, r)
        dx = up(dp, A_2.T).addmm_(dy, W).view(shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, outer(dp, x, A)[0], dB, None, None, None


class _AddCore(torch.autograd.Function):
    """With a core that trains between factors that do not."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, W: Tensor, b: Tensor | None, A: Tensor, B: Tensor, core: Tensor
    ) -> Tensor:
        rows, A, B = x.reshape(-1, x.shape[-1]), A.to(x.dtype), B.to(x.dtype)
        p = rows @ A.T
        ctx.save_for_backward(p, W, A, B, core)
        h = core_columns_forward(p, core)
        return up(h, B, b).addmm_(rows, W.T).view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        p, W, A, B, core = ctx.saved_tensors
        shape, dy = (*dy.shape[:-1], A.shape[1]), dy.reshape(-1, W.shape[0])
        dp, dcore = core_columns_backward(dy @ B, p, core)
        dx = up(dp, A.T).addmm_(dy, W).view(shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None, dcore


class _TurnLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h = down(rows, A)
        ctx.save_for_backward(rows, A, B, h)
        return up(h, B, rows).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, A, B, h = ctx.saved_tensors
        shape, dy = dy.shape, dy.reshape(-1, B.shape[0])
        dh, dB, _ = down_and_outer(dy, B, h, 1.0, B.dtype)
        dx = up(dh, A.T, dy).view(shape) if ctx.needs_input_grad[0] else None
        return dx, outer(dh, x, A)[0], dB


class _ScaledAddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        g_1: Tensor,
        observer: Observer | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        h = down(rows, A, scale)
        y, out = scaled_up(rows @ W.T, h, B, g_1, b)
        ctx.save_for_backward(rows, W, A, B, h, g_1, out)
        ctx.scale, ctx.biased, ctx.observer = scale, b is not None, observer
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h, g_1, out = ctx.saved_tensors
        shape, dy = (*dy.shape[:-1], A.shape[1]), dy.reshape(-1, W.shape[0])
        seen = ctx.observer is not None
        du, dp, dB, dg, g_squares = scaled_down_and_outer(
            dy, out, B, h, g_1, ctx.scale, not ctx.biased, seen
        )
        dx = up(dp, A.T).addmm_(du, W).view(shape) if ctx.needs_input_grad[0] else None
        dA, x_squares = outer(dp, x, A, seen)
        of_energies = shown(ctx.observer, x_squares or x, g_squares or dy)
        return dx, None, None, dA, dB, None, dg, of_energies


_add_low_rank = one_op(_AddLowRank)
_add_low_rank_change = one_op(_AddLowRankChange)
_add_core = one_op(_AddCore)
_turn_low_rank = one_op(_TurnLowRank)
_scaled_add_low_rank = one_op(_ScaledAddLowRank)
