"""Running a model on batches, for the methods whose start depends on data."""

import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_lite.base import Base, at_least_float32
from lora_lite.variant import Stats

if TYPE_CHECKING:
    from lora_lite.attach import Site

Batches = Iterable[Any]


@torch.no_grad()
def calibrate(
    model: nn.Module, sites: "Iterable[Site]", bases: Mapping[str, Base], batches: Batches
) -> dict[str, Stats]:
    """Each site's `Variant.statistic`, averaged over every real token of the batches.

    A batch is a dict (keyword arguments), a tuple or list (positional arguments) or a tensor; a
    dict's attention_mask keeps padding out. The sums are streamed in float32 or wider. The model
    runs in eval mode; its mode, hooks and the random generator are as before, also after an error.

    Raises: ValueError where a layer saw no token, or statistics that aren't finite.
    """
    sums: dict[str, tuple[Tensor, ...]] = {}
    counts: dict[str, int] = {}
    kinds: dict[str, type] = {}
    batch: Any = None
    handles, modes = [], {m: m.training for m in model.modules()}

    def watch(site: Any) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            mask = site.variant.tokens(batch) if isinstance(batch, Mapping) else None
            flat = x.shape[:-1] == (mask.numel(),) if mask is not None else False
            if mask is not None and (flat or x.shape[:-1] == mask.shape):
                x = x[mask.to(x.device).bool().view(x.shape[:-1])]
            x = at_least_float32(x.reshape(-1, x.shape[-1]))
            seen = site.variant.statistic(x, bases[site.name])
            kinds[site.name] = type(seen)
            terms = seen if isinstance(seen, tuple) else (seen,)
            before = sums.get(site.name, (0,) * len(terms))
            sums[site.name] = tuple(a + b for a, b in zip(before, terms))
            counts[site.name] = counts.get(site.name, 0) + len(x)

        return hook

    try:
        for site in sites:
            handles.append(site.layer.register_forward_pre_hook(watch(site), with_kwargs=True))
        model.eval()
        with torch.random.fork_rng():
            for batch in progress(batches):
                if isinstance(batch, Mapping):
                    model(**batch)
                elif isinstance(batch, tuple | list):
                    model(*batch)
                else:
                    model(batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    stats = {}
    for site in sites:
        n = counts.get(site.name)
        if not n:
            raise ValueError(f"{site.variant.name}: {site.name} saw no calibration token")
        if not all(total.isfinite().all() for total in sums[site.name]):
            raise ValueError(f"{site.variant.name}: {site.name} saw NaN or infinite activations")
        means = tuple(total / n for total in sums.pop(site.name))
        seen = Stats(means if kinds[site.name] is tuple else means[0], n)
        try:
            stats[site.name] = site.variant.summarise(seen, bases[site.name])
        except ValueError as error:
            raise ValueError(f"{site.variant.name}: {site.name} {error}") from error
    return stats


def progress(batches: Batches) -> Iterable[Any]:
    """The batches, with a bar on a terminal where rich is installed."""
    if not sys.stderr.isatty():
        return batches
    try:
        from rich.console import Console
        from rich.progress import track
    except ImportError:
        return batches
    return track(batches, "calibrating", console=Console(stderr=True), transient=True)
