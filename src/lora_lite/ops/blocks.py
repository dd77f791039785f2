"""Block-diagonal products."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.ops.launch import kernels, ops_serve
from lora_lite.ops.one_op import once_differentiable, one_op

MOST_COLUMNS = 64


def block_rows(
    x: Float[Tensor, "*batch d"], R: Float[Tensor, "n b b"]
) -> Float[Tensor, "*batch d"]:
    """x blockdiag(R_1, …, R_n), x in rows, d = n·b; a single block (n = 1) serves all."""
    if has_kernel(x, R.shape[-1]):
        return _butterflies(x, for_all(R, x), 0, False, False)
    return torch.einsum("...nb,nbc->...nc", in_blocks(x, R), R).flatten(-2)


def block_columns(
    x: Float[Tensor, "*batch d"], R: Float[Tensor, "n b b"]
) -> Float[Tensor, "*batch d"]:
    """blockdiag(R_1, …, R_n) x: the transposed product."""
    if has_kernel(x, R.shape[-1]):
        return _butterflies(x, for_all(R, x), 0, False, True)
    return block_rows(x, R.mT)


def block_columns_forward(
    x: Float[Tensor, "T d"], R: Float[Tensor, "n b b"]
) -> Float[Tensor, "T d"]:
    """The same within an autograd function, a block for each b columns, in x's dtype."""
    if has_kernel(x, R.shape[-1]):
        return kernels("blocks").butterflies(x.contiguous(), R.contiguous(), 0, False, True)
    return block_rows(x, R.mT.to(x.dtype))


def block_columns_backward(
    dy: Float[Tensor, "T d"], x: Float[Tensor, "T d"], R: Float[Tensor, "n b b"]
) -> tuple[Float[Tensor, "T d"], Float[Tensor, "n b b"]]:
    """(dx, dR), what it gives back."""
    if has_kernel(x, R.shape[-1]):
        return kernels("blocks").butterflies_backward(
            dy.contiguous(), x.contiguous(), R.contiguous(), 0, False, True
        )
    dR = torch.einsum("tnb,tnc->nbc", in_blocks(dy, R), in_blocks(x, R))
    return block_rows(dy, R.to(dy.dtype)), dR.to(R.dtype)


def add_block_rows(
    x: Float[Tensor, "*batch d"], R: Float[Tensor, "n b b"]
) -> Float[Tensor, "*batch d"]:
    """x + x blockdiag(R_1, …, R_n): what is small in R stays exact beside the identity."""
    if has_kernel(x, R.shape[-1]):
        return _butterflies(x, for_all(R, x), 0, True, False)
    return x + block_rows(x, R.to(x.dtype))


def add_butterflies(
    x: Float[Tensor, "*batch d"], R: Float[Tensor, "m n b b"]
) -> Float[Tensor, "*batch d"]:
    """x (I + B_{m−1}) ⋯ (I + B_0), B_i = Π_i blockdiag(R_i) Π_iᵀ: the halves of a block of B_i lie
    2^i halves apart in x.

    On CUDA one pass over x serves all levels whose 2^i b columns fit a tile, and one each other.
    """
    m, b = len(R), R.shape[-1]
    if has_kernel(x, b):
        near = levels_of_a_tile(b)
        low, *far = R.split([near] + [1] * (m - near)) if m > near else [R]
        for i in reversed(range(near, m)):
            x = _butterflies(x, far[i - near], i, True, False)
        return _butterflies(x, low, 0, True, False)
    for i in reversed(range(m)):
        z = x.unflatten(-1, (-1, 2, 2**i, b // 2)).transpose(-3, -2).flatten(-4) if i else x
        z = block_rows(z, R[i].to(x.dtype))
        x = x + (z.unflatten(-1, (-1, 2**i, 2, b // 2)).transpose(-3, -2).flatten(-4) if i else z)
    return x


def in_blocks(
    x: Float[Tensor, "*batch d"], R: Float[Tensor, "k b b"]
) -> Float[Tensor, "*batch n b"]:
    return x.unflatten(-1, (-1, R.shape[-1]))


def for_all(R: Float[Tensor, "k b b"], x: Float[Tensor, "*batch d"]) -> Float[Tensor, "n b b"]:
    """A block for each b columns of x."""
    n = x.shape[-1] // R.shape[-1]
    return R if R.shape[0] == n else R.expand(n, -1, -1)


def levels_of_a_tile(b: int) -> int:
    """How many levels of a butterfly mix no further than `MOST_COLUMNS` neighbours."""
    return (MOST_COLUMNS // b).bit_length()


def drop_blocks(R: Float[Tensor, "m n b b"], p: float) -> Float[Tensor, "m n b b"]:
    """R with ⌊p n⌋ blocks, drawn at random, of one of its m rows, drawn at random, zero."""
    m, n, *_ = R.shape
    row = torch.randint(m, (1,), device=R.device)
    blocks = torch.randperm(n, device=R.device)[: int(p * n)]
    keep = R.new_ones(m, n).index_put((row, blocks), R.new_zeros(()))
    return R * keep[..., None, None]


def has_kernel(x: Tensor, b: int) -> bool:
    """Whether the kernel serves x."""
    narrow = x.dtype in (torch.bfloat16, torch.float16)
    return ops_serve(x) and narrow and b <= MOST_COLUMNS and x.numel() > 0


class _Butterflies(torch.autograd.Function):
    """R's levels, or its only one, the first of which is `level`; without `plus` x alone is left
    out; `turned` takes each block's transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, R: Tensor, level: int, plus: bool, turned: bool) -> Tensor:
        rows, R = x.reshape(-1, x.shape[-1]).contiguous(), R.contiguous()
        ctx.save_for_backward(rows, R)
        ctx.how = level, plus, turned
        return kernels("blocks").butterflies(rows, R, *ctx.how).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, R = ctx.saved_tensors
        rows = dy.reshape(x.shape).contiguous()
        dx, dR = kernels("blocks").butterflies_backward(rows, x, R, *ctx.how)
        return dx.view(dy.shape), dR, None, None, None


_butterflies = one_op(_Butterflies)
