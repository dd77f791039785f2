"""docs/cost.md, a table first and then every number, and its chart, from result files and nothing
else. They have the rows of GPUs alone: a CPU's show that the benchmark runs."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lora_lite.bench.cost_rows import PEFT_DTYPES, TASK, Cost, Mode, Row, read
from lora_lite.bench.traffic import counted

SIDES = ("ours", *PEFT_DTYPES)
NAMES = {"ours": "lora-lite", "peft_default": "PEFT", "peft_same_dtype": "PEFT, bf16 adapter"}
COLOURS = {"ours": "#2458a6", "peft_default": "#d1495b", "peft_same_dtype": "#e9a3ab"}
COLUMNS = (
    "method",
    "eager, × frozen",
    "counted",
    "PEFT (bf16)",
    "CUDA graph, × frozen",
    "PEFT (bf16)",
    "compiled, × frozen",
    "counted",
    "PEFT (bf16)",
    "extra MiB",
    "PEFT (bf16)",
)
NONE = "–"
MODES: dict[Mode, str] = {"eager": "eager", "graph": "CUDA graph", "compiled": "compiled"}
"""In the order of the table's columns, what each is called there."""

COUNTED: tuple[Mode, ...] = ("eager", "compiled")
"""Beside whose times stands what is counted: a graph replays the eager step."""

Pair = dict[str, Row]
"""The rows of one method, by mode."""


def shown(found: Iterable[Row]) -> dict[str, dict[str, Pair]]:
    """The table's rows: by GPU and by label, those on all projections at the default shape; what
    costs least, by the first of its modes, first."""
    out: dict[str, dict[str, Pair]] = {}
    for row in found:
        if row.device_type == "cuda" and row.track == "all-linear" and not row.changes:
            out.setdefault(row.device, {}).setdefault(row.label, {})[row.mode] = row
    modes = list(MODES)
    rank = lambda pair: min(map(modes.index, pair))
    price = lambda pair: (rank(pair), pair[modes[rank(pair)]].over_floor())
    return {
        device: dict(sorted(methods.items(), key=lambda item: price(item[1])))
        for device, methods in out.items()
    }


def markdown(results: Path) -> str | None:
    """The table and how it came about; None where there are no rows for it."""
    devices = shown(read(results))
    if not devices:
        return None
    blocks = []
    for device, methods in devices.items():
        lines = [_line(COLUMNS), _line(["---"] + ["---:"] * (len(COLUMNS) - 1))]
        lines += [_line(_cells(label, pair)) for label, pair in methods.items()]
        blocks += ["\n".join(lines), notes(device, methods)]
    return "\n\n".join([*blocks, "![The same rows](cost.png)"])


def notes(device: str, methods: dict[str, Pair]) -> str:
    """How the table's numbers came about."""
    measured = [row for pair in methods.values() for row in pair.values()]
    shape, versions = measured[0].shape, measured[0].versions
    floors = {mode: [row.floor for row in measured if row.mode == mode] for mode in MODES}
    ms = "; ".join(
        f"{MODES[mode]} {min(c.ms for c in costs):.1f} to {max(c.ms for c in costs):.1f} ms"
        for mode, costs in floors.items()
        if costs
    )
    commits = ", ".join(sorted({str(row.commit) for row in measured}))
    peaks = [cost.peak_mib for cost in floors["eager"] if cost.peak_mib is not None]
    peak = f", {max(peaks):,.0f} MiB at its peak" if peaks else ""
    return (
        "Time of a forward and backward pass in multiples of the frozen model's own (gradients to "
        "the input, none to weights), and peak memory above its; lowest in bold, whoever has it. "
        f"A {shape['layers']}-layer Llama of width {shape['width']:,}, {shape['tokens']:,} tokens, "
        f"{shape['dtype']}, all seven projections adapted; adapter tensors are float32, PEFT's in "
        "brackets in the base's dtype. CUDA graph: the eager step recorded and replayed, which the "
        "host's speed does not enter: where eager is above it, the device waits for the host. "
        "Extra memory is what backward keeps (saved MiB, below) and the adapter's tensors, which "
        "in float32 are twice as large as PEFT's in brackets. Counted: the frozen step, and what "
        "the fused form must read, write and multiply at the rates of a large copy and a large "
        "product; compiled, gates are fused with what is beside them and not counted. "
        f"Frozen: {ms}{peak}. Median of "
        f"{min(row.steps for row in measured)} or more steps after warm-up, all sides in one "
        "process, in alternating rounds, on the same weights and adapter tensors, with outputs "
        f"and gradients that agree, at commits {commits}. {device}, "
        f"torch {versions['torch']}, PEFT {versions['peft']}. "
        "Yours: `just cost`."
    )


def write(root: Path) -> None:
    """Make docs/cost.md and docs/cost.png anew, where there are rows for them."""
    if text := document(root / "results"):
        (root / "docs/cost.md").write_text(text, encoding="utf-8")
    if devices := shown(read(root / "results")):
        plot(devices, root / "docs/cost.png")


def document(results: Path) -> str | None:
    """docs/cost.md: every row of every GPU; None where there is none."""
    on_gpu = lambda task: [row for row in read(results, task) if row.device_type == "cuda"]
    found, growth = on_gpu(TASK), on_gpu(f"{TASK}/scaling")
    hosts = [json.loads(p.read_text()) for p in sorted((results / TASK / "host").glob("*.json"))]
    if not (found or growth):
        return None
    parts = ["# What a training step costs", "Generated from results/cost by `just report`."]
    parts += [text] if (text := markdown(results)) else []
    parts += ["## Every row", _long(found)] if found else []
    parts += ["## Growth", _long(growth)] if growth else []
    hosts = [row for row in hosts if row["device"] in {row.device for row in (*found, *growth)}]
    if hosts:
        sides = ("floor", *SIDES)
        lines = [_line(["method", "device", *("frozen", *(NAMES[s] for s in SIDES))])]
        lines.append(_line(["---", "---"] + ["---:"] * len(sides)))
        lines += [
            _line([row["label"], row["device"], *(_number(row[f"{s}_us"], 1) for s in sides)])
            for row in hosts
        ]
        title = "## The host's microseconds for a forward call of one small layer"
        parts += [title, "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


LONG = (
    "method, layers, shape",
    "mode",
    "side",
    "ms (p20–p80)",
    "× frozen",
    "peak MiB",
    "extra MiB",
    "saved MiB",
    "start, s",
    "commit",
)


def _long(found: Sequence[Row]) -> str:
    lines = [_line(LONG), _line(["---"] * 3 + ["---:"] * (len(LONG) - 3))]
    for row in found:
        changes = [f"{key}={value}" for key, value in row.changes.items()]
        what = ", ".join([row.label, row.track, *changes, row.device])
        for side in ("floor", *SIDES):
            cost: Cost | None = getattr(row, side)
            name = "frozen" if side == "floor" else NAMES[side]
            if cost is None:
                if not row.missing[side].startswith("PEFT has no such"):
                    lines.append(_line([what, row.mode, name, row.missing[side], *[""] * 6]))
                continue
            parts = " (in parts)" if cost.fullgraph is False else ""
            lines.append(
                _line(
                    [
                        what,
                        row.mode + parts,
                        name,
                        f"{cost.ms:.2f} ({cost.ms_p20:.2f}–{cost.ms_p80:.2f})",
                        _number(cost.ms / row.floor.ms, 3),
                        _number(cost.peak_mib, 0),
                        _number(None if side == "floor" else row.extra_mib(side), 0),
                        _number(cost.saved_mib, 0),
                        _number(cost.init_seconds, 2),
                        str(row.commit),
                    ]
                )
            )
    return "\n".join(lines)


def _cells(label: str, pair: Pair) -> list[str]:
    out = [label]
    times = [(mode, "over_floor", 2) for mode in MODES]
    for mode, quantity, digits in (*times, ("eager", "extra_mib", 0)):
        row = pair.get(mode)
        values = {s: getattr(row, quantity)(s) if row else None for s in SIDES}
        known = [_number(v, digits) for v in values.values() if v is not None]
        best = min(known, key=lambda text: float(text.replace(",", "")), default=None)
        text = {
            side: f"**{cell}**" if len(known) > 1 and cell == best else cell
            for side, cell in ((s, _number(v, digits)) for s, v in values.items())
        }
        out.append(text["ours"])
        if quantity == "over_floor" and mode in COUNTED:
            out.append(_number(row and counted(row), 2))
        peft = (values["peft_default"], values["peft_same_dtype"])
        out.append(
            NONE if peft == (None, None) else f"{text['peft_default']} ({text['peft_same_dtype']})"
        )
    return out


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _number(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:,.{digits}f}".replace("-", "−")


def plot(devices: dict[str, dict[str, Pair]], path: Path) -> None:
    """Bars of each method's time in multiples of the floor, ours and PEFT's, a panel a mode."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from lora_lite.bench.report import STYLE

    panels = [
        (device, mode, {label: pair[mode] for label, pair in methods.items() if mode in pair})
        for device, methods in devices.items()
        for mode in MODES
    ]
    panels = [panel for panel in panels if panel[2]]
    labels = list(dict.fromkeys(label for methods in devices.values() for label in methods))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            len(panels),
            figsize=(3.5 + 4 * len(panels), 1.4 + 0.45 * len(labels)),
            dpi=160,
            squeeze=False,
            sharey=True,
            layout="constrained",
        )
        for axis, (device, mode, measured) in zip(axes[0], panels):
            _bars(axis, measured, labels)
            axis.set_title(f"{MODES[mode]}, {device}", loc="left", fontsize=11)
        axes[0, 0].set_yticks(range(len(labels)), labels)
        axes[0, 0].invert_yaxis()
        figure.supxlabel(
            "forward + backward, × the frozen model's own (the line at 1)", fontsize=10
        )
        handles = {h.get_label(): h for axis in axes[0] for h in axis.containers}
        figure.legend(
            handles.values(), handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9
        )
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


LONGEST = 4.5
"""A bar past this is cut, and its number says how long it is."""


def _bars(axis: Any, measured: dict[str, Row], labels: Sequence[str]) -> None:
    """A group of bars a method, one for each side that has a number."""
    times = {
        label: {s: v for s in SIDES if (v := row.over_floor(s)) is not None}
        for label, row in measured.items()
    }
    limit = min(max(max(sides.values()) for sides in times.values()), LONGEST)
    height = 0.27
    for side in SIDES:
        at, values = [], []
        for label, sides in times.items():
            if side in sides:
                place = list(sides).index(side) - (len(sides) - 1) / 2
                at.append(labels.index(label) + place * height)
                values.append(sides[side])
        if values:
            shown_values = [min(v, limit) for v in values]
            axis.barh(at, shown_values, height, color=COLOURS[side], label=NAMES[side])
        for y, v in zip(at, values):
            axis.text(min(v, limit) + limit / 100, y, f"{v:.2f}", va="center", fontsize=7)
    axis.axvline(1, color="#222222", linewidth=1)
    axis.set_xlim(0, limit * 1.12)
    axis.tick_params(length=0)
    axis.grid(axis="x", color="#eeeeee", linewidth=0.8)
    axis.set_axisbelow(True)
