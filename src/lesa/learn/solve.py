"""Solve for rows in closed form, gap by gap in closed loop, on a few calls of a pipeline.

With full steps f_1 .. f_J, and f_{J+1} the end, let the steps skipped between f_j and f_{j+1} share a row c_j over the
outputs v_k of f_1 .. f_j and, with k = 0, the latents v_0 that the run began with. A sampler is affine, so in a run the
latents at f_{j+1} are affine in c_j:

    x_{f_{j+1}} = (what the rows before give) + g_j sum_{k <= j} c_jk v_k,  g_j = sum of dx_{f_{j+1}} / dv_s there

and least squares over all calls finds the c_j that bring them nearest to the reference runs' latents there. In closed
loop the outputs depend on the rows before: either the calls go in one run of the pipeline, whose gaps are solved as it
comes to them (`Problem.lockstep`), or in rounds: all gaps are solved on the outputs that the last real run gave, and
the calls are run again. Row j is then exact after round j + 1. All that is learned passes at the sampler, after
guidance.

What is greedy gap by gap is then refined on the end of the run: the derivatives of the last latents by the
J (J + 3) / 2 numbers are differences of real runs, and Gauss-Newton steps are taken only where real runs end nearer.

Which steps are full is found the same way: by algebra on the reference runs first, then by real runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from lesa.host.embedding import embedding_of
from lesa.host.runtime import denoisers_of
from lesa.learn.bases import basis_of
from lesa.learn.calls import Call
from lesa.learn.references import BATCH, Counts, OnRun
from lesa.learn.refining import refined
from lesa.learn.searching import Search, without_one
from lesa.learn.solving import Found, Full, Problem
from lesa.predictors.solved import Solved
from lesa.rows.grid import matches
from lesa.rows.schedule import Schedule


@dataclass
class Report:
    """What solving took and gave.

    Drifts are means over the calls in dB: after each round, of reuse on the same schedule, after each refinement, and
    of the schedules that the search began and ended with. Transformer runs are those of one picture and stream, and
    `counts` says what they were made for; the reference runs are in it, which a solver makes once.
    """

    rounds: list[float] = field(default_factory=list)
    reuse: float = math.nan
    refined: list[float] = field(default_factory=list)
    searched: list[tuple[tuple[int, ...], float]] = field(default_factory=list)
    tried: int = 0
    drift: float = math.nan
    counts: Counts = field(default_factory=Counts)
    seconds: float = 0.0

    @property
    def transformer_runs(self) -> int:
        return self.counts.total

    @property
    def reference_runs(self) -> int:
        return self.counts.reference

    def __str__(self) -> str:
        parts = [f"rounds {_words(self.rounds)} dB (reuse {self.reuse:.2f})"]
        parts += [f"refined {_words(self.refined)} dB"] if self.refined else []
        parts += [f"{self.tried} schedules tried"] if self.tried else []
        split = ", ".join(f"{count} {name}" for name, count in vars(self.counts).items() if count)
        return ", ".join([*parts, f"{self.transformer_runs} transformer runs ({split})", f"{self.seconds:.1f} s"])


class Solution(NamedTuple):
    """Solved rows, and what it took to find them."""

    predictor: Solved
    report: Report


class Solver(Problem):
    """Solves for the rows of a pipeline at its output, on some calls of it, for any number of budgets.

        solver = Solver(pipe, prompts[:8], range(8), dict(num_inference_steps=50))
        for predictor, report in solver.curve([8, 6, 5, 4]):
            print(predictor, solver.drift_of(predictor), report)

    The reference runs are made at once, and only once. Calls are as `References` takes them, and the runs of any
    forecaster on them can be measured as there. `counts` are of all transformer runs made so far.
    """

    def __init__(
        self,
        pipe: Any,
        calls: Sequence[Call],
        seeds: Sequence[int],
        call: Mapping[str, Any] | None = None,
        *,
        batch_size: int = BATCH,
        pictures: bool = False,
        on_run: OnRun | None = None,
    ):
        began = time.perf_counter()
        super().__init__(pipe, calls, seeds, call, batch_size=batch_size, pictures=pictures, on_run=on_run)
        self._search = Search(self)
        self.seconds = time.perf_counter() - began
        """What the reference runs took."""

    def solve(
        self,
        budget: int | None = None,
        schedule: Schedule | None = None,
        *,
        rounds: int = 6,
        refine: int = 2,
        most: int | None = None,
        near: Sequence[Solved | Schedule] = (),
    ) -> Solution:
        """Solve for the rows of a schedule; with a `budget`, of the best schedule of so many full steps.

        The schedule is searched for with real runs of `most` schedules at most (of 60, or of 12 where calls are run one
        by one), also from those that are `near`: predictors or schedules of so many full steps, or of one more. Where
        one of them is a predictor of so many for other times, whose rows may be carried here, no schedule is tried: its
        algebra on the reference runs here says which steps are full.
        `rounds` is how many real runs of the calls follow each other at most, `refine` how many Gauss-Newton steps are
        taken on the end of the runs.

        Raises: ValueError if not one of budget and schedule is given, or it does not fit.
        """
        if (budget is None) == (schedule is None):
            raise ValueError("rows are solved for a schedule, or a budget of full steps to find one; pass one of them.")
        began, before, report = time.perf_counter(), copy(self.counts), Report()
        elsewhere = self._elsewhere(budget or 0, near)
        if elsewhere is not None:
            fulls = [elsewhere]
        elif schedule is None:
            starts = self._starts(budget or 0, near)
            fulls, report.searched, report.tried = self._search.best(budget or 0, most, starts)
        else:
            fulls = [self._of(schedule)]
            self.check_full(fulls[0])
        (solved, found, report), *others = (self._found(one, rounds, refine, report) for one in fulls)
        if others:
            solved, found, report = min([(solved, found, report), *others], key=lambda one: self._score(one[1]))
        report.drift, report.seconds = found.drift, time.perf_counter() - began
        report.counts = self.counts - before
        report.counts.reference = self.counts.reference
        taken = dict(drift=found.drift, transformer_runs=report.counts.total)  # whatever was solved for before
        return Solution(self.predictor(found.full, found.rows, basis_of(self, solved), **taken), report)

    def _score(self, found: Found) -> float:
        return self.run_rows(found.full, found.rows, of="search", draw=True).score if self.pictures else found.score

    def curve(self, budgets: Sequence[int], **options: Any) -> Iterator[Solution]:
        """Solve for several budgets, from high to low: each search begins, too, near the schedule found before.

        Options are those of `solve`.
        """
        last: list[Solved] = []
        for budget in sorted(set(budgets), reverse=True):
            found = self.solve(budget, near=last, **options)
            yield found
            last = [found.predictor]

    def _of(self, schedule: Schedule) -> Full:
        return tuple(step - self.start for step in schedule.full_steps(self.steps, self.start))

    def _elsewhere(self, budget: int, near: Sequence[Solved | Schedule]) -> Full | None:
        """Return the full steps that the algebra of a predictor for other times says are the best here, if there is one
        of so many whose rows may be carried here."""
        for one in near:
            if isinstance(one, Solved) and one.basis and len(one.full) == budget and not matches(one.grid, self.times):
                try:
                    return self._best_by(one)
                except ValueError:
                    continue
        return None

    def _best_by(self, one: Solved) -> Full:
        """Return the full steps that the algebra of a predictor for other times says are the best here, near those of
        its own or near what it would have said without reference runs.

        Raises: ValueError if its rows may not be carried here.
        """
        denoisers = [getattr(self.pipe, name) for name in denoisers_of(self.pipe)]
        embed = embedding_of(denoisers, getattr(self.pipe, "scheduler", None), self.times.tolist())
        without = one.basis_at(self.times, embed=embed).search(self.response)
        known = one.basis_at(self.times, self.gram / len(self.weights), embed)
        return known.search(self.response, starts=[without])

    def _starts(self, budget: int, near: Sequence[Solved | Schedule]) -> list[Full]:
        """Return schedules of so many full steps: those that are near, or what they leave without some of their own."""
        here = [one for one in near if not isinstance(one, Solved) or matches(one.grid, self.times)]
        known = {self._of(one.schedule if isinstance(one, Solved) else one) for one in here}
        for full in known:
            self.check_full(full)
        while known and len(next(iter(known))) > budget:
            known = {full for one in known for full in without_one(one, self.begins)}
            known = set(sorted(known, key=self._search.algebra.cost)[:4])
        return [full for full in known if len(full) == budget]

    def _found(self, full: Full, rounds: int, refine: int, searched: Report) -> tuple[Found, Found, Report]:
        """Find the rows of a schedule, and report it beside what was searched; returns them as solved, and refined."""
        report = replace(searched, refined=[])
        found, report.rounds = self.rounds(full, rounds)
        reuse = self.reuse(full)
        report.reuse = reuse.drift
        if reuse.drift < found.drift:  # what is best gap by gap may not be best at the end
            found = reuse
        steps = [found, *refined(self, found, refine)]
        report.refined = [one.drift for one in steps[1:]]
        return found, steps[-1], report


def solve(
    pipe: Any,
    calls: Sequence[Call],
    seeds: Sequence[int],
    *,
    budget: int | None = None,
    schedule: Schedule | None = None,
    rounds: int = 6,
    refine: int = 2,
    most: int | None = None,
    batch_size: int = BATCH,
    **call: Any,
) -> Solution:
    """Solve for the rows of a pipeline at its output, on some calls of it, each with the seed beside it.

        predictor, report = solve(pipe, prompts[:8], range(8), budget=5)

    `calls` are prompts, or the arguments of calls by name; other arguments go to every call. Name the full steps with
    a `schedule`, or how many there are with a `budget` (see `Solver.solve`).

    Raises: ValueError as `Solver` and its `solve` do.
    """
    if (budget is None) == (schedule is None):
        raise ValueError("rows are solved for a schedule, or a budget of full steps to find one; pass one of them.")
    solver = Solver(pipe, calls, seeds, call, batch_size=batch_size)
    predictor, report = solver.solve(budget, schedule, rounds=rounds, refine=refine, most=most)
    report.seconds += solver.seconds
    return Solution(predictor, report)


def _words(drifts: Sequence[float]) -> str:
    return ", ".join(f"{drift:.2f}" for drift in drifts)
