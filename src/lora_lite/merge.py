"""The weight that an adapted layer amounts to, found by probing."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lora_lite.adapted import Adapted, adapted_layers, adapters, without_autocast
from lora_lite.attach import detach
from lora_lite.base import DenseBase

CHUNK = 1024


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
    _mergeable(model)
    report = MergeReport(tuple(_merged_layer(name, layer) for name, layer in adapted_layers(model)))
    for name, layer in adapted_layers(model):
        weight, bias = merged_weight(name, layer)
        layer.base_kind(layer).write(weight, bias)
    detach(model)
    return report


@contextmanager
def merged(model: nn.Module) -> Iterator[MergeReport]:
    """A context in which the layers run on W' and the adapters rest; W comes back bit for bit.

    Raises: what `merge` raises.
    """
    _mergeable(model)
    layers = list(adapted_layers(model))
    report = MergeReport(tuple(_merged_layer(name, layer) for name, layer in layers))
    own = [(p, p.detach().clone()) for _, x in layers for p in (x.weight, x.bias) if p is not None]
    try:
        for name, layer in layers:
            weight, bias = merged_weight(name, layer)
            layer.base_kind(layer).write(weight, bias)
            layer.merged = True
        yield report
    finally:
        with torch.no_grad():
            for parameter, before in own:
                parameter.copy_(before)
        for _, layer in layers:
            layer.__dict__.pop("merged", None)


def delta_weights(model: nn.Module) -> dict[str, Tensor]:
    """ΔW = W' − W (d_out, d_in) of each adapted layer by name, in float32 or wider, with the
    adapters that are on at the strengths that they have.

    Raises: ValueError where there is no adapter or a method isn't linear.
    """
    adapters(model)
    _linear(model)
    deltas = {}
    for name, layer in adapted_layers(model):
        W = DenseBase(layer.base_kind(layer), probe_dtype(layer))
        deltas[name] = merged_weight(name, layer)[0] - W.weight
    return deltas


@torch.no_grad()
def merged_weight(name: str, layer: Adapted) -> tuple[Tensor, Tensor | None]:
    """W' (d_out, d_in) and b' of an adapted layer in the probing precision: f(I) − f(0) by rows.

    Raises: ValueError where W' isn't finite, or f(0) isn't zero and no bias can hold it.
    """
    dtype = probe_dtype(layer)
    W = DenseBase(layer.base_kind(layer), dtype)

    def run(x: Tensor) -> Tensor:
        run_one = W.below
        for adapter in layer.adapters.values():
            if adapter.enabled:
                link = DenseBase.__new__(DenseBase)
                link.__dict__ |= W.__dict__ | {"below": run_one}
                run_one = lambda h, a=adapter, w=link: a.forward(h, w)
        return run_one(x)

    with without_autocast(W.dense.device.type):
        origin = run(W.dense.new_zeros(1, W.d_in))
        rows = []
        for start in range(0, W.d_in, CHUNK):
            eye = torch.eye(W.d_in, dtype=dtype, device=W.dense.device)[start : start + CHUNK]
            rows.append(run(eye) - origin)
    weight = torch.cat(rows).T
    if not weight.isfinite().all():
        raise ValueError(f"{name}: the merged weight has NaN or infinite entries; nothing changed")
    if layer.bias is None and origin.any():
        raise ValueError(f"{name} needs a bias for the merge; give the layer one of zeros")
    return weight, origin[0] if layer.bias is not None else None


def probe_dtype(layer: nn.Module) -> torch.dtype:
    """float64 for weights of float32 and wider, float32 for narrower ones."""
    wide = layer.weight.dtype in (torch.float32, torch.float64)
    return torch.float64 if wide else torch.float32


def _merged_layer(name: str, layer: Adapted) -> MergedLayer:
    weight, _ = merged_weight(name, layer)
    W = layer.base_kind(layer).weight.to(weight.dtype)
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


def _mergeable(model: nn.Module) -> None:
    """Raise ValueError for the first layer that can't be merged."""
    _linear(model)
    owners = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                owners[id(parameter)].append(f"{path}.{key}")
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
        if len(others := owners[id(layer.weight)]) > 1:
            raise ValueError(
                f"{name}: its weight is shared by {' and '.join(others)}, and merging would change "
                "them all; either untie it first (`layer.weight = "
                "nn.Parameter(layer.weight.clone())`) or keep the adapter unmerged"
            )
