"""Putting a method on a model, and taking it off."""

import hashlib
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapted import (
    Adapter,
    Attachment,
    adapted_layers,
    adapters,
    all_adapters,
    bare,
    clean,
    put,
    register,
    remove,
    without_autocast,
)
from lora_lite.base import Base, base_kind
from lora_lite.calibration import Batches, calibrate
from lora_lite.prompts import check_reader, forget_prompts, learn_prompts
from lora_lite.steps import warn_unless_stepped
from lora_lite.targets import Targets, find_sites, overridden, tied_layers
from lora_lite.variant import Stats, Variant, configure

SHARED = "lora_lite"


@dataclass(frozen=True)
class Site:
    """One layer that a method goes to, and what the method costs there.

    tied: layers that share its weight, and with it the adapter.
    """

    name: str
    layer: nn.Module = field(repr=False)
    variant: Variant
    d_in: int
    d_out: int
    shapes: Mapping[str, tuple[int, ...]]
    tied: Mapping[str, nn.Module] = field(default_factory=dict, repr=False)

    @property
    def base(self) -> Base:
        """The frozen layer."""
        return base_kind(self.layer, self.variant.site)(self.layer)

    def count(self, **spec: bool) -> int:
        """Numbers in the tensors whose specs have these values (`trainable=True`)."""
        return sum(
            torch.Size(shape).numel()
            for key, shape in self.shapes.items()
            if all(getattr(self.variant.specs[key], k) == v for k, v in spec.items())
        )


@dataclass(frozen=True)
class Plan:
    """What an attach does: its sites, shapes, parameters and bytes. Print it.

    left_out: targeted layers to which calibration gave no adapter.
    """

    name: str
    variant: Variant
    sites: tuple[Site, ...]
    dtype: torch.dtype
    base_parameters: int
    left_out: tuple[str, ...] = ()

    @property
    def widest(self) -> tuple[int, int]:
        """The greatest d_in and d_out of the sites."""
        return max(s.d_in for s in self.sites), max(s.d_out for s in self.sites)

    @property
    def trainable(self) -> int:
        """Trained parameters."""
        own = sum(site.count(trainable=True, shared=False) for site in self.sites)
        return own + self.sites[0].count(trainable=True, shared=True)

    @property
    def frozen(self) -> int:
        """Numbers in the method's own frozen tensors."""
        own = sum(site.count(trainable=False, shared=False) for site in self.sites)
        return own + self.sites[0].count(trainable=False, shared=True)

    @property
    def bytes(self) -> int:
        """Bytes of all the method's tensors on the device."""
        total, shared = 0, set()
        for site in self.sites:
            for key, shape in site.shapes.items():
                if site.variant.specs[key].shared and key in shared:
                    continue
                shared.add(key)
                total += (
                    torch.Size(shape).numel() * tensor_dtype(site.variant, key, self.dtype).itemsize
                )
        return total

    def __str__(self) -> str:
        alike: dict[tuple[Any, ...], list[Site]] = defaultdict(list)
        for site in self.sites:
            *parents, leaf = site.name.split(".")
            if leaf.isdigit():  # layers.0, layers.1, …
                leaf = ".".join([*parents[-1:], "*"])
            alike[leaf, site.d_out, site.d_in, site.variant].append(site)
        rows = [("layers", "name", "d_out × d_in", "trained", "tensors")]
        for (leaf, d_out, d_in, variant), sites in alike.items():
            words = " ".join(
                f"{key}[{', '.join(map(str, shape))}]" for key, shape in sites[0].shapes.items()
            )
            usual = vars(self.variant)
            other = [f"{k}={v}" for k, v in vars(variant).items() if usual[k] != v]
            rows.append(
                (
                    f"{len(sites)} ×",
                    " + ".join([leaf or "(the model)", *sites[0].tied]),
                    f"{d_out} × {d_in}",
                    f"{sites[0].count(trainable=True):,}",
                    f"{words} ({', '.join(other)})" if other else words,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        table = [
            "  ".join(
                [a.rjust(widths[0]), b.ljust(widths[1]), c.rjust(widths[2]), d.rjust(widths[3]), e]
            )
            for a, b, c, d, e in rows
        ]
        share = 100 * self.trainable / max(self.base_parameters, 1)
        total = (
            f"{len(self.sites)} layers, {self.trainable:,} trained parameters "
            f"({share:.3g} % of {self.base_parameters:,}), {self.frozen:,} frozen, "
            f"{_mib(self.bytes)} on the device"
        )
        without = [f"no adapter: {', '.join(self.left_out)}"] if self.left_out else []
        return "\n".join([f"{self.name}: {self.variant}", *table, *without, total])

    __repr__ = __str__


def plan(
    model: nn.Module,
    variant: str | type[Variant] | Variant,
    targets: Targets = "all-linear",
    *,
    exclude: Targets | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    name: str = "default",
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    calibration: Batches | None = None,
    **hyperparameters: Any,
) -> Plan:
    """What `attach` would do with the same arguments; touches nothing, and needs no weights.

    Raises: what `attach` raises for arguments that don't fit the model.
    """
    configured = configure(variant, **hyperparameters)
    if not name or "." in name:
        raise ValueError(f"name={name!r} must be a word without dots")
    if not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype} must be a floating-point type")
    if calibration is not None and configured.statistic is None:
        raise ValueError(f"{configured.name} takes no calibration; leave `calibration` out")
    for path, _, adapter in all_adapters(model):
        if adapter.attachment.name == name:
            raise ValueError(
                f"{path} has an adapter {name!r} already; detach it or choose another `name`"
            )
    if configured.needs_prompt:
        check_reader(model)
    layers = find_sites(model, configured.site, targets, exclude)
    changes = overridden(overrides or {}, layers)
    variants = {path: configure(configured, **changes[path]) for path in layers}
    container = isinstance(root := bare(model), nn.Sequential | nn.ModuleList | nn.ModuleDict)
    if container and any(spec.shared for spec in configured.specs.values()):
        raise ValueError(
            f"{configured.name} shares tensors among layers, and a bare {type(root).__name__} "
            "would take them for a layer of its own; wrap it in a module with a forward"
        )
    base = sum(p.numel() for p in base_parameters(model).values())
    sites = sites_of(model, layers, variants)
    return allocated(model, Plan(name, configured, sites, dtype, base), {})


def sites_of(
    model: nn.Module, layers: Mapping[str, nn.Module], variants: Mapping[str, Variant]
) -> tuple[Site, ...]:
    """Each layer with its variant. Raises: ValueError where one doesn't fit, or where layers share
    tensors and want other ones."""
    sites, sizes = [], {}
    bases = {path: base_kind(x, variants[path].site)(x) for path, x in layers.items()}
    variants = {path: variants[path].fit(W) for path, W in bases.items()}
    for path, W in bases.items():
        with blame(variants[path], path):
            sizes[path] = W.d_in, W.d_out
            variants[path].check(*sizes[path])
    widest = tuple(max(both) for both in zip(*sizes.values()))
    for path, variant in variants.items():
        with blame(variant, path):
            shapes = variant.shapes(*sizes[path], widest)
        tied = tied_layers(model, layers[path], variant.site)
        sites.append(Site(path, layers[path], variant, *sizes[path], shapes, tied))
    first = sites[0]
    for site in sites:
        for key in site.variant.tensor_names():
            same = site.shapes[key] == first.shapes.get(key)
            same &= site.variant.shared_seed == first.variant.shared_seed
            if site.variant.specs[key].shared and not same:
                raise ValueError(
                    f"{site.variant.name}: {site.name} and {first.name} share {key}, and overrides "
                    "give them other shapes or seeds of it; say those once for all"
                )
    return tuple(sites)


def allocated(model: nn.Module, chart: Plan, stats: dict[str, Stats]) -> Plan:
    """The plan with each layer's variant as the method gives it to all of them together.

    Raises: ValueError where the layers' variants don't go together.
    """
    layers = {site.name: site.layer for site in chart.sites}
    try:
        chosen = chart.variant.allocate({x.name: x.variant for x in chart.sites}, stats)
    except ValueError as error:
        raise ValueError(f"{chart.variant.name}: {error}") from None
    if not chosen:
        raise ValueError(f"{chart.variant.name}: what calibration saw leaves no layer an adapter")
    kept = {name: layer for name, layer in layers.items() if name in chosen}
    sites = sites_of(model, kept, {name: chosen[name] for name in kept})
    left_out = tuple(name for name in layers if name not in chosen)
    return replace(chart, sites=sites, left_out=left_out)


def attach(
    model: nn.Module,
    variant: str | type[Variant] | Variant,
    targets: Targets = "all-linear",
    *,
    exclude: Targets | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    name: str = "default",
    dtype: torch.dtype = torch.float32,
    seed: int | None = None,
    calibration: Batches | None = None,
    **hyperparameters: Any,
) -> Plan:
    """Adapt a model's layers in place, and freeze everything else.

    variant: a method's name, class or configured instance; hyperparameters change it.
    targets, exclude: "all-linear" (every linear layer but output heads and weights shared with an
        embedding), a list of name suffixes, a regular expression that matches whole names, or a
        predicate (name, layer).
    overrides: hyperparameters for some layers, {suffix or regular expression: {...}}.
    name: adapters of several names live on one model and compose in the order attached.
    dtype: of the adapter's tensors; they are cast to the activation's where used.
    seed: of the random starts, each layer's drawn apart; None draws it from torch's generator.
    calibration: batches (dict, tuple or tensor) that the model runs on before, for the methods
        whose start depends on data; of several ranks each gives its own, and all start alike.

    Returns: the plan that was carried out. Raises: KeyError for an unknown variant, TypeError for
    an unknown hyperparameter, ValueError for one that a layer can't have, for a pattern that
    matches nothing and for a layer that can't be adapted; the model is then as it was.
    """
    chart = plan(
        model,
        variant,
        targets,
        exclude=exclude,
        overrides=overrides,
        name=name,
        dtype=dtype,
        calibration=calibration,
        **hyperparameters,
    )
    if calibration is None and chart.variant.needs_calibration:
        raise ValueError(
            f"{chart.variant.name} starts from what the layers see; pass calibration=, batches of "
            "what the model is to be trained on"
        )
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    bases = {site.name: site.base for site in chart.sites}
    stats: dict[str, Stats] = {}
    if calibration is not None:
        stats = calibrate(model, chart.sites, bases, calibration)
        chart = allocated(model, chart, stats)
    attachment = Attachment(name, seed, chart.widest)
    made = []
    share(attachment, chart.sites[0], bases[chart.sites[0].name], dtype)
    for site in chart.sites:
        with blame(site.variant, site.name):
            W, seen = bases[site.name], stats.pop(site.name, None)
            tensors = fresh_tensors(site, W, attachment, dtype, seen)
            made.append(make_adapter(site, W, attachment, tensors))
    install(model, chart, attachment, made)
    return chart


def share(
    attachment: Attachment,
    site: Site,
    W: Base,
    dtype: torch.dtype,
    known: Mapping[str, Tensor] | None = None,
) -> None:
    """Make the tensors that all sites share, those known as they are and the others at their start,
    drawn in the order declared."""
    variant, known = site.variant, known or {}
    keys = [key for key in variant.tensor_names() if variant.specs[key].shared]
    seed = variant.shared_seed
    seed = attachment.seed ^ zlib.crc32(b"shared") if seed is None else seed
    generator = torch.Generator().manual_seed(seed)
    for key in keys:
        own = tensor_dtype(variant, key, dtype)
        if key in known:
            tensor = known[key]
        elif W.device.type == "meta":
            tensor = torch.empty(site.shapes[key], dtype=own, device="meta")
        else:
            tensor = variant.specs[key].init(site.shapes[key], generator).to(W.device, own)
        register(attachment.shared, variant, key, tensor)


def fresh_tensors(
    site: Site, W: Base, attachment: Attachment, dtype: torch.dtype, stats: Stats | None = None
) -> dict[str, Tensor]:
    """A site's own tensors at their start; those on the meta device when the layer is there.

    Each site draws from a generator of its own, seeded by the attach's seed and the layer's name:
    a layer starts alike whatever else is adapted.
    """
    variant = site.variant
    shapes = {k: shape for k, shape in site.shapes.items() if not variant.specs[k].shared}
    if W.device.type == "meta":
        return {
            key: torch.empty(shape, dtype=tensor_dtype(variant, key, dtype), device="meta")
            for key, shape in shapes.items()
        }
    generator = torch.Generator().manual_seed(attachment.seed ^ zlib.crc32(site.name.encode()))
    tensors = {
        key: variant.specs[key].init(shape, generator)
        for key, shape in shapes.items()
        if variant.specs[key].init is not None
    }
    with torch.no_grad(), without_autocast(W.device.type):
        tensors |= variant.init(W, generator, stats)
    for key, shape in shapes.items():
        if key not in tensors or tuple(tensors[key].shape) != shape:
            got = tuple(tensors[key].shape) if key in tensors else "nothing"
            raise TypeError(f"{variant.name}: the start of {key} has {got}, its shape is {shape}")
    return {
        key: tensors[key].to(W.device, tensor_dtype(variant, key, dtype), copy=True).contiguous()
        for key in shapes
    }


def make_adapter(
    site: Site, W: Base, attachment: Attachment, tensors: dict[str, Tensor]
) -> Adapter:
    """A site's adapter with its own tensors, away from the model."""
    adapter = Adapter(site.name, site.variant, attachment, tensors)
    adapter.fingerprint = fingerprint(W, site.variant)
    return adapter.train(site.layer.training)


def install(model: nn.Module, chart: Plan, attachment: Attachment, made: list[Adapter]) -> None:
    """Freeze the base and put the adapters on their layers. Nothing here can be refused."""
    base = base_parameters(model)
    attachment.was_trainable = tuple(name for name, p in base.items() if p.requires_grad)
    for parameter in base.values():
        parameter.requires_grad_(False)
    for site, adapter in zip(chart.sites, made):
        put(site.layer, chart.name, adapter)
        for layer in site.tied.values():
            put(layer, chart.name, adapter, tied=True)
    if chart.variant.needs_prompt:
        learn_prompts(model, attachment)
    if attachment.shared.state_dict():
        root = bare(model)
        if not hasattr(root, SHARED):
            root.add_module(SHARED, nn.ModuleDict())
        getattr(root, SHARED)[chart.name] = attachment.shared
    trained = [p for adapter in made for p in adapter.parameters() if p.requires_grad]
    if trained and any(adapter.variant.scheduled() for adapter in made):
        warn_unless_stepped(attachment, trained[0])


def detach(model: nn.Module, name: str | None = None) -> None:
    """Take one adapter off, or all of them; after the last the model is what it was, bit for bit.

    Raises: ValueError where there is none.
    """
    found = adapters(model, name)
    for _, _, adapter in found:
        adapter.enabled = False  # also for a tied layer outside of the model
    for _, layer in list(adapted_layers(model)):
        for key in [key for key in layer.kinds if name in (None, key)]:
            remove(layer, key)
    for attachment, _, _ in _unique(found):
        forget_prompts(model, attachment)
    for module in list(model.modules()):
        if isinstance(held := module._modules.get(SHARED), nn.ModuleDict):
            for key in [key for key in held if name in (None, key)]:
                del held[key]
            if not held:
                del module._modules[SHARED]
    left = _unique(all_adapters(model))
    parameters = base_parameters(model)
    for attachment, path, site in _unique(found):
        for frozen in attachment.was_trainable:
            here = _renamed(frozen, site, path)
            # What was trainable before the first adapter is so again after the last.
            heirs = [(a, own) for a, p, s in left if (own := _renamed(here, p, s)) is not None]
            if heirs:
                heir, own = heirs[0]
                heir.was_trainable = (*heir.was_trainable, own)
            elif here in parameters:
                parameters[here].requires_grad_(True)


def enable(model: nn.Module, name: str | None = None, on: bool = True) -> None:
    """Switch one adapter, or all, on or off for good.

    Raises: ValueError where there is none.
    """
    for _, _, adapter in adapters(model, name):
        adapter.enabled = on


@contextmanager
def disabled(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """A context in which one adapter, or all, are off.

    Raises: ValueError where there is none.
    """
    found = [(adapter, adapter.enabled) for _, _, adapter in adapters(model, name)]
    for adapter, _ in found:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, before in found:
            adapter.enabled = before


class strength:
    """Set how strongly an adapter acts: y = W x + c (f(x) − W x).

    c = 0 is the frozen layer, 1 the method as trained, negative values turn it round. In a `with`
    statement the strength before comes back at its end. Raises: ValueError where there is no
    adapter, or c isn't finite.
    """

    def __init__(self, model: nn.Module, c: float, name: str | None = None) -> None:
        c = float(c)
        if c - c != 0:
            raise ValueError(f"strength c={c} must be finite")
        self.before = [(adapter, adapter.strength) for _, _, adapter in adapters(model, name)]
        for adapter, _ in self.before:
            adapter.strength = c

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        for adapter, c in self.before:
            adapter.strength = c


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's parameters that belong to no adapter, by name."""
    own = {
        id(p)
        for module in model.modules()
        if isinstance(module, Adapter)
        for p in module.tensors().values()
    }
    return {clean(name): p for name, p in model.named_parameters() if id(p) not in own}


def tensor_dtype(variant: Variant, key: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a variant's tensor: the adapter's for `Float`, the annotation's for others."""
    names = variant.annotations[key].dtypes
    return dtype if "float32" in names and len(names) > 1 else getattr(torch, names[0])


def fingerprint(W: Base, variant: Variant) -> str | None:
    """A hash of a layer's shape and a few of its rows rounded to bfloat16, by which a checkpoint
    knows its base in any dtype; None where the weights aren't at hand as floats."""
    if W.sample().is_meta or not W.sample().is_floating_point():
        return None
    rows = variant.fingerprint_rows(W).detach().to("cpu", torch.bfloat16).contiguous()
    digest = hashlib.sha256(f"{W.d_out}x{W.d_in}:".encode())
    digest.update(rows.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _unique(
    found: list[tuple[str, nn.Module, Adapter]],
) -> list[tuple[Attachment, str, str]]:
    """Each attachment once, with a layer's name here and in the model that was adapted."""
    return list({id(a.attachment): (a.attachment, path, a.site) for path, _, a in found}.values())


def _renamed(name: str | None, there: str, here: str) -> str | None:
    """A parameter's name in a model where the layer called `there` is called `here`; None where
    it lies outside."""
    there, here = f".{there}".rstrip("."), f".{here}".rstrip(".")
    if name is None:
        return None
    if here.endswith(there):
        return f"{here.removesuffix(there)}.{name}".lstrip(".")
    prefix = there.removesuffix(here)
    inside = f".{name}".startswith(f"{prefix}.")
    return f".{name}".removeprefix(f"{prefix}.") if inside else None


@contextmanager
def blame(variant: Variant, path: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{variant.name}: {path or 'the model'} {error}") from error


def _mib(n: int) -> str:
    return f"{n / 2**20:.2f} MiB"
