"""Diagonal plus low rank in the singular basis."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.low_rank import add_low_rank
from lora_lite.variant import ParamSpec, kaiming_uniform, zeros
from lora_lite.variants._singular_basis import SingularBasis


class DPLR(SingularBasis, aliases=("antipasto_dplr",)):
    """Gains on singular values, LoRA among them: W' = W + U (diag(S ⊙ ELU(c g)) + c B A) Vᵀ.

    The core is Hu et al. 2021, arXiv:2106.09685, §4.1 eq. 3, in the r coordinates p = Vᵀ x; the
    basis is Clark 2026, arXiv:2601.07473, §3.4 eq. 3.

    Start: the identity bit for bit: g = 0 and B = 0.
    Shapes: g (r,), A (lora_rank, r), B (r, lora_rank); r + 2·r·lora_rank parameters.
    Differs: 1. the update stays within W's kept singular subspaces, on purpose. 2. coeff c takes
    the place of α/r, so the best learning rate moves with lora_rank. 3. W is kept whole.
    """

    lora_rank: int = 8
    coeff: float = 1.0
    suppress_only: bool = False

    g: Float[Tensor, "r"] = ParamSpec(zeros)
    A: Float[Tensor, "lora_rank r"] = ParamSpec(kaiming_uniform)
    B: Float[Tensor, "r lora_rank"] = ParamSpec(zeros)

    def validate(self) -> None:
        if self.lora_rank > self.r:
            raise ValueError(f"lora_rank={self.lora_rank} exceeds r={self.r}; lower it")

    def prepare(
        self, W: LinearBase, U: Tensor, S: Tensor, Vh: Tensor, g: Tensor, A: Tensor, B: Tensor
    ) -> dict[str, Tensor]:
        g = g.clamp(max=0) if self.suppress_only else g
        core = torch.diag(S * F.elu(self.coeff * g)) + self.coeff * B @ A
        return dict(U=U, Vh=Vh, core=core)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], W: LinearBase, U: Tensor, Vh: Tensor, core: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        return add_low_rank(W, x, Vh, U, core)
