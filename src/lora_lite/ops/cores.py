"""Small matrices between the two factors of a low-rank product.

A core is full (q, r), blocks along the diagonal (n, b, b), or the diagonal alone (r,).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.ops.blocks import block_columns, block_columns_backward, block_columns_forward
from lora_lite.ops.cayley import cayley
from lora_lite.ops.cayley import has_kernel as has_rotation_kernel
from lora_lite.ops.gates import gate_backward, gate_forward
from lora_lite.ops.launch import kernels
from lora_lite.ops.one_op import once_differentiable, one_op

Core = Float[Tensor, "q r"] | Float[Tensor, "n b b"] | Float[Tensor, " r"]


def core_columns(h: Float[Tensor, "*batch r"], core: Core) -> Float[Tensor, "*batch q"]:
    """core h, h in rows, in h's dtype."""
    core = core.to(h.dtype)
    if core.ndim == 1:
        return h * core
    return h @ core.T if core.ndim == 2 else block_columns(h, core)


def core_columns_forward(h: Float[Tensor, "T r"], core: Core) -> Float[Tensor, "T q"]:
    """The same within an autograd function."""
    if core.ndim == 1:
        return gate_forward(h, core)
    return h @ core.to(h.dtype).T if core.ndim == 2 else block_columns_forward(h, core)


def core_columns_backward(
    dy: Float[Tensor, "T q"], h: Float[Tensor, "T r"], core: Core
) -> tuple[Float[Tensor, "T r"], Core]:
    """(dh, dcore), what it gives back."""
    if core.ndim == 1:
        return gate_backward(dy, h, core)
    if core.ndim == 3:
        return block_columns_backward(dy, h, core)
    return dy @ core.to(dy.dtype), (dy.T @ h).to(core.dtype)


def turned_shift(
    S: Float[Tensor, " r"],
    delta: Float[Tensor, " r"],
    P_U: Float[Tensor, "n e"] | None,
    P_V: Float[Tensor, "n e"] | None,
    b: int,
    L: float,
) -> Float[Tensor, "n {b} {b}"]:
    """R_Uᵀ diag(S + δ) R_V − diag(S), block by block, without a difference of large terms.

    R = (I − X)⁻¹(I + X), X = ½ L tanh(A/L) entry by entry, A = ½ skew(P); R = I where P is None,
    which one of them may be. S gets no gradient.
    """
    if has_rotation_kernel(P_U if P_V is None else P_V, b) and delta.dtype == torch.float32:
        return _turned_shift(S, delta, P_U, P_V, b, L)
    # R − I.
    U_1, V_1 = (
        None if P is None else cayley(L * torch.tanh(P / (2 * L)) / 2, b) for P in (P_U, P_V)
    )
    D = (S.detach() + delta).view(-1, b, 1)
    core = torch.diag_embed(delta.view(-1, b))
    if V_1 is not None:
        core = core + D * V_1
    if U_1 is not None:
        M = U_1.mT * D.mT
        core = core + M if V_1 is None else core + M + M @ V_1
    return core


class _TurnedShift(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        S: Tensor,
        delta: Tensor,
        P_U: Tensor | None,
        P_V: Tensor | None,
        b: int,
        L: float,
    ) -> Tensor:
        core, X_U, X_V = kernels("cores").turned_shift(S, delta, P_U, P_V, b, L)
        ctx.save_for_backward(S, delta, P_U, P_V, X_U, X_V)
        ctx.L = L
        return core

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, G: Tensor) -> tuple[Tensor | None, ...]:
        found = kernels("cores").turned_shift_backward(G, *ctx.saved_tensors, ctx.L)
        return None, *found, None, None


_turned_shift = one_op(_TurnedShift)
