"""EVA."""

import dataclasses
from collections import Counter

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.svd import SvdMethod, is_randomised, nystrom, sketching
from lora_lite.variant import ParamSpec, Stats, Variant
from lora_lite.variants.lora import LoRA

EPS = torch.finfo(torch.float32).eps
"""What a batch's own products are known to; batches are added in float64."""


class EVA(LoRA):
    """LoRA along the principal components of the layer's inputs: W' = W + s B A, A = V_:rᵀ.

    Paischer et al. 2024, arXiv:2410.07170, §3. X − mean = U diag(σ) Vᵀ over calibration tokens. Of
    the round(ρ r) leading components of all layers, those that explain the most of their layer's
    variance, σ_i²/Σσ², stay, Σ r in all; a layer's α follows its r, so that s stays.

    Start: the identity bit for bit, since B = 0.
    Shapes: LoRA's, each layer with an r of its own, 0 to round(ρ r).
    Differs: 1. one pass over all tokens given, in place of an incremental SVD that stops when its
    components stay (tau). 2. Above a width of 2048 the second moments are sketched (svd), not kept.
    3. With rslora, where s = α/√r, α follows √r; in PEFT it follows r, and s changes.
    """

    rho: float = 2.0
    center: bool = True
    whiten: bool = False
    adjust_scaling_factors: bool = True
    use_label_mask: bool = True
    label_mask_value: int = -100
    svd: SvdMethod = "auto"

    needs_calibration = True
    reads_input_alone = True

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
        if mask is None:
            return answers
        # Labels of whole examples say nothing of tokens.
        return answers & mask.bool() if answers.shape == mask.shape else mask

    def components(self, d_in: int) -> int:
        """How many a layer may keep."""
        return min(round(self.r * self.rho), d_in)

    def sketch(self, d_in: int) -> Float[Tensor, "d_in q"] | None:
        """Ω by which second moments C are kept as C Ω; None where they are kept whole."""
        k = self.components(d_in)
        return sketching(d_in, k) if is_randomised(self.svd, k, d_in, d_in) else None

    def statistic(self, x: Float[Tensor, "n d_in"], W: LinearBase) -> tuple[Tensor, ...]:
        """Σ x, Σ x xᵀ Ω and Σ |x|², a batch's mean set apart lest a large one drown the rest."""
        Ω, n = self.sketch(W.d_in), len(x)
        mean = x.sum(0, dtype=torch.float64) / max(n, 1)
        x = x - mean.to(x)
        C = x.T @ (x if Ω is None else x @ Ω.to(x))
        C = C.double() + n * torch.outer(mean, mean if Ω is None else mean @ Ω.to(mean))
        return n * mean, C, x.square().sum(dtype=torch.float64) + n * mean @ mean

    def summarise(self, seen: Stats, W: LinearBase) -> Stats:
        """The components V_:kᵀ, their σ², and the shares of the variance that they explain."""
        k, n = self.components(W.d_in), seen.count
        if n < k:
            raise ValueError(f"saw {n} calibration tokens, fewer than its {k} components")
        (mean, C, energy), Ω = seen.mean, self.sketch(W.d_in)
        mean, Ω = mean * self.center, (torch.eye(W.d_in) if Ω is None else Ω).to(C)
        V, λ = nystrom(C - torch.outer(mean, mean @ Ω), Ω, k, EPS)
        variance = energy - mean @ mean
        # Of inputs that stay as they are, but for rounding, nothing is to be explained.
        shares = λ / variance if variance > EPS**2 * energy else 0 * λ
        return Stats((V.T, n * λ, shares), n)

    @classmethod
    def allocate(cls, variants: dict[str, Variant], stats: dict[str, Stats]) -> dict[str, Variant]:
        if not stats:
            return variants
        shares = {name: stats[name].mean[2].cpu() for name in variants}
        owners = [name for name, own in shares.items() for _ in own]
        # Layers with the same input have the same shares: the first of them comes first.
        best = torch.cat(list(shares.values())).sort(descending=True, stable=True).indices
        kept = Counter(owners[i] for i in best[: sum(v.r for v in variants.values())].tolist())
        out = {}
        for name, v in variants.items():
            if r := kept[name]:
                s = (r / v.r) ** (0.5 if v.rslora else 1) if v.adjust_scaling_factors else 1
                out[name] = dataclasses.replace(v, r=r, alpha=v.alpha * s)
        return out

    def init(
        self, W: LinearBase, generator: torch.Generator, stats: Stats | None
    ) -> dict[str, Tensor]:
        Vt, σ_sq, shares = stats.mean
        A = Vt[: self.r]
        if not self.whiten:
            return dict(A=A)
        if not shares[self.r - 1] > EPS * shares[0]:
            raise ValueError(f"saw inputs of fewer than {self.r} components to whiten; lower r")
        return dict(A=A / σ_sq[: self.r, None] ** 0.25)
