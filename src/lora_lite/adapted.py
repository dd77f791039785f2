"""The one adapted layer, and the adapters it carries."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lora_lite import shapes
from lora_lite.base import Base, Prompt, autocasting, base_kind
from lora_lite.observer import Observer
from lora_lite.variant import Variant


class Attachment:
    """What the adapters of one attach have in common.

    widest: the greatest d_in and d_out of its layers. shared: the tensors that all its sites share.
    step, total: optimizer steps taken and planned. unadvanced: optimizer steps that moved its
    tensors and did not advance `step`. was_trainable: names, in the model that was adapted, of the
    parameters that it froze. prompt: what is known of the call under way; None between calls.
    """

    def __init__(self, name: str, seed: int, widest: tuple[int, int]) -> None:
        self.name, self.seed, self.widest = name, seed, widest
        self.step: int = 0
        self.total: int | None = None
        self.unadvanced: int = 0
        self.shared = nn.Module()
        self.was_trainable: tuple[str, ...] = ()
        self.prompt: Prompt | None = None


class Adapter(nn.Module):
    """One method at one layer: its tensors, and whether and how strongly it acts.

    site: the layer's name in the model that was adapted. fingerprint: of the layer's weights.
    alone: whether none of its tensors is shared.
    A layer that is tied to an embedding borrows the embedding's own adapter.
    """

    def __init__(
        self, site: str, variant: Variant, attachment: Attachment, tensors: dict[str, Tensor]
    ) -> None:
        super().__init__()
        self.site, self.variant, self.attachment = site, variant, attachment
        self.enabled, self.strength = True, 1.0
        self.fingerprint: str | None = None
        self.prepares = type(variant).prepare is not Variant.prepare
        # Asked once, as a compiled call is guarded by all that its trace reads.
        self.observes = variant.observes
        self.keys = tuple((key, variant.specs[key].shared) for key in variant.tensor_names())
        self.alone = not any(shared for _, shared in self.keys)
        for key, tensor in tensors.items():
            if not variant.specs[key].shared:
                register(self, variant, key, tensor)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the method at this layer, shared ones included, by their names."""
        if self.alone:
            # As getattr finds them, at less cost to the host.
            return {**self._parameters, **self._buffers}
        return {
            key: getattr(self.attachment.shared if shared else self, key)
            for key, shared in self.keys
        }

    def forward(self, x: Tensor, W: Base) -> Tensor:
        variant, tensors = self.variant, self.tensors()
        if not (self.alone and W.targetable):  # where layers lie on several devices
            for key, shared in self.keys:
                if shared or not W.targetable:
                    tensors[key] = tensors[key].to(x.device)
        dtype = W.compute_dtype(x)
        if W.casts_input and x.dtype != dtype:
            x = x.to(dtype)
        if variant.needs_prompt:
            W.prompt = prompt_of(x, self.attachment.prompt)
            if W.prompt is None:
                raise ValueError(
                    f"{variant.name}: {self.site} does not know the prompts; call the model with "
                    "prompt_lengths=, a tensor (batch,), or within ll.prompts(model, lengths)"
                )
        tensors_in = tensors
        checked = shapes.CHECKED and not torch.compiler.is_compiling()
        if checked:
            shapes.check_tensors(variant, W, tensors, self.attachment.widest)
        if self.prepares:
            wide = torch.promote_types(dtype, torch.float32)
            with without_autocast(x.device.type):
                tensors_in = variant.prepare(W, **cast(tensors, wide))
        if variant.casts:
            tensors_in = cast(tensors_in, dtype)
        if self.training and self.observes and torch.is_grad_enabled():
            frozen = {key: t for key, t in tensors.items() if not variant.specs[key].trainable}
            W.observer = Observer(variant.observe, frozen)
        if self.strength != 1:
            run, z = W.run, W(x)
            W.below = lambda h, *rest, **named: z if h is x else run(h, *rest, **named)
        y = variant.forward(x, W, **tensors_in)
        if self.strength != 1:
            y = z + self.strength * (y - z)
        if W.observer is not None:  # and nothing took it over
            y = W.observer.watch(y, x)
        if checked:
            shapes.check_flow(variant, W, x, y)
        return y

    def extra_repr(self) -> str:
        state = "" if self.enabled and self.strength == 1 else f", strength={self.strength}"
        return f"{self.variant}" + (state if self.enabled else ", off")


PROMPTS: WeakKeyDictionary[torch.UntypedStorage, Prompt] = WeakKeyDictionary()
"""By what blocks' inputs are stored in: what was known of the calls that they belong to."""


def prompt_of(x: Tensor, prompt: Prompt | None) -> Prompt | None:
    """What is known of the call that a block's input belongs to: the one under way or, where
    checkpointing runs the block again in backward, maybe after other calls, that of the first run.
    """
    if torch.compiler.is_compiling():
        return prompt
    try:
        storage = x.untyped_storage()
    except NotImplementedError:  # under torch.func
        return prompt
    if prompt is None:
        return PROMPTS.get(storage)
    PROMPTS[storage] = prompt
    return prompt


class Adapted:
    """Mixed in front of a layer's own class: the layer stays itself and runs its adapters.

    Those of its adapters that are on compose in the order attached, which is that of `kinds`, each
    seeing the one before as its frozen layer.
    """

    adapters: nn.ModuleDict
    # Those of a layer whose weight it shares: no children, lest they be saved twice.
    borrowed: dict[str, Adapter]
    kinds: dict[str, type[Base]]
    base_class: type[nn.Module]
    # A forward set on the instance (accelerate does so) would hide the class's.
    instance_forward: Any = None
    merged: bool = False

    def frozen(self, *args: Any, **kwargs: Any) -> Any:
        """The layer without its adapters."""
        if self.instance_forward is not None:
            return self.instance_forward(*args, **kwargs)
        return super().forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args:  # layer(input=x)
            args = (kwargs.pop(next(iter(kwargs))),)
        run = None
        if not self.merged:
            own, borrowed = self._modules["adapters"]._modules, self.borrowed
            for name, kind in self.kinds.items():
                adapter = borrowed[name] if name in borrowed else own[name]
                if adapter.enabled:
                    run = functools.partial(_apply, adapter, kind(self, run))
        return self.frozen(*args, **kwargs) if run is None else run(*args, **kwargs)

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # The class is made at run time, so copies and pickles name what it is made of.
        return _rebuild, (self.base_class,), self.__dict__


def _apply(adapter: Adapter, W: Base, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    W.args, W.kwargs = args, kwargs
    return W.outcome(adapter.forward(x, W))


@functools.cache
def adapted_class(base_class: type[nn.Module]) -> type[nn.Module]:
    """The class of a `base_class` layer that carries adapters."""
    namespace = {
        "base_class": base_class,
        "__module__": base_class.__module__,
        "__qualname__": base_class.__qualname__,
    }
    return type(base_class.__name__, (Adapted, base_class), namespace)


def _rebuild(base_class: type[nn.Module]) -> nn.Module:
    cls = adapted_class(base_class)
    return cls.__new__(cls)


def put(layer: nn.Module, name: str, adapter: Adapter, tied: bool = False) -> None:
    """Add an adapter, or a tied layer's, to a layer, adapting the layer first if it has none."""
    kind = base_kind(layer, adapter.variant.site, targetable=not tied)
    if not isinstance(layer, Adapted):
        instance_forward = layer.__dict__.pop("forward", None)
        layer.__class__ = adapted_class(type(layer))
        layer.adapters, layer.borrowed, layer.kinds = nn.ModuleDict(), {}, {}
        if instance_forward is not None:
            layer.instance_forward = instance_forward
    layer.kinds[name] = kind
    (layer.borrowed if tied else layer.adapters)[name] = adapter


def remove(layer: nn.Module, name: str) -> None:
    """Take an adapter off a layer; with the last one the layer is what it was."""
    del (layer.borrowed if name in layer.borrowed else layer.adapters)[name], layer.kinds[name]
    if not layer.kinds:
        del layer.adapters, layer.borrowed, layer.kinds
        instance_forward = layer.__dict__.pop("instance_forward", None)
        layer.__dict__.pop("merged", None)
        layer.__class__ = layer.base_class
        if instance_forward is not None:
            layer.forward = instance_forward


def register(module: nn.Module, variant: Variant, key: str, tensor: Tensor) -> None:
    """Make a tensor the module's parameter or buffer, as its spec says."""
    spec = variant.specs[key]
    if spec.trainable:
        trained = learning_rate_factor(variant, key) != 0
        module.register_parameter(key, nn.Parameter(tensor, requires_grad=trained))
    else:
        module.register_buffer(key, tensor)


def learning_rate_factor(variant: Variant, key: str) -> float:
    """The multiplier that a tensor's spec puts on the learning rate."""
    lr = variant.specs[key].lr
    return lr(variant) if callable(lr) else lr


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The floating-point tensors in another dtype, the others as they are."""
    return {
        key: t.to(dtype) if t.dtype != dtype and t.is_floating_point() else t
        for key, t in tensors.items()
    }


def without_autocast(kind: str) -> AbstractContextManager[None]:
    """A context in which autocast is off."""
    return torch.autocast(kind, enabled=False) if autocasting(kind) else nullcontext()


def carried(layer: nn.Module) -> dict[str, Adapter]:
    """The adapters that a layer runs, its own and those borrowed, by name."""
    return {**layer.adapters, **layer.borrowed} if isinstance(layer, Adapted) else {}


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, layer) of every layer that carries adapters, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, Adapted):
            yield clean(name), module


def all_adapters(model: nn.Module) -> list[tuple[str, nn.Module, Adapter]]:
    """(layer name, layer, adapter) of every adapter on the model, each once."""
    return [
        (path, layer, adapter)
        for path, layer in adapted_layers(model)
        for adapter in layer.adapters.values()
    ]


def adapters(model: nn.Module, name: str | None = None) -> list[tuple[str, nn.Module, Adapter]]:
    """Those of one name, or all. Raises: ValueError where the model has none of them."""
    every = all_adapters(model)
    found = [entry for entry in every if name in (None, entry[2].attachment.name)]
    if not found:
        have = ", ".join(sorted({repr(adapter.attachment.name) for _, _, adapter in every}))
        raise ValueError(
            f"the model has no adapter {name!r}; it has {have}"
            if have
            else "the model has no adapters; attach one first"
        )
    return found


WRAPPERS = ("_orig_mod", "module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def clean(name: str) -> str:
    """A module's name without the parts that compile, DDP, checkpointing and FSDP wrap it in."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def bare(model: nn.Module) -> nn.Module:
    """The model inside such wrappers."""
    while len(model._modules) == 1 and (wrapper := next(iter(model._modules))) in WRAPPERS:
        model = model._modules[wrapper]
    return model
