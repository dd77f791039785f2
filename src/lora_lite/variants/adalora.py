"""AdaLoRA."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lora_lite.base import LinearBase, at_least_float32
from lora_lite.ops.low_rank import add_low_rank
from lora_lite.variant import (
    Layer,
    ParamSpec,
    Stats,
    Variant,
    normal,
    ones,
    sharded,
    whole,
    zeros,
)

STATE = dict(trainable=False)
SCHEDULE = ("tinit", "tfinal", "delta_t", "beta1", "beta2")


class AdaLoRA(Variant):
    """Low rank as singular triplets, the least important pruned: W' = W + s B diag(E) A.

    Zhang et al. 2023, arXiv:2303.10512, §3.1 eqs. 3–4, §3.2 eqs. 6–11, App. A eq. 12; the paper's
    P, Λ, Q are B, E, A. s = α/init_r, whatever is pruned. After tinit optimizer steps, every
    delta_t, only the triplets of the highest importance of all layers keep their E, a budget that
    falls from Σ init_r to Σ target_r; the last tfinal steps train those alone.

    Start: the identity bit for bit, since E = 0.
    Shapes: A (init_r, d_in), B (d_out, init_r), E (init_r,); init_r·(d_in + d_out + 1) parameters.
    I and U, the importance and its uncertainty, are like them; kept (init_r,) is the last choice.
    Differs: the authors' code in 1. s = α/(init_r + 1e-5); 2. the penalty γ mean(‖AAᵀ − I‖_F,
    ‖BᵀB − I‖_F) over all layers, not the sum of squares; 3. the gradient of the step just taken
    times the tensor after it; 4. eq. 12's numerator t − tinit. 5. With tfinal = 0 the last step
    still meets the target. 6. I, U and kept are saved, so that a resumed run prunes alike.
    """

    init_r: int = 12
    target_r: int = 8
    alpha: float = 16.0
    tinit: int = 0
    tfinal: int = 0
    delta_t: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5

    casts = False

    A: Float[Tensor, "init_r d_in"] = ParamSpec(normal(0.02))
    B: Float[Tensor, "d_out init_r"] = ParamSpec(normal(0.02))
    E: Float[Tensor, "init_r"] = ParamSpec(zeros)
    I_A: Float[Tensor, "init_r d_in"] = ParamSpec(zeros, **STATE)
    I_B: Float[Tensor, "d_out init_r"] = ParamSpec(zeros, **STATE)
    I_E: Float[Tensor, "init_r"] = ParamSpec(zeros, **STATE)
    U_A: Float[Tensor, "init_r d_in"] = ParamSpec(zeros, **STATE)
    U_B: Float[Tensor, "d_out init_r"] = ParamSpec(zeros, **STATE)
    U_E: Float[Tensor, "init_r"] = ParamSpec(zeros, **STATE)
    kept: Bool[Tensor, "init_r"] = ParamSpec(ones, **STATE)

    def validate(self) -> None:
        if not 1 <= self.target_r < self.init_r:
            raise ValueError(
                f"target_r={self.target_r} must be ≥ 1 and below init_r={self.init_r}: "
                "with nothing to prune use lora"
            )
        for name, least in dict(tinit=0, tfinal=0, delta_t=1, orth_reg_weight=0).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be ≥ {least}")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in (0, 1)")

    @classmethod
    def allocate(cls, variants: dict[str, Variant], stats: dict[str, Stats]) -> dict[str, Variant]:
        for key in SCHEDULE:
            if len(values := {getattr(v, key) for v in variants.values()}) > 1:
                raise ValueError(
                    f"overrides give layers {key}={' and '.join(map(str, sorted(values)))}, and "
                    "all share one budget; say it once for all"
                )
        return variants

    def needs_total(self) -> str | None:
        return "the budget of triplets"

    def check_total(self, total: int) -> None:
        if self.tinit >= total - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of {total} to prune "
                "in; lower them or train longer"
            )

    def prepare(
        self, W: LinearBase, A: Tensor, B: Tensor, E: Tensor, **state: Tensor
    ) -> dict[str, Tensor]:
        s = self.alpha / (self.init_r + 1e-5)
        return dict(A=A, B=B * (s * E))

    def forward(
        self, x: Float[Tensor, "*batch d_in"], W: LinearBase, A: Tensor, B: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        return add_low_rank(W, x, A, B)

    def budget(self, t: int, total: int, b_0: int, b_T: int) -> int:
        """Triplets of all layers that stay at step t: eq. 12 from b_0 down to b_T."""
        left = 1 - (t - self.tinit) / (total - self.tfinal - self.tinit)
        return int((b_0 - b_T) * left**3 + b_T)

    @classmethod
    def step_all(cls, layers: list[Layer]) -> None:
        v, now = layers[0].variant, layers[0].step
        t, last = now.number - 1, min(now.total - v.tfinal, now.total - 1)
        if t < now.total - v.tfinal:
            v.observe_sensitivity(layers)
        if t == last or (v.tinit < t < last and t % v.delta_t == 0):
            b_0, b_T = (sum(getattr(x.variant, k) for x in layers) for k in ("init_r", "target_r"))
            keep(layers, b_T if t == last else v.budget(t, now.total, b_0, b_T))
            prune(layers)
        elif t > last:
            prune(layers)

    def observe_sensitivity(self, layers: list[Layer]) -> None:
        """Eqs. 8–10 for every entry, all tensors of all layers at once."""
        tensors = [(x, key) for x in layers for key in "ABE"]
        for x, key in tensors:
            if x.tensors[key].grad is None:
                raise ValueError(
                    f"{self.name}: {x.step.layer} has no gradient to {key} and so no importance; "
                    "call ll.step after backward and before gradients are cleared, or exclude "
                    "a layer that the loss does not reach"
                )
        w = [whole(x.tensors[key]) for x, key in tensors]
        grads = [whole(x.tensors[key].grad) for x, key in tensors]
        I_t, U_t = ([x.tensors[f"{letter}_{key}"] for x, key in tensors] for letter in "IU")
        now = torch._foreach_mul(w, grads)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(I_t, now, 1 - self.beta1)
        torch._foreach_sub_(now, I_t)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(U_t, now, 1 - self.beta2)

    def regulariser(self, A: Tensor, B: Tensor, **others: Tensor) -> Tensor:
        """Eq. 4 as the authors' code has it."""
        A, B = (at_least_float32(whole(t)) for t in (A, B))
        eye = torch.eye(self.init_r, dtype=A.dtype, device=A.device)
        return self.orth_reg_weight * ((A @ A.T - eye).norm() + (B.T @ B - eye).norm()) / 2

    @classmethod
    def regulariser_all(cls, layers: list[tuple[Variant, dict[str, Tensor]]]) -> Tensor | None:
        return super().regulariser_all(layers) / len(layers)

    def diagnose(self, W: LinearBase, E: Tensor, **others: Tensor) -> dict[str, int]:
        """rank: the triplets that act."""
        return dict(rank=int(whole(E).count_nonzero()))


def importance(layer: Layer) -> Float[Tensor, " init_r"]:
    """Eq. 7 of s = I U, eq. 11."""
    s_A, s_B, s_E = (layer.tensors[f"I_{k}"] * layer.tensors[f"U_{k}"] for k in "ABE")
    return s_E + s_A.mean(1) + s_B.mean(0)


def keep(layers: list[Layer], b: int) -> None:
    """Choose the b triplets of the highest importance among all layers."""
    S = [importance(layer) for layer in layers]
    every = torch.cat([scores.to(S[0].device) for scores in S])
    pruned = len(every) - b
    threshold = every.kthvalue(pruned).values if pruned else every.new_tensor(-torch.inf)
    for layer, scores in zip(layers, S):
        layer.tensors["kept"].copy_(scores > threshold.to(scores.device))


def prune(layers: list[Layer]) -> None:
    """Eq. 6: E of what is not kept is zero."""
    for layer in layers:
        E = layer.tensors["E"]
        E.masked_fill_(sharded(~layer.tensors["kept"], E), 0)
