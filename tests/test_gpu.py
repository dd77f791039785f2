"""The laws once more on a GPU, some of them compiled by inductor."""

import pytest
import torch
from settings import BUILT_IN, RECTANGULAR, SMALL, cases
from torch import nn

import lora_lite as ll
from lora_lite.shapes import unchecked
from lora_lite.testing import LAWS, TOLERANCE, Case, compiled_equals_eager
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
