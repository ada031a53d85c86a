"""The weights of a pipeline, told by a digest."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor, nn


def fingerprint(pipe: Any) -> str:
    """Name a pipeline's weights by the kind and the first numbers of each: a retrained model gets another name."""
    total = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        for name, x in module.state_dict().items() if isinstance(module, nn.Module) else ():
            x = _offloaded(module, name) if x.is_meta else x
            head = [] if x.is_meta else x.flatten()[:8].tolist()
            total.update(f"{part}.{name} {x.dtype} {tuple(x.shape)} {head}\n".encode())
    return total.hexdigest()


def _offloaded(module: nn.Module, name: str) -> Tensor:
    """Return a weight that accelerate's sequential offloading keeps elsewhere, or the empty one in its place."""
    owner, _, weight = name.rpartition(".")
    part = module.get_submodule(owner)
    elsewhere = getattr(getattr(part, "_hf_hook", None), "weights_map", None) or {}
    return elsewhere[weight] if weight in elsewhere else getattr(part, weight)
