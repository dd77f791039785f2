"""What the AntiPaSTO family shares: coordinates in W's own singular basis."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.svd import SvdMethod
from lora_lite.variant import ParamSpec, Stats, Variant, check_rank


class SingularBasis(Variant, abstract=True):
    """r frozen singular triplets of W: the leading ones, or with calibration those that carry
    the most output, score_i = S_i · pool_t(x_t · v_i).

    Clark 2026, arXiv:2601.07473, §3.4 eq. 3, App. A.4; W itself stays as it is.

    svd: "exact" or "randomised", by default the latter above 2048; calibration then chooses among
    the 4 r leading triplets.
    Differs: the pool is about zero, so that Σ score² is the output's energy (rms), where the paper
    takes the deviation from the mean; and one score ranks all, where it splits them in thirds.
    """

    r: int = 256
    act_pool: Literal["rms", "mean_abs"] = "rms"
    svd: SvdMethod = "auto"

    casts = False

    U: Float[Tensor, "d_out r"] = ParamSpec(trainable=False)
    S: Float[Tensor, "r"] = ParamSpec(trainable=False)
    Vh: Float[Tensor, "r d_in"] = ParamSpec(trainable=False)

    def check(self, d_in: int, d_out: int) -> None:
        check_rank(self.r, d_in, d_out)

    def statistic(self, x: Float[Tensor, "n d_in"], W: LinearBase) -> Float[Tensor, " q"]:
        p = x @ W.candidates(self.r, self.svd)[2].T.to(x.dtype)
        return p.square().sum(0) if self.act_pool == "rms" else p.abs().sum(0)

    def init(
        self, W: LinearBase, generator: torch.Generator, stats: Stats | None
    ) -> dict[str, Tensor]:
        if stats is None:
            return dict(zip(("U", "S", "Vh"), W.svd(self.r, self.svd, generator.initial_seed())))
        if stats.count < self.r:
            raise ValueError(f"saw {stats.count} calibration tokens, fewer than r={self.r}")
        U, S, Vh = W.candidates(self.r, self.svd)
        pooled = stats.mean.sqrt() if self.act_pool == "rms" else stats.mean
        keep = (S * pooled.to(S)).topk(self.r).indices.sort().values
        return dict(U=U[:, keep], S=S[keep], Vh=Vh[keep])
