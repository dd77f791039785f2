"""VeRA (arXiv:2310.11454 §3.1 eq. 2, §3.3) against W' = W + Λ_b B Λ_d A, and PEFT's one pair."""

import json
import os

import peft
import pytest
import torch
from peft_reference import assert_agree, both, scatter
from reference import (
    TOLERANCE,
    adapted,
    assert_close,
    assert_follows,
    assert_starts_as_identity,
    first_gradients,
    in_dtypes,
    inputs,
    linear,
    on_layers,
    rank,
    settings,
    tensors,
    updated_weight,
    with_and_without_bias,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import lora_lite as ll
from lora_lite.checkpoint import digest
from lora_lite.testing import move, snapshot, unchanged

LAWS = {"vera": [dict(r=16), dict(r=3, d_init=0.5, projection_seed=7)]}
KEPT = {"vera": (dict(r=8), 8)}

TRAINED = {"lam_d", "lam_b"}


def dense(W, A, B, lam_d, lam_b):
    """Eq. 2; of a pair that is too large the first rows and columns."""
    d_out, d_in = W.shape
    return W + torch.diag(lam_b) @ B[:d_out] @ torch.diag(lam_d) @ A[:, :d_in]


@on_layers
@in_dtypes
@settings(
    default=dict(),
    small=dict(r=3, d_init=0.5, projection_seed=7),
    one=dict(r=1),
    negative=dict(r=8, d_init=-1.0),
)
def test_matches_eq_2(d_in, d_out, bias, dtype, hyper):
    model = adapted("vera", d_in, d_out, bias, dtype=dtype, **hyper)
    assert_follows(model, dense, TRAINED, TOLERANCE[dtype])


class Net(nn.Module):
    """Two shapes, of which neither is the widest both ways, and a third within both."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = linear(24, 40), linear(40, 16, False), linear(16, 24)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


LAYERS = ["a", "b", "c"]


def attach(targets=LAYERS, dtype=torch.float64, moved=0.5, **hyper):
    """A Net under VeRA, its vectors moved by noise, and the tensors of each layer."""
    model = Net().to(dtype)
    ll.attach(model, "vera", targets, dtype=dtype, **{"r": 6, **hyper})
    if moved:
        move(model, scale=moved)
    return model, own_of(model, targets)


def own_of(model, layers=LAYERS):
    return {n: model.get_submodule(n).adapters["default"].tensors() for n in layers}


@in_dtypes
def test_layers_of_several_shapes_take_their_part_of_one_pair(dtype):
    model, own = attach(dtype=dtype)
    for n in LAYERS:
        assert own[n]["A"].shape == (6, 40) and own[n]["B"].shape == (40, 6)
        assert_follows(model.get_submodule(n), dense, TRAINED, TOLERANCE[dtype])


def test_the_pair_is_one_for_all_layers_and_never_trains():
    model, own = attach()
    before = {key: own["a"][key].clone() for key in "AB"}
    for key in "AB":
        assert len({id(own[n][key]) for n in LAYERS}) == 1
        assert not own["a"][key].requires_grad
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=0.1, weight_decay=0.5))
    moving = {n: own[n]["lam_b"].detach().clone() for n in LAYERS}
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs(24)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(own["a"][key], before[key]) for key in "AB")
    assert not any(torch.equal(own[n]["lam_b"], moving[n]) for n in LAYERS)
    # Neither is copied for a layer, nor cut out: a layer reads the first rows or columns in place.
    layer = model.c.adapters["default"]
    A = layer.variant.prepare(model.c.kinds["default"](model.c), **own["c"])["A"]
    assert A.shape == (6, 16) and A.data_ptr() == own["a"]["A"].data_ptr()


def test_no_float32_factor_is_kept_for_backward():
    """The vectors are multiplied before they meet B, which is frozen and so needs none of it."""
    model = linear(dtype=torch.bfloat16)
    ll.attach(model, "vera", r=8)
    own = {t.untyped_storage().data_ptr() for t in tensors(model).values()}
    wide = []

    def note(t):
        if t.dtype == torch.float32 and t.untyped_storage().data_ptr() not in own:
            wide.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(inputs(24, torch.bfloat16).requires_grad_())
    assert not wide, wide


def drawn(r, D_in, D_out, seed):
    """A, then B, from one generator: U(±√(6/fan_in)), the fan of B being r."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.empty(r, D_in).uniform_(-((6 / D_in) ** 0.5), (6 / D_in) ** 0.5, generator=generator)
    B = torch.empty(D_out, r).uniform_(-((6 / r) ** 0.5), (6 / r) ** 0.5, generator=generator)
    return dict(A=A, B=B)


@pytest.mark.parametrize("projection_seed", [0, 7])
def test_the_pair_comes_of_its_seed_alone(projection_seed):
    """Neither of the attach's seed nor of torch's generator; A before B."""
    for seed in (0, 1, None):
        torch.manual_seed(17 if seed is None else 18)
        _, own = attach(dtype=torch.float32, seed=seed, projection_seed=projection_seed)
        for key, want in drawn(6, 40, 40, projection_seed).items():
            assert torch.equal(own["b"][key], want), key


def test_he_initialisation():
    own = tensors(adapted("vera", 400, 300, moved=0, r=200))
    for key, fan_in in dict(A=400, B=200).items():
        assert own[key].abs().max() <= (6 / fan_in) ** 0.5
        assert_close(own[key].std(), torch.tensor((2 / fan_in) ** 0.5, dtype=torch.float64), 0.01)
        assert abs(own[key].mean()) < 0.01 * (2 / fan_in) ** 0.5
    assert torch.equal(own["lam_d"], torch.full((200,), 0.1).double())
    assert not own["lam_b"].any()


def test_the_pair_depends_on_the_targets():
    """By its shape and by the bound, which is of the widest layer."""
    _, alone = attach(["c"], dtype=torch.float32)
    _, together = attach(dtype=torch.float32)
    assert alone["c"]["A"].shape == (6, 16) and alone["c"]["B"].shape == (24, 6)
    assert not torch.equal(alone["c"]["A"], together["c"]["A"][:, :16])


@with_and_without_bias
def test_starts_as_identity(bias):
    assert_starts_as_identity("vera", bias, r=8)


def test_first_step_moves_lam_b_alone():
    grads = first_gradients("vera", r=8)
    assert not grads["lam_d"].any()
    assert grads["lam_b"].abs().min() > 0


def test_shapes_and_parameter_count():
    chart = ll.plan(Net(), "vera", LAYERS, r=6)
    lam = {"a": 40, "b": 16, "c": 24}
    for site in chart.sites:
        own = dict(lam_d=(6,), lam_b=(lam[site.name],))
        assert site.shapes == dict(A=(6, 40), B=(40, 6)) | own
    # §3.2: L (d_model + r), the pair not counted.
    assert chart.trainable == sum(d_out + 6 for d_out in lam.values())
    assert chart.frozen == 2 * 6 * 40
    assert chart.bytes == 4 * (chart.trainable + chart.frozen)


@on_layers
def test_the_update_is_bilinear(d_in, d_out, bias):
    model = adapted("vera", d_in, d_out, bias, r=8)
    own, before = tensors(model), updated_weight(model)
    with torch.no_grad():
        own["lam_b"].mul_(-4)
        own["lam_d"].div_(-4)
    assert_close(updated_weight(model), before)
    with torch.no_grad():
        own["lam_d"].mul_(3)
    assert_close(updated_weight(model) - model.weight, 3 * (before - model.weight))


def test_vectors_switch_rows_and_triplets_off():
    """§3.1: "effectively scale and disable rows and columns of both A and B"."""
    model = adapted("vera", r=5)
    own = tensors(model)
    with torch.no_grad():
        own["lam_d"][[1, 3]] = 0
        own["lam_b"][7:] = 0
    change = updated_weight(model) - model.weight
    assert rank(change) == 3
    # Rows are probed, and the layer's own rounding is in them.
    assert change[7:].abs().max() < 1e-14 and change[:7].norm(dim=1).min() > 0.01
    assert rank(updated_weight(adapted("vera", r=100)) - linear().weight) == 24


@in_dtypes
@settings(narrow=dict(r=5), wide=dict(r=100, d_init=0.3, projection_seed=3))
@on_layers
def test_a_layer_agrees_with_pefts(d_in, d_out, bias, dtype, hyper):
    """The pair is not copied over: both draw it."""
    config = peft.VeraConfig(
        r=hyper["r"],
        d_initial=hyper.get("d_init", 0.1),
        projection_prng_key=hyper.get("projection_seed", 0),
    )
    layer, other = both("vera", config, d_in, d_out, bias, dtype, **hyper)
    pairs = dict(lam_d=other.vera_lambda_d["default"], lam_b=other.vera_lambda_b["default"])
    for key, p in pairs.items():
        assert torch.equal(tensors(layer)[key], p), f"{key} starts otherwise"
    scatter(pairs)
    assert_agree(layer, other, pairs)


@pytest.mark.parametrize("projection_seed", [0, 5])
@pytest.mark.parametrize("targets", [["a", "b", "c"], ["b", "c"], ["c"]], ids="".join)
def test_the_pair_is_pefts_bit_for_bit(targets, projection_seed):
    config = peft.VeraConfig(r=6, projection_prng_key=projection_seed, target_modules=targets)
    other = peft.get_peft_model(Net().float(), config)
    model, own = attach(targets, torch.float32, projection_seed=projection_seed)
    assert torch.equal(own[targets[0]]["A"], other.base_model.vera_A["default"])
    assert torch.equal(own[targets[0]]["B"], other.base_model.vera_B["default"])
    for n in targets:
        theirs = other.base_model.model.get_submodule(n)
        theirs.vera_lambda_d["default"].data.copy_(own[n]["lam_d"])
        theirs.vera_lambda_b["default"].data.copy_(own[n]["lam_b"])
    x = inputs(24, torch.float32)
    assert_close(model(x), other(x), TOLERANCE[torch.float32])


def test_adapters_of_other_seeds_and_ranks_have_pairs_of_their_own():
    """PEFT refuses them."""
    model, own = attach()
    before = model(inputs(24))
    ll.attach(model, "vera", LAYERS, name="second", r=9, projection_seed=1, dtype=torch.float64)
    assert torch.equal(model(inputs(24)), before)
    second = model.a.adapters["second"].tensors()
    assert second["A"].shape == (9, 40) and own["a"]["A"].shape == (6, 40)
    ll.detach(model, "default")
    assert torch.equal(model(inputs(24)), Net()(inputs(24)))
    assert list(model.lora_lite) == ["second"]


def test_dropout_acts_on_the_branch_alone_and_in_training_alone():
    model = adapted("vera", r=8, dropout=0.75)
    x = torch.eye(24, dtype=torch.float64).repeat(20, 1)
    z = x @ model.weight.T + model.bias
    branch = model.eval()(x) - z
    assert_close(branch, adapted("vera", r=8)(x) - z)
    ratio = (model.train()(x) - z).norm(dim=1) / branch.norm(dim=1)
    kept = ratio > 2
    assert_close(ratio, 4 * kept.double())
    assert 0.15 < kept.double().mean() < 0.35


# What a file holds.


def saved(path, **hyper):
    model, _ = attach(dtype=torch.float32, seed=0, **hyper)
    ll.save(model, path)
    return model


def header(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["lora-lite"])


def rewrite(path, keep=lambda key: True, **changes):
    """The file again, whole in itself, with other header entries and some of its tensors."""
    left = {key: t for key, t in load_file(path).items() if keep(key)}
    meta = header(path) | {"digest": digest(left)} | changes
    save_file(left, path, metadata={"lora-lite": json.dumps(meta)})


def test_a_file_holds_the_seed_and_a_checksum_and_not_the_pair(tmp_path):
    path = tmp_path / "x.safetensors"
    model = saved(path, projection_seed=3)
    assert set(load_file(path)) == {f"{n}.{key}" for n in LAYERS for key in TRAINED}
    assert header(path)["hyperparameters"]["projection_seed"] == 3
    assert set(header(path)["rebuilt"]) == {"shared.A", "shared.B"}
    fresh = Net().float()
    ll.load(fresh, path)
    x = inputs(24, torch.float32)
    assert torch.equal(fresh(x), model(x))
    for key, want in drawn(6, 40, 40, 3).items():
        assert torch.equal(own_of(fresh)["a"][key], want)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_pair_of_another_precision_is_made_again(dtype, tmp_path):
    model = Net().to(dtype)
    ll.attach(model, "vera", LAYERS, r=6, dtype=dtype)
    move(model, scale=0.5)
    ll.save(model, tmp_path / "x.safetensors")
    fresh = Net().to(dtype)
    ll.load(fresh, tmp_path / "x.safetensors")
    assert own_of(fresh)["a"]["A"].dtype == dtype
    assert torch.equal(fresh(inputs(24, dtype)), model(inputs(24, dtype)))


def without_the_widest(path):
    """As if the adapter had been made for b and c alone."""
    targets = [target for target in header(path)["targets"] if target["name"] != "a"]
    rewrite(path, lambda key: not key.startswith("a."), targets=targets)


def without_the_widest_input(path):
    targets = [target for target in header(path)["targets"] if target["name"] != "b"]
    rewrite(path, lambda key: not key.startswith("b."), targets=targets)


def of_another_seed(path):
    rewrite(path, hyperparameters=header(path)["hyperparameters"] | dict(projection_seed=1))


@pytest.mark.parametrize(
    "fault, named",
    [
        (of_another_seed, "A"),
        (without_the_widest_input, "A"),
        # The widest input stays, and with it A.
        (without_the_widest, "B"),
    ],
    ids=["seed", "inputs", "outputs"],
)
def test_another_pair_than_was_trained_with_is_refused_unless_forced(tmp_path, fault, named):
    path = tmp_path / "x.safetensors"
    saved(path)
    fault(path)
    fresh = Net().float()
    before = snapshot(fresh)
    with pytest.raises(ValueError, match=f"shared.{named}, made again, is not what it was"):
        ll.load(fresh, path)
    unchanged(fresh, before)
    ll.load(fresh, path, force=True)
    left = [target["name"] for target in header(path)["targets"]]
    D_in, D_out = (max(t[key] for t in header(path)["targets"]) for key in ("d_in", "d_out"))
    seed = header(path)["hyperparameters"]["projection_seed"]
    for key, want in drawn(6, D_in, D_out, seed).items():
        assert torch.equal(own_of(fresh, left)[left[0]][key], want)
    assert torch.equal(own_of(fresh, left)[left[0]]["lam_d"], load_file(path)[f"{left[0]}.lam_d"])


def test_loading_over_an_adapter_for_other_targets_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    saved(path)
    other, own = attach(["b", "c"], torch.float32)
    kept = own["b"]["A"].clone()
    with pytest.raises(ValueError, match="'default' has nothing at a, and the file has VeRA"):
        ll.load(other, path)
    assert torch.equal(own["b"]["A"], kept)


def test_a_file_is_hardly_larger_than_its_trained_numbers(tmp_path):
    """Six layers of 1024 at the default r: 30 720 bytes of vectors, under 2 000 of header."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(1024, 1024, bias=False) for _ in range(6))
    chart = ll.attach(model, "vera")
    ll.save(model, tmp_path / "x.safetensors")
    size, trained = os.path.getsize(tmp_path / "x.safetensors"), 4 * chart.trainable
    assert trained == 6 * (1024 + 256) * 4
    assert trained < size <= 1.1 * trained and size - trained < 2000


@settings(
    no_rank=(dict(r=0), "r=0 must be ≥ 1"),
    dead=(dict(d_init=0.0), "d_init=0 leaves neither vector a gradient"),
    dropout=(dict(dropout=1.0), r"dropout=1.0 must be in \[0, 1\)"),
    infinite=(dict(d_init=float("inf")), "d_init=inf must be finite"),
    ranks=(dict(overrides={"b": dict(r=7)}), "b and a share A, and overrides give them other"),
    seeds=(dict(overrides={"c": dict(projection_seed=1)}), "c and a share A, and overrides"),
)
def test_what_cannot_work_is_refused(hyper):
    hyper, match = hyper
    model = Net()
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"^vera: .*{match}"):
        ll.attach(model, "vera", LAYERS, **{"r": 6, **hyper})
    unchanged(model, before)


def test_layers_may_start_apart():
    """What is a layer's own may be overridden."""
    _, own = attach(moved=0, overrides={"b": dict(d_init=0.7)})
    starts = [own[n]["lam_d"][0].item() for n in LAYERS]
    assert starts == pytest.approx([0.1, 0.7, 0.1], rel=1e-6)
    assert own["a"]["A"] is own["b"]["A"]
