"""JORA."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.blocks import block_columns
from lora_lite.ops.energy import ecd_tanh, oer_softmax
from lora_lite.ops.givens import apply_pairs, pair_tables, random_pairs, rotations
from lora_lite.ops.low_rank import low_rank
from lora_lite.variant import ParamSpec, Stats, Variant, zeros

SELECTED = ("selective", "coupled")
REFERENCE_LR = 0.01

LEFT = dict(when=lambda v: "L" in v.sides)
RIGHT = dict(when=lambda v: "R" in v.sides)
THETA = dict(lr=lambda v: v.lr_theta / v.base_lr, decay=False)
CORE = dict(lr=lambda v: v.lr_core / v.base_lr)
MAGNITUDE = dict(when=lambda v: v.magnitude != "none")


class JORA(Variant):
    """Joint orthogonal rotation adaptation: y = s ⊙ (W x + Δ) + b, Δ = clip(R_Lᵀ C R_R x).

    R_L, R_R turn disjoint pairs of coordinates by φ = 2 atan(θ/2), or θ. The core C is diag(d);
    block, blocks then rem on the diagonal; lowrank, σ A Bᵀ; or, on the support U that the pairs
    make up, selective, Δ = R_Lᵀ D R_R x − P_U x with D = 1 + delta, and coupled, where D is I₂ + M
    on each pair. s moves energy between rows at constant Σ (s_i ‖w_i‖)², by oer_softmax or
    ecd_tanh; on Δ alone, y = W x + b + s ⊙ Δ.

    The JORA tuner's README and experiment design; there is no paper. docs/reviews/jora.md.

    Start: the identity bit for bit with zero_init_core, since C = 0 and g_mag = 0 makes s = 1;
    selective and coupled with theta_init_std = 0.
    Shapes: theta (S,) a side, S at most d_side//2; d (q,), q = min(d_in, d_out); blocks (q//b, b,
    b), rem (q mod b,); A (d_out, r), B (d_in, r); delta (2k,); M (k, 2, 2); g_mag (d_out,).
    Differs: from its code, 1. k counts the active pairs of both sides, S their slots. 2. g_mag is
    an offset from the identity at every temperature. 3. The bias is not scaled. 4. max_angle acts.
    5. coupled subtracts P_U x. 6. W' is exact for every core, and refused with clip="tanh".
    """

    S_L: int = 32
    S_R: int = 32
    k: int = 8
    rotation_param: Literal["cayley", "angle"] = "cayley"
    max_angle: float = 0.0
    theta_init_std: float = 0.02
    force_random_rotation_init: bool = True
    single_sided: Literal["none", "left", "right"] = "none"
    selection: Literal["random", "none"] = "random"
    core: Literal["diag", "block", "lowrank", "selective", "coupled"] = "diag"
    block_size: int = 4
    lowrank_r: int = 8
    lowrank_alpha: float | None = None
    zero_init_core: bool = True
    core_init_std: float | None = None
    clip: Literal["none", "tanh"] = "none"
    magnitude: Literal["none", "ecd_tanh", "oer_softmax"] = "oer_softmax"
    magnitude_on: Literal["output", "delta"] = "output"
    oer_temperature: float = 1.0
    ecd_temperature: float = 1.0
    ecd_alpha: float = 0.5
    lr_theta: float = 0.05
    lr_core: float = 0.01
    magnitude_lr_scale: float = 1.0

    theta_L: Float[Tensor, "s_L"] = ParamSpec(**LEFT, **THETA)
    theta_R: Float[Tensor, "s_R"] = ParamSpec(**RIGHT, **THETA)
    d: Float[Tensor, "q"] = ParamSpec(when=lambda v: v.core == "diag", **CORE)
    blocks: Float[Tensor, "q//block_size block_size block_size"] = ParamSpec(
        when=lambda v: v.core == "block", **CORE
    )
    rem: Float[Tensor, "q%block_size"] = ParamSpec(when=lambda v: v.core == "block", **CORE)
    A: Float[Tensor, "d_out lowrank_r"] = ParamSpec(when=lambda v: v.core == "lowrank", **CORE)
    B: Float[Tensor, "d_in lowrank_r"] = ParamSpec(when=lambda v: v.core == "lowrank", **CORE)
    delta: Float[Tensor, "2*k"] = ParamSpec(zeros, when=lambda v: v.core == "selective", **CORE)
    M: Float[Tensor, "k 2 2"] = ParamSpec(zeros, when=lambda v: v.core == "coupled", **CORE)
    g_mag: Float[Tensor, "d_out"] = ParamSpec(
        zeros, lr=lambda v: v.magnitude_lr_scale, decay=False, **MAGNITUDE
    )
    pairs_L: Int64[Tensor, "s_L 2"] = ParamSpec(trainable=False, **LEFT)
    pairs_R: Int64[Tensor, "s_R 2"] = ParamSpec(trainable=False, **RIGHT)
    active_L: Bool[Tensor, "s_L"] = ParamSpec(trainable=False, **LEFT)
    active_R: Bool[Tensor, "s_R"] = ParamSpec(trainable=False, **RIGHT)
    support: Int64[Tensor, "2*k"] = ParamSpec(trainable=False, when=lambda v: v.core in SELECTED)
    row_norm: Float[Tensor, "d_out"] = ParamSpec(trainable=False, saved=False, **MAGNITUDE)

    def validate(self) -> None:
        least = dict.fromkeys(("S_L", "S_R", "k", "max_angle", "theta_init_std"), 0)
        least |= dict.fromkeys(("lr_theta", "lr_core", "magnitude_lr_scale"), 0)
        least |= dict(block_size=1, lowrank_r=1)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)} must be ≥ {bound}")
        for name in ("oer_temperature", "ecd_temperature", "core_init_std"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if abs(self.ecd_alpha) >= 1:
            raise ValueError(f"ecd_alpha={self.ecd_alpha} must be in (−1, 1): a row would vanish")
        if self.core in SELECTED and (self.clip, self.magnitude) != ("none", "none"):
            raise ValueError(f"core={self.core!r} goes with clip='none' and magnitude='none' only")

    def check(self, d_in: int, d_out: int) -> None:
        room, active = sum(self.slots(d_in, d_out)), sum(self.active_pairs(d_in, d_out))
        if self.k > room > 0:
            raise ValueError(f"has room for {room} pairs in all, fewer than k={self.k}; lower k")
        if self.core in SELECTED and d_in != d_out:
            raise ValueError(f"is {d_out}×{d_in}, and core={self.core!r} needs a square layer")
        if self.core in SELECTED and active != self.k:
            raise ValueError(
                f"has {active} active pairs, and core={self.core!r} needs k={self.k}; "
                "use selection='random', S_L or S_R above 0, and k ≥ 2 with both"
            )

    @property
    def sides(self) -> str:
        """Which sides rotate: "LR", "L", "R" or none."""
        left = self.S_L > 0 and self.single_sided != "right"
        right = self.S_R > 0 and self.single_sided != "left"
        return "L" * left + "R" * right

    def slots(self, d_in: int, d_out: int) -> tuple[int, int]:
        """How many pairs the left and the right hold."""
        s_L, s_R = min(self.S_L, d_out // 2), min(self.S_R, d_in // 2)
        return s_L * ("L" in self.sides), s_R * ("R" in self.sides)

    def active_pairs(self, d_in: int, d_out: int) -> tuple[int, int]:
        """How many pairs turn on the left and on the right: k in all, shared as S_L to S_R, at
        least one a side; all of them where none is ever selected."""
        s_L, s_R = self.slots(d_in, d_out)
        if self.selection == "none" or self.k == 0:
            return s_L, s_R
        k_L = self.k * self.S_L // max(self.S_L + self.S_R, 1)
        k_L = min(max(k_L, self.k - s_R, 1), s_L)
        return k_L, min(max(self.k - k_L, 1), s_R)

    def sizes(self, d_in: int, d_out: int) -> dict[str, int]:
        s_L, s_R = self.slots(d_in, d_out)
        return dict(q=min(d_in, d_out), s_L=s_L, s_R=s_R)

    @property
    def base_lr(self) -> float:
        """The core's and the magnitude's rate, which makes θ's lr_theta."""
        return self.lr_core or REFERENCE_LR

    def starts_as_identity(self) -> bool:
        if self.core in SELECTED:
            return self.theta_init_std == 0
        return self.zero_init_core

    def nonlinear(self) -> str | None:
        return "clip='tanh' is not linear in x" if self.clip == "tanh" else None

    def init(
        self, W: LinearBase, generator: torch.Generator, stats: Stats | None
    ) -> dict[str, Tensor]:
        shapes = self.shapes(W.d_in, W.d_out)
        theta = self.theta_init_std
        theta = theta if self.force_random_rotation_init else min(theta, 1e-3)
        core = self.core_init_std or (0.01 if self.core == "diag" else 0.1)
        stds = dict.fromkeys(("theta_L", "theta_R"), theta) | dict(B=core)
        stds |= dict.fromkeys(("d", "blocks", "rem", "A"), 0.0 if self.zero_init_core else core)
        out = {
            key: std * torch.randn(shapes[key], generator=generator)
            for key, std in stds.items()
            if key in shapes
        }
        turning = []
        for side, d, k in zip("LR", (W.d_out, W.d_in), self.active_pairs(W.d_in, W.d_out)):
            if side in self.sides:
                pairs = random_pairs(d, k, len(out[f"theta_{side}"]), generator)
                out |= {f"pairs_{side}": pairs, f"active_{side}": pairs[:, 0] >= 0}
                turning.append(pairs[:k])
        if self.core in SELECTED:
            out["support"] = first_seen(torch.cat(turning).flatten())
        if self.magnitude != "none":
            out["row_norm"] = W.row_norms()
        return out

    def prepare(self, W: LinearBase, **t: Tensor) -> dict[str, Tensor]:
        out = {key: t[key] for key in ("d", "blocks", "rem", "A", "B") if key in t}
        for side, d in zip("LR", (W.d_out, W.d_in)):
            if side in self.sides:
                pairs = torch.where(t[f"active_{side}"][:, None], t[f"pairs_{side}"], -1)
                R = rotations(self.phi(t[f"theta_{side}"]))
                out |= named(side, pair_tables(pairs, R, rest=1.0, d=d))
        if self.core in SELECTED:
            M = t["M"] if self.core == "coupled" else t["delta"].view(-1, 2).diag_embed()
            out |= named("M", pair_tables(t["support"].view(-1, 2), M, rest=0.0, d=W.d_in))
        if self.magnitude == "oer_softmax":
            out["s_1"] = oer_softmax(t["g_mag"], t["row_norm"], self.oer_temperature)
        elif self.magnitude == "ecd_tanh":
            out["s_1"] = ecd_tanh(t["g_mag"], t["row_norm"], self.ecd_temperature, self.ecd_alpha)
        return out

    def phi(self, theta: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """The angle of θ, in radians."""
        phi = 2 * torch.atan(theta / 2) if self.rotation_param == "cayley" else theta
        return self.max_angle * torch.tanh(phi / self.max_angle) if self.max_angle else phi

    def forward(
        self, x: Float[Tensor, "*batch d_in"], W: LinearBase, **t: Tensor
    ) -> Float[Tensor, "*batch d_out"]:
        # In float16 a rotation can carry finite coordinates past 65504, by √2 at most.
        half = x.dtype == torch.float16
        Δ = 2 * self.update(x / 2, W.d_out, **t) if half else self.update(x, W.d_out, **t)
        if self.clip == "tanh":
            Δ = torch.tanh(Δ)
        y = W(x) + Δ
        if self.magnitude == "none":
            return y
        if self.magnitude_on == "delta":
            return y + t["s_1"] * Δ
        # Not s_1 ⊙ (y − b): the difference can pass 65504 where y does not.
        y = y + t["s_1"] * y
        return y if W.bias is None else y - t["s_1"] * W.bias.to(y.dtype)

    def update(
        self, x: Float[Tensor, "*batch d_in"], n: int, **t: Tensor
    ) -> Float[Tensor, "*batch {n}"]:
        """R_Lᵀ C R_R x."""
        u = apply_pairs(x, t["c_R"], t["s_R"], t["p_R"]) if "R" in self.sides else x
        if self.core in SELECTED:
            # R_Lᵀ D R_R x − P_U x, free of cancellation: D = P_U + δ, and outside U nothing turns.
            v = apply_pairs(x, t["c_L"], t["s_L"], t["p_L"]) if "L" in self.sides else x
            z = apply_pairs(u, t["c_M"], t["s_M"], t["p_M"]) + (u - v)
        else:
            z = self.core_product(u, n, **t)
        return apply_pairs(z, t["c_L"], -t["s_L"], t["p_L"]) if "L" in self.sides else z

    def core_product(
        self, u: Float[Tensor, "*batch d_in"], n: int, **t: Tensor
    ) -> Float[Tensor, "*batch {n}"]:
        """C u."""
        if self.core == "lowrank":
            alpha = self.lowrank_r if self.lowrank_alpha is None else self.lowrank_alpha
            return low_rank(u, t["B"].T, t["A"], core=alpha / self.lowrank_r)
        if self.core == "diag":
            z = t["d"] * u[..., : len(t["d"])]
        else:
            blocks, rem = t["blocks"], t["rem"]
            blocked = len(blocks) * self.block_size
            parts = u[..., : blocked + len(rem)].split([blocked, len(rem)], dim=-1)
            z = torch.cat([block_columns(parts[0], blocks), rem * parts[1]], dim=-1)
        return F.pad(z, (0, n - z.shape[-1]))


def first_seen(index: Int64[Tensor, " K"]) -> Int64[Tensor, " K"]:
    """−1 in place of whatever stood earlier."""
    return index.masked_fill((index[:, None] == index).tril(-1).any(1), -1)


def named(suffix: str, tables: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    return {f"{letter}_{suffix}": table for letter, table in zip("csp", tables)}
