"""What the cost benchmark found: one JSON file a row."""

import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lora_lite.bench import rows
from lora_lite.bench.workload import DEFAULT

TASK = "cost"
Mode = Literal["eager", "graph", "compiled"]
PEFT_DTYPES = {"peft_default": True, "peft_same_dtype": False}
"""PEFT's sides, and what each gives as `autocast_adapter_dtype`."""


@dataclass(frozen=True)
class Cost:
    """One side's step: milliseconds forward and backward (median, 20th and 80th percentile), MiB
    of all tensors at its peak, MiB that autograd saves between forward and backward (parameters
    and buffers left out), seconds to put the adapters on, and whether it compiled whole; what does
    not is timed after the others, alone. None where it wasn't measured."""

    ms: float
    ms_p20: float
    ms_p80: float
    peak_mib: float | None
    saved_mib: float | None
    init_seconds: float | None = None
    fullgraph: bool | None = None


@dataclass(frozen=True)
class Row:
    """What one method costs on one track, in one mode, on one device.

    missing: why a side has no numbers. floor_drift: the slowest over the fastest of the floor's
    rounds. commit: of the source, as in the other benchmarks.
    """

    label: str
    variant: str
    hyperparameters: dict[str, Any]
    track: str
    mode: Mode
    device: str
    device_type: str
    shape: dict[str, Any]
    steps: int
    params: int
    floor: Cost
    floor_drift: float
    ours: Cost
    peft_default: Cost | None
    peft_same_dtype: Cost | None
    missing: dict[str, str]
    versions: dict[str, Any]
    commit: str | None

    def over_floor(self, side: str = "ours") -> float | None:
        """A side's time in multiples of the floor's."""
        cost = getattr(self, side)
        return None if cost is None else cost.ms / self.floor.ms

    def extra_mib(self, side: str = "ours") -> float | None:
        """A side's peak memory above the floor's."""
        cost = getattr(self, side)
        if cost is None or cost.peak_mib is None or self.floor.peak_mib is None:
            return None
        return cost.peak_mib - self.floor.peak_mib

    def summary(self) -> dict[str, float | None]:
        """What the row comes to."""
        out = {"ms": self.ours.ms, "over_floor": self.over_floor(), "extra_mib": self.extra_mib()}
        for side in PEFT_DTYPES:
            out[f"{side}_over_floor"] = self.over_floor(side)
            out[f"{side}_extra_mib"] = self.extra_mib(side)
        return out

    @property
    def changes(self) -> dict[str, Any]:
        """What of the shape is not the device's default."""
        usual = dataclasses.asdict(DEFAULT[self.device_type])
        return {key: value for key, value in self.shape.items() if usual[key] != value}

    @property
    def file_name(self) -> str:
        name = f"{self.label} {self.track} {self.mode} {self.device}"
        return rows.file_name(rows.label(name, self.changes))


def write(row: Row, results: Path, task: str = TASK) -> Path:
    """Store a row as results/<task>/<its setting>.json, in place of the one before."""
    path = results / task / f"{row.file_name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = dataclasses.asdict(row) | {"summary": row.summary()}
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read(results: Path, task: str = TASK) -> list[Row]:
    """All rows of a task, by label, track and mode."""
    out = []
    for path in sorted((results / task).glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        del data["summary"]
        for side in ("floor", "ours", *PEFT_DTYPES):
            data[side] = None if data[side] is None else Cost(**data[side])
        out.append(Row(**data))
    return sorted(out, key=lambda row: (row.label, row.track, row.mode, row.file_name))


def versions(device: str) -> dict[str, Any]:
    """Versions and processor; None for what is not installed."""
    out = rows.environment(device)
    for package in ("peft", "transformers", "triton"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = None
    return out


COLUMNS = (
    "method",
    "track",
    "mode",
    "ms",
    "× floor",
    "+MiB",
    "PEFT ×",
    "same dtype ×",
    "PEFT +MiB",
)


def table(done: Sequence[Row], heading: bool = True) -> str:
    """The rows as plain text."""
    number = lambda value, digits: "–" if value is None else f"{value:.{digits}f}"
    lines = [COLUMNS] if heading else []
    for row in done:
        lines.append(
            (
                rows.label(row.label, row.changes),
                row.track,
                row.mode,
                number(row.ours.ms, 3),
                number(row.over_floor(), 3),
                number(row.extra_mib(), 1),
                number(row.over_floor("peft_default"), 3),
                number(row.over_floor("peft_same_dtype"), 3),
                number(row.extra_mib("peft_default"), 1),
            )
        )
    widths = (44, 10, 8, 9, 7, 9, 7, 12, 9)
    return "\n".join(
        " ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in lines
    )
