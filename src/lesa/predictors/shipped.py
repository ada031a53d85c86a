"""The predictors that lie beside a pipeline's own files, or a LoRA's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lesa.predictors.base import CONFIG_FILE, Predictor
from lesa.predictors.calibration import CALIBRATION_FILE, Calibration
from lesa.predictors.continuous import ContinuousLESA
from lesa.predictors.lesa import LESA
from lesa.predictors.shelf import read_or_warn
from lesa.rows.schedule import Schedule

SHIPPED_FOLDER = "lesa"
"""A pipeline's own folder holds its predictors in this one; each is named by its method and schedule."""
HOME = "_lesa_home"
"""A loaded pipeline's attribute: the folder whose predictors are shipped for it, where that is not its own."""


def shipped(pipe: Any) -> list[Predictor]:
    """Load the predictors that lie beside a pipeline's own files, or those of the LoRA that it was loaded with.

    First come those for many grids, and then the LESAs, those with the most full steps, on a planned schedule rather
    than a rule's, whose validation runs ended nearest to their reference runs.
    """

    def merits(p: Predictor) -> tuple:
        drift = p.origin.training.get("drift", math.inf)
        return isinstance(p, ContinuousLESA), isinstance(p, LESA), len(p.full), p.schedule.rule == "at", -drift

    return sorted(map(Predictor.from_pretrained, _folders(pipe, CONFIG_FILE)), key=merits, reverse=True)


def shipped_for(pipe: Any, schedule: Schedule | None = None, budget: int | None = None) -> Predictor:
    """Load the best of the predictors shipped for a pipeline (see `shipped`).

    With a `schedule`, only those that were trained for it count; with a `budget`, those for so many full steps.

    Raises: LookupError if there is none.
    """
    source, found = _source(pipe), shipped(pipe)
    if not found:
        raise LookupError(
            f"no predictor is shipped for {source}. Make one of a few prompts (lesa calibrate) or of many "
            "(lesa collect, lesa train), or name one (lesa.Predictor.from_pretrained(...)). Rows without training need "
            "a schedule: let lesa plan choose one, or, with less to expect, take every third step: "
            "lesa.accelerate(pipe, lesa.Taylor(order=1), schedule=lesa.Schedule.every(3))."
        )
    fitting = [one for one in found if one.is_for(schedule, budget)]
    if not fitting:
        names = ", ".join(folder.name for folder in _folders(pipe, CONFIG_FILE))
        wanted = repr(schedule or f"{budget} full steps")
        raise LookupError(f"no predictor shipped for {source} was trained for {wanted}, only {names}; train one.")
    return fitting[0]


def calibrations_beside(pipe: Any) -> list[Calibration]:
    """Return the calibrations that lie beside a pipeline's own files; warns of what cannot be read."""
    found = (read_or_warn(folder) for folder in _folders(pipe, CALIBRATION_FILE))
    return [one for one in found if one is not None]


def _source(pipe: Any) -> str:
    own = getattr(getattr(pipe, "config", None), "_name_or_path", "")
    return str(getattr(pipe, HOME, None) or own or type(pipe).__name__)


def _folders(pipe: Any, file: str) -> list[Path]:
    return sorted(path.parent for path in Path(_source(pipe)).glob(f"{SHIPPED_FOLDER}/*/{file}"))
