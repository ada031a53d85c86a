"""Search which steps are full, for solved rows: by algebra on the reference runs first, then on real runs.

Of the reference runs alone algebra does not know how the denoiser answers what rows leave, but for one number that says
how much less early errors count. Its best schedules, for several such numbers, are run. What the best real runs say of
these answers is the closed loop as algebra (`lesa.rows.basis`): the search goes on to the schedule that is best by it,
which is run, and says more, as long as that is better. At last real runs try schedules near the best one, in the order
of what that algebra, or where there is none the first one, has against them.

What real runs say is a score of last latents and pictures. Algebra knows of latents alone, and of these a last step
that is full takes much that a decoder would not have shown: so the best schedule that ends the other way, on a full
step or on a forecast, is searched for, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor

from lesa.learn.bases import basis_of
from lesa.learn.solving import Found, Full, Problem
from lesa.rows.basis import Basis
from lesa.rows.gaps import Algebra, moves

FORGIVENESS = (0.0, 4.0, 8.0, 12.0, 16.0, 24.0)
"""By what powers of a run's share early errors may count less in the plans by algebra that real runs choose from."""
OF = "search"
TOGETHER, APART = 60, 12
"""How many schedules are tried at most, unless somebody says it, where calls go in one run and where they do not."""
TRIED_ON, TRIED_ON_APART = 8, 4
"""On how many calls schedules are tried; the best ones are run on all of them."""
FINALISTS, REFINED = 3, 2
"""How many of the best are run on all calls, and how many of these are refined."""
PATIENCE, PATIENCE_CLOSED = 16, 6
"""How many moves are tried before a schedule is the best one: in the order of the first algebra, and of the closed
loop's."""
NEAR = 0.1
"""By how much less than the best one, in dB, a schedule may promise to be refined, too."""
STARTS = 2
"""From how many schedules the search goes on, the best ones."""
OTHERWISE, BEHIND = 4, 4.0
"""One of how many schedules tried ends the other way, and by how many dB such a one may be behind before moves near it
are not tried."""

Real = Callable[[Full], float]
"""Says what a schedule scores in real runs, in dB."""
Allowed = Callable[[Full], bool]


class Searched(NamedTuple):
    """The best schedules, what the search began and ended with, in dB, and how many it tried."""

    best: list[Full]
    ways: list[tuple[Full, float]]
    tried: int


class Search:
    """Tries schedules of one problem by real runs, on a few of its calls, and remembers what they gave."""

    def __init__(self, problem: Problem):
        few = problem.first(TRIED_ON)
        self.problem, self._few = problem, few if few.goes_together else problem.first(TRIED_ON_APART)
        self.algebra = Algebra(problem.response, problem.gram, len(problem.weights), problem.begins, problem.latents)
        self.known: dict[Full, float] = {}
        """The scores of schedules that were tried."""
        self._drifts: dict[Full, float] = {}
        self._runs: dict[Full, Found] = {}  # of the best schedules of the present budget, and of the newest

    def best(self, budget: int, most: int | None = None, starts: Sequence[Full] = ()) -> Searched:
        """Return the best schedules found of so many full steps, the best one first, with at most so many tried.

        The search goes on from the two best of what algebra begins with and of other `starts`. What it ends with is
        chosen on all calls. Where calls go one by one the best schedule is alone.

        Raises: ValueError if there are fewer steps, or more that have to be full.
        """
        self.problem.check_budget(budget)
        before, usual = len(self.known), TOGETHER if self._few.goes_together else APART
        most, self._runs = usual if most is None else most, {}
        room = most - most // OTHERWISE

        def real(full: Full) -> float:
            if full not in self.known:
                if len(self.known) - before >= room:
                    return math.inf
                found = self._few.tried(full, OF, draw=True)
                self.known[full], self._drifts[full] = found.score, found.drift
                best = sorted(self._runs, key=self.known.__getitem__)[:STARTS]
                self._runs = {**{one: self._runs[one] for one in best}, full: found}
            return self.known[full]

        found = {self.algebra.best(budget, forgiveness): forgiveness for forgiveness in FORGIVENESS}
        best = found[min(sorted(found), key=real)]
        found = {**dict.fromkeys(starts, best), **found}
        first, *others = sorted(sorted(found), key=real)[:STARTS]
        ends = [self._go_on(one, real, found[one]) for one in (first, *others)]
        room = most
        ends += self._otherwise(min(ends, key=real), real, found[first])
        best = self._chosen({first, *ends})
        ways = [(full, self._drifts.get(full, math.inf)) for full in (first, best[0][0])]
        near = best[0][1] + (NEAR if self._few.goes_together else 0.0)
        kept = [full for full, drift in best[:REFINED] if full == best[0][0] or drift < near]
        return Searched(kept, ways, len(self.known) - before)

    def _go_on(self, full: Full, real: Real, forgiveness: float, allowed: Allowed | None = None) -> Full:
        """Go on from a schedule, over those that are allowed, as long as real runs are better.

        The next one is what the closed loop's algebra says is best, or else the first move that is better.
        """
        while True:
            basis = basis_of(self._few, self._runs.get(full) or self._few.tried(full, OF))
            better = full if basis is None else basis.search(self.problem.response, allowed)
            if better == full or not real(better) < real(full):
                better = self._moved(full, basis, real, forgiveness, allowed)
            if better is None:
                return full
            full = better

    def _moved(
        self, full: Full, basis: Basis | None, real: Real, forgiveness: float, allowed: Allowed | None
    ) -> Full | None:
        """Return the first move that is better in real runs, in the order of what algebra has against it."""
        if basis is None:
            cost, patience = partial(self.algebra.cost, forgiveness=forgiveness), PATIENCE
        else:
            cost, patience = partial(_left, basis, self.problem.response), PATIENCE_CLOSED
        around = set(filter(allowed, moves(full, self.problem.ticks, self.problem.begins))) - set(self.known)
        return next((one for one in sorted(around, key=cost)[:patience] if real(one) < real(full)), None)

    def _chosen(self, ends: set[Full]) -> list[tuple[Full, float]]:
        """Return the best on all calls of these schedules and of the best others tried of so many full steps."""
        count = len(next(iter(ends)))
        tried = sorted((full for full in self.known if len(full) == count), key=lambda full: self.known[full])
        finalists = tried[:FINALISTS] or sorted(ends)
        if self._few is self.problem:
            return [(full, self.known.get(full, math.inf)) for full in finalists]
        found = {full: self.problem.tried(full, OF, draw=True) for full in finalists}
        self._drifts |= {full: one.drift for full, one in found.items()}
        return sorted(((full, one.score) for full, one in found.items()), key=lambda one: one[1])

    def _otherwise(self, best: Full, real: Real, forgiveness: float) -> list[Full]:
        """Return the best schedule found that ends the other way, if there is one."""
        ticks, begins = self.problem.ticks, self.problem.begins
        start = ending(best, ticks, begins, best[-1] < ticks - 1)
        if start is None or not real(start) < real(best) + 2 * BEHIND:
            return []
        end = self._go_on(start, real, forgiveness, partial(_alike, ticks - 1, start))
        return [end] if real(end) < real(best) + BEHIND else []


def _alike(last: int, one: Full, other: Full) -> bool:
    """Tell whether the last step is full in both schedules, or in none."""
    return (one[-1] == last) == (other[-1] == last)


def _left(basis: Basis, response: Tensor, full: Full) -> float:
    return basis.solve(response, full).left


def ending(full: Full, steps: int, begins: Sequence[int], on_full: bool) -> Full | None:
    """Return a schedule with its last step full, or skipped, and the others as near as there is room for; None if there
    is no such one."""
    last = steps - 1 if on_full else steps - 2
    moved = list(full)
    moved[-1] = last
    for k in range(len(moved) - 2, -1, -1):
        moved[k] = min(moved[k], moved[k + 1] - 1)
    return tuple(moved) if moved[0] == 0 and set(begins) <= set(moved) else None


def without_one(full: Full, begins: Sequence[int] = (0,)) -> list[Full]:
    """Return what a schedule leaves with one of its full steps removed, each in turn; those of `begins` stay."""
    return [tuple(k for k in full if k != step) for step in full if step not in begins]
