"""Gaps between full steps, as algebra: the least squares of their rows, and what a schedule leaves at the end."""

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
    """Weighted sums over calls: of the outputs' inner products, and of those with what each gap's end lacks."""

    gram: Tensor
    """(J, J)"""
    target: Tensor
    """(J, J): end of gap, output"""


def ends_of(full: Sequence[int], steps: int) -> list[int]:
    return [*full[1:], steps]


def ways(response: Tensor, full: Sequence[int], rows: Tensor) -> Tensor:
    """Return how the latents at the end of each gap depend on the full steps' outputs, (J, J), with these rows."""
    spread = torch.zeros(response.shape[1], len(full), dtype=response.dtype)
    for j, (begin, end) in enumerate(pairwise([*full, response.shape[1]])):
        spread[begin, j] = 1.0
        spread[begin + 1 : end] = rows[j]
    return response[ends_of(full, response.shape[1])] @ spread


def solve_row(
    response: Tensor, full: Sequence[int], rows: Tensor, j: int, gram: Tensor, target: Tensor, ridge: float = RIDGE
) -> Tensor:
    """Return the row of the gap after the j-th full step, (j + 1,), given the rows before it.

    `gram` is of the outputs up to there at least, (j + 1, j + 1), and `target` what the gap's end lacks, (j + 1,). A
    gap that skips nothing, or whose steps move nothing, reuses.
    """
    count = j + 1
    reuse = torch.zeros(count, dtype=gram.dtype)
    reuse[-1] = 1.0
    begin, end = full[j], ends_of(full, response.shape[1])[j]
    moves = float(response[end, begin + 1 : end].sum())
    if abs(moves) < TINY:
        return reuse
    without = rows.clone()
    without[j] = torch.cat([reuse, reuse.new_zeros(len(rows) - count)])
    given = ways(response, full, without)[j, :count]
    gram, target = gram[:count, :count], target[:count]
    held = gram + ridge * gram.diagonal().mean() * torch.eye(count, dtype=gram.dtype)
    return reuse + torch.linalg.lstsq(held, target - gram @ given, driver="gelsd").solution / moves


def solve_rows(response: Tensor, full: Sequence[int], equations: Equations, ridge: float = RIDGE) -> Tensor:
    """Return the rows of all gaps, (J, J), each given those before it."""
    rows = torch.zeros(len(full), len(full), dtype=torch.float64)
    for j in range(len(full)):
        gram, target = equations.gram, equations.target[j]
        rows[j, : j + 1] = solve_row(response, full, rows, j, gram, target, ridge)
    return rows


# --- rounds


class Algebra:
    """What the reference runs say of schedules: what rows solved on their outputs leave at the end."""

    def __init__(self, response: Tensor, outputs: Tensor, weights: Tensor):
        self.response, self.gram = response, (weights[:, None, None] * (outputs @ outputs.mT)).sum(0)
        self.calls = len(weights)
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
        return sum(self.gap(tuple(full[: j + 1]), end) * (end / steps) ** forgiveness for j, end in enumerate(ends))

    def best(self, budget: int, forgiveness: float) -> tuple[int, ...]:
        """Return the best schedule found from several starts."""
        cost = partial(self.cost, forgiveness=forgiveness)
        steps = self.response.shape[1]
        return min({descend(start, cost, steps) for start in spreads(steps, budget)}, key=cost)


def spreads(steps: int, budget: int) -> Iterator[tuple[int, ...]]:
    """Spread full steps evenly, and more and more towards the run's end or its beginning."""
    if budget == 1:
        yield (0,)
        return
    places = torch.linspace(0, 1, budget, dtype=torch.float64)
    for bend in (1.0, 1.5, 2.2, 3.0):
        for some in (1 - (1 - places) ** bend, places**bend):
            full = (some * (steps - 1)).round().int().tolist()
            for k in range(1, budget):
                full[k] = min(max(full[k], full[k - 1] + 1), steps - budget + k)
            yield tuple(full)


def descend(full: tuple[int, ...], cost: Callable[[tuple[int, ...]], float], steps: int) -> tuple[int, ...]:
    """Take every move that makes the cost smaller, until there is none."""
    best, improved = cost(full), True
    while improved:
        improved = False
        for moved in moves(full, steps):
            if (found := cost(moved)) < best - TINY:
                full, best, improved = moved, found, True
                break
    return full


def moves(full: tuple[int, ...], steps: int) -> Iterator[tuple[int, ...]]:
    """Yield the schedules with one full step elsewhere, or with several that follow each other moved together, the
    nearest first; the first one stays."""
    count = len(full)
    for distance in (1, 2, 4, 8, 16):
        for length in range(1, count if distance <= 2 else 2):
            for k in range(1, count - length + 1):
                for way in (distance, -distance):
                    kept = full[:k], full[k + length :]
                    moved = sorted({*kept[0], *(step + way for step in full[k : k + length]), *kept[1]})
                    if len(moved) == count and moved[1] > 0 and moved[-1] < steps:
                        yield tuple(moved)
