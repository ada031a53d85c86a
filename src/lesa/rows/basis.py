"""What rows were solved on, as inner products: enough to solve them again, on another grid.

Rows are least squares over what a run combines: the outputs v_f of its full steps, and the latents x_0 that it began
with. In closed loop a full step sees latents that are off from the reference run's by d, which the rows before it
left, and it answers

    v_f = v_f(reference) + a_f d + u_f

with a_f the multiple of d that explains most, and u_f what is left of the answer. All d are sums of the reference run's
outputs, of x_0 and of the u before them, so inner products of these vectors say what rows are the best in closed loop,
and how far off they end, without a run: on the grid of the runs recorded, exactly.

On another grid the reference's outputs are interpolated in t. What is the k-th full step there answers like the k-th
recorded one: by a multiple of d that goes with 1 / t (a velocity is (x - data) / t), by u_f as far as its own d is the
recorded one, and by as much again in a direction of its own as far as it is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lesa.rows.gaps import TINY, Full, Gaps, descend
from lesa.rows.grid import in_words, times_in_order

POINTS = 4
"""Through how many recorded times next to it a polynomial gives the outputs at another time."""
MARGIN = 1e-4
"""How far beyond the recorded times another may lie."""
FEWEST = 0.4
"""How many steps a grid may have that rows are carried to, as a share of those recorded: 20 of 50."""

NONE = 1e-24
"""A drift of this mean square is none."""


class Outcome(NamedTuple):
    """Rows, (J, J + 1), and what they leave: the mean of |x - x_ref|^2 / |x_ref|^2 at the end, over the calls."""

    rows: Tensor
    left: float


@dataclass(frozen=True, eq=False)
class Basis:
    """The vectors that runs are made of, as inner products: means over calls, float64.

    The N = S + 1 + J vectors are the outputs of the reference runs at all S steps, the first latents, and the u_f of
    the J full steps. `times` are the S + 1 of the grid, and `full_times` those of the full steps recorded. Rows have a
    term in the first latents if they have `latents`.
    """

    times: Tensor
    full_times: Tensor
    gram: Tensor
    """(N, N), relative to the size of the last latents."""
    answers: Tensor
    """(J,): a_f."""
    shares: Tensor
    """(J, N): of each vector the part that is like the recorded drift before a full step, which has itself once."""
    sizes: Tensor
    """(J,): the mean squares of these drifts."""
    latents: bool

    @classmethod
    def of(cls, times: Tensor, gram: Tensor, answers: Tensor, gaps: Gaps, rows: Tensor) -> Basis:
        """Make a basis of the inner products of reference runs and of runs with these rows, (J, J + 1)."""
        drifts = _drifts(gaps, rows, answers)
        products = drifts @ gram
        sizes = (products * drifts).sum(1)
        shares = torch.where(sizes[:, None] > NONE, products / sizes.clamp_min(NONE)[:, None], 0.0)
        return cls(times, times[list(gaps.full)], gram, answers, shares, sizes, gaps.latents)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def nearest(self) -> Full:
        """Return the steps whose times are nearest to those of the full steps recorded."""
        count, full = len(self.full_times), [0]
        for k, time in enumerate(self.full_times[1:], 1):
            step = int((self.times[:-1] - time).abs().argmin())
            full.append(min(max(step, full[-1] + 1), self.steps - count + k))
        return tuple(full)

    def at(self, times: Tensor, known: Tensor | None = None) -> Basis:
        """Return the basis of runs on another grid, (S' + 1,).

        What is `known` there are inner products of reference runs' outputs and their first latents, (S' + 1, S' + 1),
        means over calls: outputs have a part that changes from time to time, and is not between those recorded.

        Raises: ValueError, with the reason, if what was recorded does not say what runs there are made of.
        """
        check_reach(self.times, times)
        if len(times) <= len(self.full_times):
            raise ValueError(
                f"rows of {len(self.full_times)} full steps are carried to runs of as many steps or more, got "
                f"{len(times) - 1}; calibrate fewer full steps for them."
            )
        others = torch.eye(1 + len(self.answers), dtype=torch.float64)
        ways = torch.block_diag(interpolation(self.times[:-1], times[:-1]), others)
        gram = ways @ self.gram @ ways.T
        if known is not None:
            gram[: len(times), : len(times)] = known
        return replace(self, times=times, gram=gram, shares=self.shares @ ways.T)

    def solve(self, response: Tensor, full: Full) -> Outcome:
        """Solve for the rows of these full steps, J of them, as a run of a sampler with this response comes to them."""
        return _Walk(self, response, full).end()

    def left(self, response: Tensor, full: Full, rows: Tensor) -> float:
        """Return what these rows leave instead, as `Outcome` has it."""
        return _Walk(self, response, full).end(rows).left

    def search(self, response: Tensor, allowed: Callable[[Full], bool] | None = None) -> Full:
        """Return the full steps, as many as were recorded, whose rows leave the least, near those recorded; on the way
        there all schedules are `allowed`."""
        return descend(self.nearest, lambda full: self.solve(response, full).left, self.steps, allowed=allowed)


class _Walk:
    """A run that comes to its full steps one by one, each a sum of a basis's vectors, and of J of its own."""

    def __init__(self, basis: Basis, response: Tensor, full: Full):
        self._basis, self._full = basis, full
        self._gaps = Gaps(response, full, latents=basis.latents)
        vectors, count = len(basis.gram), len(full)
        self._gram = torch.block_diag(basis.gram, basis.gram.new_zeros(count, count))
        self._wanted = response.new_zeros(len(response), vectors + count)
        self._wanted[:, : response.shape[1]] = response
        self._columns = response.new_zeros(vectors + count, count + 1)
        self._columns[basis.steps, count] = 1.0

    def end(self, rows: Tensor | None = None) -> Outcome:
        """Go with these rows to the end, or with those that are the best at each full step."""
        gaps, given = self._gaps, rows is not None
        rows = gaps.reuse() if rows is None else rows
        for j, step in enumerate(self._full):
            self._columns[step, j] = 1.0
            if j:
                self._answer(j, self._columns @ gaps.way(rows, j - 1) - self._wanted[step])
            if not given:
                products = self._gram @ self._columns
                target = self._wanted[gaps.ends[j]] @ products
                rows[j] = gaps.solve_row(rows, j, self._columns.T @ products, target)
        return Outcome(rows, self._size(self._columns @ gaps.way(rows, len(rows) - 1) - self._wanted[-1]))

    def _answer(self, j: int, drift: Tensor) -> None:
        """Add to the output of a full step what it answers to a drift."""
        basis, (unlike, own) = self._basis, (self._basis.steps + 1 + j, len(self._basis.gram) + j)
        nearer = float(basis.full_times[j] / basis.times[self._full[j]].clamp_min(TINY))
        share, size = float(basis.shares[j] @ drift[: len(basis.gram)]), float(basis.sizes[j])
        rest = max(self._size(drift) - share**2 * size, 0.0)
        self._columns[:, j] += nearer * basis.answers[j] * drift
        self._columns[unlike, j] += nearer * share
        self._columns[own, j] = nearer * math.sqrt(rest / size) if size > NONE else 0.0
        self._gram[own, own] = basis.gram[unlike, unlike]

    def _size(self, drift: Tensor) -> float:
        return max(float(drift @ self._gram @ drift), 0.0)


def _drifts(gaps: Gaps, rows: Tensor, answers: Tensor) -> Tensor:
    """Return the drifts before the full steps of runs with these rows as sums of a basis's vectors, (J, N)."""
    steps, count = gaps.response.shape[1], len(gaps)
    columns, drifts = rows.new_zeros(steps + 1 + count, count + 1), rows.new_zeros(count, steps + 1 + count)
    columns[steps, count] = 1.0
    for j, step in enumerate(gaps.full):
        columns[step, j] = 1.0
        if j:
            drifts[j] = columns @ gaps.way(rows, j - 1)
            drifts[j, :steps] -= gaps.response[step]
            columns[:, j] += answers[j] * drifts[j]
            columns[steps + 1 + j, j] += 1.0
    return drifts


def check_reach(recorded: Tensor, times: Tensor) -> None:
    """Raise ValueError, with the reason, unless what was recorded on one grid says what outputs are on another."""
    for some in (recorded, times):
        if (times_in_order(some).diff() >= 0).any():
            raise ValueError(f"rows are carried between grids whose times fall at every step, got {in_words(some)}.")
    within = float(recorded[:-1].min()) - MARGIN, float(recorded.max()) + MARGIN
    if not (within[0] <= float(times[:-1].min()) and float(times.max()) <= within[1]):
        raise ValueError(
            f"rows are carried to times from {within[1] - MARGIN:.4f} to {within[0] + MARGIN:.4f}, where they were "
            f"recorded, got {float(times.max()):.4f} to {float(times[:-1].min()):.4f}; calibrate with more steps."
        )
    if len(times) - 1 < FEWEST * (len(recorded) - 1):
        raise ValueError(
            f"rows of {len(recorded) - 1} steps are carried to {FEWEST:.0%} of these or more, got {len(times) - 1}; "
            "calibrate with as many."
        )


def interpolation(known: Tensor, times: Tensor) -> Tensor:
    """Return the weights of what is known at falling times for other times, (other, known): a polynomial each, through
    the nearest `POINTS` of them."""
    weights = known.new_zeros(len(times), len(known))
    for row, time in zip(weights, times, strict=True):
        near = (known - time).abs().argsort(stable=True)[:POINTS].sort().values
        for k in near:
            others = known[near[near != k]]
            row[k] = ((time - others) / (known[k] - others)).prod()
    return weights
