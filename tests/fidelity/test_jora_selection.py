"""JORA's selection: which pairs turn, when they change, and what that does to the function."""

import json
from pathlib import Path

import hypothesis
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import strategies as st
from models import MLP
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import lora_lite as ll
from lora_lite.adapted import adapters
from lora_lite.checkpoint import digest
from lora_lite.ops.selection import PAIRINGS, explore, gumbel, moved_share, rebind
from lora_lite.shapes import unchecked
from lora_lite.variant import Layer, Step, configure, whole

DATA = Path(__file__).parents[1] / "data" / "jora"
INDEX = json.loads((DATA / "index.json").read_text())
SELECTION = load_file(DATA / INDEX["selection"]["file"])


def unordered(pairs):
    return {frozenset(pair) for pair in pairs.tolist()}


def used(tensors, side):
    return tensors[f"pairs_{side}"][tensors[f"active_{side}"]]


class Model(nn.Module):
    """Two layers, always the same ones."""

    def __init__(self, d_in=24, d_out=40, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(5)
        self.q_proj = nn.Linear(d_in, d_out, dtype=dtype)
        self.v_proj = nn.Linear(d_in, d_out, dtype=dtype)

    def forward(self, x):
        return self.q_proj(x) * self.v_proj(x).cos()


def adapted(seed=0, d_in=24, d_out=40, dtype=torch.float64, **hyper):
    """A model with JORA on it, and the first layer's tensors."""
    model = Model(d_in, d_out, dtype)
    ll.attach(model, "jora", seed=seed, dtype=dtype, **hyper)
    return model, model.q_proj.adapters.default.tensors()


def train(model, steps, optimizer=None, total=None, first=0):
    """Some steps, from the number `first` on, on noise whose energies drift."""
    if optimizer is None:
        optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
        ll.schedule(model, optimizer, total)
    d_in, dtype = model.q_proj.in_features, model.q_proj.weight.dtype
    for i in range(first, first + steps):
        x = torch.randn(8, d_in, dtype=dtype, generator=torch.Generator().manual_seed(i))
        x = x * (torch.arange(d_in) * 0.3 + i * 0.4).sin() * 2
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return optimizer


# Energies to pairs.


@pytest.mark.parametrize("case", INDEX["selection"]["cases"], ids=lambda c: c["case"])
def test_pairs_equal_the_golden_ones(case):
    energy = SELECTION[f"{case['case']}.energy"]
    stored = {
        key: SELECTION[f"{case['case']}.{case['strategy']}.{key}"] for key in ("pairs", "public")
    }
    pairs = PAIRINGS[case["strategy"]](energy, case["k"])
    assert unordered(pairs) == unordered(stored["pairs"])
    if case["public_is_prefix"]:
        # The public code stops early; as far as it goes, it agrees.
        public = stored["public"]
        assert unordered(pairs[: len(public)]) == unordered(public)


energies = st.lists(st.floats(2**-20, 2**20, width=32), min_size=2, max_size=20, unique=True)


@hypothesis.given(energies, st.integers(1, 10), st.randoms(use_true_random=False))
def test_pairs_are_disjoint_move_with_the_coordinates_and_ignore_the_scale(values, k, random):
    energy, k = torch.tensor(values), min(k, len(values) // 2)
    order = list(range(len(values)))
    random.shuffle(order)
    for pair_up in PAIRINGS.values():
        pairs = pair_up(energy, k)
        assert pairs.shape == (k, 2) and len(pairs.unique()) == 2 * k
        assert torch.equal(pair_up(energy * 2**-30, k), pairs)
        # Coordinate order[i] moves to i.
        moved = pair_up(energy[order], k)
        assert torch.equal(torch.tensor(order)[moved], pairs)


@hypothesis.given(energies, st.integers(1, 10))
def test_consecutive_is_the_greedy_search_by_products(values, k):
    k = min(k, len(values) // 2)
    found, free = [], set(range(len(values)))
    for _ in range(k):
        best = max(
            ((i, j) for i in free for j in free if i < j), key=lambda p: values[p[0]] * values[p[1]]
        )
        found.append(best)
        free -= set(best)
    got = PAIRINGS["consecutive"](torch.tensor(values, dtype=torch.float64), k)
    products = lambda pairs: [values[i] * values[j] for i, j in pairs]
    assert products(got.tolist()) == products(found)


def test_of_equal_energies_the_lower_index_goes_first():
    energy = torch.tensor([1.0, 2, 2, 1, 2, 1, 0])
    assert PAIRINGS["consecutive"](energy, 3).tolist() == [[1, 2], [4, 0], [3, 5]]
    assert PAIRINGS["high_low"](energy, 3).tolist() == [[1, 6], [2, 5], [4, 3]]
    assert PAIRINGS["consecutive"](torch.zeros(5), 2).tolist() == [[0, 1], [2, 3]]


def test_gumbel_noise_draws_by_energy_and_ignores_the_scale():
    energy = torch.tensor([8.0, 4, 2, 1, 1e-3])
    seeded = lambda i: gumbel(5, torch.Generator().manual_seed(i))
    draws = [explore(energy, seeded(i), 1.0).argmax() for i in range(2000)]
    share = torch.stack(draws).bincount(minlength=5) / 2000
    torch.testing.assert_close(share, energy / energy.sum(), atol=0.03, rtol=0)
    one, small = (explore(energy * c, seeded(0), 1.0) for c in (1, 2**-20))
    assert torch.equal(one.argsort(), small.argsort())
    cold = explore(energy, seeded(0), 1e-3)
    assert cold.argsort(descending=True).tolist() == [0, 1, 2, 3, 4]


# Pairs to slots.


@hypothesis.given(st.data())
def test_a_pair_that_stays_keeps_its_slot_and_order(data):
    d, S = 9, 4
    pairs, active = torch.full((S, 2), -1), torch.zeros(S, dtype=torch.bool)
    for _ in range(4):
        k = data.draw(st.integers(1, S))
        chosen = torch.tensor(data.draw(st.permutations(range(d)))[: 2 * k]).view(k, 2)
        if data.draw(st.booleans()) and active.any():
            kept = pairs[active][:1]
            apart = [pair for pair in chosen.tolist() if not set(pair) & set(kept[0].tolist())]
            chosen = torch.tensor([*apart, kept[0].flip(0).tolist()])
        slots = rebind(pairs, active, chosen)
        assert unordered(slots[slots[:, 0] >= 0]) == unordered(chosen)
        assert (slots >= 0).all(1).sum() == len(chosen)
        for slot, before in enumerate(pairs.tolist()):
            if active[slot] and frozenset(before) in unordered(chosen):
                assert slots[slot].tolist() == before
        pairs, active = slots, slots[:, 0] >= 0


def test_the_moved_share_is_what_rotations_that_left_did():
    torch.manual_seed(0)
    x = torch.randn(50, 9, dtype=torch.float64)
    pairs, phi = torch.tensor([[4, 0], [2, 7], [-1, -1]]), torch.tensor([0.7, -0.3, 9.0]).double()
    left = torch.tensor([True, False, False])
    y = x.clone()
    c, s = phi[0].cos(), phi[0].sin()
    y[:, 4], y[:, 0] = c * x[:, 4] + s * x[:, 0], c * x[:, 0] - s * x[:, 4]
    got = moved_share(x.square().mean(0).float(), pairs, phi, left)
    torch.testing.assert_close(got, ((y - x).norm() / x.norm()).square().float())


# Statistics.


def test_energies_equal_the_golden_ones():
    case, stored = INDEX["ema"], load_file(DATA / INDEX["ema"]["file"])
    layer = nn.Linear(case["d_in"], case["d_out"])
    ll.attach(layer, "jora", ema_beta=case["ema_beta"], k=2)
    for i in range(case["batches"]):
        layer(stored[f"x{i}"]).backward(stored[f"gy{i}"])
        tensors = adapters(layer)[0][2].tensors()
        for ours, golden in (("ema_col", "col_ema"), ("ema_row", "row_ema")):
            torch.testing.assert_close(tensors[ours], stored[f"{golden}{i}"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_energies_are_float32_whatever_the_layer_is(dtype):
    model, _ = adapted(dtype=torch.float32, ema_beta=0.0)
    model.to(dtype)
    model.q_proj.adapters.default.to(torch.float32)
    x = (torch.randn(64, 24) * 200).to(dtype)
    model.q_proj(x).sum().backward()
    tensors = model.q_proj.adapters.default.tensors()
    assert tensors["ema_col"].dtype == torch.float32
    torch.testing.assert_close(tensors["ema_col"], x.double().square().mean(0).float())
    assert torch.equal(tensors["ema_row"], torch.ones(40))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_leaves_the_energies_alone(bad):
    model, tensors = adapted()
    train(model, 2)
    before = {key: tensors[key].clone() for key in ("ema_row", "ema_col")}
    x = torch.randn(4, 24, dtype=torch.float64)
    x[1, 2] = bad
    model(x).sum().backward()
    model(torch.zeros(0, 24, dtype=torch.float64)).sum().backward()
    assert all(torch.equal(tensors[key], t) for key, t in before.items())


def test_only_a_selection_by_energy_gathers_them():
    for hyper in (dict(selection="random"), dict(selection="none"), dict(k=0), dict(S_L=0, S_R=0)):
        model, tensors = adapted(**hyper)
        assert not [key for key in tensors if "ema" in key or "churn" in key]
        assert not configure("jora", **hyper).scheduled()
        assert not configure("jora", **hyper).observes


# Schedules.


@pytest.mark.parametrize("case", INDEX["schedule"]["allowed"], ids=str)
def test_the_warm_up_equals_the_golden_one(case):
    hyper = {key: case[key] for key in ("k", "warmup_steps", "warmup_ratio")}
    v = configure("jora", **hyper)
    got = [v.allowed(step, case["total_steps"]) for step in case["steps"]]
    assert got == case["allowed"]


@pytest.mark.parametrize("case", INDEX["schedule"]["temperature"], ids=str)
def test_the_temperature_equals_the_golden_one(case):
    hyper = dict(ecd_temp_start=case["start"], ecd_temp_end=case["end"])
    v = configure("jora", ecd_temp_annealing=True, **hyper)
    got = [v.annealed(step, case["total"]) for step in case["steps"]]
    assert got == pytest.approx(case["temperature"], rel=1e-12)


@pytest.mark.parametrize("selection", ["topk_ema", "random"])
def test_pairs_join_as_the_warm_up_allows(selection):
    model, tensors = adapted(selection=selection, warmup_ratio=0.5, k=8, S_L=6, S_R=6)
    counts = lambda: [int(tensors[f"active_{side}"].sum()) for side in "LR"]
    assert counts() == [1, 1]
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
    ll.schedule(model, optimizer, total=16)
    seen, before = [], {}
    for _ in range(9):
        train(model, 1, optimizer)
        seen.append(counts())
        pairs = {side: unordered(used(tensors, side)) for side in "LR"}
        if selection == "random":
            assert all(before.get(side, set()) <= pairs[side] for side in "LR")
        before = pairs
    assert [sum(n) for n in seen] == [2, 2, 3, 4, 5, 6, 7, 8, 8]
    assert all(abs(left - right) <= 1 for left, right in seen)


def test_schedules_count_optimizer_steps_and_energies_backwards():
    model, tensors = adapted(update_interval=2, ema_beta=0.5)
    optimizer = torch.optim.SGD(ll.param_groups(model, lr=0.0))
    ll.schedule(model, optimizer)
    start, xs = tensors["pairs_R"].clone(), torch.randn(6, 5, 24, dtype=torch.float64)
    for i, x in enumerate(xs):
        model(x).sum().backward()
        if i % 3 == 2:  # three micro-batches a step
            assert torch.equal(tensors["pairs_R"], start)
            optimizer.step()
    assert not torch.equal(tensors["pairs_R"], start)
    energy = sum(0.5 ** (6 - i) * x.square().mean(0) for i, x in enumerate(xs))
    torch.testing.assert_close(tensors["ema_col"], energy.float(), rtol=1e-5, atol=0)
    assert unordered(used(tensors, "R")) == unordered(PAIRINGS["consecutive"](energy, 4))


def test_what_a_schedule_needs_is_asked_for():
    for hyper, what in (
        (dict(warmup_ratio=0.1), "warmup_ratio=0.1"),
        (dict(selection="random", warmup_ratio=0.2), "warmup_ratio=0.2"),
        (dict(ecd_temp_annealing=True, selection="none"), "ecd_temp_annealing=True"),
    ):
        model, _ = adapted(**hyper)
        with pytest.raises(ValueError, match=f"jora: {what} depends on the number of optimizer"):
            ll.step(model)
        ll.step(model, total=10)
    for hyper in (
        dict(warmup_steps=3),
        dict(selection="none", warmup_ratio=0.1),
        dict(ecd_temp_annealing=True, magnitude="none"),
    ):
        ll.step(adapted(**hyper)[0])


def test_a_selection_that_nobody_advances_warns():
    model, _ = adapted()
    optimizer = torch.optim.SGD(ll.param_groups(model, lr=0.1))
    optimizer.step()
    with pytest.warns(UserWarning, match=r"nobody advances: call ll.schedule\(model, optimizer\)"):
        optimizer.step()


# What an update does.


@pytest.mark.parametrize("strategy", PAIRINGS)
@pytest.mark.parametrize("sides", [{}, dict(single_sided="left"), dict(single_sided="right")])
def test_all_pairs_turn_the_highest_energies_and_are_disjoint(strategy, sides):
    model, tensors = adapted(pairing_strategy=strategy, k=5, ema_beta=0.8, **sides)
    optimizer, v = train(model, 1), configure("jora", k=5, **sides)
    for i in range(12):
        train(model, 1, optimizer, first=i)
        for side, name, k in zip("LR", ("ema_row", "ema_col"), v.active_pairs(24, 40)):
            if side in v.sides:
                pairs = used(tensors, side)
                assert len(pairs) == k and len(pairs.unique()) == 2 * k
                want = PAIRINGS[strategy](tensors[name], k)
                assert unordered(pairs) == unordered(want)
                idle = tensors[f"pairs_{side}"][~tensors[f"active_{side}"]]
                assert (idle == -1).all()


@pytest.mark.parametrize(
    "hyper",
    [
        dict(),
        dict(core="block", max_angle=0.5, magnitude="ecd_tanh"),
        dict(core="lowrank", rotation_param="angle", magnitude="none", k=6),
        dict(warmup_steps=6, use_gumbel=True, gumbel_tau=0.01, single_sided="left"),
    ],
    ids=str,
)
def test_an_update_moves_the_function_by_the_pairs_that_leave_alone(hyper):
    model, tensors = adapted(zero_init_core=False, ema_beta=0.7, S_L=8, S_R=8, **hyper)
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
    x = torch.randn(5, 24, dtype=torch.float64)
    entered = returned = stayed = 0
    gone = set()
    for i in range(16):
        train(model, 1, optimizer, first=i % 3)  # nobody steps the schedule
        with torch.no_grad():
            for side in configure("jora", **hyper).sides:
                tensors[f"theta_{side}"].normal_()
        before = {key: t.detach().clone() for key, t in tensors.items()}
        ll.step(model, optimizer=optimizer)
        after = {key: t.detach().clone() for key, t in tensors.items()}
        y = model.q_proj(x)
        with torch.no_grad():
            for side in configure("jora", **hyper).sides:
                old = {
                    frozenset(p) for p in before[f"pairs_{side}"][before[f"active_{side}"]].tolist()
                }
                new = unordered(used(tensors, side))
                entered, stayed = entered + len(new - old), stayed + len(new & old)
                returned += len({(side, p) for p in new - old} & gone)
                gone |= {(side, p) for p in old - new}
                leaves = torch.tensor(
                    [frozenset(p) not in new for p in before[f"pairs_{side}"].tolist()]
                )
                kept = before[f"active_{side}"] & ~leaves
                assert torch.equal(after[f"theta_{side}"][kept], before[f"theta_{side}"][kept])
                assert torch.equal(after[f"pairs_{side}"][kept], before[f"pairs_{side}"][kept])
                turned = torch.where(leaves, 0.0, before[f"theta_{side}"])
                for key, value in (("theta", turned), ("pairs", before[f"pairs_{side}"])):
                    tensors[f"{key}_{side}"].copy_(value)
                tensors[f"active_{side}"].copy_(before[f"active_{side}"])
            want = model.q_proj(x)
            for key, value in after.items():
                tensors[key].copy_(value)
        torch.testing.assert_close(y, want, rtol=1e-12, atol=1e-13)
    assert entered > 8 and returned > 2 and stayed > 8, "the test saw too little"


def test_a_pair_that_enters_has_fresh_moments_and_one_that_stays_keeps_its_own():
    model, tensors = adapted(ema_beta=0.8)
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
    fresh = kept = 0
    for i in range(12):
        train(model, 1, optimizer, first=i)
        before = {key: t.clone() for key, t in tensors.items()}
        moments = {
            side: {k: t.clone() for k, t in optimizer.state[tensors[f"theta_{side}"]].items()}
            for side in "LR"
        }
        ll.step(model, optimizer=optimizer)
        for side in "LR":
            state = optimizer.state[tensors[f"theta_{side}"]]
            same = (tensors[f"pairs_{side}"] == before[f"pairs_{side}"]).all(1)
            stays = same & before[f"active_{side}"]
            enters = tensors[f"active_{side}"] & ~stays
            for moment in ("exp_avg", "exp_avg_sq"):
                assert not state[moment][enters].any()
                assert torch.equal(state[moment][~enters], moments[side][moment][~enters])
            assert not tensors[f"theta_{side}"][enters].any()
            fresh, kept = fresh + int(enters.sum()), kept + int(stays.sum())
    assert fresh > 5 and kept > 5


def test_churn_counts_what_entered_left_and_moved():
    model, tensors = adapted(ema_beta=0.3, zero_init_core=False)
    optimizer = train(model, 1)
    for side in "LR":
        tensors[f"churn_{side}"].zero_()
        entered = left = moved = 0
        for i in range(8):
            before = {key: t.detach().clone() for key, t in tensors.items()}
            train(model, 1, optimizer, first=i)
            # θ as the update met it: the optimizer's step came first, and kept pairs keep it.
            old, new = (
                unordered(before[f"pairs_{side}"][before[f"active_{side}"]]),
                unordered(used(tensors, side)),
            )
            entered, left = entered + len(new - old), left + len(old - new)
            assert tensors[f"churn_{side}"][:2].tolist() == [entered, left]
            step = float(tensors[f"churn_{side}"][2]) - moved
            assert (step > 0) == bool(old - new)
            moved += step
        assert entered == left > 0


def test_layers_without_energies_keep_their_pairs():
    model, _ = adapted()
    optimizer = torch.optim.SGD(ll.param_groups(model, lr=0.1))
    ll.schedule(model, optimizer)
    other = model.v_proj.adapters.default.tensors()
    before = {key: t.clone() for key, t in other.items()}
    for _ in range(3):
        model.q_proj(torch.randn(4, 24, dtype=torch.float64)).sum().backward()
        optimizer.step()
    for key, t in before.items():
        assert torch.equal(other[key], t), key


# One-shot allocation, and pairs that freeze.


@pytest.mark.parametrize(
    "hyper",
    [
        dict(zero_init_core=False),
        dict(core="block", zero_init_core=False, single_sided="right"),
        dict(core="selective", magnitude="none", d_out=24),
        dict(core="coupled", magnitude="none", d_out=24, pairing_strategy="high_low"),
    ],
    ids=str,
)
def test_one_shot_allocation_never_moves_the_function(hyper):
    model, tensors = adapted(t_stat=4, k=6, **hyper)
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
    x = torch.randn(5, 24, dtype=torch.float64)
    sides = configure("jora", single_sided=hyper.get("single_sided", "none")).sides
    pairs = {}
    for i in range(1, 13):
        train(model, 1, optimizer, first=i)
        y = model(x)
        ll.step(model, optimizer=optimizer)
        assert torch.equal(model(x), y)
        assert bool(tensors["frozen"]) == (i >= 4)
        for side in sides:
            if i < 4:
                assert (
                    not tensors[f"active_{side}"].any() and (tensors[f"pairs_{side}"] == -1).all()
                )
            pairs.setdefault((side, i >= 4), tensors[f"pairs_{side}"].clone())
            assert torch.equal(tensors[f"pairs_{side}"], pairs[side, i >= 4])
    assert sum(int(tensors[f"active_{side}"].sum()) for side in sides) == 6
    if "support" in tensors:
        both = torch.cat([used(tensors, side) for side in sides])
        assert (
            sorted(tensors["support"][tensors["support"] >= 0].tolist()) == both.unique().tolist()
        )
        assert tensors["delta" if hyper["core"] == "selective" else "M"].any(), "trains afterwards"
    assert all(tensors[f"theta_{side}"].any() for side in sides)


@pytest.mark.parametrize("core", ["selective", "coupled"])
def test_selected_cores_rest_until_their_pairs_are_chosen(core):
    model, tensors = adapted(d_out=24, core=core, magnitude="none", t_stat=3)
    x = torch.randn(5, 24, dtype=torch.float64)
    with ll.disabled(model):
        base = model(x)
    optimizer = train(model, 2)
    assert torch.equal(model(x), base) and (tensors["support"] == -1).all()
    train(model, 3, optimizer)
    assert not torch.equal(model(x), base)


def test_an_allocation_waits_for_energies():
    model, tensors = adapted(t_stat=2)
    model.eval()
    optimizer = train(model, 3)
    assert not tensors["frozen"] and not tensors["active_L"].any()
    model.train()
    train(model, 1, optimizer)
    assert tensors["frozen"] and tensors["active_L"].sum() == 4


def test_pairs_freeze_after_the_warm_up():
    model, tensors = adapted(warmup_steps=5, pairs_freeze_after_warmup=True, ema_beta=0.3)
    optimizer = train(model, 4)
    assert not tensors["frozen"]
    train(model, 1, optimizer)
    assert tensors["frozen"]
    before = {key: tensors[key].clone() for key in ("pairs_L", "pairs_R", "churn_L", "churn_R")}
    theta = tensors["theta_R"].clone()
    train(model, 6, optimizer, first=7)
    assert all(torch.equal(tensors[key], t) for key, t in before.items())
    assert not torch.equal(tensors["theta_R"], theta)


def test_random_pairs_stay():
    model, tensors = adapted(selection="random")
    before = {key: tensors[key].clone() for key in ("pairs_L", "pairs_R", "active_L", "active_R")}
    theta = tensors["theta_L"].clone()
    train(model, 5)
    assert all(torch.equal(tensors[key], t) for key, t in before.items())
    on = before["active_L"]
    assert ((tensors["theta_L"] != theta) == on).all()


def test_random_pairs_join_at_angle_zero():
    hyper = dict(selection="random", warmup_steps=8, zero_init_core=False, theta_init_std=0.5)
    model, tensors = adapted(**hyper)
    x = torch.randn(5, 24, dtype=torch.float64)
    for _ in range(9):
        y = model(x)
        ll.step(model)
        assert torch.equal(model(x), y)
    assert tensors["active_L"].sum() == 4


def test_gumbel_explores_by_seed_layer_and_step():
    def pairs(seed, steps=3):
        model, _ = adapted(seed=seed, use_gumbel=True, ema_beta=0.0, S_L=3, S_R=12, k=12)
        optimizer = torch.optim.SGD(ll.param_groups(model, lr=0.0))
        ll.schedule(model, optimizer)
        out = []
        for _ in range(steps):
            model(torch.ones(2, 24, dtype=torch.float64)).sum().backward()
            optimizer.step()
            out += [unordered(a.tensors()["pairs_R"]) for _, _, a in adapters(model)]
        return out

    first = pairs(0)
    assert first == pairs(0) != pairs(1)
    assert len({frozenset(p) for p in first}) == 6, "every layer and step draws anew"


# Temperature.


@pytest.mark.parametrize("magnitude", ["oer_softmax", "ecd_tanh"])
def test_annealing_leaves_a_fresh_adapter_the_identity(magnitude):
    hyper = dict(magnitude=magnitude, ecd_temp_annealing=True, S_L=0, S_R=0)
    model, tensors = adapted(**hyper)
    x = torch.randn(5, 24, dtype=torch.float64)
    with ll.disabled(model):
        base = model(x)
    norms, tensors["g_mag"].data[0] = tensors["row_norm"], 0.0
    for number in range(1, 9):
        ll.step(model, total=6)
        want = 5 - 4 * min(number / 6, 1)
        assert float(tensors["temperature"]) == pytest.approx(want, rel=1e-6)
        assert torch.equal(model(x), base)
    nn.init.normal_(tensors["g_mag"])
    v = configure("jora", **hyper)
    hot = v.scale(**tensors | dict(temperature=torch.tensor(5.0)))
    cold = v.scale(**tensors)
    assert hot.abs().sum() < cold.abs().sum()
    for s in (hot, cold):
        energy = ((1 + s) * norms).square().sum()
        torch.testing.assert_close(energy, norms.square().sum(), rtol=1e-6, atol=0)


def test_the_function_follows_the_annealed_temperature():
    hyper = dict(S_L=0, S_R=0, ecd_temp_start=4.0, ecd_temp_end=2.0)
    model, tensors = adapted(ecd_temp_annealing=True, **hyper)
    plain, others = adapted(oer_temperature=3.0, S_L=0, S_R=0)
    nn.init.normal_(tensors["g_mag"])
    others["g_mag"].data.copy_(tensors["g_mag"].data)
    x = torch.randn(5, 24, dtype=torch.float64)
    for _ in range(5):
        ll.step(model, total=10)
    assert torch.equal(model.q_proj(x), plain.q_proj(x))


# The device is never waited for.


@pytest.mark.parametrize(
    "hyper",
    [
        dict(use_gumbel=True),
        dict(core="selective", magnitude="none", t_stat=1, pairing_strategy="high_low"),
        dict(selection="random", warmup_ratio=0.5),
        dict(warmup_steps=3, pairs_freeze_after_warmup=True, ecd_temp_annealing=True),
    ],
    ids=str,
)
def test_nothing_depends_on_numbers_on_the_device(hyper):
    """On the meta device there are no numbers: whatever asks for one fails."""
    v = configure("jora", **hyper)
    _, tensors = adapted(d_out=24, **hyper)
    tensors = {key: t.detach().to("meta") for key, t in tensors.items()}
    with torch.no_grad():
        if v.observes:
            v.observe(torch.ones(5, 24, device="meta"), torch.ones(5, 24, device="meta"), **tensors)
        v.step_all([Layer(v, tensors, Step(3, 10, "q_proj", 0))] * 2)


# State.


@pytest.mark.parametrize(
    "hyper",
    [
        dict(ema_beta=0.5, use_gumbel=True, warmup_ratio=0.4, update_interval=2),
        dict(t_stat=6, ecd_temp_annealing=True),
        dict(selection="random", warmup_steps=9, magnitude="ecd_tanh", ecd_temp_annealing=True),
        dict(warmup_steps=7, pairs_freeze_after_warmup=True, core="block"),
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_one(hyper, tmp_path):
    def start():
        model, tensors = adapted(dtype=torch.float32, **hyper)
        optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
        return model, tensors, optimizer, ll.schedule(model, optimizer, total=12)

    def run(model, optimizer, steps):
        for i in steps:
            train(model, 1, optimizer, first=i)

    model, tensors, optimizer, handle = start()
    run(model, optimizer, range(5))
    ll.save(model, tmp_path / "a.safetensors")
    torch.save(optimizer.state_dict(), tmp_path / "o.pt")
    run(model, optimizer, range(5, 12))

    again = Model(dtype=torch.float32)
    ll.load(again, tmp_path / "a.safetensors")
    resumed = torch.optim.AdamW(ll.param_groups(again, lr=1e-2))
    resumed.load_state_dict(torch.load(tmp_path / "o.pt"))
    ll.schedule(again, resumed, total=12)
    run(again, resumed, range(5, 12))
    for (name, one), other in zip(model.state_dict().items(), again.state_dict().values()):
        assert torch.equal(one, other), name


def rewrite(path, tensors):
    """The file with other tensors, as if they had been saved."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["lora-lite"]) | dict(digest=digest(tensors))
    save_file(tensors, path, metadata={"lora-lite": json.dumps(header)})


def test_pairs_that_no_layer_can_have_are_refused_at_load(tmp_path):
    path = tmp_path / "a.safetensors"
    model, _ = adapted(k=4)
    ll.save(model, path)
    good = load_file(path)
    for change, message in (
        (dict(pairs_L=[[0, 1], [1, 2]]), "pairs_L that overlap or are not of coordinates 0 … 39"),
        (dict(pairs_R=[[3, 3], [1, 2]]), "pairs_R that overlap"),
        (dict(pairs_R=[[3, 24], [1, 2]]), "pairs_R that overlap or are not of coordinates 0 … 23"),
        (dict(pairs_R=[[3, -2], [1, 2]]), "pairs_R that overlap"),
        (dict(pairs_R=[[3, -1], [1, 2]]), "pairs_R that overlap"),
        (dict(pairs_R=[[-1, -1], [1, 2]]), "active_R at slots that hold no pair"),
        (
            dict(pairs_R=[[3, 4], [1, 2], [5, 6]], active_R=[True] * 3),
            "active_R beyond its first 2 slots, where no pair turns",
        ),
    ):
        bad = {key: t.clone() for key, t in good.items()}
        for key, rows in change.items():
            bad[f"q_proj.{key}"][: len(rows)] = torch.tensor(rows)
        rewrite(path, bad)
        with pytest.raises(ValueError, match=f"jora: q_proj has {message}"):
            ll.load(Model(), path)
    rewrite(path, good)
    ll.load(Model(), path)
    model, _ = adapted(d_out=24, k=4, core="coupled", magnitude="none", selection="random")
    ll.save(model, path)
    bad = load_file(path)
    bad["v_proj.support"][:2] = bad["v_proj.support"][:2].flip(0)
    rewrite(path, bad)
    with pytest.raises(ValueError, match="jora: v_proj has a support that is not its pairs'"):
        ll.load(Model(24, 24), path)


# Ranks.


def _rank(rank, world, folder, wrap):
    torch.set_num_threads(1)
    if world > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/{wrap}", rank=rank, world_size=world
        )
    with unchecked():
        tensors = _train_on_its_share(rank, world, wrap)
    torch.save(tensors, f"{folder}/{wrap}-{rank}.pt")
    if world > 1:
        torch.distributed.destroy_process_group()


def _train_on_its_share(rank, world, wrap):
    torch.manual_seed(0)
    model = parallel = MLP().double()
    hyper = dict(k=6, ema_beta=0.6, use_gumbel=True, gumbel_tau=0.1)
    ll.attach(model, "jora", seed=0, dtype=torch.float64, **hyper)
    if wrap == "DDP":
        # Rank 0's buffers are not sent around: the choice has to agree by itself.
        parallel = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
    if wrap == "FSDP2":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = torch.optim.AdamW(ll.param_groups(parallel, lr=1e-2))
    ll.schedule(parallel, optimizer)
    generator = torch.Generator().manual_seed(1)
    for i in range(20):
        x = torch.randn(8, 24, dtype=torch.float64, generator=generator)
        x = x * (torch.arange(24) * 0.3 + i * 0.4).sin()
        share = x.tensor_split(world)[rank]
        optimizer.zero_grad()
        parallel(share).square().mean().backward()
        optimizer.step()
    return {
        f"{name}.{key}": whole(tensor.detach())
        for name, _, adapter in adapters(model)
        for key, tensor in adapter.tensors().items()
    }


@pytest.mark.parametrize("wrap", ["DDP", "FSDP2"])
def test_ranks_choose_the_pairs_that_one_process_would(wrap, tmp_path):
    mp.start_processes(_rank, (2, str(tmp_path), wrap), nprocs=2, start_method="spawn")
    _rank(0, 1, str(tmp_path), "none")
    first, second, alone = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True)
        for name in (f"{wrap}-0", f"{wrap}-1", "none-0")
    )
    assert first.keys() == second.keys() == alone.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
        if "pairs" in key or "active" in key:
            assert torch.equal(first[key], alone[key]), key
        elif "ema_row" in key:
            # Each rank's loss is a mean over half the batch: its gradients are twice as large.
            torch.testing.assert_close(first[key], 4 * alone[key], rtol=1e-5, atol=0)
        elif first[key].is_floating_point():
            torch.testing.assert_close(first[key], alone[key], rtol=1e-5, atol=1e-9)
    assert any(first[key][:2].sum() > 20 for key in first if "churn" in key)


# Recipes.


def test_every_recipe_attaches_and_trains():
    from lora_lite.variants.jora import RECIPES

    for name in RECIPES:
        v = ll.JORA.recipe(name)
        model = Model(64, 64, torch.float32)
        ll.attach(model, v, seed=0)
        train(model, 2, total=10)
    assert ll.JORA.recipe() == ll.JORA.recipe("default") == ll.JORA()
    assert ll.JORA.recipe("design") == ll.JORA.recipe("paper")


def test_recipes_are_the_settings_of_the_documents():
    paper = ll.JORA.recipe("paper")
    assert (paper.S_L, paper.S_R, paper.k, paper.rotation_param) == (96, 96, 24, "cayley")
    assert (paper.selection, paper.ema_beta, paper.update_interval) == ("topk_ema", 0.95, 50)
    assert (paper.magnitude, paper.oer_temperature) == ("oer_softmax", 2.0)
    assert (paper.core, paper.zero_init_core, paper.max_angle) == ("diag", False, 0.1)
    readme = ll.JORA.recipe("readme")
    assert (readme.S_L, readme.k, readme.ema_beta, readme.clip) == (32, 8, 0.98, "tanh")
    assert not readme.zero_init_core
    both = ll.JORA.recipe("paper", "no_rotation", core="block")
    assert (both.S_L, both.S_R, both.k, both.core, both.ema_beta) == (0, 0, 24, "block", 0.95)
    assert ll.JORA.recipe("full_static").selection == "none"
    assert ll.JORA.recipe("random").selection == "random"


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(KeyError, match="jora has no recipe 'papre'; did you mean 'paper'"):
        ll.JORA.recipe("papre")
    with pytest.raises(ValueError, match="jora: k=-1 must be"):
        ll.JORA.recipe("paper", k=-1)
