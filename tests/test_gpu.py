"""The laws once more on a GPU, some of them compiled by inductor."""

import copy

import pytest
import torch
from settings import BUILT_IN, LINEAR, RECTANGULAR, SMALL, SQUARE, cases
from torch import nn

import lora_lite as ll
from lora_lite.shapes import unchecked
from lora_lite.testing import LAWS, TOLERANCE, Case, compiled_equals_eager, move
from lora_lite.variant import configure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name, hyperparameters, sizes", list(cases()), ids=str)
def test_laws_on_cuda(name, hyperparameters, sizes):
    for dtype in TOLERANCE:
        for law in LAWS:
            law(Case(configure(name, **hyperparameters), sizes, dtype, "cuda"))


@pytest.mark.parametrize("name", BUILT_IN)
def test_inductor_compiles_whole(name):
    hyperparameters = SMALL[name][0]
    case = Case(configure(name, **hyperparameters), RECTANGULAR, torch.float32, "cuda", "inductor")
    compiled_equals_eager(case)


def test_jora_never_waits_for_the_device():
    layers = [nn.Linear(64, 64, device="cuda") for _ in range(3)]
    model = nn.Sequential(*layers)
    ll.attach(model, "jora", use_gumbel=True, warmup_ratio=0.5, ecd_temp_annealing=True)
    optimizer = torch.optim.AdamW(ll.param_groups(model, lr=1e-2))
    x = torch.randn(8, 64, device="cuda")
    for _ in range(4):
        optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with unchecked():
                model(x).square().mean().backward()
                ll.step(model, 10, optimizer)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        optimizer.step()
    tensors = layers[0].adapters.default.tensors()
    assert tensors["churn_L"][0] > 0 and tensors["active_L"].sum() == 3


@pytest.mark.parametrize("name", LINEAR)
def test_a_step_can_be_recorded(name):
    """As a CUDA graph, which repeats it on other numbers without the host."""
    like = dict(device="cuda", dtype=torch.bfloat16)
    layer = nn.Linear(64, 64, **like)
    calibration = [torch.randn(4, 16, 64, **like)] if name == "eva" else None
    hyperparameters = (SMALL[name] + SQUARE.get(name, []))[0]
    ll.attach(layer, name, calibration=calibration, **hyperparameters)
    move(layer)
    x, g = torch.randn(300, 64, **like).requires_grad_(), torch.randn(300, 64, **like)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def step():
        for leaf in leaves:
            leaf.grad = None
        y = layer(x)
        y.backward(g)
        return y

    with unchecked():
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            step()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            y = step()
        replayed = [y, *(leaf.grad for leaf in leaves)]
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        got = [t.clone() for t in replayed]
        want = [step(), *(leaf.grad for leaf in leaves)]
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()


@pytest.mark.parametrize("name", ["lora", "dora", "oft", "jora"])
def test_compiled_into_cuda_graphs(name):
    """Steps on other numbers agree with eager ones, energies that JORA gathers too."""
    like = dict(device="cuda", dtype=torch.bfloat16)
    model = nn.Sequential(nn.Linear(64, 64, **like))
    ll.attach(model, name, **SMALL[name][0])
    move(model)
    twin = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with unchecked():
        for _ in range(4):
            numbers, g = torch.randn(300, 64, **like), torch.randn(300, 64, **like)
            torch.compiler.cudagraph_mark_step_begin()
            found = []
            for own, call in ((twin, twin), (model, compiled)):
                x = numbers.clone().requires_grad_()
                own.zero_grad()
                y = call(x)
                y.backward(g)
                grads = [p.grad for p in own.parameters() if p.requires_grad]
                found.append([t.clone() for t in (y, x.grad, *grads, *own.buffers())])
            for a, b in zip(*found, strict=True):
                assert (a.double() - b.double()).norm() <= 1e-2 * a.double().norm()
