"""What a file holds, and what is refused of it."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from jaxtyping import Float
from models import IDS, MLP, llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from settings import LINEAR

import lora_lite as ll
from lora_lite.attach import tensor_dtype
from lora_lite.testing import calibration_for, move, snapshot, unchanged
from lora_lite.variant import configure


def saved(path, variant="lora", seed=0, **hyperparameters):
    """A model with a moved adapter, saved at path."""
    torch.manual_seed(1)
    model = MLP()
    ll.attach(model, variant, seed=seed, **hyperparameters)
    move(model)
    ll.save(model, path)
    return model


def fresh():
    torch.manual_seed(1)
    return MLP()


def header(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["lora-lite"])


def rewrite(path, tensors=None, **changes):
    """The file again with other tensors or header entries."""
    meta = header(path) | changes
    save_file(tensors or load_file(path), path, metadata={"lora-lite": json.dumps(meta)})


def test_the_header_is_the_configuration_and_the_targets(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, r=4, overrides={"down": dict(r=2)})
    meta = header(path)
    assert (meta["format_version"], meta["variant"], meta["name"]) == (1, "lora", "default")
    assert [t["name"] for t in meta["targets"]] == ["block.up", "block.down"]
    assert meta["hyperparameters"]["r"] == 4
    assert [t.get("hyperparameters") for t in meta["targets"]] == [None, dict(r=2)]
    assert set(load_file(path)) == {f"block.{x}.{t}" for x in ("up", "down") for t in "AB"}


def test_a_llama_loads_with_identical_logits(tmp_path):
    model = llama()
    ll.attach(model, variant="jora", k=4)
    move(model)
    ll.save(model, tmp_path / "a.safetensors")
    other = llama()
    chart = ll.load(other, tmp_path / "a.safetensors")
    assert torch.equal(other(IDS).logits, model(IDS).logits) and len(chart.sites) == 14


def test_wrappers_never_reach_a_file_and_do_not_hinder_loading(tmp_path):
    path = tmp_path / "a.safetensors"

    class Wrapper(torch.nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    model = fresh()
    wrapped = torch.compile(Wrapper(model))
    ll.attach(wrapped, "lora")
    ll.save(wrapped, path)
    assert all(key.startswith("block.") for key in load_file(path))
    ll.load(fresh(), path)
    plain = tmp_path / "b.safetensors"
    saved(plain)
    other = torch.compile(Wrapper(fresh()))
    ll.load(other, plain)
    assert len(ll.delta_weights(other)) == 2


def test_frozen_tensors_that_can_be_made_again_are_checksummed_not_stored(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path, "dora")
    assert not any("m0" in key for key in load_file(path))
    assert set(header(path)["rebuilt"]) == {"block.up.m0", "block.down.m0"}
    other = fresh()
    other.block["up"].weight.data[1] *= 2
    with pytest.raises(ValueError, match="block.up has other weights|m0, made again"):
        ll.load(other, path)
    ll.load(other, path, force=True)


class Random(ll.Variant):
    """y = W x + s (P x), P frozen random, remade from the seed."""

    s: Float[torch.Tensor, "d_out"] = ll.ParamSpec(lambda shape, g: torch.zeros(shape))
    P: Float[torch.Tensor, "d_out d_in"] = ll.ParamSpec(
        lambda shape, g: torch.randn(shape, generator=g), trainable=False, saved=False
    )

    def forward(self, x, W, s, P):
        return W(x) + s * (x @ P.T)


def test_a_seed_remakes_random_tensors_and_another_seed_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    model, x = saved(path, Random, seed=11), torch.randn(2, 24)
    assert set(load_file(path)) == {"block.up.s", "block.down.s"}
    other = fresh()
    ll.load(other, path)
    assert torch.equal(other(x), model(x))
    rewrite(path, seed=12)
    with pytest.raises(ValueError, match="block.up.P, made again, is not what it was"):
        ll.load(fresh(), path)


class Shared(ll.Variant):
    """y = W x + c (u · x): u one tensor for all layers of one width."""

    u: Float[torch.Tensor, "24"] = ll.ParamSpec(lambda shape, g: torch.ones(shape), shared=True)
    c: Float[torch.Tensor, "d_out"] = ll.ParamSpec(lambda shape, g: torch.zeros(shape))

    def forward(self, x, W, u, c):
        return W(x) + c * (x[..., :24] @ u)[..., None]


def test_shared_tensors_are_one_and_stored_once(tmp_path):
    path = tmp_path / "a.safetensors"
    model, x = saved(path, Shared), torch.randn(2, 24)
    up, down = (model.block[k].adapters.default for k in ("up", "down"))
    assert up.tensors()["u"] is down.tensors()["u"] is model.lora_lite["default"].u
    assert set(load_file(path)) == {"shared.u", "block.up.c", "block.down.c"}
    assert ll.plan(fresh(), Shared).trainable == 24 + 40 + 24
    other = fresh()
    ll.load(other, path)
    assert torch.equal(other(x), model(x))
    assert sum(p.numel() for g in ll.param_groups(other, lr=1.0) for p in g["params"]) == 88
    ll.detach(other)
    assert list(other.state_dict()) == list(fresh().state_dict())


def test_a_bare_container_has_no_place_for_shared_tensors():
    with pytest.raises(ValueError, match="a bare Sequential would take them for a layer"):
        ll.attach(torch.nn.Sequential(torch.nn.Linear(24, 4)), Shared)


class Tower(torch.nn.Module):
    """Layers of a width at which headers no longer dwarf vectors."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(1024, 1024) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("variant", LINEAR)
def test_a_file_is_little_more_than_what_trains_and_what_nothing_makes_again(variant, tmp_path):
    model, configured = Tower(), configure(variant)
    batches = calibration_for(configured, [torch.randn(64, 1024)])
    chart = ll.attach(model, configured, calibration=batches)
    ll.save(model, tmp_path / "a.safetensors")
    needed = sum(
        torch.Size(shape).numel() * tensor_dtype(site.variant, key, torch.float32).itemsize
        for site in chart.sites
        for key, shape in site.shapes.items()
        if site.variant.specs[key].trainable or site.variant.specs[key].saved
    )
    assert 4 * chart.trainable <= needed
    assert needed < (tmp_path / "a.safetensors").stat().st_size <= 1.1 * needed


def test_another_base_is_refused_unless_forced(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path)
    torch.manual_seed(2)
    other = MLP()
    before = snapshot(other)
    with pytest.raises(ValueError, match="block.up has other weights than the base.*force=True"):
        ll.load(other, path)
    unchanged(other, before)
    ll.load(other, path, force=True)


def test_the_base_is_known_again_in_another_dtype(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path)
    ll.load(fresh().to(torch.bfloat16), path)


def test_loading_into_an_adapter_keeps_its_tensors_and_refuses_another_kind(tmp_path):
    path = tmp_path / "a.safetensors"
    model, x = saved(path), torch.randn(2, 24)
    y, A = model(x), model.block["up"].adapters.default.A
    move(model, seed=9)
    ll.load(model, path)
    assert torch.equal(model(x), y) and model.block["up"].adapters.default.A is A
    ll.detach(model)
    ll.attach(model, "lora", r=4)
    with pytest.raises(ValueError, match="'default' has LoRA.r=4.* at block.down, and"):
        ll.load(model, path)
    ll.load(model, path, name="second")
    with pytest.raises(ValueError, match="has the adapters default, second; say which"):
        ll.save(model, path)
    ll.save(model, path, name="second")
    assert header(path)["name"] == "second"


def truncated(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def swapped(path):
    t = load_file(path)
    t["block.up.A"], t["block.down.B"] = t["block.up.A"].flip(0).contiguous(), t["block.down.B"]
    rewrite(path, t)


def not_finite(path):
    t = load_file(path)
    t["block.up.A"][0, 0] = float("inf")
    rewrite(path, t)


def honest(path, tensors):
    """Other tensors with a digest to match, as another program might write them."""
    from lora_lite.checkpoint import digest

    rewrite(path, tensors, digest=digest(tensors))


def another_shape(path):
    t = load_file(path)
    honest(path, t | {"block.up.A": torch.zeros(3, 24)})


def another_kind(path):
    t = load_file(path)
    honest(path, t | {"block.up.A": torch.zeros(8, 24, dtype=torch.int64)})


def missing(path):
    t = load_file(path)
    honest(path, {k: v for k, v in t.items() if k != "block.up.A"})


def unexpected(path):
    honest(path, load_file(path) | {"block.up.C": torch.zeros(1)})


def other_layer(path):
    targets = header(path)["targets"]
    targets[0]["name"] = "block.upp"
    rewrite(path, targets=targets)


def other_width(path):
    targets = header(path)["targets"]
    targets[0]["d_in"] = 32
    rewrite(path, targets=targets)


FAULTS = [
    (truncated, ValueError, "damaged or no safetensors file"),
    (lambda p: p.write_bytes(b"PK\x03\x04 a pickle"), ValueError, "damaged or no safetensors"),
    (lambda p: save_file({"a": torch.zeros(1)}, p), ValueError, "no checkpoint of this library"),
    (lambda p: rewrite(p, format_version=2), ValueError, "format version 2, .* reads 1"),
    (lambda p: rewrite(p, variant="lorax"), KeyError, "no variant 'lorax'; did you mean"),
    (swapped, ValueError, "tensors changed or swapped names"),
    (not_finite, ValueError, "block.up.A has NaN or infinite"),
    (another_shape, ValueError, r"block.up.A is .*\(3, 24\), and should be .*\(8, 24\)"),
    (another_kind, ValueError, "block.up.A is torch.int64"),
    (missing, ValueError, "block.up.A is missing"),
    (unexpected, ValueError, "block.up.C is no tensor of the adapter"),
    (other_layer, ValueError, "the model has no layer 'block.upp'; did you mean .*'block.up'"),
    (other_width, ValueError, "block.up is 40×24, and the adapter was made for 40×32"),
    (lambda p: p.unlink(), FileNotFoundError, "no such file"),
]  # fmt: skip


@pytest.mark.parametrize("fault, error, message", FAULTS, ids=[row[-1] for row in FAULTS])
def test_a_faulty_file_is_refused_and_changes_nothing(tmp_path, fault, error, message):
    path = tmp_path / "a.safetensors"
    saved(path)
    fault(path)
    model = fresh()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        ll.load(model, path)
    unchanged(model, before)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    model = saved(path)
    old = path.read_bytes()
    move(model)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        ll.save(model, path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["a.safetensors"]


def test_a_killed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    saved(path)
    old = path.read_bytes()
    script = """
        import os, signal, sys, torch, lora_lite as ll, lora_lite.checkpoint as c
        layer = torch.nn.Linear(8, 8)
        ll.attach(layer, "lora")
        written = c.save_file
        def killed(tensors, file, metadata):
            written(tensors, file, metadata)
            os.kill(os.getpid(), signal.SIGKILL)
        c.save_file = killed
        ll.save(layer, sys.argv[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], timeout=120)
    assert done.returncode == -signal.SIGKILL and path.read_bytes() == old


def test_an_adapter_on_the_meta_device_takes_shape_without_weights():
    model = MLP().to("meta")
    chart = ll.attach(model, "pissa", r=4)
    assert chart.trainable == 2 * 4 * 64
    assert model.block["up"].adapters.default.A.is_meta
    assert model(torch.empty(2, 24, device="meta")).shape == (2, 5)
