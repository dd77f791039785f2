"""The README's table and the plot, from result files and nothing else."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_lite.bench.rows import Row, read
from lora_lite.bench.runner import BASE, FULL, SWEEP_SEED, TASK, Protocol, plain

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
COLUMNS = (
    "method",
    "trained parameters",
    "target accuracy, % (gain)",
    "source accuracy, % (change)",
    "trade-off, pp",
    "samples/s",
    "peak memory, MiB",
    "training, s",
    "learning rate",
)
BRIEFLY = ("", "params", "target %", "source %", "trade-off", "samples/s", "MiB", "s", "lr")


def comparable(rows: Iterable[Row], protocol: Protocol) -> list[Row]:
    """The base and the rows of one protocol, the best target accuracy first."""
    same = [row for row in rows if row.variant == BASE or row.protocol == plain(protocol)]
    return sorted(same, key=lambda row: (-row.mean("target_pct"), row.label))


def cells(row: Row) -> tuple[str, ...]:
    """A row's entries under `COLUMNS`: mean ± standard deviation over its seeds."""
    if row.variant == BASE:
        accuracies = (_spread(row, "target_pct"), _spread(row, "source_pct"))
        return (row.method, "0", *accuracies, *[""] * 5)
    return (
        row.method,
        f"{row.trainable_parameters:,}",
        f"{_spread(row, 'target_pct')} ({_signed(row.mean('target_gain_pp'))})",
        f"{_spread(row, 'source_pct')} ({_signed(row.mean('source_change_pp'))})",
        _spread(row, "tradeoff_pp"),
        _spread(row, "samples_per_s", digits=0),
        f"{row.mean('peak_memory_mib'):.1f}",
        _spread(row, "seconds"),
        f"{row.lr:g}{' (edge)' * row.lr_at_edge}",
    )


def markdown(rows: list[Row]) -> str:
    """The README's block between its markers, for the rows of the default protocol."""
    protocol = Protocol()
    rows = comparable(rows, protocol)
    lines = ["| " + " | ".join(COLUMNS) + " |"]
    lines.append("| " + " | ".join(["---"] + ["---:"] * (len(COLUMNS) - 1)) + " |")
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join([BEGIN, *lines, "", "![The same rows](docs/digits.png)", "", notes(rows), END])


def notes(rows: list[Row]) -> str:
    """How the table's numbers came about."""
    protocol, trained = Protocol(), [row for row in rows if row.lr]
    where = sorted({_where(row) for row in trained}) or ["nothing yet"]
    sweeps = [row.sweep_seconds for row in trained] or [0.0]
    rates = ", ".join(f"{r:g}" for r in protocol.rates)
    return (
        f"Mean ± standard deviation over {protocol.seeds} seeds, by target accuracy. A vision "
        "transformer of 226,858 weights, pretrained on upright handwritten digits (source), is "
        "adapted to digits turned by 90° (target): "
        f"{protocol.steps} AdamW steps of {protocol.batch_size} images. Test split: 600 images, "
        "met once a seed. Gain and change are against the base; trade-off = gain − max(0, −change)."
        f" Learning rate: the best of {rates} on the validation split's target accuracy with a seed"
        f" of its own ({SWEEP_SEED}), the same grid for every method; “(edge)” marks a best at the "
        f"grid's end. The sweep costs {min(sweeps):.0f} to {max(sweeps):.0f} s a method (median "
        f"{statistics.median(sweeps):.0f}) beside the training seconds, which are one seed's. Peak "
        "memory: all tensors alive at the peak of a training step, the frozen weights included. "
        f"Speed is the median step's. Measured on: {'; '.join(where)}."
    )


def write(root: Path) -> None:
    """Make a checkout's README block (in its place, or at the end) and docs/digits.png anew."""
    path = root / "README.md"
    path.write_text(updated(path.read_text(encoding="utf-8"), root), encoding="utf-8")
    plot(read(root / "results", TASK), root / "docs/digits.png")


def readme_is_current(root: Path) -> bool:
    """Whether README.md's block is what the result files give."""
    text = (root / "README.md").read_text(encoding="utf-8")
    return BEGIN in text and updated(text, root) == text


def updated(text: str, root: Path) -> str:
    """README.md's text with its block made anew from root/results."""
    block = markdown(read(root / "results", TASK))
    if BEGIN not in text or END not in text:
        return f"{text.rstrip()}\n\n{block}\n"
    before, rest = text.split(BEGIN, 1)
    return before + block + rest.split(END, 1)[1]


def table(rows: list[Row], current: Iterable[str] = ()) -> Any:
    """A rich table of the rows, those of the `current` labels in bold."""
    from rich.table import Table

    out = Table(box=None, header_style="dim", pad_edge=False)
    for i, column in enumerate(BRIEFLY):
        out.add_column(column, justify="right" if i else "left", min_width=0 if i else 16)
    for row in rows:
        style = "bold" if row.label in current else "dim" if row.variant in (BASE, FULL) else None
        # Without its spaces a narrow terminal breaks no number apart.
        out.add_row(*(cell.replace(" ± ", "±") for cell in cells(row)), style=style)
    return out


def plot(rows: list[Row], path: Path) -> None:
    """Target accuracy against trained parameters, and against what is left of the source."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = comparable(rows, Protocol())
    base = next((row for row in rows if row.variant == BASE), None)
    trained = [row for row in rows if row.lr]
    if base is None or not trained:
        raise ValueError("nothing to plot: results/ lacks the base or any trained row")
    style = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": MUTED,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "savefig.facecolor": "white",
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, 2, figsize=(10.5, 4.6), sharey=True, layout="constrained")
        for axis, quantity in zip(axes, ("trainable_parameters", "source_pct")):
            points = []
            for row in trained:
                x = row.trainable_parameters if axis is axes[0] else row.mean(quantity)
                axis.errorbar(
                    x,
                    row.mean("target_pct"),
                    xerr=row.std("source_pct") if axis is axes[1] else None,
                    yerr=row.std("target_pct"),
                    fmt="s" if row.variant == FULL else "o",
                    color=MUTED if row.variant == FULL else ACCENT,
                    ecolor=FAINT,
                    markersize=6,
                    markeredgecolor="white",
                    elinewidth=1.5,
                )
                points.append((float(x), row.mean("target_pct"), row.method))
            lowest = min(row.mean("target_pct") - (row.std("target_pct") or 0) for row in trained)
            axis.set_ylim(max(0, 5 * (lowest // 5) - 5), 100)
            axis.grid(axis="y", color="#eeeeee", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.tick_params(length=0)
            if axis is axes[0]:
                axis.set_xscale("log")
                axis.margins(x=0.12)
                axis.set_xlabel("trained parameters")
                axis.set_ylabel("target accuracy, %")
                reference = base.mean("target_pct")
                axis.text(
                    0.01, 0.02, f"base: {reference:.1f} %", transform=axis.transAxes, color=MUTED
                )
            else:
                left = base.mean("source_pct")
                axis.axvline(left, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
                axis.set_xlabel("source accuracy after adapting, %")
                axis.text(
                    left, 0.02, f"base: {left:.1f} % ", transform=axis.get_xaxis_transform(),
                    color=MUTED, ha="right",
                )  # fmt: skip
            _name(axis, points)
        figure.savefig(path, dpi=160, metadata={"Software": None})
        plt.close(figure)


INK, MUTED, FAINT, ACCENT = "#222222", "#777777", "#b8c4d6", "#2458a6"


def _name(axis: Any, points: list[tuple[float, float, str]]) -> None:
    """Write each point's name beside it, where it covers the least of the others."""
    figure = axis.figure
    figure.canvas.draw()
    at = [tuple(axis.transData.transform(p[:2])) for p in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in at]
    frame = axis.get_window_extent()
    for (x, y), (_, _, name) in zip(at, points):
        best = None
        for far in (9, 16, 24, 34):
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1)):
                text = axis.annotate(
                    name,
                    (x, y),
                    xycoords="figure pixels",
                    xytext=(dx * far, dy * far),
                    textcoords="offset pixels",
                    ha={1: "left", -1: "right", 0: "center"}[dx],
                    va={1: "bottom", -1: "top", 0: "center"}[dy],
                    fontsize=9,
                )
                box = text.get_window_extent().extents
                text.remove()
                outside = box[0] < frame.x0 or box[2] > frame.x1 or box[3] > frame.y1 + 8
                cost = sum(_overlap(box, other) for other in taken) + 1e4 * outside + far
                if best is None or cost < best[0]:
                    best = (cost, dx, dy, far, box)
        _, dx, dy, far, box = best
        taken.append(box)
        axis.annotate(
            name,
            (x, y),
            xycoords="figure pixels",
            xytext=(dx * far, dy * far),
            textcoords="offset pixels",
            ha={1: "left", -1: "right", 0: "center"}[dx],
            va={1: "bottom", -1: "top", 0: "center"}[dy],
            fontsize=9,
            arrowprops=dict(arrowstyle="-", color=FAINT) if far > 12 else None,
        )


def _overlap(a: Any, b: Any) -> float:
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    return float(max(width, 0) * max(height, 0))


def _spread(row: Row, quantity: str, digits: int = 1) -> str:
    mean, std = row.mean(quantity), row.std(quantity)
    text = f"{mean:.{digits}f}".replace("-", "−")
    return text if std is None else f"{text} ± {std:.{digits}f}"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _where(row: Row) -> str:
    e, threads = row.environment, row.protocol["threads"]
    return f"{e['processor']}, {threads} thread{'s' * (threads > 1)}, torch {e['torch']}"
