"""Shape checks at run time: jaxtyping and beartype on every function, and on a variant's tensors.

`LORA_LITE_TYPECHECK=1` in the environment switches them on before lora_lite is imported. They are
for eager runs: torch.compile can't trace the checker's own code, see `unchecked`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from lora_lite.variant import Variant

CHECKED = os.environ.get("LORA_LITE_TYPECHECK", "0") not in ("0", "")


def install() -> None:
    """Check every annotated function of lora_lite imported from here on."""
    from jaxtyping import install_import_hook

    hook = install_import_hook("lora_lite", "beartype.beartype").hook
    instrumented = hook.should_instrument
    # Triton reads the source of its kernels, and can't read a checker's.
    hook.should_instrument = lambda name: not name.endswith("_kernels") and instrumented(name)


@contextmanager
def unchecked() -> Iterator[None]:
    """A context without the checks, for code that torch.compile traces."""
    global CHECKED
    from jaxtyping import config

    before = CHECKED, config.jaxtyping_disable
    CHECKED = False
    config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        CHECKED = before[0]
        config.update("jaxtyping_disable", before[1])


def check_tensors(
    variant: "Variant", W: Any, tensors: dict[str, Tensor], widest: tuple[int, int]
) -> None:
    """Raise TypeError where a tensor of a variant has another shape or kind than its annotation
    says on this layer, in an attach of which `widest` are the greatest sizes."""
    expected = variant.shapes(W.d_in, W.d_out, widest)
    for key, tensor in tensors.items():
        kind = variant.annotations[key].dtype[tensor.__class__, " ".join(map(str, expected[key]))]
        if not isinstance(tensor, kind):
            raise TypeError(
                f"{variant.name}: {key} is {tensor.dtype} {tuple(tensor.shape)}, and its "
                f"annotation says {variant.annotations[key].__name__}, here {expected[key]}"
            )


def check_flow(variant: "Variant", W: Any, x: Tensor, y: Tensor) -> None:
    """Raise TypeError where a variant's input or output has another shape or dtype than the
    layer's."""
    before, after = W.sizes()
    axes = x.shape[:-1] if before else x.shape
    dtype = W.compute_dtype(x)
    for what, tensor, shape in (
        ("input", x, (*axes, before) if before else axes),
        ("output", y, (*axes, after)),
    ):
        wanted = dtype if W.casts_input else tensor.dtype
        if tensor.shape != shape or tensor.dtype != wanted:
            raise TypeError(
                f"{variant.name}: the {what} is {tensor.dtype} {tuple(tensor.shape)}, "
                f"and should be {wanted} {tuple(shape)}"
            )
