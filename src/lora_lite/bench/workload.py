"""What the cost benchmark times: a frozen model, and sides that share its weights."""

import copy
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

SEED = 0
HOST_WIDTH = 256
Dtype = Literal["bfloat16", "float32"]


@dataclass(frozen=True)
class Shape:
    """The Llama and its input; Llama-2-7B's widths unless another is said. Heads are 128 wide, or
    64 below 1024."""

    width: int = 4096
    layers: int = 2
    tokens: int = 4096
    length: int = 1024
    dtype: Dtype = "bfloat16"

    def __post_init__(self) -> None:
        for name, least in dict(width=64, layers=1, tokens=1, length=1).items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be ≥ {least}")
        if self.width % self.head_width:
            raise ValueError(f"width={self.width} must be a multiple of {self.head_width}")
        if self.tokens % min(self.length, self.tokens):
            raise ValueError(f"tokens={self.tokens} must be a multiple of length={self.length}")

    @property
    def intermediate(self) -> int:
        """The MLP's width: 11008 for 4096, in proportion for others, a multiple of 64."""
        return -(-self.width * 43 // (16 * 64)) * 64

    @property
    def head_width(self) -> int:
        return 128 if self.width >= 1024 else 64

    @property
    def batch(self) -> tuple[int, int]:
        """(sequences, tokens in each)."""
        length = min(self.length, self.tokens)
        return self.tokens // length, length


DEFAULT = {
    "cuda": Shape(),
    "cpu": Shape(width=256, tokens=32, length=16, dtype="float32"),
}
"""By the kind of device."""


@dataclass
class Side:
    """A model that is timed, and what is known of it before. graph: its recorded step, if that is
    what is timed. waits: whether a step makes the host wait, and so can't be recorded."""

    name: str
    model: nn.Module
    init_seconds: float | None = None
    call: Callable[..., Any] = field(init=False)
    fullgraph: bool | None = None
    graph: torch.cuda.CUDAGraph | None = None
    waits: bool = False

    def __post_init__(self) -> None:
        self.call = self.model
        self.trained = [p for p in self.model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Workload:
    """A frozen model, a random input and a random gradient to the output."""

    model: nn.Module
    x: Tensor
    y_grad: Tensor
    shape: dict[str, Any]
    device: str

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    def batch(self) -> Any:
        """The input as a calibration batch."""
        return self.x.detach()

    def forward(self, side: Side) -> Tensor:
        return side.call(self.x)

    def step(self, side: Side) -> None:
        if side.graph is not None:
            side.graph.replay()
        else:
            self.forward(side).backward(self.y_grad)

    def clear(self, side: Side) -> None:
        """Forget the gradients, as an optimizer does between steps."""
        for tensor in (self.x, *side.trained):
            tensor.grad = None

    def shell(self) -> nn.Module:
        """The model anew, on the same weights."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(t): t for t in tensors})


class Llama(Workload):
    """A Llama that is given embedded tokens."""

    def batch(self) -> Any:
        return dict(inputs_embeds=self.x.detach(), use_cache=False)

    def forward(self, side: Side) -> Tensor:
        return side.call(**self.batch() | dict(inputs_embeds=self.x)).last_hidden_state


def llama(shape: Shape, device: str) -> Llama:
    """A Llama of random weights without embedding and head, in training mode and frozen."""
    from transformers import LlamaConfig, LlamaModel

    heads = shape.width // shape.head_width
    config = LlamaConfig(
        vocab_size=1,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        hidden_size=shape.width,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(shape.length, 2048),
    )
    return _frozen(
        Llama, lambda: LlamaModel(config), shape.batch, dataclasses.asdict(shape), device
    )


class OneLayer(nn.Module):
    """A linear layer within a model, small enough that a call costs the host's time alone."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(HOST_WIDTH, HOST_WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def one_layer(dtype: Dtype, device: str) -> Workload:
    """A layer and a single token."""
    return _frozen(Workload, OneLayer, (1,), dict(width=HOST_WIDTH, dtype=dtype), device)


def _frozen(
    cls: type[Workload],
    make: Callable[[], nn.Module],
    batch: tuple[int, ...],
    shape: dict[str, Any],
    device: str,
) -> Any:
    dtype, width = getattr(torch, shape["dtype"]), shape["width"]
    with torch.random.fork_rng(devices=[device] if kind(device) == "cuda" else []):
        torch.manual_seed(SEED)
        with torch.device(device):
            model = make().to(dtype).requires_grad_(False).train()
            x, y_grad = (torch.randn(*batch, width, dtype=dtype) for _ in range(2))
    return cls(model, x.requires_grad_(), y_grad, shape, device)


def kind(device: str | torch.device) -> str:
    return torch.device(device).type


def synchronise(device: str | torch.device) -> None:
    if kind(device) == "cuda":
        torch.cuda.synchronize(device)


def now(device: str | torch.device) -> float:
    synchronise(device)
    return time.perf_counter()
