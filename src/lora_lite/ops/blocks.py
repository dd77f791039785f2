"""Block-diagonal products."""

import torch
from jaxtyping import Float
from torch import Tensor


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
