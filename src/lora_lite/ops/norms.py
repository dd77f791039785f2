"""Row norms of an updated weight, without forming it."""

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase

RECHECKED_ROWS = 16
CANCELLED = 1e-3


@torch.no_grad()
def low_rank_row_norms(
    W: LinearBase,
    B: Float[Tensor, "d_out r"],
    A: Float[Tensor, "r d_in"],
    w_sq: Float[Tensor, " d_out"],
) -> Float[Tensor, " d_out"]:
    """‖(W + B A)_i‖₂ of each row, a constant to autograd.

    ‖w_i + b_i A‖² = ‖w_i‖² + 2 b_i·(A w_i) + b_i (A Aᵀ) b_iᵀ costs r rows through the frozen layer
    and no d_out × d_in temporary. Where B A cancels nearly all of a row the expansion loses its
    digits, so of the 16 rows that shrank most those below a thousandth of their energy are summed
    directly: a fixed number of rows, so that no decision waits for the device.
    """
    WAt = W.linear(A).T.to(A.dtype)
    n_sq = w_sq + 2 * (WAt * B).sum(1) + ((B @ (A @ A.T)) * B).sum(1)
    left, rows = (n_sq / w_sq).topk(min(RECHECKED_ROWS, len(n_sq)), largest=False)
    direct = (W.weight[rows].to(A.dtype) + B[rows] @ A).square().sum(1)
    return n_sq.index_copy(0, rows, torch.where(left < CANCELLED, direct, n_sq[rows])).sqrt()
