"""PiSSA."""

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.low_rank import add_low_rank_change
from lora_lite.ops.svd import SvdMethod
from lora_lite.variant import ParamSpec, Stats, check_rank
from lora_lite.variants.lora import LoRA


class PiSSA(LoRA):
    """LoRA on the principal singular triplets: W' = W + s (B A − B₀ A₀).

    Meng, Wang & Zhang 2024, arXiv:2404.02948, §3 eqs. 2–5, App. C eq. 9. W = U diag(S) Vᵀ;
    A₀ = diag(√(S_:r/s)) V_:rᵀ, B₀ = U_:r diag(√(S_:r/s)); α = r unless given.

    Start: the identity bit for bit, the difference being zero.
    Shapes: A (r, d_in), B (d_out, r) trained, A0, B0 alike and frozen.
    Differs: 1. W stays as it is and a difference is trained, where the paper replaces W by
    W − s B₀ A₀: the same function and gradients. 2. s ≠ 1 is allowed and divides S, as in PEFT.
    """

    alpha: float | None = None
    svd: SvdMethod = "auto"

    A: Float[Tensor, "r d_in"] = ParamSpec()
    B: Float[Tensor, "d_out r"] = ParamSpec()
    A0: Float[Tensor, "r d_in"] = ParamSpec(trainable=False)
    B0: Float[Tensor, "d_out r"] = ParamSpec(trainable=False)

    @property
    def s(self) -> float:
        alpha = self.r if self.alpha is None else self.alpha
        return alpha / (self.r**0.5 if self.rslora else self.r)

    def validate(self) -> None:
        super().validate()
        if self.s <= 0:
            raise ValueError(f"alpha={self.alpha} must be positive: the start divides by it")

    def check(self, d_in: int, d_out: int) -> None:
        check_rank(self.r, d_in, d_out)

    def init(
        self, W: LinearBase, generator: torch.Generator, stats: Stats | None
    ) -> dict[str, Tensor]:
        U, S, Vh = W.svd(self.r, self.svd, generator.initial_seed())
        root = (S / self.s).sqrt()
        A, B = root[:, None] * Vh, U * root
        return dict(A=A, B=B, A0=A, B0=B)

    def forward(
        self,
        x: Float[Tensor, "*batch d_in"],
        W: LinearBase,
        A: Tensor,
        B: Tensor,
        A0: Tensor,
        B0: Tensor,
    ) -> Float[Tensor, "*batch d_out"]:
        v = W.dropout(x, self.dropout)
        return add_low_rank_change(W, x, A, B, A0, B0, self.s, v)
