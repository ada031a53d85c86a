"""The folder that keeps a training's rounds: a stopped one goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lesa.learn.lessons import Config, Curve, Lesson
from lesa.predictors import Predictor, disk
from lesa.predictors.base import CARD_FILE, FILES
from lesa.predictors.disk import DAMAGED, write_atomically

CURVE_FILE, SETTINGS_FILE, PART = "curve.json", "training.json", "part"


class Rounds:
    """The predictors of a training's rounds on disk, each with the curve so far: a stopped training goes on."""

    def __init__(self, folder: Path | None, settings: dict[str, Any]):
        self._folder = folder
        if folder is None:
            return
        there = begun(folder) or settings
        if other := sorted(name for name in {*there, *settings} if there.get(name) != settings.get(name)):
            raise ValueError(f"{folder} holds a training with other {', '.join(other)}; name another, or delete it.")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / SETTINGS_FILE, json.dumps(settings, indent=1).encode())

    def load(self, round_: int, predictor: Predictor, curve: Curve) -> bool:
        """Set predictor and curve to what they were after a round; False if it or one before it is not there whole."""
        if self._folder is None:
            return False
        place = self._place(round_)
        try:
            there = Predictor.from_pretrained(place)
            entries = _entries((place / CURVE_FILE).read_bytes(), round_, there)
            predictor.load_state_dict(there.state_dict())
            curve.entries = entries
        except (FileNotFoundError, *DAMAGED):
            self._remove(self._place(round_ + 1))  # what follows is of no use
            return False
        return True

    def save(self, round_: int, predictor: Predictor, curve: Curve) -> None:
        """Keep a round: its folder gets its name when it is whole."""
        if self._folder is None:
            return
        part = self._folder / PART
        for place in (part, self._place(round_)):
            self._remove(place)
        predictor.save_pretrained(part)
        signed = {"sha256": _digest(curve.entries, round_, predictor), "entries": curve.entries}
        write_atomically(part / CURVE_FILE, json.dumps(signed).encode())
        part.rename(self._place(round_))

    def _remove(self, place: Path) -> None:
        """Remove what `save` wrote into a folder, and the folder.

        Raises: ValueError if it holds something else: that stays.
        """
        assert self._folder is not None
        disk.remove([place / name for name in (*FILES, CARD_FILE, CURVE_FILE)], self._folder)
        disk.check_free(place, ["*"], "a round of a training")

    def _place(self, round_: int) -> Path:
        assert self._folder is not None
        return self._folder / f"round-{round_}"


def _entries(data: bytes, round_: int, predictor: Predictor) -> list[dict[str, Any]]:
    """Read the curve up to a round.

    Raises: ValueError if it is not as it was kept, of another round or beside another predictor.
    """
    found = json.loads(data)
    if isinstance(found, list):  # of before, without a digest
        return found
    if found["sha256"] != _digest(found["entries"], round_, predictor):
        raise ValueError(f"the curve of round {round_} is not as it was kept")
    return found["entries"]


def _digest(entries: list[dict[str, Any]], round_: int, predictor: Predictor) -> str:
    return hashlib.sha256(json.dumps([entries, round_, predictor.digest()]).encode()).hexdigest()


def begun(folder: Path) -> dict[str, Any] | None:
    """Read the settings of the training whose rounds a folder holds; None if it holds none yet.

    Raises: ValueError if something else has the name of a round or of the settings.
    """
    file = folder / SETTINGS_FILE
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("they are no JSON object")
    except FileNotFoundError:
        return disk.check_free(folder, [PART, "round-*"], "the rounds of a training")
    except DAMAGED as error:
        raise ValueError(f"{file} holds no settings of a training ({error}); name another folder.") from error
    return settings


def settings_of(predictor: Predictor, lessons: Sequence[Lesson], config: Config) -> dict[str, Any]:
    """Describe a training as far as it changes its rounds; a longer one may go on with a shorter one's."""
    found = {
        **asdict(predictor.origin),
        **asdict(config),
        "method": predictor.method,
        "start": predictor.origin.training.get("start"),
        "options": predictor.options(),
        "runs": [[str(lesson.schedule), [[run.prompt, run.seed] for run in lesson.reference]] for lesson in lessons],
        "validation": [[[run.prompt, run.seed] for run in lesson.validation] for lesson in lessons],
    }
    unimportant = ("versions", "training", "rounds")
    return json.loads(json.dumps({name: value for name, value in found.items() if name not in unimportant}))
