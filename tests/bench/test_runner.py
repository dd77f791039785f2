"""The protocol: alike for all, seeded, one row a method."""

import pytest
import torch

import lora_lite as ll
from lora_lite.bench import digits, memory, rows, runner
from lora_lite.bench.runner import Method, Protocol
from lora_lite.bench.settings import ALSO, SETTINGS

SHORT = Protocol(seeds=2, steps=3, rates=(0.01, 0.03))


@pytest.fixture(scope="module")
def row() -> rows.Row:
    return runner.measure(Method(ll.variant.configure("lora", r=2)), SHORT)


def test_a_row_says_what_was_measured_and_how(row):
    assert row.label == "lora r=2 seeds=2 steps=3 rates=0.01+0.03"
    assert row.method == "lora r=2"
    assert row.hyperparameters["r"] == 2 and row.hyperparameters["alpha"] == 16.0
    assert [run.seed for run in row.runs] == [0, 1]
    assert [rate.lr for rate in row.sweep] == [0.01, 0.03]
    assert row.trainable_parameters == 2 * (4 * 2 * 192 + 2 * 2 * 480)
    assert row.lr == runner.choose(row.sweep).lr
    for run in row.runs:
        assert run.target_gain_pp == run.target_pct - row.base["target_pct"]
        lost = max(0, row.base["source_pct"] - run.source_pct)
        assert run.tradeoff_pp == pytest.approx(run.target_gain_pp - lost)


def test_a_row_comes_back_from_its_file(row, tmp_path):
    path = rows.write(row, tmp_path)
    assert path.relative_to(tmp_path).as_posix() == (
        "digits/lora_r=2_seeds=2_steps=3_rates=0.01+0.03.json"
    )
    assert rows.read(tmp_path, "digits") == [row]
    assert str(tmp_path.parent) not in path.read_text()


def test_a_seed_gives_the_same_model_again_and_another_seed_another():
    method, data = Method(ll.variant.configure("lora")), digits.target("train")
    first, again, other = (
        runner.train(method, SHORT, 0.01, seed, data)[0].state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(*(s["blocks.0.up_proj.adapters.default.B"] for s in (first, other)))


def test_the_seed_orders_the_batches_too():
    data = digits.target("train")
    one, other = (runner.train(Method(None), SHORT, 0.01, seed, data)[0] for seed in (0, 1))
    assert not torch.equal(one.head.weight, other.head.weight)


def test_the_best_accuracy_wins_then_the_lowest_loss():
    better, worse = rows.Rate(0.1, 90.0, 50.0, 0.4), rows.Rate(0.01, 89.0, 60.0, 0.1)
    tied, diverged = rows.Rate(0.3, 90.0, 50.0, 0.3), rows.Rate(1.0, 90.0, 50.0, None)
    assert runner.choose([worse, better]) == better
    assert runner.choose([diverged, better, tied, worse]) == tied


def test_a_best_rate_at_the_grids_end_is_marked(monkeypatch):
    score = iter([(50.0, 1.0), (9.0, 1.0)] * 4)
    monkeypatch.setattr(digits, "score", lambda model, split: next(score, (9.0, 1.0)))
    protocol = Protocol(seeds=1, steps=2, rates=(0.01, 0.03, 0.1))
    assert runner.measure(Method(None), protocol).lr_at_edge


def test_only_adapters_train_and_full_fine_tuning_trains_all():
    base, data = digits.base_model().state_dict(), digits.target("train")
    adapted = runner.train(Method(ll.variant.configure("lora")), SHORT, 0.01, 0, data)[0]
    tuned = runner.train(Method(None), SHORT, 0.01, 0, data)[0]
    for key, tensor in base.items():
        assert torch.equal(adapted.state_dict()[key], tensor), key
        # Softmax is blind to a bias of the keys.
        assert "k_proj.bias" in key or not torch.equal(tuned.state_dict()[key], tensor), key


def test_the_rate_is_chosen_on_validation_images_alone(monkeypatch):
    seen = []
    score = digits.score

    def spy(model, split):
        seen.append(len(split.labels))
        return score(model, split)

    monkeypatch.setattr(digits, "score", spy)
    runner.measure(Method(ll.variant.configure("lora")), SHORT)
    sweep, base, seeds = seen[:4], seen[4:6], seen[6:]
    assert sweep == [300] * 4
    assert base == [600] * 2
    assert seeds == [600] * 4


@pytest.mark.parametrize(
    "changes, label",
    [
        ({}, "oft"),
        (dict(block_size=8), "oft block_size=8"),
    ],
)
def test_labels_tell_every_difference(changes, label):
    method = Method(ll.variant.configure("oft", **changes))
    assert method.label(Protocol()) == label
    assert Method(method.variant, ["q_proj", "v_proj"]).label(Protocol(steps=7)) == (
        f"{label} targets=q_proj+v_proj steps=7"
    )


def test_long_labels_make_short_file_names_of_their_own():
    names = {rows.file_name("jora " + " ".join(f"a{i}={j}" for i in range(40))) for j in range(5)}
    assert len(names) == 5 and max(map(len, names)) <= 100


def test_every_setting_fits_the_model():
    for name, hyperparameters in [*SETTINGS.items(), *ALSO]:
        ll.plan(digits.base_model(), name, **hyperparameters)


@pytest.mark.parametrize(
    "field, value", [("seeds", 0), ("steps", 0), ("batch_size", -1), ("threads", 0), ("rates", ())]
)
def test_a_protocol_refuses_what_cannot_run(field, value):
    with pytest.raises(ValueError, match=field):
        Protocol(**{field: value})


def test_peak_memory_counts_what_is_alive_at_once():
    outside = torch.ones(2**20)

    def step():
        outside.add_(1)
        a = torch.ones(2**18)
        b = a + 1
        del a
        b.add_(1)
        b.view(2, -1).sum()
        c = torch.ones(2**17)
        del b
        return c

    mib = 2**20
    assert memory.peak_bytes(step, 0, "cpu") == 2 * mib
    assert memory.peak_bytes(step, 5 * mib, "cpu") == 7 * mib


def test_peak_memory_includes_what_backward_keeps():
    x = torch.randn(256, 1024, requires_grad=True)
    # exp keeps its output; the sums keep nothing.
    peak = memory.peak_bytes(lambda: x.exp().exp().exp().sum().backward(), 0, "cpu")
    assert 4 <= peak / x.untyped_storage().nbytes() <= 5.01


def test_resident_bytes_count_a_shared_storage_once():
    model = torch.nn.Linear(100, 100, bias=False)
    model.register_buffer("view", model.weight.detach()[:10])
    optimizer = torch.optim.SGD(model.parameters())
    assert memory.resident_bytes(model, optimizer) == 40_000
