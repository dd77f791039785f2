"""Every registered method keeps every law of the conformance kit."""

import pytest
import torch
from settings import cases

from lora_lite.testing import LAWS, TOLERANCE, Case
from lora_lite.variant import configure

CASES = list(cases())


def label(case):
    name, hyperparameters, _ = case
    return "-".join([name, *(f"{k}={v}" for k, v in hyperparameters.items())])


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES, ids=label)
def test_law(case, dtype: torch.dtype, law):
    name, hyperparameters, sizes = case
    law(Case(configure(name, **hyperparameters), sizes, dtype))
