"""VeRA."""

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.low_rank import add_low_rank
from lora_lite.variant import ParamSpec, Variant, he_uniform, zeros


class VeRA(Variant):
    """One random pair for all layers, scaled by vectors: W' = W + diag(λ_b) B diag(λ_d) A.

    Kopiczko, Blankevoort & Asano 2023, arXiv:2310.11454, §3.1 eq. 2, §3.3.

    Start: the identity bit for bit, since λ_b = 0.
    Shapes: lam_d (r,), lam_b (d_out,); r + d_out parameters. A (r, D_in) and B (D_out, r), sized by
    the widest layers, are frozen and drawn from projection_seed, A first; a layer takes A's first
    d_in columns and B's first d_out rows.
    Differs: 1. layers of several shapes share one pair, cut as PEFT cuts it, where the paper has
    one shape: so A and B depend on the targets too. 2. A file holds the seed and a checksum of
    the pair, not the pair.
    """

    r: int = 256
    d_init: float = 0.1
    projection_seed: int = 0
    dropout: float = 0.0

    A: Float[Tensor, "r D_in"] = ParamSpec(he_uniform, trainable=False, saved=False, shared=True)
    B: Float[Tensor, "D_out r"] = ParamSpec(he_uniform, trainable=False, saved=False, shared=True)
    lam_d: Float[Tensor, "r"] = ParamSpec()
    lam_b: Float[Tensor, "d_out"] = ParamSpec(zeros)

    def validate(self) -> None:
        if self.d_init == 0:
            raise ValueError("d_init=0 leaves neither vector a gradient, with λ_b = 0; use 0.1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1)")

    @property
    def shared_seed(self) -> int:
        return self.projection_seed

    def init(self, *_: object) -> dict[str, Tensor]:
        return dict(lam_d=torch.full((self.r,), self.d_init))

    def prepare(
        self, W: LinearBase, A: Tensor, B: Tensor, lam_d: Tensor, lam_b: Tensor
    ) -> dict[str, Tensor]:
        return dict(A=A[:, : W.d_in], B=torch.outer(lam_b, lam_d) * B[: W.d_out])

    def forward(
        self, x: Float[Tensor, "*batch d_in"], W: LinearBase, A: Tensor, B: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        return add_low_rank(W, x, A, B, v=W.dropout(x, self.dropout))
