"""Which layers a method goes to."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from lora_lite.adapted import clean
from lora_lite.base import Base, base_kind
from lora_lite.variant import nearest

Targets = str | Iterable[str] | Callable[[str, nn.Module], bool]

HEADS = ("lm_head", "head", "classifier", "score", "qa_outputs", "output_projection", "embed_out")


def find_sites(
    model: nn.Module, site: str, targets: Targets, exclude: Targets | None
) -> dict[str, nn.Module]:
    """Layer by name, in the model's order, for `attach`'s `targets` and `exclude`; "all-linear"
    stands for the usual layers of any site.

    Raises: ValueError where a pattern matches nothing, names a layer that the site can't be, or a
    layer whose forward never runs.
    """
    modules = {clean(name): module for name, module in model.named_modules()}
    candidates = {name: m for name, m in modules.items() if base_kind(m, site)}
    if not candidates:
        raise ValueError(f"{type(model).__name__} has no layer of the kind {site!r} to adapt")
    if isinstance(targets, str) and targets == "all-linear":
        chosen = USUAL[site](model, modules, candidates)
    else:
        chosen = matching(targets, candidates, modules, "targets")
    if exclude is not None:
        chosen = chosen - matching(exclude, candidates, modules, "exclude")
    if not chosen:
        raise ValueError("targets and exclude leave no layer; exclude fewer")
    bypassed = never_called(model)
    for name in candidates:
        if name in chosen and candidates[name] in bypassed:
            raise ValueError(
                f"{name} is read by {bypassed[candidates[name]]} without its forward being called, "
                "so an adapter there would do nothing; leave it out with `exclude`, or replace "
                "that module by one that calls its layers"
            )
    sites, along = {}, set()
    for name, layer in candidates.items():
        if name in chosen and layer not in along:
            sites[name] = layer
            along |= set(tied_layers(model, layer, site).values())
    return sites


def matching(
    patterns: Targets,
    candidates: Mapping[str, nn.Module],
    modules: Mapping[str, nn.Module],
    argument: str,
) -> set[str]:
    """The candidates that a list of name suffixes, a regular expression over the whole name, or a
    predicate (name, layer) picks."""
    if callable(patterns):
        found = {name for name, layer in candidates.items() if patterns(name, layer)}
        if not found:
            raise ValueError(f"{argument}: the predicate picks none of {len(candidates)} layers")
        return found
    if isinstance(patterns, str):
        tests = {patterns: lambda name: re.fullmatch(patterns, name) is not None}
    else:
        tests = {p: lambda name, p=p: is_suffix(p, name) for p in patterns}
    found = set()
    for pattern, test in tests.items():
        hits = {name for name in candidates if test(name)}
        if not hits:
            raise ValueError(f"{argument}: {pattern!r} matches {_miss(test, candidates, modules)}")
        found |= hits
    return found


def overridden(
    overrides: Mapping[str, Mapping[str, Any]], sites: Mapping[str, nn.Module]
) -> dict[str, dict[str, Any]]:
    """Hyperparameters by layer name; a key is a name suffix or a regular expression over the
    whole name, and later keys win."""
    out: dict[str, dict[str, Any]] = {name: {} for name in sites}
    for pattern, hyperparameters in overrides.items():
        test = lambda name, p=pattern: is_suffix(p, name) or re.fullmatch(p, name)
        hits = [name for name in sites if test(name)]
        if not hits:
            raise ValueError(f"overrides: {pattern!r} matches {_miss(test, sites, {})}")
        for name in hits:
            out[name] |= hyperparameters
    return out


def is_suffix(pattern: str, name: str) -> bool:
    return name == pattern or name.endswith("." + pattern)


def _miss(
    test: Callable[[str], Any], candidates: Iterable[str], modules: Mapping[str, nn.Module]
) -> str:
    other = next((name for name in modules if test(name)), None)
    if other is not None:
        return f"only {other}, a {type(modules[other]).__name__}, which this method can't adapt"
    leaves = {name.rsplit(".", 1)[-1] for name in candidates}
    pattern = getattr(test, "__defaults__", None) or ("",)
    return f"no layer; {nearest(str(pattern[0]).rsplit('.', 1)[-1], leaves)}"


def usual_linear(
    model: nn.Module, modules: Mapping[str, nn.Module], candidates: Mapping[str, nn.Module]
) -> set[str]:
    return candidates.keys() - heads(model, modules)


def usual_norms(
    model: nn.Module, modules: Mapping[str, nn.Module], candidates: Mapping[str, nn.Module]
) -> set[str]:
    return set(candidates)


def usual_embedding(
    model: nn.Module, modules: Mapping[str, nn.Module], candidates: Mapping[str, nn.Module]
) -> set[str]:
    """The model's input embedding, or its only one."""
    try:
        own = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        own = None
    found = {name for name, m in candidates.items() if m is own}
    if not found and len(candidates) > 1:
        raise ValueError(
            f"the model has the embeddings {', '.join(candidates)}; say which by `targets`"
        )
    return found or set(candidates)


def usual_blocks(
    model: nn.Module, modules: Mapping[str, nn.Module], candidates: Mapping[str, nn.Module]
) -> set[str]:
    """The outermost ones that an nn.ModuleList holds."""
    items = {id(m) for held in modules.values() if isinstance(held, nn.ModuleList) for m in held}
    found = {name for name, m in candidates.items() if id(m) in items}
    if not found:
        raise ValueError("the model holds no blocks in an nn.ModuleList; say which by `targets`")
    return {n for n in found if not any(n.startswith(f"{other}.") for other in found)}


USUAL = dict(linear=usual_linear, norm=usual_norms, embedding=usual_embedding, block=usual_blocks)
"""The layers that a method of each site goes to unless told otherwise."""


def tied_layers(model: nn.Module, layer: nn.Module, site: str) -> dict[str, nn.Module]:
    """The layers that share a layer's weight and are adapted with it, by name."""
    if all(kind.targetable for kind in Base.kinds if kind.site == site):
        return {}
    return {
        clean(name): module
        for name, module in model.named_modules()
        if module is not layer
        and module._parameters.get("weight") is layer.weight
        and base_kind(module, site, targetable=False)
    }


def heads(model: nn.Module, modules: Mapping[str, nn.Module]) -> set[str]:
    """Names of output heads, and of layers that share their weight with an embedding."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = {id(m.weight) for m in modules.values() if isinstance(m, nn.Embedding)}
    return {
        name
        for name, m in modules.items()
        if m is output
        or name.rsplit(".", 1)[-1] in HEADS
        or id(getattr(m, "weight", None)) in embeddings
    }


def never_called(model: nn.Module) -> dict[nn.Module, str]:
    """Layers whose parent reads their weights itself, with the parent in words."""
    bypassed = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            bypassed[module.out_proj] = f"{clean(name) or 'the model'} (nn.MultiheadAttention)"
        if isinstance(module, nn.TransformerEncoderLayer):
            where = f"{clean(name) or 'the model'} (nn.TransformerEncoderLayer's fast path)"
            own = (module.linear1, module.linear2, module.norm1, module.norm2)
            bypassed |= dict.fromkeys(own, where)
    return bypassed
