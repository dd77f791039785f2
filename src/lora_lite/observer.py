"""What shows a method, in training, what its layer reads and the gradient of what it gives."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float32
from torch import Tensor

from lora_lite.ops.launch import kernels
from lora_lite.ops.selection import Squares


class Observer(NamedTuple):
    """A method's `observe`, and the tensors of the layer that it is for."""

    observe: Callable[..., None]
    tensors: dict[str, Tensor]

    def show(self, x: Tensor | Squares, g: Tensor | Squares) -> None:
        """Within a backward pass of which no graph is made."""
        self.observe(x, g, **self.tensors)

    def watch(self, y: Tensor, x: Tensor) -> Tensor:
        """y itself; its backward shows x and the gradient of y, once per backward."""
        return _Watched.apply(y, x, self.observe, tuple(self.tensors), *self.tensors.values())

    def probe(self, of: Tensor, d_in: int, d_out: int) -> Tensor:
        """A vector for an op that shows nothing, which nothing reads: its gradient is the mean of
        x_i² over the tokens, and that of g_i² behind it. Wanted wherever a gradient to `of` is."""
        tensors = self.tensors.values()
        return _Probe.apply(of, d_in, d_out, self.observe, tuple(self.tensors), *tensors)


def shown(
    observer: Observer | bool | None, x: Tensor | Squares, g: Tensor | Squares
) -> Float32[Tensor, " d"] | None:
    """For the backward of an op's function: shows its observer x and g; where True stands for one,
    the gradient to its probe."""
    if isinstance(observer, Observer):
        observer.show(x, g)
    elif observer:
        sums = [t if isinstance(t, Squares) else kernels("selection").squares(t) for t in (x, g)]
        return torch.cat([squares.total() for squares in sums]).div_(sums[0].tokens)
    return None


# Tensors are no part of what is saved: they change between a forward and its backward when several
# forwards come before. They are arguments, lest the compiler take them for constants.


class _Watched(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        x: Tensor,
        observe: Callable[..., None],
        keys: tuple[str, ...],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.observe, ctx.keys, ctx.tensors = observe, keys, tensors
        return y.view_as(y)

    @staticmethod
    @torch.no_grad()
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        Observer(ctx.observe, dict(zip(ctx.keys, ctx.tensors))).show(x, g)
        return (g, None, None, None, *[None] * len(ctx.tensors))


class _Probe(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        of: Tensor,
        d_in: int,
        d_out: int,
        observe: Callable[..., None],
        keys: tuple[str, ...],
        *tensors: Tensor,
    ) -> Tensor:
        ctx.sizes = d_in, d_out
        ctx.observe, ctx.keys, ctx.tensors = observe, keys, tensors
        return of.new_empty(d_in + d_out, dtype=torch.float32)

    @staticmethod
    @torch.no_grad()
    def backward(ctx: Any, means: Tensor) -> tuple[None, ...]:
        # Means, since a number of tokens that the compiler leaves open can't come along.
        x, g = (Squares(part[None], 1) for part in means.split(ctx.sizes))
        Observer(ctx.observe, dict(zip(ctx.keys, ctx.tensors))).show(x, g)
        return (None,) * (5 + len(ctx.tensors))
