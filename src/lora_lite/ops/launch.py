"""Launching Triton kernels at little cost to the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from inspect import signature
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

INTERPRETED = False
"""Whether kernels run on the CPU too, by Triton's interpreter (TRITON_INTERPRET=1): for tests."""

_ready: dict[tuple[Any, ...], tuple[Any, ...]] = {}
_parts: dict[int, tuple[int, int]] = {}
_dtype = attrgetter("dtype")
LARGEST_INT32 = 2**31 - 1
_launching = True


def ops_serve(t: Tensor) -> bool:
    """Whether the tensor lies where kernels run: for what `one_op` makes, compiled or not."""
    return t.is_cuda or INTERPRETED


def kernels_serve(t: Tensor) -> bool:
    """Whether kernels take the tensor here: outside such an op the compiler fuses plain forms."""
    return ops_serve(t) and (not _launching or not torch.compiler.is_compiling())


@contextmanager
def without_launches() -> Iterator[None]:
    """A context in which kernels serve and nothing is launched: for the shapes of what is made."""
    global _launching
    before, _launching = _launching, False
    try:
        yield
    finally:
        _launching = before


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 3) -> None:
    """Run `kernel[grid](*args)` where its first tensor lies: args are tensors, then numbers, then
    constants.

    What Triton compiles anew for is looked up by: dtypes and alignments, what it knows of numbers,
    and constants. What is found takes bare addresses: for each tensor Triton would ask the driver
    where it lies. Launch hooks are not called.
    """
    if not _launching:
        return
    t, n = _parts.get(id(kernel)) or _parts_of(kernel, args)
    if INTERPRETED:
        kernel[grid](*args, num_warps=warps, num_stages=stages)
        return
    index = args[0].get_device()
    if index >= 0 and index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return launch(kernel, grid, *args, warps=warps, stages=stages)
    tensors, numbers = args[:t], args[t:n]
    pointers = [*map(Tensor.data_ptr, tensors)]
    key = (
        id(kernel), index, warps, stages, args[n:],
        *map(_dtype, tensors), *[p & 15 for p in pointers],
        *map(type, numbers), *[1 if x == 1 else (x % 16 == 0, x > LARGEST_INT32) for x in numbers],
    )  # fmt: skip
    found = _ready.get(key)
    if found is None:
        from triton.runtime import driver

        compiled = kernel[grid](*args, num_warps=warps, num_stages=stages)
        stream = driver.active.get_current_stream
        _ready[key] = compiled.run, compiled.function, compiled.packed_metadata, stream
        return
    run, function, metadata, stream = found
    y = grid[1] if len(grid) > 1 else 1
    run(grid[0], y, 1, stream(index), function, metadata, None, None, None, *pointers, *args[t:])


def _parts_of(kernel: Any, args: tuple[Any, ...]) -> tuple[int, int]:
    """How many of a kernel's arguments are tensors, and how many are no constants."""
    from triton.language import constexpr

    kinds = [
        2 if p.annotation is constexpr else 0 if isinstance(arg, Tensor) else 1
        for p, arg in zip(signature(kernel.fn).parameters.values(), args, strict=True)
    ]
    assert kinds == sorted(kinds), f"arguments of {kernel.fn.__name__} are out of order"
    _parts[id(kernel)] = kinds.count(0), kinds.count(0) + kinds.count(1)
    return _parts[id(kernel)]


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
