"""Running a model on batches, for the methods whose start depends on data."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_lite.adapted import without_autocast
from lora_lite.base import Base, at_least_float32
from lora_lite.variant import Stats

if TYPE_CHECKING:
    from lora_lite.attach import Site

Batches = Iterable[Any]


class Sums(NamedTuple):
    """A layer's statistic, summed; `split` where it is a tuple."""

    terms: tuple[Tensor, ...]
    split: bool
    count: int

    def mean(self, count: int) -> Stats:
        means = tuple(total / count for total in self.terms)
        return Stats(means if self.split else means[0], count)


@torch.no_grad()
def calibrate(
    model: nn.Module, sites: "Sequence[Site]", bases: Mapping[str, Base], batches: Batches
) -> dict[str, Stats]:
    """Each site's `Variant.statistic`, averaged over every real token of the batches.

    A batch is a dict (keyword arguments), a tuple or list (positional arguments) or a tensor; a
    dict's attention_mask keeps padding out. The sums are streamed in float32 or wider, outside
    autocast. The model runs in eval mode; its mode, hooks and the random generator are as before,
    also after an error. Of several ranks each calls, with batches of its own, and what all saw is
    added up.

    Raises: ValueError where a layer saw no token, or statistics that aren't finite.
    """
    sums: dict[str, Sums] = {}
    last: tuple[Any, ...] = (None,)
    batch: Any = None
    handles, modes = [], {m: m.training for m in model.modules()}

    def added(site: Any, x: Tensor, before: Sums | None) -> Sums:
        mask = site.variant.tokens(batch) if isinstance(batch, Mapping) else None
        flat = x.shape[:-1] == (mask.numel(),) if mask is not None else False
        if mask is not None and (flat or x.shape[:-1] == mask.shape):
            x = x[mask.to(x.device).bool().view(x.shape[:-1])]
        x = at_least_float32(x.reshape(-1, x.shape[-1]))
        with without_autocast(x.device.type):
            seen = site.variant.statistic(x, bases[site.name])
        terms = seen if isinstance(seen, tuple) else (seen,)
        old, count = (before.terms, before.count) if before else ((0,) * len(terms), 0)
        terms = tuple(a + b for a, b in zip(old, terms))
        return Sums(terms, isinstance(seen, tuple), count + len(x))

    def watch(site: Any) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            nonlocal last
            x = args[0] if args else next(iter(kwargs.values()))
            before = sums.get(site.name)
            # Nothing tells whether an inference tensor was changed in place.
            shares = site.variant.reads_input_alone and not x.is_inference()
            key = (id(x), x._version, id(before), site.variant) if shares else None
            if key is None or key != last[0]:
                # x and what was before stay alive, so that nothing else has their ids.
                last = key, added(site, x, before), x, before
            sums[site.name] = last[1]

        return hook

    try:
        for site in sites:
            handles.append(site.layer.register_forward_pre_hook(watch(site), with_kwargs=True))
        model.eval()
        with torch.random.fork_rng():
            for batch in progress(batches):
                last = (None,)
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
    counts = [sums[site.name].count if site.name in sums else 0 for site in sites]
    counts = torch.tensor(counts, device=bases[sites[0].name].device)
    # Every rank refuses or none, lest one waits for the others.
    for site, least in zip(sites, over_ranks(counts.clone(), least=True).tolist()):
        if not least:
            raise ValueError(f"{site.variant.name}: {site.name} saw no calibration token")
    stats: dict[str, Stats] = {}
    own = None
    for site, count in zip(sites, over_ranks(counts).tolist()):
        before, own = own, sums.pop(site.name)
        if own is not before:
            if not all(over_ranks(total).isfinite().all() for total in own.terms):
                raise ValueError(
                    f"{site.variant.name}: {site.name} saw NaN or infinite activations"
                )
            try:
                with without_autocast(bases[site.name].device.type):
                    seen = site.variant.summarise(own.mean(count), bases[site.name])
            except ValueError as error:
                raise ValueError(f"{site.variant.name}: {site.name} {error}") from error
        stats[site.name] = seen
    return stats


def over_ranks(t: Tensor, least: bool = False) -> Tensor:
    """A tensor's sum over all ranks, or its least, in place."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        ops = torch.distributed.ReduceOp
        torch.distributed.all_reduce(t, ops.MIN if least else ops.SUM)
    return t


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
