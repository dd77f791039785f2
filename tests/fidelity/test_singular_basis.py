"""The singular triplets of the AntiPaSTO family, and their choice by calibration
(arXiv:2601.07473 §3.4 eq. 3, App. A.4)."""

import itertools

import pytest
import torch
from reference import assert_close, inputs, linear, on_layers, rel_error, singular_values, tensors
from torch import nn

import lora_lite as ll
from lora_lite.testing import snapshot, unchanged

in_the_family = pytest.mark.parametrize("variant", ["antipasto", "antipasto_rot", "dplr"])
with_either_pool = pytest.mark.parametrize("act_pool", ["rms", "mean_abs"])
R = 4


def attach(model, variant, calibration=None, **hyper):
    hyper = {"r": R, **({"lora_rank": 2} if variant == "dplr" else {}), **hyper}
    ll.attach(model, variant, dtype=torch.float64, seed=0, calibration=calibration, **hyper)


def triplets(model):
    """The kept U, S, Vh."""
    return tuple(tensors(model)[key] for key in ("U", "S", "Vh"))


def skewed(d_in, tokens=50, seed=0):
    """Activations with much more in some directions than in others."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 1, d_in)[torch.randperm(d_in, generator=generator)]
    mixing = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator)).Q
    return ((torch.randn(tokens, d_in, generator=generator) * scale) @ mixing + 0.3).double()


def scores(W, x, act_pool):
    """score_i = S_i · pool_t(x_t · v_i), of all triplets."""
    _, S, Vh = torch.linalg.svd(W.detach(), full_matrices=False)
    p = x @ Vh.T
    return S * (p.square().mean(0).sqrt() if act_pool == "rms" else p.abs().mean(0))


@in_the_family
@on_layers
def test_without_calibration_the_leading_triplets(variant, d_in, d_out, bias):
    model = linear(d_in, d_out, bias)
    attach(model, variant)
    U, S, Vh = triplets(model)
    assert_close(S, singular_values(model.weight)[:R])
    assert_are_triplets(model)
    assert_close(U.T @ model.weight @ Vh.T, torch.diag(S))


def assert_are_triplets(model):
    U, S, Vh = triplets(model)
    eye = torch.eye(len(S)).double()
    assert_close(U.T @ U, eye)
    assert_close(Vh @ Vh.T, eye)
    assert_close(model.weight @ Vh.T, U * S)
    assert (S.diff() <= 0).all()


@in_the_family
@on_layers
@with_either_pool
def test_calibration_keeps_the_highest_scores_in_order(variant, d_in, d_out, bias, act_pool):
    model, x = linear(d_in, d_out, bias), skewed(d_in)
    score = scores(model.weight, x, act_pool)
    keep = score.topk(R).indices.sort().values
    assert not torch.equal(keep, torch.arange(R)), "the leading ones would do"
    attach(model, variant, [x[:7], x[7:]], act_pool=act_pool)
    assert_close(triplets(model)[1], singular_values(model.weight)[keep])
    assert_are_triplets(model)


def test_the_two_pools_choose_differently_where_activations_are_sparse():
    kept = {}
    for act_pool in ("rms", "mean_abs"):
        model = linear()
        _, _, Vh = torch.linalg.svd(model.weight.detach(), full_matrices=False)
        # One token is large along v_20, every token a little along v_21.
        x = 0.5 * Vh[21].repeat(100, 1)
        x[0] = 30 * Vh[20]
        attach(model, "dplr", [x], r=1, lora_rank=1, act_pool=act_pool)
        kept[act_pool] = triplets(model)[1]
        S = singular_values(model.weight)
    assert_close(kept["rms"], S[20:21])
    assert_close(kept["mean_abs"], S[21:22])


@on_layers
def test_rms_keeps_the_most_output_energy(d_in, d_out, bias):
    """Σ score² = E ‖W x‖² over all triplets, so no other r of them carry more."""
    model, x = linear(d_in, d_out, bias), skewed(d_in)
    _, S, Vh = torch.linalg.svd(model.weight.detach(), full_matrices=False)
    energies = (S * (x @ Vh.T)).square().mean(0)
    assert_close(energies.sum(), (x @ model.weight.T).square().sum(1).mean())
    attach(model, "antipasto_rot", [x], block_size=2)
    U, S_kept, Vh_kept = triplets(model)
    kept = (x @ Vh_kept.T * S_kept @ U.T).square().sum(1).mean()
    best = max(sum(c) for c in itertools.combinations(energies.tolist(), R))
    assert_close(kept, torch.full((), best, dtype=torch.float64))


class Masked(nn.Module):
    """A model with dropout, whose layer sees padding too."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)
        self.layer = linear()

    def forward(self, x, attention_mask=None, fail=False):
        torch.rand(3)
        y = self.layer(self.dropout(x))
        if fail:
            raise RuntimeError("the batch is bad")
        return y


@in_the_family
@with_either_pool
def test_padding_never_counts(variant, act_pool):
    x = skewed(24, tokens=30).view(5, 6, 24)
    mask = torch.ones(5, 6, dtype=torch.int64)
    mask[0, 4:], mask[3, :2] = 0, 0
    padded = x.masked_fill(mask[..., None] == 0, 1e6)
    plain, masked = Masked(), Masked()
    attach(plain, variant, [x[mask.bool()]], act_pool=act_pool)
    attach(masked, variant, [dict(x=padded, attention_mask=mask)], act_pool=act_pool)
    unmasked = Masked()
    attach(unmasked, variant, [dict(x=padded)], act_pool=act_pool)
    S = {model: tensors(model.layer)["S"] for model in (plain, masked, unmasked)}
    assert_close(S[masked], S[plain])
    assert rel_error(S[unmasked], S[plain]) > 0.01


@in_the_family
def test_batches_weigh_by_their_tokens(variant):
    """One batch or many, of any shape and kind: the mean is over tokens."""
    x = skewed(24, tokens=40)
    one, many = Masked(), Masked()
    attach(one, variant, [x])
    attach(many, variant, (b for b in [x[:1], (x[1:31].view(5, 6, 24),), dict(x=x[31:])]))
    assert torch.equal(triplets(one.layer)[1], triplets(many.layer)[1])


def test_calibration_sees_the_undamaged_model_in_eval_mode():
    """Dropout is off, and later layers see what earlier ones give without adapters."""
    model = nn.ModuleDict({"a": linear(24, 40), "b": linear(40, 24)})
    seen = {}
    model.forward = lambda x: seen.update(b=model["a"](x).detach()) or model["b"](seen["b"])
    x = skewed(24)
    want = scores(model["b"].weight, model["a"](x).detach(), "rms")
    attach(model, "dplr", [x])
    keep = want.topk(R).indices.sort().values
    assert_close(tensors(model["b"])["S"], singular_values(model["b"].weight)[keep])


@in_the_family
@pytest.mark.parametrize("failing", [False, True])
def test_calibration_leaves_no_trace(variant, failing):
    """Random generator, modes and hooks are as before, also after an exception in a batch."""
    model = Masked().train()
    model.layer.eval()
    model.layer.register_forward_hook(lambda *_: None)
    before, state = snapshot(model), torch.get_rng_state()
    batches = [dict(x=skewed(24)), dict(x=skewed(24), fail=failing)]
    if failing:
        with pytest.raises(RuntimeError, match="the batch is bad"):
            attach(model, variant, batches)
    else:
        attach(model, variant, batches)
        ll.detach(model)
    unchanged(model, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "batches, match",
    [
        ([], "saw no calibration token"),
        ([inputs(24, batch=(3,))], "saw 3 calibration tokens, fewer than r=4"),
        ([inputs(24) * float("nan")], "saw NaN or infinite activations"),
    ],
    ids=["none", "too-few", "nan"],
)
def test_unusable_calibration_is_refused(batches, match):
    model = linear()
    before = snapshot(model)
    with pytest.raises(ValueError, match=match):
        attach(model, "dplr", batches)
    unchanged(model, before)
