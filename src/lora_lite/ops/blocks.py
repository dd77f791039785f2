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
    if has_kernel(x, R.shape[-1]):
        return _BlockRows.apply(x, R.expand(x.shape[-1] // R.shape[-1], -1, -1), 1, False)
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
    return add_butterfly_rows(x, R, 0)


def add_butterfly_rows(
    x: Float[Tensor, "*batch d"], R: Float[Tensor, "n b b"], level: int
) -> Float[Tensor, "*batch d"]:
    """x + x Π blockdiag(R_1, …, R_n) Πᵀ: blocks whose halves lie 2^level halves apart in x.

    On CUDA the kernel reads and writes them where they lie.
    """
    n, apart, half = x.shape[-1] // R.shape[-1], 2**level, R.shape[-1] // 2
    if has_kernel(x, R.shape[-1]):
        return _BlockRows.apply(x, R.expand(n, -1, -1), apart, True)
    if level == 0:
        return x + block_rows(x, R)
    z = x.unflatten(-1, (-1, 2, apart, half)).transpose(-3, -2).flatten(-4)
    z = block_rows(z, R).unflatten(-1, (-1, apart, 2, half))
    return x + z.transpose(-3, -2).flatten(-4)


def drop_blocks(R: Float[Tensor, "m n b b"], p: float) -> Float[Tensor, "m n b b"]:
    """R with ⌊p n⌋ blocks, drawn at random, of one of its m rows, drawn at random, zero."""
    m, n, *_ = R.shape
    row = torch.randint(m, (1,), device=R.device)
    blocks = torch.randperm(n, device=R.device)[: int(p * n)]
    keep = R.new_ones(m, n).index_put((row, blocks), R.new_zeros(()))
    return R * keep[..., None, None]


def has_kernel(x: Tensor, b: int) -> bool:
    """Whether the kernel serves x; the compiler fuses the plain form by itself."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return kernels_serve(x) and narrow and b <= MOST_COLUMNS and x.numel() > 0


class _BlockRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, apart: int, plus: bool) -> Tensor:
        from lora_lite.ops import blocks_kernels

        rows, R = x.reshape(-1, x.shape[-1]).contiguous(), R.contiguous()
        ctx.save_for_backward(rows, R)
        ctx.how = apart, plus
        return blocks_kernels.block_rows(rows, R, apart, plus).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        from lora_lite.ops import blocks_kernels

        x, R = ctx.saved_tensors
        rows = dy.reshape(x.shape).contiguous()
        dx, dR = blocks_kernels.block_rows_backward(rows, x, R, *ctx.how)
        return dx.view(dy.shape), dR, None, None
