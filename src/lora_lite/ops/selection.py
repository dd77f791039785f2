"""Which coordinates turn together: pairs chosen by energy, and the slots that hold them.

Nothing here waits for the device.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from lora_lite.ops.launch import kernels, kernels_serve


def mean_square(x: Float[Tensor, "*batch d"]) -> Float32[Tensor, " d"]:
    """Each coordinate's energy: the mean of x_i² over tokens; NaN where there is none."""
    tokens = x.reshape(-1, x.shape[-1])
    wide = torch.promote_types(x.dtype, torch.float32)
    norms = torch.linalg.vector_norm(tokens, dim=0, dtype=wide)
    return (norms.square() / len(tokens)).float()


class Squares(NamedTuple):
    """Σ x_i² over tokens, in parts that some pass over x has summed."""

    parts: Float32[Tensor, "parts d"]
    tokens: int

    def total(self) -> Float32[Tensor, " d"]:
        return self.parts[0] if self.parts.shape[0] == 1 else self.parts.sum(0)

    def mean(self) -> Float32[Tensor, " d"]:
        """`mean_square` of that x."""
        return self.total() / self.tokens


def ema_(samples: list[tuple[Tensor, Tensor | Squares]], beta: float) -> None:
    """average ← β average + (1 − β) mean_square(x) for each (average, x), in place; a sample that
    isn't finite is left out."""
    x = samples[0][1]
    read = x.parts if isinstance(x, Squares) else x
    if kernels_serve(read) and read.dtype != torch.float64:
        kernels("selection").ema_(samples, beta)
        return
    for average, x in samples:
        sample = x.mean() if isinstance(x, Squares) else mean_square(x)
        mixed = beta * average + (1 - beta) * sample
        average.copy_(torch.where(sample.isfinite().all(), mixed, average))


def gumbel(d: int, generator: torch.Generator) -> Float32[Tensor, " {d}"]:
    """Standard Gumbel noise, drawn on the CPU."""
    return -torch.empty(d).exponential_(generator=generator).log()


def explore(
    energy: Float32[Tensor, "*layers d"], noise: Float32[Tensor, "*layers d"], tau: float
) -> Float32[Tensor, "*layers d"]:
    """log E + τ G: with Gumbel noise G the highest are a draw without replacement, by
    probabilities ∝ E^(1/τ)."""
    return (energy + 1e-30).log() + tau * noise.to(energy.device, non_blocking=True)


def consecutive(scores: Float[Tensor, " d"], k: int) -> Int64[Tensor, "{k} 2"]:
    """(o₀, o₁), (o₂, o₃), … of the coordinates o in descending order, the lower first of equals:
    the disjoint pairs that a greedy search by s_i s_j takes."""
    return scores.argsort(descending=True, stable=True)[: 2 * k].unflatten(0, (k, 2))


def high_low(scores: Float[Tensor, " d"], k: int) -> Int64[Tensor, "{k} 2"]:
    """The i-th highest with the i-th lowest."""
    order = scores.argsort(descending=True, stable=True)
    return torch.stack([order[:k], order.flip(0)[:k]], 1)


PAIRINGS = {"consecutive": consecutive, "high_low": high_low}


def rebind(
    pairs: Int64[Tensor, "S 2"], active: Bool[Tensor, " S"], chosen: Int64[Tensor, "k 2"]
) -> Int64[Tensor, "S 2"]:
    """The slots with the chosen pairs and no others, k ≤ S: a chosen pair that is active, in
    either order, stays as it is where it is; the others take the slots that are left."""
    same = (pairs.sort(1).values[:, None] == chosen.sort(1).values).all(2) & active[:, None]
    stays, held = same.any(1), same.any(0)
    vacant = stays.int().argsort(stable=True)
    # A chosen pair's slot: its own, or that of its rank among those that have none.
    slot = torch.where(held, same.int().argmax(0), vacant[(~held).cumsum(0) - 1])
    bound = torch.where(held[:, None], pairs[slot], chosen)
    return torch.full_like(pairs, -1).scatter(0, slot[:, None].expand(-1, 2), bound)


def moved_share(
    energy: Float32[Tensor, " d"],
    pairs: Int64[Tensor, "S 2"],
    phi: Float[Tensor, " S"],
    left: Bool[Tensor, " S"],
) -> Float32[Tensor, ""]:
    """‖(R − R′) x‖² / ‖x‖² for x of these energies, where R′ lacks the rotations of the pairs that
    left: Σ 2 (1 − cos φ)(E_i + E_j) / Σ E."""
    turned = 4 * (phi / 2).sin().square() * energy[pairs].sum(1)
    return torch.where(left, turned, 0).sum().float() / energy.sum()


def disjoint(pairs: Int64[Tensor, "S 2"], d: int) -> bool:
    """Whether the pairs are of different coordinates 0 … d − 1, empty slots (−1, −1) aside."""
    used = pairs[(pairs != -1).any(1)]
    return bool(((used >= 0) & (used < d)).all()) and len(used.unique()) == used.numel()
