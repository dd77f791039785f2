"""lora-lite: adapter methods as hypotheses about how weights move, each one small file."""

from typing import Any

from lora_lite import shapes as _shapes

if _shapes.CHECKED:
    _shapes.install()

from lora_lite import variants as _variants_package  # noqa: F401
from lora_lite.attach import (
    Plan,
    attach,
    detach,
    disabled,
    enable,
    plan,
    strength,
)
from lora_lite.checkpoint import load, save
from lora_lite.describe import describe
from lora_lite.merge import delta_weights, merge, merged
from lora_lite.training import param_groups, regulariser, schedule, step
from lora_lite.variant import ParamSpec, Variant, variants

__version__ = "0.1.0"
