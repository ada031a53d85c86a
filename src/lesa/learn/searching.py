"""Search which steps are full, for solved rows: by algebra on the reference runs first, then by real runs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lesa.learn.gaps import Algebra, descend
from lesa.learn.solving import Full, Problem

FORGIVENESS = (0.0, 4.0, 8.0, 16.0, 24.0)
"""By what powers of a run's share early errors may count less in the plans by algebra that real runs choose from."""
OF = "search"


class Search:
    """Tries schedules of one problem by real runs, and remembers what they gave."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.algebra = Algebra(problem.response, problem.gram, len(problem.weights), problem.begins)
        self.known: dict[Full, float] = {}

    def best(self, budget: int, most: int, starts: Sequence[Full] = ()) -> tuple[Full, list[tuple[Full, float]], int]:
        """Return the best schedule of so many full steps; what the search began and ended with; how many it tried.

        Besides what algebra begins with there may be other `starts`. At most so many are tried.

        Raises: ValueError if there are fewer steps, or more that have to be full.
        """
        ticks, begins = self.problem.ticks, self.problem.begins
        if not len(begins) <= budget <= ticks:
            raise ValueError(f"a budget is from {len(begins)} to {ticks} full steps, got {budget}; change it.")
        before = len(self.known)

        def real(full: Full) -> float:
            if full not in self.known:
                if len(self.known) - before >= most:
                    return math.inf
                self.known[full] = self._tried(full)
            return self.known[full]

        found = {*starts, *(self.algebra.best(budget, forgiveness) for forgiveness in FORGIVENESS)}
        start = min(sorted(found), key=real)
        best = descend(start, real, ticks, begins)
        return best, [(start, real(start)), (best, real(best))], len(self.known) - before

    def _tried(self, full: Full) -> float:
        if self.problem.goes_together:
            return self.problem.lockstep(full, OF).drift
        return self.problem.rounds(full, 2, OF)[0].drift


def without_one(full: Full, begins: Sequence[int] = (0,)) -> list[Full]:
    """Return what a schedule leaves with one of its full steps removed, each in turn; those of `begins` stay."""
    return [tuple(k for k in full if k != step) for step in full if step not in begins]
