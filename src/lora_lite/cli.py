"""The command `lora-lite`."""

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lora_lite as ll
from lora_lite.bench import cost as costing
from lora_lite.bench import digits, rows, runner
from lora_lite.bench.settings import ALSO
from lora_lite.variant import Variant, nearest, variant_class

EXTRA = ("tyro", "rich", "sklearn", "matplotlib", "transformers")


class Refusal(Exception):
    """What was asked for can't be done; the message says why."""


@dataclass(frozen=True)
class Options:
    """Where the adapters go, and where the rows go."""

    targets: tuple[str, ...] = ("all-linear",)
    """Endings of layer names, of q_proj k_proj v_proj o_proj up_proj down_proj."""
    results: Path | None = None
    """Folder of result files: the source checkout's results/, else ./results."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, `sys.argv`'s unless given; returns the exit code, 2 for a refusal."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        # A variant's hyperparameters are options of their own, so its name is read first.
        if words[:1] == ["bench"] and len(words) > 1 and not words[1].startswith("-"):
            bench(words[1], words[2:])
            return 0
        import tyro

        commands = {
            "bench": bench_usage,
            "bench-all": bench_all,
            "cost": cost,
            "report": report,
            "variants": variants,
            "describe": describe,
        }
        tyro.extras.subcommand_cli_from_dict(
            commands,
            prog="lora-lite",
            args=words,
            use_underscores=True,
            config=(tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes),
        )
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRA:
            raise
        return _refuse(f'{error.name} is not installed; pip install "lora-lite[bench]"')
    except Refusal as refusal:
        return _refuse(str(refusal))
    return 0


def bench(variant: str, words: list[str]) -> None:
    """Fine-tune the shipped model with one method, and report it beside the rows measured so far.

    Its hyperparameters are options; what is left out keeps the benchmark's default.
    """
    import tyro

    cls = None if variant == "full" else _find(variant)
    fields: list[Any] = [
        ("protocol", runner.Protocol, runner.Protocol()),
        ("options", Options, Options()),
    ]
    if cls is not None:
        fields.append(("variant", cls, runner.default_variant(cls)))
    arguments, unknown = tyro.cli(
        dataclasses.make_dataclass("Arguments", fields),
        prog=f"lora-lite bench {variant}",
        description=bench.__doc__,
        args=words,
        return_unknown_args=True,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if unknown:
        word = unknown[0].split("=")[0].lstrip("-").replace("-", "_")
        known = [f.name for _, kind, _ in fields for f in dataclasses.fields(kind)]
        raise Refusal(f"{variant} has no hyperparameter or option {word!r}; {nearest(word, known)}")
    targets = arguments.options.targets
    method = runner.Method(
        None if cls is None else arguments.variant,
        "all-linear" if targets == ("all-linear",) else list(targets),
    )
    if problem := _misfit(method):
        raise Refusal(problem)
    _measure([method], arguments.protocol, arguments.options.results)


def bench_usage(variant: str) -> None:
    """Measure one method: `bench VARIANT [options]`; `bench VARIANT --help` lists them.

    Args:
        variant: A variant's name, a .py file that declares one, or "full" for full fine-tuning.
    """
    bench(variant, [])


def bench_all(
    protocol: runner.Protocol = runner.Protocol(),  # noqa: B008
    results: Path | None = None,
) -> None:
    """Measure full fine-tuning and every variant at its defaults.

    Args:
        protocol: What is the same for all methods that are compared.
        results: Folder of result files: the source checkout's results/, else ./results.
    """
    named = [*((name, {}) for name in ll.variants()), *ALSO]
    methods = [
        runner.Method(runner.default_variant(variant_class(name), **hyperparameters))
        for name, hyperparameters in named
    ]
    fitting = [runner.Method(None)]
    for method in methods:
        if problem := _misfit(method):
            print(f"left out: {problem}", file=sys.stderr)
        else:
            fitting.append(method)
    _measure(fitting, protocol, results)


def cost(options: costing.Options) -> None:
    """Measure what a training step costs with each variant, beside the frozen model and PEFT."""
    print(costing.table(costing.run(options)))


def report(root: Path | None = None) -> None:
    """Write README.md's tables and the plots in docs/ again from results/.

    Args:
        root: The source checkout; by default the one that this package runs from.
    """
    from lora_lite.bench import report

    root = root or rows.checkout()
    if root is None or not (root / "README.md").is_file():
        raise Refusal("there is no source checkout whose README.md to write; name one with --root")
    report.write(root)


def variants() -> None:
    """List the variants."""
    for name in ll.variants():
        summary, *_ = (variant_class(name).__doc__ or "").strip().splitlines() or [""]
        print(f"{name:<16}{summary}")


def describe(variant: str) -> None:
    """Print a variant's documentation, hyperparameters and tensors.

    Args:
        variant: Its name, or a .py file that declares it.
    """
    print(ll.describe(_find(variant)))


def _measure(methods: list[runner.Method], protocol: runner.Protocol, results: Path | None) -> None:
    """Measure methods one after the other, writing each row as it is done, and show the table."""
    from rich.console import Console

    from lora_lite.bench import report

    root = rows.checkout()
    if results is None:
        results = (root or Path()) / "results"
    full = runner.Method(None)
    measured = {row.label: row for row in rows.read(results, runner.TASK)}
    base = runner.base_row()
    if runner.BASE not in measured or measured[runner.BASE].runs != base.runs:
        rows.write(base, results)
    if full not in methods and full.label(protocol) not in measured:
        methods = [full, *methods]
    with _progress(len(methods) * protocol.total_steps) as advance:
        for method in methods:
            rows.write(runner.measure(method, protocol, advance), results)
    shown = report.comparable(rows.read(results, runner.TASK), protocol)
    Console().print(report.table(shown, [m.label(protocol) for m in methods if m != full]))
    if root is not None and results.resolve() == root / "results":
        report.write(root)


@contextmanager
def _progress(total: int) -> Iterator[runner.Report]:
    """A progress bar on stderr; what it gives is called once a step, with what is done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as bar:
        task = bar.add_task("", total=total)
        yield lambda what: bar.update(task, advance=1, description=what)


def _find(variant: str) -> type[Variant]:
    """A variant by its name, or by the .py file that declares it."""
    if not variant.endswith(".py"):
        try:
            return variant_class(variant)
        except KeyError as error:
            raise Refusal(error.args[0]) from None
    path = Path(variant)
    if not path.is_file():
        raise Refusal(f"there is no file {variant}")
    spec = importlib.util.spec_from_file_location(f"variant_file_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Variant)
        and value.__module__ == spec.name
        and "name" in vars(value)
    ]
    if len(found) != 1:
        names = ", ".join(cls.name for cls in found) or "none"
        raise Refusal(f"{variant} must declare one variant; it declares {names}")
    return found[0]


def _misfit(method: runner.Method) -> str | None:
    """Why a method can't go on the benchmark's model, or None."""
    if method.variant is None:
        return None
    if method.variant.needs_prompt:
        return f"{method.name}: edits the tokens of prompts, and digits have none"
    try:
        ll.plan(digits.base_model(), method.variant, method.targets)
    except ValueError as error:
        return str(error)
    return None


def _refuse(message: str) -> int:
    print(f"lora-lite: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
