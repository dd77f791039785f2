"""AntiPaSTO with rotations of the singular basis."""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.cores import Core, turned_shift
from lora_lite.ops.low_rank import add_low_rank
from lora_lite.variant import ParamSpec, Stats, divisors, zeros
from lora_lite.variants._singular_basis import SingularBasis


class AntiPaSTORot(SingularBasis, name="antipasto_rot"):
    """Shift singular values, rotate singular vectors: W' = W + U (R_Uᵀ diag(S+δ) R_V − diag(S)) Vᵀ.

    Clark 2026, arXiv:2601.07473, §3.4 eq. 4, App. A.5 eqs. 6–8, at α = 1. R_U, R_V are
    block-diagonal Cayley rotations R = (I − X)⁻¹(I + X), X = ½ L tanh(A/L), A = ½(P − Pᵀ),
    L = 2 tan(θ_max/2).

    Start: δ ~ N(4e-4, (4e-4)²) as published, near the identity; δ = 0 (`delta_init_mean=0,
    delta_init_std=0`) is the identity bit for bit.
    Shapes: delta_s (r,), rot_T and rot_T_u (r/b, b(b−1)/2): P's strict upper triangle, row-major.
    Differs: 1. the two rotations and the shift act as one small block-diagonal core on r
    coordinates, W intact. 2. The sign of the rotation is the code's, the inverse of eq. 7.
    3. max_rotation_angle bounds each plane's entry, and so the angle itself for block_size=2 only.
    4. Blocks, and rotations of U ("U", "both"), are the code's; the paper rotates V, undivided.
    """

    block_size: int = 4
    max_rotation_angle: float = 0.5
    rotate_basis: Literal["V", "U", "both", "none"] = "V"
    delta_init_mean: float = 4e-4
    delta_init_std: float = 4e-4

    delta_s: Float[Tensor, "r"] = ParamSpec()
    rot_T: Float[Tensor, "r//block_size block_size*(block_size-1)//2"] = ParamSpec(
        zeros, when=lambda v: v.rotate_basis != "none"
    )
    rot_T_u: Float[Tensor, "r//block_size block_size*(block_size-1)//2"] = ParamSpec(
        zeros, when=lambda v: v.rotate_basis == "both"
    )

    def validate(self) -> None:
        if not 0 < self.max_rotation_angle < math.pi:
            raise ValueError(f"max_rotation_angle={self.max_rotation_angle} must be in (0, π)")
        if self.delta_init_std < 0:
            raise ValueError(f"delta_init_std={self.delta_init_std} must be ≥ 0")
        if self.rotate_basis != "none" and (self.block_size < 2 or self.r % self.block_size):
            raise ValueError(
                f"r={self.r} must be a multiple of block_size={self.block_size} ≥ 2; "
                f"use {divisors(self.r)}"
            )

    def starts_as_identity(self) -> bool:
        return self.delta_init_mean == self.delta_init_std == 0

    def init(
        self, W: LinearBase, generator: torch.Generator, stats: Stats | None
    ) -> dict[str, Tensor]:
        noise = torch.randn(self.r, generator=generator)
        delta_s = self.delta_init_mean + self.delta_init_std * noise
        return dict(super().init(W, generator, stats), delta_s=delta_s)

    def prepare(
        self,
        W: LinearBase,
        U: Tensor,
        S: Tensor,
        Vh: Tensor,
        delta_s: Tensor,
        rot_T: Tensor | None = None,
        rot_T_u: Tensor | None = None,
    ) -> dict[str, Tensor]:
        if rot_T is None:
            return dict(U=U, Vh=Vh, core=delta_s)
        P_U, P_V = (rot_T, None) if self.rotate_basis == "U" else (rot_T_u, rot_T)
        L = 2 * math.tan(self.max_rotation_angle / 2)
        return dict(U=U, Vh=Vh, core=turned_shift(S, delta_s, P_U, P_V, self.block_size, L))

    def forward(
        self, x: Float[Tensor, "*batch d_in"], W: LinearBase, U: Tensor, Vh: Tensor, core: Core
    ) -> Float[Tensor, "*batch d_out"]:
        return add_low_rank(W, x, Vh, U, core)
