"""What modules take and return: tuples, lists, dicts and model outputs, of any depth, with tensors in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor


def leaves(structure: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Yield whatever is no container, with its path, in order."""
    yield from _found(structure, path, [])


def _found(structure: Any, path: tuple, found: list[tuple[tuple, Any]]) -> list[tuple[tuple, Any]]:
    """Add the leaves to a list: each call of a denoiser looks at its inputs, and a skipped one does little else."""
    parts = _parts(structure)
    if parts is None:
        found.append((path, structure))
    else:
        for name, part in parts:
            _found(part, (*path, name), found)
    return found


def replace(structure: Any, kind: type | tuple[type, ...], change: Callable[[Any], Any]) -> Any:
    """Return the same structure with every leaf of a kind changed."""
    if isinstance(structure, kind):
        return change(structure)
    parts = _parts(structure)
    if parts is None:
        return structure
    changed = [(name, replace(part, kind, change)) for name, part in parts]
    make: Any = type(structure)
    if isinstance(structure, Mapping):
        named = dict(changed)
        return make(**named) if all(isinstance(name, str) for name in named) else make(named)
    values = [value for _, value in changed]
    return make(*values) if hasattr(structure, "_fields") else make(values)


def _parts(structure: Any) -> list[tuple[Any, Any]] | None:
    """Return the parts of a container with their names, or None."""
    if isinstance(structure, Tensor):  # most are, and to ask whether it is a mapping takes long
        return None
    if isinstance(structure, (tuple, list)):
        return list(enumerate(structure))
    return list(structure.items()) if isinstance(structure, Mapping) else None


def is_numbers(x: Any) -> bool:
    """Tell whether a leaf is what forecasts are made of: a tensor of numbers with a shape."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 0
