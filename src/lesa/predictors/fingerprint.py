"""The weights of denoisers, told by a digest: what acts when they run, wherever it is kept.

Of every tensor a few elements are read, spread over all of it, so that 24 GB take seconds. Offloaded weights are
looked up where they are, a compiled module is what it was compiled from, and a LoRA counts with its scale, while it is
active. Of what is quantised codes and scales count, and how the layer goes about it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

READ = 64
"""Elements of each tensor."""
QUANTISED = ("quant_state", "SCB")
"""Attributes in which bitsandbytes keeps what belongs to a quantised weight."""
HOW = ("weight_qtype", "activation_qtype")
"""Attributes in which layers of quanto keep how they quantise what passes, and weights that are not yet."""
_WRAPPERS = ("_orig_mod", "base_layer")
"""Parts of a weight's name that say in what its layer is wrapped: compiled, or with adapters."""


def fingerprint(denoisers: Mapping[str, nn.Module]) -> str:
    """Name the weights of a pipeline's denoisers, which are given by their names there.

    It is the same in another process, on another device, compiled or not, and offloaded or not.
    """
    lines = []
    for part, module in denoisers.items():
        while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        lines.append(f"{part} is a {type(module).__name__}".encode())
        elsewhere = _on_disk(module)
        for name, x in _acting(module):
            lines.append(f"{part}.{name} ".encode() + _described(x, elsewhere))
        lines += [f"{part}.{name} {how}".encode() for name, how in _ways(module)]
    return hashlib.sha256(b"\n".join(sorted(lines))).hexdigest()


def stamp(denoisers: Mapping[str, nn.Module]) -> int:
    """Return a number that is another one, in this process, once weights, layers or adapters are exchanged or cast: a
    cheap look."""
    found: list[Any] = []
    for module in denoisers.values():
        for part in module.modules():
            found.append(id(part))
            found.extend((id(x), x._version, x.dtype) for x in part._parameters.values() if x is not None)
            if adapters := _adapters(part):
                found.append((id(part), str(sorted(adapters.items()))))
    return hash(tuple(found))


def _acting(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's weights with their names; of adapters those that act, with their scales in place of names."""
    layers = {name: adapters for name, part in module.named_modules() if (adapters := _adapters(part)) is not None}
    kept = {name: _weights_map(part) for name, part in module.named_modules()}
    for owner, part in module.named_modules():
        own = [*part._parameters.items()]
        own += [(name, x) for name, x in part._buffers.items() if name not in part._non_persistent_buffers_set]
        for name, x in own:
            full = f"{owner}.{name}" if owner else name
            shown = _shown(full, layers, module)
            if x is None or shown is None:
                continue
            if x.is_meta and name in kept[owner]:
                x = kept[owner][name]
            yield shown, x


def _ways(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the layers that quantise as they go, with how."""
    for owner, part in module.named_modules():
        if any(getattr(part, name, None) is not None for name in HOW):
            shown = ".".join(word for word in owner.split(".") if word not in _WRAPPERS)
            yield shown, ", ".join(f"{name} {getattr(part, name, None)}" for name in HOW)


def _weights_map(part: nn.Module) -> Mapping[str, Tensor]:
    """Return where accelerate's sequential offloading keeps a module's weights."""
    return getattr(getattr(part, "_hf_hook", None), "weights_map", None) or {}


def _adapters(part: nn.Module) -> dict[str, float] | None:
    """Return the scales of a layer's adapters that act, or None if it is no layer with adapters, as peft has them."""
    if not hasattr(part, "adapter_layer_names") or not hasattr(part, "base_layer"):
        return None
    layer: Any = part
    if getattr(layer, "disable_adapters", False):
        return {}
    merged = set(getattr(layer, "merged_adapters", ()))
    scales = getattr(layer, "scaling", {})
    return {name: float(scales.get(name, 1.0)) for name in layer.active_adapters if name not in merged}


def _shown(name: str, layers: Mapping[str, dict[str, float]], module: nn.Module) -> str | None:
    """Return the name of a weight without what its layer is wrapped in; None if it is an adapter's that does not act.

    An adapter's own name is left out: it depends on how many were loaded before.
    """
    parts = name.split(".")
    for k in range(len(parts)):
        layer = ".".join(parts[:k])
        if layer not in layers or parts[k] == "base_layer":
            continue
        adapter = next((word for word in parts[k + 1 :] if word in _known(module, layer, parts[k])), None)
        if adapter is None:
            continue
        scale = layers[layer].get(adapter, 0.0)
        if scale == 0:
            return None
        parts[parts.index(adapter, k + 1)] = f"adapter at {scale:.6g}"
        break
    return ".".join(part for part in parts if part not in _WRAPPERS)


def _known(module: nn.Module, layer: str, kind: str) -> list[str]:
    """Return the names of a layer's adapters of one kind of weights."""
    kept: Any = getattr(module.get_submodule(layer), kind, {})
    return list(kept.keys()) if hasattr(kept, "keys") else []


def _described(x: Tensor, elsewhere: Mapping[int, tuple[Path, str]]) -> bytes:
    """Describe a tensor by its kind and some of its elements, and so what it is made of if it is quantised."""
    if id(x) in elsewhere:
        return f"{x.dtype} {tuple(x.shape)} ".encode() + _read(*elsewhere[id(x)], x)
    if type(x) not in (Tensor, nn.Parameter) and hasattr(x, "__tensor_flatten__"):
        names, how = x.__tensor_flatten__()  # pyright: ignore[reportAttributeAccessIssue]
        parts = {name: part for name in sorted(names) if (part := getattr(x, name)) is not None}
        inner = b"; ".join(f"{name} ".encode() + _described(part, {}) for name, part in parts.items())
        return f"{x.dtype} {tuple(x.shape)} of ".encode() + inner + _in_words(how).encode()
    found = f"{x.dtype} {tuple(x.shape)} ".encode() + _sample(x)
    for name in QUANTISED:
        state = getattr(x, name, None)
        absmax = getattr(state, "absmax", state)
        if isinstance(absmax, Tensor):
            found += f" {name} ".encode() + _described(absmax, {})
    return found


def _in_words(how: Any) -> str:
    """Describe what a quantised tensor keeps beside its parts, such as how activations are quantised; as a new release
    has more that is off, only what is on."""
    on = {name: value for name, value in how.items() if value} if isinstance(how, Mapping) else how
    return re.sub(r" at 0x[0-9a-f]+", "", f" {sorted(on.items()) if isinstance(on, Mapping) else on}") if on else ""


@torch.no_grad()
def _sample(x: Tensor) -> bytes:
    """Return a few elements of a tensor, spread over it, as bytes: nothing else of it is read."""
    if x.is_meta or not x.numel():
        return b""
    with torch._C.DisableTorchFunctionSubclass():
        plain = x.detach().as_subclass(Tensor)
        if plain.element_size() == 1:
            plain = plain.view(torch.uint8)  # of float8 not every device can index
        if plain.ndim:
            where = torch.unravel_index(_places(plain.numel()).to(plain.device), plain.shape)
            plain = plain[where]
        return plain.reshape(-1).cpu().contiguous().view(torch.uint8).numpy().tobytes()


def _places(count: int) -> Tensor:
    """Return the places, of so many, at which elements are read: the first and the last are among them."""
    if count <= READ:
        return torch.arange(count)
    return torch.tensor([k * (count - 1) // (READ - 1) for k in range(READ)])


def _on_disk(module: nn.Module) -> dict[int, tuple[Path, str]]:
    """Return the files in which diffusers' group offloading keeps tensors, with their names there, by the tensors' ids.

    What the tensors themselves hold meanwhile is nothing.
    """
    found: dict[int, tuple[Path, str]] = {}
    for part in module.modules():
        hooks = getattr(getattr(part, "_diffusers_hook", None), "hooks", {})
        for hook in hooks.values():
            group = getattr(hook, "group", None)
            file = Path(getattr(group, "safetensors_file_path", None) or "")
            if group is not None and file.is_file():
                found |= {id(tensor): (file, key) for tensor, key in group.tensor_to_key.items()}
    return found


def _read(file: Path, key: str, like: Tensor) -> bytes:
    """Return the same elements of a tensor in a safetensors file as `_sample` does."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        first = 8 + length + json.loads(opened.read(length))[key]["data_offsets"][0]
        size, found = like.element_size(), []
        for place in _places(like.numel()).tolist():
            opened.seek(first + place * size)
            found.append(opened.read(size))
    return b"".join(found)


def pipeline_fingerprint(pipe: Any) -> str:
    """Name the weights of a whole pipeline by the kind and the first numbers of each: recorded runs are kept under it.

    A retrained model gets another name.
    """
    total = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        for name, x in module.state_dict().items() if isinstance(module, nn.Module) else ():
            x = _offloaded(module, name) if x.is_meta else x
            if type(x) not in (Tensor, nn.Parameter):  # of a quantised one nothing can be cut
                total.update(f"{part}.{name} ".encode() + _described(x, {}) + b"\n")
                continue
            head = [] if x.is_meta else x.flatten()[:8].tolist()
            total.update(f"{part}.{name} {x.dtype} {tuple(x.shape)} {head}\n".encode())
        for name, how in _ways(module) if isinstance(module, nn.Module) else ():
            total.update(f"{part}.{name} {how}\n".encode())
    return total.hexdigest()


def _offloaded(module: nn.Module, name: str) -> Tensor:
    """Return a weight that accelerate's sequential offloading keeps elsewhere, or the empty one in its place."""
    owner, _, weight = name.rpartition(".")
    part = module.get_submodule(owner)
    elsewhere = _weights_map(part)
    return elsewhere[weight] if weight in elsewhere else getattr(part, weight)
