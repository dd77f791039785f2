"""EVA (arXiv:2410.07170 §3): LoRA's W' = W + s B A, A from a float64 SVD of all centred tokens, and
PEFT's ranks and components."""

import math

import peft
import pytest
import torch
from models import llama
from peft.tuners.lora.eva import initialize_lora_eva_weights
from reference import (
    TOLERANCE,
    adapted,
    assert_close,
    assert_follows,
    in_dtypes,
    inputs,
    linear,
    on_layers,
    settings,
    tensors,
    with_and_without_bias,
)
from torch import nn

import lora_lite as ll
from lora_lite.ops import svd
from lora_lite.testing import move, snapshot, unchanged
from lora_lite.variants.eva import EVA

LAWS = {"eva": [dict(r=4), dict(r=2, rho=1.0, whiten=True, center=False)]}
KEPT = {"eva": (dict(r=8, rho=1.0), 96 + 8)}


def activations(d, tokens=120, seed=0, mean=1.0, decay=0.5):
    """Tokens about a mean, with deviations along skew directions that fall as k^−decay."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(draw(d, d)).Q
    scale = torch.arange(1, d + 1).double() ** -decay
    return (draw(tokens, d) * scale) @ directions + mean * draw(d)


def principal(x, center=True):
    """σ and Vᵀ of all tokens at once."""
    x = x.double()
    _, S, Vh = torch.linalg.svd(x - x.mean(0) if center else x, full_matrices=False)
    return S, Vh


def attached(x, d_out=40, dtype=torch.float64, **hyper):
    """A of one layer, after calibration on x: a tensor, or a list of batches."""
    batches = x if isinstance(x, list) else [x]
    layer = linear(batches[0].shape[-1], d_out, dtype=dtype)
    hyper = dict(r=6, rho=1.0) | hyper
    calibration = [batch.to(dtype) for batch in batches]
    ll.attach(layer, "eva", dtype=dtype, seed=0, calibration=calibration, **hyper)
    return tensors(layer)["A"].detach()


def assert_same_rows(got, want, tolerance=1e-10):
    """But for each row's sign."""
    sign = (got.double() * want.double()).sum(1).sign()
    assert_close(got.double() * sign[:, None], want.double(), tolerance, "A")


# The update.


@on_layers
@in_dtypes
@settings(
    default=dict(s=16 / 8),
    odd=dict(s=-7 / 3, r=3, alpha=-7.0),
    rslora=dict(s=5 / 2, r=4, alpha=5.0, rslora=True),
    whitened=dict(s=16 / 4, r=4, whiten=True),
)
def test_matches_loras_eq_3(d_in, d_out, bias, dtype, hyper):
    hyper = dict(hyper)
    s = hyper.pop("s")
    x = activations(d_in).to(dtype)
    model = adapted("eva", d_in, d_out, bias, dtype=dtype, calibration=[x], **hyper)
    assert_follows(model, lambda W, A, B: W + s * B @ A, {"A", "B"}, TOLERANCE[dtype])


@with_and_without_bias
def test_starts_as_identity(bias):
    for d_in, d_out in ((24, 40), (40, 24)):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            for own in {dtype, torch.float32}:
                model, x = linear(d_in, d_out, bias, dtype=dtype), inputs(d_in, dtype)
                want = model(x)
                ll.attach(model, "eva", dtype=own, calibration=[activations(d_in).to(dtype)])
                assert torch.equal(model(x), want), f"{dtype} with {own} tensors"


def test_first_step_moves_B_alone():
    model = adapted("eva", moved=0, calibration=[activations(24)])
    model(inputs(24)).square().sum().backward()
    assert not tensors(model)["A"].grad.any()
    assert tensors(model)["B"].grad.abs().min() > 0


def test_shapes_and_parameter_count():
    model = linear(24, 40)
    assert ll.plan(model, "eva", r=5).sites[0].shapes == {"A": (5, 24), "B": (40, 5)}
    chart = ll.attach(model, "eva", r=5, calibration=[activations(24)])
    assert chart.sites[0].shapes == {"A": (5, 24), "B": (40, 5)}
    assert chart.trainable == 5 * (24 + 40)


def test_a_plan_needs_no_calibration_and_has_uniform_ranks():
    model = Net()
    before = snapshot(model)
    chart = ll.plan(model, "eva", r=4)
    assert [site.variant.r for site in chart.sites] == [4, 4, 4] and not chart.left_out
    unchanged(model, before)


# A.


@pytest.mark.parametrize("d_in", [24, 40])
@pytest.mark.parametrize("center", [True, False])
@in_dtypes
def test_A_is_the_leading_components_of_all_tokens(d_in, center, dtype):
    x = activations(d_in)
    A = attached(x, dtype=dtype, center=center)
    assert_same_rows(A, principal(x.to(dtype), center)[1][:6], TOLERANCE[dtype])
    eps = torch.finfo(dtype).eps
    assert (A.double() @ A.double().T - torch.eye(6)).abs().max() < 50 * eps


def test_centred_components_are_not_the_raw_ones():
    """Without centring the first is the mean's direction."""
    x = activations(24, mean=3.0)
    mean = x.mean(0) / x.mean(0).norm()
    raw, centred = attached(x, center=False), attached(x)
    assert abs(raw[0] @ mean) > 0.99 > 0.5 > abs(centred[0] @ mean)


@pytest.mark.parametrize("mean", [10.0, 1e3, 1e4])
def test_a_large_mean_costs_no_digits(mean):
    """float32 sums of x xᵀ would lose the components from about 100 deviations on."""
    x = activations(24, tokens=400, mean=mean).float()
    A = attached(list(x.split(50)), dtype=torch.float32)
    assert_same_rows(A, principal(x)[1][:6], 1e-5)


@settings(
    one_by_one=[1] * 120,
    uneven=[1, 50, 2, 0, 67],
    whole=[120],
)
def test_neither_batches_nor_order_matter(hyper):
    x = activations(24)
    want = attached(x)
    assert_same_rows(attached(list(x.split(hyper))), want, 1e-9)
    mixed = x[torch.randperm(120, generator=torch.Generator().manual_seed(2))]
    assert_same_rows(attached(list(mixed.split(hyper))), want, 1e-9)
    assert_same_rows(attached([x.view(2, 3, 20, 24)]), want, 1e-9)


def test_rotated_inputs_rotate_A():
    x = activations(24)
    generator = torch.Generator().manual_seed(5)
    Q = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64)).Q
    assert_same_rows(attached(x @ Q.T), attached(x) @ Q.T, 1e-9)


@in_dtypes
def test_whitening_divides_by_the_root_of_sigma(dtype):
    """σ of the tokens' matrix itself, as PEFT has it: not of their covariance."""
    x = activations(24)
    S, Vh = principal(x.to(dtype))
    A = attached(x, dtype=dtype, whiten=True)
    assert_same_rows(A, Vh[:6] / S[:6, None].sqrt(), TOLERANCE[dtype])


def test_a_bfloat16_model_is_calibrated_in_float32():
    x = activations(24).bfloat16()
    A = attached(x, dtype=torch.bfloat16)
    layer = linear(dtype=torch.bfloat16)
    ll.attach(layer, "eva", r=6, rho=1.0, calibration=[x])
    own = tensors(layer)["A"].detach()
    assert own.dtype == torch.float32 and torch.equal(own.bfloat16(), A)
    assert_same_rows(own, principal(x)[1][:6], 1e-5)


def test_autocast_does_not_narrow_the_sums():
    x = activations(24)
    with torch.autocast("cpu", torch.bfloat16):
        A = attached(x, dtype=torch.float32)
    assert torch.equal(A, attached(x, dtype=torch.float32))


# Which tokens count.


class Masked(nn.Module):
    """Takes a batch as language models do; its layer sees tokens as they are, or flattened."""

    def __init__(self, flat=False):
        super().__init__()
        self.layer, self.flat = linear(24, 40), flat

    def forward(self, x, attention_mask=None, labels=None):
        return self.layer(x.flatten(0, 1) if self.flat else x)


def seen_by(batch, flat=False, **hyper):
    model = Masked(flat)
    hyper = dict(r=6, rho=1.0) | hyper
    ll.attach(model, "eva", dtype=torch.float64, calibration=[batch], **hyper)
    return model.layer.adapters["default"].A.detach()


def loud(x, where):
    """Elsewhere all is noise so loud that it would own every component."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return torch.where(where[..., None], x, 1000 * noise)


X = activations(24).view(4, 30, 24)
REAL = torch.ones(4, 30, dtype=torch.long)
REAL[0, 20:], REAL[1, :5], REAL[3, 11:] = 0, 0, 0
ANSWER = torch.zeros(4, 30, dtype=torch.bool)
ANSWER[:, 8:] = True
LABELS = torch.where(ANSWER, 7, -100)


@pytest.mark.parametrize("flat", [False, True], ids=["tokens", "flat"])
@pytest.mark.parametrize("kind", [torch.long, torch.bool, torch.float32], ids=str)
def test_padding_never_counts(flat, kind):
    real = REAL.bool()
    batch = dict(x=loud(X, real), attention_mask=REAL.to(kind))
    assert_same_rows(seen_by(batch, flat), principal(X[real])[1][:6])


@pytest.mark.parametrize("flat", [False, True], ids=["tokens", "flat"])
def test_prompts_never_count(flat):
    both = ANSWER & REAL.bool()
    batch = dict(x=loud(X, both), attention_mask=REAL, labels=LABELS)
    assert_same_rows(seen_by(batch, flat), principal(X[both])[1][:6])
    batch = dict(x=loud(X, ANSWER), labels=LABELS)
    assert_same_rows(seen_by(batch, flat), principal(X[ANSWER])[1][:6])
    batch = dict(x=loud(X, ANSWER), labels=torch.where(ANSWER, 7, -1))
    assert_same_rows(seen_by(batch, label_mask_value=-1), principal(X[ANSWER])[1][:6])


def test_prompts_count_when_told_to():
    real = REAL.bool()
    batch = dict(x=loud(X, real), attention_mask=REAL, labels=LABELS)
    assert_same_rows(seen_by(batch, use_label_mask=False), principal(X[real])[1][:6])
    batch = dict(x=X, labels=LABELS)
    assert_same_rows(seen_by(batch, use_label_mask=False), principal(X.flatten(0, 1))[1][:6])


@pytest.mark.parametrize("tokens", [4, 30])
def test_labels_of_whole_examples_say_nothing_of_tokens(tokens):
    """Also where there are as many examples as tokens."""
    x, real = X[:, :tokens], REAL[:, :tokens].bool()
    labels = torch.tensor([-100, 1, 2, 0])
    batch = dict(x=loud(x, real), attention_mask=real, labels=labels)
    assert_same_rows(seen_by(batch, r=3), principal(x[real])[1][:3])


def test_a_batch_without_an_answer_adds_nothing():
    batches = [
        dict(x=X, attention_mask=REAL, labels=LABELS),
        dict(x=X, labels=torch.full_like(LABELS, -100)),
    ]
    for order in (batches, batches[::-1]):
        model = Masked()
        ll.attach(model, "eva", r=6, rho=1.0, dtype=torch.float64, calibration=order)
        A = model.layer.adapters["default"].A.detach()
        assert_same_rows(A, principal(X[ANSWER & REAL.bool()])[1][:6])


# How ranks are given out.


class Net(nn.Module):
    """Layers whose inputs vary in few directions, in many, and in between."""

    def __init__(self):
        super().__init__()
        self.few, self.many, self.last = linear(24, 40), linear(40, 24, False), linear(24, 16)

    def forward(self, x):
        x_few, x_many = x.split([24, 40], dim=-1)
        return self.last(torch.tanh(self.few(x_few)[..., :24] + self.many(x_many)))


def steep(tokens=200):
    """For a layer of 24 inputs."""
    return activations(24, tokens, decay=1.5)


def mixed(tokens=200):
    """For a Net."""
    return torch.cat([steep(tokens), activations(40, tokens, decay=0)], dim=1)


def own_inputs(model, x):
    """What each layer sees, by name, without adapters."""
    seen, handles = {}, []
    for name, layer in model.named_children():
        hook = lambda layer, args, name=name: seen.update({name: args[0].detach()})
        handles.append(layer.register_forward_pre_hook(hook))
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def ranks_by_definition(seen, r, rho):
    """Of all layers' leading round(ρ r) shares σ²/Σσ² the Σ r largest; all by layer."""
    shares = []
    for name, x in seen.items():
        energy = principal(x)[0] ** 2
        k = min(round(rho[name] * r[name]), x.shape[1])
        shares += [(float(share), name) for share in (energy / energy.sum())[:k]]
    best = sorted(shares, reverse=True)[: sum(r.values())]
    return {name: sum(owner == name for _, owner in best) for name in seen}


@settings(
    default=dict(r=4, rho=2.0),
    uniform=dict(r=4, rho=1.0),
    half=dict(r=5, rho=1.5),
    gap=dict(r=1, rho=3.0),
    wide=dict(r=2, rho=8.0),
    all=dict(r=16, rho=2.0),
    by_layer=dict(r=3, rho=2.0, overrides={"many": dict(r=7), "last": dict(rho=4.0)}),
)
def test_ranks_go_where_the_most_is_explained(hyper):
    model, x = Net(), mixed()
    seen = own_inputs(model, x)
    chart = ll.attach(model, "eva", dtype=torch.float64, calibration=[x], alpha=6.0, **hyper)
    of = lambda key: {n: hyper.get("overrides", {}).get(n, {}).get(key, hyper[key]) for n in seen}
    r, rho = of("r"), of("rho")
    want = ranks_by_definition(seen, r, rho)
    got = {site.name: site.variant.r for site in chart.sites}
    assert got == {name: count for name, count in want.items() if count}
    assert chart.left_out == tuple(name for name, count in want.items() if not count)
    assert sum(got.values()) == sum(r.values())
    assert (got == r) == (hyper["rho"] == 1), "nothing was given to another layer"
    for site in chart.sites:
        assert 0 < site.variant.r <= round(rho[site.name] * r[site.name])
        assert site.variant.s == pytest.approx(6.0 / r[site.name], rel=1e-12)
        A = model.get_submodule(site.name).adapters["default"].A.detach()
        assert_same_rows(A, principal(seen[site.name])[1][: site.variant.r], 1e-8)


def test_a_layer_that_explains_too_little_gets_no_adapter():
    model = Net()
    chart = ll.attach(model, "eva", r=1, rho=3.0, calibration=[mixed()], dtype=torch.float64)
    assert chart.left_out == ("many",) and "no adapter: many" in str(chart)
    assert not hasattr(model.many, "adapters") and not model.many.weight.requires_grad
    assert sum(site.variant.r for site in chart.sites) == 3


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("follows", [True, False])
def test_alpha_follows_r_so_that_s_stays(rslora, follows):
    hyper = dict(r=4, alpha=6.0, rslora=rslora, adjust_scaling_factors=follows)
    chart = ll.attach(Net(), "eva", calibration=[mixed()], dtype=torch.float64, **hyper)
    assert {site.variant.r for site in chart.sites} != {4}
    for site in chart.sites:
        r = 4 if follows else site.variant.r
        assert site.variant.s == pytest.approx(6 / (math.sqrt(r) if rslora else r), rel=1e-12)


class Attention(nn.Module):
    """q, k and v see one input, o another."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (linear(24, 24) for _ in range(4))

    def forward(self, x):
        return self.o(torch.tanh(self.q(x) * self.k(x)) + self.v(x))


@pytest.mark.parametrize("r", range(1, 12))
def test_equal_shares_break_no_budget(r):
    """Where Σ r cuts a tie, the earlier layers have one more."""
    model = Attention()
    chart = ll.attach(model, "eva", r=r, dtype=torch.float64, calibration=[steep()])
    ranks = dict.fromkeys("qkvo", 0) | {site.name: site.variant.r for site in chart.sites}
    assert sum(ranks.values()) == 4 * r
    assert ranks["q"] >= ranks["k"] >= ranks["v"] >= ranks["q"] - 1
    again = ll.attach(Attention(), "eva", r=r, dtype=torch.float64, calibration=[steep()])
    assert [site.variant for site in again.sites] == [site.variant for site in chart.sites]


def test_a_cut_tie_favours_the_earlier_layers():
    """With one input for all, Σ r = 4, 5 and 6 fall on three layers."""
    model = nn.Module()
    model.q, model.k, model.v = (linear(24, 24) for _ in range(3))
    model.forward = lambda x: model.q(x) + model.k(x) + model.v(x)
    overrides = {"k": dict(r=2), "v": dict(r=1)}
    ranks = {}
    for first in (1, 2, 3):
        chart = ll.attach(
            model,
            "eva",
            r=first,
            rho=8.0,
            dtype=torch.float64,
            calibration=[steep()],
            overrides=overrides,
        )
        ranks[first] = [site.variant.r for site in chart.sites]
        ll.detach(model)
    assert ranks == {1: [2, 1, 1], 2: [2, 2, 1], 3: [2, 2, 2]}


def test_equal_spectra_within_a_layer_are_taken_from_the_front():
    """Isotropic tokens: every share is 1/24, of both layers."""
    x = torch.cat([torch.eye(24), -torch.eye(24)]).double()
    model = nn.Module()
    model.a, model.b = linear(24, 24), linear(24, 24)
    model.forward = lambda x: model.a(x) + model.b(x)
    chart = ll.attach(model, "eva", r=3, calibration=[x], dtype=torch.float64)
    assert sum(site.variant.r for site in chart.sites) == 6
    for site in chart.sites:
        A = site.layer.adapters["default"].A.detach()
        assert_close(A @ A.T, torch.eye(len(A)).double())


@pytest.mark.parametrize("level", [0.0, 0.3, 1e4])
def test_inputs_that_never_change_explain_nothing(level):
    model = nn.Module()
    model.a, model.b = linear(24, 24, dtype=torch.float32), linear(24, 24, dtype=torch.float32)
    still = level * torch.randn(24)
    model.forward = lambda x: model.a(x) + model.b(still.expand_as(x))
    batches = list(activations(24).float().split(17))
    chart = ll.attach(model, "eva", r=3, calibration=batches)
    assert [(site.name, site.variant.r) for site in chart.sites] == [("a", 6)]


def test_inputs_that_change_little_explain_as_much():
    model = nn.Module()
    model.a, model.b = linear(24, 24), linear(24, 24)
    model.forward = lambda x: model.a(x) + model.b(1 + 1e-4 * x)
    chart = ll.attach(model, "eva", r=3, dtype=torch.float64, calibration=[steep()])
    assert [site.variant.r for site in chart.sites] == [3, 3]
    a, b = (site.layer.adapters["default"].A.detach() for site in chart.sites)
    assert_same_rows(a, b, 1e-6)


# Layers that see the same input.


@pytest.fixture
def counted(monkeypatch):
    """How often sums are taken, and decomposed."""
    calls = dict(statistic=0, summarise=0)
    for name in calls:
        method = getattr(EVA, name)

        def wrapped(self, *args, name=name, method=method):
            calls[name] += 1
            return method(self, *args)

        monkeypatch.setattr(EVA, name, wrapped)
    return calls


def test_layers_with_one_input_share_its_decomposition(counted):
    batches = list(steep().split(50))
    model, alone = Attention(), Attention()
    chart = ll.attach(model, "eva", r=4, dtype=torch.float64, calibration=batches)
    assert counted == dict(statistic=2 * 4, summarise=2)
    # The same as each for itself, which copies of the input make it.
    alone.forward = lambda x: Attention.forward(alone, x)
    for layer in (alone.q, alone.k, alone.v):
        layer.forward = lambda x, layer=layer: nn.functional.linear(x, layer.weight, layer.bias)
    copied = lambda layer, args: (args[0].clone(),)
    handles = [x.register_forward_pre_hook(copied) for x in (alone.q, alone.k, alone.v)]
    want = ll.attach(alone, "eva", r=4, dtype=torch.float64, calibration=batches)
    for handle in handles:
        handle.remove()
    assert counted == dict(statistic=2 * 4 + 4 * 4, summarise=2 + 4)
    assert [site.variant for site in chart.sites] == [site.variant for site in want.sites]
    for name in "qkvo":
        got, own = (m.get_submodule(name).adapters["default"].A for m in (model, alone))
        assert torch.equal(got, own)


def test_layers_with_settings_of_their_own_share_nothing(counted):
    model = Attention()
    overrides = {"k": dict(center=False), "v": dict(r=3)}
    ll.attach(
        model, "eva", r=5, rho=1.0, dtype=torch.float64, calibration=[X[0]], overrides=overrides
    )
    assert counted["statistic"] == 4
    for name, center, r in (("q", True, 5), ("k", False, 5), ("v", True, 3)):
        A = model.get_submodule(name).adapters["default"].A.detach()
        assert_same_rows(A, principal(X[0], center)[1][:r])


# Wide layers.


def captured(A, x):
    """The part of what as many leading components explain that lies along A's rows."""
    x = x.double() - x.double().mean(0)
    S, _ = principal(x)
    rows = torch.linalg.qr(A.double().T).Q
    return float((x @ rows).square().sum() / S[: len(A)].square().sum())


@in_dtypes
def test_the_sketch_finds_nearly_the_same_variance(dtype):
    x = activations(200, tokens=600, mean=100.0, decay=1.0)
    batches = list(x.to(dtype).split(100))
    A = attached(batches, r=4, rho=2.0, svd="randomised", dtype=dtype)
    exact = attached(batches, r=4, rho=2.0, svd="exact", dtype=dtype)
    assert captured(exact, x) > 1 - 1e-7
    assert 1 - 1e-4 < captured(A, x) < 1
    assert (A.double() @ A.double().T - torch.eye(4)).abs().max() < 50 * torch.finfo(dtype).eps


def test_the_default_sketches_above_2048(monkeypatch):
    """With layers of 200 taken for wide."""
    x = activations(200, tokens=300)
    auto = attached(x, r=4)
    assert torch.equal(auto, attached(x, r=4, svd="exact"))
    monkeypatch.setattr(svd, "WIDE", 100)
    assert torch.equal(attached(x, r=4), attached(x, r=4, svd="randomised"))
    assert not torch.equal(attached(x, r=4), auto)


def test_a_sketch_of_all_directions_is_exact():
    x = activations(24)
    assert_same_rows(attached(x, svd="randomised"), principal(x)[1][:6])


def test_a_sketch_of_few_directions_is_exact_and_gives_the_rest_no_share():
    x = activations(200)[:, :3] @ activations(200)[:3]
    layer = linear(200, 24)
    ll.attach(layer, "eva", r=6, dtype=torch.float64, calibration=[x], svd="randomised")
    A = tensors(layer)["A"].detach()
    assert_close(A @ A.T, torch.eye(6).double())
    assert_same_rows(A[:3], principal(x)[1][:3], 1e-8)
    with pytest.raises(ValueError, match="saw inputs of fewer than 6 components to whiten"):
        attached(x, svd="randomised", whiten=True)


def test_a_sketch_is_drawn_once():
    assert svd.sketching(300, 4) is svd.sketching(300, 4)
    assert svd.sketching(300, 4).shape == (300, 42)


# PEFT.


def peft_eva(batches, hyper, sites):
    config = peft.LoraConfig(
        r=hyper["r"],
        lora_alpha=hyper["alpha"],
        init_lora_weights="eva",
        target_modules=sites,
        eva_config=peft.EvaConfig(rho=hyper["rho"], whiten=hyper.get("whiten", False)),
    )
    other = peft.get_peft_model(llama(), config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(other, dataloader=batches, show_progress_bar=False)
    return other


def texts(n):
    """Batches with padding left and right, and prompts."""
    generator = torch.Generator().manual_seed(8)
    for _ in range(n):
        ids = torch.randint(64, (4, 14), generator=generator)
        mask, labels = torch.ones_like(ids), ids.clone()
        mask[1, 10:], mask[2, :3], labels[:, :4] = 0, 0, -100
        yield dict(input_ids=ids, attention_mask=mask, labels=labels)


@settings(
    default=dict(r=4, alpha=12.0, rho=2.0),
    tie=dict(r=8, alpha=4.0, rho=2.0),
    many_to_choose_from=dict(r=1, alpha=2.0, rho=16.0),
    uniform=dict(r=16, alpha=5.0, rho=1.0),
)
def test_a_llama_starts_as_pefts(hyper):
    """Of one batch PEFT's incremental SVD is exact: ranks, scales, A and the function agree."""
    batches, model = list(texts(1)), llama()
    sites = [site.name for site in ll.plan(model, "eva").sites]
    other = peft_eva(batches, hyper, sites)
    chart = ll.attach(model, "eva", seed=0, calibration=batches, **hyper)
    ours = {site.name: site.variant for site in chart.sites}
    theirs = {
        name.removeprefix("base_model.model."): layer
        for name, layer in other.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert {n: v.r for n, v in ours.items()} == {n: x.r["default"] for n, x in theirs.items()}
    for name, layer in theirs.items():
        own, A = model.get_submodule(name).adapters["default"], layer.lora_A["default"].weight
        assert ours[name].s == pytest.approx(layer.scaling["default"], rel=1e-12)
        assert_same_rows(own.A.detach(), A.detach(), 1e-3)
        own.B.data.normal_()
        A.data.copy_(own.A)
        layer.lora_B["default"].weight.data.copy_(own.B)
    with torch.no_grad():
        y, y_theirs, base = (m(**batches[0]).logits for m in (model, other, llama()))
    assert_close(y - base, y_theirs - base, 1e-4)


def test_peft_whitens_layers_with_one_input_once_for_each():
    """In place, so that q, k and v all start divided by σ^1.5; o starts as ours, but for the √2
    that two passes over the one batch add to σ."""
    batches, model = list(texts(1)), llama()
    hyper = dict(r=8, alpha=4.0, rho=2.0, whiten=True)
    other = peft_eva(batches, hyper, [site.name for site in ll.plan(model, "eva").sites])
    ll.attach(model, "eva", calibration=batches, **hyper)
    ours, theirs = (m.layers[0].self_attn for m in (model.model, other.base_model.model.model))
    for name, times in dict(q_proj=3, k_proj=3, v_proj=3, o_proj=1).items():
        A = getattr(ours, name).adapters["default"].A.detach()
        sigma = A.norm(dim=1, keepdim=True) ** -2
        want = getattr(theirs, name).lora_A["default"].weight.detach()
        assert_same_rows(A * sigma**0.5 / (sigma * 2**0.5) ** (times / 2), want, 1e-3)


def test_of_several_batches_peft_keeps_nearly_the_same():
    """It truncates after every batch, and stops when its components stay."""
    batches, model = list(texts(6)), llama()
    sites = [site.name for site in ll.plan(model, "eva").sites]
    other = peft_eva(batches, dict(r=4, alpha=4.0, rho=2.0), sites)
    ll.attach(model, "eva", r=4, alpha=4.0, calibration=batches)
    worst = 1.0
    for name in sites:
        A = model.get_submodule(name).adapters["default"].A.detach()
        theirs = other.base_model.model.get_submodule(name).lora_A["default"].weight.detach()
        assert abs(len(A) - len(theirs)) <= 1
        k = min(len(A), len(theirs))
        worst = min(worst, float(torch.linalg.svdvals(A[:k] @ theirs[:k].T).mean()))
    assert worst > 0.9


# Files, refusals, what calibration leaves behind.


def test_ranks_and_gaps_survive_a_file(tmp_path):
    x = mixed().float()
    model, fresh = Net().float(), Net().float()
    chart = ll.attach(model, "eva", r=1, rho=3.0, alpha=5.0, calibration=[x])
    move(model)
    ll.save(model, tmp_path / "x.safetensors")
    loaded = ll.load(fresh, tmp_path / "x.safetensors")
    assert [(s.name, s.variant) for s in loaded.sites] == [(s.name, s.variant) for s in chart.sites]
    assert {s.variant.r for s in loaded.sites} == {1, 2} and not hasattr(fresh.many, "adapters")
    assert torch.equal(fresh(x), model(x))
    y = model(x)
    move(model, seed=9)
    ll.load(model, tmp_path / "x.safetensors")
    assert torch.equal(model(x), y)


@settings(
    nothing=(dict(calibration=None), "eva starts from what the layers see; pass calibration="),
    no_batch=(dict(calibration=[]), "few saw no calibration token"),
    few_tokens=(dict(calibration=[mixed(7)]), "few saw 7 calibration tokens, fewer than its 8 co"),
    nan=(dict(calibration=[mixed() * math.nan]), "few saw NaN or infinite activations"),
    infinite=(dict(calibration=[mixed() * math.inf]), "few saw NaN or infinite activations"),
    too_many=(dict(r=25), "few has 24 inputs and no 25 components; use r ≤ 24"),
    rho=(dict(rho=0.9), "rho=0.9 must be ≥ 1"),
    none=(dict(r=0), "r=0 must be ≥ 1"),
    svd=(dict(svd="exakt"), "svd='exakt' must be one of .*; did you mean 'exact'"),
    flat=(
        dict(calibration=[mixed()[:1].repeat(9, 1)], whiten=True),
        "few saw inputs of fewer than .* components to whiten; lower r",
    ),
)
def test_what_cannot_work_is_refused(hyper):
    hyper, match = hyper
    model = Net()
    before = snapshot(model)
    arguments = {"r": 4, "calibration": [mixed()], **hyper}
    with ll.shapes.unchecked(), pytest.raises(ValueError, match=f"^eva:? .*{match}|^{match}"):
        ll.attach(model, "eva", **arguments)
    unchanged(model, before)


class Fragile(nn.Module):
    """Draws random numbers, and may fail when it runs."""

    def __init__(self):
        super().__init__()
        self.layer, self.drop = linear(24, 40), nn.Dropout(0.5)
        self.layer.register_forward_pre_hook(lambda *_: None)

    def forward(self, x, fail=False):
        torch.rand(3)
        y = self.drop(self.layer(self.drop(x)))
        if fail:
            raise RuntimeError("the model is ill")
        return y


def batches_that(fail_at):
    for i in range(3):
        if i == fail_at:
            raise RuntimeError("the data is ill")
        yield dict(x=X[torch.randperm(4)], fail=False)


@pytest.mark.parametrize("failing", ["model", "batches", "layer", None])
def test_calibration_leaves_no_trace(failing):
    """Modes, hooks and the random generator, also after an error in the model, the batches or what
    is made of them."""
    model = Fragile().train()
    model.layer.eval()
    torch.manual_seed(3)
    before, state = snapshot(model), torch.get_rng_state()
    batches, error = batches_that(2 if failing == "batches" else None), RuntimeError
    if failing == "model":
        batches = [dict(x=X, fail=False), dict(x=X, fail=True)]
    if failing == "layer":
        batches, error = [X * float("inf")], ValueError
    if failing:
        with pytest.raises(error, match="is ill|NaN or infinite"):
            ll.attach(model, "eva", r=4, seed=0, dtype=torch.float64, calibration=batches)
    else:
        ll.attach(model, "eva", r=4, rho=1.0, seed=0, dtype=torch.float64, calibration=batches)
        # Dropout was off.
        A = model.layer.adapters["default"].A.detach()
        assert_same_rows(A, principal(X.flatten(0, 1))[1][:4])
        ll.detach(model)
    unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)
