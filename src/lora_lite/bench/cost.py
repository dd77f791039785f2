"""What a training step costs with a method on a Llama, over the frozen model's own step.

The floor is the frozen model's forward and backward: gradients to the input, none to weights. It,
our method, PEFT's default (float32 adapter tensors) and PEFT with adapter tensors in the base's
dtype are timed in one process on one set of weights, in alternating rounds, so that what drifts
drifts for all. Before, PEFT's layers get our tensors, moved off their start until they do more than
rounding does, and must give the same outputs and input gradients. No optimizer step, schedule or
penalty is timed.

Modes: eager; compiled, by torch.compile; and on CUDA graph, the eager step recorded as a CUDA graph
and replayed, which is what it costs the device alone, however slow the host.
"""

import copy
import dataclasses
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import lora_lite as ll
from lora_lite.adapted import adapters
from lora_lite.base import LinearBase
from lora_lite.bench import rows
from lora_lite.bench.cost_rows import (
    PEFT_DTYPES,
    TASK,
    Cost,
    Mode,
    Row,
    table,
    versions,
    write,
)
from lora_lite.bench.memory import peak_bytes, resident_bytes
from lora_lite.bench.twins import Twin, twin
from lora_lite.bench.workload import (
    DEFAULT,
    SEED,
    Dtype,
    Shape,
    Side,
    Workload,
    kind,
    llama,
    now,
    synchronise,
)
from lora_lite.ops.svd import SvdMethod, is_randomised
from lora_lite.prompts import prompt_hooks
from lora_lite.targets import Targets
from lora_lite.testing import calibration_for, move
from lora_lite.variant import Variant, configure, variant_class

JORA = dict(S_L=96, S_R=96, k=24)
SETTINGS: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": (dict(r=16),),
    "rslora": (dict(r=16),),
    "dora": (dict(r=16),),
    "pissa": (dict(r=16),),
    "adalora": (dict(init_r=16),),
    "oft": (dict(block_size=32), dict(block_size=32, exact=True)),
    # PEFT's has one level where its CUDA extension is not built.
    "boft": (dict(block_size=8, m=2), dict(block_size=8)),
    "hra": (dict(r=8),),
    "vera": (dict(r=256),),
    "eva": (dict(r=16),),
    "jora": (
        dict(JORA, magnitude="none"),
        dict(JORA, magnitude="oer_softmax"),
        dict(JORA, core="block"),
        dict(JORA, core="lowrank"),
    ),
    "antipasto": (dict(r=256),),
    "antipasto_rot": (dict(r=256),),
    "dplr": (dict(r=256),),
}
"""The rows of each variant; one that is not here has a row at its defaults."""

Track = Literal["all-linear", "q+v"]
TRACKS: dict[str, Targets] = {"all-linear": "all-linear", "q+v": ["q_proj", "v_proj"]}

MIB = 2**20
ROUNDS = 4
KEPT_TRIPLETS = 256
AGREEMENT = {torch.bfloat16: 3e-2, torch.float32: 1e-4}
"""Largest ‖ours − theirs‖/‖theirs‖ of outputs and input gradients, up to the usual width."""
MARGIN = 4
"""What the adapters do, over the largest disagreement."""
MOVED = tuple(0.02 * 1.2**i for i in range(40))
"""Standard deviations of the noise that moves adapters off their start, the next where one does too
little."""


class Disagreement(Exception):
    """PEFT computes something else from the same tensors; then its time means nothing."""


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
    sides, params, absent = sides_of(case, work, with_peft)
    for mode in modes:
        floor = floors.setdefault(mode, Side("floor", work.shell()))
        together, apart, missing = [], [], dict(absent)
        for side in (floor, *sides):
            if reason := failure(partial(_prepare, side, work, mode, warmup)):
                if side.name not in PEFT_DTYPES:
                    raise RuntimeError(f"{side.name}, {mode}: {reason}")
                missing[side.name] = reason
                free(work)
            else:
                (apart if side.fullgraph is False else together).append(side)
        costs, steps_ms = _costs(together, work, mode, steps)
        for side in apart:
            with _fresh_compiler(floors):
                side.call = torch.compile(side.model, dynamic=False)
                if reason := failure(partial(_repeat, side, work, warmup + 1)):
                    missing[side.name] = reason
                    free(work)
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
            device_type=kind(work.device),
            shape=work.shape,
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


def sides_of(case: Case, work: Workload, with_peft: bool) -> tuple[list[Side], int, dict[str, str]]:
    """Ours, and those of PEFT's that compute the same; our parameters; why others are missing."""
    model = work.shell()
    start, saved = now(work.device), SvdOnce.seconds_saved
    batches = calibration_for(case.variant, [work.batch()])
    plan = ll.attach(model, case.variant, case.targets, seed=SEED, calibration=batches)
    for _, hook in prompt_hooks(model):
        hook.given = torch.tensor([work.x.shape[-2]], device=work.device)
    seconds = now(work.device) - start + SvdOnce.seconds_saved - saved
    ours = Side("ours", model, seconds)
    move(model, scale=MOVED[0])
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
    move_until_seen(ours, floor, work)
    for name, float32 in PEFT_DTYPES.items():

        def add(name: str = name, float32: bool = float32) -> None:
            side = _peft_side(name, counterpart, ours, work, float32)
            check_agreement(ours, side, floor, work)
            sides.append(side)

        if reason := failure(add):
            missing[name] = reason
            free(work)
    return sides, plan.trainable, missing


def _peft_side(name: str, twin: Twin, ours: Side, work: Workload, float32: bool) -> Side:
    """PEFT's model with our tensors in it."""
    import peft

    start = now(work.device)
    model = peft.get_peft_model(
        work.shell(), copy.deepcopy(twin.config), autocast_adapter_dtype=float32
    )
    seconds = now(work.device) - start
    for site, _, adapter in adapters(ours.model):
        twin.load(model.base_model.model.get_submodule(site), adapter.tensors())
    return Side(name, model, seconds, waits=twin.waits)


def allowed(work: Workload) -> float:
    """What two that compute the same may differ by: in a Llama of random weights rounding does more
    the wider it is, in proportion."""
    return AGREEMENT[work.dtype] * max(1.0, work.shape["width"] / DEFAULT["cuda"].width)


def move_until_seen(ours: Side, floor: Side, work: Workload) -> None:
    """Move our adapters on until they change outputs and input gradients by MARGIN times what
    `check_agreement` allows, or else to where they change them most: rotations and reflections
    have an end. What does less is lost in rounding, which two that compute the same don't share.
    """
    base, effects, at = _results(floor, work), {}, MOVED[0]
    for scale in MOVED:
        # The noise is the same each time and adds up.
        move(ours.model, scale=scale - at)
        at, effects[scale] = scale, min(map(_distance, base, _results(ours, work)))
        if effects[scale] >= MARGIN * allowed(work):
            return
    move(ours.model, scale=max(effects, key=effects.get) - at)


def check_agreement(ours: Side, theirs: Side, floor: Side, work: Workload) -> None:
    """Compare outputs and input gradients.

    Raises: Disagreement where they differ by more than rounding, or by as much as a quarter of
    what the adapters do at all.
    """
    results = (_results(side, work) for side in (ours, theirs, floor))
    for what, a, b, base in zip(("outputs", "input gradients"), *results):
        error, effect = _distance(a, b), _distance(base, b)
        limit = min(allowed(work), effect / MARGIN)
        # NaN is no agreement either.
        if not error <= limit:
            raise Disagreement(
                f"its {what} are {error:.1e} from ours, above {limit:.1e}, with the same tensors"
            )


def _results(side: Side, work: Workload) -> tuple[Tensor, Tensor]:
    """A step's outputs and input gradients, in float64."""
    work.clear(side)
    y = work.forward(side)
    y.backward(work.y_grad)
    x_grad = work.x.grad
    work.clear(side)
    return y.detach().double(), x_grad.double()


def _distance(a: Tensor, b: Tensor) -> float:
    """‖a − b‖/‖b‖."""
    return float((a - b).norm() / b.norm())


def _prepare(side: Side, work: Workload, mode: str, warmup: int) -> None:
    """Record or compile where asked and not done yet, and warm up. Where the model doesn't compile
    whole, only `fullgraph` is set to False.

    Raises: what a step raises; AssertionError where a compiled model runs uncompiled;
    Disagreement where a recorded step gives the input another gradient.
    """
    if mode != "compiled":
        side.call, side.fullgraph = side.model, None
    elif side.fullgraph is None:
        side.call, side.fullgraph = torch.compile(side.model, fullgraph=True, dynamic=False), True
    if mode != "graph":
        side.graph = None
    elif side.graph is None:
        _record(side, work)
    try:
        _repeat(side, work, 1)
    except torch._dynamo.exc.Unsupported:
        side.fullgraph = False
        return
    if mode == "compiled":
        y = work.forward(side)  # held: its node goes with it
        inputs = {node.name() for node, _ in y.grad_fn.next_functions if node}
        assert inputs == {"torch::autograd::AccumulateGrad"}, "ran uncompiled"
    _repeat(side, work, warmup)


def _record(side: Side, work: Workload) -> None:
    """Record the side's step, gradients and all.

    Raises: RuntimeError where the host waits within a step; Disagreement where replaying it gives
    the input another gradient.
    """
    if side.waits:  # trying would leave the allocator unable to give memory back
        raise RuntimeError("its host waits for the device within a step, which can't be recorded")
    stream = torch.cuda.Stream(work.device)
    stream.wait_stream(torch.cuda.current_stream(work.device))
    with torch.cuda.stream(stream):  # as recording will: what is made once is made before
        _repeat(side, work, 2)
        work.step(side)
        want = work.x.grad.double()
        work.clear(side)
    torch.cuda.current_stream(work.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        work.step(side)
    found = work.x.grad
    graph.replay()
    if not (error := _distance(found.double(), want)) <= AGREEMENT[work.dtype]:
        raise Disagreement(f"the input's gradient is {error:.1e} off where the step is replayed")
    work.clear(side)
    side.graph = graph


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
    synchronise(work.device)


def _time(sides: Sequence[Side], work: Workload, steps: int) -> list[list[float]]:
    """Milliseconds of at least `steps` steps of each side, in alternating rounds, which begin with
    one after the other: how warm a device is depends on who came before.

    On CUDA a step lasts from event to event on the stream, with the host running ahead as it does
    in training.
    """
    ms: list[list[float]] = [[] for _ in sides]
    turns = list(zip(sides, ms))
    for turn in range(ROUNDS):
        first = turn % len(turns)
        for side, times in turns[first:] + turns[:first]:
            _repeat(side, work, 1)
            times += _timed(side, work, math.ceil(steps / ROUNDS))
    return ms


def _drift(ms: Sequence[float]) -> float:
    """The slowest over the fastest round, by medians."""
    n = len(ms) // ROUNDS
    medians = [statistics.median(ms[i : i + n]) for i in range(0, len(ms), n)]
    return max(medians) / min(medians)


def _timed(side: Side, work: Workload, steps: int) -> list[float]:
    if kind(work.device) == "cuda":
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


class SvdOnce:
    """A context in which each frozen weight is decomposed once, for all methods that start from
    its singular vectors. `seconds_saved` is what the others would have spent."""

    seconds_saved = 0.0

    def __enter__(self) -> None:
        self.svd, self.triplets = LinearBase.svd, {}
        LinearBase.svd = lambda W, *args, **kwargs: self.remembered(W, *args, **kwargs)

    def __exit__(self, *error: object) -> None:
        LinearBase.svd = self.svd

    def remembered(self, W: LinearBase, r: int, method: SvdMethod = "auto", seed: int = 0) -> Any:
        if is_randomised(method, r, W.d_out, W.d_in):
            return self.svd(W, r, method, seed)
        key = W.layer.weight.data_ptr()
        most = min(W.d_in, W.d_out)
        if key in self.triplets and len(self.triplets[key][1]) >= r:
            SvdOnce.seconds_saved += self.triplets[key][3]
        else:
            start = now(W.device)
            # The largest rank among the settings, so that one decomposition serves all.
            triplets = self.svd(W, max(r, min(KEPT_TRIPLETS, most)), "exact")
            self.triplets[key] = (*triplets, now(W.device) - start)
        U, S, Vh, _ = self.triplets[key]
        return U[:, :r], S[:r], Vh[:r]


def _percentiles(ms: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else [ms[0]] * 4
    return statistics.median(ms), fifths[0], fifths[3]


def _peak_mib(side: Side, work: Workload, mode: str) -> float | None:
    """The side's own tensors, and what a step adds to them at its peak."""
    cuda = kind(work.device) == "cuda"
    # The CPU's count follows single operations, and a compiled step has none. A recorded step has
    # its memory for good.
    if mode == "graph" or (not cuda and mode == "compiled"):
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
        # Not itself: an output that its own node holds would never be freed.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = work.forward(side)
    # The graph holds every packed tensor until here, so no address came twice.
    del y
    return sum(kept.values()) / MIB


def failure(action: Callable[[], object]) -> str | None:
    """Run it; why it failed in one line, or None. The error goes, and with it what it held."""
    try:
        action()
    except Exception as error:
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text}"[:300]
    return None


def free(work: Workload) -> None:
    """Give back what a side that is gone or failed left behind."""
    work.x.grad = None
    gc.collect()
    if kind(work.device) == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Options:
    """What to measure. What is left out is measured whole."""

    variants: tuple[str, ...] = ()
    """Methods; all by default."""
    tracks: tuple[Track, ...] = ("all-linear", "q+v")
    """Layers: all seven projections, or q_proj and v_proj."""
    modes: tuple[Mode, ...] = ()
    """As it is, recorded as a CUDA graph, or by torch.compile."""
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
        if not self.where.startswith(tuple(DEFAULT)):
            raise ValueError(f"device={self.device!r} must be {' or '.join(DEFAULT)}")
        if kind(self.where) == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={self.device!r}: torch finds no CUDA device here")
        if "graph" in self.modes and kind(self.where) != "cuda":
            raise ValueError("modes: graph is a CUDA device's, and this is a CPU")
        for name in self.variants:
            try:
                variant_class(name)
            except KeyError as error:
                raise ValueError(error.args[0]) from None
        _ = self.shape

    @property
    def timed(self) -> tuple[str, ...]:
        """The modes that are measured: by default all that the device has."""
        usual = [mode for mode in get_args(Mode) if mode != "graph" or kind(self.where) == "cuda"]
        return self.modes or tuple(usual)

    @property
    def where(self) -> str:
        return self.device or ("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def shape(self) -> Shape:
        changes = {key: getattr(self, key) for key in ("dtype", "layers", "tokens", "width")}
        return dataclasses.replace(
            DEFAULT[kind(self.where)], **{k: v for k, v in changes.items() if v is not None}
        )

    @property
    def folder(self) -> Path:
        return self.results or (rows.checkout() or Path()) / "results"


def run(options: Options) -> list[Row]:
    """Measure what the options ask for, writing and printing each row as it is done.

    A method that fails is printed with the reason, and the others go on.
    """
    if options.scaling:
        from lora_lite.bench import scaling

        return scaling.run(options)
    found = cases(options.variants or ll.variants(), options.tracks)
    return measure_all(found, llama(options.shape, options.where), options)


def measure_all(
    found: Sequence[Case], work: Workload, options: Options, task: str = TASK
) -> list[Row]:
    """Measure these cases on one workload, writing and printing each row as it is done."""
    floors: dict[str, Side] = {}
    done: list[Row] = []
    started = time.perf_counter()

    def measure_one(case: Case) -> None:
        for row in measure(
            case,
            work,
            modes=options.timed,
            steps=options.steps,
            warmup=options.warmup,
            with_peft=options.peft,
            floors=floors,
            commit=options.commit,
        ):
            write(row, options.folder, task)
            done.append(row)
            seconds = time.perf_counter() - started
            print(f"[{seconds:5.0f} s] {table([row], heading=False)}", flush=True)
            for why in dict.fromkeys(row.missing.values()):
                names = " and ".join(name for name in row.missing if row.missing[name] == why)
                print(f"          without {names}: {why}", flush=True)

    with unlimited_recompiles(), SvdOnce():
        for case in found:
            if reason := failure(partial(measure_one, case)):
                print(f"          {case.label} {case.track} failed: {reason}", flush=True)
            free(work)
    return done


def unlimited_recompiles() -> AbstractContextManager[None]:
    """A context in which torch.compile takes any number of models that share their code."""
    return torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000)


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
