"""Autograd functions of kernels as torch.compile is to see them: one op, and one for its gradient.

Within them nothing is traced: their shapes are found by running them with all launches left out,
which the plain products among them take part in.
"""

import inspect
import re
from ast import literal_eval
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, library

from lora_lite.observer import Observer
from lora_lite.ops.launch import without_launches

OPS = library.Library("lora_lite", "FRAGMENT")
KINDS = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    float: "float",
    int: "int",
    int | None: "int?",
    bool: "bool",
    Observer | None: "Tensor?",
}
"""A parameter's kind in the op's schema, by its annotation; of an observer it is its probe."""


def one_op(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The function's `apply`, which under torch.compile is an op of the name of its class.

    Its forward takes what has an annotation among `KINDS`, an observer last and after a layer's
    input and matrix; in the op True stands for an observer. It may save its inputs, the same as
    rows of their last axis, its outputs, and tensors of its own; what else it keeps on ctx are
    numbers, tuples of them and None. In the op ctx says that every input needs a gradient.
    """
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", function.__name__).lower().strip("_")
    _, *parameters = inspect.signature(function.forward).parameters.values()
    inputs = ", ".join(f"{KINDS[p.annotation]} {p.name}" for p in parameters)
    observed = parameters[-1].annotation == Observer | None
    count = outputs_of(function)
    plans: dict[tuple[Any, ...], Plan] = {}
    # What the last run was: formulas are asked for right after it.
    last: dict[str, Any] = {}

    def forward(*args: Any) -> list[Tensor]:
        ctx = Context((True,) * len(args))
        given = (*args[:-1], args[-1] is not None or None) if observed else args
        made = function.forward(ctx, *given)
        outputs = [made] if count == 1 else list(made)
        key = tuple((a.dtype, a.is_contiguous()) if isinstance(a, Tensor) else a for a in args)
        if key not in plans:
            plans[key] = Plan.of(ctx, args, outputs)
        last["plan"] = plans[key]
        return outputs + [ctx.saved_tensors[i] for i in plans[key].kept]

    def backward(
        grads: list[Tensor | None], saved: list[Tensor | None], needs: list[bool], numbers: str
    ) -> list[Tensor]:
        ctx = Context(tuple(needs))
        ctx.save_for_backward(*saved)
        vars(ctx).update(values(numbers))
        found = function.backward(ctx, *grads)
        found = found if isinstance(found, tuple) else (found,)
        last["found"] = [g is not None for g in found]
        return [g for g in found if g is not None]

    def define(name: str, schema: str, run: Callable[..., list[Tensor]], key: str) -> Any:
        OPS.define(f"{name}({schema}) -> Tensor[]")
        OPS.impl(name, run, key)
        return getattr(torch.ops.lora_lite, name).default

    def define_opaque(name: str, schema: str, run: Callable[..., list[Tensor]]) -> Any:
        def shapes(*args: Any) -> list[Tensor]:
            with without_launches():
                return run(*args)

        op = define(name, schema, run, "CompositeExplicitAutograd")
        library.register_fake(f"lora_lite::{name}", shapes, lib=OPS)
        return op

    op = define_opaque(name, inputs, forward)
    schema = "Tensor?[] grads, Tensor?[] saved, bool[] needs, str numbers"
    gradient = define_opaque(f"{name}_backward", schema, backward)

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            made = op(*args)
            tensors, ctx.plan = dict(input=args, output=made), last["plan"]
            ctx.save_for_backward(*(tensors[s[0]][s[1]] for s in ctx.plan.sources if s is not None))
            return tuple(made[:count])

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            tensors = iter(ctx.saved_tensors)
            saved = [None if s is None else as_rows(next(tensors), s[2]) for s in ctx.plan.sources]
            needs = list(ctx.needs_input_grad)
            found = iter(gradient(list(grads), saved, needs, ctx.plan.numbers))
            return tuple(next(found) if there else None for there in last["found"])

    # Which it is taken apart into once it is traced: a formula of the op itself would cost the host
    # its lookup at every call.
    taken_apart = lambda *args: [*Node.apply(*args)]
    traced = define(f"{name}_traced", inputs, taken_apart, "CompositeImplicitAutograd")

    def call(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function.apply(*args)
        if observed and args[-1] is not None:
            args = (*args[:-1], probe(*args))
        made = traced(*args)
        return made[0] if count == 1 else tuple(made)

    return call


def probe(x: Tensor, W: Tensor, *others: Any) -> Tensor:
    """That of the observer, which is the last."""
    trained = (t for t in others if isinstance(t, Tensor) and t.requires_grad)
    return others[-1].probe(x if x.requires_grad else next(trained, x), W.shape[1], W.shape[0])


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """torch's own, which costs the host nothing where no graph is made of the backward pass."""
    guarded = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        return (guarded if torch.is_grad_enabled() else backward)(ctx, *grads)

    return run


@cache
def values(numbers: str) -> dict[str, Any]:
    """A plan's numbers, read once."""
    return literal_eval(numbers)


class Context:
    """What an autograd function's ctx is to it."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Tensor | None, ...] = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Plan:
    """Where an op's gradient finds what the function saved.

    sources: of each saved tensor the input or output that it is, and whether as rows; None for
    none. kept: which of them are outputs of the op beside the function's own. numbers: all else.
    """

    sources: list[tuple[str, int, bool] | None]
    kept: list[int]
    numbers: str

    @classmethod
    def of(cls, ctx: Context, inputs: tuple[Any, ...], outputs: list[Tensor]) -> "Plan":
        sources, kept = [], []
        for i, t in enumerate(ctx.saved_tensors):
            source = None if t is None else source_of(t, inputs, outputs)
            if t is not None and source is None:
                source = ("output", len(outputs) + len(kept), False)
                kept.append(i)
            sources.append(source)
        own = ("needs_input_grad", "saved_tensors")
        numbers = {key: value for key, value in vars(ctx).items() if key not in own}
        return cls(sources, kept, repr(numbers))


def source_of(
    t: Tensor, inputs: tuple[Any, ...], outputs: list[Tensor]
) -> tuple[str, int, bool] | None:
    """Which input or output a saved tensor is, and whether as rows; None where it is neither."""
    for kind, tensors in (("input", inputs), ("output", outputs)):
        for i, other in enumerate(tensors):
            if t is other:
                return kind, i, False
            if isinstance(other, Tensor) and shares_storage(t, other):
                return kind, i, True
    return None


def shares_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata


def as_rows(t: Tensor, rows: bool) -> Tensor:
    return t.reshape(-1, t.shape[-1]) if rows else t


def outputs_of(function: type[torch.autograd.Function]) -> int:
    """How many tensors its forward gives."""
    made = inspect.signature(function.forward).return_annotation
    return 1 if made is Tensor else len(made.__args__)
