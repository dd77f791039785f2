"""AdaLoRA (arXiv:2303.10512) against W' = W + s P Λ Q, a scalar reading of its algorithm 1, and
PEFT's allocation."""

from types import SimpleNamespace

import peft
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
    tensors,
    updated_weight,
    with_and_without_bias,
)
from torch import nn

import lora_lite as ll

LAWS = {"adalora": [{}, dict(init_r=4, target_r=1, alpha=3.0, tinit=1, tfinal=2, delta_t=2)]}
KEPT = {"adalora": (dict(init_r=12), 96 + 12)}


@on_layers
@in_dtypes
@settings(
    default=dict(s=16 / 12.00001),
    odd=dict(s=7 / 3.00001, init_r=3, target_r=1, alpha=7.0),
    one=dict(s=2 / 2.00001, init_r=2, target_r=1, alpha=2.0),
)
def test_matches_eq_3(d_in, d_out, bias, dtype, hyper):
    hyper = dict(hyper)
    s = hyper.pop("s")
    model = adapted("adalora", d_in, d_out, bias, dtype=dtype, **hyper)

    def dense(W, A, B, E, **state):
        return W + s * B @ torch.diag(E) @ A

    assert_follows(model, dense, {"A", "B", "E"}, TOLERANCE[dtype])


@with_and_without_bias
def test_starts_as_identity(bias):
    assert_starts_as_identity("adalora", bias)


def test_only_E_moves_at_the_first_step():
    grads = first_gradients("adalora")
    assert grads["E"].all() and not grads["A"].any() and not grads["B"].any()


def test_start_is_gaussian():
    own = tensors(adapted("adalora", 400, 300, moved=0, init_r=200, target_r=100))
    assert not own["E"].any() and own["kept"].all()
    for key in "AB":
        assert_close(own[key].std(), torch.tensor(0.02, dtype=torch.float64), 0.01)
        assert abs(own[key].mean()) < 3e-4


def test_shapes_and_parameter_count():
    chart = ll.plan(linear(24, 40), "adalora", init_r=5, target_r=2)
    like = {"A": (5, 24), "B": (40, 5), "E": (5,)}
    state = {f"{letter}_{key}": shape for letter in "IU" for key, shape in like.items()}
    assert chart.sites[0].shapes == like | state | {"kept": (5,)}
    assert chart.trainable == 5 * (24 + 40 + 1)


def test_a_triplet_with_zero_E_is_inert_and_the_scale_stays():
    model = adapted("adalora", init_r=5, target_r=2)
    own = tensors(model)
    own["E"].data[[1, 3]] = 0
    before = updated_weight(model)
    assert rank(before - model.weight) == 3
    own["A"].data[[1, 3]] = 100
    assert_close(updated_weight(model), before)
    left = own["B"] @ torch.diag(own["E"]) @ own["A"]
    assert_close(before - model.weight, 16 / 5.00001 * left)


class Net(nn.Module):
    """Three layers of different sizes, and an output that PEFT takes for a language model's."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = linear(24, 40), linear(40, 16), linear(16, 24)

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


LAYERS = ["a", "b", "c"]


def attach(dtype=torch.float64, **hyper):
    model = Net()
    ll.attach(model, "adalora", seed=0, dtype=dtype, **hyper)
    return model, {n: model.get_submodule(n).adapters["default"].tensors() for n in LAYERS}


def batch(step):
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(7, 24, generator=generator, dtype=torch.float64) for _ in range(2))
    return x, y


def train(model, steps, total, after=lambda t: None, lr=0.3, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(ll.param_groups(model, lr=lr))
    ll.schedule(model, optimizer, total)
    for t in range(steps):
        x, y = batch(t)
        optimizer.zero_grad()
        ((model(x) - y).square().mean() + ll.regulariser(model)).backward()
        optimizer.step()
        after(t)


def budget_of_eq_12(t, total, tinit, tfinal, b_0, b_T):
    """With the code's numerator, t − t_i; the paper has t − t_i − t_f, and jumps at t_i."""
    if t <= tinit:
        return b_0
    if t >= total - tfinal:
        return b_T
    return int(b_T + (b_0 - b_T) * (1 - (t - tinit) / (total - tinit - tfinal)) ** 3)


SCHEDULES = settings(
    every=dict(total=15, tinit=2, tfinal=4, delta_t=1),
    sparse=dict(total=17, tinit=3, tfinal=3, delta_t=3),
    from_the_start=dict(total=9, tinit=0, tfinal=1, delta_t=2),
)
BETAS = dict(beta1=0.8, beta2=0.6)


@SCHEDULES
def test_prunes_as_algorithm_1(hyper):
    """Entry by entry in Python floats, from the tensors and gradients that the run shows."""
    hyper = dict(hyper)
    total = hyper.pop("total")
    model, own = attach(init_r=4, target_r=2, **BETAS, **hyper)
    smoothed, uncertainty, chosen, nonzero, before = {}, {}, {}, [], {}

    def entry_scores(layer, key):
        """Eqs. 8–11, updated in place."""
        out = []
        for i, (w, g) in enumerate(
            zip(before[layer, key].flatten(), own[layer][key].grad.flatten())
        ):
            at = (layer, key, i)
            now = abs(float(w) * float(g))
            smoothed[at] = 0.8 * smoothed.get(at, 0.0) + 0.2 * now
            variation = abs(now - smoothed[at])
            uncertainty[at] = 0.6 * uncertainty.get(at, 0.0) + 0.4 * variation
            out.append(smoothed[at] * uncertainty[at])
        return out

    def check(t):
        if t < total - hyper["tfinal"]:
            scores = {}
            for layer in LAYERS:
                E, A, B = (entry_scores(layer, key) for key in "EAB")
                d_in, d_out = len(A) // 4, len(B) // 4
                for k in range(4):
                    scores[layer, k] = (
                        E[k] + sum(A[k * d_in : (k + 1) * d_in]) / d_in + sum(B[k::4]) / d_out
                    )
            check.scores = scores
        last = t == total - hyper["tfinal"]
        if last or (hyper["tinit"] < t < total - hyper["tfinal"] and t % hyper["delta_t"] == 0):
            b = budget_of_eq_12(t, total, hyper["tinit"], hyper["tfinal"], 12, 6)
            best = sorted(check.scores, key=check.scores.get, reverse=True)[:b]
            chosen[t] = set(best)
        acting = {(n, k) for n in LAYERS for k in range(4) if own[n]["E"][k] != 0}
        nonzero.append(len(acting))
        if t in chosen:
            assert acting == chosen[t], f"step {t}"
        if t > total - hyper["tfinal"]:
            assert acting == chosen[total - hyper["tfinal"]], f"step {t} after the last choice"

    # The tensor after the optimizer's step and before the pruning.
    optimizer = torch.optim.SGD(ll.param_groups(model, lr=0.3))
    optimizer.register_step_post_hook(
        lambda *_: before.update(
            {(n, key): own[n][key].detach().clone() for n in LAYERS for key in "ABE"}
        )
    )
    train(model, total, total, check, optimizer=optimizer)
    assert len(chosen) > 2 and nonzero[-1] == 6
    assert len({n for n, _ in chosen[total - hyper["tfinal"]]}) > 1
    between = [t for t in range(hyper["tinit"] + 1, total) if t not in chosen]
    if hyper["delta_t"] > 1:
        assert any(nonzero[t] == 12 for t in between), "pruned triplets never come back"


def test_importance_weighs_all_layers_together():
    """A layer that the loss feels little loses its triplets to the others, all of them even."""
    model, own = attach(init_r=3, target_r=1, tinit=1, tfinal=2)
    model.c.weight.data.mul_(0)
    with torch.no_grad():
        own["c"]["A"].zero_()
    train(model, 12, 12)
    kept = [int((own[n]["E"] != 0).sum()) for n in LAYERS]
    assert sum(kept) <= 3 and 0 in kept


def test_without_tfinal_the_last_step_meets_the_target():
    model, own = attach(init_r=4, target_r=1, delta_t=100)
    train(model, 8, 8)
    assert sum(int((own[n]["E"] != 0).sum()) for n in LAYERS) == 3
    assert [row["rank"] for row in ll.diagnose(model).rows] == [
        int((own[n]["E"] != 0).sum()) for n in LAYERS
    ]


def peft_net(hyper, total, orth=0.5):
    """PEFT's model with the tensors of ours, in float64, and its layers."""
    config = peft.AdaLoraConfig(
        target_modules=LAYERS,
        lora_alpha=16,
        deltaT=hyper.get("delta_t", 1),
        total_step=total,
        orth_reg_weight=orth,
        **{k: v for k, v in hyper.items() if k != "delta_t"},
    )
    other = peft.get_peft_model(Net().float(), config).double()
    base = Net()
    theirs = {n: other.base_model.model.get_submodule(n) for n in LAYERS}
    for n in LAYERS:
        theirs[n].base_layer.load_state_dict(base.get_submodule(n).state_dict())
        # Float64 bases turn it into a trained parameter.
        theirs[n].ranknum["default"].requires_grad_(False)
    return other, {
        n: dict(A=x.lora_A["default"], B=x.lora_B["default"], E=x.lora_E["default"])
        for n, x in theirs.items()
    }


@SCHEDULES
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_trains_and_prunes_as_peft(hyper, kind):
    """All tensors of every step; PEFT's own order of calls."""
    hyper = dict(hyper)
    total = hyper.pop("total")
    hyper = dict(init_r=4, target_r=2, **BETAS, **hyper)
    model, own = attach(**hyper)
    other, theirs = peft_net(hyper, total)
    for n in LAYERS:
        for key in "ABE":
            theirs[n][key].data.copy_(own[n][key].detach().view_as(theirs[n][key]))
    make = {"SGD": torch.optim.SGD, "AdamW": torch.optim.AdamW}[kind]
    lr = {"SGD": 0.3, "AdamW": 0.01}[kind]
    parameters = [p for n in LAYERS for p in theirs[n].values()]
    optimizer = make([{"params": parameters, "weight_decay": 0.0}], lr=lr)

    def step_theirs(t):
        x, y = batch(t)
        optimizer.zero_grad()
        ((other(x) - y).square().mean() + penalty(theirs)).backward()
        optimizer.step()
        other.base_model.update_and_allocate(t)
        for n in LAYERS:
            for key in "ABE":
                want = theirs[n][key].detach().view_as(own[n][key])
                if want.any():
                    assert_close(own[n][key], want, 1e-9, f"step {t}, {n}.{key}")
                assert torch.equal(own[n][key] == 0, want == 0), f"step {t}, {n}.{key}"

    train(model, total, total, step_theirs, optimizer=make(ll.param_groups(model, lr=lr)))
    assert sum(int((own[n]["E"] != 0).sum()) for n in LAYERS) == 6


def penalty(layers, weight=0.5):
    """The authors' penalty: the Frobenius norm, not squared, over all A and B in the mean."""
    terms = []
    for own in layers.values():
        for M in (own["A"] @ own["A"].T, own["B"].T @ own["B"]):
            terms.append(((M - torch.eye(len(M), dtype=M.dtype)) ** 2).sum().sqrt())
    return weight * sum(terms) / len(terms)


def test_the_penalty_is_the_mean_over_all_layers():
    model, own = attach(init_r=4, target_r=2, orth_reg_weight=0.3)
    assert_close(ll.regulariser(model), penalty(own, 0.3))
    ll.regulariser(model).backward()
    grads = {(n, key): own[n][key].grad.clone() for n in LAYERS for key in "AB"}
    wanted = torch.autograd.grad(penalty(own, 0.3), [own[n][k] for n, k in grads])
    for got, want in zip(grads.values(), wanted):
        assert_close(got, want)
    assert all(own[n]["E"].grad is None for n in LAYERS)
    # Orthonormal factors are where it vanishes, with a finite gradient.
    with torch.no_grad():
        for n in LAYERS:
            own[n]["A"].copy_(torch.eye(*own[n]["A"].shape))
            own[n]["B"].copy_(torch.eye(*own[n]["B"].shape))
    model.zero_grad()
    total = ll.regulariser(model)
    total.backward()
    assert total == 0 and all(own[n][k].grad.isfinite().all() for n in LAYERS for k in "AB")


def test_the_penalty_is_pefts():
    model, own = attach(init_r=4, target_r=2)
    other, theirs = peft_net(dict(init_r=4, target_r=2), 10)
    for n in LAYERS:
        for key in "AB":
            theirs[n][key].data.copy_(own[n][key].detach())

    # PEFT adds it to a `loss` of the model's output.
    other.base_model.model.forward = lambda x: SimpleNamespace(loss=x.new_zeros(()))
    assert_close(ll.regulariser(model), other.base_model(inputs(24)).loss)


def test_the_penalty_is_in_float32_under_autocast():
    model = adapted("adalora", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = ll.regulariser(model)
    assert torch.equal(inside, ll.regulariser(model)) and inside.dtype == torch.float32


def test_a_resumed_run_prunes_alike(tmp_path):
    hyper = dict(init_r=4, target_r=1, tinit=1, tfinal=3, delta_t=2)
    whole, own = attach(**hyper)
    train(whole, 12, 12)
    part, _ = attach(**hyper)
    train(part, 7, 12)
    ll.save(part, tmp_path / "x.safetensors")
    fresh = Net()
    ll.load(fresh, tmp_path / "x.safetensors")
    optimizer = torch.optim.SGD(ll.param_groups(fresh, lr=0.3))
    ll.schedule(fresh, optimizer, 12)
    for t in range(7, 12):
        x, y = batch(t)
        optimizer.zero_grad()
        ((fresh(x) - y).square().mean() + ll.regulariser(fresh)).backward()
        optimizer.step()
    for n in LAYERS:
        got = fresh.get_submodule(n).adapters["default"].tensors()
        assert all(torch.equal(got[key], own[n][key]) for key in own[n]), n


@settings(
    nothing_to_prune=(dict(init_r=8, target_r=8), "target_r=8 must be ≥ 1 and below init_r=8"),
    no_target=(dict(target_r=0), "target_r=0 must be ≥ 1 and below init_r=12"),
    beta=(dict(beta1=1.0), r"beta1=1.0 must be in \(0, 1\)"),
    beta_2=(dict(beta2=0.0), r"beta2=0.0 must be in \(0, 1\)"),
    interval=(dict(delta_t=0), "delta_t=0 must be ≥ 1"),
    penalty=(dict(orth_reg_weight=-0.1), "orth_reg_weight=-0.1 must be ≥ 0"),
    schedules=(dict(overrides={"b": dict(tinit=3)}), "layers tinit=0 and 3, and all share one"),
)
def test_what_cannot_work_is_refused(hyper):
    hyper, match = hyper
    with pytest.raises(ValueError, match=f"^adalora: .*{match}"):
        attach(**hyper)


def test_the_number_of_steps_is_asked_for_and_must_leave_room():
    model, _ = attach(tinit=4, tfinal=6)
    optimizer = torch.optim.SGD(ll.param_groups(model, lr=0.1))
    with pytest.raises(ValueError, match="adalora: the budget of triplets depends on .* total="):
        ll.schedule(model, optimizer)
    with pytest.raises(ValueError, match="adalora: tinit=4 and tfinal=6 leave no step of 10"):
        ll.schedule(model, optimizer, total=10)
    ll.schedule(model, optimizer, total=11)


def test_a_layer_without_a_gradient_is_named():
    model, _ = attach()
    model.a(inputs(24)).square().sum().backward()
    with pytest.raises(ValueError, match="adalora: b has no gradient to A .* exclude a layer"):
        ll.step(model, total=10)


def test_layers_may_have_ranks_of_their_own():
    """The budget is of the sums."""
    model, own = attach(init_r=4, target_r=2, overrides={"a": dict(init_r=6, target_r=1)})
    train(model, 9, 9)
    assert sum(int((own[n]["E"] != 0).sum()) for n in LAYERS) == 1 + 2 + 2
    assert own["a"]["E"].shape == (6,)
