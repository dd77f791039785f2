"""A narrow core between sparse rotations, R_Lᵀ C R_R, added to a layer."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_lite.base import LinearBase
from lora_lite.ops.blocks import MOST_COLUMNS, block_columns
from lora_lite.ops.givens import apply_pairs
from lora_lite.ops.low_rank import accumulates, scaled
from lora_lite.ops.one_op import one_op

Table = tuple[Tensor, Tensor, Tensor]
"""A rotation's (c, s, p), as `givens` has them."""


def rotated(
    x: Float[Tensor, "*batch d_in"],
    C: Float[Tensor, "q b"],
    left: Table | None,
    right: Table | None,
    n: int,
) -> Float[Tensor, "*batch {n}"]:
    """R_Lᵀ C R_R x in n coordinates: row i of C holds its b entries, in the columns that begin at
    the greatest multiple of b up to i; none beyond column q."""
    # In float16 a rotation can carry finite coordinates past 65504, by √2 at most.
    half = x.dtype == torch.float16
    u = x / 2 if half else x
    u = apply_pairs(u, *right) if right else u
    (q, b), C = C.shape, C.to(x.dtype)
    if b == 1:
        z = C[:, 0] * u[..., :q]
    else:
        more = -q % b
        blocks = F.pad(C, (0, 0, 0, more)).unflatten(0, (-1, b))
        z = block_columns(padded(u[..., :q], more), blocks)[..., :q]
    z = padded(z, n - q)
    z = apply_pairs(z, left[0], -left[1], left[2]) if left else z
    return 2 * z if half else z


def padded(x: Float[Tensor, "*batch d"], more: int) -> Float[Tensor, "*batch wider"]:
    """x with so many zeros after its coordinates; itself, and no copy, for none."""
    return F.pad(x, (0, more)) if more else x


def add_rotated(
    W: LinearBase,
    x: Float[Tensor, "*batch d_in"],
    C: Float[Tensor, "q b"],
    left: Table | None,
    right: Table | None,
    at: tuple[Int64[Tensor, " entries"], int],
    s_1: Float[Tensor, " d_out"] | None,
    on_output: bool,
) -> Float[Tensor, "*batch d_out"]:
    """s ⊙ (W x + Δ) + b, or W x + s ⊙ Δ + b, with Δ = R_Lᵀ C R_R x and s = 1 + s_1, or 1.

    at: the coordinates of the left's pairs and then of the right's, and how many are the left's.
    On CUDA one pass adds and scales where the output lies, and backward makes one for all sums over
    tokens, the energies that W's observer is shown among them, and the input's gradient, each with
    a small launch for the coordinates that turn; x is kept, and for s on the output the output
    itself (with a bias, its own).
    """
    if C.shape[1] <= MOST_COLUMNS and accumulates(W, x):
        tables = (*(left or (None,) * 3), *(right or (None,) * 3))
        observer = None
        if not torch.compiler.is_compiling():  # which an op shows nothing
            observer, W.observer = W.observer, None
        return _add_rotated(x, W.weight, W.bias, C, *tables, *at, s_1, on_output, observer)
    return scaled(W, W(x), rotated(x, C, left, right, W.d_out), s_1, on_output)


class _AddRotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        C: Tensor,
        c_L: Tensor | None,
        s_L: Tensor | None,
        p_L: Tensor | None,
        c_R: Tensor | None,
        s_R: Tensor | None,
        p_R: Tensor | None,
        at: Tensor,
        n_left: int,
        s_1: Tensor | None,
        on_output: bool,
        observer: Callable[..., None] | None = None,
    ) -> Tensor:
        from lora_lite.ops import rotated_kernels

        tables = (c_L, s_L, p_L, c_R, s_R, p_R)
        left, right = (t if t[0] is not None else None for t in (tables[:3], tables[3:]))
        rows, at = x.reshape(-1, x.shape[-1]).contiguous(), (at, n_left)
        y, u = rotated_kernels.forward(rows @ W.T, rows, C, at, left, right, s_1, b, on_output)
        keep = None if s_1 is None or not on_output else y if b is None else u
        ctx.save_for_backward(rows, W, C, *tables, at[0], s_1, keep)
        ctx.how = n_left, on_output, keep is not None and b is None
        if observer is not None:
            ctx.observer = observer
        return y.view(*x.shape[:-1], len(W))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from lora_lite.ops import rotated_kernels

        x, W, C, *tables, at, s_1, out = ctx.saved_tensors
        n_left, on_output, divide = ctx.how
        left, right = (t if t[0] is not None else None for t in (tables[:3], tables[3:]))
        shape, dy = (*dy.shape[:-1], x.shape[1]), dy.reshape(-1, len(W)).contiguous()
        # With s on the output du = s ⊙ dy; with s on Δ alone du is dy.
        du, dx, dC, sums, energies = rotated_kernels.backward(
            dy,
            dy if out is None else out,
            x,
            C,
            (at, n_left),
            left,
            right,
            s_1,
            on_output,
            divide,
            ctx.needs_input_grad[0],
            hasattr(ctx, "observer"),
        )
        if energies is not None:
            ctx.observer(*energies)
        if dx is not None:
            dx = dx.addmm_(du, W).view(shape)
        q, m = len(C), x.shape[1]
        ds, _, dc_L, ds_L, dc_R, ds_R = sums
        wide = lambda t: t if q == m == len(W) else F.pad(t[:q], (0, m - q))
        return (
            dx,
            None,
            None,
            dC,
            *((dc_L, ds_L, None) if left else (None,) * 3),
            *((wide(dc_R), wide(ds_R), None) if right else (None,) * 3),
            None,
            None,
            None if s_1 is None else ds,
            None,
            None,
        )


_add_rotated = one_op(_AddRotated)
