"""Say what a calibration takes before it is made: transformer runs, by the limits that solving, searching, refining and
checking keep."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from lesa.learn import refining, searching
from lesa.learn.calibrate import CalibrateOptions
from lesa.learn.planning import DISTURBED, PLANNED_ON, disturbance, spread
from lesa.learn.references import BATCH
from lesa.learn.rivals import PLANNED_APART, UNTRAINED
from lesa.learn.solve import Solver

ROUNDS: int = inspect.signature(Solver.solve).parameters["rounds"].default
OPTIONS = CalibrateOptions()
KINDS = ("reference", "rounds", "search", "refinement", "rivals", "checks")


@dataclass(frozen=True)
class Runs:
    """What the runs of a calibration are like: steps, streams, how many numbers latents have, and the calls.

    Full in any case are the steps `begins`, and calls go one by one unless `together`.
    """

    steps: int
    streams: int
    begins: tuple[int, ...] = (0,)
    solved_on: int = 8
    checked: int = 4
    together: bool = False


def most_runs(runs: Runs, budgets: Sequence[int], options: CalibrateOptions = OPTIONS) -> dict[str, int]:
    """Return how many transformer runs, of one picture and stream, a calibration takes at most, by what they are for.

    Those of `reference` and `rivals` are what it takes.
    """
    together = runs.together and min(runs.solved_on, searching.TRIED_ON) <= BATCH
    calls, few = runs.solved_on, min(runs.solved_on, searching.TRIED_ON if together else searching.TRIED_ON_APART)
    most = options.most or (searching.TOGETHER if together else searching.APART)
    planned = [disturbance(runs.steps, runs.begins), spread(runs.steps, runs.begins)]
    disturbed = sum(len(one.full_steps(runs.steps)) for one in planned)
    found = dict.fromkeys(KINDS, 0)
    found["reference"] = (calls + runs.checked) * runs.steps
    if options.rivals:
        planned_on = min(calls, PLANNED_ON if together else PLANNED_APART)
        found["rivals"] = planned_on * runs.steps + min(planned_on, DISTURBED) * disturbed
    for budget in budgets:
        refined = searching.REFINED if together else 1
        tries = (most + searching.STARTS + 1) * few + (searching.FINALISTS * calls if calls > few else 0)
        tries += refined * calls * (refined > 1)
        steps = options.refine * refining.TRIED + (directions(budget) if options.refine else 0)
        found["rounds"] += (1 + ROUNDS) * calls * budget * refined
        found["search"] += (1 if together else 2) * tries * budget
        found["refinement"] += steps * calls * budget * refined
        found["checks"] += (1 + 2 * len(UNTRAINED) * options.rivals) * runs.checked * budget
    return {kind: count * runs.streams for kind, count in found.items()}


def directions(budget: int) -> int:
    """Return in how many directions rows are changed at most to see what that does at the end."""
    return min(budget * (budget + 3) // 2, refining.MOST)
