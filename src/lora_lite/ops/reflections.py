"""Products of reflections, as what they differ from the identity by."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.ops.launch import kernels, ops_serve
from lora_lite.ops.one_op import once_differentiable, one_op

MOST_COLUMNS = 64


def reflections(U: Float[Tensor, "d r"]) -> tuple[Float[Tensor, "q d"], Float[Tensor, "d q"]]:
    """(A, B) with I + B A = H_0 H_1 ⋯ H_{r−1}, H_i = I − 2 u_i u_iᵀ, for u_i = U_i/‖U_i‖; q is r,
    or r + 1 where that is even.

    As I − 2 Z T⁻¹ Yᵀ, T unit upper triangular: r² d products and no chain of r steps. Columns go
    in pairs (u, v). With d = v − u, and u·v = 1 − ½ ‖d‖²,
    H_u H_v = I + 2 u dᵀ − 2 d vᵀ − 2 ‖d‖² u vᵀ: equal columns give I exactly, and what nearly
    equal ones differ from it by keeps its digits.
    """
    if has_kernel(U):
        return _reflections(U)
    u = U / U.norm(dim=0)
    if u.shape[1] % 2:
        # No reflection at all is the partner of the odd one.
        u = torch.cat([u[:, :-1], torch.zeros_like(u[:, :1]), u[:, -1:]], 1)
    u, v = u.unflatten(1, (-1, 2)).unbind(-1)
    d = v - u
    Y, Z = (torch.stack(columns, -1).flatten(1) for columns in ((-d, v), (u, d)))
    pair = torch.arange(Z.shape[1], device=Z.device) // 2
    # Its diagonal is read as 1, and nothing below is read.
    T = Y.T @ Z * (1 + (pair[:, None] < pair))
    return torch.linalg.solve_triangular(T, Y.T, upper=True, unitriangular=True), -2 * Z


def has_kernel(U: Tensor) -> bool:
    """Whether the kernels serve U."""
    return ops_serve(U) and U.dtype == torch.float32 and 0 < U.shape[1] <= MOST_COLUMNS


class _Reflections(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, U: Tensor) -> tuple[Tensor, Tensor]:
        U = U.contiguous()
        A, B, *kept = kernels("reflections").reflections(U)
        ctx.save_for_backward(U, *kept)
        return A, B

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dA: Tensor, dB: Tensor) -> Tensor:
        return kernels("reflections").backward(dA, dB, *ctx.saved_tensors)


_reflections = one_op(_Reflections)
