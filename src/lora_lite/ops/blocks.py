"""Block-diagonal products."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from lora_lite.ops.launch import kernels_serve

MOST_COLUMNS = 64


def block_rows(
    x: Float[Tensor, "*batch d"], R: Float[Tensor, "n b b"]
) -> Float[Tensor, "*batch d"]:
    """x blockdiag(R_1, …, R_n), x in rows, d = n·b; a single block (n = 1) serves all."""
    blocks = x.unflatten(-1, (-1, R.shape[-1]))
    return torch.einsum("...nb,nbc->...nc", blocks, R).flatten(-2)


def block_columns(
    x: Float[Tensor, "*batch d"], R: Float[Tensor, "n b b"]
) -> Float[Tensor, "*batch d"]:
    """blockdiag(R_1, …, R_n) x: the transposed product."""
    return block_rows(x, R.mT)


def block_diagonal(R: Float[Tensor, "n b b"]) -> Float[Tensor, "d d"]:
    """blockdiag(R_1, …, R_n) as a matrix, d = n·b."""
    n, b, _ = R.shape
    eye = torch.eye(n, dtype=R.dtype, device=R.device)
    return (R[:, :, None, :] * eye[:, None, :, None]).reshape(n * b, n * b)


def add_block_rows(
    x: Float[Tensor, "*batch d"], R: Float[Tensor, "n b b"]
) -> Float[Tensor, "*batch d"]:
    """x + x blockdiag(R_1, …, R_n): what is small in R stays exact beside the identity."""
    n = x.shape[-1] // R.shape[-1]
    if has_kernel(x, R.shape[-1]):
        return _AddBlockRows.apply(x, R.expand(n, -1, -1))
    return x + block_rows(x, R)


def has_kernel(x: Tensor, b: int) -> bool:
    """Whether the kernel serves x; the compiler fuses the plain form by itself."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return kernels_serve(x) and narrow and b <= MOST_COLUMNS and x.numel() > 0


class _AddBlockRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor) -> Tensor:
        from lora_lite.ops import blocks_kernels

        rows, R = x.reshape(-1, x.shape[-1]).contiguous(), R.contiguous()
        ctx.save_for_backward(rows, R)
        return blocks_kernels.add_block_rows(rows, R).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        from lora_lite.ops import blocks_kernels

        x, R = ctx.saved_tensors
        rows = dy.reshape(x.shape).contiguous()
        dx, dR = blocks_kernels.add_block_rows_backward(rows, x, R)
        return dx.view(dy.shape), dR
