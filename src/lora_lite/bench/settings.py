"""Hyperparameters for the benchmark's small model, where a method's own defaults don't fit it."""

from typing import Any

SETTINGS: dict[str, dict[str, Any]] = {
    # The layers have 96 singular values; the defaults ask for 256.
    "antipasto": {"r": 96},
    "antipasto_rot": {"r": 96},
    "dplr": {"r": 96},
    # Planes lie in groups of outputs, and 64 does not divide 96.
    "road": {"group_size": 32},
}
"""By variant; what is not here runs at its defaults."""

ALSO: tuple[tuple[str, dict[str, Any]], ...] = (
    # LoRA with about the parameters of the smallest methods.
    ("lora", {"r": 1, "alpha": 2.0}),
)
"""Rows of `bench-all` beside one a variant."""
