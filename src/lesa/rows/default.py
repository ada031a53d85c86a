"""What is forecast where nobody calibrated: rows and full steps that come of a run's grid alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from lesa.rows.forecasters import Forecaster, Lagrange, Reuse
from lesa.rows.grid import times_in_order
from lesa.rows.levels import DATA
from lesa.rows.row import Row
from lesa.rows.schedule import Schedule

SHARE, MORE = 4, 4
"""Of S steps ceil(S / SHARE) + MORE are full: 6 of 8, 9 of 20, 17 of 50."""
FEW = 7
"""Runs of no more steps than this are full: each step is long, and one step skipped is worse than one step fewer."""
FIRST, LAST = 2, 3
"""How many steps are full at a run's begin and at its end."""
CAUTION = 8.0
"""By e^-CAUTION would the slope be damped of a forecast that is the whole run ahead."""


class Default(Forecaster):
    """Forecast without training, on a schedule of its own for any grid: cautious, for a model that nobody calibrated.

    Outputs go on along the line in t through the newest two full steps, damped: no further ahead than these two are
    apart, and by the less the more of the run the gap holds, so that few long steps are all but reuse. The data
    prediction of a sampler that adds noise stays as it is, as its slope is mostly the noise's.

    Example:
        >>> print(Default().schedule_for([1 - k / 20 for k in range(21)]).draw(20))
        ##..#..#...#..#..###
    """

    memory = 2
    remembers_forecasts = False

    def __init__(self) -> None:
        self._line, self._reuse = Lagrange(1), Reuse()

    def row(self, grid: Tensor, step: int, past: Sequence[int]) -> Row:
        """Return reuse's weights and a share of what sets the line's apart; of one past step, or time, reuse's."""
        reuse = self._reuse.row(grid, step, past).coefficients
        line, offset, _ = self._line.row(grid, step, past)
        ahead = float(line[-1]) - 1  # in distances between the newest two
        weight = math.exp(-CAUTION * gap(grid, past[-1], step)) / max(1.0, ahead)
        return Row(reuse + weight * (line - reuse), offset)

    def for_stream(self, name: str) -> Forecaster:
        """Return reuse for the data prediction, and itself for a denoiser's outputs."""
        return self._reuse if name == DATA else self

    def schedule_for(self, times: Sequence[float] | Tensor, start: int = 0, *, budget: int | None = None) -> Schedule:
        """Return the schedule of a run on this grid that begins at step `start`, of `budget` full steps if given.

        Raises: ValueError if `times` are no grid, or it has no such step, or the run not so many.
        """
        grid = times_in_order(times)
        steps = len(grid) - 1
        if not 0 <= start < steps:
            raise ValueError(f"a run of {steps} steps begins at one of them, got start {start}; lower start.")
        length = steps - start
        if budget is not None and not 1 <= budget <= length:
            raise ValueError(
                f"of a run of {length} steps 1 to {length} are full, got a budget of {budget}; pass one of these."
            )
        return Schedule.at(full_steps(grid, budget or count_for(length), start))

    def __repr__(self) -> str:
        return "Default()"


def gap(grid: Tensor, newest: int, step: int) -> float:
    """Return which share of a run lies between two steps: the mean of that of its steps and that of its time."""
    of_steps = (step - newest) / (len(grid) - 1)
    return (of_steps + float((grid[step] - grid[newest]).abs() / (grid[0] - grid[-1]))) / 2


def count_for(length: int) -> int:
    """Return how many steps of a run are full."""
    return length if length <= FEW else -(-length // SHARE) + MORE


def full_steps(grid: Tensor, count: int, start: int = 0) -> list[int]:
    """Return `count` steps of a run that begins at step `start`: the first and last ones, and between them evenly.

    Evenly as `gap` measures: grids are shifted to have more steps where little time passes, and where in either the
    model changes faster is not known.
    """
    last = min(LAST, count - 1)
    first = min(FIRST, count - last)
    between = count - first - last
    begin, end = start + first - 1, len(grid) - 1 - last
    chosen = [*range(start, begin + 1), *range(end, len(grid) - 1)]
    free = {step: gap(grid, begin, step) for step in range(begin + 1, end)}
    for k in range(between):
        wanted = gap(grid, begin, end) * (k + 1) / (between + 1)
        nearest = min(free, key=lambda step: (round(abs(free[step] - wanted), 9), -step))
        chosen.append(nearest)
        del free[nearest]
    return sorted(chosen)
