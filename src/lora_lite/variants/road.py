"""RoAd."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.gates import polar, turn
from lora_lite.variant import ParamSpec, Variant, ones, zeros


class RoAd(Variant):
    """Turn and stretch the output plane by plane: y = α cos θ ⊙ z + α sin θ ⊙ ẑ, z = W x + b.

    Liao & Monz 2024, arXiv:2409.00119, §3.2 eqs. 2–4, Table 1. ẑ is z turned by 90° in each plane.

    Start: the identity bit for bit (θ = 0, α = 1).
    Shapes: theta, alpha (d_out·form/2,): `form` 1 has an α and a θ for each plane, 2 for each row
    of its R_i, 4 for each entry, in each group those of the cosines before those of the sines.
    Differs: 1. outputs k and k + group_size/2 of each group make a plane, as in PEFT, where the
    paper's neighbours are group_size 2. 2. The bias is turned too, as in PEFT; the paper's layers
    have none.
    """

    form: Literal[1, 2, 4] = 1
    group_size: int = 64

    casts = False

    theta: Float[Tensor, "d_out*form//2"] = ParamSpec(zeros, decay=False)
    alpha: Float[Tensor, "d_out*form//2"] = ParamSpec(ones, decay=False)

    def validate(self) -> None:
        if self.group_size < 2 or self.group_size % 2:
            raise ValueError(f"group_size={self.group_size} must be even and positive")

    def check(self, d_in: int, d_out: int) -> None:
        if d_out % self.group_size:
            fit = [str(g) for g in range(2, d_out + 1, 2) if d_out % g == 0]
            raise ValueError(
                f"has out_features={d_out}, not a multiple of group_size={self.group_size}; "
                + (f"use {', '.join(fit)}" if fit else "no even size fits, exclude the layer")
            )

    def prepare(self, W: LinearBase, theta: Tensor, alpha: Tensor) -> dict[str, Tensor]:
        parts, rows = {1: (1, 1), 2: (1, 2), 4: (2, 2)}[self.form]
        shape = (-1, parts, rows, self.group_size // 2)
        c, s = polar(alpha.view(shape), theta.view(shape))
        return dict(c=c, s=s)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], W: LinearBase, c: Tensor, s: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        return turn(W(x), c, s)
