"""Launching Triton kernels at little cost to the host."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

INTERPRETED = False
"""Whether kernels run on the CPU too, by Triton's interpreter (TRITON_INTERPRET=1): for tests."""

_compiled: dict[tuple[Any, ...], Any] = {}
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
    """Run `kernel[grid](*args)`, constants in their places last, where its first tensor lies.

    What a launch specialises on is looked up by dtypes, alignments and numbers, and a kernel that
    is found takes bare addresses: for each tensor Triton would ask the driver where it lies.
    """
    if not _launching:
        return
    device = args[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, *args, warps=warps, stages=stages)
    values, kinds = [], [id(kernel), grid, device.index, warps, stages]
    for arg in args:
        if isinstance(arg, Tensor):
            address = arg.data_ptr()
            values.append(address)
            kinds.append(arg.dtype)
            kinds.append(address % 16)
        else:
            values.append(arg)
            kinds.append(arg)
    key = tuple(kinds)
    run = _compiled.get(key)
    if run is not None:
        run(*values)
        return
    compiled = kernel[grid](*args, num_warps=warps, num_stages=stages)
    # An interpreted kernel gives nothing to keep.
    if compiled is not None:
        _compiled[key] = compiled[(*grid, 1, 1)[:3]]


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
