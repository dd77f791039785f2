"""The conformance kit: the laws that every method keeps, yours too.

from lora_lite.testing import check_variant
check_variant(MyVariant, r=4)
"""

import copy
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_lite import shapes
from lora_lite.adapted import adapters
from lora_lite.attach import attach, detach, disabled, plan, strength
from lora_lite.calibration import Batches
from lora_lite.checkpoint import load, save
from lora_lite.merge import delta_weights, merge, merged
from lora_lite.ops.low_rank import accumulates_in
from lora_lite.prompts import prompt_hooks
from lora_lite.steps import schedule
from lora_lite.training import param_groups, regulariser
from lora_lite.variant import Variant, configure

Sizes = tuple[tuple[int, int], ...]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


class Probe(nn.Module):
    """Linear layers in a row, tanh between them; every second one without a bias."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.site(i, *both) for i, both in enumerate(sizes))
        self.to(dtype)
        generator = torch.Generator().manual_seed(0)
        for p in self.parameters():
            scale = p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3
            p.data = (self.center(p) + scale * torch.randn(p.shape, generator=generator)).to(dtype)
        list(self.parameters())[-1].requires_grad_(False)

    def site(self, i: int, d_in: int, d_out: int) -> nn.Module:
        """The layer that is adapted."""
        return nn.Linear(d_in, d_out, bias=i % 2 == 0)

    def center(self, p: Tensor) -> float:
        """What a parameter's start is about."""
        return 0.0

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

    def input(self, *batch: int) -> Tensor:
        """An input for the first layer, the same each time."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(*batch, self.layers[0].in_features, generator=generator)


class NormProbe(Probe):
    """A layer norm, and one without a bias."""

    def site(self, i: int, d_in: int, d_out: int) -> nn.Module:
        return nn.LayerNorm(d_in, bias=i % 2 == 0)

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__(tuple((sizes[0][0],) * 2 for _ in sizes), dtype)

    def center(self, p: Tensor) -> float:
        return 1.0

    def input(self, *batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(*batch, len(self.layers[0].weight), generator=generator)


class EmbeddingProbe(Probe):
    """An embedding, and a head that is tied to it."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__(sizes[:1], dtype)
        rows, d = self.layers[0].weight.shape
        self.head = nn.Linear(d, rows, dtype=dtype)
        self.head.bias.data = torch.linspace(-1, 1, rows).to(dtype)
        self._apply(lambda t: t)

    def _apply(self, *args: Any, **kwargs: Any) -> nn.Module:
        super()._apply(*args, **kwargs)
        if hasattr(self, "head"):  # a move to the meta device unties them
            self.head.weight = self.layers[0].weight
        return self

    def site(self, i: int, d_in: int, d_out: int) -> nn.Module:
        return nn.Embedding(d_out, d_in)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.layers[0](x)))

    def input(self, *batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(len(self.layers[0].weight), batch, generator=generator)


class ProbeBlock(nn.Module):
    """A residual block that returns its hidden states, in a tuple with something else or alone."""

    def __init__(self, d: int, pair: bool) -> None:
        super().__init__()
        self.norm, self.linear, self.pair = nn.LayerNorm(d), nn.Linear(d, d), pair

    def forward(self, h: Tensor, scale: float = 1.0) -> Tensor | tuple[Tensor, None]:
        h = h + scale * torch.tanh(self.linear(self.norm(h)))
        return (h, None) if self.pair else h


class BlockProbe(Probe):
    """Two blocks; every call says that prompts are two tokens long."""

    def site(self, i: int, d_in: int, d_out: int) -> nn.Module:
        return ProbeBlock(d_in, pair=i % 2 == 1)

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__(tuple((sizes[0][0],) * 2 for _ in sizes), dtype)

    def __call__(self, x: Tensor) -> Tensor:
        asked = any(True for _ in prompt_hooks(self))
        return super().__call__(x, **(dict(prompt_lengths=torch.tensor([2])) if asked else {}))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            out = block(x, scale=0.5)
            x = out[0] if block.pair else out
        return x

    def input(self, *batch: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        batch = batch if len(batch) == 2 else (1, *batch)
        return torch.randn(*batch, self.layers[0].linear.in_features, generator=generator)


PROBES = dict(linear=Probe, norm=NormProbe, embedding=EmbeddingProbe, block=BlockProbe)


@dataclass(frozen=True)
class Case:
    """A method on a model to hold to the laws."""

    variant: Variant
    sizes: Sizes = ((24, 40), (40, 24))
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    backend: str = "aot_eager"
    batch: tuple[int, ...] = (2, 3)

    def model(self, adapted: bool = True, moved: bool = False) -> Probe:
        """A probe, adapted and its trained tensors moved off their start if asked for."""
        model = PROBES[self.variant.site](self.sizes, self.dtype).to(self.device)
        if adapted:
            self.attach(model)
        if moved:
            move(model)
        return model

    def attach(self, model: Probe, seed: int = 0, name: str = "default") -> None:
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        batches = calibration_for(self.variant, [self.input(64)])
        attach(model, self.variant, seed=seed, name=name, dtype=dtype, calibration=batches)

    def input(self, *batch: int) -> Tensor:
        x = PROBES[self.variant.site](self.sizes, self.dtype).input(*(batch or self.batch))
        return x.to(self.device, self.dtype if x.is_floating_point() else x.dtype)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.dtype]


def calibration_for(variant: Variant, batches: Batches) -> Batches | None:
    """The batches, for a method that can't start without; None for the others."""
    return batches if variant.needs_calibration else None


def check_variant(
    variant: str | type[Variant] | Variant,
    *,
    sizes: Sizes = ((24, 40), (40, 24)),
    device: str = "cpu",
    **hyperparameters: Any,
) -> None:
    """Hold a method to every law, in float32, bfloat16 and float64.

    sizes: (d_in, d_out) of the layers that it is tried on, each fitting the next.
    Raises: AssertionError, saying which law is broken; and what the method itself raises.
    """
    configured = configure(variant, **hyperparameters)
    for dtype in TOLERANCE:
        for law in LAWS:
            try:
                law(Case(configured, sizes, dtype, device))
            except AssertionError as error:
                law_name = law.__name__.replace("_", " ")
                raise AssertionError(f"{configured} in {dtype}: {law_name}: {error}") from error


def move(model: nn.Module, seed: int = 2, scale: float = 0.1) -> None:
    """Add noise to every trained tensor of every adapter, so that nothing stays zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, _, adapter in adapters(model):
            for tensor in adapter.tensors().values():
                if tensor.requires_grad:
                    noise = torch.randn(tensor.shape, generator=generator) * scale
                    tensor.add_(noise.to(tensor))


def close(got: Tensor, want: Tensor, tolerance: float, what: str) -> None:
    """Raise AssertionError unless two tensors agree in dtype, shape and, relative to the norm,
    value; NaN never agrees."""
    assert got.dtype == want.dtype, f"{what} is {got.dtype}, not {want.dtype}"
    assert got.shape == want.shape, f"{what} is {tuple(got.shape)}, not {tuple(want.shape)}"
    got, want = got.detach().double(), want.detach().double()
    error = float((got - want).norm() / want.norm().clamp(min=1e-30))
    assert error <= tolerance, f"{what} is off by {error:.2e}, above {tolerance:.0e}"


def same(got: Tensor, want: Tensor, what: str) -> None:
    """Raise AssertionError unless two tensors are equal bit for bit."""
    assert got.dtype == want.dtype and got.shape == want.shape, f"{what} changed its kind"
    assert got.is_meta or torch.equal(got, want), f"{what} changed"


def plan_touches_nothing(case: Case) -> None:
    model = case.model(adapted=False)
    before = snapshot(model)
    chart = plan(model, case.variant)
    assert str(chart) and chart.trainable > 0, "the plan trains nothing"
    unchanged(model, before)
    meta = plan(copy.deepcopy(model).to("meta"), case.variant)
    assert str(meta) == str(chart), "the plan of a model on the meta device differs"


def start_is_as_declared(case: Case) -> None:
    model, x = case.model(), case.input()
    base = case.model(adapted=False)(x)
    if case.variant.starts_as_identity():
        y = model(x)
        # Sums in another order may cost a rounding; elsewhere every bit is the base's.
        other_order = accumulates_in(base) or (base.is_cuda and case.dtype == torch.float64)
        if other_order:
            close(y, base, 4 * torch.finfo(case.dtype).eps, "the output with a fresh adapter")
        else:
            same(y, base, "the output with a fresh adapter")
    else:
        assert not torch.equal(model(x), base), "starts as the identity, and says it does not"


def only_declared_tensors_train(case: Case) -> None:
    model = case.model()
    named = {
        f"layers.{i}.adapters.default.{key}"
        for i, (_, _, adapter) in enumerate(adapters(model))
        for key, spec in adapter.variant.specs.items()
        if spec.trainable and not spec.shared and spec.when(adapter.variant)
    }
    shared = {
        f"lora_lite.default.{key}"
        for key, spec in case.variant.specs.items()
        if spec.trainable and spec.shared and spec.when(case.variant)
    }
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == named | shared, f"{trains ^ (named | shared)} should not be trained, or is not"


def every_trained_tensor_moves(case: Case) -> None:
    model, x = case.model(), case.input()
    optimizer = torch.optim.SGD(param_groups(model, lr=0.1))
    schedule(model, optimizer, total=10)
    base = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    reached = set()
    for _ in range(2):
        optimizer.zero_grad()
        (model(x).float().square().sum() + regulariser(model)).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad is not None, f"{name} has no gradient"
                assert p.grad.dtype == p.dtype, f"{name}'s gradient is {p.grad.dtype}"
                assert p.grad.isfinite().all(), f"{name}'s gradient is not finite"
                if p.grad.any() or not p.numel():
                    reached.add(name)
        optimizer.step()
    stuck = {name for name, p in model.named_parameters() if p.requires_grad} - reached
    assert not stuck, f"no gradient reaches {stuck} within two steps"
    for name, p in model.named_parameters():
        if name in base:
            same(p, base[name], f"the frozen {name}")


def output_keeps_the_dtype(case: Case) -> None:
    model, x = case.model(moved=True), case.input()
    assert model(x).dtype == case.dtype, f"the output is {model(x).dtype}"
    if case.dtype == torch.float32:
        with torch.autocast(case.device, torch.bfloat16):
            base = case.model(adapted=False)(x)
            y = model(x)
        assert y.dtype == base.dtype, f"under autocast the output is {y.dtype}, not {base.dtype}"
        close(y.float(), model(x), TOLERANCE[torch.bfloat16], "the output under autocast")
        y.float().sum().backward()


def activations_are_not_widened(case: Case) -> None:
    if case.dtype != torch.bfloat16:
        return
    tokens = 512

    def kept(model: nn.Module) -> Counter[tuple[int, ...]]:
        wide = Counter()

        def note(t: Tensor) -> Tensor:
            if t.dtype == torch.float32 and t.numel() >= tokens and tokens in t.shape:
                wide[tuple(t.shape)] += 1
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            model(case.input(tokens))
        return wide

    # A norm keeps statistics of its own.
    wide = kept(case.model(moved=True)) - kept(case.model(adapted=False))
    assert not wide, f"float32 activations of shapes {list(wide)} are kept for backward"


def batch_shape_does_not_matter(case: Case) -> None:
    model, x = case.model(moved=True), case.input(3, 4)
    y = model(x)
    close(model(x[1:2]), y[1:2], case.tolerance, "the output of a single example")
    if case.variant.site != "block":
        close(model(x.flatten(0, 1)).view_as(y), y, case.tolerance, "the output of a flat batch")
        close(model(x[1, 2]), y[1, 2], case.tolerance, "the output of a single vector")
    assert model(x[:0]).shape == (0, *y.shape[1:]), "an empty batch fails"
    strided = torch.stack([x, x], -1)[..., 0]
    close(model(strided), y, case.tolerance, "the output of a strided input")


def merge_equals_forward(case: Case) -> None:
    model, x = case.model(moved=True), case.input()
    reason = case.variant.nonlinear()
    if reason:
        before = snapshot(model)
        try:
            merge(model)
        except ValueError as error:
            assert reason in str(error), f"merge refuses with {error}, not with {reason}"
            unchanged(model, before)
            return
        raise AssertionError("merge takes a method that is not linear")
    y, before = model(x), snapshot(model)
    with merged(model):
        close(model(x), y, case.tolerance, "the output while merged")
    unchanged(model, before)
    same(model(x), y, "the output after `merged`")
    deltas = delta_weights(model)
    plain = case.model(adapted=False)
    with torch.no_grad():
        for name, delta in deltas.items():
            layer = plain.get_submodule(name)
            layer.weight.copy_(layer.weight.to(delta) + delta)
    assert str(merge(model)), "the merge has no report"
    close(model(x), y, case.tolerance, "the merged output")
    for name in deltas:
        got, want = (m.get_submodule(name).weight for m in (model, plain))
        close(got, want, case.tolerance, f"W + delta_weights, {name},")


def saved_and_loaded_is_the_same(case: Case) -> None:
    model, x = case.model(moved=True), case.input()
    y = model(x)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.safetensors"
        save(model, path)
        fresh = case.model(adapted=False)
        load(fresh, path)
        same(fresh(x), y, "the output of the loaded model")
        move(model, seed=3)
        assert not torch.equal(model(x), y), "moving the tensors changes nothing"
        load(model, path)
        same(model(x), y, "the output after loading in place")


def detach_restores_everything(case: Case) -> None:
    model = case.model(adapted=False)
    model.layers[0].eval()
    model.layers[0].register_forward_hook(lambda *_: None)
    before, y = snapshot(model), model(case.input())
    case.attach(model)
    for name, tensor in before["tensors"].items():
        same(model.state_dict()[name], tensor, f"on attach, {name}")
    move(model)
    model(case.input()).float().sum().backward()
    detach(model)
    unchanged(model, before)
    same(model(case.input()), y, "the output after detach")


def strength_and_switch(case: Case) -> None:
    model, x = case.model(moved=True), case.input()
    y, base = model(x), case.model(adapted=False)(x)
    with disabled(model):
        same(model(x), base, "the output while disabled")
    with strength(model, 0.0):
        close(model(x), base, case.tolerance, "the output at strength 0")
    layer, alone = model.layers[0], case.model(adapted=False).layers[0]
    z, f = alone(x), layer(x)
    with strength(model, 0.5):
        half = layer(x)
    close(half, z + (f - z) / 2, case.tolerance, "the output at half strength")
    same(model(x), y, "the output after the contexts")


def adapters_compose(case: Case) -> None:
    model, x = case.model(moved=True), case.input()
    y = model(x)
    case.attach(model, name="second", seed=5)
    if case.variant.starts_as_identity():
        close(model(x), y, case.tolerance, "the output with a fresh second adapter")
    move(model, seed=7)
    both = model(x)
    with disabled(model, "second"):
        assert not torch.equal(model(x), both), "the second adapter has no effect"
    if not case.variant.nonlinear():
        with merged(model):
            close(model(x), both, case.tolerance, "the output with both merged")
    detach(model, "default")
    detach(model, "second")
    plain = type(case.model(adapted=False).layers[0])
    assert type(model.layers[0]) is plain, "the layer's class stays changed"


def copies_are_independent(case: Case) -> None:
    model, x = case.model(moved=True), case.input()
    twin, y = copy.deepcopy(model), model(x)
    same(twin(x), y, "the copy's output")
    move(twin, seed=3)
    same(model(x), y, "the output, when the copy was moved,")
    detach(twin)
    same(model(x), y, "the output, when the copy was detached,")


def checkpointing_agrees(case: Case) -> None:
    model = case.model(moved=True)
    want = gradients(model, model(case.input()))
    for reentrant in (False, True):
        x = case.input()
        if reentrant and not x.is_floating_point():
            continue  # nothing would be differentiated
        x.requires_grad_(reentrant)
        got = gradients(model, checkpoint(model, x, use_reentrant=reentrant))
        for name, grad in got.items():
            close(grad, want[name], case.tolerance, f"under checkpointing, {name}'s gradient")


def compiled_equals_eager(case: Case) -> None:
    if case.dtype != torch.float32:  # what is traced is the same in every dtype
        return
    model, x = case.model(moved=True), case.input()
    want, y = gradients(model, model(x)), model(x)
    torch._dynamo.reset()
    with shapes.unchecked():
        compiled = torch.compile(model, fullgraph=True, backend=case.backend)
        z = compiled(x)
        got = gradients(model, z)
    close(z, y, case.tolerance, "the compiled output")
    for name, grad in got.items():
        close(grad, want[name], 2 * case.tolerance, f"compiled, {name}'s gradient")


def float16_stays_finite(case: Case) -> None:
    linear = case.variant.site == "linear"
    if case.dtype != torch.float32 or not linear or not case.variant.starts_as_identity():
        return
    model = Probe(case.sizes[:1], torch.float32).half().to(case.device)
    with torch.no_grad():
        model.layers[0].weight.mul_(1e-3)
    x = torch.full((4, case.sizes[0][0]), 60000.0, dtype=torch.float16, device=case.device)
    want = model(x)
    assert want.isfinite().all(), "the frozen layer itself overflows"
    calibration = calibration_for(case.variant, [case.input(64).half()])
    attach(model, case.variant, seed=0, calibration=calibration)
    assert model(x).isfinite().all(), "a fresh adapter overflows where the frozen layer does not"


LAWS: tuple[Callable[[Case], None], ...] = (
    plan_touches_nothing,
    start_is_as_declared,
    only_declared_tensors_train,
    every_trained_tensor_moves,
    output_keeps_the_dtype,
    activations_are_not_widened,
    batch_shape_does_not_matter,
    merge_equals_forward,
    saved_and_loaded_is_the_same,
    detach_restores_everything,
    strength_and_switch,
    adapters_compose,
    copies_are_independent,
    checkpointing_agrees,
    compiled_equals_eager,
    float16_stays_finite,
)


def gradients(model: nn.Module, y: Tensor) -> dict[str, Tensor]:
    """The gradients of Σ y² to everything that trains."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for p in named.values():
        p.grad = None
    y.float().square().sum().backward()
    return {name: p.grad.clone() for name, p in named.items()}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What `unchanged` compares: tensors, classes, flags, modes, hooks and forwards."""
    return {
        "tensors": {k: t.detach().clone() for k, t in model.state_dict().items()},
        "flags": {name: p.requires_grad for name, p in model.named_parameters()},
        "identity": {name: id(p) for name, p in model.named_parameters()},
        "modules": {name: dict(_facts(module)) for name, module in model.named_modules()},
    }


def _facts(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield "class", type(module)
    yield "training", module.training
    yield "attributes", sorted(module.__dict__)
    yield "children", list(module._modules)
    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
        yield kind, list(getattr(module, kind).values())


def unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    """Raise AssertionError unless a model is as `snapshot` saw it, bit for bit."""
    after = snapshot(model)
    assert list(after["tensors"]) == list(before["tensors"]), "the state_dict's keys changed"
    for key, tensor in before["tensors"].items():
        same(after["tensors"][key], tensor, key)
    for part in ("flags", "identity", "modules"):
        for name, value in before[part].items():
            assert after[part].get(name) == value, (
                f"{name or 'the model'}: {part} are {after[part].get(name)}, not {value}"
            )
