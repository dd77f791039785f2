"""The protocol: what every method goes through alike.

A learning rate is chosen from `Protocol.rates`, the same for all methods, by the target accuracy
on the validation split (ties: the lower loss) after a whole run with a seed that is not reported.
The rate is what `param_groups` is given, so a method's own ratios between its tensors hold. Then
each seed trains for a fixed number of AdamW steps (no weight decay; linear warm-up over a tenth,
then a cosine to zero) and meets the test split once. Seeds change the adapter's start and the
order of the batches; the base is one for all.

Scores: target accuracy (plasticity) and its gain over the base; source accuracy after adapting
(stability) and its change; trade-off = target gain − max(0, −source change).
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import lora_lite as ll
from lora_lite.bench import digits, rows
from lora_lite.bench.memory import peak_bytes, resident_bytes
from lora_lite.bench.settings import SETTINGS
from lora_lite.bench.vit import ViT
from lora_lite.variant import Variant, configure

TASK = "digits"
SWEEP_SEED = 1000
CALIBRATION_BATCH = 128
FULL, BASE = "full fine-tuning", "base"

Report = Callable[[str], None]
"""Called once a training step, with what is being trained."""


@dataclass(frozen=True)
class Protocol:
    """What is the same for all methods that are compared."""

    seeds: int = 3
    steps: int = 150
    batch_size: int = 32
    rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    device: str = "cpu"
    # One thread: the model is small, and a result is then the same on any number of cores.
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("seeds", "steps", "batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be ≥ 1")
        if not self.rates or min(self.rates) <= 0:
            raise ValueError(f"rates={self.rates} must be positive, and at least one")
        if torch.device(self.device).type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={self.device!r}: torch finds no CUDA device here")

    @property
    def total_steps(self) -> int:
        """Training steps of one method, its sweep included."""
        return (len(self.rates) + self.seeds) * self.steps


@dataclass(frozen=True)
class Method:
    """A configured variant on its targets; full fine-tuning where the variant is None."""

    variant: Variant | None
    targets: str | list[str] = "all-linear"

    @property
    def name(self) -> str:
        return FULL if self.variant is None else self.variant.name

    def __str__(self) -> str:
        """The name, and what differs from the method's default row."""
        changes: dict[str, Any] = {}
        if self.variant is not None:
            changes = differences(self.variant, default_variant(type(self.variant)))
            if self.targets != "all-linear":
                changes["targets"] = self.targets
        return rows.label(self.name, changes)

    def label(self, protocol: Protocol) -> str:
        """That, and what differs from the default protocol."""
        return rows.label(str(self), differences(protocol, Protocol()))

    def start(self, seed: int, images: Tensor) -> ViT:
        """The base with the method on it, ready to train on these images; a method that can't start
        without calibration sees them once."""
        model = digits.base_model().to(images.device).train()
        if self.variant is not None:
            batches = images.split(CALIBRATION_BATCH) if self.variant.needs_calibration else None
            ll.attach(model, self.variant, self.targets, seed=seed, calibration=batches)
        return model


def default_variant(cls: type[Variant], **hyperparameters: Any) -> Variant:
    """The variant at the benchmark's settings.

    Raises: TypeError for an unknown hyperparameter, ValueError for one that it cannot have.
    """
    return configure(cls, **(SETTINGS.get(cls.name, {}) | hyperparameters))


def differences(changed: Any, usual: Any) -> dict[str, Any]:
    """The fields of one dataclass that differ from another's."""
    names = [f.name for f in dataclasses.fields(changed)]
    return {n: getattr(changed, n) for n in names if getattr(changed, n) != getattr(usual, n)}


def measure(method: Method, protocol: Protocol, report: Report = lambda what: None) -> rows.Row:
    """Sweep, train all seeds, test each once.

    Raises: what `attach` raises where the method does not fit the base.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(protocol.threads)
    try:
        return _measure(method, protocol, report)
    finally:
        torch.set_num_threads(threads)


def _measure(method: Method, protocol: Protocol, report: Report) -> rows.Row:
    device, splits = protocol.device, _splits(protocol.device)
    began, sweep = time.perf_counter(), []
    for lr in protocol.rates:
        say = lambda lr=lr: report(f"{method}: learning rate {lr:g}")
        model, _, _ = train(method, protocol, lr, SWEEP_SEED, splits["target train"], say)
        accuracy, loss = digits.score(model, splits["target validation"])
        before, _ = digits.score(model, splits["source validation"])
        sweep.append(rows.Rate(lr, accuracy, before, loss if math.isfinite(loss) else None))
    best = choose(sweep)
    sweep_seconds = time.perf_counter() - began
    base = base_scores(device)
    runs = []
    for seed in range(protocol.seeds):
        began = time.perf_counter()
        say = lambda seed=seed: report(f"{method}: seed {seed}")
        model, step_s, peak = train(method, protocol, best.lr, seed, splits["target train"], say)
        seconds = time.perf_counter() - began
        target, source = (digits.score(model, splits[f"{d} test"])[0] for d in ("target", "source"))
        gain, change = target - base["target_pct"], source - base["source_pct"]
        runs.append(
            rows.Run(
                seed=seed,
                target_pct=target,
                source_pct=source,
                target_gain_pp=gain,
                source_change_pp=change,
                tradeoff_pp=gain - max(0.0, -change),
                samples_per_s=protocol.batch_size / step_s,
                peak_memory_mib=peak / 2**20,
                seconds=seconds,
            )
        )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return rows.Row(
        task=TASK,
        method=str(method),
        label=method.label(protocol),
        variant=method.name,
        hyperparameters={} if method.variant is None else dataclasses.asdict(method.variant),
        targets=None if method.variant is None else method.targets,
        protocol=plain(protocol),
        base=base,
        trainable_parameters=trained,
        lr=best.lr,
        lr_at_edge=len(sweep) > 2 and best.lr in (min(protocol.rates), max(protocol.rates)),
        sweep=sweep,
        sweep_seconds=sweep_seconds,
        runs=runs,
        environment=rows.environment(device),
        commit=rows.commit(),
    )


def choose(sweep: list[rows.Rate]) -> rows.Rate:
    """The rate of the best target accuracy; of several, that of the lowest loss."""
    loss = lambda rate: math.inf if rate.target_loss is None else rate.target_loss
    return max(sweep, key=lambda rate: (rate.target_pct, -loss(rate)))


def train(
    method: Method,
    protocol: Protocol,
    lr: float,
    seed: int,
    data: digits.Split,
    report: Callable[[], None] = lambda: None,
) -> tuple[ViT, float, int]:
    """One run: the trained model, the median seconds of a step, the peak bytes of one."""
    torch.manual_seed(seed)
    model = method.start(seed, data.images)
    if method.variant is None:
        groups = [{"params": list(model.parameters()), "lr": lr}]
    else:
        groups = ll.param_groups(model, lr=lr)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    if method.variant is not None:
        ll.schedule(model, optimizer, total=protocol.steps)
    warmup = max(protocol.steps // 10, 1)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / warmup) * (1 + math.cos(math.pi * i / protocol.steps)) / 2,
    )
    penalised = (
        method.variant is not None and type(method.variant).regulariser is not Variant.regulariser
    )
    order = torch.Generator().manual_seed(seed)
    step_s, peak = [], 0

    def one_step(batch: torch.Tensor) -> None:
        loss = F.cross_entropy(model(data.images[batch]), data.labels[batch])
        if penalised:
            loss = loss + ll.regulariser(model)
        loss.backward()
        optimizer.step()

    for i in range(protocol.steps):
        batch = torch.randint(len(data.labels), (protocol.batch_size,), generator=order)
        batch = batch.to(protocol.device)
        began = _now(protocol.device)
        optimizer.zero_grad()
        # The second step: the optimizer's state is there by then.
        if i == min(1, protocol.steps - 1):
            resident, this_step = resident_bytes(model, optimizer), partial(one_step, batch)
            peak = peak_bytes(this_step, resident, protocol.device)
        else:
            one_step(batch)
            step_s.append(_now(protocol.device) - began)
        rate.step()
        report()
    return model, statistics.median(step_s or [_now(protocol.device) - began]), peak


def base_row() -> rows.Row:
    """The base as it is: no training, the test split once."""
    scores = base_scores("cpu")
    run = rows.Run(0, scores["target_pct"], scores["source_pct"], 0.0, 0.0, 0.0, None, None, None)
    return rows.Row(
        task=TASK,
        method=BASE,
        label=BASE,
        variant=BASE,
        hyperparameters={},
        targets=None,
        protocol={},
        base=scores,
        trainable_parameters=0,
        lr=None,
        lr_at_edge=False,
        sweep=[],
        sweep_seconds=0.0,
        runs=[run],
        environment=rows.environment("cpu"),
        commit=rows.commit(),
    )


def base_scores(device: str) -> dict[str, float]:
    """The base's test accuracies in percent."""
    model, splits = digits.base_model().to(device), _splits(device)
    return {f"{d}_pct": digits.score(model, splits[f"{d} test"])[0] for d in ("target", "source")}


def plain(protocol: Protocol) -> Mapping[str, Any]:
    """A protocol as JSON gives it back."""
    return {**dataclasses.asdict(protocol), "rates": list(protocol.rates)}


def _splits(device: str) -> dict[str, digits.Split]:
    return {
        f"{domain} {split}": getattr(digits, domain)(split).to(device)
        for domain in ("source", "target")
        for split in digits.SPLITS
    }


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
