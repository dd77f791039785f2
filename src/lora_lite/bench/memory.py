"""Peak memory, measured alike on CPU and CUDA."""

from collections.abc import Callable
from itertools import accumulate

import torch
from torch import nn


def peak_bytes(step: Callable[[], object], resident_bytes: int, device: str) -> int:
    """The most bytes that torch's allocator held while `step` ran, what was there before included.

    On CUDA this is `torch.cuda.max_memory_allocated`. The CPU's allocator keeps no such count, so
    it is summed from the profiler's record of every allocation and release, on top of
    `resident_bytes`. What libraries allocate past torch is in neither.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    records = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    records.sort(key=lambda e: e.start_ns())
    return resident_bytes + max(accumulate((e.nbytes() for e in records), initial=0))


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of a model's tensors, their gradients and the optimizer's state, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
