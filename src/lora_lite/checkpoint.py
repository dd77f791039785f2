"""Adapters in a file: safetensors, with the method's configuration in its metadata."""

import contextlib
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_lite.adapted import Attachment, adapters
from lora_lite.attach import (
    Plan,
    Site,
    base_parameters,
    fingerprint,
    fresh_tensors,
    install,
    make_adapter,
    tensor_dtype,
)
from lora_lite.base import base_kind
from lora_lite.targets import find_sites
from lora_lite.variant import configure, nearest, variants

FORMAT, VERSION = "lora-lite", 1


def save(model: nn.Module, path: str | os.PathLike[str], name: str | None = None) -> None:
    """Write one adapter to a file; `name` may be left out where the model has one.

    The file is written beside its place and moved there whole, so that a killed save leaves the
    old one. With sharded tensors every rank must call; the first writes.

    Raises: ValueError where there is no adapter, or several and no name.
    """
    name = _the_name(model, name)
    found = adapters(model, name)
    attachment = found[0][2].attachment
    tensors, rebuilt = {}, {}
    for key, tensor, variant, spec_key in _all_tensors(found):
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if variant.specs[spec_key].saved:
            tensors[key] = tensor.detach().cpu().contiguous()
        else:
            rebuilt[key] = sketch(tensor)
    variant = next(iter(found))[2].variant
    header = {
        "format": FORMAT,
        "format_version": VERSION,
        "variant": variant.name,
        "name": name,
        "seed": attachment.seed,
        "step": attachment.step,
        "total": attachment.total,
        "targets": [
            {
                "name": path,
                "d_in": layer.base_kind(layer).d_in,
                "d_out": layer.base_kind(layer).d_out,
                "base": adapter.fingerprint or fingerprint(layer.base_kind(layer)),
                "hyperparameters": vars(adapter.variant),
            }
            for path, layer, adapter in found
        ],
        "rebuilt": rebuilt,
        "digest": digest(tensors),
    }
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    _write(Path(path), tensors, {FORMAT: json.dumps(header)})


def load(
    model: nn.Module,
    path: str | os.PathLike[str],
    name: str | None = None,
    *,
    force: bool = False,
) -> Plan:
    """Put a saved adapter on a model, or its numbers into the adapter of that name that is there.

    name: the adapter's, by default the one it was saved under. force: take a base whose weights
    are not those that the adapter was trained on.

    Returns: the plan of what is now on the model. Raises: ValueError where the file is of another
    format, damaged, of other shapes, not finite, or made for another base, and KeyError where its
    variant is unknown; the model is then as it was.
    """
    header, tensors = read(path)
    name = name or header["name"]
    where = f"{os.fspath(path)}: "
    if header["variant"] not in variants():
        raise KeyError(
            f"{where}no variant {header['variant']!r}; {nearest(header['variant'], variants())}"
        )
    targets = {t["name"]: t for t in header["targets"]}
    missing = [t for t in targets if t not in dict(_named(model))]
    if missing:
        raise ValueError(
            f"{where}the model has no layer {missing[0]!r}; {nearest(missing[0], dict(_named(model)))}"
        )
    first = configure(header["variant"], **header["targets"][0]["hyperparameters"])
    layers = find_sites(model, first.site, lambda path, layer: path in targets, None)
    sites = []
    for target_name in targets:
        target = targets[target_name]
        if target_name not in layers:
            raise ValueError(f"{where}{target_name} is no {first.site} layer on this model")
        layer = layers[target_name]
        W = base_kind(layer, first.site)(layer)
        if (W.d_in, W.d_out) != (target["d_in"], target["d_out"]):
            raise ValueError(
                f"{where}{target_name} is {W.d_out}×{W.d_in}, and the adapter was made for "
                f"{target['d_out']}×{target['d_in']}; load it on its own base model"
            )
        if not force and target["base"] and (own := fingerprint(W)) and own != target["base"]:
            raise ValueError(
                f"{where}{target_name} has other weights than the base that the adapter was "
                "trained on; load that base, or pass force=True if it is meant"
            )
        variant = configure(header["variant"], **target["hyperparameters"])
        shapes = variant.shapes(W.d_in, W.d_out)
        sites.append(Site(target_name, layer, variant, W.d_in, W.d_out, shapes))
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.float32)
    _check_tensors(where, sites, tensors)
    count = sum(p.numel() for p in base_parameters(model).values())
    chart = Plan(name, first, tuple(sites), dtype, count)
    existing = _existing(model, name, sites, where)
    attachment = Attachment(name, header["seed"], tuple(targets))
    attachment.step, attachment.total = header["step"], header["total"]
    made = []
    for site in sites:
        W = base_kind(site.layer, site.variant.site)(site.layer)
        own = {
            key: tensors[_key(site, key)] for key in site.shapes if site.variant.specs[key].saved
        }
        device = torch.device("cpu") if W.device.type == "meta" else W.device
        own = {key: t.to(device, copy=True) for key, t in own.items()}
        if len(own) < len(site.shapes):
            fresh = fresh_tensors(site, W, attachment, dtype)
            for key in site.shapes.keys() - own.keys():
                expected = header["rebuilt"].get(_key(site, key))
                if expected is None or not (force or sketches_agree(sketch(fresh[key]), expected)):
                    raise ValueError(
                        f"{where}{_key(site, key)} comes out otherwise than when it was saved; "
                        "the seed or the base differ (force=True takes it nevertheless)"
                    )
                own[key] = fresh[key]
        own = {key: own[key] for key in site.shapes}
        made.append(make_adapter(site, W, attachment, own))
    if existing:
        with torch.no_grad():
            for adapter, new in zip(existing, made):
                for key, tensor in adapter.tensors().items():
                    tensor.copy_(new.tensors()[key])
        existing[0].attachment.step = attachment.step
        existing[0].attachment.total = attachment.total
        existing[0].attachment.seed = attachment.seed
    else:
        install(model, chart, attachment, made)
    return chart


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
    except (KeyError, ValueError):
        raise ValueError(
            f"{where}no lora-lite checkpoint: its metadata has no {FORMAT!r}"
        ) from None
    if header.get("format_version") != VERSION:
        raise ValueError(
            f"{where}format version {header.get('format_version')}, and this library reads "
            f"{VERSION}; use the version that wrote it"
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
    """A tensor's norm and its product with a fixed vector: a checksum that survives the last bits,
    which sums and random generators on other machines may round otherwise."""
    t = t.detach().double().flatten().cpu()
    return [float(t.norm()), float(t @ torch.cos(torch.arange(len(t), dtype=torch.float64)))]


def sketches_agree(a: list[float], b: list[float]) -> bool:
    scale = 1e-4 * max(abs(a[0]), abs(b[0]))
    return abs(a[0] - b[0]) <= scale and abs(a[1] - b[1]) <= scale


def _check_tensors(where: str, sites: list[Site], tensors: dict[str, Tensor]) -> None:
    expected = {
        _key(site, key): (shape, site.variant, key)
        for site in sites
        for key, shape in site.shapes.items()
        if site.variant.specs[key].saved
    }
    for key in expected.keys() - tensors.keys():
        raise ValueError(f"{where}{key} is missing")
    for key in tensors.keys() - expected.keys():
        raise ValueError(f"{where}{key} belongs to no tensor of the adapter")
    for key, (shape, variant, spec_key) in expected.items():
        t = tensors[key]
        dtype = tensor_dtype(variant, spec_key, t.dtype)
        if tuple(t.shape) != shape or t.dtype != dtype or not _kind(t, dtype):
            raise ValueError(
                f"{where}{key} is {t.dtype} {tuple(t.shape)}, and should be {dtype} {shape}"
            )


def _kind(t: Tensor, dtype: torch.dtype) -> bool:
    return t.is_floating_point() == dtype.is_floating_point


def _existing(model: nn.Module, name: str, sites: list[Site], where: str) -> list[Any]:
    """The adapters of that name on the model, in the sites' order; none is a fresh model."""
    try:
        found = {path: adapter for path, _, adapter in adapters(model, name)}
    except ValueError:
        return []
    for site in sites:
        have = found.pop(site.name, None)
        if have is None or have.variant != site.variant:
            raise ValueError(
                f"{where}the model's adapter {name!r} is {have.variant if have else 'absent'} at "
                f"{site.name}, and the file has {site.variant}; detach it or load under another name"
            )
    if found:
        raise ValueError(
            f"{where}the model's adapter {name!r} is also at {next(iter(found))}, where the file "
            "has none; detach it or load under another name"
        )
    by_path = {path: adapter for path, _, adapter in adapters(model, name)}
    return [by_path[site.name] for site in sites]


def _named(model: nn.Module) -> list[tuple[str, nn.Module]]:
    from lora_lite.adapted import clean

    return [(clean(name), module) for name, module in model.named_modules()]


def _the_name(model: nn.Module, name: str | None) -> str:
    names = {adapter.attachment.name for _, _, adapter in adapters(model, name)}
    if len(names) > 1:
        raise ValueError(f"the model has the adapters {', '.join(sorted(names))}; name one")
    return names.pop()


def _key(site: Site, key: str) -> str:
    shared = site.variant.specs[key].shared
    return f"shared:{key}" if shared else ".".join(filter(None, (site.name, key)))


def _all_tensors(found: list[Any]) -> Any:
    """(file key, tensor, variant, tensor name), shared tensors once."""
    seen = set()
    for path, _, adapter in found:
        for key, tensor in adapter.tensors().items():
            shared = adapter.variant.specs[key].shared
            file_key = f"shared:{key}" if shared else ".".join(filter(None, (path, key)))
            if file_key not in seen:
                seen.add(file_key)
                yield file_key, tensor, adapter.variant, key


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
