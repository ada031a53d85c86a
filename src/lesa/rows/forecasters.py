"""Forecasters: they turn (grid, step, past) into a row of numbers, and never see a feature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lesa.rows.grid import matches, times_in_order
from lesa.rows.row import Row


class Forecaster(Protocol):
    """What every forecaster has; deriving from this class gives the defaults of all but `row`.

    `memory` is how many past features one forecast may combine; `remembers_forecasts` says whether its own forecasts
    enter the history (LESA and L2P) or full steps only (reuse, Taylor). At steps that it names in `begins` it has full
    steps whose past it does not look at, as where another denoiser takes over.
    """

    memory: int
    remembers_forecasts: bool
    begins: tuple[int, ...] = ()

    def row(self, grid: Tensor, step: int, past: Sequence[int]) -> Row:
        """Return the row of `step`: one coefficient for each step of `past`, the history's steps, oldest first."""
        ...

    def rows_of(self, grid: Tensor, pasts: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        """Return the rows of several steps at once, each after its past."""
        return {step: self.row(grid, step, past) for step, past in pasts.items()}

    def correction(self, grid: Tensor, step: int, past: Sequence[int]) -> Row | None:
        """Return the row that a full step is corrected by, None if it is not, or not after this past.

        At the output tap what the sampler is handed there combines the outputs of full steps, its own the newest of
        `past`.
        """
        return None

    def wants(self, grid: Tensor, step: int) -> int:
        """Return how many past features the row of `step` is made for; with fewer it is a makeshift."""
        return self.memory

    def for_stream(self, name: str) -> Forecaster:
        """Return the forecaster of one stream ('cond' or 'uncond'); without streams of its own, itself."""
        return self


class Reuse(Forecaster):
    """Repeat the newest feature, as FORA does."""

    memory = 1
    remembers_forecasts = False

    def row(self, grid: Tensor, step: int, past: Sequence[int]) -> Row:
        """Return 1 for the newest past step and 0 for the others."""
        return Row(torch.eye(len(past), dtype=torch.float64)[-1], zero())

    def __repr__(self) -> str:
        return "Reuse()"


class Taylor(Forecaster):
    """Continue the full steps' features by a Taylor series in the step index (TaylorSeer, arXiv 2503.06923).

    With d_0 = h and d_{j+1} = (d_j - previous d_j) / gap, the gap being that of the two newest full steps,
    h_{s+k} = sum_j d_j k^j / j!. Backward differences are no derivatives: it is exact for straight lines only, whatever
    the order.

    Raises: ValueError if `order` is negative.
    """

    remembers_forecasts = False

    def __init__(self, order: int = 1) -> None:
        self.order = not_negative("order", order)
        self.memory = self.order + 1

    def row(self, grid: Tensor, step: int, past: Sequence[int]) -> Row:
        """Run the recursion on the identity; with fewer past steps than order + 1 the order drops."""
        return self.rows_of(grid, {step: past})[step]

    def rows_of(self, grid: Tensor, pasts: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        """Return the rows of several steps, those after one past together: planning asks for thousands."""
        return _together(self._weights, pasts)

    def _weights(self, steps: Sequence[int], past: tuple[int, ...]) -> Tensor:
        differences = backward_differences(past, self.order)
        ahead = [step - past[-1] for step in steps]
        terms = [[far**j / math.factorial(j) for j in range(len(differences))] for far in ahead]
        return torch.tensor(terms, dtype=torch.float64) @ torch.stack(differences)

    def __repr__(self) -> str:
        return f"Taylor(order={self.order})"


def backward_differences(past: Sequence[int], order: int) -> list[Tensor]:
    """Return d_0, d_1, ... of the newest of some full steps as combinations of their features, up to d_order.

    d_0 = h and d_{j+1} = (d_j - previous d_j) / gap, the gap being that of the two newest full steps.
    """
    differences: list[Tensor] = []
    for k, feature in enumerate(torch.eye(len(past), dtype=torch.float64)):
        newer = [feature]
        for previous in differences[:order]:
            newer.append((newer[-1] - previous) / (past[k] - past[k - 1]))
        differences = newer
    return differences


class Lagrange(Forecaster):
    """Extrapolate the polynomial in t through the newest full steps' features, exact to its degree on any grid.

    c_k = prod_{j != k} (t - t_j) / (t_k - t_j).

    Raises: ValueError if `degree` is negative.
    """

    remembers_forecasts = False

    def __init__(self, degree: int = 1) -> None:
        self.degree = not_negative("degree", degree)
        self.memory = self.degree + 1

    def row(self, grid: Tensor, step: int, past: Sequence[int]) -> Row:
        """Return the Lagrange weights; with fewer past steps than degree + 1 the degree drops."""
        return self.rows_of(grid, {step: past})[step]

    def rows_of(self, grid: Tensor, pasts: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        """Return the rows of several steps, those after one past together: planning asks for thousands."""
        return _together(lambda steps, past: self._weights(grid, steps, past), pasts)

    def _weights(self, grid: Tensor, steps: Sequence[int], past: tuple[int, ...]) -> Tensor:
        newest = _distinct(grid, past)[-self.memory :]
        times = grid[newest]
        itself = torch.eye(len(times), dtype=torch.bool)
        ratios = (grid[list(steps), None, None] - times) / (times[:, None] - times).masked_fill(itself, 1.0)
        coefficients = torch.zeros(len(steps), len(past), dtype=torch.float64)
        coefficients[:, [past.index(step) for step in newest]] = ratios.masked_fill(itself, 1.0).prod(-1)
        return coefficients

    def __repr__(self) -> str:
        return f"Lagrange(degree={self.degree})"


def _together(
    weights: Callable[[Sequence[int], tuple[int, ...]], Tensor], pasts: Mapping[int, Sequence[int]]
) -> dict[int, Row]:
    """Make rows without an offset, those after one past in one call, (steps, past) -> (steps, len(past))."""
    together: dict[tuple[int, ...], list[int]] = {}
    for step, past in pasts.items():
        together.setdefault(tuple(past), []).append(step)
    offset, rows = zero(), {}
    for past, steps in together.items():
        rows.update(zip(steps, weights(steps, past), strict=True))
    return {step: Row(rows[step], offset) for step in pasts}


def _distinct(grid: Tensor, past: Sequence[int]) -> list[int]:
    """Return past steps of different times, oldest first: of those at one time (Heun's method has them) the newest."""
    return list({float(grid[step]): step for step in past}.values())


class PlannedRow(NamedTuple):
    """The row of one step as plain numbers: h = sum_k coefficients[k] h_{past[k]} + offset.

    Of a skipped step the sampler is handed what guidance makes of these forecasts, and `latents` times the run's first
    latents; of a corrected one the same combination of what guidance made of full steps, its own the newest.
    """

    past: tuple[int, ...]
    coefficients: tuple[float, ...]
    offset: float
    latents: float = 0.0


class LinearRows(Forecaster):
    """Hold free rows: a number for every past step of every skipped step (L2P, arXiv 2604.26365), or a frozen plan's.

    They are bound to one grid, whose times may repeat and end above 0, and to the past that each of them was made for.
    `memory` is the longest of these when not given. Runs begin at the first of the steps `begins`, and histories anew
    at the others. `corrections` are the rows of full steps that are corrected.

    Raises: ValueError if there are no rows, or one of them has not one coefficient for each past step.
    """

    def __init__(
        self,
        grid: Sequence[float] | Tensor,
        rows: Mapping[int, PlannedRow],
        *,
        memory: int | None = None,
        remembers_forecasts: bool = True,
        begins: tuple[int, ...] = (),
        corrections: Mapping[int, PlannedRow] | None = None,
    ) -> None:
        if not rows:
            raise ValueError("linear rows hold at least one row, got none; without skipped steps use Reuse().")
        for step, row in {**rows, **(corrections or {})}.items():
            if len(row.coefficients) != len(row.past):
                raise ValueError(
                    f"a row has one coefficient for each past step, got {len(row.coefficients)} for {len(row.past)} "
                    f"at step {step}; repair this row."
                )
        self.grid = times_in_order(grid)
        self.rows, self.begins, self.corrections = dict(rows), begins, dict(corrections or {})
        self.memory = memory or max(len(row.past) for row in rows.values())
        self.remembers_forecasts = remembers_forecasts

    def row(self, grid: Tensor, step: int, past: Sequence[int]) -> Row:
        """Look the row up.

        Raises: ValueError if it was made for another grid or past, or there is none for `step`.
        """
        self._check_grid(grid)
        if step not in self.rows:
            raise ValueError(
                f"there are rows for steps {sorted(self.rows)}, got skipped step {step}; use their schedule."
            )
        return self._looked_up(self.rows[step], step, past)

    def correction(self, grid: Tensor, step: int, past: Sequence[int]) -> Row | None:
        """Look the row of a full step up, None if it is not corrected, or was made for another past.

        Raises: ValueError if it was made for another grid.
        """
        self._check_grid(grid)
        row = self.corrections.get(step)
        return None if row is None or row.past != tuple(past) else self._looked_up(row, step, past)

    def _check_grid(self, grid: Tensor) -> None:
        if not matches(self.grid, grid):
            raise ValueError(
                f"these rows are bound to their grid of {len(self.grid) - 1} steps, got another one of "
                f"{len(grid) - 1}; run on that grid, or train rows for this one."
            )

    def _looked_up(self, row: PlannedRow, step: int, past: Sequence[int]) -> Row:
        made_for, coefficients, offset, latents = row
        if tuple(past) != made_for:
            raise ValueError(
                f"the row of step {step} combines steps {list(made_for)}, got a history of {list(past)}; "
                "use the schedule that these rows were made for."
            )
        return Row(_numbers(coefficients), _numbers(offset), latents)

    def wants(self, grid: Tensor, step: int) -> int:
        """Return the number of past features that the row of `step` combines."""
        return len(self.rows[step].past)

    def __repr__(self) -> str:
        return f"LinearRows({len(self.rows)} rows, memory={self.memory})"


def _numbers(numbers: float | Sequence[float]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def zero() -> Tensor:
    """Return the offset of a row without one."""
    return _numbers(0.0)


def not_negative(name: str, number: int) -> int:
    """Return a number that may be an order or a degree.

    Raises: ValueError if it is none.
    """
    if not isinstance(number, int) or number < 0:
        raise ValueError(f"{name} is a whole number, at least 0, got {number}; raise it.")
    return number
