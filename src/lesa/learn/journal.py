"""What a calibration has done so far, in a folder: the same call goes on after it was stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lesa.learn.calls import described
from lesa.predictors import Predictor
from lesa.predictors.curve import Point, point_from
from lesa.predictors.disk import write_atomically
from lesa.predictors.solved import Solved

POINT = "point.json"
WORST = ("worst.png", "worst-reference.png")
"""The pictures of the checked call that a budget draws worst: with what is kept, and in full."""


class Journal:
    """The points of one calibration, told from others by all that it depends on."""

    def __init__(self, folder: Path, **facts: Any):
        text = json.dumps(described(facts), sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    def point(self, budget: int) -> tuple[Point, Solved] | None:
        """Return what was found for a budget, if it was, and its predictor."""
        place = self.folder / str(budget)
        if not (place / POINT).exists():
            return None
        predictor = Predictor.from_pretrained(place)
        assert isinstance(predictor, Solved)
        return point_from(json.loads((place / POINT).read_text())), predictor

    def keep(self, point: Point, predictor: Solved, worst: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Keep what was found for a budget, and the `worst` pictures, what was drawn first; of clips a middle frame.

        The point comes last: without it there is nothing.
        """
        place = self.folder / str(point.full_steps)
        place.mkdir(parents=True, exist_ok=True)
        predictor.save_pretrained(place)
        for name, x in zip(WORST, worst or (), strict=False):
            Image.fromarray(x if x.ndim == 3 else x[len(x) // 2]).save(place / name)
        write_atomically(place / POINT, json.dumps(asdict(point)).encode())

    def worst(self, budget: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the pictures that were kept, what was drawn first; None if none were."""
        places = [self.folder / str(budget) / name for name in WORST]
        if not all(place.exists() for place in places):
            return None
        drawn, wanted = (np.asarray(Image.open(place).convert("RGB")) for place in places)
        return drawn, wanted

    def clear(self) -> None:
        """Remove what was kept: the calibration is done."""
        shutil.rmtree(self.folder, ignore_errors=True)
