"""Gaps between full steps, as algebra: the least squares of their rows, and what a schedule leaves at the end.

Steps count from the run's first. Rows are (J, J + 1): of each gap, over the outputs of the J full steps, and over the
latents that the run began with. Columns are these J + 1 in that order.

The row of a gap that skips nothing is a correction: after skipped steps, what the sampler is handed at a full step
makes up for what they left, now that one output more is known. It combines the outputs up to that step's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-7
"""What holds a row to reuse, as a share of the columns' mean square."""
TINY = 1e-12

Full = tuple[int, ...]
"""Full steps, counted from the run's first."""


class Equations(NamedTuple):
    """Weighted sums over calls: of the columns' inner products, and of those with what each gap's end lacks."""

    gram: Tensor
    """(J + 1, J + 1)"""
    target: Tensor
    """(J, J + 1): end of gap, column"""


class Gaps:
    """The gaps of a schedule in a run whose sampler has this response, (S + 1, S).

    Histories begin anew at the ticks `begins`, which have to be full: rows combine no outputs from before. Rows use the
    first latents, and correct full steps, if they have `latents`: both act at the sampler.
    """

    def __init__(self, response: Tensor, full: Sequence[int], begins: Sequence[int] = (0,), latents: bool = True):
        self.response, self.full, self.latents = response, tuple(full), latents
        self.ends = ends_of(full, response.shape[1])
        self.lows = [_low(full, j, begins) for j in range(len(full))]
        at_ends, own = response[self.ends], response[self.ends][:, list(full)]
        self._moves = torch.stack([at_ends[:, list(self.steps(j))].sum(1) for j in range(len(full))], 1)
        corrected = [full[j] in self.steps(j) for j in range(len(full))]
        self._own = own.masked_fill(torch.tensor(corrected), 0.0)

    def __len__(self) -> int:
        return len(self.full)

    def reuse(self) -> Tensor:
        """Return the rows that reuse the newest output, (J, J + 1)."""
        return torch.eye(len(self), len(self) + 1, dtype=torch.float64)

    def columns(self, j: int) -> list[int]:
        """Return which columns the row of the gap after the j-th full step combines."""
        return [*range(self.lows[j], j + 1), *([len(self)] if self.latents else [])]

    def steps(self, j: int) -> range:
        """Return the steps that the row of the gap after the j-th full step is for: those skipped in it, or that full
        step where it is corrected, or none."""
        return range(self.full[j] + (not (self.latents and is_corrected(self.full, j, self.ends[j]))), self.ends[j])

    def moves(self, j: int) -> float:
        """Return by how much an output of all steps that a row is for moves the latents at the end of its gap."""
        return float(self._moves[j, j])

    def ways(self, rows: Tensor) -> Tensor:
        """Return how the latents at the end of each gap depend on the columns, (J, J + 1), with these rows."""
        ways = self._moves @ rows
        ways[:, :-1] += self._own
        return ways

    def way(self, rows: Tensor, j: int) -> Tensor:
        """Return how the latents at the end of the gap after the j-th full step depend on the columns, (J + 1,)."""
        way = self._moves[j] @ rows
        way[:-1] += self._own[j]
        return way

    def solve_row(
        self, rows: Tensor, j: int, gram: Tensor, target: Tensor, near: Tensor | None = None, hold: float = 0.0
    ) -> Tensor:
        """Return the row of the gap after the j-th full step, (J + 1,), given the rows before it.

        `gram` is of all columns, (J + 1, J + 1), and `target` what the gap's end lacks, (J + 1,); those of later full
        steps do not matter. A gap without steps of its row, or whose steps move nothing, reuses, and so does one after
        a run that overflowed. It may be held `near` other rows than reuse, (J, J + 1), by the share `hold`.
        """
        columns, moves, without = self.columns(j), self.moves(j), rows.clone()
        without[j] = self.reuse()[j]
        if abs(moves) < TINY:
            return without[j]
        if near is not None:
            without[j] = near[j]
        target = (target - gram @ self.way(without, j))[columns]
        gram = gram[columns][:, columns]
        if not (gram.isfinite().all() and target.isfinite().all()):
            return without[j]
        ridge = (RIDGE if near is None else hold) * gram.diagonal().mean()
        held = gram + ridge * torch.eye(len(columns), dtype=gram.dtype)
        without[j, columns] += torch.linalg.lstsq(held, target, driver="gelsd").solution / moves
        return without[j]

    def solve_rows(self, equations: Equations, near: Tensor | None = None, hold: float = 0.0) -> Tensor:
        """Return the rows of all gaps, (J, J + 1), each given those before it."""
        rows = torch.zeros(len(self), len(self) + 1, dtype=torch.float64)
        for j in range(len(self)):
            rows[j] = self.solve_row(rows, j, equations.gram, equations.target[j], near, hold)
        return rows


def ends_of(full: Sequence[int], steps: int) -> list[int]:
    return [*full[1:], steps]


def is_corrected(full: Sequence[int], j: int, end: int) -> bool:
    """Tell whether the j-th full step is corrected: its gap, up to its `end`, skips nothing, and one before did."""
    return end == full[j] + 1 and full[j] - full[0] > j


def _low(full: Sequence[int], j: int, begins: Sequence[int]) -> int:
    """Return the first full step since the history began, by its place."""
    begin = max((begin for begin in begins if begin <= full[j]), default=0)
    return next(k for k, step in enumerate(full) if step >= begin)


# --- schedules


class Algebra:
    """What the reference runs say of schedules: what rows solved on their outputs leave at the end.

    `gram` holds the inner products of the outputs of all S steps and of the first latents, (S + 1, S + 1); rows use the
    latter if they are `latents`.
    """

    def __init__(self, response: Tensor, gram: Tensor, calls: int, begins: Sequence[int] = (0,), latents: bool = True):
        self.response, self.gram, self.calls, self.begins = response, gram, calls, begins
        self._more = [response.shape[1]] if latents else []
        self._gaps: dict[tuple, float] = {}

    def gap(self, past: tuple[int, ...], end: int) -> float:
        """Return the mean square that the best row leaves at the end of a gap, given the reference's outputs."""
        key = past, end
        if key not in self._gaps:
            moves, columns = self.gram.new_zeros(len(self.gram)), [*past, *self._more]
            moves[past[-1] + 1 : end] = self.response[end, past[-1] + 1 : end]
            held = self.gram[columns][:, columns]
            held = held + RIDGE * held.diagonal().mean() * torch.eye(len(columns), dtype=held.dtype)
            target = self.gram[columns] @ moves
            left = moves @ self.gram @ moves - target @ torch.linalg.solve(held, target)
            self._gaps[key] = max(float(left), 0.0) / self.calls
        return self._gaps[key]

    def cost(self, full: Sequence[int], forgiveness: float = 0.0) -> float:
        """Return the sum of what all gaps leave, as if none could make up for another.

        The denoiser takes back a part of what is left early in a run: a gap that ends after a share u of the steps
        counts u^forgiveness.
        """
        steps = self.response.shape[1]
        ends = ends_of(full, steps)
        pasts = (tuple(full[_low(full, j, self.begins) : j + 1]) for j in range(len(full)))
        return sum(self.gap(past, end) * (end / steps) ** forgiveness for past, end in zip(pasts, ends, strict=True))

    def best(self, budget: int, forgiveness: float) -> tuple[int, ...]:
        """Return the best schedule found from several starts."""
        cost = partial(self.cost, forgiveness=forgiveness)
        steps = self.response.shape[1]
        starts = {descend(start, cost, steps, self.begins) for start in spreads(steps, budget, self.begins)}
        return min(sorted(starts), key=cost)


def spreads(steps: int, budget: int, begins: Sequence[int] = (0,)) -> Iterator[tuple[int, ...]]:
    """Spread full steps evenly, and more and more towards the run's end or its beginning; those of `begins` are kept
    beside as many of the others as there is room for."""
    places = torch.linspace(0, 1, budget, dtype=torch.float64)
    for bend in (1.0, 1.5, 2.2, 3.0):
        for some in (1 - (1 - places) ** bend, places**bend):
            full = (some * (steps - 1)).round().int().tolist()
            for k in range(1, budget):
                full[k] = min(max(full[k], full[k - 1] + 1), steps - budget + k)
            yield with_begins(full, begins)


def with_begins(full: Sequence[int], begins: Sequence[int]) -> tuple[int, ...]:
    """Put what has to be full in the place of what is nearest to it."""
    free = [step for step in full if step not in begins]
    for begin in sorted(set(begins) - set(full)):
        free.remove(min(free, key=lambda step: abs(step - begin)))
    return tuple(sorted({*free, *begins}))


def descend(
    full: tuple[int, ...],
    cost: Callable[[tuple[int, ...]], float],
    steps: int,
    begins: Sequence[int] = (0,),
    allowed: Callable[[tuple[int, ...]], bool] | None = None,
) -> tuple[int, ...]:
    """Take every move that makes the cost smaller, of those that are allowed, until there is none."""
    best, improved = cost(full), True
    while improved:
        improved = False
        for moved in filter(allowed, moves(full, steps, begins)):
            if (found := cost(moved)) < best - TINY:
                full, best, improved = moved, found, True
                break
    return full


def moves(full: tuple[int, ...], steps: int, begins: Sequence[int] = (0,)) -> Iterator[tuple[int, ...]]:
    """Yield the schedules with one full step elsewhere, or with several that follow each other moved together, the
    nearest first; those of `begins` stay."""
    count = len(full)
    for distance in (1, 2, 4, 8, 16):
        for length in range(1, count if distance <= 2 else 2):
            for k in range(1, count - length + 1):
                for way in (distance, -distance):
                    kept = full[:k], full[k + length :]
                    moved = sorted({*kept[0], *(step + way for step in full[k : k + length]), *kept[1]})
                    if len(moved) == count and moved[1] > 0 and moved[-1] < steps and set(begins) <= set(moved):
                        yield tuple(moved)
