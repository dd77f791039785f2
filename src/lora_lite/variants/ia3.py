"""(IA)³."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.gates import gate
from lora_lite.variant import ParamSpec, Variant, ones


class IA3(Variant):
    """Scale each output: y = l ⊙ (W x + b), or with side "in" each input: y = W (l ⊙ x) + b.

    Liu et al. 2022, arXiv:2205.05638, §3.3: "out" for the keys and values, "in" for the layer that
    reads the feed-forward network's activation, `overrides={"down_proj": dict(side="in")}`.

    Start: the identity bit for bit (l = 1).
    Shapes: l (d_out,), on the input side (d_in,).
    Differs: 1. the bias is scaled with the output, as in the authors' code; the paper's layers have
    none. 2. Weight decay leaves l alone, since it would pull to 0 and not to 1.
    """

    side: Literal["out", "in"] = "out"

    casts = False

    l: Float[Tensor, "d"] = ParamSpec(ones, decay=False)  # noqa: E741

    def sizes(self, d_in: int, d_out: int) -> dict[str, int]:
        return dict(d=d_out if self.side == "out" else d_in)

    def forward(
        self,
        x: Float[Tensor, "*batch d_in"],
        W: LinearBase,
        l: Tensor,  # noqa: E741
    ) -> Float[Tensor, "*batch d_out"]:
        return gate(W(x), l) if self.side == "out" else W(gate(x, l))


class IA3FF(IA3, name="ia3_ff"):
    """(IA)³ on the input side: W' = W diag(l), for layers that read the feed-forward activation.

    Liu et al. 2022, arXiv:2205.05638, §3.3.

    Start, Shapes, Differs: IA3's.
    """

    side: Literal["out", "in"] = "in"
