"""What each registered method is, and what was found about it: README's table of the methods and
docs/variants.md, from the registry, the reviews and the result files."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lora_lite as ll
from lora_lite.bench import cost_rows, rows
from lora_lite.bench.cost import SETTINGS as COST_SETTINGS
from lora_lite.bench.runner import BASE, FULL, TASK, Protocol, default_variant, plain
from lora_lite.describe import formula, papers, parameters
from lora_lite.variant import Variant, variant_class

BEGIN, END = "<!-- methods:begin -->", "<!-- methods:end -->"
COLUMNS = (
    "method",
    "update",
    "paper",
    "trained",
    "target, %",
    "source, %",
    "step, × frozen",
    "PEFT",
)
SIZE, TOKENS = 512, 61
NONE = "–"


def built_in() -> list[type[Variant]]:
    """The library's own methods, by name."""
    found = [variant_class(name) for name in ll.variants()]
    return [cls for cls in found if cls.__module__.startswith("lora_lite.variants.")]


def table(root: Path) -> str:
    """README's block between its markers: a line a method."""
    measured = measured_digits(root)
    lines = [_line(COLUMNS), _line(["---"] * 3 + ["---:"] * (len(COLUMNS) - 3))]
    for cls in built_in():
        row = measured.get(cls.name)
        cost = cost_of(cls, root)
        lines.append(
            _line(
                [
                    f"[{cls.name}]({source(cls)})",
                    formula(cls),
                    ", ".join(f"[{p}](https://arxiv.org/abs/{p})" for p in papers(cls)) or NONE,
                    *accuracies(row),
                    *((f"{cost.over_floor():.2f}", peft_of(cost)) if cost else (NONE, NONE)),
                ]
            )
        )
    for label in (FULL, BASE):
        if label in measured:
            lines.append(_line([label, "", "", *accuracies(measured[label]), NONE, NONE]))
    return "\n".join([BEGIN, *lines, "", "![Digits](docs/digits.png)", "", notes(root), END])


def notes(root: Path) -> str:
    """How the table's numbers came about."""
    protocol = Protocol()
    devices = sorted({cost.device for cls in built_in() if (cost := cost_of(cls, root))})
    on = f" ({', '.join(devices)})" if devices else ""
    return (
        f"Accuracies: mean ± standard deviation over {protocol.seeds} seeds of a small vision "
        "transformer, pretrained on upright digits (source) and adapted to turned ones (target), "
        "each method at the best learning rate of one sweep; method, curves and all numbers in "
        f"[docs/digits.md](docs/digits.md). Step: forward and backward of a Llama{on} in multiples "
        "of the frozen model's, beside PEFT's with float32 / bfloat16 adapters; as a CUDA graph "
        "and compiled: [docs/cost.md](docs/cost.md). What is slower or worse is shown like the "
        "rest; – is not measured. Shapes, work and verdicts of each: "
        "[docs/variants.md](docs/variants.md)."
    )


def measured_digits(root: Path) -> dict[str, rows.Row]:
    """The rows of the digits benchmark's default protocol, by method."""
    usual = plain(Protocol())
    found = rows.read(root / "results", TASK)
    return {row.method: row for row in found if row.variant == BASE or row.protocol == usual}


def accuracies(row: rows.Row | None) -> tuple[str, str, str]:
    """Trained parameters, target and source accuracy of the digits benchmark."""
    if row is None:
        return NONE, NONE, NONE
    text = lambda quantity: (
        f"{row.mean(quantity):.1f}"
        + ("" if row.std(quantity) is None else f" ± {row.std(quantity):.1f}")
    )
    return f"{row.trainable_parameters:,}", text("target_pct"), text("source_pct")


def cost_of(cls: type[Variant], root: Path) -> cost_rows.Row | None:
    """The eager row of a method's first setting on a GPU, all projections."""
    label = rows.label(cls.name, COST_SETTINGS.get(cls.name, ({},))[0])
    for row in cost_rows.read(root / "results"):
        usual = row.track == "all-linear" and row.mode == "eager" and not row.changes
        if row.label == label and row.device_type == "cuda" and usual:
            return row
    return None


def peft_of(cost: cost_rows.Row) -> str:
    """PEFT's multiples of the floor: at its default, and with adapters in the base's dtype."""
    known = [cost.over_floor(side) for side in cost_rows.PEFT_DTYPES]
    return " / ".join(NONE if v is None else f"{v:.2f}" for v in known) if any(known) else NONE


def document(root: Path) -> str:
    """docs/variants.md."""
    parts = [
        "# The methods",
        "Generated from the registry, the reviews and results/ by `just report`. Parameters are a "
        "layer's, at the defaults; work is multiply-adds a token beyond the frozen layer's own, "
        f"counted on a layer of {SIZE} × {SIZE}, what is done once a step left out. Verdicts are "
        "those of docs/reviews. Accuracies are the digits benchmark's, multiples of the frozen "
        "model's step those of the cost benchmark; – is not measured.",
    ]
    for cls in built_in():
        parts.append(f"## {cls.name}\n\n{formula(cls)}\n\n" + "\n".join(_facts(cls, root)))
    return "\n\n".join(parts) + "\n"


def _facts(cls: type[Variant], root: Path) -> Iterator[str]:
    variant = default_variant(cls)
    cited = ", ".join(f"[arXiv:{p}](https://arxiv.org/abs/{p})" for p in papers(cls))
    yield f"- Code: [{source(cls)}](../{source(cls)})" + (f"; paper: {cited}" if cited else "")
    yield f"- Adapts: {cls.site}"
    for key, spec in cls.specs.items():
        shape = ", ".join(cls.annotations[key].dim_str.split())
        kind = "trained" if spec.trainable else "frozen" if spec.saved else "frozen, not saved"
        yield f"- `{key}` ({shape}): {kind}{', shared by all layers' * spec.shared}"
    yield f"- Trained parameters: {parameters(variant)}"
    if (work := extra_work(variant)) is not None:
        share = f"{100 * work / SIZE**2:.1f} %"
        yield f"- Work: {work:,.0f} multiply-adds a token, {share} of the layer's"
    yield f"- Start: {'the identity' if variant.starts_as_identity() else 'near the identity'}"
    reason = variant.nonlinear()
    yield f"- Merges: {'no, ' + reason if reason else 'yes'}"
    if found := verdicts(cls, root):
        yield f"- [Review](reviews/{review(cls)}): {found}"
    if row := measured_digits(root).get(cls.name):
        trained, target, source_ = accuracies(row)
        yield f"- Digits: {trained} trained parameters, target {target} %, source {source_} %"
    if cost := cost_of(cls, root):
        yield (
            f"- Step on {cost.device}, {cost.label}: {cost.over_floor():.2f} × frozen, "
            f"{cost.extra_mib():,.0f} MiB more; PEFT {peft_of(cost)}"
        )


def source(cls: type[Variant]) -> str:
    return f"src/{cls.__module__.replace('.', '/')}.py"


def review(cls: type[Variant]) -> str:
    return f"{cls.__module__.rsplit('.', 1)[-1]}.md"


def verdicts(cls: type[Variant], root: Path) -> str:
    """How often a method's review finds what."""
    path = root / "docs/reviews" / review(cls)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    said = lambda word: len(re.findall(rf"(?:\*\*|\| ){word}\b", text))
    counts = {word: said(word) for word in ("MATCHES", "DEVIATES-OK", "BUG")}
    counts["BUG, fixed"] = text.count("**BUG**, fixed")
    counts["BUG"] -= counts["BUG, fixed"]
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


class _Counted(TorchDispatchMode):
    """Counts multiply-adds of operations whose result has as many rows as there are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for result in out if isinstance(out, tuple | list) else (out,):
            moved = isinstance(result, Tensor) and not op.is_view and TOKENS in result.shape
            if moved and result.is_floating_point():
                self.total += result.numel() * _terms(op, args)
        return out


def _terms(op: Any, args: Any) -> int:
    """Multiply-adds behind each number of an operation's result."""
    name = op.name().split("::")[-1].split(".")[0]
    if name in ("mm", "bmm", "addmm", "baddbmm"):
        return args[-1].shape[-2] if name in ("mm", "bmm") else args[2].shape[-2]
    return 0 if name in ("clone", "_to_copy", "copy_", "cat", "index", "constant_pad_nd") else 1


def extra_work(variant: Variant) -> float | None:
    """Multiply-adds a token that a method adds to a square linear layer; None at other sites."""
    if variant.site != "linear":
        return None

    def work(adapt: bool) -> int:
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Linear(SIZE, SIZE))
        if adapt:
            calibration = None
            if type(variant).statistic is not None:
                calibration = [torch.randn(2 * SIZE, SIZE)]
            model = nn.Module()
            model.layer, model.forward = layer[0], lambda x: model.layer(x)
            ll.attach(model, variant, ["layer"], seed=0, calibration=calibration)
        layer.eval()
        with torch.no_grad(), _Counted() as counted:
            layer(torch.randn(TOKENS, SIZE))
        return counted.total

    return (work(True) - work(False)) / TOKENS


def write(root: Path) -> None:
    (root / "docs/variants.md").write_text(document(root), encoding="utf-8")


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"
