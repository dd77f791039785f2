"""Rotations in chosen pairs of coordinates: slots, angles, energies and their schedule."""

from collections import defaultdict
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from lora_lite.base import LinearBase
from lora_lite.ops.givens import Rotation, angles, random_pairs
from lora_lite.ops.selection import (
    PAIRINGS,
    Squares,
    disjoint,
    ema_,
    explore,
    gumbel,
    moved_share,
    rebind,
)
from lora_lite.variant import Layer, ParamSpec, Stats, Step, Variant, whole, zeros

ENERGY = dict(L="ema_row", R="ema_col")

LEFT = dict(when=lambda v: "L" in v.sides)
RIGHT = dict(when=lambda v: "R" in v.sides)
LEFT_STATISTIC = dict(trainable=False, when=lambda v: v.observes and "L" in v.sides)
RIGHT_STATISTIC = dict(trainable=False, when=lambda v: v.observes and "R" in v.sides)
THETA = dict(lr=lambda v: v.lr_theta / v.base_lr, decay=False)


class SelectedRotations(Variant, abstract=True):
    """R_L, R_R turn disjoint pairs of output and of input coordinates by φ = 2 atan(θ/2), or θ.

    A side has S slots, each for a pair and its θ; of both sides' slots k turn, the first of each.
    Where selection is by energy (topk_ema: an average of x_i² on the right, of (dL/dy_i)² on the
    left), every update_interval optimizer steps the slots go to the pairs of the highest. A pair
    that stays keeps its slot and angle; one that enters starts from angle 0, also when it was there
    before, so that only what leaves moves the function. With t_stat none turns until that step, and
    those chosen then stay. random: k pairs from the seed, for good; none: all S, likewise.
    """

    S_L: int = 32
    S_R: int = 32
    k: int = 8
    rotation_param: Literal["cayley", "angle"] = "cayley"
    max_angle: float = 0.0
    theta_init_std: float = 0.02
    force_random_rotation_init: bool = True
    single_sided: Literal["none", "left", "right"] = "none"
    selection: Literal["topk_ema", "random", "none"] = "topk_ema"
    ema_beta: float = 0.98
    update_interval: int = 1
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    pairing_strategy: Literal["consecutive", "high_low"] = "consecutive"
    use_gumbel: bool = False
    gumbel_tau: float = 1.0
    t_stat: int = 0
    pairs_freeze_after_warmup: bool = False
    lr_theta: float = 0.05

    theta_L: Float[Tensor, "s_L"] = ParamSpec(**LEFT, **THETA)
    theta_R: Float[Tensor, "s_R"] = ParamSpec(**RIGHT, **THETA)
    pairs_L: Int64[Tensor, "s_L 2"] = ParamSpec(trainable=False, **LEFT)
    pairs_R: Int64[Tensor, "s_R 2"] = ParamSpec(trainable=False, **RIGHT)
    active_L: Bool[Tensor, "s_L"] = ParamSpec(trainable=False, **LEFT)
    active_R: Bool[Tensor, "s_R"] = ParamSpec(trainable=False, **RIGHT)
    ema_row: Float32[Tensor, "d_out"] = ParamSpec(zeros, averaged=True, **LEFT_STATISTIC)
    ema_col: Float32[Tensor, "d_in"] = ParamSpec(zeros, averaged=True, **RIGHT_STATISTIC)
    # Pairs that entered, pairs that left, and Σ of the share of the energy that leaving moved.
    churn_L: Float32[Tensor, "3"] = ParamSpec(zeros, **LEFT_STATISTIC)
    churn_R: Float32[Tensor, "3"] = ParamSpec(zeros, **RIGHT_STATISTIC)
    frozen: Bool[Tensor, ""] = ParamSpec(trainable=False, when=lambda v: v.freezes)

    def validate(self) -> None:
        least = dict.fromkeys(("S_L", "S_R", "k", "max_angle", "theta_init_std", "lr_theta"), 0)
        least |= dict(update_interval=1, warmup_steps=0, t_stat=0)
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"{name}={getattr(self, name)} must be ≥ {bound}")
        if self.gumbel_tau <= 0:
            raise ValueError(f"gumbel_tau={self.gumbel_tau} must be positive")
        if not 0 <= self.ema_beta < 1:
            raise ValueError(f"ema_beta={self.ema_beta} must be in [0, 1)")
        if not 0 <= self.warmup_ratio <= 1:
            raise ValueError(f"warmup_ratio={self.warmup_ratio} must be in [0, 1]")
        if self.t_stat and self.selection != "topk_ema":
            raise ValueError(
                f"t_stat={self.t_stat} gathers what selection='topk_ema' chooses by; the pairs of "
                f"{self.selection!r} are there from the start"
            )
        if self.t_stat and (self.warmup_steps or self.warmup_ratio):
            raise ValueError(
                f"t_stat={self.t_stat} is the warm-up itself; leave warmup_steps and warmup_ratio 0"
            )

    def check(self, d_in: int, d_out: int) -> None:
        room = sum(self.slots(d_in, d_out))
        if self.k > room > 0:
            raise ValueError(f"has room for {room} pairs in all, fewer than k={self.k}; lower k")

    def check_tensors(self, d_in: int, d_out: int, **t: Tensor) -> None:
        for side, d, k in zip("LR", (d_out, d_in), self.active_pairs(d_in, d_out)):
            if side in self.sides:
                pairs, active = t[f"pairs_{side}"], t[f"active_{side}"]
                if not disjoint(pairs, d):
                    raise ValueError(
                        f"has pairs_{side} that overlap or are not of coordinates 0 … {d - 1}"
                    )
                if (active & (pairs[:, 0] < 0)).any():
                    raise ValueError(f"has active_{side} at slots that hold no pair")
                if active[k:].any():
                    raise ValueError(
                        f"has active_{side} beyond its first {k} slots, where no pair turns"
                    )

    @property
    def sides(self) -> str:
        """Which sides rotate: "LR", "L", "R" or none."""
        left = self.S_L > 0 and self.single_sided != "right"
        right = self.S_R > 0 and self.single_sided != "left"
        return "L" * left + "R" * right

    @property
    def observes(self) -> bool:
        """Whether pairs are chosen by energy."""
        return self.selection == "topk_ema" and bool(self.k and self.sides)

    @property
    def warms_up(self) -> bool:
        """Whether fewer than k pairs turn at first."""
        grows = self.warmup_steps > 0 or self.warmup_ratio > 0
        return grows and self.selection != "none" and bool(self.k and self.sides)

    @property
    def freezes(self) -> bool:
        """Whether the pairs chosen by energy stay from some step on."""
        return self.observes and (self.t_stat > 0 or self.pairs_freeze_after_warmup)

    def scheduled(self) -> bool:
        return self.observes or self.warms_up

    def needs_total(self) -> str | None:
        by_ratio = self.warms_up and self.warmup_ratio > 0
        return f"warmup_ratio={self.warmup_ratio}" if by_ratio else None

    def slots(self, d_in: int, d_out: int) -> tuple[int, int]:
        """How many pairs the left and the right hold."""
        sides, s_L, s_R = self.sides, min(self.S_L, d_out // 2), min(self.S_R, d_in // 2)
        return s_L * ("L" in sides), s_R * ("R" in sides)

    def allowed(self, number: int, total: int | None) -> int:
        """How many pairs of both sides may turn after so many optimizer steps."""
        if not self.warms_up:
            return self.k
        if self.warmup_ratio and total is None:
            return 1
        steps = max(self.warmup_steps, int(self.warmup_ratio * (total or 0)))
        return max(1, self.k * min(number, steps) // steps) if steps else self.k

    def share(self, k: int, s_L: int, s_R: int) -> tuple[int, int]:
        """k pairs in all as S_L to S_R, at least one a side; every slot where none is selected."""
        if self.selection == "none" or self.k == 0:
            return s_L, s_R
        k_L = k * self.S_L // max(self.S_L + self.S_R, 1)
        k_L = min(max(k_L, k - s_R, 1), s_L)
        return k_L, min(max(k - k_L, 1), s_R)

    def active_pairs(self, d_in: int, d_out: int) -> tuple[int, int]:
        """How many pairs turn on the left and on the right once the warm-up is over."""
        return self.share(self.k, *self.slots(d_in, d_out))

    def sizes(self, d_in: int, d_out: int) -> dict[str, int]:
        s_L, s_R = self.slots(d_in, d_out)
        return dict(s_L=s_L, s_R=s_R)

    def init(
        self, W: LinearBase, generator: torch.Generator, stats: Stats | None
    ) -> dict[str, Tensor]:
        out, std = {}, self.theta_init_std
        std = std if self.force_random_rotation_init else min(std, 1e-3)
        slots = self.slots(W.d_in, W.d_out)
        held, turning = self.share(self.k, *slots), self.share(self.allowed(0, None), *slots)
        for i, (side, d) in enumerate(zip("LR", (W.d_out, W.d_in))):
            if side in self.sides:
                pairs = random_pairs(d, 0 if self.t_stat else held[i], slots[i], generator)
                active = (torch.arange(slots[i]) < turning[i]) & (pairs[:, 0] >= 0)
                theta = std * torch.randn(slots[i], generator=generator)
                out |= {f"theta_{side}": theta, f"pairs_{side}": pairs, f"active_{side}": active}
        return out | (dict(frozen=torch.tensor(False)) if self.freezes else {})

    def rotations(self, d_in: int, d_out: int, **t: Tensor) -> dict[str, Rotation]:
        """R_L and R_R, as "L" and "R"."""
        by, out = (self.rotation_param == "cayley", self.max_angle), {}
        k_L, k_R = self.active_pairs(d_in, d_out)
        if "theta_L" in t:
            out["L"] = Rotation(t["theta_L"], t["pairs_L"], t["active_L"], k_L, d_out, *by)
        if "theta_R" in t:
            out["R"] = Rotation(t["theta_R"], t["pairs_R"], t["active_R"], k_R, d_in, *by)
        return out

    def phi(self, theta: Float[Tensor, " S"]) -> Float[Tensor, " S"]:
        """The angle of θ, in radians."""
        return angles(theta, self.rotation_param == "cayley", self.max_angle)

    def observe(self, x: Tensor | Squares, g: Tensor | Squares, **t: Tensor) -> None:
        samples = [(t[ENERGY[side]], s) for side, s in (("L", g), ("R", x)) if side in self.sides]
        ema_(samples, self.ema_beta)

    def step(self, tensors: dict[str, Tensor], now: Step) -> None:
        if self.selection == "random" and self.warms_up and self.chooses_at(now.number):
            k = self.turning(tensors, now)
            for side in self.sides:
                active = tensors[f"active_{side}"]
                turns = torch.arange(len(active), device=active.device) < k[side]
                now.restart(tensors[f"theta_{side}"], turns & ~active)
                active.copy_(turns)

    @classmethod
    def step_all(cls, layers: list[Layer]) -> None:
        alike = defaultdict(list)
        for layer in layers:
            if layer.variant.observes and layer.variant.chooses_at(layer.step.number):
                shapes = tuple((t.shape, t.device) for t in layer.tensors.values())
                alike[layer.variant, shapes].append(layer)
        for (variant, _), group in alike.items():
            variant.select(group)
        super().step_all(layers)

    def chooses_at(self, number: int) -> bool:
        # What t_stat found without energies is tried again after as many steps.
        return number % (self.t_stat or self.update_interval) == 0

    def turning(self, t: dict[str, Tensor], now: Step) -> dict[str, int]:
        """How many pairs of each side may turn after this step."""
        slots = [len(t[f"theta_{side}"]) if side in self.sides else 0 for side in "LR"]
        return dict(zip("LR", self.share(self.allowed(now.number, now.total), *slots)))

    def select(self, layers: list[Layer]) -> None:
        """Choose the pairs of layers that are alike in all but their numbers, at once."""
        now, k = layers[0].step, self.turning(layers[0].tensors, layers[0].step)
        stacked = lambda key: torch.stack([whole(layer.tensors[key]) for layer in layers])
        energy = {side: stacked(ENERGY[side]) for side in self.sides}
        ready = torch.stack([E.any(1) for E in energy.values()]).all(0)
        if self.freezes:
            ready &= ~stacked("frozen")
        generators = [layer.step.generator() for layer in layers if self.use_gumbel]
        for side, scores in energy.items():
            if self.use_gumbel:
                noise = torch.stack([gumbel(scores.shape[1], own) for own in generators])
                scores = explore(scores, noise, self.gumbel_tau)
            keys = [f"{name}_{side}" for name in ("theta", "pairs", "active", "churn")]
            choose = torch.vmap(partial(self.choose, k=k[side]))
            entered, *chosen = choose(ready, scores, energy[side], *map(stacked, keys))
            for i, layer in enumerate(layers):
                layer.step.restart(layer.tensors[keys[0]], entered[i])
                for key, new in zip(keys[1:], chosen):
                    layer.tensors[key].copy_(new[i])
        if self.freezes and self.allowed(now.number, now.total) == self.k:
            for i, layer in enumerate(layers):
                layer.tensors["frozen"].logical_or_(ready[i])

    def choose(
        self,
        ready: Bool[Tensor, ""],
        scores: Float32[Tensor, " d"],
        energy: Float32[Tensor, " d"],
        theta: Float[Tensor, " S"],
        pairs: Int64[Tensor, "S 2"],
        active: Bool[Tensor, " S"],
        churn: Float32[Tensor, "3"],
        k: int,
    ) -> tuple[Bool[Tensor, " S"], Int64[Tensor, "S 2"], Bool[Tensor, " S"], Float32[Tensor, "3"]]:
        """One side's slots given to its k pairs of the highest scores, once there are energies:
        which entered, then pairs, active and churn as they are now."""
        slots = rebind(pairs, active, PAIRINGS[self.pairing_strategy](scores, k))
        slots = torch.where(ready, slots, pairs)
        turns = torch.where(ready, slots[:, 0] >= 0, active)
        stays = active & turns & (slots == pairs).all(1)
        entered, left = turns & ~stays, active & ~stays
        moved = moved_share(energy, pairs, self.phi(theta), left)
        counts = torch.stack([entered.sum(), left.sum(), moved])
        return entered, slots, turns, churn + torch.where(ready, counts, 0)

    def diagnose(self, W: LinearBase, **t: Tensor) -> dict[str, float | list[float]]:
        """angle_rad: |φ| of the pairs that turn. chosen_energy: their coordinates' share of it.
        entered, left: pairs so far. moved: Σ of the share of the energy that leaving pairs moved,
        ‖(R − R′) x‖²/‖x‖² on the right, of dL/dy on the left."""
        out: dict[str, float | list[float]] = {}
        for side in self.sides:
            active = t[f"active_{side}"]
            out[f"angle_{side}_rad"] = self.phi(t[f"theta_{side}"])[active].abs().tolist()
        for side in self.sides if self.observes else "":
            energy, (entered, left, moved) = t[ENERGY[side]], t[f"churn_{side}"].tolist()
            chosen = energy[t[f"pairs_{side}"][t[f"active_{side}"]]].sum()
            out[f"chosen_energy_{side}"] = float(chosen / energy.sum()) if energy.any() else 0.0
            out |= {f"entered_{side}": int(entered), f"left_{side}": int(left)}
            out[f"moved_{side}"] = moved
        return out
