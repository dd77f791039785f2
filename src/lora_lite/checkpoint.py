"""Adapters in a file: safetensors, with the method's configuration in its metadata."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lite.adapted import Adapter, Attachment, adapters, clean
from lora_lite.attach import (
    Plan,
    Site,
    base_parameters,
    blame,
    fingerprint,
    fresh_tensors,
    install,
    make_adapter,
    share,
    sites_of,
    tensor_dtype,
)
from lora_lite.base import base_kind
from lora_lite.targets import find_sites, tied_layers
from lora_lite.variant import Variant, configure, nearest, variants

FORMAT, VERSION = "lora-lite", 1
PathLike = str | os.PathLike[str]


def save(model: nn.Module, path: PathLike, name: str | None = None) -> None:
    """Write one adapter to a file; `name` may be left out where the model has only one.

    The file is written beside its place and moved there whole, so a killed save leaves the old
    one. With sharded tensors every rank must call; the first writes.

    Raises: ValueError where there is no adapter, or several and no name.
    """
    found = adapters(model, name)
    names = sorted({adapter.attachment.name for _, _, adapter in found})
    if len(names) > 1:
        raise ValueError(f"the model has the adapters {', '.join(names)}; say which by `name`")
    first = found[0][2]
    tensors, rebuilt = {}, {}
    for key, tensor, saved in _entries((path, a.variant, a.tensors()) for path, _, a in found):
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if saved:
            tensors[key] = tensor.detach().cpu().contiguous()
        else:
            rebuilt[key] = sketch(tensor)
    header = {
        "format_version": VERSION,
        "variant": first.variant.name,
        "name": first.attachment.name,
        "seed": first.attachment.seed,
        "step": first.attachment.step,
        "total": first.attachment.total,
        "hyperparameters": vars(first.variant),
        "targets": [_target(model, path, layer, a, first.variant) for path, layer, a in found],
        "rebuilt": rebuilt,
        "digest": digest(tensors),
    }
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        _write(Path(path), tensors, {FORMAT: json.dumps(header)})


def load(model: nn.Module, path: PathLike, name: str | None = None, *, force: bool = False) -> Plan:
    """Put a saved adapter on a model, or its numbers into the adapter of that name that is there.

    name: the adapter's, by default the one it was saved under. force: take a base whose weights
    are not those that the adapter was trained on.

    Returns: the plan of what is on the model now. Raises: FileNotFoundError; ValueError where the
    file is of another format, damaged, not finite, of other shapes or made for another base;
    KeyError where its variant is unknown. The model is then as it was.
    """
    header, tensors = read(path)
    name = name or header["name"]
    try:
        sites = _sites(model, header, force)
        _check_tensors(sites, tensors)
        present = _present(model, name, sites)
        made = _adapters(name, header, sites, tensors, force)
    except (KeyError, TypeError, ValueError) as error:
        raise type(error)(f"{os.fspath(path)}: {error.args[0]}") from None
    dtype = _dtype(sites, tensors)
    count = sum(p.numel() for p in base_parameters(model).values())
    chart = Plan(name, sites[0].variant, sites, dtype, count)
    if present:
        _copy_into(present, made)
    else:
        install(model, chart, made[0].attachment, made)
    return chart


def read(path: PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A file's header and tensors, checked against each other.

    Raises: FileNotFoundError, and ValueError where it is no whole checkpoint of this format.
    """
    where = f"{os.fspath(path)}: "
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{where}damaged or no safetensors file ({error})") from None
    try:
        header = json.loads(metadata[FORMAT])
        version = header["format_version"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"{where}no checkpoint of this library ({FORMAT!r} metadata)") from None
    if version != VERSION:
        raise ValueError(
            f"{where}format version {version}, and this library reads {VERSION}; "
            "use the version that wrote it"
        )
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{where}{key} has NaN or infinite numbers")
    if digest(tensors) != header["digest"]:
        raise ValueError(f"{where}damaged: tensors changed or swapped names since it was saved")
    return header, tensors


def digest(tensors: dict[str, Tensor]) -> str:
    """A hash over names, shapes and numbers, so that layers can't be swapped unnoticed."""
    out = hashlib.sha256()
    for key in sorted(tensors):
        t = tensors[key].contiguous()
        out.update(f"{key}:{t.dtype}:{tuple(t.shape)};".encode())
        out.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    return out.hexdigest()


def sketch(t: Tensor) -> list[float]:
    """A tensor's norm and its product with a fixed vector: a checksum that forgives the last bits,
    which sums and random generators on other machines may round otherwise."""
    t = t.detach().double().flatten().cpu()
    return [float(t.norm()), float(t @ torch.cos(torch.arange(len(t), dtype=torch.float64)))]


def sketches_agree(a: list[float], b: list[float]) -> bool:
    return max(abs(x - y) for x, y in zip(a, b)) <= 1e-4 * max(a[0], b[0])


def _target(
    model: nn.Module, path: str, layer: nn.Module, adapter: Adapter, usual: Variant
) -> dict[str, Any]:
    W = layer.kinds[adapter.attachment.name](layer)
    own, usual = vars(adapter.variant), vars(usual)
    tied = list(tied_layers(model, layer, adapter.variant.site))
    out = {
        "name": path,
        "d_in": W.d_in,
        "d_out": W.d_out,
        "base": adapter.fingerprint or fingerprint(W, adapter.variant),
    }
    changes = {key: own[key] for key in own if own[key] != usual[key]}
    out |= {"tied": tied} if tied else {}
    return out | ({"hyperparameters": changes} if changes else {})


def _entries(
    owners: Iterable[tuple[str, Variant, dict[str, Any]]],
) -> Iterator[tuple[str, Any, bool]]:
    """(key in the file, what the owner has under the tensor's name, saved), shared tensors once."""
    seen = set()
    for path, variant, values in owners:
        for name, value in values.items():
            key = file_key(path, variant, name)
            if key not in seen:
                seen.add(key)
                yield key, value, variant.specs[name].saved


def file_key(path: str, variant: Variant, name: str) -> str:
    return f"shared.{name}" if variant.specs[name].shared else f"{path}.{name}".lstrip(".")


def _sites(model: nn.Module, header: dict[str, Any], force: bool) -> tuple[Site, ...]:
    """The model's layers that the file speaks of, found to be what it says."""
    if (unknown := header["variant"]) not in variants():
        raise KeyError(f"no variant {unknown!r}; {nearest(unknown, variants())}")
    targets = {target["name"]: target for target in header["targets"]}
    modules = {clean(path) for path, _ in model.named_modules()}
    for path in targets:
        if path not in modules:
            raise ValueError(f"the model has no layer {path!r}; {nearest(path, modules)}")
    usual = configure(header["variant"], **header["hyperparameters"])
    kind = usual.site
    layers = find_sites(model, kind, lambda path, layer: path in targets, None)
    chosen = {}
    for path, target in targets.items():
        if path not in layers:
            raise ValueError(f"{path} is no {kind} layer on this model")
        W = base_kind(layers[path], kind)(layers[path])
        if (W.d_in, W.d_out) != (target["d_in"], target["d_out"]):
            raise ValueError(
                f"{path} is {W.d_out}×{W.d_in}, and the adapter was made for "
                f"{target['d_out']}×{target['d_in']}; load it on its own base model"
            )
        chosen[path] = configure(usual, **target.get("hyperparameters", {}))
        own = fingerprint(W, chosen[path])
        if not force and target["base"] and own and own != target["base"]:
            raise ValueError(
                f"{path} has other weights than the base that the adapter was trained on; "
                "load that base, or pass force=True if it is meant"
            )
        tied, here = target.get("tied", []), list(tied_layers(model, layers[path], kind))
        if not force and set(tied) != set(here):
            raise ValueError(
                f"{path} shares its weight with {', '.join(here) or 'nothing'}, and did with "
                f"{', '.join(tied) or 'nothing'} when it was saved; tie them alike, or pass "
                "force=True if it is meant"
            )
    return sites_of(model, {path: layers[path] for path in targets}, chosen)


def _check_tensors(sites: tuple[Site, ...], tensors: dict[str, Tensor]) -> None:
    expected = {
        file_key(site.name, site.variant, name): (shape, site.variant, name)
        for site in sites
        for name, shape in site.shapes.items()
        if site.variant.specs[name].saved
    }
    for key in sorted(expected.keys() - tensors.keys()):
        raise ValueError(f"{key} is missing")
    for key in sorted(tensors.keys() - expected.keys()):
        raise ValueError(f"{key} is no tensor of the adapter")
    for key, (shape, variant, name) in expected.items():
        t = tensors[key]
        dtype = tensor_dtype(variant, name, t.dtype if t.is_floating_point() else torch.float32)
        if tuple(t.shape) != shape or t.dtype != dtype:
            raise ValueError(f"{key} is {t.dtype} {tuple(t.shape)}, and should be {dtype} {shape}")
    for site in sites:
        own = {
            name: tensors[file_key(site.name, site.variant, name)]
            for name in site.shapes
            if site.variant.specs[name].saved
        }
        with blame(site.variant, site.name):
            site.variant.check_tensors(site.d_in, site.d_out, **own)


def _dtype(sites: tuple[Site, ...], tensors: dict[str, Tensor]) -> torch.dtype:
    """That of the tensors whose annotation leaves it open."""
    for site in sites:
        for name in site.shapes:
            key = file_key(site.name, site.variant, name)
            if key in tensors and tensor_dtype(site.variant, name, torch.float64) == torch.float64:
                return tensors[key].dtype
    return torch.float32


def _present(model: nn.Module, name: str, sites: tuple[Site, ...]) -> list[Adapter]:
    """The model's adapters of that name, in the sites' order; none on a fresh model."""
    try:
        found = {path: adapter for path, _, adapter in adapters(model, name)}
    except ValueError:
        return []
    wanted = {site.name: site.variant for site in sites}
    for path in sorted(found.keys() | wanted.keys()):
        have = found[path].variant if path in found else "nothing"
        want = wanted.get(path, "nothing")
        if have != want:
            raise ValueError(
                f"the model's adapter {name!r} has {have} at {path}, and the file has {want}; "
                "detach it or load under another name"
            )
    return [found[site.name] for site in sites]


def _adapters(
    name: str,
    header: dict[str, Any],
    sites: tuple[Site, ...],
    tensors: dict[str, Tensor],
    force: bool,
) -> list[Adapter]:
    """The file's adapters, away from the model; tensors that it leaves out are made again."""
    sizes = [(site.d_in, site.d_out) for site in sites]
    attachment = Attachment(name, header["seed"], tuple(max(both) for both in zip(*sizes)))
    attachment.step, attachment.total = header["step"], header["total"]
    dtype = _dtype(sites, tensors)

    def found(site: Site, shared: bool) -> dict[str, Tensor]:
        W = site.base
        device = "cpu" if W.device.type == "meta" else W.device
        return {
            key: tensors[file_key(site.name, site.variant, key)].to(device, copy=True)
            for key in site.shapes
            if site.variant.specs[key].saved and site.variant.specs[key].shared == shared
        }

    def check(site: Site, fresh: dict[str, Tensor]) -> None:
        for key, tensor in fresh.items():
            where = file_key(site.name, site.variant, key)
            if not (force or sketches_agree(sketch(tensor), header["rebuilt"][where])):
                raise ValueError(
                    f"{where}, made again, is not what it was when saved: the seed or the "
                    "base differ; load the right base, or pass force=True if it is meant"
                )

    shared = found(sites[0], shared=True)
    share(attachment, sites[0], sites[0].base, dtype, shared)
    again = dict(attachment.shared.state_dict())
    check(sites[0], {key: t for key, t in again.items() if key not in shared})
    made = []
    for site in sites:
        W, values = site.base, found(site, shared=False)
        own = {key for key in site.shapes if not site.variant.specs[key].shared}
        if own - values.keys():
            fresh = fresh_tensors(site, W, attachment, dtype)
            fresh = {key: t for key, t in fresh.items() if key not in values}
            check(site, fresh)
            values |= fresh
        made.append(
            make_adapter(site, W, attachment, {k: values[k] for k in site.shapes if k in own})
        )
    return made


@torch.no_grad()
def _copy_into(present: list[Adapter], made: list[Adapter]) -> None:
    for adapter, new in zip(present, made):
        values = new.tensors()
        for key, tensor in adapter.tensors().items():
            tensor.copy_(values[key])
    for field in ("seed", "step", "total"):
        setattr(present[0].attachment, field, getattr(made[0].attachment, field))


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=metadata)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
