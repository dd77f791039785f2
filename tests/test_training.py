"""Groups, steps and penalties."""

import pytest
import torch
import torch.multiprocessing as mp
from jaxtyping import Float
from models import MLP
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lora_lite as ll
from lora_lite.variant import whole


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


PENALISED = dict(hra=dict(r=5, paired=False, lambda_orth=0.3), adalora=dict(init_r=3, target_r=1))


def _penalise(rank, world, where):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{where}/{world}", rank=rank, world_size=world
    )
    for variant, hyperparameters in PENALISED.items():
        torch.manual_seed(0)
        model = MLP()
        ll.attach(model, variant, seed=0, dtype=torch.float64, **hyperparameters)
        if world > 1:
            fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        loss = ll.regulariser(model)
        loss.backward()
        grads = [whole(p.grad) for p in model.parameters() if p.grad is not None]
        torch.save([loss.detach(), *grads], f"{where}/{variant}-{world}-{rank}.pt")
    torch.distributed.destroy_process_group()


def test_the_penalty_of_a_sharded_layer_is_the_same(tmp_path):
    for world in (1, 2):
        mp.start_processes(_penalise, (world, str(tmp_path)), nprocs=world, start_method="spawn")
    for variant in PENALISED:
        load = lambda run, v=variant: torch.load(tmp_path / f"{v}-{run}.pt", weights_only=True)
        alone = load("1-0")
        assert len(alone) > 2 and all(t.any() for t in alone)
        for other in (load("2-0"), load("2-1")):
            torch.testing.assert_close(other, alone)
