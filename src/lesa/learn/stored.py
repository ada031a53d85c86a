"""The store that a collection fills: begun, gone on with, and let grow."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from lesa.learn.trajectory import COLLECTION, Collection, Store, Trajectory

GROWING = ("prompts", "seeds")
"""What a collection may get more of."""


def add(
    store: Store | None,
    batch: list[tuple[int, int]],
    trajectories: Sequence[Trajectory],
    folder: Path,
    wanted: dict[str, Any],
) -> Store:
    """Write what the store lacks of a recorded batch; the first one begins the store."""
    first = trajectories[0]
    found: dict[str, Any] = {"grid": tuple(first.grid.tolist()), "tokens": tuple(first.tokens.tolist())}
    with FileLock(folder / ".lock-begin"):  # several processes may come to it at once
        if store is None and not (folder / COLLECTION).exists():
            store = Store.create(folder, Collection(**wanted, **found))
    store = store or Store.open(folder)
    _check_same(store, {**wanted, **found})
    for pair, trajectory in zip(batch, trajectories, strict=True):
        if not store.is_whole(*pair):
            store.add(*pair, trajectory)
    return store


def begun(folder: Path, wanted: dict[str, Any]) -> Store | None:
    """Open the store in a folder, if there is one, and let it grow by the prompts that come after its own."""
    if not (folder / COLLECTION).exists():
        return None
    with FileLock(folder / ".lock-begin"):
        store = Store.open(folder)
        known = len(store.collection.prompts)
        begins = all(wanted[name][:known] == getattr(store.collection, name) for name in GROWING)
        if begins and len(wanted["prompts"]) > known:
            _check_same(store, {name: value for name, value in wanted.items() if name not in GROWING})
            store = Store.create(folder, replace(store.collection, **{name: wanted[name] for name in GROWING}))
    _check_same(store, wanted)
    return store


def is_there(store: Store, number: int, seed: int) -> bool:
    """Tell whether a run is stored, and say so if it has to be recorded again."""
    if store.is_whole(number, seed):
        return True
    if store.path(number, seed).exists():
        warnings.warn(f"{store.path(number, seed)} is not as it was recorded; it is recorded again.", stacklevel=2)
    return False


def _check_same(store: Store, wanted: dict[str, Any]) -> None:
    """Raise a ValueError that says what differs if the store was collected otherwise."""
    for name, here in wanted.items():
        there = getattr(store.collection, name)
        if there != here:
            raise ValueError(
                f"{store.folder} holds a collection with other {name}: {_shown(there, here)}; "
                "collect into another folder, or with what it was begun with."
            )


def _shown(there: Any, here: Any) -> str:
    """Show two different values, of sequences only where they part."""
    if isinstance(there, tuple):
        k = next((k for k, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), min(len(there), len(here)))
        parts = ["missing" if k >= len(x) else repr(x[k]) for x in (there, here)]
        return f"number {k} is {parts[0]} there, {parts[1]} here"
    return f"{there!r} there, {here!r} here"
