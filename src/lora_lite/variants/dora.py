"""DoRA."""

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.low_rank import scaled_add_low_rank
from lora_lite.ops.norms import low_rank_row_norms
from lora_lite.variant import ParamSpec, Stats
from lora_lite.variants.lora import LoRA


class DoRA(LoRA):
    """Magnitude and direction apart: W' = diag(m / ‖W + s B A‖_row) (W + s B A).

    Liu et al. 2024, arXiv:2402.09353, §4.1 eq. 5; the norm held constant in backward, §4.3 eq. 11.

    Start: the identity bit for bit: B = 0 and m = ‖W‖, so g − 1 = 0.
    Shapes: A (r, d_in), B (d_out, r), m (d_out,); r·(d_in + d_out) + d_out parameters. m0 = ‖W‖.
    Differs: 1. one magnitude per output row, as the authors' code and PEFT have it, where the
    paper's "column" read literally is an input. 2. Dropout acts on the low-rank branch alone,
    sparing a second product with W. 3. The bias is not scaled.
    """

    m: Float[Tensor, "d_out"] = ParamSpec()
    m0: Float[Tensor, "d_out"] = ParamSpec(trainable=False, saved=False)

    def init(
        self, W: LinearBase, generator: torch.Generator, stats: Stats | None
    ) -> dict[str, Tensor]:
        norms = W.row_norms()
        if not norms.all():
            row = int((norms == 0).nonzero()[0])
            raise ValueError(f"has a zero row ({row}) and no direction for it; exclude the layer")
        return dict(m=norms, m0=norms)

    def prepare(
        self, W: LinearBase, A: Tensor, B: Tensor, m: Tensor, m0: Tensor
    ) -> dict[str, Tensor]:
        norms = low_rank_row_norms(W, B, A, m0, self.s)
        return dict(A=A, B=B, g_1=m / norms - 1)

    def forward(
        self, x: Float[Tensor, "*batch d_in"], W: LinearBase, A: Tensor, B: Tensor, g_1: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        v = W.dropout(x, self.dropout)
        return scaled_add_low_rank(W, x, A, B, self.s, g_1, v)
