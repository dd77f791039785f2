"""A narrow core between sparse rotations, R_Lᵀ C R_R, added to a layer."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.observer import Observer, shown
from lora_lite.ops.blocks import MOST_COLUMNS, block_columns
from lora_lite.ops.givens import Rotation, apply_pairs, rotation_tables
from lora_lite.ops.launch import kernels
from lora_lite.ops.low_rank import accumulated, scaled, taken_over
from lora_lite.ops.one_op import once_differentiable, one_op


def rotated(
    x: Float[Tensor, "*batch d_in"],
    C: Float[Tensor, "q *b"],
    left: Rotation | None,
    right: Rotation | None,
    n: int,
) -> Float[Tensor, "*batch {n}"]:
    """R_Lᵀ C R_R x in n coordinates: row i of C holds its b entries, in the columns that begin at
    the greatest multiple of b up to i; none beyond column q. A C of one axis is diagonal."""
    # In float16 a rotation can carry finite coordinates past 65504, by √2 at most.
    half = x.dtype == torch.float16
    u = x / 2 if half else x
    u = apply_pairs(u, *rotation_tables(right)) if right else u
    q, C = len(C), C.to(x.dtype)
    if C.ndim == 1:
        z = C * u[..., :q]
    else:
        b, more = C.shape[1], -q % C.shape[1]
        blocks = F.pad(C, (0, 0, 0, more)).unflatten(0, (-1, b))
        z = block_columns(padded(u[..., :q], more), blocks)[..., :q]
    z = padded(z, n - q)
    if left:
        c, s, p = rotation_tables(left)
        z = apply_pairs(z, c, -s, p)
    return 2 * z if half else z


def padded(x: Float[Tensor, "*batch d"], more: int) -> Float[Tensor, "*batch wider"]:
    """x with so many zeros after its coordinates; itself, and no copy, for none."""
    return F.pad(x, (0, more)) if more else x


def add_rotated(
    W: LinearBase,
    x: Float[Tensor, "*batch d_in"],
    C: Float[Tensor, "q *b"],
    left: Rotation | None,
    right: Rotation | None,
    s_1: Float[Tensor, " d_out"] | None,
    on_output: bool,
) -> Float[Tensor, "*batch d_out"]:
    """s ⊙ (W x + Δ) + b, or W x + s ⊙ Δ + b, with Δ = R_Lᵀ C R_R x and s = 1 + s_1, or 1.

    On CUDA one pass adds and scales where the output lies, and backward makes one for all sums over
    tokens, the energies that W's observer is shown among them, and the input's gradient, each with
    a small launch for the coordinates that turn; x is kept, and for s on the output the output
    itself (with a bias, its own).
    """
    if (C.ndim == 1 or C.shape[1] <= MOST_COLUMNS) and (own := accumulated(W, x)):
        none: tuple[Any, ...] = (None, None, None, 0, 0, False, 0.0)
        sides, by = (*(left or none)[:4], *(right or none)[:4]), (left or right or none)[5:]
        return _add_rotated(x, *own, C, *sides, *by, s_1, on_output, taken_over(W))
    return scaled(W, W(x), rotated(x, C, left, right, W.d_out), s_1, on_output)


class _AddRotated(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor | None,
        C: Tensor,
        theta_L: Tensor | None,
        pairs_L: Tensor | None,
        active_L: Tensor | None,
        k_L: int,
        theta_R: Tensor | None,
        pairs_R: Tensor | None,
        active_R: Tensor | None,
        k_R: int,
        cayley: bool,
        max_angle: float,
        s_1: Tensor | None,
        on_output: bool,
        observer: Observer | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        left, right = (theta_L, pairs_L, active_L, k_L), (theta_R, pairs_R, active_R, k_R)
        n, m = W.shape
        turns = kernels("rotated").turns(left, right, C, n, m, cayley, max_angle)
        scales = s_1 is not None and on_output
        z = rows @ W.T if scales else None
        y, u = kernels("rotated").forward(z, rows, C, turns, s_1, b, on_output, n)
        keep = None if not scales else y if b is None else u
        if not scales:
            y.addmm_(rows, W.T)
        ctx.save_for_backward(rows, W, C, *left[:3], *right[:3], *turns[:3], s_1, keep)
        ctx.how = k_L, k_R, cayley, max_angle, on_output, keep is not None and b is None
        ctx.observer = observer
        return y.view(*x.shape[:-1], n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, C, *tensors, c, s, p, s_1, out = ctx.saved_tensors
        k_L, k_R, cayley, max_angle, on_output, divide = ctx.how
        left, right = (*tensors[:3], k_L), (*tensors[3:], k_R)
        shape, dy = (*dy.shape[:-1], x.shape[1]), dy.reshape(-1, W.shape[0]).contiguous()
        # With s on the output du = s ⊙ dy; with s on Δ alone du is dy.
        du, dx, dC, ds, of_tables, energies = kernels("rotated").backward(
            dy,
            dy if out is None else out,
            x,
            C,
            kernels("rotated").turns_of(left, right, C, c, s, p),
            s_1,
            on_output,
            divide,
            ctx.needs_input_grad[0],
            ctx.observer is not None,
        )
        of_energies = shown(ctx.observer, *energies or (x, dy))
        sizes = W.shape[0], C.shape[0]
        angles = kernels("rotated").angles_backward(
            of_tables, left, right, *sizes, cayley, max_angle
        )
        if dx is not None:
            dx = dx.addmm_(du, W).view(shape)
        of_left, of_right = ((angle, None, None, None) for angle in angles)
        return dx, None, None, dC, *of_left, *of_right, None, None, ds, None, of_energies


_add_rotated = one_op(_AddRotated)
