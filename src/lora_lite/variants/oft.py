"""OFT, COFT and OFTv2."""

from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.blocks import add_block_rows
from lora_lite.ops.cayley import cayley, cayley_neumann
from lora_lite.variant import ParamSpec, Step, zeros
from lora_lite.variants._block_rotations import BlockRotations


class OFT(BlockRotations):
    """Rotate the input block by block: y = W (Rᵀ x) + b, W' = W Rᵀ, R = blockdiag(R_1, …, R_n).

    Qiu et al. 2023, arXiv:2306.07280, §3.2 eq. 2, §3.3 eq. 3; the input-side form and the series
    R = I + 2Q + … + 2Q^(t−2) + Q^(t−1): OFTv2, Qiu et al. 2025, arXiv:2506.19847, §3.2 eq. 2, §3.3.

    Start: the identity bit for bit (Q = 0).
    Shapes: q (n, b(b−1)/2), the strict upper triangle of each Q in row-major order; n = d_in/b,
    or 1 with block_share.
    Differs: 1. `exact` is (I + Q)(I − Q)⁻¹ with the series' sign, where PEFT's exact form is its
    transpose. 2. COFT's eps bounds ‖Q‖_F (the paper's ε′, not its ε), each block having eps/√n,
    and the projection follows the optimizer's step (`ll.step`), not the forward.
    """

    terms: int = 5
    exact: bool = False
    block_share: bool = False
    coft: bool = False
    eps: float = 6e-5

    casts = False

    q: Float[Tensor, "n b*(b-1)//2"] = ParamSpec(zeros)

    def validate(self) -> None:
        super().validate()
        if self.terms < 2:
            raise ValueError(f"terms={self.terms} must be ≥ 2: fewer leave no gradient")
        if self.eps <= 0:
            raise ValueError(f"eps={self.eps} must be positive")

    def sizes(self, d_in: int, d_out: int) -> dict[str, int]:
        return super().sizes(d_in, d_out) | (dict(n=1) if self.block_share else {})

    def prepare(self, W: LinearBase, q: Tensor) -> dict[str, Tensor]:
        b = self.sizes(W.d_in, W.d_out)["b"]
        return dict(R_1=cayley(q, b) if self.exact else cayley_neumann(q, b, self.terms))

    def forward(
        self, x: Float[Tensor, "*batch d_in"], W: LinearBase, R_1: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        return W(add_block_rows(x, R_1))

    def scheduled(self) -> bool:
        return self.coft

    def step(self, tensors: dict[str, Tensor], now: Step) -> None:
        """COFT, §3.4: ‖Q_i‖_F ≤ eps/√n after every optimizer step."""
        if self.coft:
            q = tensors["q"]
            radius = self.eps / (2 * len(q)) ** 0.5
            q.mul_((radius / q.norm(dim=-1, keepdim=True)).clamp(max=1))
