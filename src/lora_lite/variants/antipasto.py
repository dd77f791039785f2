"""AntiPaSTO with bounded gains."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.cores import Core
from lora_lite.ops.low_rank import add_low_rank
from lora_lite.variant import ParamSpec, zeros
from lora_lite.variants._singular_basis import SingularBasis


class AntiPaSTO(SingularBasis):
    """Bounded gains on singular values: W' = W + U diag(S ⊙ ELU(c g)) Vᵀ.

    The basis and its choice are Clark 2026, arXiv:2601.07473, §3.4 eq. 3, App. A.4; the gain is the
    author's later code's: singular values become S (1 + ELU(c g)) > 0, so that none changes sign.

    Start: the identity bit for bit (g = 0).
    Shapes: g (r,); r parameters.
    Differs: 1. no rotation, and the gain multiplies where eq. 4 shifts. 2. W is kept whole, where
    the code crops U diag(S) Vᵀ out of it. 3. suppress_only clamps g, as in the code, and so
    suppresses for coeff c ≥ 0 only.
    """

    coeff: float = 1.0
    suppress_only: bool = False

    g: Float[Tensor, "r"] = ParamSpec(zeros)

    def gains(self, S: Float[Tensor, " r"], g: Float[Tensor, " r"]) -> Float[Tensor, " r"]:
        """S ⊙ ELU(c g)."""
        g = g.clamp(max=0) if self.suppress_only else g
        return S * F.elu(self.coeff * g)

    def prepare(
        self, W: LinearBase, U: Tensor, S: Tensor, Vh: Tensor, g: Tensor
    ) -> dict[str, Tensor]:
        return dict(U=U, Vh=Vh, core=self.gains(S, g))

    def forward(
        self, x: Float[Tensor, "*batch d_in"], W: LinearBase, U: Tensor, Vh: Tensor, core: Core
    ) -> Float[Tensor, "*batch d_out"]:
        return add_low_rank(W, x, Vh, U, core)
