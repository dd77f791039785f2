"""Where a call's prompts end, for the methods that act on a prompt's tokens alone."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lora_lite.adapted import Attachment, adapters, bare
from lora_lite.base import Prompt


class PromptHook:
    """About each call of a model: take `prompt_lengths` from its arguments, read its
    `attention_mask` and cache, tell the adapters of some attaches, and let them forget.

    given: the lengths that `prompts` set.
    """

    def __init__(self, model: nn.Module) -> None:
        self.attachments: list[Attachment] = []
        self.given: Tensor | None = None
        self.arguments = list(inspect.signature(model.forward).parameters)
        self.handles = (
            model.register_forward_pre_hook(self, with_kwargs=True),
            model.register_forward_hook(self.after, always_call=True),
        )

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if getattr(model, "_is_replica", False):
            raise ValueError(
                "nn.DataParallel's replicas would take each other's prompts; use "
                "DistributedDataParallel"
            )
        kwargs = dict(kwargs)
        lengths = kwargs.pop("prompt_lengths", None)
        copies = lengths is None
        lengths = self.given if copies else as_lengths(lengths, "prompt_lengths")
        said = dict(zip(self.arguments, args)) | kwargs
        cache = said.get("past_key_values", said.get("cache_params"))
        prompt = Prompt(lengths, said.get("attention_mask"), tokens_in(cache), copies)
        for attachment in self.attachments:
            attachment.prompt = None if lengths is None else prompt
        return args, kwargs

    def after(self, model: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        for attachment in self.attachments:
            attachment.prompt = None


def as_lengths(lengths: Any, what: str) -> Tensor:
    """Lengths as a tensor (examples,). Raises: ValueError where they aren't whole numbers."""
    tensor = torch.as_tensor(lengths)
    tensor = tensor[None] if tensor.ndim == 0 else tensor
    whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    if tensor.ndim != 1 or not whole or not len(tensor):
        raise ValueError(
            f"{what} is {tensor.dtype} of shape {tuple(tensor.shape)}; give whole numbers, one for "
            "each example or one for all"
        )
    return tensor


def tokens_in(cache: Any) -> int | None:
    """How many tokens a cache holds; None where it can't say."""
    try:
        return 0 if cache is None else cache.get_seq_length()
    except (AttributeError, ValueError):
        return None


def check_reader(model: nn.Module) -> None:
    """Raise ValueError where a part of the model reads the prompts, and is called without it."""
    root = bare(model)
    if getattr(getattr(root, "config", None), "is_encoder_decoder", False):
        encoder = root.get_encoder()
        name = next(name for name, module in root.named_modules() if module is encoder)
        if name:
            raise ValueError(
                f"{type(root).__name__} reads prompts by its {name}, which generate calls by "
                f"itself; attach to model.{name}, freeze the rest, and say the prompts within "
                f"ll.prompts(model.{name}, lengths)"
            )


def learn_prompts(model: nn.Module, attachment: Attachment) -> None:
    """Tell an attach's adapters of each call of the model from now on."""
    root = bare(model)
    hook = next((hook for module, hook in prompt_hooks(model) if module is root), None)
    (hook or PromptHook(root)).attachments.append(attachment)


def prompt_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, PromptHook]]:
    """(module, hook) of each such hook on a model."""
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, PromptHook):
                yield module, hook


def forget_prompts(model: nn.Module, attachment: Attachment) -> None:
    """The reverse of `learn_prompts`."""
    for _, hook in prompt_hooks(model):
        hook.attachments = [other for other in hook.attachments if other is not attachment]
        if not hook.attachments:
            for handle in hook.handles:
                handle.remove()


@contextmanager
def prompts(model: nn.Module, lengths: int | Sequence[int] | Tensor) -> Iterator[None]:
    """A context in which the model's prompts have these lengths, in tokens without padding: one for
    each example of a batch, or one for all. For calls that can't say `prompt_lengths=` themselves,
    such as `generate`, whose beams are known to be several of one example.

    Raises: ValueError where no adapter asks for prompts, or a length is below 1.
    """
    adapters(model)
    given = as_lengths(lengths, "lengths")
    if (given < 1).any():
        raise ValueError(f"lengths={given.tolist()} must be ≥ 1, one for each example")
    hooks = [hook for _, hook in prompt_hooks(model)]
    if not hooks:
        raise ValueError("no adapter on the model asks for its prompts")
    before = [hook.given for hook in hooks]
    for hook in hooks:
        hook.given = given
    try:
        yield
    finally:
        for hook, earlier in zip(hooks, before):
            hook.given = earlier
