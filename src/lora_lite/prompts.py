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
    """Before each call of a model: take `prompt_lengths` from its arguments, read its
    `attention_mask` and cache, and tell the adapters of some attaches.

    given: the lengths that `prompts` set. masked_at: where attention_mask stands among the model's
    positional arguments.
    """

    def __init__(self, model: nn.Module) -> None:
        self.attachments: list[Attachment] = []
        self.given: Tensor | None = None
        names = list(inspect.signature(model.forward).parameters)
        self.masked_at = names.index("attention_mask") if "attention_mask" in names else None

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        lengths = kwargs.pop("prompt_lengths", self.given)
        mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
        if mask is None and self.masked_at is not None and len(args) > self.masked_at:
            mask = args[self.masked_at]
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        seen = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
        for attachment in self.attachments:
            attachment.prompt = None if lengths is None else Prompt(lengths, mask, seen)
        return args, kwargs


def learn_prompts(model: nn.Module, attachment: Attachment) -> None:
    """Tell an attach's adapters of each call of the model from now on."""
    root = bare(model)
    hook = next((hook for module, _, hook in prompt_hooks(model) if module is root), None)
    if hook is None:
        hook = PromptHook(root)
        root.register_forward_pre_hook(hook, with_kwargs=True)
    hook.attachments.append(attachment)


def prompt_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, int, PromptHook]]:
    """(module, key, hook) of each such hook on a model."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(hook, PromptHook):
                yield module, key, hook


def forget_prompts(model: nn.Module, attachment: Attachment) -> None:
    """The reverse of `learn_prompts`."""
    for module, key, hook in prompt_hooks(model):
        hook.attachments = [other for other in hook.attachments if other is not attachment]
        if not hook.attachments:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]


@contextmanager
def prompts(model: nn.Module, lengths: int | Sequence[int] | Tensor) -> Iterator[None]:
    """A context in which the model's prompts have these lengths, in tokens without padding: one for
    each example of a batch, or one for all. For calls that can't say `prompt_lengths=` themselves,
    such as `generate`.

    Raises: ValueError where no adapter asks for prompts, or a length is below 1.
    """
    adapters(model)
    lengths = torch.as_tensor(lengths).reshape(-1)
    if not len(lengths) or (lengths < 1).any():
        raise ValueError(f"lengths={lengths.tolist()} must be ≥ 1, one for each example")
    hooks = [hook for _, _, hook in prompt_hooks(model)]
    if not hooks:
        raise ValueError("no adapter on the model asks for its prompts")
    before = [hook.given for hook in hooks]
    for hook in hooks:
        hook.given = lengths
    try:
        yield
    finally:
        for hook, given in zip(hooks, before):
            hook.given = given
