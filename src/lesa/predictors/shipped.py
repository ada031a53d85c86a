"""The predictors that lie beside a pipeline's own files, or a LoRA's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from lesa.predictors.base import CONFIG_FILE, Predictor
from lesa.predictors.continuous import ContinuousLESA
from lesa.predictors.lesa import LESA
from lesa.rows.schedule import Schedule

SHIPPED_FOLDER = "lesa"
"""A pipeline's own folder holds its predictors in this one; each is named by its method and schedule."""
HOME = "_lesa_home"
"""A loaded pipeline's attribute: the folder whose predictors are shipped for it, where that is not its own."""


def shipped_for(pipe: Any, schedule: Schedule | None = None, budget: int | None = None) -> Predictor:
    """Load the predictor that lies beside a pipeline's own files, or those of the LoRA that it was loaded with: of
    several, the one for many grids, and then the LESA with the most full steps, on a planned schedule rather than a
    rule's, whose validation runs ended nearest to their reference runs.

    With a `schedule`, only those that were trained for it count; with a `budget`, those for so many full steps.

    Raises: LookupError if there is none.
    """
    own = getattr(getattr(pipe, "config", None), "_name_or_path", "")
    source = str(getattr(pipe, HOME, None) or own or type(pipe).__name__)
    found = sorted(path.parent for path in Path(source).glob(f"{SHIPPED_FOLDER}/*/{CONFIG_FILE}"))
    if not found:
        raise LookupError(
            f"no predictor is shipped for {source}. Make one of a few prompts (lesa calibrate) or of many "
            "(lesa collect, lesa train), or name one (lesa.Predictor.from_pretrained(...)). Rows without training need "
            "a schedule: let lesa plan choose one, or, with less to expect, take every third step: "
            "lesa.accelerate(pipe, lesa.Taylor(order=1), schedule=lesa.Schedule.every(3))."
        )
    loaded = [one for one in map(Predictor.from_pretrained, found) if one.is_for(schedule, budget)]
    if not loaded:
        names, wanted = ", ".join(folder.name for folder in found), repr(schedule or f"{budget} full steps")
        raise LookupError(f"no predictor shipped for {source} was trained for {wanted}, only {names}; train one.")

    def merits(p: Predictor) -> tuple:
        drift = p.origin.training.get("drift", math.inf)
        return isinstance(p, ContinuousLESA), isinstance(p, LESA), len(p.full), p.schedule.rule == "at", -drift

    return max(loaded, key=merits)
