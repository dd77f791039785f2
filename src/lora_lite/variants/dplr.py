"""Diagonal plus low rank in the singular basis."""

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.variant import ParamSpec, kaiming_uniform, zeros
from lora_lite.variants.antipasto import AntiPaSTO


class DPLR(AntiPaSTO, aliases=("antipasto_dplr",)):
    """Gains on singular values, LoRA among them: W' = W + U (diag(S ⊙ ELU(c g)) + c B A) Vᵀ.

    The core is Hu et al. 2021, arXiv:2106.09685, §4.1 eq. 3, in the r coordinates p = Vᵀ x; the
    basis is Clark 2026, arXiv:2601.07473, §3.4 eq. 3.

    Start: the identity bit for bit: g = 0 and B = 0.
    Shapes: g (r,), A (lora_rank, r), B (r, lora_rank); r + 2·r·lora_rank parameters.
    Differs: 1. the update stays within W's kept singular subspaces, on purpose. 2. coeff c takes
    the place of α/r, so the best learning rate moves with lora_rank. 3. W is kept whole.
    """

    lora_rank: int = 8

    A: Float[Tensor, "lora_rank r"] = ParamSpec(kaiming_uniform)
    B: Float[Tensor, "r lora_rank"] = ParamSpec(zeros)

    def validate(self) -> None:
        if self.lora_rank > self.r:
            raise ValueError(f"lora_rank={self.lora_rank} exceeds r={self.r}; lower it")

    def prepare(self, W: LinearBase, A: Tensor, B: Tensor, **basis: Tensor) -> dict[str, Tensor]:
        gained = super().prepare(W, **basis)
        return gained | dict(core=torch.addmm(gained["core"].diag(), B, A, alpha=self.coeff))
