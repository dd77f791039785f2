"""Optimizer steps: what advances the methods' schedules."""

import warnings
import weakref
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from lora_lite.adapted import Adapter, Attachment, adapters
from lora_lite.variant import Layer, Step


def step(
    model: nn.Module, total: int | None = None, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Advance every adapter's schedule by one optimizer step.

    Call it after `optimizer.step()` and before the gradients are cleared, on every rank; statistics
    that the methods gathered are averaged over ranks first.

    total: the number of optimizer steps planned, for the schedules that depend on it.
    optimizer: whose moments are cleared for numbers that a method starts anew.
    Raises: ValueError where there is no adapter, or a method needs another `total`, or one at all.
    """
    found = adapters(model)
    for _, _, adapter in found:
        check_total(adapter, total)
    with torch.no_grad():
        average(found)
        for attachment in {id(a.attachment): a.attachment for _, _, a in found}.values():
            attachment.step += 1
            attachment.total = total if total is not None else attachment.total
            now = Step(attachment.step, attachment.total, "", attachment.seed, optimizer)
            layers = [
                Layer(adapter.variant, adapter.tensors(), replace(now, layer=adapter.site))
                for _, _, adapter in found
                if adapter.attachment is attachment
            ]
            layers[0].variant.step_all(layers)


def schedule(
    model: nn.Module, optimizer: torch.optim.Optimizer, total: int | None = None
) -> torch.utils.hooks.RemovableHandle:
    """Call `step` after each of the optimizer's steps from now on; the handle's remove() ends it.

    total: the number of optimizer steps planned, for the schedules that depend on it.
    Raises: ValueError where there is no adapter, or a method needs another `total`, or one at all.
    """
    for _, _, adapter in adapters(model):
        check_total(adapter, total)
    return optimizer.register_step_post_hook(lambda *_: step(model, total, optimizer))


def check_total(adapter: Adapter, total: int | None) -> None:
    """Raise ValueError where a method's schedule needs the number of steps and has none, or one
    that it can't have."""
    known = total if total is not None else adapter.attachment.total
    if known is None and (why := adapter.variant.needs_total()):
        raise ValueError(
            f"{adapter.variant.name}: {why} depends on the number of optimizer steps; "
            "pass total= to ll.schedule or ll.step"
        )
    if known is not None:
        try:
            adapter.variant.check_total(known)
        except ValueError as error:
            raise ValueError(f"{adapter.variant.name}: {error}") from None


def average(found: list[tuple[str, nn.Module, Adapter]]) -> None:
    """Make gathered statistics the mean over all ranks, in one reduction."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    gathered = {
        id(tensor): tensor
        for _, _, adapter in found
        for key, tensor in adapter.tensors().items()
        if adapter.variant.specs[key].averaged
    }
    if gathered:
        flat = torch.cat([t.flatten() for t in gathered.values()])
        torch.distributed.all_reduce(flat)
        flat /= torch.distributed.get_world_size()
        for t, mean in zip(gathered.values(), flat.split([t.numel() for t in gathered.values()])):
            t.copy_(mean.view_as(t))


_watched: list[tuple[weakref.ref, weakref.ref]] = []
_looking = False


def warn_unless_stepped(attachment: Attachment, parameter: Tensor) -> None:
    """Warn, once, when optimizers move the parameter and nobody advances its adapter's schedule."""
    global _looking
    if not _looking:
        # For good: a hook can't be removed while it runs.
        register_optimizer_step_post_hook(_look)
        _looking = True
    _watched.append((weakref.ref(attachment), weakref.ref(parameter)))


def _look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    for entry in list(_watched):
        attachment, parameter = entry[0](), entry[1]()
        if attachment is None or parameter is None or attachment.step:
            _watched.remove(entry)
        elif any(p is parameter for group in optimizer.param_groups for p in group["params"]):
            attachment.unadvanced += 1
            if attachment.unadvanced == 2:
                _watched.remove(entry)
                warnings.warn(
                    f"adapter {attachment.name!r} has a schedule that nobody advances: call "
                    "ll.schedule(model, optimizer) once, or ll.step(model) after each optimizer "
                    "step, or give a Trainer lora_lite.trainer.AdapterCallback",
                    stacklevel=2,
                )
