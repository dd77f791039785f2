"""The laws once more on a GPU, compiled by inductor."""

import pytest
import torch
from settings import cases

from lora_lite.testing import LAWS, TOLERANCE, Case
from lora_lite.variant import configure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("name, hyperparameters, sizes", cases(), ids=str)
def test_laws_on_cuda(name, hyperparameters, sizes):
    for dtype in TOLERANCE:
        for law in LAWS:
            law(Case(configure(name, **hyperparameters), sizes, dtype, "cuda", "inductor"))
