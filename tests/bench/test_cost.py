"""The cost benchmark: what a row says, that PEFT is held to the same function, and the reports.
No time is asserted."""

import copy
import dataclasses
import math
from itertools import count

import pytest
import torch
from torch import nn

import lora_lite as ll
from lora_lite import shapes
from lora_lite.bench import cost, cost_report, cost_rows, rows, scaling, traffic, twins
from lora_lite.bench.workload import Shape, Side, llama
from lora_lite.cli import main
from lora_lite.variant import configure

SMALL = Shape(width=64, layers=1, tokens=8, length=4, dtype="float32")
BF16 = dataclasses.replace(SMALL, dtype="bfloat16")


@pytest.fixture(scope="module")
def work():
    return llama(SMALL, "cpu")


def case(name, track="all-linear", **hyperparameters):
    label = rows.label(name, hyperparameters)
    targets = cost.TRACKS.get(track, track)
    return cost.Case(configure(name, **hyperparameters), label, track, targets)


def measure(work, name, track="all-linear", modes=("eager",), with_peft=True, **hyperparameters):
    """The row of the last mode."""
    measured = cost.measure(
        case(name, track, **hyperparameters),
        work,
        modes=modes,
        steps=4,
        warmup=0,
        with_peft=with_peft,
    )
    return list(measured)[-1]


@pytest.fixture(scope="module")
def lora(work):
    return measure(work, "lora", r=4)


def test_a_row_says_what_was_measured_and_how(lora):
    assert (lora.label, lora.variant, lora.track, lora.mode) == (
        "lora r=4",
        "lora",
        "all-linear",
        "eager",
    )
    assert lora.hyperparameters["r"] == 4 and lora.shape["width"] == 64
    assert lora.params == 4 * (4 * 2 * 64 + 3 * (64 + 192))
    assert lora.device_type == "cpu" and lora.steps == 4 and lora.missing == {}
    assert {"torch", "peft", "transformers", "processor"} <= set(lora.versions)
    for side in (lora.floor, lora.ours, lora.peft_default, lora.peft_same_dtype):
        assert 0 < side.ms_p20 <= side.ms <= side.ms_p80
        assert side.peak_mib > 0 and side.saved_mib > 0 and side.fullgraph is None
    assert lora.floor.init_seconds is None and lora.ours.init_seconds > 0
    assert lora.floor_drift >= 1
    assert lora.over_floor() == lora.ours.ms / lora.floor.ms
    assert lora.summary()["extra_mib"] == lora.ours.peak_mib - lora.floor.peak_mib > 0


def test_a_row_comes_back_from_its_file(lora, tmp_path):
    path = cost_rows.write(lora, tmp_path)
    assert path.parent == tmp_path / "cost" and "width=64" in path.name
    assert cost_rows.read(tmp_path) == [lora]
    assert '"over_floor"' in path.read_text() and str(tmp_path) not in path.read_text()


def test_lora_saves_the_narrow_products_and_no_more(lora):
    """Of each layer r numbers a token beside what the frozen model keeps."""
    extra = (lora.ours.saved_mib - lora.floor.saved_mib) * 2**20
    narrow = 7 * 8 * 4 * 4
    # The inputs of the layers: three of width 64 (attention, o, the MLP) and one of 192.
    inputs = 8 * (3 * 64 + 192) * 4
    assert narrow <= extra <= narrow + inputs


def test_a_method_without_a_twin_has_no_columns_of_pefts(work):
    row = measure(work, "dplr", track="q+v", r=16)
    assert row.peft_default is None and row.peft_same_dtype is None
    assert set(row.missing.values()) == {"PEFT has no such method"}
    assert row.over_floor("peft_default") is None and row.extra_mib("peft_default") is None
    assert row.over_floor() > 0


@pytest.mark.parametrize("shape", [SMALL, BF16], ids=lambda s: s.dtype)
@pytest.mark.parametrize("name", sorted(twins.TWINS))
def test_every_twin_agrees(name, shape):
    if name not in ll.variants():
        pytest.skip("not registered")
    work, compared = llama(shape, "cpu"), 0
    for setting in cost.SETTINGS.get(name, ({},)):
        sides, _, missing = cost.sides_of(case(name, **setting), work, True)
        if set(missing.values()) == {"PEFT has no such method"}:
            continue
        compared += 1
        assert not missing
        for side in sides[1:]:
            dtypes = {p.dtype for p in side.trained}
            assert dtypes == {torch.float32 if side.name == "peft_default" else work.dtype}
    assert compared


def effect(side, work):
    """What a side does to outputs or to input gradients, whichever is less, in parts of them."""
    pairs = zip(cost._results(Side("floor", work.model), work), cost._results(side, work))
    return min(float((a - b).norm() / b.norm()) for a, b in pairs)


HIDDEN = [("ia3", "q+v"), ("ia3_ff", "q+v"), ("road", "q+v"), ("vera", "all-linear")]
"""A little off their start these do less than bfloat16 rounds."""


@pytest.mark.parametrize("name, track", HIDDEN)
def test_adapters_are_moved_until_rounding_hides_nothing(name, track):
    work = llama(BF16, "cpu")
    sides, _, missing = cost.sides_of(case(name, track), work, True)
    assert not missing and effect(sides[0], work) >= 0.12


@pytest.mark.parametrize("name, track", [*HIDDEN, ("hra", "q+v")])
def test_a_missed_layer_is_no_twin_in_bfloat16(name, track, monkeypatch):
    """The last layer's adapter is left as PEFT starts it."""
    right = twins.TWINS[name]

    def builder(variant, sites):
        twin, loads = right(variant, sites), count(1)
        load = lambda *both: next(loads) % len(sites) and twin.load(*both)
        return dataclasses.replace(twin, load=load)

    monkeypatch.setitem(twins.TWINS, name, builder)
    _, _, missing = cost.sides_of(case(name, track), llama(BF16, "cpu"), True)
    assert set(missing) == set(cost_rows.PEFT_DTYPES)
    assert all("with the same tensors" in why for why in missing.values())


@pytest.mark.parametrize("name, setting", [("hra", {}), ("oft", dict(block_size=32, exact=True))])
def test_turns_stay_where_they_do_most(name, setting, monkeypatch):
    """Less than is asked for; a rotation turned on does less again."""
    work = llama(BF16, "cpu")

    def moved():
        return effect(cost.sides_of(case(name, **setting), work, True)[0][0], work)

    most, ends = moved(), []
    for end in (cost.MOVED[0], cost.MOVED[-1]):
        monkeypatch.setattr(cost, "MOVED", (end,))
        ends.append(moved())
    assert 3 * ends[0] < most < 0.12 and ends[1] < 1.02 * most
    assert name == "hra" or 2 * ends[1] < most


@pytest.mark.parametrize("wrong", ["A", "B"])
def test_a_wrong_tensor_is_no_twin(work, monkeypatch, wrong):
    """A single tensor of a single layer is enough."""
    right = twins.TWINS["lora"]

    def builder(variant, sites):
        twin, loaded = right(variant, sites), []

        def load(theirs, ours):
            loaded.append(theirs)
            twin.load(theirs, {**ours, wrong: -ours[wrong]} if len(loaded) % 7 == 0 else ours)

        return dataclasses.replace(twin, load=load)

    monkeypatch.setitem(twins.TWINS, "lora", builder)
    row = measure(work, "lora", r=4)
    assert row.peft_default is None and row.peft_same_dtype is None
    assert "with the same tensors" in row.missing["peft_default"]


def test_a_twin_of_another_shape_is_refused(work, monkeypatch):
    right = twins.TWINS["lora"]
    monkeypatch.setitem(
        twins.TWINS, "lora", lambda v, sites: right(dataclasses.replace(v, r=3), sites)
    )
    assert "PEFT's tensor is (3, 64), ours (4, 64)" in str(measure(work, "lora", r=4).missing)


def test_nan_never_agrees(work):
    sides, _, _ = cost.sides_of(case("lora", r=4), work, True)
    with torch.no_grad():
        sides[1].trained[-1][0, 0] = math.nan
    with pytest.raises(cost.Disagreement, match="nan from ours"):
        cost.check_agreement(sides[0], sides[1], Side("floor", work.model), work)


def test_a_wider_llama_may_round_more():
    """As it does, in bfloat16 against float32."""
    errors = []
    for width in (1024, 2048):
        wide = llama(Shape(width=width, tokens=16, length=16), "cpu")
        _, x_grad = cost._results(Side("floor", wide.model), wide)
        exact, x = copy.deepcopy(wide.model).float(), wide.x.detach().float().requires_grad_()
        y = exact(inputs_embeds=x, use_cache=False).last_hidden_state
        y.backward(wide.y_grad.float())
        errors.append(cost._distance(x_grad, x.grad.double()))
    assert 1.5 < errors[1] / errors[0] < 2.5
    limits = [
        cost.allowed(dataclasses.replace(wide, shape=dict(width=width)))
        for width in (64, 4096, 8192)
    ]
    assert limits == [3e-2, 3e-2, 6e-2]


def test_without_peft_the_row_says_so(work, monkeypatch):
    def absent(variant, sites):
        raise ModuleNotFoundError("No module named 'peft'", name="peft")

    monkeypatch.setitem(twins.TWINS, "lora", absent)
    assert set(measure(work, "lora").missing.values()) == {"peft is not installed"}
    assert set(measure(work, "lora", with_peft=False).missing.values()) == {"not asked for"}


def test_sides_share_the_weights_and_leave_them_alone(work):
    before = {key: t.clone() for key, t in work.model.state_dict().items()}
    weights = {t.data_ptr() for t in work.model.parameters()}
    sides, _, _ = cost.sides_of(case("pissa", r=4), work, True)
    assert weights <= {t.data_ptr() for t in sides[0].model.parameters()}
    for side in sides:
        work.step(side)
    assert all(torch.equal(work.model.state_dict()[key], t) for key, t in before.items())
    assert not any(p.requires_grad for p in work.model.parameters())


@pytest.fixture
def without_inductor(monkeypatch):
    """Compile to a graph of eager operations: what is tested is which sides compile whole."""
    compiled = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda *args, **kw: compiled(*args, backend="aot_eager", **kw)
    )
    torch._dynamo.reset()
    with shapes.unchecked():
        yield
    torch._dynamo.reset()


def test_what_does_not_compile_whole_is_timed_apart(work, without_inductor, monkeypatch):
    """A graph that breaks, after which the compiler skips code that ours shares."""
    floors: dict[str, Side] = {}
    peft_side = cost._peft_side

    def broken(*args):
        side = peft_side(*args)
        breaks = lambda *_: torch._dynamo.graph_break()
        side.model.get_submodule("base_model.model.layers.0.mlp").register_forward_pre_hook(breaks)
        return side

    monkeypatch.setattr(cost, "_peft_side", broken)
    one = case("dora", r"layers\.0\.self_attn\.q_proj", r=4)
    measured = cost.measure(one, work, modes=("compiled",), steps=4, warmup=0, floors=floors)
    row = next(measured)
    assert row.floor.fullgraph is True and row.ours.fullgraph is True
    assert row.floor.saved_mib is None and row.floor.peak_mib is None
    assert row.peft_default.fullgraph is False and row.peft_default.ms > 0
    assert floors == {}, "the compiler forgot the floor too"


def test_a_compiled_model_that_runs_uncompiled_is_an_error(work, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **kw: model)
    with pytest.raises(RuntimeError, match="floor, compiled: AssertionError: ran uncompiled"):
        measure(work, "lora", modes=("compiled",), r=4)


def test_each_side_is_first_in_a_round(work, monkeypatch):
    order = []
    monkeypatch.setattr(cost, "_repeat", lambda side, *_: None)
    monkeypatch.setattr(cost, "_timed", lambda side, work, n: order.append(side.name) or [1.0] * n)
    sides = [Side(name, work.model) for name in "abc"]
    assert cost._time(sides, work, 6) == [[1.0] * 8] * 3
    assert "".join(order) == "abcbcacababc"


def test_a_replayed_step_is_timed_without_memory(work, monkeypatch):
    """And where the host waits within a step of PEFT's none is recorded."""
    record, replayed = cost._record, []

    class Recorded:
        def __init__(self, side):
            self.replay = lambda: replayed.append(side.name) or eager(side)

    eager = lambda side: work.forward(side).backward(work.y_grad)

    def fake(side, work):
        assert side.call is side.model, "the eager step is what is recorded"
        if side.waits:
            record(side, work)
        side.graph = Recorded(side)

    monkeypatch.setattr(cost, "_record", fake)
    row = measure(work, "oft", modes=("eager", "graph"), block_size=4, exact=True)
    assert row.mode == "graph" and row.ours.ms > 0
    assert row.ours.peak_mib is None and row.ours.saved_mib is None
    assert set(replayed) == {"floor", "ours"}
    assert all("waits for the device" in row.missing[side] for side in cost_rows.PEFT_DTYPES)
    row = measure(work, "oft", modes=("graph", "eager"), block_size=4)
    assert row.peft_default is not None and row.ours.peak_mib > 0


def test_recording_comes_after_compiling_as_well(work, without_inductor, monkeypatch):
    called = []
    monkeypatch.setattr(cost, "_record", lambda side, work: called.append(side.call))
    measure(work, "lora", modes=("compiled", "graph"), with_peft=False, r=2)
    assert not any(isinstance(call, torch._dynamo.OptimizedModule) for call in called) and called


def test_a_weight_is_decomposed_once(monkeypatch):
    from lora_lite.base import LinearBase

    layer, original = nn.Linear(40, 24), LinearBase.svd
    want = LinearBase(layer).svd(8)
    calls, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: calls.append(1) or svd(*a, **k))
    with cost.SvdOnce():
        for r in (8, 24, 4):
            got = LinearBase(layer).svd(r)
            assert [len(got[1]), got[0].shape[1]] == [r, r]
            assert torch.equal(got[1][:4], want[1][:4])
    assert len(calls) == 1 and LinearBase.svd is original


def test_every_setting_fits_the_models():
    """The small one of the CPU, and Llama-2-7B's widths without their numbers."""
    small = llama(cost.DEFAULT["cpu"], "cpu").model
    wide = llama(Shape(layers=1), "meta").model
    for one in cost.cases(ll.variants(), tuple(cost.TRACKS)):
        if one.variant.site == "linear":
            for model in (small, wide):
                ll.plan(model, one.variant, one.targets)


def test_a_failing_method_is_printed_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(cost.SETTINGS, "oft", ({"block_size": 7},))
    monkeypatch.setitem(cost.SETTINGS, "lora", ({"r": 2},))
    words = "cost --variants oft lora --modes eager --tracks q+v --steps 1 --warmup 0 --no_peft"
    options = [*words.split(), "--layers", "1", "--results", str(tmp_path)]
    assert main(options) == 0
    out = capsys.readouterr().out
    assert "oft block_size=7 q+v failed: ValueError" in out and "use 2, 4, 8" in out
    assert [row.label for row in cost_rows.read(tmp_path)] == ["lora r=2"]
    assert out.splitlines()[-2].split()[:2] == ["method", "track"]


@pytest.mark.parametrize(
    "words, message",
    [
        ("--variants lorra", "no variant 'lorra'; did you mean 'lora'"),
        ("--tracks qv", "'qv'"),
        ("--modes fast", "'fast'"),
        ("--modes eager graph", "graph is a CUDA device's, and this is a CPU"),
        ("--device tpu", "device='tpu' must be cuda or cpu"),
        ("--steps 0", "steps=0 must be ≥ 1"),
        ("--tokens 33", "tokens=33 must be a multiple of length=16"),
        ("--width 100", "width=100 must be a multiple of 64"),
        ("--layers 0", "layers=0 must be ≥ 1"),
    ],
)
def test_refusals_exit_with_2_and_say_why(words, message, capsys):
    assert main(["cost", "--device", "cpu", *words.split()]) == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert message in error and "Traceback" not in error


def test_growth_and_host_rows(tmp_path, monkeypatch):
    monkeypatch.setitem(scaling.GROWTH, "cpu", dict(tokens=(16,)))
    monkeypatch.setitem(scaling.RANKS, "cpu", (2,))
    monkeypatch.setattr(scaling, "ADAPTED", {"first q": r"layers\.0\.self_attn\.q_proj"})
    options = cost.Options(
        variants=("lora",), device="cpu", steps=1, warmup=0, layers=1, results=tmp_path
    )
    done = scaling.run(options)
    assert [(r.label, r.track, r.shape["tokens"]) for r in done] == [
        ("lora r=16", "all-linear", 32),
        ("lora r=2", "all-linear", 32),
        ("lora r=16", "first q", 32),
        ("lora r=16", "all-linear", 16),
    ]
    assert len(cost_rows.read(tmp_path, "cost/scaling")) == 4 and not cost_rows.read(tmp_path)
    assert len(list((tmp_path / "cost/host").glob("lora_r=16*.json"))) == 1


def on_gpu(row, **changes):
    """The row as if of a GPU at the default shape."""
    shape = dataclasses.asdict(Shape())
    return dataclasses.replace(row, device="Some GPU", device_type="cuda", shape=shape, **changes)


def test_the_least_that_a_step_can_cost_is_counted(lora):
    """LoRA reads x twice and writes and reads dx, writes and reads y and reads dy."""
    row = on_gpu(lora, floor=dataclasses.replace(lora.floor, ms=17.0))
    assert traffic.counted(row) is None, "nothing is known of this device"
    row = dataclasses.replace(row, device="NVIDIA H200")
    d_in, d_out = 6 * 4096 + 11008, 5 * 4096 + 2 * 11008
    moved_ms = 1e3 * 2 * 4096 * 2 * (4 * d_in + 3 * d_out) / 4.3e12
    products_ms = 1e3 * 2 * 2 * 4096 * 4 * 3 * (d_in + d_out) / 790e12
    assert traffic.counted(row) == pytest.approx(1 + (moved_ms + products_ms) / 17.0)
    assert traffic.counted(dataclasses.replace(row, track="q+v")) is None
    for name, settings in cost.SETTINGS.items():
        for setting in settings:
            hyper = dataclasses.asdict(configure(name, **setting))
            other = dataclasses.replace(row, variant=name, hyperparameters=hyper)
            assert 1 < traffic.counted(other) < 1.5, name
            compiled = traffic.counted(dataclasses.replace(other, mode="compiled"))
            if name in ("ia3", "ia3_ff"):
                assert compiled is None, "the gate is fused with what is beside it"
            elif name == "boft":
                assert 1 < compiled < traffic.counted(other)
            else:
                assert compiled == traffic.counted(other)

    def of_jora(**hyperparameters):
        hyper = dataclasses.asdict(configure("jora", **hyperparameters))
        return traffic.counted(dataclasses.replace(row, variant="jora", hyperparameters=hyper))

    assert of_jora(clip="tanh") is None
    assert of_jora(core="coupled", magnitude="none", t_stat=5) is None
    assert of_jora(magnitude_on="delta") == of_jora(magnitude="none") < of_jora()
    assert of_jora(core="lowrank", lowrank_r=8) < of_jora(core="lowrank", lowrank_r=64)


def test_the_table_and_the_chart_come_from_the_rows(lora, tmp_path):
    (tmp_path / "docs").mkdir()
    results = tmp_path / "results"
    cost_rows.write(
        dataclasses.replace(lora, shape=dataclasses.asdict(cost.DEFAULT["cpu"])), results
    )
    cost_report.write(tmp_path)
    # A CPU's rows are not for the table.
    assert cost_report.markdown(results) is None and not list((tmp_path / "docs").iterdir())
    side = lambda ms, mib: dataclasses.replace(lora.ours, ms=ms, peak_mib=mib)
    costs = dict(floor=side(10.0, 100.0), ours=side(10.5, 120.0), peft_default=side(16.0, 1600.0))
    wins = on_gpu(lora, **costs, peft_same_dtype=side(12.0, 110.0))
    loses = on_gpu(lora, **{**costs, "ours": side(20.0, 120.0)}, peft_same_dtype=None)
    loses = dataclasses.replace(loses, label="slow", missing={"peft_same_dtype": "it fails"})
    replayed = dataclasses.replace(wins, mode="graph", ours=side(10.2, None))
    for row in (wins, loses, replayed, on_gpu(lora, track="q+v")):
        cost_rows.write(row, results)
    text = cost_report.markdown(results)
    eager, graph, mib = "**1.05** | – | 1.60 (1.20)", "**1.02** | 1.60 (1.20)", "1,500 (**10**)"
    assert f"| lora r=4 | {eager} | {graph} | – | – | – | 20 | {mib} |" in text
    assert "| slow | 2.00 | – | **1.60** (–) | – | – | – | – | – | **20** | 1,500 (–) |" in text
    assert text.index("lora r=4") < text.index("slow") and text.count("lora r=4") == 1
    assert "Some GPU" in text and lora.device not in text
    cost_report.write(tmp_path)
    assert (tmp_path / "docs/cost.png").stat().st_size > 1000
    document = (tmp_path / "docs/cost.md").read_text()
    assert "q+v" in document and "it fails" in document
    assert document == cost_report.document(results) and text in document
    cost_rows.write(dataclasses.replace(wins, params=1, steps=1), results)
    cost_rows.write(dataclasses.replace(wins, ours=side(11.0, 120.0)), results)
    assert document != cost_report.document(results)
