"""Results: one JSON file a row."""

import dataclasses
import hashlib
import json
import platform
import re
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lora_lite


@dataclass(frozen=True)
class Run:
    """One seed. Accuracies on the test split, in percent; changes in percentage points. What
    belongs to training is None for the base."""

    seed: int
    target_pct: float
    source_pct: float
    target_gain_pp: float
    source_change_pp: float
    tradeoff_pp: float
    samples_per_s: float | None
    peak_memory_mib: float | None
    seconds: float | None


@dataclass(frozen=True)
class Rate:
    """One learning rate of the sweep, on the validation split."""

    lr: float
    target_pct: float
    source_pct: float
    target_loss: float | None


@dataclass(frozen=True)
class Row:
    """All that is known of one method under one protocol.

    method: the variant, and what of it differs from its default row. label: that, and what of the
    protocol differs from the default one. targets: as given to `attach`. commit: of the source
    checkout, with "+" where src/ had changes; None outside one.
    """

    task: str
    method: str
    label: str
    variant: str
    hyperparameters: dict[str, Any]
    targets: str | list[str] | None
    protocol: dict[str, Any]
    base: dict[str, float]
    trainable_parameters: int
    lr: float | None
    lr_at_edge: bool
    sweep: list[Rate]
    sweep_seconds: float
    runs: list[Run]
    environment: dict[str, Any]
    commit: str | None

    def mean(self, quantity: str) -> float | None:
        """The mean over seeds of one of `Run`'s quantities."""
        values = self._values(quantity)
        return statistics.mean(values) if values else None

    def std(self, quantity: str) -> float | None:
        """The sample standard deviation over seeds; None for a single one."""
        values = self._values(quantity)
        return statistics.stdev(values) if len(values) > 1 else None

    def _values(self, quantity: str) -> list[float]:
        values = [getattr(run, quantity) for run in self.runs]
        return [v for v in values if v is not None]


QUANTITIES = tuple(f.name for f in dataclasses.fields(Run) if f.name != "seed")


def write(row: Row, results: Path) -> Path:
    """Store a row as results/<task>/<label>.json, in place of the one of that label."""
    path = results / row.task / f"{file_name(row.label)}.json"
    summary = {
        "mean": {q: row.mean(q) for q in QUANTITIES},
        "std": {q: row.std(q) for q in QUANTITIES},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(row) | summary, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def read(results: Path, task: str) -> list[Row]:
    """All rows of a task, by label."""
    rows = []
    for path in sorted((results / task).glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        del data["mean"], data["std"]
        data["sweep"] = [Rate(**r) for r in data["sweep"]]
        data["runs"] = [Run(**r) for r in data["runs"]]
        rows.append(Row(**data))
    return sorted(rows, key=lambda row: row.label)


def label(name: str, changes: Mapping[str, Any]) -> str:
    """A row's name: the method and what differs from its default, "lora r=4 steps=50"."""
    words = lambda v: "+".join(map(str, v)) if isinstance(v, list | tuple) else str(v)
    return " ".join([name, *(f"{key}={words(value)}" for key, value in changes.items())])


def file_name(label: str) -> str:
    """A file name for a label; long ones end in a digest."""
    name = re.sub(r"[^\w.=+-]+", "_", label)
    digest = hashlib.sha256(label.encode()).hexdigest()[:8]
    return name if len(name) <= 100 else f"{name[:90]}-{digest}"


def environment(device: str) -> dict[str, Any]:
    """Versions and processor; nothing that names the machine."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "lora_lite": lora_lite.__version__,
        "processor": torch.cuda.get_device_name(device)
        if torch.device(device).type == "cuda"
        else cpu_name(),
    }


def cpu_name() -> str:
    """The CPU's model as the system calls it."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def checkout() -> Path | None:
    """The root of the source checkout that this package runs from, or None."""
    root = Path(lora_lite.__file__).parents[2]
    return root if (root / "src/lora_lite").is_dir() and (root / ".git").exists() else None


def commit() -> str | None:
    """The checkout's commit, with "+" where src/ has changes; None outside a checkout."""
    root = checkout()
    if root is None:
        return None

    def git(*words: str) -> str:
        command: Sequence[str] = ("git", *words)
        return subprocess.run(
            command, cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "src") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
