"""LoRA (arXiv:2106.09685 §4.1) and rsLoRA (arXiv:2312.03732) against W' = W + s B A."""

import math

import pytest
import torch
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
    singular_values,
    tensors,
    updated_weight,
    with_and_without_bias,
)

import lora_lite as ll

LAWS = {"lora": [{}, dict(r=4, alpha=4.0)], "rslora": [{}]}
KEPT = {"lora": (dict(r=8), 96 + 8), "rslora": (dict(r=8), 96 + 8)}


@on_layers
@in_dtypes
@settings(
    default=dict(variant="lora", s=16 / 8),
    equal=dict(variant="lora", s=1, r=4, alpha=4.0),
    odd=dict(variant="lora", s=-7 / 3, r=3, alpha=-7.0),
    rank_one=dict(variant="lora", s=5, r=1, alpha=5.0),
    rslora=dict(variant="rslora", s=16 / math.sqrt(8)),
    rslora_odd=dict(variant="rslora", s=7 / math.sqrt(3), r=3, alpha=7.0),
    rslora_field=dict(variant="lora", s=5 / 2, r=4, alpha=5.0, rslora=True),
)
def test_matches_eq_3(d_in, d_out, bias, dtype, hyper):
    hyper = dict(hyper)
    s = hyper.pop("s")
    model = adapted(hyper.pop("variant"), d_in, d_out, bias, dtype=dtype, **hyper)
    assert_follows(model, lambda W, A, B: W + s * B @ A, {"A", "B"}, TOLERANCE[dtype])


@with_and_without_bias
@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_starts_as_identity(variant, bias):
    assert_starts_as_identity(variant, bias)


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_first_step_moves_B_alone(variant):
    grads = first_gradients(variant)
    assert not grads["A"].any()
    assert grads["B"].abs().min() > 0


def test_start_of_A_and_B():
    model = linear(1024, 64)
    ll.attach(model, "lora", r=32, seed=0, dtype=torch.float64)
    A, B = tensors(model)["A"], tensors(model)["B"]
    bound = 1024**-0.5
    assert not B.any()
    assert 0.999 * bound < A.abs().max() <= bound
    assert_close(A.std(), torch.tensor(bound / math.sqrt(3)).double(), 0.02)
    assert A.mean().abs() < 0.02 * bound


def test_shapes_and_parameter_count():
    chart = ll.plan(linear(24, 40), "lora", r=5)
    assert chart.sites[0].shapes == {"A": (5, 24), "B": (40, 5)}
    assert chart.trainable == 5 * (24 + 40)
    assert chart.frozen == 0


@on_layers
@pytest.mark.parametrize("r", [1, 3, 8])
def test_rank_and_norm_of_the_update(d_in, d_out, bias, r):
    model = adapted("lora", d_in, d_out, bias, r=r, alpha=12.0)
    A, B = tensors(model)["A"], tensors(model)["B"]
    update = updated_weight(model) - model.weight
    assert rank(update) == r
    bound = 12 / r * singular_values(A)[0] * singular_values(B)[0]
    assert singular_values(update)[0] <= bound * (1 + 1e-12)


def test_a_change_of_gauge_changes_nothing():
    model = adapted("lora", r=4)
    A, B = tensors(model)["A"], tensors(model)["B"]
    before = updated_weight(model)
    G = torch.randn(4, 4, dtype=torch.float64) + 3 * torch.eye(4)
    A.data, B.data = G @ A.data, B.data @ G.inverse()
    assert_close(updated_weight(model), before)


@pytest.mark.parametrize("r", [3, 8])
def test_rslora_is_lora_times_root_r(r):
    plain, stable = adapted("lora", r=r), adapted("rslora", r=r)
    W = plain.weight
    update = updated_weight(plain) - W
    assert_close(updated_weight(stable) - W, math.sqrt(r) * update)


@pytest.mark.parametrize("variant", ["lora", "rslora"])
def test_dropout_acts_on_the_branch_alone_and_in_training_alone(variant):
    model = adapted(variant, dropout=0.75)
    x = torch.eye(24, dtype=torch.float64).repeat(20, 1)
    z = x @ model.weight.T + model.bias
    branch = model.eval()(x) - z
    assert_close(branch, adapted(variant)(x) - z)
    # With one coordinate per row, the branch of a row is dropped whole or scaled by 1/(1 − p).
    ratio = (model.train()(x) - z).norm(dim=1) / branch.norm(dim=1)
    kept = ratio > 2
    assert_close(ratio, 4 * kept.double())
    assert 0.15 < kept.double().mean() < 0.35


def test_float16_is_the_same_product():
    model = adapted("lora", dtype=torch.float16)
    own = {key: t.detach().double() for key, t in tensors(model).items()}
    x = inputs(24, torch.float16)
    want = x.double() @ (model.weight.double() + 2 * own["B"] @ own["A"]).T
    assert_close(model(x), (want + model.bias.double()).half(), 5e-3)
