"""Notice an unusual run while it goes on, and give it another full step.

At a full step the feature is known, and what would have been forecast for it costs one row. Where the two are further
apart than in most runs, the run leaves its schedule for one with more full steps from there on. A run does so once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lesa.rows.schedule import Schedule


@dataclass(frozen=True)
class Detour:
    """What a run does that is unusual at one full step: if |forecast - feature| > `limit` |feature|, take `schedule`.

    The schedule's full steps up to there are those of the schedule that it leaves.
    """

    limit: float
    schedule: Schedule


Detours = Mapping[int, Detour]
"""By full step, the first one met counts; the forecaster gives rows after any past (no predictor bound to one)."""
