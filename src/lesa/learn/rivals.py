"""Rows without training, each on a schedule planned for it: what calibrated rows are held against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from lesa.learn.calls import Call
from lesa.learn.collect import record
from lesa.learn.counted import counting
from lesa.learn.planning import DISTURBED, PLANNED_ON, Planner
from lesa.learn.references import BATCH
from lesa.predictors import Origin
from lesa.predictors.solved import Solved
from lesa.rows.forecasters import Forecaster, Lagrange, Reuse, Taylor
from lesa.rows.gaps import with_begins
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

UNTRAINED: tuple[Forecaster, ...] = (Reuse(), Lagrange(1), Lagrange(2), Lagrange(3), Taylor(1))


PLANNED_APART = 4
"""On how many calls schedules are planned where they do not go in one call of the pipeline."""


class Rival(NamedTuple):
    """Rows without training on a schedule."""

    forecaster: Forecaster
    schedule: Schedule


class Rivals:
    """Plans for all rows without training, on runs of some calls that are recorded the first time that it is asked.

    They go in one call of the pipeline where `batch_size` has room for all, else one by one. `transformer_runs` says
    how many these runs took so far, of one picture and stream each.
    """

    def __init__(
        self,
        pipe: Any,
        calls: Sequence[Call],
        seeds: Sequence[int],
        call: Mapping[str, Any],
        *,
        batch_size: int = BATCH,
    ):
        plain, most = all(isinstance(one, str) for one in calls), min(len(calls), PLANNED_ON)
        self._together = batch_size >= most and plain
        most = most if self._together else PLANNED_APART
        self._calls, self._seeds = list(calls)[:most], list(seeds)[:most]
        if not self._together:  # a call with its arguments by name goes alone
            self._calls = [{"prompt": one} if isinstance(one, str) else one for one in self._calls]
        self._pipe, self._call, self._planner, self.transformer_runs = pipe, dict(call), None, 0

    def of(self, schedule: Schedule, budget: int, begins: Sequence[int] = ()) -> tuple[list[Rival], str]:
        """Return each on a schedule of so many full steps planned for it, and on the one given; and why there are no
        plans, where runs cannot be recorded to plan on.

        The steps `begins`, at which other streams run than before, are full in all of them.
        """
        found, why = [Rival(one, schedule) for one in UNTRAINED], ""
        try:
            planner = self._planned_by()
            found += [Rival(one, _planned(planner, one, budget, begins)) for one in UNTRAINED]
        except ValueError as error:
            why = f"no schedules were planned for rows without training: {error}"
        return list(dict.fromkeys(found)), why

    def refined(self, forecaster: Forecaster, budget: int) -> Schedule:
        """Return the schedule that real runs choose for a forecaster, among plans of more and more caution.

        Raises: ValueError as `lesa.learn.collect.record` and `Planner` do.
        """
        return self._planned_by().plan(forecaster, budget)

    def _planned_by(self) -> Planner:
        if self._planner is None:
            with self._counted(len(self._calls)):
                runs = record(self._pipe, self._calls, self._seeds, None, None, seam=True, **self._call)
            with self._counted(len(runs[:DISTURBED])):
                self._planner = Planner.of(self._pipe, runs, Tap(), self._calls, **self._call)
        return self._planner

    @contextmanager
    def _counted(self, calls: int) -> Iterator[None]:
        with counting(self._pipe) as runs:
            try:
                yield
            finally:
                self.transformer_runs += runs() * (calls if self._together else 1)


def _planned(planner: Planner, forecaster: Forecaster, budget: int, begins: Sequence[int]) -> Schedule:
    """Return the schedule planned for a forecaster, with the steps `begins` among its full ones."""
    full = planner.search(forecaster, budget).full_steps(planner.steps, planner.begins[0])
    return Schedule.at(with_begins(sorted({*full, *planner.begins}), begins))


@torch.no_grad()
def baked(forecaster: Forecaster, origin: Origin, of: str = "output") -> Solved:
    """Return a predictor whose rows are those that a forecaster has on the origin's grid and schedule.

    They combine nothing from before a step at which histories begin anew.

    Raises: ValueError if the forecaster has no rows on this grid.
    """
    made, forecaster = Solved(origin, of=of), forecaster.for_stream(of)
    steps = len(made.grid) - 1
    for step, past in made.pasts_of(made.full, steps).items():
        newest = past[-forecaster.memory :]
        row = forecaster.row(made.grid, step, newest).coefficients
        made.coefficients[step] = 0.0
        made.coefficients[step, [made.full.index(k) for k in newest]] = row.float().double()
    return made
