"""Peak memory, measured alike on CPU and CUDA."""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(step: Callable[[], object], resident: int, device: str) -> int:
    """The most bytes that tensors held while `step` ran, those held before included.

    On CUDA this is `torch.cuda.max_memory_allocated`. The CPU's allocator keeps no such count, so
    there every storage that an operation makes is followed until it is freed, on top of the
    `resident` bytes; what a kernel uses within itself is not seen.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    with LiveStorages() as live:
        step()
    return resident + live.peak


def resident_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of a model's tensors and of the optimizer's state, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    state = optimizer.state.values() if optimizer else ()
    tensors += [t for s in state for t in s.values() if torch.is_tensor(t)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


class LiveStorages(TorchDispatchMode):
    """Counts the bytes of all storages made inside it: those that live `now`, and the `peak`."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._live: dict[int, weakref.ref] = {}

    def __torch_dispatch__(
        self,
        operation: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        out = operation(*args, **(kwargs or {}))
        given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        for storage in (t.untyped_storage() for t in tree_leaves(out) if _is_tensor(t)):
            key, n = id(storage), storage.nbytes()
            if key not in given and key not in self._live:
                self.now += n
                self.peak = max(self.peak, self.now)
                self._live[key] = weakref.ref(storage, lambda _, k=key, n=n: self._freed(k, n))
        return out

    def _freed(self, key: int, n: int) -> None:
        self.now -= n
        del self._live[key]


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)
