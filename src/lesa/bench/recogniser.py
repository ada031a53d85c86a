"""A model's own recogniser: what tells pictures that show what their prompts name from others.

A model that has one says so in a file beside its `model_index.json`: `{"code": "composed_emoji.py"}` names a file of
the folder `models` of the checkout that this library runs from, and `recogniser(folder)` in it makes the call. A
model's folder brings no code of its own: nothing is run that did not come with the library.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

Recogniser = Callable[[Sequence[str], Sequence[np.ndarray]], list[bool]]
"""Tells for each picture or clip whether it shows what its prompt names."""

RECOGNISER_FILE = "recogniser.json"
PROMPTED = "as prompted"
"""What tables call the share of the pictures that show what their prompts name."""
CODE = Path(__file__).parents[3] / "models"


def recogniser(model: str | Path) -> Recogniser | None:
    """Return the call that tells prompted pictures from others, or None where the model has none or it is left out.

    Raises: ValueError if the model's file names no recogniser.
    """
    code = _named(model)
    if code is None or not code.exists():
        return None
    sys.path.insert(0, str(code.parent))
    try:
        made = getattr(importlib.import_module(code.stem), "recogniser", None)
    finally:
        sys.path.remove(str(code.parent))
    if made is None:
        raise ValueError(f"{Path(model) / RECOGNISER_FILE} names a file with a recogniser, got {code}; repair it.")
    return made(model)


def left_out(model: str | Path) -> str | None:
    """Return why a model's recogniser is left out, or None where it is not, or there is none."""
    code = _named(model)
    if code is None or code.exists():
        return None
    return f"the code that tells is not part of the package; run lesa from a checkout, where it is models/{code.name}"


def _named(model: str | Path) -> Path | None:
    """Return the file of code that a model names."""
    file = Path(model) / RECOGNISER_FILE
    if not file.exists():
        return None
    try:
        name = json.loads(file.read_text())["code"]
        if Path(name).name != name or not Path(name).stem.isidentifier():
            raise ValueError(f"{name!r} is no name of a file")
    except (ValueError, TypeError, LookupError) as error:
        raise ValueError(f'{file} holds {{"code": "NAME.py"}}, a file in models/ ({error}); repair it.') from error
    return CODE / name
