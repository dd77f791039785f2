"""Parameter groups and penalties."""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapted import Attachment, adapters, learning_rate_factor, without_autocast
from lora_lite.attach import base_parameters
from lora_lite.variant import Variant


def param_groups(
    model: nn.Module, lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups of everything that trains: each method's own learning rates and decay.

    lr: the base rate, which tensors' specs multiply; None takes the method's own absolute rates,
    where it has them. Parameters outside adapters that require gradients (a head, say) come in a
    group of their own at lr.

    Raises: ValueError where there is no adapter, or no rate to be had.
    """
    groups: dict[tuple[float, bool], dict[int, Tensor]] = defaultdict(dict)
    for _, _, adapter in adapters(model):
        variant = adapter.variant
        base = variant.base_lr if lr is None else lr
        if base is None:
            raise ValueError(f"{variant.name} has no learning rate of its own; pass lr")
        for key, tensor in adapter.tensors().items():
            if tensor.requires_grad:
                rate = base * learning_rate_factor(variant, key)
                groups[rate, variant.specs[key].decay][id(tensor)] = tensor
    others = [p for p in base_parameters(model).values() if p.requires_grad]
    if others and lr is None:
        raise ValueError("parameters outside the adapters train too, and need a rate; pass lr")
    out = [
        {"params": list(ps.values()), "lr": rate, "weight_decay": weight_decay if decay else 0.0}
        for (rate, decay), ps in groups.items()
    ]
    return out + ([{"params": others, "lr": lr, "weight_decay": weight_decay}] if others else [])


def regulariser(model: nn.Module) -> Tensor:
    """The sum of the methods' own penalties, to add to the loss; zero where they have none.

    Raises: ValueError where there is no adapter.
    """
    layers: dict[Attachment, list[tuple[Variant, dict[str, Tensor]]]] = defaultdict(list)
    for _, _, adapter in adapters(model):
        layers[adapter.attachment].append((adapter.variant, adapter.tensors()))
    device = next(t for own in layers.values() for _, ts in own for t in ts.values()).device
    with without_autocast(device.type):
        terms = [own[0][0].regulariser_all(own) for own in layers.values()]
    return sum((t.to(device) for t in terms if t is not None), torch.zeros((), device=device))
