"""Schedules follow the optimizer's steps; statistics are gathered in backward."""

import warnings

import pytest
import torch
import torch.multiprocessing as mp
from jaxtyping import Float
from models import MLP
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora_lite as ll
from lora_lite.shapes import unchecked


def empty(shape, generator):
    return torch.zeros(shape)


class Watching(ll.Variant, name="watching_test"):
    """Counts its steps, and gathers the energies of its inputs and output gradients."""

    c: Float[Tensor, "d_out"] = ll.ParamSpec(empty)
    seen: Float[Tensor, "2"] = ll.ParamSpec(empty, trainable=False)
    col: Float[Tensor, "d_in"] = ll.ParamSpec(empty, trainable=False, averaged=True)
    row: Float[Tensor, "d_out"] = ll.ParamSpec(empty, trainable=False, averaged=True)
    draw: Float[Tensor, "3"] = ll.ParamSpec(empty, trainable=False)

    def forward(self, x, W, c, seen, col, row, draw):
        return W(x) + c

    def observe(self, x, g, seen, col, row, draw):
        col += x.flatten(0, -2).float().square().mean(0)
        row += g.flatten(0, -2).float().square().mean(0)

    def step(self, tensors, now):
        tensors["seen"].copy_(torch.tensor([now.number, now.total or 0]))
        tensors["draw"].copy_(torch.randn(3, generator=now.generator()))
        now.forget(tensors["c"], torch.arange(len(tensors["c"])) < 2)


class Planned(ll.Variant, name="planned_test"):
    """Needs the number of steps."""

    c: Float[Tensor, "d_out"] = ll.ParamSpec(empty)

    def forward(self, x, W, c):
        return W(x) + c

    def needs_total(self):
        return "warmup_ratio=0.1"


class Together(ll.Variant, name="together_test"):
    """Numbers its layers."""

    c: Float[Tensor, "d_out"] = ll.ParamSpec(empty)

    def forward(self, x, W, c):
        return W(x) + c

    @classmethod
    def step_all(cls, layers):
        for i, layer in enumerate(layers):
            layer.tensors["c"].fill_(i)


def up(model):
    return model.block["up"].adapters.default


def test_steps_are_the_optimizers_and_survive_a_file(tmp_path):
    model = MLP()
    ll.attach(model, Watching)
    optimizer = torch.optim.SGD(ll.param_groups(model, lr=0.1))
    handle = ll.schedule(model, optimizer, total=7)
    for _ in range(3):
        for _ in range(2):  # micro-batches
            model(torch.randn(2, 24)).sum().backward()
        optimizer.step()
    assert up(model).seen.tolist() == [3, 7]
    handle.remove()
    optimizer.step()
    assert up(model).attachment.step == 3
    ll.save(model, tmp_path / "a.safetensors")
    ll.detach(model)
    ll.load(model, tmp_path / "a.safetensors")
    ll.step(model)
    assert up(model).seen.tolist() == [4, 7]


def test_what_is_held_fixed_is_no_statistic():
    """A method is shown the tensors that it declares frozen, whatever else does not train."""
    model, x = MLP(), torch.randn(2, 24, requires_grad=True)
    ll.attach(model, Watching)
    model.requires_grad_(False)
    model(x).sum().backward()
    torch.testing.assert_close(up(model).col, x.detach().square().mean(0))


def test_random_numbers_differ_by_step_and_layer_and_repeat():
    draws = []
    for _ in range(2):
        model = MLP()
        ll.attach(model, Watching, seed=3)
        ll.step(model)
        draws.append(up(model).draw.clone())
        ll.step(model)
        draws.append(up(model).draw.clone())
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(up(model).draw, model.block["down"].adapters.default.draw)


def test_a_schedule_clears_the_moments_of_what_starts_anew():
    model = MLP()
    ll.attach(model, Watching)
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=0.1))
    ll.schedule(model, optimizer)
    model(torch.randn(5, 24)).square().sum().backward()
    optimizer.step()
    state = optimizer.state[up(model).c]
    for moment in ("exp_avg", "exp_avg_sq"):
        assert not state[moment][:2].any() and state[moment][2:].all()
    assert state["step"] == 1


def test_layers_can_decide_together():
    model = MLP()
    ll.attach(model, Together)
    ll.step(model)
    assert [a.c[0].item() for a in (up(model), model.block["down"].adapters.default)] == [0, 1]


def test_a_missing_total_is_asked_for():
    model = MLP()
    ll.attach(model, Planned)
    optimizer = torch.optim.SGD(ll.param_groups(model, lr=0.1))
    for call in (lambda: ll.schedule(model, optimizer), lambda: ll.step(model)):
        with pytest.raises(ValueError, match="planned_test: warmup_ratio=0.1 depends on .* total="):
            call()
    assert up(model).attachment.step == 0
    ll.step(model, total=10)
    ll.step(model)


@pytest.mark.parametrize("how", ["plain", "accumulated", "reentrant", "checkpointed", "compiled"])
def test_statistics_are_gathered_once_a_backward(how):
    model, x = MLP(), torch.randn(6, 24)
    ll.attach(model, Watching)
    want = torch.zeros(24)
    with unchecked():
        torch._dynamo.reset()
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
        for i in range(2):
            h = (x * (i + 1)).requires_grad_(how == "reentrant")
            if how in ("reentrant", "checkpointed"):
                y = checkpoint(model, h, use_reentrant=how == "reentrant")
            else:
                y = run(h) if how == "compiled" else model(h)
            y.square().sum().backward()
            want += h.detach().square().mean(0)
    torch.testing.assert_close(up(model).col, want)
    assert up(model).row.all()


def test_the_row_statistic_is_of_the_outputs_gradient():
    model, x = MLP(), torch.randn(6, 24)
    ll.attach(model, Watching, targets=["head"])
    y = model(x)
    g = torch.randn_like(y)
    y.backward(g)
    torch.testing.assert_close(model.head.adapters.default.row, g.square().mean(0))


def test_forwards_before_a_backward_are_all_seen():
    model, x = MLP(), torch.randn(6, 24)
    ll.attach(model, Watching)
    (model(x).sum() + model(2 * x).sum()).backward()
    torch.testing.assert_close(up(model).col, 5 * x.square().mean(0))


def test_nothing_is_gathered_outside_training():
    model, x = MLP(), torch.randn(6, 24)
    ll.attach(model, Watching)
    with torch.no_grad():
        model(x)
    model.eval()
    model(x).sum().backward()
    assert not up(model).col.any() and not up(model).row.any()


def test_watching_changes_neither_output_nor_gradients():
    model, x = MLP(), torch.randn(6, 24, requires_grad=True)
    ll.attach(model, Watching)
    y = model(x)
    seen = torch.autograd.grad(y.square().sum(), [x, up(model).c])
    model.eval()
    z = model(x)
    unseen = torch.autograd.grad(z.square().sum(), [x, up(model).c])
    assert torch.equal(y, z) and all(torch.equal(a, b) for a, b in zip(seen, unseen))


def test_a_schedule_that_nobody_advances_warns_once():
    model = MLP()
    ll.attach(model, Watching)
    optimizer = torch.optim.SGD(ll.param_groups(model, lr=0.1))
    optimizer.step()
    with pytest.warns(UserWarning, match=r"'default' has a schedule .* ll.schedule\(model, opti"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("variant, advance", [(Watching, True), ("lora", False), ("oft", False)])
def test_no_warning_where_it_is_advanced_or_there_is_none(variant, advance):
    model = MLP()
    ll.attach(model, variant, **(dict(block_size=8) if variant == "oft" else {}))
    optimizer = torch.optim.SGD(ll.param_groups(model, lr=0.1))
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            other.step()
            optimizer.step()
            if advance:
                ll.step(model)


def _rank(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    torch.manual_seed(0)
    model = MLP()
    ll.attach(model, Watching, seed=0)
    x = torch.randn(4, 24)
    parallel = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ll.param_groups(parallel, lr=0.1))
    ll.schedule(parallel, optimizer)
    for _ in range(2):
        parallel(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_average_what_they_gather(tmp_path):
    mp.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    torch.manual_seed(0)
    MLP()
    x = torch.randn(4, 24)
    torch.testing.assert_close(
        first["block.up.adapters.default.col"], 2 * x.square().mean(0), rtol=1e-6, atol=0
    )
