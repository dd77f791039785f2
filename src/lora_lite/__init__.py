"""lora-lite: adapter methods as hypotheses about how weights move, each one small file."""

from typing import Any

from lora_lite import shapes as _shapes

if _shapes.CHECKED:
    _shapes.install()

from lora_lite import variants as _variants_package  # noqa: E402, F401
from lora_lite.attach import (  # noqa: E402
    Plan,
    attach,
    detach,
    disabled,
    enable,
    plan,
    strength,
)
from lora_lite.checkpoint import load, save  # noqa: E402
from lora_lite.describe import describe  # noqa: E402
from lora_lite.merge import delta_weights, merge, merged  # noqa: E402
from lora_lite.training import param_groups, regulariser, schedule, step  # noqa: E402
from lora_lite.variant import ParamSpec, Variant, variants  # noqa: E402

__version__ = "0.1.0"
