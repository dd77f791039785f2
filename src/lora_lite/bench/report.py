"""README's table, docs/'s pages of numbers and the plots, from result files and the registry."""

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_lite.bench import catalogue, cost_report
from lora_lite.bench.rows import Row, read
from lora_lite.bench.runner import BASE, FULL, SWEEP_SEED, TASK, Protocol, plain

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


def document(rows: list[Row]) -> str:
    """docs/digits.md: the rows of the default protocol."""
    rows = comparable(rows, Protocol())
    lines = ["| " + " | ".join(COLUMNS) + " |"]
    lines.append("| " + " | ".join(["---"] + ["---:"] * (len(COLUMNS) - 1)) + " |")
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    title = "# Adapting a vision transformer to turned digits"
    made = "Generated from results/digits by `just report`."
    parts = [title, made, "\n".join(lines), "![The same rows](digits.png)", notes(rows)]
    return "\n\n".join(parts) + "\n"


def notes(rows: list[Row]) -> str:
    """How the table's numbers came about."""
    protocol, trained = Protocol(), [row for row in rows if row.lr]
    where = sorted({_where(row) for row in trained}) or ["nothing yet"]
    sweeps = [row.sweep_seconds for row in trained] or [0.0]
    rates = ", ".join(f"{r:g}" for r in protocol.rates)
    return (
        f"Mean ± standard deviation over {protocol.seeds} seeds, by target accuracy; a method that "
        "loses is shown like any other. A vision transformer of 226,858 weights, pretrained on "
        "upright handwritten digits (source), is adapted to digits turned by 90° (target): "
        f"{protocol.steps} AdamW steps of {protocol.batch_size} images. The test split, 600 images "
        "of each, is met once a seed. Gain and change are against the base; trade-off = gain − "
        f"max(0, −change). Learning rate: of {rates}, the one with the best target accuracy on the "
        f"validation split, found with a seed of its own ({SWEEP_SEED}) on the same grid for every "
        "method; “(edge)” marks one at the grid's end. So the trade-off is that of a rate chosen "
        "for the target: at lower rates every method keeps more and learns less (lines at the "
        f"right). The sweep took {min(sweeps):.0f} to {max(sweeps):.0f} s a method (median "
        f"{statistics.median(sweeps):.0f}), training is one seed's seconds, speed the median "
        "step's. Peak memory: all tensors alive at the peak of a training step, the frozen weights "
        f"included. Measured on {'; '.join(where)}."
    )


def write(root: Path) -> None:
    """Make a checkout's README block (in its place, or at the end), docs/'s pages and the plots
    anew."""
    path, found = root / "README.md", read(root / "results", TASK)
    path.write_text(updated(path.read_text(encoding="utf-8"), root), encoding="utf-8")
    (root / "docs/digits.md").write_text(document(found), encoding="utf-8")
    plot(found, root / "docs/digits.png")
    catalogue.write(root)
    cost_report.write(root)


def stale(root: Path) -> list[str]:
    """The files that are not what the registry and the result files give."""
    made: dict[str, str | None] = {
        "README.md": updated((root / "README.md").read_text(encoding="utf-8"), root),
        "docs/digits.md": document(read(root / "results", TASK)),
        "docs/variants.md": catalogue.document(root),
        "docs/cost.md": cost_report.document(root / "results"),
    }
    here = lambda path: path.read_text(encoding="utf-8") if path.is_file() else None
    return [name for name, text in made.items() if here(root / name) != text]


def updated(text: str, root: Path) -> str:
    """README.md's text with its block made anew."""
    return _replaced(text, catalogue.BEGIN, catalogue.END, catalogue.table(root))


def _replaced(text: str, begin: str, end: str, block: str) -> str:
    if begin not in text or end not in text:
        return f"{text.rstrip()}\n\n{block}\n"
    before, rest = text.split(begin, 1)
    return before + block + rest.split(end, 1)[1]


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
    """Target accuracy against trained parameters, and against what is left of the source.

    Raises: ValueError where the rows of the default protocol lack the base or any trained one.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = comparable(rows, Protocol())
    base = next((row for row in rows if row.variant == BASE), None)
    trained = [row for row in rows if row.variant != BASE]
    if base is None or not trained:
        raise ValueError("nothing to plot: results/ lacks the base or any row beside it")
    others = sorted(row.label for row in trained if row.variant != FULL)
    colour = {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(others)}
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, 2, figsize=(11, 5.6), dpi=160, sharey=True, layout="constrained"
        )
        for row in trained:
            ink, marker = colour.get(row.label, INK), "s" if row.variant == FULL else "o"
            x = {axes[0]: row.trainable_parameters, axes[1]: row.mean("source_pct")}
            for axis in axes:
                axis.errorbar(
                    x[axis],
                    row.mean("target_pct"),
                    xerr=row.std("source_pct") if axis is axes[1] else None,
                    yerr=row.std("target_pct"),
                    fmt=marker,
                    color=ink,
                    ecolor=(ink, 0.35),
                    markersize=6.5,
                    markeredgecolor="white",
                    elinewidth=1.4,
                    zorder=3,
                )
            # Rates above the best one keep less and learn less: nothing to see there.
            path_of_rates = [(r.source_pct, r.target_pct) for r in row.sweep if r.lr <= row.lr]
            axes[1].plot(*zip(*path_of_rates), color=ink, alpha=0.5, linewidth=1.1, zorder=2)
        _dress(axes, trained, base)
        # The layout is settled once, before the names are fitted into it.
        figure.canvas.draw()
        figure.set_layout_engine("none")
        for axis in axes:
            _name(axis, trained, colour)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)


INK, MUTED = "#222222", "#777777"
PALETTE = (
    "#d1495b", "#2458a6", "#2a9d8f", "#e07a1f", "#7b4fa3",
    "#5b8e1f", "#b5477f", "#3a8fc7", "#8a6d3b", "#4d5b6a",
)  # fmt: skip
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#bbbbbb",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "figure.facecolor": "white",
}


def _dress(axes: Any, trained: list[Row], base: Row) -> None:
    """Scales, references and titles."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    lowest = min(row.mean("target_pct") - (row.std("target_pct") or 0) for row in trained)
    highest = max(row.mean("target_pct") + (row.std("target_pct") or 0) for row in trained)
    axes[0].set_ylim(max(0.0, lowest - 3), min(100.0, highest + 1.5))
    full = next((row for row in trained if row.variant == FULL), None)
    for axis in axes:
        axis.grid(axis="y", color="#eeeeee", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(length=0)
        if full is not None:
            axis.axhline(full.mean("target_pct"), color=MUTED, linewidth=0.9, linestyle=(0, (5, 4)))
    counts = [row.trainable_parameters for row in trained]
    left, right = axes
    left.set_xscale("log")
    left.set_xlim(min(counts) / 2, max(counts) * 2.5)
    steps = [m * 10**e for e in range(1, 10) for m in (1, 3)]
    left.set_xticks([n for n in steps if min(counts) / 2 <= n <= max(counts) * 2.5])
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter(FuncFormatter(lambda n, _: f"{n:,.0f}"))
    left.set_xlabel("trained parameters")
    left.set_ylabel("target accuracy, %")
    left.set_title("What it learns, by size", loc="left", fontsize=11)
    below = f"base, nothing trained: {base.mean('target_pct'):.1f} % (below)"
    left.text(0.02, 0.03, below, transform=left.transAxes, color=MUTED, fontsize=9)
    kept = base.mean("source_pct")
    right.set_xlim(0, 103)
    right.axvline(kept, color=MUTED, linewidth=0.9, linestyle=(0, (5, 4)))
    right.text(
        kept - 1,
        0.96,
        f"base: {kept:.1f} %",
        transform=right.get_xaxis_transform(),
        color=MUTED,
        fontsize=9,
        ha="right",
    )
    right.set_xlabel("source accuracy after adapting, %")
    right.set_title(
        "What it keeps (lines: validation, at lower learning rates)",
        loc="left",
        fontsize=11,
    )


def _name(axis: Any, trained: list[Row], colour: dict[str, str]) -> None:
    """Write each row's name beside its point, where it covers least."""
    from matplotlib.patheffects import withStroke

    sizes = axis.get_xscale() == "log"
    points, taken, names = [], [], []
    for row in trained:
        x = float(row.trainable_parameters) if sizes else row.mean("source_pct")
        y = row.mean("target_pct")
        dx, dy = (0.0 if sizes else row.std("source_pct") or 0.0), row.std("target_pct") or 0.0
        points.append((x, y, row.method, colour.get(row.label, INK)))
        at = axis.transData.transform([(x, y), (x - dx, y), (x + dx, y), (x, y - dy), (x, y + dy)])
        taken += [
            (at[0, 0] - 9, at[0, 1] - 9, at[0, 0] + 9, at[0, 1] + 9),
            (at[1, 0], at[1, 1] - 2, at[2, 0], at[2, 1] + 2),
            (at[3, 0] - 2, at[3, 1], at[4, 0] + 2, at[4, 1]),
        ]
        if row.variant == FULL:
            taken.append((0, at[0, 1] - 2, 1e4, at[0, 1] + 2))
    frame = axis.get_window_extent()
    sides = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
    places = [(far * dx, far * dy) for far in (6, 11, 17, 24, 32, 44, 58, 74) for dx, dy in sides]
    for x, y, name, ink in points:
        trials = []
        for dx, dy in places:
            text = axis.annotate(
                name,
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="center" if dx == 0 else "left" if dx > 0 else "right",
                va="center" if dy == 0 else "bottom" if dy > 0 else "top",
                fontsize=9,
                color=ink,
                arrowprops=dict(arrowstyle="-", color=ink, alpha=0.4, linewidth=0.7)
                if max(abs(dx), abs(dy)) > 11
                else None,
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
                zorder=4,
            )
            box = text.get_window_extent().extents
            within = frame.x0 < box[0] and box[2] < frame.x1 and frame.y0 < box[1] < frame.y1
            cost = sum(_overlap(box, other) for other in taken) + 1e6 * (not within)
            cost += 10 * sum(_overlap(box, other) for other in names)
            trials.append((cost + abs(dx) + abs(dy), len(trials), text, box))
        best = min(trials, key=lambda trial: trial[:2])
        names.append(tuple(best[3]))
        for trial in trials:
            if trial is not best:
                trial[2].remove()


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
