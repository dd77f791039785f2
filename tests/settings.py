"""Under which settings each method goes through the tests that are the same for all.

A method's fidelity test, `fidelity/test_<its file>.py`, says them:
LAWS = {variant: [hyperparameters, ...]} for small layers of any shape, the first in the generic
    tests; SQUARE, likewise, for square layers.
KEPT = {variant: (hyperparameters, numbers)}: what a linear layer of 96 to 160 keeps for backward a
    token, beyond what the frozen layer keeps, where x (96) and the output (160) count if kept.
"""

import importlib
import sys
from pathlib import Path
from typing import Any

import lora_lite as ll
from lora_lite.variant import variant_class

# Tests declare methods of their own; these are the library's.
BUILT_IN = ll.variants()
LINEAR = [name for name in BUILT_IN if variant_class(name).site == "linear"]

FIDELITY = Path(__file__).parent / "fidelity"
RECTANGULAR, SQUARES = ((24, 40), (40, 24)), ((24, 24), (24, 24))


def said(what: str) -> dict[str, Any]:
    """What the fidelity tests say under one name, by variant."""
    if str(FIDELITY) not in sys.path:
        sys.path.insert(0, str(FIDELITY))
    out: dict[str, Any] = {}
    for file in sorted({variant_class(name).__module__.split(".")[-1] for name in BUILT_IN}):
        out |= getattr(importlib.import_module(f"test_{file}"), what, {})
    return out


SMALL, SQUARE, KEPT = said("LAWS"), said("SQUARE"), said("KEPT")


def cases():
    """(name, hyperparameters, layer sizes) for every registered method."""
    for name in BUILT_IN:
        for hyperparameters in SMALL[name]:
            yield name, hyperparameters, RECTANGULAR
        for hyperparameters in SQUARE.get(name, []):
            yield name, hyperparameters, SQUARES
