"""The suite runs with the shape checker on: set before lora_lite is first imported."""

import os

os.environ["LORA_LITE_TYPECHECK"] = "1"

import torch

if not torch.cuda.is_available():  # the kernels run by their interpreter
    os.environ["TRITON_INTERPRET"] = "1"

import pytest
import settings  # noqa: F401


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# One thread a worker: pytest-xdist already uses every core.
torch.set_num_threads(1)
