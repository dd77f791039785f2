"""LayerNorm tuning (arXiv:2312.11420): y = γ ⊙ n(x) + β with n the frozen normalisation, and PEFT's
method of this name."""

import copy

import peft
import pytest
import torch
from models import IDS, gemma, gpt2, llama
from reference import TOLERANCE, assert_close, in_dtypes, inputs
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

import lora_lite as ll
from lora_lite.testing import move, snapshot, unchanged

LAWS = {"ln_tuning": [{}, dict(beta=False)]}

D, EPS = 24, 1e-3


def standardised(x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def by_rms(x):
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


# The layer, n, what it adds to its weight, and how exact it is: transformers' norms compute in
# float32 whatever comes in.
NORMS = dict(
    layer_norm=(lambda: nn.LayerNorm(D, EPS), standardised, 0, 0),
    layer_norm_without_bias=(lambda: nn.LayerNorm(D, EPS, bias=False), standardised, 0, 0),
    rms_norm=(lambda: nn.RMSNorm(D, EPS), by_rms, 0, 0),
    llama=(lambda: LlamaRMSNorm(D, EPS), by_rms, 0, 1e-6),
    t5=(lambda: T5LayerNorm(D, EPS), by_rms, 0, 1e-6),
    gemma=(lambda: GemmaRMSNorm(D, EPS), by_rms, 1, 1e-6),
)

on_norms = pytest.mark.parametrize("make", [make for make, *_ in NORMS.values()], ids=NORMS)


def norm(make, dtype=torch.float64):
    """A norm with numbers of its own, two of them zero."""
    layer = make()
    generator = torch.Generator().manual_seed(2)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=generator)
        p.data[[3, 7]] = 0
    return layer.to(dtype)


def adapted(make, dtype=torch.float64, moved=0.5, **hyper):
    layer = norm(make, dtype)
    ll.attach(layer, "ln_tuning", dtype=dtype, **hyper)
    if moved:
        move(layer, seed=3, scale=moved)
    return layer


def own(layer, name="default"):
    return layer.adapters[name].tensors()


@pytest.mark.parametrize("make, n, plus, coarse", NORMS.values(), ids=NORMS)
@in_dtypes
@pytest.mark.parametrize("beta", [True, False])
def test_matches_its_definition(make, n, plus, coarse, dtype, beta):
    layer, tolerance = adapted(make, dtype, beta=beta), max(coarse, TOLERANCE[dtype])
    x, y_grad = inputs(D, dtype).requires_grad_(), inputs(D, dtype).flip(0)
    y = layer(x)
    y.backward(y_grad)
    bias = getattr(layer, "bias", None)
    numbers = {key: t.detach().double().requires_grad_() for key, t in own(layer).items()}
    assert set(numbers) == {"weight", *(["bias"] if beta and bias is not None else [])}
    x_ref = x.detach().double().requires_grad_()
    y_ref = (plus + numbers["weight"]) * n(x_ref)
    if bias is not None:
        y_ref = y_ref + numbers.get("bias", bias.detach().double())
    y_ref.backward(y_grad.double())
    assert_close(y, y_ref.to(dtype), tolerance, "the output")
    assert_close(x.grad, x_ref.grad.to(dtype), tolerance, "the gradient to x")
    for key, tensor in own(layer).items():
        assert_close(tensor.grad, numbers[key].grad.to(dtype), tolerance, f"the gradient to {key}")
    assert all(p.grad is None for p in (layer.weight, bias) if p is not None)


@on_norms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_starts_as_identity(make, dtype):
    """Bit for bit: γ and β are copies, kept in float32 or wider, of what the layer stores."""
    layer, x = norm(make, dtype), inputs(D, dtype)
    want, before = layer(x), snapshot(layer)
    for wide in {dtype, torch.float32, torch.float64}:
        ll.attach(layer, "ln_tuning", dtype=wide)
        assert torch.equal(layer(x), want)
        assert own(layer)["weight"].dtype == wide
        ll.detach(layer)
    unchanged(layer, before)


def test_shapes_and_parameter_count():
    chart = ll.plan(gpt2(), "ln_tuning")
    assert [site.shapes for site in chart.sites] == [dict(weight=(32,), bias=(32,))] * 5
    assert chart.trainable == 5 * 64 and chart.frozen == 0
    assert ll.plan(gpt2(), "ln_tuning", beta=False).trainable == 5 * 32
    assert ll.plan(llama(), "ln_tuning").trainable == 5 * 32


@pytest.mark.parametrize("make, n, plus, coarse", NORMS.values(), ids=NORMS)
def test_entries_that_are_zero_train_and_may_become_zero(make, n, plus, coarse):
    """A rescaling of the norm's output, (γ/γ0) ⊙ (y − β0) + β, could do neither."""
    layer, x = adapted(make, moved=0), inputs(D)
    assert not layer.weight[[3, 7]].any()
    (layer(x) * inputs(D).flip(0)).sum().backward()
    weight, bias = own(layer)["weight"], own(layer).get("bias", torch.zeros(D).double())
    assert weight.grad[[3, 7]].all()
    with torch.no_grad():
        weight[[3, 7]] = 2.0
        weight[[5, 6]] = 0.0
    got = (layer(x) - bias)[..., [3, 7, 5, 6]]
    assert_close(got, n(x)[..., [3, 7, 5, 6]] * (plus + torch.tensor([2, 2, 0, 0])), 1e-6)


def test_the_numbers_are_those_of_the_next_linear_layer():
    """W' = W diag(γ), b' = b + W β on n(x): what the method can do, and no more."""
    layer, x = adapted(NORMS["layer_norm"][0]), inputs(D)
    linear = nn.Linear(D, 40, dtype=torch.float64)
    weight, bias = own(layer).values()
    folded = standardised(x) @ (linear.weight * weight).T + linear.bias + linear.weight @ bias
    assert_close(linear(layer(x)), folded)


def test_gamma_moves_by_less_than_bfloat16_can_say():
    """What is below the norm's precision adds up in float32; in bfloat16 1 stays 1."""
    layer = nn.LayerNorm(D).to(torch.bfloat16)
    plain = copy.deepcopy(layer)
    ll.attach(layer, "ln_tuning")
    groups = ll.param_groups(layer, lr=1.0), plain.parameters()
    optimizers = [torch.optim.SGD(group, lr=1.0) for group in groups]
    for _ in range(40):
        for p in (own(layer)["weight"], plain.weight):
            p.grad = torch.full_like(p, 1e-3)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(own(layer)["weight"], torch.tensor(0.96))
    assert torch.equal(plain.weight, torch.ones(D, dtype=torch.bfloat16))
    x = inputs(D, torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    assert_close(layer(x).float(), 0.96 * plain(x).float(), 1e-2)


def test_neither_number_decays():
    (group,) = ll.param_groups(adapted(NORMS["layer_norm"][0]), 0.1, weight_decay=0.5)
    assert group["weight_decay"] == 0 and len(group["params"]) == 2


@on_norms
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_merging_writes_the_numbers(make, dtype):
    layer, x = norm(make, dtype), inputs(D, dtype)
    ll.attach(layer, "ln_tuning")
    move(layer, seed=3, scale=0.5)
    y, numbers, before = layer(x), own(layer), snapshot(layer)
    with ll.merged(layer):
        for key, number in numbers.items():
            assert torch.equal(getattr(layer, key), number.to(dtype))
        assert_close(layer(x), y, {torch.bfloat16: 1e-2}.get(dtype, 1e-6))
    unchanged(layer, before)
    delta = ll.delta_weights(layer)[""]
    assert_close(delta, (numbers["weight"].to(delta) - layer.weight.to(delta)).detach(), 1e-6)
    assert (ll.merge(layer).layers[0].lost > 1e-4) == (dtype == torch.bfloat16)
    for key, number in numbers.items():
        assert torch.equal(getattr(layer, key), number.to(dtype))


@on_norms
def test_two_adapters_add_their_differences(make):
    layer, x = adapted(make), inputs(D)
    ll.attach(layer, "ln_tuning", name="second", dtype=torch.float64)
    assert_close(layer(x), adapted(make)(x), 1e-6)
    move(layer, seed=5, scale=0.3)
    first = own(layer)
    want = norm(make)
    with torch.no_grad():
        for key, p in want.named_parameters():
            p.copy_(first[key] + own(layer, "second")[key] - p)
    assert_close(layer(x), want(x), 1e-6)
    with ll.disabled(layer, "default"):
        for key, p in want.named_parameters():
            p.data.copy_(own(layer, "second")[key])
        assert_close(layer(x), want(x), 1e-6)
    both = layer(x)
    ll.merge(layer)
    assert_close(layer(x), both, 1e-6)


class Twice(nn.Module):
    """One norm under two names, used before and after a linear layer."""

    def __init__(self):
        super().__init__()
        self.first = norm(NORMS["layer_norm"][0])
        self.linear = nn.Linear(D, D, dtype=torch.float64)
        self.second = self.first

    def forward(self, x):
        return self.second(self.linear(self.first(x)))


def test_a_norm_used_twice_stays_one_norm():
    """Both uses change alike, and the gradient is the sum over both: that is what sharing is."""
    model, twin, x = Twice(), Twice(), inputs(D)
    twin.load_state_dict(model.state_dict())
    chart = ll.attach(model, "ln_tuning", dtype=torch.float64)
    assert [site.name for site in chart.sites] == ["first"]
    move(model, seed=3, scale=0.5)
    with torch.no_grad():
        for key, number in own(model.first).items():
            getattr(twin.first, key).copy_(number)
    assert_close(model(x), twin(x))
    for each in (model, twin):
        each(x).square().sum().backward()
    for key, number in own(model.second).items():
        assert_close(number.grad, getattr(twin.first, key).grad)
    before = model(x)
    ll.merge(model)
    assert model.first is model.second
    assert_close(model(x), before)


def test_a_file_for_norms_with_another_bias_is_refused(tmp_path):
    layer = adapted(NORMS["layer_norm"][0])
    ll.save(layer, tmp_path / "a.safetensors")
    other = norm(NORMS["layer_norm_without_bias"][0])
    with pytest.raises(ValueError, match="bias is no tensor of the adapter"):
        ll.load(other, tmp_path / "a.safetensors", force=True)
    ll.attach(other, "ln_tuning", dtype=torch.float64)
    ll.save(other, tmp_path / "b.safetensors")
    fresh = norm(NORMS["layer_norm"][0])
    ll.load(fresh, tmp_path / "b.safetensors", force=True)
    assert list(own(fresh)) == ["weight"]


def test_a_linear_layer_is_refused():
    """PEFT would train a copy of all its weights."""
    with pytest.raises(ValueError, match="only model.layers.0.self_attn.q_proj, a Linear, which"):
        ll.attach(llama(), "ln_tuning", targets=["norm", "q_proj"])


def peft_model(model, targets):
    return peft.get_peft_model(model, peft.LNTuningConfig(target_modules=targets))


PEFT_TARGETS = dict(
    llama=(llama, ["input_layernorm", "post_attention_layernorm", "norm"]),
    gemma=(gemma, ["input_layernorm", "post_attention_layernorm", "norm"]),
    gpt2=(gpt2, ["ln_1", "ln_2", "ln_f"]),
)


@pytest.mark.parametrize("make, targets", PEFT_TARGETS.values(), ids=PEFT_TARGETS)
@in_dtypes
def test_peft_agrees(make, targets, dtype):
    """Outputs, every gradient, and the merged model."""
    model, other = make().to(dtype), peft_model(make().to(dtype), targets)
    sites = ll.attach(model, "ln_tuning", targets=targets, dtype=dtype).sites
    assert len(sites) == 5 == len(ll.plan(make(), "ln_tuning").sites)
    move(model, seed=3, scale=0.3)
    theirs = {
        site.name: other.base_model.model.get_submodule(site.name).ln_tuning_layers["default"]
        for site in sites
    }
    with torch.no_grad():
        for site in sites:
            for key, number in own(site.layer).items():
                getattr(theirs[site.name], key).copy_(number)
    logits, wanted = (m(IDS).logits for m in (model, other))
    assert_close(logits, wanted, TOLERANCE[dtype], "the logits")
    for out in (logits, wanted):
        (out * out.detach().flip(0)).sum().backward()
    for site in sites:
        for key, number in own(site.layer).items():
            want = getattr(theirs[site.name], key).grad
            assert_close(number.grad, want, TOLERANCE[dtype], f"{site.name}.{key}'s gradient")
    plain = other.merge_and_unload()
    ll.merge(model)
    for (name, got), want in zip(model.named_parameters(), plain.parameters()):
        assert torch.equal(got, want), name
