"""JORA."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.blocks import block_columns
from lora_lite.ops.energy import ecd_tanh, oer_softmax
from lora_lite.ops.givens import givens_tables, random_pairs, rotate
from lora_lite.ops.low_rank import low_rank
from lora_lite.variant import ParamSpec, Stats, Variant, zeros

LEFT = dict(when=lambda v: v.left)
RIGHT = dict(when=lambda v: v.right)
CORE = dict(lr=lambda v: float(v.lr_core > 0))
THETA = dict(lr=lambda v: v.lr_theta / (v.lr_core or 1), decay=False)
SELECTED = ("selective", "coupled")


class JORA(Variant):
    """Joint orthogonal rotation adaptation: y = s ⊙ (W x + Δ) + b, Δ = clip(R_Lᵀ C R_R x).

    R_L, R_R rotate disjoint pairs of coordinates (Givens; φ = 2 atan(θ/2) or θ), C is a small core:
    diag, block, lowrank (σ A Bᵀ), or on a support U of coordinates selective, R_Lᵀ D R_R x − P_U x
    with D = 1 + delta on U, and coupled, with I₂ + M on pairs of U. s redistributes row energy at
    constant Σ (s_i ‖w_i‖)²: oer_softmax or ecd_tanh, on the output or on Δ.

    The JORA tuner and its experiment design (no paper); docs/reviews/jora.md has the sources.

    Start: the identity bit for bit with zero_init_core (C = 0, and s = 1 at g_mag = 0); selective
    and coupled only with theta_init_std = 0.
    Shapes: theta (S,) a side, S clipped to d//2; d (q,), q = min(d_in, d_out); blocks, rem; A, B;
    delta (2k,); M (k, 2, 2); g_mag (d_out,).
    Differs: from the public code, 1. k counts active pairs of both sides, S their slots. 2. g_mag is
    an offset from the identity. 3. The bias is not scaled. 4. Merging is exact. 5. max_angle works.
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
        zeros,
        when=lambda v: v.magnitude != "none",
        lr=lambda v: v.magnitude_lr_scale,
        decay=False,
    )
    pairs_L: Int64[Tensor, "s_L 2"] = ParamSpec(trainable=False, **LEFT)
    pairs_R: Int64[Tensor, "s_R 2"] = ParamSpec(trainable=False, **RIGHT)
    active_L: Bool[Tensor, "s_L"] = ParamSpec(trainable=False, **LEFT)
    active_R: Bool[Tensor, "s_R"] = ParamSpec(trainable=False, **RIGHT)
    support: Int64[Tensor, "2*k"] = ParamSpec(trainable=False, when=lambda v: v.core in SELECTED)
    row_norm: Float[Tensor, "d_out"] = ParamSpec(
        trainable=False, saved=False, when=lambda v: v.magnitude != "none"
    )

    @property
    def left(self) -> bool:
        return self.S_L > 0 and self.single_sided != "right"

    @property
    def right(self) -> bool:
        return self.S_R > 0 and self.single_sided != "left"

    @property
    def base_lr(self) -> float:
        return self.lr_core or 1.0

    def validate(self) -> None:
        for name in ("S_L", "S_R", "k", "max_angle", "theta_init_std", "lr_theta", "lr_core"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be ≥ 0")
        for name in ("oer_temperature", "ecd_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if abs(self.ecd_alpha) >= 1:
            raise ValueError(f"ecd_alpha={self.ecd_alpha} must be in (−1, 1): a row would vanish")
        if self.core in SELECTED and (self.clip, self.magnitude) != ("none", "none"):
            raise ValueError(f"core={self.core!r} goes with clip='none' and magnitude='none' only")

    def sizes(self, d_in: int, d_out: int) -> dict[str, int]:
        return dict(
            q=min(d_in, d_out),
            s_L=min(self.S_L, d_out // 2) if self.left else 0,
            s_R=min(self.S_R, d_in // 2) if self.right else 0,
        )

    def check(self, d_in: int, d_out: int) -> None:
        slots = self.sizes(d_in, d_out)
        if self.core in SELECTED and d_in != d_out:
            raise ValueError(f"is {d_out}×{d_in}, and core={self.core!r} needs a square layer")
        if self.k > (room := slots["s_L"] + slots["s_R"]) > 0:
            raise ValueError(f"has room for {room} pairs in all, fewer than k={self.k}; lower k")

    def active_pairs(self, d_in: int, d_out: int) -> tuple[int, int]:
        """How many pairs turn on the left and on the right."""
        slots = self.sizes(d_in, d_out)
        s_L, s_R = slots["s_L"], slots["s_R"]
        if self.selection == "none" or self.k == 0:
            return s_L, s_R
        S_L, S_R = self.left * self.S_L, self.right * self.S_R
        k_L = self.k * S_L // max(S_L + S_R, 1)
        k_L, k_R = min(max(k_L, 1), s_L), min(max(self.k - k_L, 1), s_R)
        return k_L, k_R

    def starts_as_identity(self) -> bool:
        if self.core in SELECTED:
            return self.theta_init_std == 0 or not (self.left or self.right)
        return self.zero_init_core

    def init(
        self, W: LinearBase, generator: torch.Generator, stats: Stats | None
    ) -> dict[str, Tensor]:
        n, m, shapes = W.d_out, W.d_in, self.shapes(W.d_in, W.d_out)
        std = self.core_init_std
        if std is None:
            std = 0.01 if self.core == "diag" else 0.1
        theta_std = self.theta_init_std
        if not self.force_random_rotation_init:
            theta_std = min(theta_std, 1e-3)
        stds = dict.fromkeys(("d", "blocks", "rem", "A"), 0 if self.zero_init_core else std)
        stds |= dict(B=std, theta_L=theta_std, theta_R=theta_std)
        out = {
            k: s * torch.randn(shapes[k], generator=generator)
            for k, s in stds.items()
            if k in shapes
        }
        used = []
        for side, dim, count in zip("LR", (n, m), self.active_pairs(m, n)):
            if f"pairs_{side}" in shapes:
                slots = shapes[f"theta_{side}"][0]
                pairs = random_pairs(dim, count, slots, generator)
                out |= {f"pairs_{side}": pairs, f"active_{side}": pairs[:, 0] >= 0}
                used.append(pairs[:count].flatten())
        if "support" in shapes:
            U = torch.cat([*used, torch.empty(0, dtype=torch.int64)]).unique()[: 2 * self.k]
            out["support"] = F.pad(U, (0, 2 * self.k - len(U)), value=-1)
        if self.magnitude != "none":
            out["row_norm"] = W.row_norms()
        return out

    def prepare(self, W: LinearBase, **t: Tensor) -> dict[str, Tensor]:
        out = {k: t[k] for k in ("d", "blocks", "rem", "A", "B", "delta", "M", "support") if k in t}
        for side, dim, sign in (("R", W.d_in, 1), ("L", W.d_out, -1)):  # R_L acts transposed
            if f"theta_{side}" in t:
                phi = self.angle(t[f"theta_{side}"])
                c, s, p = givens_tables(
                    t[f"pairs_{side}"], t[f"active_{side}"], phi.cos(), phi.sin(), dim
                )
                out |= {f"c_{side}": c, f"s_{side}": sign * s, f"p_{side}": p}
        if self.magnitude == "oer_softmax":
            out["s_1"] = oer_softmax(t["g_mag"], t["row_norm"], self.oer_temperature)
        elif self.magnitude == "ecd_tanh":
            out["s_1"] = ecd_tanh(t["g_mag"], t["row_norm"], self.ecd_temperature, self.ecd_alpha)
        return out

    def angle(self, theta: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        phi = 2 * torch.atan(theta / 2) if self.rotation_param == "cayley" else theta
        return self.max_angle * torch.tanh(phi / self.max_angle) if self.max_angle else phi

    def forward(
        self,
        x: Float[Tensor, "*batch d_in"],
        W: LinearBase,
        s_1: Tensor | None = None,
        **t: Tensor,
    ) -> Float[Tensor, "*batch d_out"]:
        # In float16 a rotation of finite x can pass 65504 by up to √2.
        half = x.dtype == torch.float16
        u = x / 2 if half else x
        if self.right:
            u = rotate(u, t["c_R"], t["s_R"], t["p_R"])
        Δ = self.core_product(u, W.d_out, t)
        if self.left:
            Δ = rotate(Δ, t["c_L"], t["s_L"], t["p_L"])
        Δ = 2 * Δ if half else Δ
        if self.core in SELECTED:
            Δ = Δ - x * on_support(t["support"], torch.ones_like(t["support"]), W.d_in).to(x.dtype)
        if self.clip == "tanh":
            Δ = torch.tanh(Δ)
        z = W(x)
        if s_1 is None:
            return z + Δ
        return z + Δ + s_1 * (Δ if self.magnitude_on == "delta" else W.less_bias(z) + Δ)

    def core_product(
        self, u: Float[Tensor, "*batch d_in"], n: int, t: dict[str, Tensor]
    ) -> Float[Tensor, "*batch {n}"]:
        """C u."""
        if self.core == "lowrank":
            alpha = self.lowrank_r if self.lowrank_alpha is None else self.lowrank_alpha
            return low_rank(u, t["B"].T, t["A"], core=alpha / self.lowrank_r)
        if self.core == "selective":
            return u * on_support(t["support"], 1 + t["delta"], n)
        if self.core == "coupled":
            ij = t["support"].view(-1, 2)
            y_ij = torch.einsum("pij,...pj->...pi", t["M"], u[..., ij]) + u[..., ij]
            y_ij = torch.where(ij >= 0, y_ij, 0)
            return torch.zeros_like(u).index_add(-1, ij.flatten() % n, y_ij.flatten(-2))
        if self.core == "diag":
            z = t["d"] * u[..., : len(t["d"])]
        else:
            blocked, rest = t["blocks"].shape[0] * self.block_size, len(t["rem"])
            z = torch.cat(
                [
                    block_columns(u[..., :blocked], t["blocks"]),
                    t["rem"] * u[..., blocked : blocked + rest],
                ],
                dim=-1,
            )
        return F.pad(z, (0, n - z.shape[-1]))


def on_support(
    support: Int64[Tensor, " K"], values: Shaped[Tensor, " K"], d: int
) -> Shaped[Tensor, " {d}"]:
    """A vector of d with the values at the support's indices and zeros elsewhere; −1 is no index."""
    return values.new_zeros(d + 1).scatter(0, support % (d + 1), values)[:d]
