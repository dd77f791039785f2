"""How the cost grows with tokens, width, rank and adapted layers, and what a layer call costs the
host."""

import dataclasses
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lora_lite.bench import cost, rows
from lora_lite.bench.cost import Case, Options
from lora_lite.bench.cost_rows import PEFT_DTYPES, TASK, Row, versions
from lora_lite.bench.workload import Side, Workload, kind, llama, one_layer, synchronise
from lora_lite.targets import Targets

USUAL = ("lora", "dora", "oft", "jora")
"""Measured where no variant is named."""
GROWTH: dict[str, dict[str, tuple[int, ...]]] = {
    "cuda": dict(tokens=(1024, 4096, 16384, 65536), width=(1024, 2048, 4096, 8192)),
    "cpu": dict(tokens=(16, 64, 256), width=(256, 512)),
}
RANKS = {"cuda": (4, 16, 64, 256), "cpu": (4, 16, 64)}
ADAPTED: dict[str, Targets] = {
    "first q": r"layers\.0\.self_attn\.q_proj",
    "q": ["q_proj"],
    "q+v": ["q_proj", "v_proj"],
    "attention": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
"""Beside all seven projections, which every other axis has."""
CALLS, REPEATS = 50, 15


@dataclass(frozen=True)
class HostRow:
    """Microseconds of the host's for one forward call of a small layer, gradients on: the frozen
    layer, ours, PEFT's. None where it wasn't measured, `missing` says why."""

    label: str
    variant: str
    hyperparameters: dict[str, Any]
    device: str
    dtype: str
    floor_us: float
    ours_us: float
    peft_default_us: float | None
    peft_same_dtype_us: float | None
    missing: dict[str, str]
    versions: dict[str, Any]
    commit: str | None


def run(options: Options) -> list[Row]:
    """Measure the growth in eager mode and the host's time; the rows of the growth.

    A variant is measured at the first of its settings. Rows go to results/cost/scaling and
    results/cost/host.
    """
    names = options.variants or USUAL
    options = dataclasses.replace(options, modes=("eager",))
    usual = cost.cases(names, ("all-linear",))
    first = [next(case for case in usual if case.variant.name == name) for name in names]
    for case in first:
        if reason := cost.failure(partial(_host, case, options)):
            print(f"          {case.label} failed: {reason}", flush=True)
    done = []
    for shape, found in _growth(first, options):
        print(", ".join(f"{k}={v}" for k, v in dataclasses.asdict(shape).items()), flush=True)
        work: list[Workload] = []
        if reason := cost.failure(lambda: work.append(llama(shape, options.where))):  # noqa: B023
            print(f"          failed: {reason}", flush=True)
            continue
        done += cost.measure_all(found, work[0], options, f"{TASK}/scaling")
    return done


def _growth(first: list[Case], options: Options) -> Iterator[tuple[Any, list[Case]]]:
    """(shape, cases): the base shape with other ranks and targets, then other shapes."""
    where = kind(options.where)
    ranked = [
        dataclasses.replace(
            case,
            variant=dataclasses.replace(case.variant, r=r),
            label=rows.label(case.variant.name, dict(r=r)),
        )
        for case in first
        if hasattr(case.variant, "r")
        for r in RANKS[where]
        if r != case.variant.r
    ]
    fewer = [
        dataclasses.replace(case, track=track, targets=targets)
        for case in first
        for track, targets in ADAPTED.items()
    ]
    yield options.shape, [*first, *ranked, *fewer]
    for axis, values in GROWTH[where].items():
        for value in values:
            if value != getattr(options.shape, axis):
                yield dataclasses.replace(options.shape, **{axis: value}), first


def _host(case: Case, options: Options) -> None:
    """Measure one layer's call, write it and print it."""
    work = one_layer(options.shape.dtype, options.where)
    sides, _, missing = cost.sides_of(case, work, options.peft)
    sides = [Side("floor", work.shell()), *sides]
    us = calls_us(sides, work)
    row = HostRow(
        label=case.label,
        variant=case.variant.name,
        hyperparameters=dataclasses.asdict(case.variant),
        device=rows.environment(work.device)["processor"],
        dtype=options.shape.dtype,
        floor_us=us["floor"],
        ours_us=us["ours"],
        **{f"{name}_us": us.get(name) for name in PEFT_DTYPES},
        missing=missing,
        versions=versions(work.device),
        commit=options.commit or rows.commit(),
    )
    write(row, options.folder)
    numbers = ", ".join(f"{name} {value:.1f}" for name, value in us.items())
    print(f"{case.label}: µs of the host's a layer call: {numbers}", flush=True)


def calls_us(sides: Sequence[Side], work: Workload) -> dict[str, float]:
    """Microseconds of one forward call of each side's layer, without waiting for the device: the
    medians over alternating rounds, after one to warm up."""
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    for _ in range(1 + REPEATS):
        for side in sides:
            named = side.model.named_modules()
            layer = next(m for name, m in named if name.split(".")[-1] == "proj")
            synchronise(work.device)
            start = time.perf_counter()
            for _ in range(CALLS):
                layer(work.x)
            times[side.name].append((time.perf_counter() - start) / CALLS)
    return {name: 1e6 * statistics.median(found[1:]) for name, found in times.items()}


def write(row: HostRow, results: Path) -> Path:
    """Store a row as results/cost/host/<label> <device>.json."""
    path = results / TASK / "host" / f"{rows.file_name(f'{row.label} {row.device}')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(row), indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path
