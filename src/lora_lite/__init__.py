"""lora-lite: adapter methods as hypotheses about how weights move, each one small file."""

# Imported before the checker and so left alone by it: every forward makes a Base, and
# torch.compile can't trace the checker around a constructor.
from lora_lite import base as _base  # noqa: F401
from lora_lite import shapes as _shapes

if _shapes.CHECKED:
    _shapes.install()

# ruff: isort: off
# First the package, which registers the methods; then the function that takes over its name.
import lora_lite.variants  # noqa: F401
from lora_lite.attach import Plan, attach, detach, disabled, enable, plan, strength
from lora_lite.checkpoint import load, save
from lora_lite.describe import describe
from lora_lite.diagnose import Diagnosis, diagnose
from lora_lite.merge import MergeReport, delta_weights, merge, merged
from lora_lite.prompts import prompts
from lora_lite.steps import schedule, step
from lora_lite.training import param_groups, regulariser
from lora_lite.variant import ParamSpec, Stats, Variant, variant_class, variants
# ruff: isort: on

__version__ = "0.1.0"

__all__ = [
    "Diagnosis",
    "MergeReport",
    "ParamSpec",
    "Plan",
    "Stats",
    "Variant",
    "attach",
    "delta_weights",
    "describe",
    "detach",
    "diagnose",
    "disabled",
    "enable",
    "load",
    "merge",
    "merged",
    "param_groups",
    "plan",
    "prompts",
    "regulariser",
    "save",
    "schedule",
    "step",
    "strength",
    "variants",
]


def __getattr__(name: str) -> type[Variant]:
    """The methods by class name: `lora_lite.LoRA(r=16)`."""
    for key in variants():
        if variant_class(key).__name__ == name:
            return variant_class(key)
    raise AttributeError(f"module 'lora_lite' has no attribute {name!r}")
