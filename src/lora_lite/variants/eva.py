"""EVA."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.svd import SvdMethod, is_randomised, nystrom, sketching
from lora_lite.variant import ParamSpec, Stats, Variant
from lora_lite.variants.lora import LoRA


class EVA(LoRA):
    """LoRA along the principal components of the layer's inputs: W' = W + s B A, A = V_:rᵀ.

    Paischer et al. 2024, arXiv:2410.07170, §3. X − mean = U diag(σ) Vᵀ over calibration tokens. Of
    the round(ρ r) leading components of all layers, those that explain the most of their layer's
    variance, σ_i²/Σσ², stay, Σ r in all; a layer's α follows its r, so that s stays.

    Start: the identity bit for bit, since B = 0.
    Shapes: LoRA's, each layer with an r of its own, 0 to round(ρ r).
    Differs: 1. one pass over all tokens given, in place of an incremental SVD that stops when its
    components stay (tau). 2. Above a width of 2048 the second moments are sketched (svd), not kept.
    """

    rho: float = 2.0
    center: bool = True
    whiten: bool = False
    adjust_scaling_factors: bool = True
    use_label_mask: bool = True
    label_mask_value: int = -100
    svd: SvdMethod = "auto"

    needs_calibration = True

    A: Float[Tensor, "r d_in"] = ParamSpec()

    def validate(self) -> None:
        super().validate()
        if self.rho < 1:
            raise ValueError(f"rho={self.rho} must be ≥ 1: layers could not fill their ranks")

    def check(self, d_in: int, d_out: int) -> None:
        if self.r > d_in:
            raise ValueError(f"has {d_in} inputs and no {self.r} components; use r ≤ {d_in}")

    def tokens(self, batch: dict[str, Tensor]) -> Tensor | None:
        mask, labels = super().tokens(batch), batch.get("labels")
        if not self.use_label_mask or labels is None:
            return mask
        answers = labels != self.label_mask_value
        return answers if mask is None else answers & mask.bool()

    def components(self, d_in: int) -> int:
        """How many a layer may keep."""
        return min(round(self.r * self.rho), d_in)

    def sketch(self, d_in: int) -> Float[Tensor, "d_in q"] | None:
        """Ω by which second moments C are kept as C Ω; None where they are kept whole."""
        k = self.components(d_in)
        return sketching(d_in, k) if is_randomised(self.svd, k, d_in, d_in) else None

    def statistic(self, x: Float[Tensor, "n d_in"], W: LinearBase) -> tuple[Tensor, ...]:
        Ω = self.sketch(W.d_in)
        return x.sum(0), x.T @ (x if Ω is None else x @ Ω.to(x)), x.square().sum()

    def summarise(self, seen: Stats, W: LinearBase) -> Stats:
        """The components V_:kᵀ, their σ², and Σσ²."""
        k = self.components(W.d_in)
        if seen.count < k:
            raise ValueError(f"saw {seen.count} calibration tokens, fewer than its {k} components")
        mean, C, energy = (t.double() for t in seen.mean)
        mean, Ω = mean * self.center, self.sketch(W.d_in)
        Ω = torch.eye(W.d_in).to(C) if Ω is None else Ω.to(C)
        eps = torch.finfo(seen.mean[1].dtype).eps
        V, λ = nystrom(C - mean[:, None] * (mean @ Ω), Ω, k, eps)
        n = seen.count
        return Stats((V.T, n * λ, n * (energy - mean.square().sum())), n)

    @classmethod
    def allocate(cls, variants: dict[str, Variant], stats: dict[str, Stats]) -> dict[str, Variant]:
        if not stats:
            return variants
        explained = {name: seen.mean[1] / seen.mean[2] for name, seen in stats.items()}
        every = torch.cat([ratios.cpu() for ratios in explained.values()])
        least = every.sort(descending=True).values[sum(v.r for v in variants.values()) - 1]
        out = {}
        for name, v in variants.items():
            if r := int((explained[name].cpu() >= least).sum()):
                alpha = v.alpha * r / v.r if v.adjust_scaling_factors else v.alpha
                out[name] = dataclasses.replace(v, r=r, alpha=alpha)
        return out

    def init(
        self, W: LinearBase, generator: torch.Generator, stats: Stats | None
    ) -> dict[str, Tensor]:
        Vt, σ_sq, _ = stats.mean
        A = Vt[: self.r]
        if not self.whiten:
            return dict(A=A)
        if not σ_sq[: self.r].all():
            raise ValueError(f"saw inputs of fewer than {self.r} components to whiten; lower r")
        return dict(A=A / σ_sq[: self.r, None] ** 0.25)
