"""What a calibration has done so far, in a folder: the same call goes on after it was stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lesa.learn.alone import alone_in
from lesa.learn.calls import described
from lesa.predictors import Predictor
from lesa.predictors.curve import Point, point_from
from lesa.predictors.disk import DAMAGED, signed, unsigned, write_atomically
from lesa.predictors.solved import Solved

POINT = "point.json"
WORST = ("worst.png", "worst-reference.png")
"""The pictures of the checked call that a budget draws worst: with what is kept, and in full."""


class Journal:
    """The points of one calibration, told from others by all that it depends on."""

    def __init__(self, folder: Path, **facts: Any):
        text = json.dumps(described(facts), sort_keys=True)
        self.folder = folder / hashlib.sha256(text.encode()).hexdigest()[:16]

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from the same calibration.

        Raises: RuntimeError if one is at it; OSError if the shelf cannot be written to.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            advice = f"{error.strerror}, so nothing is kept; let LESA_HOME name a folder that can be written to"
            raise OSError(error.errno, advice, str(self.folder)) from error
        with alone_in(self.folder, doing="calibrating", again="calibrate again"):
            yield

    def point(self, budget: int) -> tuple[Point, Solved] | None:
        """Return what was found for a budget, if it was, and its predictor; what is damaged is found again."""
        place = self.folder / str(budget)
        if not (place / POINT).exists():
            return None
        try:
            entries = unsigned(json.loads((place / POINT).read_bytes()))
            predictor = Predictor.from_pretrained(place)
            if not isinstance(predictor, Solved) or entries["predictor"] != predictor.digest():
                raise ValueError("its predictor is another")
            if entries["pictures"] != _digests(place):
                raise ValueError("its pictures are others")
            point = point_from(entries["point"])
            if point.full_steps != budget:
                raise ValueError(f"it is of {point.full_steps} full steps")
        except (OSError, *DAMAGED) as error:
            warnings.warn(f"{place} is not as it was kept ({error}); it is calibrated again.", stacklevel=2)
            shutil.rmtree(place, ignore_errors=True)
            return None
        return point, predictor

    def keep(self, point: Point, predictor: Solved, worst: tuple[np.ndarray, np.ndarray] | None = None) -> None:
        """Keep what was found for a budget, and the `worst` pictures, what was drawn first; of clips a middle frame.

        The point comes last, with digests of all the rest: without it there is nothing.
        """
        place = self.folder / str(point.full_steps)
        shutil.rmtree(place, ignore_errors=True)  # what a kill left half done
        place.mkdir(parents=True)
        predictor.save_pretrained(place)
        for name, x in zip(WORST, worst or (), strict=False):
            Image.fromarray(x if x.ndim == 3 else x[len(x) // 2]).save(place / name)
        entries = dict(point=asdict(point), predictor=predictor.digest(), pictures=_digests(place))
        write_atomically(place / POINT, json.dumps(signed(entries)).encode())

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


def _digests(place: Path) -> list[str]:
    """Return the digests of the pictures that are kept there."""
    there = (file for name in WORST if (file := place / name).exists())
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in there]
