"""What a method is: hyperparameters, tensors with shapes, and a forward."""

import dataclasses
import difflib
import inspect
import math
import re
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import AbstractArray
from torch import Tensor

from lora_lite.base import Base
from lora_lite.ops.selection import Squares

Init = Callable[[tuple[int, ...], torch.Generator], Tensor]
RESERVED = {"variant", "name", "targets", "dtype", "seed", "exclude", "overrides", "calibration"}


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape)


def ones(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.ones(shape)


def normal(std: float, mean: float = 0.0) -> Init:
    """N(mean, std²)."""
    return lambda shape, generator: torch.randn(shape, generator=generator) * std + mean


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """U(−1/√fan_in, 1/√fan_in), fan_in the last axis: nn.Linear's own initialisation."""
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[-1])


def he_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """U(−√(6/fan_in), √(6/fan_in)), fan_in the last axis: He's bound with its gain of √2."""
    bound = math.sqrt(6 / shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class ParamSpec:
    """One tensor of a method; its jaxtyping annotation says its shape and kind.

    Words in the shape are d_in, d_out, the greatest of all layers, D_in and D_out, hyperparameters
    and what `Variant.sizes` adds; arithmetic on them is written without spaces
    (`"d_in//block_size block_size"`).

    init: (shape, generator) → tensor, or None where `Variant.init` supplies the values.
    trainable: False makes a buffer.
    saved: False keeps a frozen tensor out of checkpoints: its seed or the base makes it again,
        and a checksum guards it.
    shared: one tensor for all sites of an attach; `init` makes it, and its shape is of D_in, D_out
        and hyperparameters.
    averaged: a frozen tensor that `observe` gathers; ranks average it before each `step`.
    lr: multiplier on the learning rate that `param_groups` is given, or a function of the variant.
    decay: whether weight decay applies.
    when: the variants that have this tensor at all.
    """

    init: Init | None = None
    _: dataclasses.KW_ONLY
    trainable: bool = True
    saved: bool = True
    shared: bool = False
    averaged: bool = False
    lr: float | Callable[[Any], float] = 1.0
    decay: bool = True
    when: Callable[[Any], bool] = lambda variant: True


class Stats(NamedTuple):
    """What calibration saw at one layer: the mean over `count` tokens of `Variant.statistic`, a
    tuple where that is one."""

    mean: Any
    count: int


@dataclass(frozen=True)
class Step:
    """The optimizer step that was just taken, as a method sees it at one layer.

    number: steps taken so far, this one included. total: steps planned, None where nobody said.
    layer: the layer's name. seed: the attach's.
    """

    number: int
    total: int | None
    layer: str
    seed: int
    optimizer: torch.optim.Optimizer | None = None

    def generator(self) -> torch.Generator:
        """Random numbers for this step at this layer, on the CPU and the same on every rank."""
        own = zlib.crc32(f"{self.layer}:{self.number}".encode())
        return torch.Generator().manual_seed(self.seed ^ own)

    def restart(self, tensor: Tensor, where: Tensor) -> None:
        """Set a trained tensor's entries `where` to zero, and `forget` them."""
        tensor.masked_fill_(sharded(where, tensor), 0)
        self.forget(tensor, where)

    def forget(self, tensor: Tensor, where: Tensor) -> None:
        """Clear what the optimizer remembers (moments) of a trained tensor's entries `where`."""
        if self.optimizer is not None:
            for value in self.optimizer.state.get(tensor, {}).values():
                if isinstance(value, Tensor) and value.shape == tensor.shape:
                    value.masked_fill_(sharded(where, value), 0)


def whole(tensor: Tensor) -> Tensor:
    """The tensor with all its entries, where FSDP2 has spread it over ranks."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def sharded(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole, spread over ranks as another is."""
    if not hasattr(like, "full_tensor"):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    everywhere = [Replicate()] * like.device_mesh.ndim
    spread = DTensor.from_local(tensor, like.device_mesh, everywhere, run_check=False)
    return spread.redistribute(placements=like.placements)


class Layer(NamedTuple):
    """One layer of an adapter at an optimizer step."""

    variant: "Variant"
    tensors: dict[str, Tensor]
    step: Step


@dataclass(frozen=True)
class Variant:
    """A method. Subclass it, and it is registered under its lower-case class name.

    Annotated fields are hyperparameters, fields whose value is a `ParamSpec` are tensors, and
    `forward(x, W, **tensors)` is the method: tensors arrive in the activation's dtype, `W` is the
    frozen layer. Class keywords: `name=`, `aliases=`, and `abstract=True` for a shared parent.

    Errors raised inside the hooks say what is wrong and what would fix it; the core puts the
    method's and the layer's name in front.
    """

    name: ClassVar[str]
    site: ClassVar[str] = "linear"
    specs: ClassVar[Mapping[str, ParamSpec]] = {}
    annotations: ClassVar[Mapping[str, type[AbstractArray]]] = {}

    casts: ClassVar[bool] = True
    """Whether tensors arrive in the activation's dtype. A forward that gives all of them to
    operations that cast them where they are read says `casts = False`, and saves the copies."""

    statistic: ClassVar[Callable[..., Tensor | tuple[Tensor, ...]] | None] = None
    """`statistic(x, W)` sums something over calibration tokens x (n, d_in), a tensor or a tuple of
    them; the core divides by their number and hands the mean to `init`. A method without it takes
    no calibration."""

    reads_input_alone: ClassVar[bool] = False
    """Whether `statistic` and `summarise` read nothing of the layer but its width: layers in a row
    that see the very same input (q, k and v) then share what they give."""

    needs_calibration: ClassVar[bool] = False
    """Whether `attach` refuses to go without calibration batches."""

    needs_prompt: ClassVar[bool] = False
    """Whether `forward` reads `W.prompt`: every call must then say how long the prompts are."""

    def __init_subclass__(
        cls, name: str | None = None, aliases: tuple[str, ...] = (), abstract: bool = False
    ) -> None:
        hints = inspect.get_annotations(cls, eval_str=True)
        own = {k: v for k, v in vars(cls).items() if isinstance(v, ParamSpec)}
        cls.specs = {**cls.specs, **own}
        cls.annotations = {**cls.annotations, **{k: hints.pop(k) for k in own}}
        if taken := sorted((RESERVED & set(hints)) | ({"W", "x"} & set(own))):
            raise TypeError(f"{cls.__name__}: {', '.join(taken)} is a name of the core's own")
        cls.__annotations__ = hints
        for k in own:
            delattr(cls, k)
        dataclass(frozen=True, kw_only=True)(cls)
        if not abstract:
            cls.name = name or cls.__name__.lower()
            for key in (cls.name, *aliases):
                _register(key, cls)

    def __post_init__(self) -> None:
        shapes = " ".join(self.annotations[k].dim_str for k in self.tensor_names())
        dimensions = set(re.findall(r"[A-Za-z_]\w*", shapes))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if problem := _mistyped(value, _hints(type(self))[field.name]):
                raise ValueError(f"{self.name}: {field.name}={value!r} {problem}")
            if field.name in dimensions and value is not None and value < 1:
                raise ValueError(f"{self.name}: {field.name}={value} must be ≥ 1")
        try:
            self.validate()
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None

    def tensor_names(self) -> list[str]:
        """The tensors that this configuration has, in the order declared."""
        return [k for k, spec in self.specs.items() if spec.when(self)]

    def shapes(
        self, d_in: int, d_out: int, widest: tuple[int, int] | None = None
    ) -> dict[str, tuple[int, ...]]:
        """Each tensor's shape on a layer of these sizes, the greatest of all layers being `widest`,
        or the same."""
        words = {"d_in": d_in, "d_out": d_out}
        words |= dict(zip(("D_in", "D_out"), widest or (d_in, d_out)))
        words |= {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        words |= self.sizes(d_in, d_out)
        return {
            k: tuple(
                int(eval(word, {"__builtins__": {}}, words))  # a class author's annotation
                for word in self.annotations[k].dim_str.split()
            )
            for k in self.tensor_names()
        }

    # What a method may say, beside its forward.

    def validate(self) -> None:
        """Raise ValueError for hyperparameters that no layer could have."""

    def check(self, d_in: int, d_out: int) -> None:
        """Raise ValueError for hyperparameters that a layer of these sizes cannot have."""

    def check_tensors(self, d_in: int, d_out: int, **tensors: Tensor) -> None:
        """Raise ValueError for loaded tensors whose numbers no layer of these sizes can have."""

    def sizes(self, d_in: int, d_out: int) -> dict[str, int]:
        """Further words for the shapes."""
        return {}

    def tokens(self, batch: Mapping[str, Any]) -> Tensor | None:
        """Which tokens of a calibration batch count, as a mask; None for all."""
        return batch.get("attention_mask")

    def fit(self, W: Base) -> "Variant":
        """The variant as it goes on a layer: itself, or with what the layer lacks left out."""
        return self

    def fingerprint_rows(self, W: Base) -> Tensor:
        """Rows of the frozen layer by which a checkpoint knows its base again."""
        return W.fingerprint_rows()

    def summarise(self, seen: Stats, W: Base) -> Stats:
        """What `allocate` and `init` get of a layer's statistic: the mean, or what is made of it
        once."""
        return seen

    @classmethod
    def allocate(
        cls, variants: dict[str, "Variant"], stats: dict[str, Stats]
    ) -> dict[str, "Variant"]:
        """Each layer's variant, where layers decide together on what calibration saw (nothing, in
        a plan and without it); a layer left out gets no adapter. Raises ValueError for variants
        that don't go together."""
        return variants

    def init(self, W: Base, generator: torch.Generator, stats: Stats | None) -> dict[str, Tensor]:
        """Values that depend on the layer, in place of their specs' `init`; `stats` is None
        without calibration."""
        return {}

    @property
    def shared_seed(self) -> int | None:
        """The seed of the tensors that all layers share, where the method has one of its own; they
        are drawn from it in the order declared. None leaves it to the attach's."""
        return None

    def starts_as_identity(self) -> bool:
        """Whether a fresh adapter leaves the layer's function as it is."""
        return True

    def prepare(self, W: Base, **tensors: Tensor) -> dict[str, Any]:
        """What is computed once per step, in float32 or wider, from the tensors: it returns what
        `forward` takes in their place."""
        return tensors

    def forward(self, x: Tensor, W: Base, **tensors: Tensor) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    @property
    def base_lr(self) -> float | None:
        """The learning rate to use where `param_groups` is given none."""
        return None

    def nonlinear(self) -> str | None:
        """Why the method is not linear in x, and so can't be merged; None where it is."""
        return None

    @property
    def observes(self) -> bool:
        """Whether `observe` is wanted in this configuration."""
        return type(self).observe is not Variant.observe

    def observe(self, x: Tensor | Squares, g: Tensor | Squares, **tensors: Tensor) -> None:
        """Gather statistics in place, in frozen tensors, from a layer's input x and the gradient g
        of its output; called in training, once per backward. From an op that has summed their
        squares on its way both are those sums, which `ema_` takes as well."""

    def scheduled(self) -> bool:
        """Whether `step` does something in this configuration."""
        own, none = type(self), Variant
        return own.step is not none.step or own.step_all.__func__ is not none.step_all.__func__

    def needs_total(self) -> str | None:
        """What depends on the number of optimizer steps planned; None where nothing does."""
        return None

    def check_total(self, total: int) -> None:
        """Raise ValueError for a number of planned steps that the schedule can't have."""

    def step(self, tensors: dict[str, Tensor], now: Step) -> None:
        """Change a layer's tensors in place after an optimizer step; gradients are still there."""

    @classmethod
    def step_all(cls, layers: list[Layer]) -> None:
        """The same for all layers of an adapter, where they decide together."""
        for layer in layers:
            layer.variant.step(layer.tensors, layer.step)

    def diagnose(self, W: Base, **tensors: Tensor) -> dict[str, float | list[float]]:
        """The method's own numbers for `lora_lite.diagnose`; a list is a distribution."""
        return {}

    def regulariser(self, **tensors: Tensor) -> Tensor | None:
        """A penalty that the method adds to the loss."""
        return None

    @classmethod
    def regulariser_all(cls, layers: list[tuple["Variant", dict[str, Tensor]]]) -> Tensor | None:
        """The same for all layers of an adapter: the sum, unless the method says otherwise."""
        terms = [variant.regulariser(**tensors) for variant, tensors in layers]
        terms = [term for term in terms if term is not None]
        return sum(term.to(terms[0].device) for term in terms) if terms else None


_registry: dict[str, type[Variant]] = {}


def variants() -> tuple[str, ...]:
    """The names of all registered methods, aliases left out."""
    return tuple(sorted({cls.name for cls in _registry.values()}))


def variant_class(name: str) -> type[Variant]:
    """The method of that name. Raises: KeyError with the nearest names."""
    if name not in _registry:
        raise KeyError(f"no variant {name!r}; {nearest(name, _registry)}")
    return _registry[name]


def configure(variant: str | type[Variant] | Variant, **hyperparameters: Any) -> Variant:
    """A configured method from its name, class or instance.

    Raises: KeyError for an unknown name, TypeError for an unknown hyperparameter, ValueError for
    a value that it cannot have.
    """
    if isinstance(variant, str):
        variant = variant_class(variant)
    cls = variant if isinstance(variant, type) else type(variant)
    known = [f.name for f in dataclasses.fields(cls)]
    for key in hyperparameters:
        if key not in known:
            raise TypeError(f"{cls.name} has no hyperparameter {key!r}; {nearest(key, known)}")
    hyperparameters = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in hyperparameters.items()
    }
    if isinstance(variant, type):
        return variant(**hyperparameters)
    return dataclasses.replace(variant, **hyperparameters)


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the known words most like this one."""
    known = sorted(set(known))
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(map(repr, close))}?"
    return f"there is {', '.join(known) or 'nothing'}"


def divisors(d: int, least: int = 2) -> str:
    """The end of an error message: the block sizes that d allows."""
    *first, last = [str(n) for n in range(least, d + 1) if d % n == 0] or ["none"]
    return f"{', '.join(first[:7])} or {last}" if first else last


def check_rank(r: int, d_in: int, d_out: int) -> None:
    """Raise ValueError where a layer of these sizes has fewer than r singular values."""
    if r > (most := min(d_in, d_out)):
        raise ValueError(f"has {most} singular values, fewer than r={r}; use r ≤ {most}")


def _register(key: str, cls: type[Variant]) -> None:
    old = _registry.get(key)
    if old and (old.__module__, old.__qualname__) != (cls.__module__, cls.__qualname__):
        raise TypeError(
            f"{cls.__module__}.{cls.__qualname__}: the name {key!r} belongs to "
            f"{old.__module__}.{old.__qualname__}; choose another with `name=`"
        )
    _registry[key] = cls


def _hints(cls: type[Variant]) -> dict[str, Any]:
    return {k: v for c in reversed(cls.__mro__) for k, v in inspect.get_annotations(c).items()}


def _mistyped(value: Any, hint: Any) -> str | None:
    """What is wrong with a hyperparameter's value, by its annotation."""
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        fits = isinstance(value, tuple) and not any(_mistyped(v, kind) for v in value)
        return None if fits else f"must be a tuple of {kind.__name__}"
    options = list(_alternatives(hint))
    words = [w for o in options if typing.get_origin(o) is Literal for w in typing.get_args(o)]
    if value in words and type(value) in {type(w) for w in words}:
        return None
    for kind in (o for o in options if isinstance(o, type)):
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return None if math.isfinite(value) else "must be finite"
        if type(value) is kind:
            return None
    if words:
        alike = isinstance(value, str) and all(isinstance(word, str) for word in words)
        ask = nearest(value, words) if alike else ""
        return f"must be one of {', '.join(map(repr, words))}" + (f"; {ask}" if ask else "")
    return f"must be {' or '.join(getattr(o, '__name__', str(o)) for o in options)}"


def _alternatives(hint: Any) -> Iterator[Any]:
    args = typing.get_args(hint)
    if args and typing.get_origin(hint) is not Literal:
        for arg in args:
            yield from _alternatives(arg)
    else:
        yield hint
