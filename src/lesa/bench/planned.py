"""The schedules that were planned for a run, kept beside its records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lesa.predictors.disk import DAMAGED, write_atomically

PLANNED, DIGEST = "planned.json", "sha256"


def planned(folder: str | Path) -> dict[str, Any]:
    """Read the schedules that were planned for a run, by what they were planned for, with their `grid`.

    Raises: ValueError if the file holds something else, or they are not as they were kept.
    """
    path = Path(folder) / PLANNED
    if not path.exists():
        return {}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not all(isinstance(value, list if name == "grid" else str) for name, value in known.items()):
            raise ValueError("it holds something else")
        if known.pop(DIGEST, digest := _digest(known)) != digest:
            raise ValueError("they are not as they were kept")
        return {"grid": known.pop("grid"), **known}
    except DAMAGED as error:
        raise ValueError(f"{path} holds no planned schedules ({error!r}); measure into another folder.") from error


def keep_planned(folder: str | Path, known: Mapping[str, Any]) -> None:
    """Keep the schedules that were planned so far."""
    text = json.dumps({**known, DIGEST: _digest(known)}, indent=1)
    write_atomically(Path(folder) / PLANNED, text.encode())


def _digest(known: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in known.items() if name != DIGEST}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
