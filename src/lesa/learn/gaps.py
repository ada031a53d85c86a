"""Gaps between full steps, as algebra: the least squares of their rows, and what a schedule leaves at the end.

Steps count from the run's first. Rows are (T, J, J): of each kind of column, of each gap, over the full steps. The one
kind of all runs is the velocity; under guidance of named streams the second is what more of `uncond` would add to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-7
"""What holds a row to reuse, as a share of the outputs' mean square."""
TINY = 1e-12


class Equations(NamedTuple):
    """Weighted sums over calls: of the columns' inner products, and of those with what each gap's end lacks."""

    gram: Tensor
    """(T J, T J)"""
    target: Tensor
    """(J, T J): end of gap, column"""


class Gaps:
    """The gaps of a schedule in a run whose sampler has this response, (S + 1, S).

    Histories begin anew at the ticks `begins`, which have to be full: rows combine no outputs from before. `ridges`
    hold each kind of column: the first to reuse, the others to 0, as shares of its mean square.
    """

    def __init__(
        self, response: Tensor, full: Sequence[int], begins: Sequence[int] = (0,), ridges: Sequence[float] = (RIDGE,)
    ):
        self.response, self.full, self.ridges = response, tuple(full), tuple(ridges)
        self.ends = ends_of(full, response.shape[1])
        self.lows = [_low(full, j, begins) for j in range(len(full))]

    def __len__(self) -> int:
        return len(self.full)

    @property
    def kinds(self) -> int:
        return len(self.ridges)

    def reuse(self) -> Tensor:
        """Return the rows that reuse the newest output, (T, J, J)."""
        rows = torch.zeros(self.kinds, len(self), len(self), dtype=torch.float64)
        rows[0] = torch.eye(len(self), dtype=torch.float64)
        return rows

    def columns(self, j: int) -> list[int]:
        """Return which columns the row of the gap after the j-th full step combines."""
        return [kind * len(self) + k for kind in range(self.kinds) for k in range(self.lows[j], j + 1)]

    def moves(self, j: int) -> float:
        """Return by how much an output of all steps skipped in a gap moves the latents at its end."""
        return float(self.response[self.ends[j], self.full[j] + 1 : self.ends[j]].sum())

    def ways(self, rows: Tensor) -> Tensor:
        """Return how the latents at the end of each gap depend on the columns, (J, T J), with these rows."""
        steps = self.response.shape[1]
        spread = torch.zeros(steps, *rows.shape[::2], dtype=rows.dtype)
        for j, (begin, end) in enumerate(pairwise([*self.full, steps])):
            spread[begin, 0, j] = 1.0
            spread[begin + 1 : end] = rows[:, j]
        return self.response[self.ends] @ spread.flatten(1)

    def solve_row(
        self, rows: Tensor, j: int, gram: Tensor, target: Tensor, near: Tensor | None = None, hold: float = 0.0
    ) -> Tensor:
        """Return the row of the gap after the j-th full step, (T, J), given the rows before it.

        `gram` is of all columns, (T J, T J), and `target` what the gap's end lacks, (T J,); those of later full steps
        do not matter. A gap that skips nothing, or whose steps move nothing, reuses. It may be held `near` other rows
        than reuse, (T, J, J), as the ridges do, by the share `hold`.
        """
        columns, moves, without = self.columns(j), self.moves(j), rows.clone()
        without[:, j] = self.reuse()[:, j]
        if abs(moves) < TINY:
            return without[:, j]
        if near is not None:
            without[:, j] = near[:, j]
        target = (target - gram @ self.ways(without)[j])[columns]
        gram = gram[columns][:, columns]
        sizes = gram.diagonal().view(self.kinds, -1).mean(1, keepdim=True) * self._held(near, hold)
        held = gram + torch.diag(sizes.expand(-1, len(columns) // self.kinds).flatten())
        found = torch.linalg.lstsq(held, target, driver="gelsd").solution / moves
        row = without[:, j].flatten()
        row[columns] += found
        return row.view(self.kinds, -1)

    def _held(self, near: Tensor | None, hold: float) -> Tensor:
        by = self.ridges if near is None else [hold] * self.kinds
        return torch.tensor(by, dtype=torch.float64)[:, None]

    def solve_rows(self, equations: Equations, near: Tensor | None = None, hold: float = 0.0) -> Tensor:
        """Return the rows of all gaps, (T, J, J), each given those before it."""
        rows = torch.zeros(self.kinds, len(self), len(self), dtype=torch.float64)
        for j in range(len(self)):
            rows[:, j] = self.solve_row(rows, j, equations.gram, equations.target[j], near, hold)
        return rows


def ends_of(full: Sequence[int], steps: int) -> list[int]:
    return [*full[1:], steps]


def _low(full: Sequence[int], j: int, begins: Sequence[int]) -> int:
    """Return the first full step since the history began, by its place."""
    begin = max((begin for begin in begins if begin <= full[j]), default=0)
    return next(k for k, step in enumerate(full) if step >= begin)


# --- schedules


class Algebra:
    """What the reference runs say of schedules: what rows solved on their outputs leave at the end."""

    def __init__(self, response: Tensor, gram: Tensor, calls: int, begins: Sequence[int] = (0,)):
        self.response, self.gram, self.calls, self.begins = response, gram, calls, begins
        self._gaps: dict[tuple, float] = {}

    def gap(self, past: tuple[int, ...], end: int) -> float:
        """Return the mean square that the best row leaves at the end of a gap, given the reference's outputs."""
        key = past, end
        if key not in self._gaps:
            moves = self.response[end].clone()
            moves[: past[-1] + 1] = 0
            moves[end:] = 0
            held = self.gram[list(past)][:, list(past)]
            held = held + RIDGE * held.diagonal().mean() * torch.eye(len(past), dtype=held.dtype)
            target = self.gram[list(past)] @ moves
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
            yield _with(full, begins)


def _with(full: Sequence[int], begins: Sequence[int]) -> tuple[int, ...]:
    """Put what has to be full in the place of what is nearest to it."""
    free = [step for step in full if step not in begins]
    for begin in sorted(set(begins) - set(full)):
        free.remove(min(free, key=lambda step: abs(step - begin)))
    return tuple(sorted({*free, *begins}))


def descend(
    full: tuple[int, ...], cost: Callable[[tuple[int, ...]], float], steps: int, begins: Sequence[int] = (0,)
) -> tuple[int, ...]:
    """Take every move that makes the cost smaller, until there is none."""
    best, improved = cost(full), True
    while improved:
        improved = False
        for moved in moves(full, steps, begins):
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
