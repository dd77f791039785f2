"""Launching Triton kernels at little cost to the host."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, reduce, wraps
from importlib import import_module
from operator import attrgetter, or_
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

INTERPRETED = False
"""Whether kernels run on the CPU too, by Triton's interpreter (TRITON_INTERPRET=1): for tests."""

_ready: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_dtype, _address = attrgetter("dtype"), Tensor.data_ptr
MOST_READY = 2**14
"""Launches that are known at a time: of kernels, dtypes, and numbers, which sizes are among."""

_launching = True


def ops_serve(t: Tensor) -> bool:
    """Whether the tensor lies where kernels run: for what `one_op` makes, compiled or not."""
    return t.is_cuda or INTERPRETED


def kernels_serve(t: Tensor) -> bool:
    """Whether kernels take the tensor here: outside such an op the compiler fuses plain forms."""
    return ops_serve(t) and (not _launching or not torch.compiler.is_compiling())


@cache
def kernels(name: str) -> Any:
    """The module of an op's kernels, which needs Triton."""
    return import_module(f"lora_lite.ops.{name}_kernels")


def known_again(f: Callable[..., T]) -> Callable[..., T]:
    """f of numbers alone, which keeps its last results. Without launches it does not, as sizes may
    then be symbols."""
    kept = lru_cache(1024)(f)

    @wraps(f)
    def known(*args: Any) -> T:
        return kept(*args) if _launching else f(*args)

    return known


@contextmanager
def without_launches() -> Iterator[None]:
    """A context in which kernels serve and nothing is launched: for the shapes of what is made."""
    global _launching
    before, _launching = _launching, False
    try:
        yield
    finally:
        _launching = before


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: Sequence[Tensor],
    *numbers: Any,
    warps: int = 4,
    stages: int = 3,
) -> None:
    """Run `kernel[grid](*tensors, *numbers)` where the tensors lie; the last numbers are constants.

    What Triton compiles anew for is looked up by dtypes, alignments and the numbers as they are; it
    is asked for what is not found, and knows again what differs in no way that counts. What is
    found takes bare addresses: for each tensor Triton would ask the driver where it lies. Launch
    hooks are not called.
    """
    if not _launching:
        return
    if INTERPRETED:
        kernel[grid](*tensors, *numbers, num_warps=warps, num_stages=stages)
        return
    index = tensors[0].get_device()
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(kernel, grid, tensors, *numbers, warps=warps, stages=stages)
    pointers = [*map(_address, tensors)]
    key = (
        id(kernel), index, warps, stages, numbers, *map(type, numbers), *map(_dtype, tensors),
        # Almost always all are aligned.
        reduce(or_, pointers) & 15 and tuple(p & 15 for p in pointers),
    )  # fmt: skip
    found = _ready.get(key)
    if found is None:
        from triton.runtime import driver

        compiled = kernel[grid](*tensors, *numbers, num_warps=warps, num_stages=stages)
        stream = driver.active.get_current_stream
        if len(_ready) == MOST_READY:
            _ready.clear()
        _ready[key] = compiled.run, compiled.function, compiled.packed_metadata, stream
        return
    run, function, metadata, stream = found
    y = grid[1] if len(grid) > 1 else 1
    run(grid[0], y, 1, stream(index), function, metadata, None, None, None, *pointers, *numbers)


@cache
def _shared_memory_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def shared_memory_bytes(t: Tensor) -> int:
    """What one block may have where t lies."""
    return _shared_memory_bytes(t.device) if t.is_cuda else 1 << 30


# Triton's own are compile-time functions, which cost the host several times as much.


def cdiv(a: int, b: int) -> int:
    """The least whole number not below a/b."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of 2 not below n."""
    # int: of a size that the compiler leaves open no bits can be counted.
    return 1 << (int(n) - 1).bit_length()
