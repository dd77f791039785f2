"""What a training step costs with a method on a Llama, over the frozen model's own step.

The floor is the frozen model's forward and backward: gradients to the input, none to weights. It,
our method, PEFT's default (float32 adapter tensors) and PEFT with adapter tensors in the base's
dtype are timed in one process on one set of weights, in alternating rounds, so that what drifts
drifts for all. Before, PEFT's layers get our tensors, moved off their start, and must give the
same outputs and input gradients. No optimizer step, schedule or penalty is timed.
"""

import copy
import dataclasses
import gc
import importlib.metadata
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

import lora_lite as ll
from lora_lite.adapted import adapters
from lora_lite.bench import rows
from lora_lite.bench.memory import peak_bytes, resident_bytes
from lora_lite.bench.twins import Twin, twin
from lora_lite.targets import Targets
from lora_lite.testing import move
from lora_lite.variant import Variant, configure, variant_class

JORA = dict(S_L=96, S_R=96, k=24)
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": (dict(r=16),),
    "rslora": (dict(r=16),),
    "dora": (dict(r=16),),
    "pissa": (dict(r=16),),
    "oft": (dict(block_size=32), dict(block_size=32, exact=True)),
    "boft": (dict(block_size=8, m=2),),
    "hra": (dict(r=8),),
    "vera": (dict(r=256),),
    "jora": (
        dict(JORA, magnitude="none"),
        dict(JORA, magnitude="oer_softmax"),
        dict(JORA, core="block"),
        dict(JORA, core="lowrank"),
    ),
    "antipasto_rot": (dict(r=256),),
    "dplr": (dict(r=256),),
}
"""The rows of each variant; one that is not here has a row at its defaults."""

Track = Literal["all-linear", "q+v"]
Mode = Literal["eager", "compiled"]
Dtype = Literal["bfloat16", "float32"]
TRACKS: dict[str, Targets] = {"all-linear": "all-linear", "q+v": ["q_proj", "v_proj"]}

MIB = 2**20
ROUNDS = 4
SEED = 0
# Large enough to change the outputs by far more than rounding, small enough to keep them tame.
MOVED = 0.02
AGREEMENT = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
"""Largest ‖ours − theirs‖/‖theirs‖ of outputs and input gradients."""
PEFT_DTYPES = {"peft_default": True, "peft_same_dtype": False}
"""PEFT's sides, and what each gives as `autocast_adapter_dtype`."""


@dataclass(frozen=True)
class Shape:
    """The Llama and its input; Llama-2-7B's widths unless another is said. Heads are 128 wide, or
    64 below 1024."""

    width: int = 4096
    layers: int = 2
    tokens: int = 4096
    length: int = 1024
    dtype: Dtype = "bfloat16"

    def __post_init__(self) -> None:
        for name, least in dict(width=64, layers=1, tokens=1, length=1).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be ≥ {least}")
        if self.width % self.head_width:
            raise ValueError(f"width={self.width} must be a multiple of {self.head_width}")
        if self.tokens % min(self.length, self.tokens):
            raise ValueError(f"tokens={self.tokens} must be a multiple of length={self.length}")

    @property
    def intermediate(self) -> int:
        """The MLP's width: 11008 for 4096, in proportion for others, a multiple of 64."""
        return -(-self.width * 43 // (16 * 64)) * 64

    @property
    def head_width(self) -> int:
        return 128 if self.width >= 1024 else 64

    @property
    def batch(self) -> tuple[int, int]:
        """(sequences, tokens in each)."""
        length = min(self.length, self.tokens)
        return self.tokens // length, length


DEFAULT = {
    "cuda": Shape(),
    "cpu": Shape(width=256, tokens=32, length=16, dtype="float32"),
}
"""By the kind of device."""


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
    mode: str
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
    def file_name(self) -> str:
        usual = dataclasses.asdict(DEFAULT[self.device_type])
        changes = {key: value for key, value in self.shape.items() if usual[key] != value}
        return rows.file_name(
            rows.label(f"{self.label} {self.track} {self.mode} {self.device}", changes)
        )


def write(row: Row, results: Path) -> Path:
    """Store a row as results/cost/<its setting>.json, in place of the one before."""
    path = results / "cost" / f"{row.file_name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    data = dataclasses.asdict(row) | {"summary": row.summary()}
    path.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read(results: Path) -> list[Row]:
    """All rows in results/cost, by label, track and mode."""
    out = []
    for path in sorted((results / "cost").glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        del data["summary"]
        for side in ("floor", "ours", *PEFT_DTYPES):
            data[side] = None if data[side] is None else Cost(**data[side])
        out.append(Row(**data))
    return sorted(out, key=lambda row: (row.label, row.track, row.mode, row.file_name))


class Disagreement(Exception):
    """PEFT computes something else from the same tensors; then its time means nothing."""


@dataclass
class Side:
    """A model that is timed, and what is known of it before."""

    name: str
    model: nn.Module
    init_seconds: float | None = None
    call: Callable[..., Any] = field(init=False)
    fullgraph: bool | None = None

    def __post_init__(self) -> None:
        self.call = self.model
        self.trained = [p for p in self.model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Workload:
    """The frozen model, a random input and a random gradient to the output."""

    model: nn.Module
    x: Tensor
    y_grad: Tensor
    shape: Shape
    device: str

    def forward(self, side: Side) -> Tensor:
        return side.call(inputs_embeds=self.x, use_cache=False).last_hidden_state

    def step(self, side: Side) -> None:
        self.forward(side).backward(self.y_grad)

    def clear(self, side: Side) -> None:
        """Forget the gradients, as an optimizer does between steps."""
        for tensor in (self.x, *side.trained):
            tensor.grad = None

    def shell(self) -> nn.Module:
        """The model anew, on the same weights."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(t): t for t in tensors})


def workload(shape: Shape, device: str) -> Workload:
    """A Llama of random weights without embedding and head, in training mode and frozen."""
    from transformers import LlamaConfig, LlamaModel

    heads = shape.width // shape.head_width
    config = LlamaConfig(
        vocab_size=1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(shape.length, 2048),
    )
    dtype = getattr(torch, shape.dtype)
    with torch.random.fork_rng(devices=[device] if _kind(device) == "cuda" else []):
        torch.manual_seed(SEED)
        with torch.device(device):
            model = LlamaModel(config).to(dtype).requires_grad_(False).train()
            x, y_grad = (torch.randn(*shape.batch, shape.width, dtype=dtype) for _ in range(2))
    return Workload(model, x.requires_grad_(), y_grad, shape, device)


@dataclass(frozen=True)
class Case:
    """A configured method on its targets."""

    variant: Variant
    label: str
    track: str
    targets: Targets


def cases(names: Sequence[str], tracks: Sequence[str]) -> list[Case]:
    """The benchmark's settings of these variants on each track.

    Raises: KeyError for an unknown variant.
    """
    return [
        Case(configure(name, **setting), rows.label(name, setting), track, TRACKS[track])
        for track in tracks
        for name in names
        for setting in SETTINGS.get(name, ({},))
    ]


def measure(
    case: Case,
    work: Workload,
    *,
    modes: Sequence[str] = ("eager", "compiled"),
    steps: int = 20,
    warmup: int = 5,
    with_peft: bool = True,
    floors: dict[str, Side] | None = None,
    commit: str | None = None,
) -> Iterator[Row]:
    """One row a mode, each as it is done.

    floors: the floor's side by mode, kept from one method to the next, so that it compiles once.

    Raises: what `attach` raises, and RuntimeError where the floor's or our step can't run; what
    stops a side of PEFT's is in the row.
    """
    floors = {} if floors is None else floors
    sides, params, absent = _sides(case, work, with_peft)
    for mode in modes:
        floor = floors.setdefault(mode, Side("floor", work.shell()))
        together, apart, missing = [], [], dict(absent)
        for side in (floor, *sides):
            if reason := _failure(partial(_prepare, side, work, mode, warmup)):
                if side.name not in PEFT_DTYPES:
                    raise RuntimeError(f"{side.name}, {mode}: {reason}")
                missing[side.name] = reason
                _free(work)
            else:
                (apart if side.fullgraph is False else together).append(side)
        costs, steps_ms = _costs(together, work, mode, steps)
        for side in apart:
            with _fresh_compiler(floors):
                side.call = torch.compile(side.model, dynamic=False)
                if reason := _failure(partial(_repeat, side, work, warmup + 1)):
                    missing[side.name] = reason
                    _free(work)
                else:
                    costs |= _costs([side], work, mode, steps)[0]
        if "ours" not in costs:
            raise RuntimeError(f"ours, {mode}: {missing['ours']}")
        yield Row(
            label=case.label,
            variant=case.variant.name,
            hyperparameters=dataclasses.asdict(case.variant),
            track=case.track,
            mode=mode,
            device=rows.environment(work.device)["processor"],
            device_type=_kind(work.device),
            shape=dataclasses.asdict(work.shape),
            steps=len(steps_ms),
            params=params,
            floor=costs["floor"],
            floor_drift=_drift(steps_ms),
            ours=costs["ours"],
            peft_default=costs.get("peft_default"),
            peft_same_dtype=costs.get("peft_same_dtype"),
            missing=missing,
            versions=versions(work.device),
            commit=commit or rows.commit(),
        )


def versions(device: str) -> dict[str, Any]:
    """Versions and processor; None for what is not installed."""
    out = rows.environment(device)
    for package in ("peft", "transformers", "triton"):
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            out[package] = None
    return out


def _sides(case: Case, work: Workload, with_peft: bool) -> tuple[list[Side], int, dict[str, str]]:
    """Ours, and those of PEFT's that compute the same; our parameters; why others are missing."""
    model = work.shell()
    start = _now(work.device)
    plan = ll.attach(model, case.variant, case.targets, seed=SEED)
    ours = Side("ours", model, _now(work.device) - start)
    move(model, scale=MOVED)
    sides, missing = [ours], {}
    if not with_peft:
        return sides, plan.trainable, dict.fromkeys(PEFT_DTYPES, "not asked for")
    try:
        counterpart = twin(case.variant, [site.name for site in plan.sites])
    except ModuleNotFoundError as error:
        return sides, plan.trainable, dict.fromkeys(PEFT_DTYPES, f"{error.name} is not installed")
    if counterpart is None:
        return sides, plan.trainable, dict.fromkeys(PEFT_DTYPES, "PEFT has no such method")
    floor = Side("floor", work.model)
    for name, float32 in PEFT_DTYPES.items():

        def add(name: str = name, float32: bool = float32) -> None:
            side = _peft_side(name, counterpart, ours, work, float32)
            check_agreement(ours, side, floor, work)
            sides.append(side)

        if reason := _failure(add):
            missing[name] = reason
            _free(work)
    return sides, plan.trainable, missing


def _peft_side(name: str, twin: Twin, ours: Side, work: Workload, float32: bool) -> Side:
    """PEFT's model with our tensors in it."""
    import peft

    start = _now(work.device)
    model = peft.get_peft_model(
        work.shell(), copy.deepcopy(twin.config), autocast_adapter_dtype=float32
    )
    seconds = _now(work.device) - start
    for site, _, adapter in adapters(ours.model):
        twin.load(model.base_model.model.get_submodule(site), adapter.tensors())
    return Side(name, model, seconds)


def check_agreement(ours: Side, theirs: Side, floor: Side, work: Workload) -> None:
    """Compare outputs and input gradients.

    Raises: Disagreement where they differ by more than rounding, or by as much as a quarter of
    what the adapters do at all.
    """

    def run(side: Side) -> tuple[Tensor, Tensor]:
        work.clear(side)
        y = work.forward(side)
        y.backward(work.y_grad)
        x_grad = work.x.grad
        work.clear(side)
        return y.detach().double(), x_grad.double()

    for what, a, b, base in zip(("outputs", "input gradients"), run(ours), run(theirs), run(floor)):
        error, effect = (float((t - b).norm() / b.norm()) for t in (a, base))
        limit = min(AGREEMENT[getattr(torch, work.shape.dtype)], effect / 4)
        # NaN is no agreement either.
        if not error <= limit:
            raise Disagreement(
                f"its {what} are {error:.1e} from ours, above {limit:.1e}, with the same tensors"
            )


def _prepare(side: Side, work: Workload, mode: str, warmup: int) -> None:
    """Compile where asked and not done yet, and warm up. Where the model doesn't compile whole,
    only `fullgraph` is set to False.

    Raises: what a step raises; AssertionError where a compiled model runs uncompiled.
    """
    if mode == "eager":
        side.call, side.fullgraph = side.model, None
    elif side.fullgraph is None:
        side.call, side.fullgraph = torch.compile(side.model, fullgraph=True, dynamic=False), True
    try:
        _repeat(side, work, 1)
    except torch._dynamo.exc.Unsupported:
        side.fullgraph = False
        return
    if mode == "compiled":
        inputs = {node.name() for node, _ in work.forward(side).grad_fn.next_functions if node}
        assert inputs == {"torch::autograd::AccumulateGrad"}, "ran uncompiled"
    _repeat(side, work, warmup)


@contextmanager
def _fresh_compiler(floors: dict[str, Side]) -> Iterator[None]:
    """A context for compiling a model in parts: the compiler then takes the code that the model
    shares with others for uncompilable, so it forgets all before and after."""
    torch._dynamo.reset()
    floors.pop("compiled", None)
    try:
        yield
    finally:
        torch._dynamo.reset()


def _costs(
    sides: Sequence[Side], work: Workload, mode: str, steps: int
) -> tuple[dict[str, Cost], list[float]]:
    """What these sides cost, timed in alternating rounds; and the first one's milliseconds."""
    peaks = [_peak_mib(side, work, mode) for side in sides]
    saved = [_saved_mib(side, work) if mode == "eager" else None for side in sides]
    ms = _time(sides, work, steps)
    costs = {
        side.name: Cost(*_percentiles(times), peak, kept, side.init_seconds, side.fullgraph)
        for side, times, peak, kept in zip(sides, ms, peaks, saved)
    }
    return costs, ms[0]


def _repeat(side: Side, work: Workload, steps: int) -> None:
    for _ in range(steps):
        work.clear(side)
        work.step(side)
    work.clear(side)
    _synchronise(work.device)


def _time(sides: Sequence[Side], work: Workload, steps: int) -> list[list[float]]:
    """Milliseconds of at least `steps` steps of each side, in alternating rounds.

    On CUDA a step lasts from event to event on the stream, with the host running ahead as it does
    in training.
    """
    ms: list[list[float]] = [[] for _ in sides]
    for _ in range(ROUNDS):
        for side, times in zip(sides, ms):
            _repeat(side, work, 1)
            times += _timed(side, work, math.ceil(steps / ROUNDS))
    return ms


def _drift(ms: Sequence[float]) -> float:
    """The slowest over the fastest round, by medians."""
    n = len(ms) // ROUNDS
    medians = [statistics.median(ms[i : i + n]) for i in range(0, len(ms), n)]
    return max(medians) / min(medians)


def _timed(side: Side, work: Workload, steps: int) -> list[float]:
    if _kind(work.device) == "cuda":
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(steps)]
        for start, end in events:
            work.clear(side)
            start.record()
            work.step(side)
            end.record()
        torch.cuda.synchronize(work.device)
        return [start.elapsed_time(end) for start, end in events]
    times = []
    for _ in range(steps):
        work.clear(side)
        start_s = time.perf_counter()
        work.step(side)
        times.append(1e3 * (time.perf_counter() - start_s))
    return times


def _percentiles(ms: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else [ms[0]] * 4
    return statistics.median(ms), fifths[0], fifths[3]


def _peak_mib(side: Side, work: Workload, mode: str) -> float | None:
    """The side's own tensors, and what a step adds to them at its peak."""
    cuda = _kind(work.device) == "cuda"
    if not cuda and mode == "compiled":
        # The CPU's count follows single operations, and a compiled step has none.
        return None
    _repeat(side, work, 1)
    before = torch.cuda.memory_allocated(work.device) if cuda else 0
    added = peak_bytes(lambda: work.step(side), 0, work.device) - before
    work.clear(side)
    return (resident_bytes(side.model) + added) / MIB


def _saved_mib(side: Side, work: Workload) -> float:
    """What autograd keeps for backward, each storage once."""
    own = {
        t.untyped_storage().data_ptr() for t in (*side.model.parameters(), *side.model.buffers())
    }
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = work.forward(side)
    # The graph holds every packed tensor until here, so no address came twice.
    del y
    return sum(kept.values()) / MIB


def _failure(action: Callable[[], object]) -> str | None:
    """Run it; why it failed in one line, or None. The error goes, and with it what it held."""
    try:
        action()
    except Exception as error:
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text}"[:300]
    return None


def _free(work: Workload) -> None:
    """Give back what a side that is gone or failed left behind."""
    work.x.grad = None
    gc.collect()
    if _kind(work.device) == "cuda":
        torch.cuda.empty_cache()


def _kind(device: str) -> str:
    return torch.device(device).type


def _synchronise(device: str) -> None:
    if _kind(device) == "cuda":
        torch.cuda.synchronize(device)


def _now(device: str) -> float:
    _synchronise(device)
    return time.perf_counter()


@dataclass(frozen=True)
class Options:
    """What to measure. What is left out is measured whole."""

    variants: tuple[str, ...] = ()
    """Methods; all by default."""
    tracks: tuple[Track, ...] = ("all-linear", "q+v")
    """Layers: all seven projections, or q_proj and v_proj."""
    modes: tuple[Mode, ...] = ("eager", "compiled")
    """As it is, or by torch.compile."""
    device: str | None = None
    """The first CUDA device where there is one, else the CPU, with a small model."""
    dtype: Dtype | None = None
    """The base's; bfloat16 on CUDA, float32 on a CPU."""
    steps: int = 20
    """Timed steps of each side."""
    warmup: int = 5
    """Steps before."""
    peft: bool = True
    """Measure PEFT beside ours."""
    layers: int | None = None
    """Decoder layers, 2."""
    tokens: int | None = None
    """Tokens in a step: 4096 on CUDA, 32 on a CPU."""
    width: int | None = None
    """The model's width: 4096 on CUDA, 256 on a CPU."""
    scaling: bool = False
    """Measure instead how the cost grows with tokens, width, rank and adapted layers, and the
    host's time for a layer call."""
    results: Path | None = None
    """Folder of result files: the source checkout's results/, else ./results."""
    commit: str | None = None
    """The source's commit, for the rows, where there is no checkout to ask."""

    def __post_init__(self) -> None:
        for name, least in dict(steps=1, warmup=0).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be ≥ {least}")
        if _kind(self.where) == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={self.device!r}: torch finds no CUDA device here")
        for name in self.variants:
            try:
                variant_class(name)
            except KeyError as error:
                raise ValueError(error.args[0]) from None
        _ = self.shape

    @property
    def where(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def shape(self) -> Shape:
        changes = {key: getattr(self, key) for key in ("dtype", "layers", "tokens", "width")}
        return dataclasses.replace(
            DEFAULT[_kind(self.where)], **{k: v for k, v in changes.items() if v is not None}
        )

    @property
    def folder(self) -> Path:
        return self.results or (rows.checkout() or Path()) / "results"


def run(options: Options) -> list[Row]:
    """Measure what the options ask for, writing and printing each row as it is done.

    A method that fails is printed with the reason, and the others go on.
    """
    work = workload(options.shape, options.where)
    floors: dict[str, Side] = {}
    done: list[Row] = []
    started = time.perf_counter()
    with unlimited_recompiles():
        for case in cases(options.variants or ll.variants(), options.tracks):

            def row_by_row(case: Case = case) -> None:
                for row in measure(
                    case,
                    work,
                    modes=options.modes,
                    steps=options.steps,
                    warmup=options.warmup,
                    with_peft=options.peft,
                    floors=floors,
                    commit=options.commit,
                ):
                    write(row, options.folder)
                    done.append(row)
                    seconds = time.perf_counter() - started
                    print(f"[{seconds:5.0f} s] {table([row], heading=False)}", flush=True)
                    for side, why in row.missing.items():
                        print(f"          without {side}: {why}", flush=True)

            if reason := _failure(row_by_row):
                print(f"          {case.label} {case.track} failed: {reason}", flush=True)
            _free(work)
    return done


def unlimited_recompiles() -> AbstractContextManager[None]:
    """A context in which torch.compile takes any number of models that share their code."""
    return torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000)


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
                row.label,
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


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m lora_lite.bench.cost`: the command `lora-lite cost`, without the others' needs."""
    import tyro

    options = tyro.cli(
        Options, prog="lora-lite cost", description=__doc__, args=argv, use_underscores=True
    )
    print(table(run(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
