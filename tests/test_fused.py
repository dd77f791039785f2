"""A layer whose product is taken apart gives what the plain form gives, gradients too."""

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

import lora_lite as ll
from lora_lite.ops import blocks, launch, low_rank, selection, skinny
from lora_lite.ops.low_rank import turn_low_rank
from lora_lite.ops.reflections import reflections
from lora_lite.ops.selection import Squares
from lora_lite.shapes import unchecked
from lora_lite.testing import close, move

pytest.importorskip("triton")
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.bfloat16] if CUDA else [torch.float32]


@pytest.fixture(autouse=True)
def _few_programs(monkeypatch):
    """The interpreter runs one after the other: tiles are wider there, and still several."""
    if not CUDA:
        rotated_kernels = pytest.importorskip("lora_lite.ops.rotated_kernels")
        monkeypatch.setattr(rotated_kernels, "TOKENS", 16)
        monkeypatch.setattr(rotated_kernels, "COLUMNS", 32)
        monkeypatch.setattr(rotated_kernels, "ENTRIES", 256)


J = dict(S_L=6, S_R=5, k=5, zero_init_core=False, selection="random")
METHODS = [
    ("lora", dict(r=4)),
    ("pissa", dict(r=4)),
    ("dora", dict(r=4)),
    ("dplr", dict(r=16)),
    ("dplr", dict(r=16, coeff=0.5)),
    ("antipasto", dict(r=16)),
    ("antipasto_rot", dict(r=16)),
    ("antipasto_rot", dict(r=16, rotate_basis="U")),
    ("antipasto_rot", dict(r=16, rotate_basis="both")),
    ("antipasto_rot", dict(r=16, rotate_basis="none")),
    ("oft", dict(block_size=8)),
    ("oft", dict(block_size=8, exact=True, block_share=True)),
    ("boft", dict(block_size=4, m=2)),
    ("hra", dict(r=5, paired=False)),
    ("hra", dict(r=4, strict=True)),
    ("jora", dict(J)),
    ("jora", dict(J, magnitude="none")),
    ("jora", dict(J, single_sided="right")),
    ("jora", dict(J, magnitude="ecd_tanh", magnitude_on="delta")),
    ("jora", dict(J, core="block", block_size=3)),
    ("jora", dict(J, core="block", block_size=8, magnitude="none")),
    ("jora", dict(J, core="block", single_sided="left", magnitude_on="delta")),
    ("jora", dict(J, core="lowrank", lowrank_r=3)),
    ("jora", dict(J, core="lowrank", magnitude_on="delta", single_sided="right")),
    ("jora", dict(J, S_L=0, S_R=0, k=0)),
]
LAYERS = [(24, 40, True), (40, 24, False)]


def outputs(layer, x, g, run=None):
    """y and its gradients, to x and to every trained tensor."""
    x = x.clone().requires_grad_()
    y = (layer if run is None else run)(x)
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *trained.values()], g)
    return {"y": y, **dict(zip(["x", *trained], grads))}


def adapted(d_in, d_out, bias, dtype, variant, hyperparameters):
    layer = nn.Linear(d_in, d_out, bias=bias, dtype=dtype, device=DEVICE)
    ll.attach(layer, variant, seed=0, **hyperparameters)
    move(layer)
    return layer.eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d_in, d_out, bias", LAYERS)
@pytest.mark.parametrize("variant, hyperparameters", METHODS, ids=str)
def test_fused_equals_plain(monkeypatch, variant, hyperparameters, d_in, d_out, bias, dtype):
    layer = adapted(d_in, d_out, bias, dtype, variant, hyperparameters)
    # Enough tokens for every kernel, in a shape and a layout of some awkwardness.
    T = 11 if variant == "jora" else 100
    x = torch.randn(3, d_in, T, dtype=dtype, device=DEVICE).mT
    g = torch.randn(3, T, d_out, dtype=dtype, device=DEVICE)
    monkeypatch.setattr(launch, "INTERPRETED", not CUDA)
    fused = outputs(layer, x, g)
    exact = layer.double()
    plain = outputs(exact, x.double(), g.double())
    for key, want in plain.items():
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        close(fused[key].double(), want, tolerance, f"{variant}: {key}")


@pytest.mark.parametrize("variant, hyperparameters", METHODS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1])
def test_of_no_token_and_of_one(monkeypatch, tokens, variant, hyperparameters):
    layer = adapted(24, 40, True, DTYPES[0], variant, hyperparameters)
    x, g = (torch.randn(tokens, d, dtype=DTYPES[0], device=DEVICE) for d in (24, 40))
    monkeypatch.setattr(launch, "INTERPRETED", not CUDA)
    fused = outputs(layer, x, g)
    for key, want in outputs(layer.double(), x.double(), g.double()).items():
        tolerance = 1e-5 if DTYPES[0] == torch.float32 else 2e-2
        close(fused[key].double(), want, tolerance, f"{variant}: {key}")


@pytest.mark.parametrize(
    "core", [{}, dict(core="block", block_size=4), dict(core="block", block_size=5)]
)
@pytest.mark.parametrize("magnitude_on", ["output", "delta"])
@pytest.mark.parametrize("magnitude", ["none", "oer_softmax"])
@pytest.mark.parametrize("d_in, d_out, bias", LAYERS)
def test_pairs_of_both_sides_that_meet(
    monkeypatch, d_in, d_out, bias, magnitude, magnitude_on, core
):
    """In one coordinate, in both, beyond the core, at angle 0, resting, and in empty slots."""
    hyper = dict(S_L=6, S_R=6, k=12, zero_init_core=False, selection="random", magnitude=magnitude)
    layer = adapted(
        d_in, d_out, bias, DTYPES[0], "jora", hyper | core | dict(magnitude_on=magnitude_on)
    )
    own = layer.adapters.default.tensors()
    for side, d, pairs in (
        ("L", d_out, [[0, 5], [3, 7], [8, 9], [d_out - 1, 20], [-1, -1], [12, 13]]),
        ("R", d_in, [[5, 1], [7, 3], [8, 12], [d_in - 1, 21], [14, 15], [-1, -1]]),
    ):
        assert max(map(max, pairs)) < d
        own[f"pairs_{side}"].copy_(torch.tensor(pairs))
        own[f"active_{side}"].copy_(torch.tensor([1, 1, side == "R", 1, side == "R", 1]).bool())
        own[f"theta_{side}"].data[1] = 0
    own["active_R"][5] = False
    x, g = (torch.randn(33, d, dtype=DTYPES[0], device=DEVICE) for d in (d_in, d_out))
    monkeypatch.setattr(launch, "INTERPRETED", not CUDA)
    fused = outputs(layer, x, g)
    assert "_AddRotatedBackward" in nodes(layer(x))
    plain = outputs(layer.double(), x.double(), g.double())
    for key, want in plain.items():
        tolerance = 1e-5 if DTYPES[0] == torch.float32 else 2e-2
        close(fused[key].double(), want, tolerance, key)


@pytest.mark.parametrize("variant", ["lora", "oft"])
def test_a_gradient_that_can_not_be_differentiated_says_so(monkeypatch, variant):
    layer = adapted(32, 40, False, torch.bfloat16 if CUDA else torch.float16, variant, {})
    x = torch.randn(5, 32, dtype=layer.weight.dtype, device=DEVICE, requires_grad=True)
    monkeypatch.setattr(launch, "INTERPRETED", not CUDA)
    monkeypatch.setattr(low_rank, "accumulates_in", lambda x: True)
    loss = lambda: layer(x).float().square().sum()
    (usual,) = torch.autograd.grad(loss(), x)
    (first,) = torch.autograd.grad(loss(), x, create_graph=True)
    assert torch.equal(first, usual)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("block_size", [None, 4, 3])
def test_sums_of_tokens_that_are_shared_out(monkeypatch, block_size):
    """Among several programs, of which the last has fewer."""
    core = dict(core="block", block_size=block_size) if block_size else {}
    layer = adapted(40, 24, True, DTYPES[0], "jora", J | core)
    x, g = (torch.randn(211, d, dtype=DTYPES[0], device=DEVICE) for d in (40, 24))
    monkeypatch.setattr(launch, "INTERPRETED", not CUDA)
    fused = outputs(layer, x, g)
    plain = outputs(layer.double(), x.double(), g.double())
    for key, want in plain.items():
        tolerance = 1e-5 if DTYPES[0] == torch.float32 else 2e-2
        close(fused[key].double(), want, tolerance, key)


@pytest.mark.parametrize("variant, hyperparameters", METHODS, ids=str)
def test_each_is_one_op_to_the_compiler(monkeypatch, variant, hyperparameters):
    """Compiled whole, the layer runs the same kernels, and nothing of them is traced."""
    monkeypatch.setattr(launch, "INTERPRETED", not CUDA)
    layer = adapted(24, 40, True, DTYPES[0], variant, hyperparameters).train()
    T = 11 if variant == "jora" else 150
    x, g = (torch.randn(2, T, d, dtype=DTYPES[0], device=DEVICE) for d in (24, 40))
    traced = []

    def backend(graph, _):
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph)

    torch._dynamo.reset()
    with unchecked():
        want = outputs(layer, x, g)
        compiler = aot_autograd(fw_compiler=backend)
        got = outputs(layer, x, g, torch.compile(layer, fullgraph=True, backend=compiler))
    ops = {target.split(".")[1] for target in traced if target.startswith("lora_lite.")}
    assert {f"{op}_backward" for op in ops} & ops, traced
    by_inductor = {}
    if CUDA:
        torch._dynamo.reset()
        with unchecked():
            by_inductor = outputs(layer, x, g, torch.compile(layer, fullgraph=True))
    for key, a in [*got.items(), *by_inductor.items()]:
        close(a, want[key], 1e-6 if DTYPES[0] == torch.float32 else 2e-2, key)


@pytest.mark.parametrize(
    "variant, hyperparameters",
    [
        ("lora", {}),
        ("dora", {}),
        ("hra", {}),
        ("dplr", dict(r=16)),
        ("antipasto", dict(r=16)),
        ("antipasto_rot", dict(r=16)),
        ("road", dict(group_size=8)),
        ("jora", J),
        ("jora", J | dict(core="block")),
    ],
)
def test_one_compiled_form_serves_any_number_of_tokens(monkeypatch, variant, hyperparameters):
    monkeypatch.setattr(launch, "INTERPRETED", not CUDA)
    monkeypatch.setattr(skinny, "has_kernel", lambda x, r: launch.kernels_serve(x))
    monkeypatch.setattr(blocks, "has_kernel", lambda x, b: launch.kernels_serve(x))
    layer = adapted(24, 40, True, DTYPES[0], variant, hyperparameters)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with unchecked():
        for T in (10, 30, 22):
            x, g = (torch.randn(2, T, d, dtype=DTYPES[0], device=DEVICE) for d in (24, 40))
            want = outputs(layer, x, g)
            for key, a in outputs(layer, x, g, compiled).items():
                close(a, want[key], 1e-6 if DTYPES[0] == torch.float32 else 2e-2, key)
    # The first number is taken for the only one.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("core", ["diag", "block", "lowrank"])
@pytest.mark.parametrize("magnitude", ["none", "oer_softmax"])
@pytest.mark.parametrize("d_in, d_out, bias", LAYERS)
def test_energies_are_gathered_in_the_same_pass(monkeypatch, d_in, d_out, bias, magnitude, core):
    hyper = J | dict(selection="topk_ema", magnitude=magnitude, core=core)
    layer = adapted(d_in, d_out, bias, DTYPES[0], "jora", hyper).train()
    T = 300 if core == "lowrank" else 211
    x, g = (torch.randn(T, d, dtype=DTYPES[0], device=DEVICE) for d in (d_in, d_out))
    monkeypatch.setattr(launch, "INTERPRETED", not CUDA)
    for _ in range(2):
        y = layer(x)
        assert "_WatchedBackward" not in nodes(y)
        y.backward(g)
    own, seen = layer.adapters.default.tensors(), 1 - layer.adapters.default.variant.ema_beta**2
    for key, t in (("ema_col", x), ("ema_row", g)):
        close(own[key].double(), seen * t.double().square().mean(0), 1e-5, key)
    with torch.no_grad():
        layer.eval()(x).sum()
    close(own["ema_col"].double(), seen * x.double().square().mean(0), 1e-5, "at rest")


@pytest.mark.parametrize("core", ["diag", "block", "lowrank"])
@pytest.mark.parametrize("magnitude", ["none", "oer_softmax"])
def test_energies_are_gathered_compiled_too(monkeypatch, magnitude, core):
    """Where an op shows nothing, a probe's gradient does; the others are what they were."""
    monkeypatch.setattr(launch, "INTERPRETED", not CUDA)
    monkeypatch.setattr(skinny, "has_kernel", lambda x, r: launch.kernels_serve(x))
    hyper = J | dict(selection="topk_ema", magnitude=magnitude, core=core)
    layer = adapted(24, 40, True, DTYPES[0], "jora", hyper).train()
    x, g = (torch.randn(2, 70, d, dtype=DTYPES[0], device=DEVICE) for d in (24, 40))
    own, keys = layer.adapters.default.tensors(), ("ema_col", "ema_row")
    trained = {key: t for key, t in own.items() if t.requires_grad}

    def gathered(run):
        for key in keys:
            own[key].zero_()
        grads = torch.autograd.grad(run(x), trained.values(), g)
        return {key: own[key].clone() for key in keys} | dict(zip(trained, grads))

    want = gathered(layer)
    monkeypatch.setattr(selection, "mean_square", None)
    torch._dynamo.reset()
    with unchecked():
        found = gathered(torch.compile(layer, fullgraph=True, backend="aot_eager"))
    for key, a in want.items():
        assert a.any() or not a.numel(), key
        close(found[key], a, 1e-5 if key in keys or DTYPES[0] == torch.float32 else 2e-2, key)


@pytest.mark.parametrize("batch", [(), (1,), (3,)])
def test_energies_of_any_number_of_tokens_are_gathered_compiled(monkeypatch, batch):
    monkeypatch.setattr(launch, "INTERPRETED", not CUDA)
    hyper = J | dict(selection="topk_ema")
    layer = adapted(24, 40, True, DTYPES[0], "jora", hyper).train()
    own = layer.adapters.default.tensors()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for T in (20, 33, 1):
        x, g = (torch.randn(*batch, T, d, dtype=DTYPES[0], device=DEVICE) for d in (24, 40))
        found = []
        for call in (layer, compiled):
            own["ema_col"].zero_(), own["ema_row"].zero_()
            with unchecked():
                call(x.requires_grad_()).backward(g)
            found.append([own[key].clone() for key in ("ema_col", "ema_row")])
        for a, b in zip(*found):
            assert a.any()
            close(b, a, 1e-5, f"{T} tokens")


def test_where_nothing_trains_nothing_is_shown_compiled(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", not CUDA)
    hyper = J | dict(selection="topk_ema")
    layer = adapted(24, 40, True, DTYPES[0], "jora", hyper).train().requires_grad_(False)
    x = torch.randn(70, 24, dtype=DTYPES[0], device=DEVICE)
    torch._dynamo.reset()
    with unchecked():
        y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    close(y, layer(x), 1e-5 if DTYPES[0] == torch.float32 else 2e-2, "y")


@pytest.mark.parametrize("magnitude", ["none", "oer_softmax"])
def test_energies_of_the_low_rank_core_come_from_its_kernels(monkeypatch, magnitude):
    """In float16 on a CPU, whose interpreter multiplies no bfloat16."""
    dtype = torch.bfloat16 if CUDA else torch.float16
    hyper = J | dict(selection="topk_ema", magnitude=magnitude, core="lowrank", lowrank_r=3)
    layer = adapted(24, 40, False, dtype, "jora", hyper).train()
    x, g = (torch.randn(300, d, dtype=dtype, device=DEVICE) for d in (24, 40))
    monkeypatch.setattr(launch, "INTERPRETED", not CUDA)
    monkeypatch.setattr(low_rank, "accumulates_in", lambda x: True)
    seen = []
    variant = layer.adapters.default.variant
    observe = type(variant).observe
    monkeypatch.setattr(
        type(variant), "observe", lambda v, x, g, **t: seen.append((x, g)) or observe(v, x, g, **t)
    )
    layer(x).backward(g)
    ((of_x, of_g),) = seen
    assert all(isinstance(squares, Squares) and squares.tokens == 300 for squares in (of_x, of_g))
    own, share = layer.adapters.default.tensors(), 1 - variant.ema_beta
    for key, t in (("ema_col", x), ("ema_row", g)):
        close(own[key].double(), share * t.double().square().mean(0), 1e-5, key)


def nodes(y):
    """Names of the autograd nodes behind y."""
    seen, left = set(), [y.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [parent for parent, _ in node.next_functions]
    return {type(node).__name__ for node in seen}


@pytest.mark.parametrize(
    "variant, hyperparameters, node",
    [
        ("lora", {}, "_AddLowRankBackward"),
        ("dora", {}, "_ScaledAddLowRankBackward"),
        ("dplr", dict(r=16), "_AddCoreBackward"),
        ("antipasto", dict(r=16), "_AddCoreBackward"),
        (
            "antipasto_rot",
            dict(r=16, delta_init_mean=0.0, delta_init_std=0.0),
            "_AddCoreBackward",
        ),
        ("jora", {}, "_AddRotatedBackward"),
    ],
)
def test_what_is_not_plain_is_not_taken_apart(monkeypatch, variant, hyperparameters, node):
    monkeypatch.setattr(launch, "INTERPRETED", True)
    layer = nn.Linear(24, 40, device=DEVICE)
    ll.attach(layer, variant, **hyperparameters)
    x = torch.randn(30, 24, device=DEVICE)
    assert node in nodes(layer(x))
    with ll.strength(layer, 0.5):
        assert node not in nodes(layer(x))
    layer.weight.requires_grad_(True)
    assert node not in nodes(layer(x))
    layer.weight.requires_grad_(False)
    ll.attach(layer, "lora", name="above")
    y = layer(x)
    ll.detach(layer, "above")
    assert node in nodes(y)

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    other = Doubled(24, 40, device=DEVICE)
    ll.attach(other, variant, **hyperparameters)
    assert node not in nodes(other(x))
    close(other(x), 2 * nn.functional.linear(x, other.weight, other.bias), 1e-6, "the output")


def test_a_turned_input_needs_no_plain_layer(monkeypatch):
    """It is added up before the layer, whatever that does; a fresh one is still x to the bit."""
    layer = nn.Linear(24, 40, device=DEVICE)
    ll.attach(layer, "lora")
    move(layer)
    x = torch.randn(300, 24, device=DEVICE)
    want = layer(x)
    ll.attach(layer, "hra", name="above")
    monkeypatch.setattr(launch, "INTERPRETED", True)
    y = layer(x)
    assert "_TurnLowRankBackward" in nodes(y)
    close(y, want, 1e-6, "the output of a fresh turn")
    U = layer.adapters["above"].U
    assert torch.equal(turn_low_rank(x, *reflections(U / U.norm(dim=0))), x)


def test_a_layer_beneath_another_adapter_runs_it(monkeypatch):
    layer = nn.Linear(24, 40, device=DEVICE)
    for name in ("one", "two"):
        ll.attach(layer, "lora", name=name)
    move(layer)
    x = torch.randn(300, 24, device=DEVICE)
    want = layer(x)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    close(layer(x), want, 1e-6, "the output of two")


def test_conv1d_layers_are_taken_apart_too(monkeypatch):
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(40, 24).to(DEVICE)
    ll.attach(layer, "dora", r=4)
    move(layer)
    x, g = torch.randn(300, 24, device=DEVICE), torch.randn(300, 40, device=DEVICE)
    plain = outputs(layer, x, g)
    monkeypatch.setattr(launch, "INTERPRETED", True)
    for key, got in outputs(layer, x, g).items():
        close(got, plain[key], 1e-5, key)
    assert "_ScaledAddLowRankBackward" in nodes(layer(x))
