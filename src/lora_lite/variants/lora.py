"""LoRA and rsLoRA."""

import math

from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.low_rank import add_low_rank
from lora_lite.variant import ParamSpec, Variant, kaiming_uniform, zeros


class LoRA(Variant):
    """Low-rank update: W' = W + s B A, s = α/r (rsLoRA: α/√r).

    Hu et al. 2021, arXiv:2106.09685, §4.1 eq. 3; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732.

    Start: the identity bit for bit, since B = 0.
    Shapes: A (r, d_in), B (d_out, r); r·(d_in + d_out) parameters.
    Differs: 1. A starts Kaiming-uniform as in the authors' code, where the paper says Gaussian.
    """

    r: int = 8
    alpha: float = 16.0
    rslora: bool = False
    dropout: float = 0.0

    casts = False

    A: Float[Tensor, "r d_in"] = ParamSpec(kaiming_uniform)
    B: Float[Tensor, "d_out r"] = ParamSpec(zeros)

    def validate(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")

    @property
    def s(self) -> float:
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], W: LinearBase, A: Tensor, B: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        return add_low_rank(W, x, A, B, self.s, W.dropout(x, self.dropout))


class RsLoRA(LoRA):
    """LoRA with s = α/√r, so that the update does not shrink as r grows.

    Kalajdzievski 2023, arXiv:2312.03732.

    Start, Shapes: LoRA's.
    """

    rslora: bool = True
