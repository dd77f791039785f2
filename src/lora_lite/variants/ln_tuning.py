"""LayerNorm tuning."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import NormBase
from lora_lite.variant import ParamSpec, Stats, Variant


class LNTuning(Variant, name="ln_tuning"):
    """Train the norms alone: y = γ ⊙ n(x) + β, n the frozen normalisation.

    Zhao et al. 2023, arXiv:2312.11420, the setting that trains nothing else.

    Start: the identity bit for bit: γ and β are copies.
    Shapes: weight (d,), γ; bias (d,), β where the norm has one and beta is on; d or 2 d parameters.
    Differs: 1. γ and β are kept in float32 and cast to the norm's dtype, in which 1 could not move
    by less than 2⁻⁸ in bfloat16. 2. No weight decay, which would pull γ to 0, not to its start.
    """

    site = "norm"
    beta: bool = True

    weight: Float[Tensor, "d_in"] = ParamSpec(decay=False)
    bias: Float[Tensor, "d_in"] = ParamSpec(decay=False, when=lambda v: v.beta)

    def fit(self, W: NormBase) -> "LNTuning":
        return dataclasses.replace(self, beta=self.beta and W.bias is not None)

    def init(
        self, W: NormBase, generator: torch.Generator, stats: Stats | None
    ) -> dict[str, Tensor]:
        return dict(weight=W.weight) | (dict(bias=W.bias) if self.beta else {})

    def forward(
        self, x: Float[Tensor, "*batch d"], W: NormBase, **numbers: Tensor
    ) -> Float[Tensor, "*batch d"]:
        return W.with_numbers(x, **numbers)
