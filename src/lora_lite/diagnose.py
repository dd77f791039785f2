"""What the adapters have become, layer by layer."""

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapted import Adapted, adapters
from lora_lite.merge import base_of, delta_weight

NAMED_LAYERS = 16


@dataclass(frozen=True)
class Diagnosis:
    """One row a layer and adapter. Print it as a table, or `plot` it.

    rows: name → value; a value is a number, None where it has no meaning, or a distribution as a
    list of numbers, of which the table shows the quantiles p20/p50/p80.
    """

    rows: tuple[dict[str, Any], ...]

    @property
    def columns(self) -> list[str]:
        """All names, in the order of their first row."""
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def __str__(self) -> str:
        lines = [self.columns, *([_shown(row.get(c)) for c in self.columns] for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        # Words to the left, numbers to the right.
        words = [isinstance(self.rows[0].get(c), str) for c in self.columns]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if word else cell.rjust(width)
                for cell, width, word in zip(line, widths, words)
            ).rstrip()
            for line in lines
        )

    __repr__ = __str__

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw every number over the layers, distributions as boxes, into an image file.

        Raises: ImportError without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("plots need matplotlib; pip install 'lora-lite[bench]'") from None
        names = [c for c in self.columns if any(_drawable(row.get(c)) for row in self.rows)]
        across = min(3, len(names))
        down = -(-len(names) // across)
        figure = Figure(figsize=(4 * across, 3 * down), layout="constrained")
        for i, name in enumerate(names):
            axes = figure.add_subplot(down, across, i + 1, title=name)
            found = [(x, row[name]) for x, row in enumerate(self.rows) if _drawable(row.get(name))]
            axes.margins(y=0.15)
            if isinstance(found[0][1], list):
                axes.boxplot([y for _, y in found], positions=[x for x, _ in found])
            else:
                axes.plot(*zip(*found), "o")
            axes.set_xlim(-0.5, len(self.rows) - 0.5)
            axes.set_ylim(bottom=0)
            if len(self.rows) <= NAMED_LAYERS:
                labels = [row["layer"] for row in self.rows]
                axes.set_xticks(range(len(labels)), labels, rotation=90)
            else:
                axes.set_xticks([])
                axes.set_xlabel("layers, in the model's order")
        figure.savefig(path)


def diagnose(model: nn.Module, *, spectra: bool = True) -> Diagnosis:
    """What each layer's update looks like, and the methods' own numbers (`Variant.diagnose`).

    change: ‖ΔW‖/‖W‖ (Frobenius). spectral_entropy: H = −Σ p ln p in nats of p = σ/Σσ, the singular
    values of ΔW; effective_rank: e^H (Roy & Vetterli 2007), 0 where ΔW = 0. These three are of all
    adapters that are on, at the strengths that they have, and None where a method isn't linear.

    spectra: False leaves out the singular values, which cost most.
    Raises: ValueError where there is no adapter.
    """
    spectrum_of = {id(layer): _update(name, layer, spectra) for name, layer, _ in adapters(model)}
    rows = []
    for name, layer, adapter in adapters(model):
        row = {"layer": name, "adapter": adapter.attachment.name, "method": adapter.variant.name}
        with torch.no_grad():
            own = adapter.variant.diagnose(base_of(layer), **adapter.tensors())
        rows.append(row | spectrum_of[id(layer)] | own)
    return Diagnosis(tuple(rows))


def spectrum(delta: Tensor) -> tuple[float, float]:
    """The effective rank e^H and spectral entropy H of a matrix."""
    values = torch.linalg.svdvals(delta)
    if not values.any():
        return 0.0, 0.0
    entropy = torch.special.entr(values / values.sum()).sum()
    return float(entropy.exp()), float(entropy)


def _update(name: str, layer: Adapted, spectra: bool) -> dict[str, float | None]:
    names = ("change", "effective_rank", "spectral_entropy")[: 3 if spectra else 1]
    if any(adapter.variant.nonlinear() for adapter in layer.adapters.values()):
        return dict.fromkeys(names)
    delta, W = delta_weight(name, layer)
    if delta.ndim == 1:  # a norm's: no spectrum to speak of
        names, spectra = names[:1], False
    change = float(delta.norm() / W.norm())
    delta = delta[delta.any(-1)] if spectra else delta  # a table has many rows that stay
    return dict(zip(names, (change, *(spectrum(delta) if spectra else ()))))


def _drawable(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, list) and bool(value))


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "–"
    if isinstance(value, list):
        cuts = torch.tensor(value).quantile(torch.tensor([0.2, 0.5, 0.8]))
        return "/".join(f"{cut:.3g}" for cut in cuts.tolist())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
