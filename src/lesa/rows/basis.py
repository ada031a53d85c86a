"""What rows were solved on, as inner products: enough to solve them again, on another grid.

Rows are least squares over what a run combines: the outputs v_f of its full steps, and the latents x_0 that it began
with. In closed loop a full step sees latents that are off from the reference run's by d, which the rows before it
left, and it answers

    v_f = v_f(reference) + a_f d + u_f

with a_f the multiple of d that explains most, and u_f what is left of the answer. All d are sums of the reference run's
outputs, of x_0 and of the u before them, so inner products of these vectors say what rows are the best in closed loop,
and how far off they end, without a run: on the grid of the runs recorded with the rows recorded, exactly.

With other rows, or on another grid, drifts are others. A denoiser answers any drift by a linear map of it, of which
the recorded u_f are a few values: the map's other values are taken to be random, alike in size, so that answers have
the angles of the drifts that they answer. What is known of such a map at some drifts says the expected answer to
others, and how much of it is unknown (a Gaussian process over maps). From time to time the map changes: its covariance
is `alike` there. The multiple a and the size of u in proportion to d go with 1 / t, as a velocity is (x - data) / t, by
factors that are interpolated in t. The reference's outputs at other times are those of `lesa.rows.between`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lesa.rows.between import between, linear
from lesa.rows.gaps import TINY, Full, Gaps, descend
from lesa.rows.grid import in_words, times_in_order

MARGIN = 1e-4
"""How far beyond the recorded times another may lie."""
FEWEST = 0.4
"""How many steps a grid may have that rows are carried to, as a share of those recorded: 20 of 50."""

NONE = 1e-24
"""A drift of this mean square is none."""
SINGULAR = 1e-10
"""What share of the largest an eigenvalue of the recorded drifts' inner products is no direction of its own."""
FORGETS = 0.25
"""By what power of the ratio of two times a denoiser's answers to one drift are alike."""


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
    products: Tensor
    """(J, N): of the recorded drifts before full steps with the vectors."""
    drifts: Tensor
    """(J, J): of these drifts."""
    latents: bool

    @classmethod
    def of(cls, times: Tensor, gram: Tensor, answers: Tensor, gaps: Gaps, rows: Tensor) -> Basis:
        """Make a basis of the inner products of reference runs and of runs with these rows, (J, J + 1)."""
        drifts = _drifts(gaps, rows, answers)
        products = drifts @ gram
        return cls(times, times[list(gaps.full)], gram, answers, products, products @ drifts.T, gaps.latents)

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

    def at(self, times: Tensor, known: Tensor | None = None, embedded: Tensor | None = None) -> Basis:
        """Return the basis of runs on another grid, (S' + 1,).

        What is `known` there are inner products of reference runs' outputs and their first latents, (S' + 1, S' + 1),
        means over calls. Else it helps to know what the denoiser makes of the steps' times, here and there, its
        `embedded` (S + S', numbers): outputs have a part that is rough in t, and not between those recorded.

        Raises: ValueError, with the reason, if what was recorded does not say what runs there are made of.
        """
        check_reach(self.times, times)
        if len(times) <= len(self.full_times):
            raise ValueError(
                f"rows of {len(self.full_times)} full steps are carried to runs of as many steps or more, got "
                f"{len(times) - 1}; calibrate fewer full steps for them."
            )
        steps, others = len(times) - 1, torch.eye(1 + len(self.answers), dtype=torch.float64)
        ways, rest = between(self.gram[: self.steps, : self.steps], self.times[:-1], times[:-1], embedded)
        ways = torch.block_diag(ways, others)
        gram = ways @ self.gram @ ways.T
        gram[:steps, :steps] += rest
        if known is not None:
            gram[: steps + 1, : steps + 1] = known
        return replace(self, times=times, gram=gram, products=self.products @ ways.T)

    def solve(self, response: Tensor, full: Full) -> Outcome:
        """Solve for the rows of these full steps, J of them, as a run of a sampler with this response comes to them."""
        return _Walk(self, response, full).end()

    def left(self, response: Tensor, full: Full, rows: Tensor) -> float:
        """Return what these rows leave instead, as `Outcome` has it."""
        return _Walk(self, response, full).end(rows).left

    def search(
        self, response: Tensor, allowed: Callable[[Full], bool] | None = None, starts: Sequence[Full] = ()
    ) -> Full:
        """Return the full steps, as many as were recorded, whose rows leave the least, near those recorded or near
        other `starts`; on the way there all schedules are `allowed`."""

        def left(full: Full) -> float:
            return self.solve(response, full).left

        ends = {descend(full, left, self.steps, allowed=allowed) for full in (self.nearest, *starts)}
        return min(sorted(ends), key=left)


class _Answers:
    """What the full steps of a run answer to drifts, given what recorded ones did: by `multiples` of the drift, (J,),
    and by a random linear map of it, whose values are `sizes` as large, (J,)."""

    def __init__(self, basis: Basis, full: Full):
        recorded, times = basis.full_times.clamp_min(TINY), basis.times[list(full)].clamp_min(TINY)
        squares, unlike = basis.drifts.diagonal(), basis.gram.diagonal()[basis.steps + 1 :]
        self._known = squares > NONE
        sizes = torch.where(self._known, unlike / squares.clamp_min(NONE), 0.0).clamp_min(0).sqrt()
        self._values = torch.where(sizes > 0, 1 / sizes.clamp_min(NONE), 0.0)
        self.multiples, self.sizes = torch.zeros_like(times), torch.zeros_like(times)
        if self._known.any():
            at, rates = recorded[self._known], (torch.stack([basis.answers, sizes]) * recorded)[:, self._known]
            self.multiples, self.sizes = (linear(times, at, rate) / times for rate in rates)
        known = (self._known[:, None] & self._known) * alike(recorded, recorded) * basis.drifts
        self._inverse = torch.linalg.pinv(known, rtol=SINGULAR, hermitian=True)
        self._then, self._alike = alike(times, recorded), alike(times, times)
        self._seen = torch.zeros_like(self._then)

    def of(self, j: int, products: Tensor, drifts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the map's value at the drift before the j-th full step: how much of each recorded u it has, and inner
        products of what is unknown of it with that of the values so far, (j + 1,).

        `products` are those of the drift with the recorded ones, (J,), and `drifts` with those so far, (j + 1,).
        """
        self._seen[j] = self._then[j] * products * self._known
        parts = self._inverse @ self._seen[j]
        unknown = self._alike[j, : j + 1] * drifts - self._seen[: j + 1] @ parts
        unknown[j].clamp_(min=0)
        return parts * self._values, unknown


class _Walk:
    """A run that comes to its full steps one by one, each a sum of a basis's vectors, and of J of its own: of what is
    unknown of each full step's answer."""

    def __init__(self, basis: Basis, response: Tensor, full: Full):
        self._basis, self._full, self._answers = basis, full, _Answers(basis, full)
        self._gaps = Gaps(response, full, latents=basis.latents)
        vectors, count = len(basis.gram), len(full)
        self._gram = torch.block_diag(basis.gram, basis.gram.new_zeros(count, count))
        self._wanted = response.new_zeros(len(response), vectors + count)
        self._wanted[:, : response.shape[1]] = response
        self._columns = response.new_zeros(vectors + count, count + 1)
        self._columns[basis.steps, count] = 1.0
        self._drifts = response.new_zeros(count, vectors + count)

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
        drift = self._columns @ gaps.way(rows, len(rows) - 1) - self._wanted[-1]
        return Outcome(rows, max(float(drift @ self._gram @ drift), 0.0))

    def _answer(self, j: int, drift: Tensor) -> None:
        """Add to the output of a full step what it answers to a drift."""
        answers, vectors = self._answers, len(self._basis.gram)
        self._drifts[j] = drift
        so_far = self._drifts[: j + 1] @ (self._gram @ drift)
        parts, unknown = answers.of(j, self._basis.products @ drift[:vectors], so_far)
        own = vectors + j
        self._gram[own, vectors : own + 1] = self._gram[vectors : own + 1, own] = unknown
        self._columns[:, j] += answers.multiples[j] * drift
        self._columns[self._basis.steps + 1 : vectors, j] += answers.sizes[j] * parts
        self._columns[own, j] = answers.sizes[j]


def alike(times: Tensor, others: Tensor) -> Tensor:
    """Return how much alike a denoiser's answers to one drift are at positive times and at others, (times, others)."""
    return (torch.minimum(times[:, None], others) / torch.maximum(times[:, None], others)) ** FORGETS


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
