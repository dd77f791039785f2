"""Running a model on batches, for the methods whose start depends on data."""

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
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    mask: list[Tensor | None] = [None]
    handles, modes = [], {m: m.training for m in model.modules()}

    def watch(site: Any) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            if mask[0] is not None and x.shape[:-1] == mask[0].shape:
                x = x[mask[0].to(x.device).bool()]
            elif mask[0] is not None and x.shape[:-1] == (mask[0].numel(),):
                x = x[mask[0].to(x.device).bool().flatten()]
            x = at_least_float32(x.reshape(-1, x.shape[-1]))
            total = site.variant.statistic(x, bases[site.name])
            sums[site.name] = sums.get(site.name, 0) + total
            counts[site.name] = counts.get(site.name, 0) + len(x)

        return hook

    try:
        for site in sites:
            handles.append(site.layer.register_forward_pre_hook(watch(site), with_kwargs=True))
        model.eval()
        with torch.random.fork_rng():
            for batch in batches:
                mask[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
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
    for site in sites:
        if not counts.get(site.name):
            raise ValueError(f"{site.variant.name}: {site.name} saw no calibration token")
        if not sums[site.name].isfinite().all():
            raise ValueError(f"{site.variant.name}: {site.name} saw NaN or infinite activations")
    return {name: Stats(total / counts[name], counts[name]) for name, total in sums.items()}
