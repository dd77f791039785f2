"""The low-rank product that LoRA and its kin add to a layer."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor


def low_rank(
    x: Float[Tensor, "*batch d_in"],
    A: Float[Tensor, "r d_in"],
    B: Float[Tensor, "d_out r"],
    core: float | Callable[[Tensor], Tensor] = 1.0,
) -> Float[Tensor, "*batch d_out"]:
    """B core(A x), core a factor or a linear map of the r coordinates.

    Nothing wider than r is made besides the result.
    """
    if x.dtype == torch.float16:
        # A x can pass 65504 where W x does not, and a zero B would turn the infinity into NaN:
        # for rows of A of norm ≤ 1 a factor √d moved to B keeps it finite.
        c = 2.0 ** math.ceil(math.log2(max(A.shape[1], B.shape[0])) / 2)
        A, B = A / c, B * c
    h = x @ A.T
    h = core(h) if callable(core) else h if core == 1 else h * core
    return h @ B.T
