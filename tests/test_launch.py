"""What a launch finds again, and what it hands to Triton's runner: with a kernel that records."""

from types import SimpleNamespace

import pytest
import torch

from lora_lite.ops import launch as launch_module
from lora_lite.ops.launch import launch

pytest.importorskip("triton")


class Recorder:
    """Stands for a compiled kernel: what was compiled, and what was run."""

    def __init__(self):
        self.compiled, self.runs = [], []

    def __getitem__(self, grid):
        def run(*args, num_warps, num_stages):
            self.compiled.append((args, num_warps, num_stages))
            number = len(self.compiled)
            return SimpleNamespace(
                run=lambda *args: self.runs.append((number, *args)),
                function=f"function {number}",
                packed_metadata=f"metadata {number}",
            )

        return run


@pytest.fixture
def kernel(monkeypatch):
    driver = SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda index: 7))
    monkeypatch.setattr("triton.runtime.driver", driver)
    monkeypatch.setattr(launch_module, "INTERPRETED", False)
    monkeypatch.setattr(launch_module, "_ready", {})
    return Recorder()


def test_a_kernel_found_again_takes_addresses(kernel):
    x, y = torch.zeros(64), torch.zeros(64)
    launch(kernel, (3,), (x, y), 40, 0.5, 16, warps=8)
    assert len(kernel.compiled) == 1 and not kernel.runs
    launch(kernel, (2, 5), (y, x), 40, 0.5, 16, warps=8)
    assert len(kernel.compiled) == 1
    expected = (2, 5, 1, 7, "function 1", "metadata 1", None, None, None)
    assert kernel.runs == [(1, *expected, y.data_ptr(), x.data_ptr(), 40, 0.5, 16)]


def test_what_is_known_is_bounded(kernel, monkeypatch):
    """Of a batch's sizes there is no end."""
    monkeypatch.setattr(launch_module, "MOST_READY", 3)
    x = torch.zeros(64)
    for n in [*range(10), 9]:
        launch(kernel, (1,), (x, x), n, 0.5, 16)
        assert len(launch_module._ready) <= 3
    assert len(kernel.compiled) == 10 and len(kernel.runs) == 1


def test_other_arguments_are_kept_apart(kernel):
    x, y = torch.zeros(64), torch.zeros(64)
    usual = dict(x=x, y=y, n=40, scale=0.5, block=16)
    others = [
        {},
        dict(x=x.half()),
        dict(x=x[1:]),
        dict(y=y[1:]),
        dict(y=y[2:]),
        dict(n=1),
        dict(n=48),
        dict(n=2**31),
        dict(n=40.0),
        dict(scale=0.25),
        dict(block=32),
    ]
    for _repeat in range(2):
        for change in others:
            tensors, numbers = parted(usual | change)
            launch(kernel, (1,), tensors, *numbers)
        tensors, numbers = parted(usual)
        launch(kernel, (1,), tensors, *numbers, warps=2)
        launch(kernel, (1,), tensors, *numbers, stages=2)
        assert len(kernel.compiled) == len(others) + 2
    assert [run[0] for run in kernel.runs] == list(range(1, len(others) + 3))


def parted(arguments):
    """Tensors and numbers."""
    values = list(arguments.values())
    return values[:2], values[2:]
