"""BOFT."""

from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.blocks import add_butterflies, drop_blocks
from lora_lite.ops.cayley import cayley
from lora_lite.ops.gates import gate
from lora_lite.variant import ParamSpec, ones, zeros
from lora_lite.variants._block_rotations import BlockRotations


class BOFT(BlockRotations):
    """Rotate the input by a butterfly: y = s ⊙ W (Rᵀ x) + b, W' = diag(s) W Rᵀ, R = B_{m−1} ⋯ B_0.

    Liu et al. 2023, arXiv:2311.06243, §4 eqs. 1–2 and BOFT(m, b) after them; s: Qiu et al. 2023,
    arXiv:2306.07280, §3.5. B_i holds blocks C = (I − S)(I + S)⁻¹ between halves of blocks that are
    2^i halves apart, so that every input reaches every other with m = 1 + log₂(d_in/block_size).

    Start: the identity bit for bit (S = 0, s = 1).
    Shapes: q (m, n, b(b−1)/2), the strict upper triangle of each S in row-major order, s (d_out,);
    n = d_in/b; m·d_in·(b−1)/2 + d_out parameters.
    Differs: 1. s, which the authors' code always has; the bias is not scaled. 2. The sign of S is
    the code's, the paper's being (I + S)(I − S)⁻¹. 3. dropout takes the blocks of one level drawn
    at random, as the code, where the paper picks levels too by a rate.
    """

    usual_block_size = 4
    m: int = 1
    dropout: float = 0.0

    casts = False

    q: Float[Tensor, "m n b*(b-1)//2"] = ParamSpec(zeros)
    s: Float[Tensor, "d_out"] = ParamSpec(ones, decay=False)

    def validate(self) -> None:
        super().validate()
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")

    @property
    def together(self) -> tuple[int, str]:
        return 2 ** (self.m - 1), f"m={self.m}"

    def prepare(self, W: LinearBase, q: Tensor, s: Tensor) -> dict[str, Tensor]:
        b = self.sizes(W.d_in, W.d_out)["b"]
        C_1 = cayley(-q.flatten(0, 1), b).unflatten(0, q.shape[:2])
        if self.dropout and W.training:
            C_1 = drop_blocks(C_1, self.dropout)
        return dict(C_1=C_1, s=s)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], W: LinearBase, C_1: Tensor, s: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        x = add_butterflies(x, C_1)
        y = gate(W(x), s)
        return y if W.bias is None else y + ((1 - s) * W.bias).to(y.dtype)
