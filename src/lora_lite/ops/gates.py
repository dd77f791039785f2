"""Elementwise maps near the identity: gates, and turned and stretched planes.

Each is given by what it differs from the identity by, in float32 or wider, cast where it is read:
near 1, bfloat16 goes in steps of 2⁻⁸. Each keeps z alone for backward.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.ops.launch import kernels_serve


def gate(z: Float[Tensor, "*batch d"], g_1: Float[Tensor, " d"]) -> Float[Tensor, "*batch d"]:
    """g ⊙ z for g = 1 + g_1."""
    return _Gate.apply(z, g_1)


def turn(
    z: Float[Tensor, "*batch d"], c_1: Float[Tensor, "n rows h"], s: Float[Tensor, "n rows h"]
) -> Float[Tensor, "*batch d"]:
    """c ⊙ z + s ⊙ ẑ for c = 1 + c_1, d = 2·n·h: coordinates k and k + h of each group of 2h are a
    plane, and ẑ is z turned by 90° in every plane, (z_k, z_{k+h}) ↦ (−z_{k+h}, z_k).

    Two rows are for the two halves of a group; one serves both.
    """
    return _Turn.apply(z, c_1, s)


def quarter_turn(z: Float[Tensor, "*batch n 2 h"]) -> Float[Tensor, "*batch n 2 h"]:
    first, second = z.unbind(-2)
    return torch.stack([-second, first], dim=-2)


def has_kernel(z: Tensor) -> bool:
    """Whether the kernels serve z; the compiler fuses the plain forms by itself."""
    served = (torch.bfloat16, torch.float16, torch.float32)
    return kernels_serve(z) and z.dtype in served and z.numel() > 0


def has_backward_kernel(z: Tensor) -> bool:
    # Where the gradient will be differentiated in turn, autograd has to see how it is made.
    return has_kernel(z) and not torch.is_grad_enabled()


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, g_1: Tensor) -> Tensor:
        ctx.save_for_backward(z, g_1)
        if has_kernel(z):
            from lora_lite.ops import gates_kernels

            return gates_kernels.gate(z, g_1)
        return z + g_1.to(z.dtype) * z

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        z, g_1 = ctx.saved_tensors
        if has_backward_kernel(z):
            from lora_lite.ops import gates_kernels

            return gates_kernels.gate_backward(dy, z, g_1)
        return dy + g_1.to(z.dtype) * dy, _over_tokens(dy * z, g_1)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, c_1: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(z, c_1, s)
        if has_kernel(z):
            from lora_lite.ops import gates_kernels

            return gates_kernels.turn(z, c_1, s)
        z = z.unflatten(-1, (-1, 2, c_1.shape[-1]))
        # What is small is added up first, so that it is rounded beside z once.
        y = z + (c_1.to(z.dtype) * z + s.to(z.dtype) * quarter_turn(z))
        return y.flatten(-3)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, c_1, s = ctx.saved_tensors
        if has_backward_kernel(z):
            from lora_lite.ops import gates_kernels

            return gates_kernels.turn_backward(dy, z, c_1, s)
        z, dy = (t.unflatten(-1, (-1, 2, c_1.shape[-1])) for t in (z, dy))
        # A quarter turn's transpose is its negative.
        dz = dy + (c_1.to(z.dtype) * dy - quarter_turn(s.to(z.dtype) * dy))
        return dz.flatten(-3), _over_tokens(dy * z, c_1), _over_tokens(dy * quarter_turn(z), s)


def _over_tokens(products: Tensor, like: Tensor) -> Tensor:
    """Their sum, in the dtype and to the shape of `like`: over all tokens, and over the rows that
    share a number."""
    shape = products.shape[products.ndim - like.ndim :]
    return products.reshape(-1, *shape).sum(0, dtype=like.dtype).sum_to_size(like.shape)
