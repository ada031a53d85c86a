"""What is forecast where nobody calibrated: rows and full steps that come of a run's grid alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lesa.rows.forecasters import Forecaster, Lagrange, Reuse
from lesa.rows.grid import times_in_order
from lesa.rows.row import Row
from lesa.rows.schedule import Schedule

DATA = "data"
"""The name of the stream that is the data prediction, which the host forecasts where a sampler adds noise."""
FIRST, LAST = 2, 2
"""How many steps are full at a run's begin and at its end."""
SHARE, MORE = 3, 2
"""A run of S steps has ceil(S / SHARE) + MORE full ones, if that is fewer."""


class Default(Forecaster):
    """Forecast without training, on a schedule of its own for any grid: cautious, for a model that nobody calibrated.

    Outputs go on along the line through the newest two full steps, in t; the data prediction under a sampler that adds
    noise, whose slope is mostly that of the noise, stays. A third of the steps are full and two more, as `full_steps`
    says.

    Example:
        >>> print(Default().schedule_for([1 - k / 20 for k in range(21)]).draw(20))
        ##..#..#.#..#.#..###
    """

    memory = 2
    remembers_forecasts = False

    def __init__(self) -> None:
        self._line = Lagrange(1)

    def row(self, grid: Tensor, step: int, past: Sequence[int]) -> Row:
        """Return the line's weights; with one past step, reuse."""
        return self._line.row(grid, step, past)

    def for_stream(self, name: str) -> Forecaster:
        """Return reuse for the data prediction, and itself for a denoiser's outputs."""
        return Reuse() if name == DATA else self

    def schedule_for(self, times: Sequence[float] | Tensor, start: int = 0, budget: int | None = None) -> Schedule:
        """Return the schedule of a run on this grid that begins at step `start`, of `budget` full steps if given.

        Raises: ValueError if the grid does not fit, or the run has not so many steps.
        """
        grid = times_in_order(times)
        steps = len(grid) - 1
        if not 0 <= start < steps:
            raise ValueError(f"a run of {steps} steps begins at one of them, got start {start}; lower start.")
        length = steps - start
        if budget is not None and not 1 <= budget <= length:
            raise ValueError(f"a run of {length} steps has 1 to {length} full ones, got a budget of {budget}; mend it.")
        return Schedule.at(full_steps(grid[start:], count_for(length) if budget is None else budget, start))

    def __repr__(self) -> str:
        return "Default()"


def count_for(length: int) -> int:
    """Return how many of a run's steps are full."""
    return min(length, -(-length // SHARE) + MORE)


def full_steps(grid: Tensor, count: int, start: int = 0) -> list[int]:
    """Return `count` steps of a grid (S + 1,), counted from `start`: first and last ones, and between them evenly.

    Evenly in the mean of the share of steps and the share of time that have passed, as shifted grids hold most of
    their steps where little time passes.
    """
    steps = len(grid) - 1
    last = min(LAST, count - 1)
    first = min(FIRST, count - last)
    rest = count - first - last
    passed = (grid[0] - grid[:-1]) / (grid[0] - grid[-1]) + torch.arange(steps) / steps
    begin, end = float(passed[first - 1]), float(passed[steps - last]) if last else 2.0
    chosen = [*range(first), *range(steps - last, steps)]
    for k in range(rest):
        wanted = begin + (end - begin) * (k + 1) / (rest + 1)
        chosen.append(min((s for s in range(steps) if s not in chosen), key=lambda s: abs(float(passed[s]) - wanted)))
    return [start + step for step in sorted(chosen)]
