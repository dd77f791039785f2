"""Groups, steps and penalties."""

import pytest
import torch
from jaxtyping import Float
from models import MLP
from torch import Tensor

import lora_lite as ll


def test_groups_follow_each_tensors_rate_and_decay():
    model = MLP()
    ll.attach(model, "jora", lr_theta=0.5, lr_core=0.1, magnitude_lr_scale=2.0)
    model.head.requires_grad_(True)
    groups = ll.param_groups(model, lr=1e-3, weight_decay=0.1)
    rates = {(round(g["lr"], 9), g["weight_decay"]): len(g["params"]) for g in groups}
    # Two layers: two angles and a magnitude each without decay, a core with; the head's two.
    assert rates == {(5e-3, 0.0): 4, (2e-3, 0.0): 2, (1e-3, 0.1): 2 + 2} or rates == {
        (5e-3, 0.0): 4,
        (2e-3, 0.0): 2,
        (1e-3, 0.1): 2,
    }
    assert sum(len(g["params"]) for g in groups) == 10


def test_a_methods_own_rates_are_absolute():
    model = MLP()
    ll.attach(model, "jora")
    rates = sorted({round(g["lr"], 9) for g in ll.param_groups(model)})
    assert rates == [0.01, 0.05]
    ll.detach(model)
    ll.attach(model, "lora")
    with pytest.raises(ValueError, match="lora has no learning rate of its own; pass lr"):
        ll.param_groups(model)
    ll.detach(model)
    ll.attach(model, "jora", lr_theta=0.0)
    assert not model.block["up"].adapters.default.theta_L.requires_grad


class Penalised(ll.Variant, name="penalised_test"):
    """Penalises c."""

    c: Float[Tensor, "d_out"] = ll.ParamSpec(lambda shape, g: torch.ones(shape))

    def forward(self, x, W, c):
        return W(x) + c - 1

    def regulariser(self, c):
        return c.square().sum()


def test_penalties_add_up_and_have_gradients():
    model = MLP()
    ll.attach(model, Penalised)
    penalty = ll.regulariser(model)
    assert penalty.item() == 64
    penalty.backward()
    assert torch.equal(model.block["up"].adapters.default.c.grad, torch.full((40,), 2.0))
    ll.detach(model)
    ll.attach(model, "lora")
    assert ll.regulariser(model).item() == 0
