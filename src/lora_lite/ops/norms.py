"""Row norms of an updated weight, without forming it."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.launch import kernels, ops_serve
from lora_lite.ops.one_op import one_op
from lora_lite.ops.skinny import MOST_ROWS

RECHECKED_ROWS = 16
CANCELLED = 1e-3


def has_kernel(W: LinearBase, A: Tensor) -> bool:
    """Whether the kernel serves W."""
    weight = W.layer.weight
    return (
        ops_serve(weight)
        and type(weight) in (Tensor, torch.nn.Parameter)
        and weight.dtype in (torch.bfloat16, torch.float16, torch.float32)
        and A.dtype == torch.float32
        and A.shape[0] <= MOST_ROWS
    )


def low_rank_row_norms(
    W: LinearBase,
    B: Float[Tensor, "d_out r"],
    A: Float[Tensor, "r d_in"],
    norms: Float[Tensor, " d_out"],
    scale: float = 1.0,
) -> Float[Tensor, " d_out"]:
    """‖(W + scale · B A)_i‖₂ of each row, a constant to autograd; `norms` are W's own.

    ‖w_i + b_i A‖² = ‖w_i‖² + 2 b_i·(A w_i) + b_i (A Aᵀ) b_iᵀ costs r rows through the frozen layer
    and no d_out × d_in temporary. Where B A cancels nearly all of a row the expansion loses its
    digits, so the 16 rows that shrank most are summed directly: a fixed number, so that no
    decision waits for the device. Rows with a zero b_i keep their norm bit for bit. On CUDA one
    pass over W sums every row directly.
    """
    if has_kernel(W, A):
        weight = W.layer.weight.T if W.transposed else W.layer.weight
        if torch.compiler.is_compiling():
            with torch.no_grad():
                return _row_norms(weight, B, A, norms, scale)
        # Of a kernel autograd sees nothing, so that it need not be told.
        return kernels("skinny").row_norms(weight, B, A, norms, scale)
    with torch.no_grad():
        return _expanded(W, B, A, norms, scale)


def _expanded(
    W: LinearBase, B: Tensor, A: Tensor, norms: Tensor, scale: float
) -> Float[Tensor, " d_out"]:
    B = scale * B
    eps = torch.finfo(norms.dtype).eps
    w_sq = norms.square()
    WAt = W.linear(A).T.to(A.dtype)
    n_sq = w_sq + 2 * (WAt * B).sum(1) + ((B @ (A @ A.T)) * B).sum(1)
    rows = (n_sq / w_sq).topk(min(RECHECKED_ROWS, len(n_sq)), largest=False).indices
    update = B[rows] @ A
    direct = (W.weight[rows].to(A.dtype) + update).square().sum(1)
    direct = torch.where(update.any(1), direct, w_sq[rows])
    # Below these floors either sum is rounding alone, and the expansion may be negative.
    n_sq = n_sq.clamp(min=eps * w_sq).index_copy(0, rows, direct.clamp(min=eps**2 * w_sq[rows]))
    return n_sq.sqrt()


class _RowNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: Tensor, B: Tensor, A: Tensor, norms: Tensor, scale: float) -> Tensor:
        return kernels("skinny").row_norms(W, B, A, norms, scale)


_row_norms = one_op(_RowNorms)
