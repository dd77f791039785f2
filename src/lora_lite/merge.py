"""The weight that an adapted layer amounts to, found by probing."""

import copy
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lite.adapted import Adapted, adapted_layers, adapters, carried, without_autocast
from lora_lite.attach import detach
from lora_lite.base import Base


@dataclass(frozen=True)
class MergedLayer:
    """change: ‖ΔW‖/‖W‖ (Frobenius). lost: the share of ‖ΔW‖ that rounding to the weight's dtype
    takes away."""

    name: str
    change: float
    lost: float


@dataclass(frozen=True)
class MergeReport:
    """What a merge did, layer by layer. Print it."""

    layers: tuple[MergedLayer, ...]

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        rows = [f"{'layer'.ljust(width)}  |ΔW|/|W|  lost to rounding"]
        rows += [
            f"{x.name.ljust(width)}  {x.change:8.2e}  {100 * x.lost:15.3g} %" for x in self.layers
        ]
        return "\n".join(rows)

    __repr__ = __str__


def merge(model: nn.Module) -> MergeReport:
    """Write each adapted layer's W' over its W and take the adapters off: a plain model again.

    W' is f(I)ᵀ, probed through the adapters' own forward in float64 (float32 for half-precision
    weights) and rounded once. Everything is computed and checked once before anything is written.

    Raises: ValueError, naming the layer, where a method is not linear in x, an adapter is off, a
    weight is shared with another module, quantised or offloaded, or W' is not finite.
    """
    report = _checked(model)
    for name, layer in probed_layers(model):
        base_of(layer).write(merged_numbers(name, layer)[1])
    detach(model)
    return report


@contextmanager
def merged(model: nn.Module) -> Iterator[MergeReport]:
    """A context in which the layers run on W' and the adapters rest; W comes back bit for bit.

    Raises: what `merge` raises.
    """
    report = _checked(model)
    layers, every = list(probed_layers(model)), [layer for _, layer in adapted_layers(model)]
    own = [
        (p, p.detach().clone()) for _, x in layers for p in x._parameters.values() if p is not None
    ]
    try:
        for name, layer in layers:
            base_of(layer).write(merged_numbers(name, layer)[1])
        for layer in every:
            layer.merged = True
        yield report
    finally:
        with torch.no_grad():
            for parameter, before in own:
                parameter.copy_(before)
        for layer in every:
            layer.__dict__.pop("merged", None)


def delta_weights(model: nn.Module) -> dict[str, Tensor]:
    """ΔW = W' − W (d_out, d_in) of each adapted layer by name, in float32 or wider, with the
    adapters that are on at the strengths that they have; of a norm (d,), of an embedding (rows, d).

    Raises: ValueError where there is no adapter or a method isn't linear.
    """
    adapters(model)
    _linear(model)
    return {name: delta_weight(name, layer)[0] for name, layer in probed_layers(model)}


def delta_weight(name: str, layer: Adapted) -> tuple[Tensor, Tensor]:
    """ΔW and W of one layer. Raises: what `merged_numbers` raises."""
    own, new = merged_numbers(name, layer)
    return new["weight"] - own["weight"], own["weight"]


def probed_layers(model: nn.Module) -> Iterator[tuple[str, Adapted]]:
    """(name, layer) of the adapted layers whose numbers are their own: a head that is tied to an
    adapted embedding changes with it."""
    for name, layer in adapted_layers(model):
        if len(layer.adapters):
            yield name, layer


def base_of(layer: Adapted) -> Base:
    """The frozen layer, as the first of its own adapters sees it."""
    return next(kind for key, kind in layer.kinds.items() if key in layer.adapters)(layer)


@torch.no_grad()
def merged_numbers(name: str, layer: Adapted) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(own, new) numbers, weight and bias, of an adapted layer in the probing precision, by running
    its adapters that are on upon the frozen layer's probe.

    Raises: ValueError where the new ones aren't finite or the layer has no place for them.
    """
    W = base_of(layer).probe()
    run = W.run
    for adapter in layer.adapters.values():
        if adapter.enabled:
            link = copy.copy(W)
            link.below = run
            run = lambda x, a=adapter, w=link: a.forward(x, w)
    with without_autocast(W.sample().device.type):
        try:
            new = W.found(run)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
    if not all(number.isfinite().all() for number in new.values()):
        raise ValueError(f"{name}: the merged weight has NaN or infinite entries; nothing changed")
    return W.own(), new


def _merged_layer(name: str, layer: Adapted) -> MergedLayer:
    own, new = merged_numbers(name, layer)
    W, weight = own["weight"], new["weight"]
    rounded = weight.to(layer.weight.dtype).to(weight.dtype)
    if not rounded.isfinite().all():
        raise ValueError(
            f"{name}: the merged weight overflows {layer.weight.dtype}; merge in a wider dtype"
        )
    delta = (weight - W).norm()
    lost = (rounded - weight).norm() / delta if delta > 0 else delta
    return MergedLayer(name, float(delta / W.norm()), float(lost))


def _linear(model: nn.Module) -> None:
    for name, _, adapter in adapters(model):
        if reason := adapter.variant.nonlinear():
            raise ValueError(f"{adapter.variant.name}: {name} can't be merged: {reason}")


def _checked(model: nn.Module) -> MergeReport:
    """What a merge would do. Raises: ValueError for the first layer that can't be merged."""
    _linear(model)
    owners = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append((f"{path}.{key}", module))
    for name, layer, adapter in adapters(model):
        if layer.merged:
            raise ValueError(f"{name} is merged already; leave the `merged` context first")
        if not adapter.enabled:
            raise ValueError(
                f"{name}: adapter {adapter.attachment.name!r} is off and merging would drop it; "
                "enable or detach it first"
            )
        if layer.weight.is_meta or not layer.weight.is_floating_point():
            raise ValueError(
                f"{name}: the weight ({layer.weight.dtype} on {layer.weight.device}) can't be "
                "written; load it as floats on a device first"
            )
        # One write serves both ends where both carry the same adapters.
        others = owners[id(layer.weight)]
        if any(carried(module) != carried(layer) for _, module in others):
            raise ValueError(
                f"{name}: its weight is shared by {' and '.join(path for path, _ in others)}, and "
                "merging would change them all; either untie it first (`layer.weight = "
                "nn.Parameter(layer.weight.clone())`) or keep the adapter unmerged"
            )
    return MergeReport(tuple(_merged_layer(name, layer) for name, layer in probed_layers(model)))
