"""What calibration sums: over tokens, calls, layers with one input, and ranks."""

import pytest
import torch
import torch.multiprocessing as mp
from models import MLP
from torch import nn

import lora_lite as ll
from lora_lite.calibration import calibrate


class Moments(ll.Variant, name="moments_test"):
    """The first two moments of a layer's input."""

    scale: float = 1.0

    reads_input_alone = True

    def statistic(self, x, W):
        return x.sum(0), self.scale * x.T @ x


class Reading(Moments, name="reading_test"):
    """The same, for all one can know not of the input alone."""

    reads_input_alone = False


class Single(ll.Variant, name="single_test"):
    def statistic(self, x, W):
        return x.sum(0)


class Fan(nn.Module):
    """q, k and v see one input, o another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        return self.o(self.q(x) * self.k(x) + self.v(x))


def seen(model, batches, variant=Moments, **arguments):
    chart = ll.plan(model, variant, **arguments)
    bases = {site.name: site.base for site in chart.sites}
    return calibrate(model, chart.sites, bases, batches)


def assert_moments(stats, *xs):
    x = torch.cat(xs).double()
    assert stats.count == len(x)
    for got, want in zip(stats.mean, (x.mean(0), x.T @ x / len(x))):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_layers_with_one_input_share_what_is_made_of_it():
    xs = torch.randn(3, 5, 6)
    stats = seen(Fan(), xs)
    assert stats["q"] is stats["k"] is stats["v"] is not stats["o"]
    assert_moments(stats["q"], *xs)


@pytest.mark.parametrize("variant", [Reading, Single])
def test_nothing_is_shared_that_may_read_the_weight(variant):
    xs = torch.randn(3, 5, 6)
    stats = seen(Fan(), xs, variant)
    assert stats["q"] is not stats["k"]
    mean = stats["q"].mean
    assert isinstance(mean, tuple) == (variant is Reading)
    torch.testing.assert_close(mean[0] if variant is Reading else mean, xs.mean((0, 1)))


def test_layers_with_settings_of_their_own_share_nothing():
    stats = seen(Fan(), torch.randn(3, 5, 6), overrides={"k": dict(scale=2.0)})
    assert stats["q"] is not stats["k"] and stats["k"] is not stats["v"]
    torch.testing.assert_close(stats["k"].mean[1], 2 * stats["q"].mean[1])


@pytest.mark.parametrize("inference", [False, True])
def test_an_input_changed_in_place_is_another(inference):
    class Residual(Fan):
        def forward(self, x):
            with torch.inference_mode(inference):
                h = x.clone()
                self.q(h)
                self.k(h.mul_(3))

    x = torch.randn(5, 6)
    stats = seen(Residual(), [x], targets=["q", "k"])
    assert_moments(stats["q"], x)
    assert_moments(stats["k"], 3 * x)


def test_layers_that_part_after_a_while_are_told_apart():
    class Gated(Fan):
        def forward(self, x):
            self.q(x)
            self.k(x if x[0, 0] > 0 else x.clone() + 1)
            self.k(x) if x[0, 1] > 0 else self.q(x)

    torch.manual_seed(1)
    xs = torch.randn(8, 5, 6)
    q, k = [], []
    for x in xs:
        q += [x] if x[0, 1] > 0 else [x, x]
        k += [x if x[0, 0] > 0 else x + 1] + ([x] if x[0, 1] > 0 else [])
    assert len(q) not in (8, 16)
    stats = seen(Gated(), xs, targets=["q", "k"])
    assert_moments(stats["q"], *q)
    assert_moments(stats["k"], *k)


def test_a_mask_of_one_batch_is_not_that_of_the_next():
    """An input that stays from batch to batch, seen by one layer in the first and by the other in
    the second."""
    x = torch.randn(2, 5, 6)

    class Switch(Fan):
        def forward(self, attention_mask, layer):
            getattr(self, layer)(x)

    first = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])
    second = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 0, 0, 1]])
    batches = [dict(attention_mask=first, layer="q"), dict(attention_mask=second, layer="k")]
    stats = seen(Switch(), batches, targets=["q", "k"])
    assert_moments(stats["q"], x[first.bool()])
    assert_moments(stats["k"], x[second.bool()])


def test_autocast_does_not_narrow_the_sums():
    xs = torch.randn(3, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        stats = seen(MLP(), xs, targets=["up"])
    assert stats["block.up"].mean[1].dtype == torch.float32
    assert_moments(stats["block.up"], *xs)


def _rank(rank, world, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world
    )
    torch.manual_seed(0)
    model, x = Fan(), torch.randn(9, 6)
    found = {"stats": dict(seen(model, [x[:4]] if rank == 0 else [x[4:6], x[6:]]))}
    for what, batches in {
        "none": [x] if rank == 0 else [],
        "nan": [x if rank == 0 else x * float("nan")],
    }.items():
        try:
            seen(model, batches)
        except ValueError as error:
            found[what] = str(error)
    chart = ll.attach(model, "eva", r=2, seed=0, calibration=[x[:4]] if rank == 0 else [x[4:]])
    found["eva"] = {site.name: site.variant.r for site in chart.sites}
    found["tensors"] = model.state_dict()
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_ranks_add_up_what_they_see(tmp_path):
    """And refuse together, lest one waits for the other."""
    mp.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="spawn")
    load = lambda rank: torch.load(tmp_path / f"{rank}.pt", weights_only=False)
    first, second = load(0), load(1)
    torch.manual_seed(0)
    model, x = Fan(), torch.randn(9, 6)
    for found in (first, second):
        assert_moments(found["stats"]["q"], x)
        assert found["none"] == "moments_test: q saw no calibration token"
        assert found["nan"] == "moments_test: q saw NaN or infinite activations"
    for name in "qkvo":
        for a, b in zip(first["stats"][name].mean, second["stats"][name].mean):
            assert torch.equal(a, b)
    chart = ll.attach(model, "eva", r=2, seed=0, calibration=[x])
    assert first["eva"] == second["eva"] == {site.name: site.variant.r for site in chart.sites}
    assert all(torch.equal(second["tensors"][key], t) for key, t in first["tensors"].items())
