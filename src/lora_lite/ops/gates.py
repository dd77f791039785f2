"""Elementwise maps of a layer's input or output: gates, and turned and stretched planes.

The numbers next to 1 in bfloat16 are 0.996 and 1.008, so that those of a map stay in float32 or
wider, and its result alone is rounded to z's dtype. Each map keeps z alone for backward.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.ops.launch import kernels, kernels_serve, ops_serve
from lora_lite.ops.one_op import one_op


def gate(z: Float[Tensor, "*batch d"], g: Float[Tensor, " d"]) -> Float[Tensor, "*batch d"]:
    """g ⊙ z."""
    # torch 2.11 compiles a function whose forward ends in a conversion to no other dtype, as both
    # plain forms do, with zero gradients and without a word.
    return _gated(z, g) if torch.compiler.is_compiling() else _Gate.apply(z, g)


def gate_forward(z: Float[Tensor, "*batch d"], g: Float[Tensor, " d"]) -> Float[Tensor, "*batch d"]:
    """The same within an autograd function."""
    if has_kernel(z):
        return kernels("gates").gate(z, g)
    return _gated(z, g)


def gate_backward(
    dy: Float[Tensor, "*batch d"], z: Float[Tensor, "*batch d"], g: Float[Tensor, " d"]
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, " d"]]:
    """(dz, dg), what it gives back."""
    if has_backward_kernel(z):
        return kernels("gates").gate_backward(dy, z, g)
    dy = dy.to(torch.promote_types(z.dtype, g.dtype))
    return (g * dy).to(z.dtype), _over_tokens(dy * z, g)


def turn(
    z: Float[Tensor, "*batch d"], c: Float[Tensor, "n rows h"], s: Float[Tensor, "n rows h"]
) -> Float[Tensor, "*batch d"]:
    """c ⊙ z + s ⊙ ẑ, d = 2·n·h: coordinates k and k + h of each group of 2h are a plane, and ẑ is
    z turned by 90° in every plane, (z_k, z_{k+h}) ↦ (−z_{k+h}, z_k).

    Two rows are for the two halves of a group; one serves both.
    """
    compiles_plainly = torch.compiler.is_compiling() and not ops_serve(z)
    return _turned(z, c, s) if compiles_plainly else _turn(z, c, s)


def polar(
    alpha: Float[Tensor, "n parts rows h"], theta: Float[Tensor, "n parts rows h"]
) -> tuple[Float[Tensor, "n rows h"], Float[Tensor, "n rows h"]]:
    """(α cos θ, α sin θ): of two parts the first is for the cosines, the second for the sines."""
    if kernels_serve(theta) and alpha.dtype == theta.dtype == torch.float32 and theta.numel():
        return _Polar.apply(alpha, theta)
    return _polar(alpha, theta)


def quarter_turn(z: Float[Tensor, "*batch n 2 h"]) -> Float[Tensor, "*batch n 2 h"]:
    """ẑ; its transpose is its negative."""
    first, second = z.unbind(-2)
    return torch.stack([-second, first], dim=-2)


def _gated(z: Tensor, g: Tensor) -> Tensor:
    return (g * z).to(z.dtype)


def _turned(z: Tensor, c: Tensor, s: Tensor) -> Tensor:
    u = z.unflatten(-1, (-1, 2, c.shape[-1]))
    return (c * u + s * quarter_turn(u)).flatten(-3).to(z.dtype)


def _polar(alpha: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    return alpha[:, 0] * theta[:, 0].cos(), alpha[:, -1] * theta[:, -1].sin()


def has_kernel(z: Tensor) -> bool:
    """Whether the kernels serve z; the compiler fuses the plain forms by itself."""
    served = (torch.bfloat16, torch.float16, torch.float32)
    return kernels_serve(z) and z.dtype in served and z.numel() > 0


def has_backward_kernel(z: Tensor) -> bool:
    # Where the gradient will be differentiated in turn, autograd has to see how it is made.
    return has_kernel(z) and not torch.is_grad_enabled()


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, g: Tensor) -> Tensor:
        ctx.save_for_backward(z, g)
        return gate_forward(z, g)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        return gate_backward(dy, *ctx.saved_tensors)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, c: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(z, c, s)
        if has_kernel(z):
            return kernels("gates").turn(z, c, s)
        return _turned(z, c, s)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, c, s = ctx.saved_tensors
        if has_backward_kernel(z):
            return kernels("gates").turn_backward(dy, z, c, s)
        dy = dy.to(torch.promote_types(z.dtype, c.dtype))
        u, dy = (t.unflatten(-1, (-1, 2, c.shape[-1])) for t in (z, dy))
        dz = (c * dy - quarter_turn(s * dy)).flatten(-3).to(z.dtype)
        return dz, _over_tokens(dy * u, c), _over_tokens(dy * quarter_turn(u), s)


_turn = one_op(_Turn)


class _Polar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, alpha: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(alpha, theta)
        return kernels("gates").polar(alpha, theta)

    @staticmethod
    def backward(ctx: Any, dc: Tensor, ds: Tensor) -> tuple[Tensor, Tensor]:
        if torch.is_grad_enabled():
            return torch.func.vjp(_polar, *ctx.saved_tensors)[1]((dc, ds))
        return kernels("gates").polar_backward(dc, ds, *ctx.saved_tensors)


def _over_tokens(products: Tensor, like: Tensor) -> Tensor:
    """Their sum over all tokens, and over what shares a number, in the shape of `like`."""
    shape = products.shape[products.ndim - like.ndim :]
    return products.reshape(-1, *shape).sum(0).sum_to_size(like.shape).to(like.dtype)
