"""JORA."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.energy import ecd_tanh, oer_softmax
from lora_lite.ops.givens import apply_pairs, pair_tables, rotation_tables, turned_back
from lora_lite.ops.low_rank import add_low_rank, low_rank, scaled_add_low_rank
from lora_lite.ops.rotated import add_rotated, rotated, scaled
from lora_lite.variant import ParamSpec, Stats, Step, nearest, zeros
from lora_lite.variants._selected_rotations import SelectedRotations

SELECTED = ("selective", "coupled")
CORES = ("d", "blocks", "rem", "A")
REFERENCE_LR = 0.01

CORE = dict(lr=lambda v: v.lr_core / v.base_lr)
MAGNITUDE = dict(when=lambda v: v.magnitude != "none")


class JORA(SelectedRotations):
    """Joint orthogonal rotation adaptation: y = s ⊙ (W x + Δ) + b, Δ = clip(R_Lᵀ C R_R x).

    R_L, R_R turn disjoint pairs of coordinates by φ = 2 atan(θ/2), or θ: k pairs, chosen by their
    energy for the S_L + S_R slots every update_interval optimizer steps (SelectedRotations). The
    core C is diag(d); block, blocks then rem on the diagonal; lowrank, σ A Bᵀ; or, on the support U
    that the pairs make up, selective, Δ = R_Lᵀ D R_R x − P_U x with D = 1 + delta, and coupled,
    where D is I₂ + M on each pair. s moves energy between rows at constant Σ (s_i ‖w_i‖)², by
    oer_softmax or ecd_tanh; on Δ alone, y = W x + b + s ⊙ Δ.

    The JORA tuner's README and experiment design; there is no paper. docs/reviews/jora.md.

    Start: the identity bit for bit with zero_init_core, since C = 0 and g_mag = 0 makes s = 1;
    selective and coupled with t_stat or theta_init_std = 0.
    Shapes: theta (S,) a side, S at most d_side//2; d (q,), q = min(d_in, d_out); blocks (q//b, b,
    b), rem (q mod b,); A (d_out, r), B (d_in, r); delta (2k,); M (k, 2, 2); g_mag (d_out,).
    Differs: from its code, 1. k counts the active pairs of both sides, S their slots. 2. g_mag is
    an offset from the identity at every temperature. 3. The bias is not scaled. 4. max_angle acts.
    5. coupled subtracts P_U x. 6. W' is exact for every core, and refused with clip="tanh". 7. The
    energies of output gradients are gathered, and all ranks choose alike. 8. Exactly k disjoint
    pairs are chosen. 9. An angle belongs to its pair, not to the slot. 10. Schedules count
    optimizer steps. 11. random pairs stay. 12. Gumbel noise joins log E.
    """

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
    ecd_temp_annealing: bool = False
    ecd_temp_start: float = 5.0
    ecd_temp_end: float = 1.0
    lr_core: float = 0.01
    magnitude_lr_scale: float = 1.0

    casts = False

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
    support: Int64[Tensor, "2*k"] = ParamSpec(trainable=False, when=lambda v: v.core in SELECTED)
    row_norm: Float[Tensor, "d_out"] = ParamSpec(trainable=False, saved=False, **MAGNITUDE)
    temperature: Float32[Tensor, ""] = ParamSpec(trainable=False, when=lambda v: v.anneals)

    @classmethod
    def recipe(cls, *names: str, **hyperparameters: Any) -> "JORA":
        """A named setting, or several put together: JORA.recipe("paper", "no_rotation").

        Raises: KeyError with the nearest names for an unknown one.
        """
        settings: dict[str, Any] = {}
        for name in names:
            if name not in RECIPES:
                raise KeyError(f"{cls.name} has no recipe {name!r}; {nearest(name, RECIPES)}")
            settings |= RECIPES[name]
        return cls(**(settings | hyperparameters))

    def validate(self) -> None:
        super().validate()
        least = dict(lr_core=0, magnitude_lr_scale=0, block_size=1, lowrank_r=1)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)} must be ≥ {bound}")
        temperatures = ("oer_temperature", "ecd_temperature", "ecd_temp_start", "ecd_temp_end")
        for name in (*temperatures, "core_init_std"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if abs(self.ecd_alpha) >= 1:
            raise ValueError(f"ecd_alpha={self.ecd_alpha} must be in (−1, 1): a row would vanish")
        if self.core in SELECTED and (self.clip, self.magnitude) != ("none", "none"):
            raise ValueError(f"core={self.core!r} goes with clip='none' and magnitude='none' only")
        if self.core in SELECTED and self.observes and not self.t_stat:
            raise ValueError(
                f"core={self.core!r} belongs to pairs that stay; use t_stat ≥ 1, the steps after "
                "which they are chosen for good, or selection='random'"
            )

    def check(self, d_in: int, d_out: int) -> None:
        super().check(d_in, d_out)
        active = sum(self.active_pairs(d_in, d_out))
        if self.core in SELECTED and d_in != d_out:
            raise ValueError(f"is {d_out}×{d_in}, and core={self.core!r} needs a square layer")
        if self.core in SELECTED and active != self.k:
            raise ValueError(
                f"has {active} active pairs, and core={self.core!r} needs k={self.k}; "
                "use another selection than 'none', S_L or S_R above 0, and k ≥ 2 with both"
            )

    def check_tensors(self, d_in: int, d_out: int, **t: Tensor) -> None:
        super().check_tensors(d_in, d_out, **t)
        if self.core in SELECTED and not torch.equal(
            t["support"], self.support_of(d_in, d_out, **t)
        ):
            raise ValueError("has a support that is not its pairs' coordinates")

    def sizes(self, d_in: int, d_out: int) -> dict[str, int]:
        return super().sizes(d_in, d_out) | dict(q=min(d_in, d_out))

    @property
    def anneals(self) -> bool:
        return self.ecd_temp_annealing and self.magnitude != "none"

    def scheduled(self) -> bool:
        return super().scheduled() or self.anneals

    def needs_total(self) -> str | None:
        return super().needs_total() or ("ecd_temp_annealing=True" if self.anneals else None)

    @property
    def base_lr(self) -> float:
        """The core's and the magnitude's rate, which makes θ's lr_theta."""
        return self.lr_core or REFERENCE_LR

    def starts_as_identity(self) -> bool:
        if self.core in SELECTED:
            return self.theta_init_std == 0 or self.t_stat > 0
        return self.zero_init_core

    def nonlinear(self) -> str | None:
        return "clip='tanh' is not linear in x" if self.clip == "tanh" else None

    def init(
        self, W: LinearBase, generator: torch.Generator, stats: Stats | None
    ) -> dict[str, Tensor]:
        shapes, out = self.shapes(W.d_in, W.d_out), super().init(W, generator, stats)
        std = self.core_init_std or (0.01 if self.core == "diag" else 0.1)
        stds = dict(B=std) | dict.fromkeys(CORES, 0.0 if self.zero_init_core else std)
        for key, std in stds.items():
            if key in shapes:
                out[key] = std * torch.randn(shapes[key], generator=generator)
        if self.core in SELECTED:
            out["support"] = self.support_of(W.d_in, W.d_out, **out)
        if self.magnitude != "none":
            out["row_norm"] = W.row_norms()
        if self.anneals:
            out["temperature"] = torch.tensor(self.ecd_temp_start)
        return out

    def support_of(self, d_in: int, d_out: int, **t: Tensor) -> Int64[Tensor, " 2*{self.k}"]:
        """The coordinates that turn, pair by pair and the left side's first; −1 where one would
        come again, and for pairs that are still to be chosen."""
        counts = zip("LR", self.active_pairs(d_in, d_out))
        index = torch.cat([t[f"pairs_{side}"][:k] for side, k in counts if k]).flatten()
        return index.masked_fill((index[:, None] == index).tril(-1).any(1), -1)

    def step(self, tensors: dict[str, Tensor], now: Step) -> None:
        super().step(tensors, now)
        if self.core in SELECTED and self.observes:
            d = len(tensors["ema_row" if "L" in self.sides else "ema_col"])
            tensors["support"].copy_(self.support_of(d, d, **tensors))
        if self.anneals:
            tensors["temperature"].fill_(self.annealed(now.number, now.total))

    def annealed(self, number: int, total: int) -> float:
        """The temperature after so many optimizer steps."""
        p = min(number / total, 1.0)
        return (1 - p) * self.ecd_temp_start + p * self.ecd_temp_end

    def prepare(self, W: LinearBase, **t: Tensor) -> dict[str, Any]:
        out: dict[str, Any] = dict.fromkeys(("L", "R", "s_1"))
        out |= self.rotations(W.d_in, W.d_out, **t)
        if self.magnitude != "none":
            out["s_1"] = self.scale(**t)
        if self.core == "lowrank":
            # R_Lᵀ A and R_Rᵀ B: rotated factors in place of rotated activations.
            for key, side in (("A", "L"), ("B", "R")):
                out[key] = turned_back(t[key], out[side])
        elif self.core in SELECTED:
            M = t["M"] if self.core == "coupled" else t["delta"].view(-1, 2).diag_embed()
            out["M"] = pair_tables(t["support"].view(-1, 2), M, rest=0.0, d=W.d_in)
            out |= {side: rotation_tables(out[side]) for side in self.sides}
        elif self.core == "diag":
            out["C"] = t["d"]
        else:
            rem, b = t["rem"], self.block_size
            rem = F.pad(torch.diag(rem), (0, b - len(rem))) if len(rem) else rem.view(0, b)
            out["C"] = torch.cat([t["blocks"].flatten(0, 1), rem])
        return out

    def scale(self, g_mag: Tensor, row_norm: Tensor, **t: Tensor) -> Float[Tensor, " d_out"]:
        """s − 1."""
        if self.magnitude == "oer_softmax":
            return oer_softmax(g_mag, row_norm, t.get("temperature", self.oer_temperature))
        T = t.get("temperature", self.ecd_temperature)
        return ecd_tanh(g_mag, row_norm, T, self.ecd_alpha)

    def diagnose(self, W: LinearBase, **t: Tensor) -> dict[str, float | list[float]]:
        """energy_error: |Σ m_i² − E|/E of the rows' norms m_i = s_i ‖w_i‖."""
        out = super().diagnose(W, **t)
        if self.magnitude != "none":
            m, norms = (1 + self.scale(**t).double()) * t["row_norm"], t["row_norm"].double()
            E = norms.square().sum()
            out["energy_error"] = float((m.square().sum() - E).abs() / E) if E > 0 else 0.0
        if self.anneals:
            out["temperature"] = float(t["temperature"])
        return out

    def forward(
        self,
        x: Float[Tensor, "*batch d_in"],
        W: LinearBase,
        L: Any,
        R: Any,
        s_1: Tensor | None,
        **t: Any,
    ) -> Float[Tensor, "*batch d_out"]:
        on_output = self.magnitude_on == "output"
        if self.clip == "none" and self.core == "lowrank":
            if s_1 is not None and on_output:
                return scaled_add_low_rank(W, x, t["B"].T, t["A"], self.sigma, s_1)
            A = t["A"] if s_1 is None else t["A"] + s_1[:, None] * t["A"]
            return add_low_rank(W, x, t["B"].T, A, self.sigma)
        if self.clip == "none" and self.core in ("diag", "block"):
            return add_rotated(W, x, t["C"], L, R, s_1, on_output)
        Δ = self.update(x, W.d_out, L, R, **t)
        return scaled(W, W(x), torch.tanh(Δ) if self.clip == "tanh" else Δ, s_1, on_output)

    @property
    def sigma(self) -> float:
        """σ = α/r, 1 where α is None."""
        return 1.0 if self.lowrank_alpha is None else self.lowrank_alpha / self.lowrank_r

    def update(
        self, x: Float[Tensor, "*batch d_in"], n: int, L: Any, R: Any, **t: Any
    ) -> Float[Tensor, "*batch {n}"]:
        """R_Lᵀ C R_R x, of the selected cores − P_U x."""
        if self.core == "lowrank":
            return low_rank(x, t["B"].T, t["A"], self.sigma)
        if self.core in SELECTED:
            # R_Lᵀ D R_R x − P_U x, free of cancellation: D = P_U + δ, and outside U nothing turns.
            u, v = (apply_pairs(x, *side) if side else x for side in (R, L))
            z = apply_pairs(u, *t["M"]) + (u - v)
            return apply_pairs(z, L[0], -L[1], L[2]) if L else z
        return rotated(x, t["C"], L, R, n)


RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "readme": dict(zero_init_core=False, clip="tanh"),
    "paper": dict(
        S_L=96,
        S_R=96,
        k=24,
        max_angle=0.1,
        ema_beta=0.95,
        update_interval=50,
        zero_init_core=False,
        oer_temperature=2.0,
    ),
    "diag": dict(core="diag"),
    "block": dict(core="block"),
    "lowrank": dict(core="lowrank"),
    "selective": dict(core="selective", magnitude="none", t_stat=50),
    "coupled": dict(core="coupled", magnitude="none", t_stat=50),
    "no_rotation": dict(S_L=0, S_R=0),
    "left": dict(single_sided="left"),
    "right": dict(single_sided="right"),
    "full_static": dict(selection="none"),
    "random": dict(selection="random"),
    "one_shot": dict(t_stat=50),
    "no_magnitude": dict(magnitude="none"),
    "ecd": dict(magnitude="ecd_tanh"),
    "annealed": dict(ecd_temp_annealing=True),
}
RECIPES["design"] = RECIPES["paper"]
