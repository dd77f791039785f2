"""What a training step keeps for backward: counted, per method."""

import pytest
import torch
from settings import KEPT, LINEAR
from torch import nn

import lora_lite as ll
from lora_lite.testing import calibration_for, move
from lora_lite.variant import configure

T, D_IN, D_OUT = 256, 96, 160


def test_every_method_has_its_count():
    assert set(KEPT) == set(LINEAR)


@pytest.mark.parametrize("variant", KEPT)
def test_numbers_kept_per_token_in_bfloat16(variant):
    hyperparameters, numbers = KEPT[variant]
    layer = nn.Linear(D_IN, D_OUT, dtype=torch.bfloat16)
    x = torch.randn(T, D_IN, dtype=torch.bfloat16)
    configured = configure(variant, **hyperparameters)
    ll.attach(layer, configured, calibration=calibration_for(configured, [x]))
    move(layer)
    kept = {}

    def note(t):
        if T in t.shape or t.numel() >= T * 4:
            if t.shape[0] == T or T in t.shape:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = layer(x)
    assert y.requires_grad
    assert sum(kept.values()) <= 2 * T * numbers, f"{sum(kept.values()) / 2 / T} per token"
