"""HRA."""

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase, at_least_float32
from lora_lite.ops.low_rank import turn_low_rank
from lora_lite.ops.reflections import reflections
from lora_lite.variant import ParamSpec, Stats, Variant, kaiming_uniform, whole


class HRA(Variant):
    """Reflect the input r times: y = W (H_0 ⋯ H_{r−1} x) + b, H_i = I − 2 u_i u_iᵀ.

    Yuan, Liu & Xu 2024, arXiv:2405.17484, §3.1 eq. 1, §3.4 eq. 6; u_i = U_i/‖U_i‖, columns of U.
    strict is their λ = ∞: R = I − 2 Q Qᵀ, Q = GramSchmidt(U).

    Start: the identity bit for bit: columns come in equal pairs, whose reflections cancel. With
    paired=False, and with strict in any case, they are independent, and the start is elsewhere.
    Shapes: U (d_in, r); r·d_in parameters.
    Differs: 1. the paper tells of no start; the pairs are the authors' code's.
    """

    r: int = 8
    strict: bool = False
    lambda_orth: float = 0.0
    paired: bool = True

    casts = False

    U: Float[Tensor, "d_in r"] = ParamSpec()

    def validate(self) -> None:
        if self.starts_as_identity() and self.r % 2:
            raise ValueError(f"r={self.r} is odd and has no pairs; use an even r or paired=False")
        if self.lambda_orth < 0 or (self.strict and self.lambda_orth):
            need = "be 0 with strict, which has orthogonal columns" if self.strict else "be ≥ 0"
            raise ValueError(f"lambda_orth={self.lambda_orth} must {need}")

    def check(self, d_in: int, d_out: int) -> None:
        if self.r > d_in:
            raise ValueError(f"has in_features={d_in}, fewer than r={self.r}; use r ≤ {d_in}")

    def check_tensors(self, d_in: int, d_out: int, U: Tensor) -> None:
        if zero := [i for i, column in enumerate(U.T) if not column.any()]:
            raise ValueError(f"has a zero column ({zero[0]}) in U, which is no direction")

    def starts_as_identity(self) -> bool:
        return self.paired and not self.strict

    def init(
        self, W: LinearBase, generator: torch.Generator, stats: Stats | None
    ) -> dict[str, Tensor]:
        copies = 2 if self.starts_as_identity() else 1
        columns = kaiming_uniform((W.d_in, self.r // copies), generator)
        return dict(U=columns.repeat_interleave(copies, 1))

    def prepare(self, W: LinearBase, U: Tensor) -> dict[str, Tensor]:
        if self.strict:
            Q = torch.linalg.qr(U).Q
            return dict(A=Q.T, B=-2 * Q)
        return dict(zip("AB", reflections(U)))

    def forward(
        self, x: Float[Tensor, "*batch d_in"], W: LinearBase, A: Tensor, B: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        return W(turn_low_rank(x, A, B))

    def regulariser(self, U: Tensor) -> Tensor | None:
        """λ ‖I − uᵀu‖_F², §3.4 eq. 6."""
        if not self.lambda_orth:
            return None
        U = at_least_float32(whole(U))
        u = U / U.norm(dim=0)
        eye = torch.eye(self.r, dtype=u.dtype, device=u.device)
        return self.lambda_orth * (eye - u.T @ u).square().sum()
