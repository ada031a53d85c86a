"""Solve for rows in closed form, gap by gap in closed loop, on a few calls of a pipeline.

With full steps f_1 .. f_J, and f_{J+1} the end, let the steps skipped between f_j and f_{j+1} share a row c_j over the
outputs v_k of f_1 .. f_j. A sampler is affine, so in a run the latents at f_{j+1} are affine in c_j:

    x_{f_{j+1}} = (what the rows before give) + g_j sum_{k <= j} c_jk v_k,  g_j = sum of dx_{f_{j+1}} / dv_s there

and least squares over all calls finds the c_j that bring them nearest to the reference runs' latents there. In closed
loop the outputs depend on the rows before: either the calls go in one run of the pipeline, whose gaps are solved as it
comes to them (`_Bench.lockstep`), or in rounds: all gaps are solved on the outputs that the last real run gave, and the
calls are run again. Row j is then exact after round j + 1. All that is learned passes at the sampler, after guidance.

What is greedy gap by gap is then refined on the end of the run: the derivatives of the last latents by the
J (J + 1) / 2 numbers are differences of real runs, and Gauss-Newton steps are taken only where real runs end nearer.

Which steps are full is found the same way: by algebra on the reference runs first, then by real runs.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from inspect import signature
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lesa.host.clock import Moment
from lesa.host.pipelines import for_each
from lesa.host.runtime import Run, accelerate, denoisers_of
from lesa.host.tap import OUTPUT, tap_of
from lesa.learn.counted import Recorder, Recording
from lesa.learn.gaps import Algebra, Equations, descend, ends_of, solve_row, solve_rows, ways
from lesa.predictors import Origin, configuration
from lesa.predictors.solved import STREAMS, Solved
from lesa.rows.plan import PlannedRow
from lesa.rows.sampler import Sampler
from lesa.rows.schedule import Schedule

BATCH = 16
"""How many plain prompts go in one call of the pipeline."""
SETTLED = 0.01
"""Rounds end when new rows would move the latents by less than this share of what they are off."""
NUDGE = 0.3
"""How far the latents are moved to measure a derivative, as a share of what they are off."""
DAMPINGS = (1e-4, 1e-2, 1.0)
"""What Gauss-Newton steps are damped by, as shares of the curvature's diagonal; all are run, and the best one kept."""
FORGIVENESS = (0.0, 4.0, 8.0, 16.0, 24.0)
"""By what powers of a run's share early errors may count less in the plans by algebra that real runs choose from."""
TINY = 1e-12


@dataclass
class Report:
    """What solving took and gave.

    Drifts are means over the calls in dB: after each round, of reuse on the same schedule, after each refinement, and
    of the schedules that the search began and ended with. Transformer runs are those of one picture and stream; of
    them `reference_runs` were in full.
    """

    rounds: list[float] = field(default_factory=list)
    reuse: float = math.nan
    refined: list[float] = field(default_factory=list)
    searched: list[tuple[tuple[int, ...], float]] = field(default_factory=list)
    tried: int = 0
    reference_runs: int = 0
    transformer_runs: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        parts = [f"rounds {_words(self.rounds)} dB (reuse {self.reuse:.2f})"]
        parts += [f"refined {_words(self.refined)} dB"] if self.refined else []
        parts += [f"{self.tried} schedules tried"] if self.tried else []
        runs = f"{self.transformer_runs} transformer runs ({self.reference_runs} of them reference)"
        return ", ".join([*parts, runs, f"{self.seconds:.1f} s"])


class Solution(NamedTuple):
    """Solved rows, and what it took to find them."""

    predictor: Solved
    report: Report


def solve(
    pipe: Any,
    calls: Sequence[str | Mapping[str, Any]],
    seeds: Sequence[int],
    *,
    budget: int | None = None,
    schedule: Schedule | None = None,
    rounds: int = 6,
    refine: int = 2,
    most: int = 200,
    **call: Any,
) -> Solution:
    """Solve for the rows of a pipeline at its output, on some calls of it, each with the seed beside it.

        predictor, report = solve(pipe, prompts[:8], range(8), budget=5)

    `calls` are prompts, or the arguments of calls by name; other arguments go to every call. Name the full steps with
    a `schedule`, or how many there are with a `budget`: then they are searched for, with real runs of `most` schedules
    at most. `rounds` is how many real runs of the calls follow each other at most, `refine` how many Gauss-Newton
    steps are taken on the end of the runs.

    Raises: ValueError if calls and seeds do not pair up, if not one of budget and schedule is given or does not fit,
        if the sampler is not affine, or if the runs are not on one grid or do not begin at its first step.
    """
    if (budget is None) == (schedule is None):
        raise ValueError("rows are solved for a schedule, or a budget of full steps to find one; pass one of them.")
    began = time.perf_counter()
    bench = _Bench(pipe, calls, seeds, call)
    full = schedule.full_steps(bench.steps) if schedule else _search(bench, budget or 0, most)
    found = _not_below_reuse(bench, _rounds(bench, full, rounds))
    for _ in range(refine):
        better = _refined(bench, found)
        if better is None:
            break
        found = better
        bench.report.refined.append(found.drift)
    bench.report.seconds = time.perf_counter() - began
    return Solution(bench.predictor(full, found.rows, found.drift), bench.report)


# --- the bench


class _Found(NamedTuple):
    """Rows, the recordings of a real run with them, and how far its calls ended from their references, in dB."""

    full: tuple[int, ...]
    rows: Tensor
    recordings: list[Recording]
    drift: float


class _Bench:
    """A pipeline and the calls that rows are solved on: their reference runs, and real runs with rows."""

    def __init__(self, pipe: Any, calls: Sequence[Any], seeds: Sequence[int], call: Mapping[str, Any]):
        if not calls or len(calls) != len(seeds):
            raise ValueError(f"each call needs one seed, got {len(calls)} calls and {len(seeds)} seeds.")
        self.pipe, self.report = pipe, Report()
        self._batches = list(_batches(pipe, calls, seeds, call))
        self.sampler: Sampler | None = None
        self.reference = self.run()
        self.report.reference_runs = self.report.transformer_runs
        first = self.reference[0].moment
        self.times = first.times
        self._check(first)
        self.wanted = [run.latents.double() for run in self.reference]
        self._velocities = [run.velocities.double() for run in self.reference]
        weights = torch.cat([run.final.double().square().sum(1) for run in self.reference])
        self.weights = 1 / weights.clamp_min(TINY)

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def response(self) -> Tensor:
        assert self.sampler is not None
        return self.sampler.response

    def _check(self, first: Moment) -> None:
        assert self.sampler is not None
        walked = {run.velocities.shape[1] for run in self.reference}
        grids = all(torch.equal(run.moment.times, first.times) for run in self.reference)
        if first.start or walked != {self.steps} or not grids or len(self.sampler) != self.steps:
            raise ValueError(
                f"rows are solved for runs that walk one whole grid, got runs of {sorted(walked)} steps from step "
                f"{first.start} on, on grids of {self.steps}; use calls from noise, with as many steps each."
            )

    def run(self, predictor: Solved | None = None, on_record: Callable | None = None) -> list[Recording]:
        """Run all calls, with these rows or in full, and return what passed."""
        runs: list[Recording] = []
        for batch, count in self._batches:
            accelerated = accelerate(self.pipe, predictor) if predictor else nullcontext()
            with accelerated as live:
                recorder = Recorder(self.pipe, count)
                recorder.wants_numbers = self.sampler is None
                if on_record is not None:
                    recorder.on_record = lambda run, live=live: on_record(live, run)
                undo = recorder.attach()
                try:
                    self.pipe(**batch())
                finally:
                    undo()
            self.sampler = self.sampler or recorder.numbers
            self.report.transformer_runs += recorder.counted
            runs += recorder.runs
        return runs

    def predictor(self, full: Sequence[int], rows: Tensor | None = None, drift: float | None = None) -> Solved:
        """Make a predictor of these full steps and rows, (J, J)."""
        names = denoisers_of(self.pipe)
        first, *others = (getattr(self.pipe, name) for name in names)
        others = [[type(other).__name__, configuration(other)] for other in others]
        training: dict[str, Any] = dict(calls=len(self.weights), transformer_runs=self.report.transformer_runs)
        training |= {"drift": drift} if drift is not None else {}
        training |= {"denoisers": others} if others else {}
        name = str(getattr(getattr(self.pipe, "config", None), "_name_or_path", "") or type(self.pipe).__name__)
        schedule = str(Schedule.at(full))
        versions = {package: version(package) for package in ("torch", "diffusers")}
        grid, kind, tap = tuple(self.times.tolist()), type(first).__name__, tap_of(first, OUTPUT)
        made = Solved(
            Origin(name, kind, configuration(first), tap, grid, schedule, STREAMS, training=training, versions=versions)
        )
        if rows is not None:
            made.set_gaps(rows)
        return made

    def off(self, runs: Sequence[Recording]) -> list[Tensor]:
        """Return how far the runs' last latents are off, (calls, all elements) each."""
        return [run.final - wanted.final for run, wanted in zip(runs, self.reference, strict=True)]

    def errors(self, runs: Sequence[Recording]) -> Tensor:
        """Return |x - x_ref|^2 / |x_ref|^2 of the last latents of each call."""
        return torch.cat([x.double().square().sum(1) for x in self.off(runs)]) * self.weights

    def drift(self, runs: Sequence[Recording]) -> float:
        """Return the mean over calls of 10 log10(|x - x_ref|^2 / |x_ref|^2) of the last latents."""
        found = float(10 * self.errors(runs).clamp_min(TINY).log10().mean())
        return found if math.isfinite(found) else math.inf

    # --- least squares

    def equations(
        self, full: Sequence[int], runs: Sequence[Recording] | None = None, rows: Tensor | None = None
    ) -> Equations:
        """Return what the outputs of these full steps say: of the reference runs, or of runs with these rows.

        The latents at the end of each gap are taken from the run itself, and the rows' own algebra says how other rows
        would move them: where that is not exact (norms rescaled by guidance, latents rewritten), rounds still end where
        the real latents are nearest to the reference's.
        """
        ends, chosen = ends_of(full, self.steps), list(full)
        gram, target = [], []
        for number, (wanted, known) in enumerate(zip(self.wanted, self._velocities, strict=True)):
            if runs is None or rows is None:
                outputs, missing = known[:, chosen], torch.einsum("es,psn->pen", self.response[ends], known)
            else:
                outputs = runs[number].velocities[:, chosen].double()
                moved = torch.einsum("ek,pkn->pen", ways(self.response, full, rows), outputs)
                missing = wanted[:, ends] - runs[number].latents[:, ends].double() + moved
            gram.append(outputs @ outputs.mT)
            target.append(missing @ outputs.mT)
        weights = self.weights[:, None, None]
        return Equations((weights * torch.cat(gram)).sum(0), (weights * torch.cat(target)).sum(0))

    def lockstep(self, full: tuple[int, ...]) -> _Found:
        """Solve every gap as the one run of all calls comes to it."""
        ends, count = ends_of(full, self.steps), len(full)
        known, (recording,) = self._velocities[0], self.reference
        missing = torch.einsum("es,psn->pen", self.response[ends], known)
        rows = torch.tril(torch.ones(count, count, dtype=torch.float64))
        predictor = self.predictor(full, rows)
        weights = self.weights[:, None, None]

        def solve_gap(live: Run, run: Recording) -> None:
            step = len(run._velocities) - 1
            if step not in full:
                return
            j = full.index(step)
            outputs = torch.stack([run._velocities[k] for k in full[: j + 1]], 1).double()
            gram = (weights * (outputs @ outputs.mT)).sum(0)
            target = (weights * (missing[:, j : j + 1] @ outputs.mT)).sum((0, 1))
            rows[j, : j + 1] = solve_row(self.response, full, rows, j, gram, target)
            _set_row(live, full, j, rows[j, : j + 1].float().double())

        runs = self.run(predictor, solve_gap)
        assert len(runs) == 1 and runs[0].calls == recording.calls
        return _Found(full, rows, runs, self.drift(runs))

    @property
    def goes_together(self) -> bool:
        """Tell whether all calls go in one run of the pipeline."""
        return len(self._batches) == 1 and len(self.reference) == 1


def _set_row(live: Run, full: Sequence[int], j: int, row: Tensor) -> None:
    """Change the plan of a run that is going on: the row of the gap after the j-th full step, in every stream."""
    past, coefficients = tuple(full[: j + 1]), tuple(row.tolist())
    for stream in live.streams:
        rows = live.plan(stream).rows
        rows.update({step: PlannedRow(past, coefficients, 0.0) for step in rows if rows[step].past == past})


def _batches(
    pipe: Any, calls: Sequence[Any], seeds: Sequence[int], call: Mapping[str, Any]
) -> Iterator[tuple[Callable[[], dict[str, Any]], int]]:
    """Yield what makes the arguments of each call of the pipeline, and how many pictures' calls it stands for.

    Plain prompts go together, calls with arguments of their own one by one. Nothing is decoded if it can be helped.
    """
    takes = signature(type(pipe).__call__).parameters
    latent = {"output_type": "latent"} if "output_type" in takes else {}
    if all(isinstance(one, str) for one in calls):
        for start in range(0, len(calls), BATCH):
            some, own = list(calls[start : start + BATCH]), list(seeds[start : start + BATCH])
            yield (
                lambda some=some, own=own: (
                    latent
                    | for_each(some, dict(call))
                    | {"prompt": some, "generator": [_generator(seed) for seed in own]}
                ),
                len(some),
            )
        return
    for one, seed in zip(calls, seeds, strict=True):
        arguments = {"prompt": one} if isinstance(one, str) else dict(one)
        yield (
            lambda arguments=arguments, seed=seed: latent | {"generator": _generator(seed)} | dict(call) | arguments,
            1,
        )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


# --- algebra


def _rounds(bench: _Bench, full: tuple[int, ...], rounds: int) -> _Found:
    """Solve all gaps on what the last run gave and run again, until the rows settle; returns the best run."""
    best = last = bench.lockstep(full) if bench.goes_together else None
    drifts = [] if best is None else [best.drift]
    equations = bench.equations(full) if last is None else bench.equations(full, last.recordings, last.rows)
    while len(drifts) < max(rounds, 1):
        rows = solve_rows(bench.response, full, equations)
        if last is not None and _moved(bench.response, full, equations, rows - last.rows) < SETTLED * _size(
            bench, last
        ):
            break
        runs = bench.run(bench.predictor(full, rows))
        last = _Found(full, rows, runs, bench.drift(runs))
        drifts.append(last.drift)
        best = last if best is None or last.drift < best.drift else best
        equations = bench.equations(full, runs, rows)
    bench.report.rounds += drifts
    assert best is not None
    return best


def _not_below_reuse(bench: _Bench, found: _Found) -> _Found:
    """Return what was found, or reuse if that ends nearer: what is best gap by gap may not be best at the end."""
    rows = torch.eye(len(found.full), dtype=torch.float64)
    runs = bench.run(bench.predictor(found.full, rows))
    bench.report.reuse = bench.drift(runs)
    return found if found.drift <= bench.report.reuse else _Found(found.full, rows, runs, bench.report.reuse)


def _moved(response: Tensor, full: Sequence[int], equations: Equations, change: Tensor) -> float:
    """Return by how much a change of rows moves the latents at any gap's end, over all calls."""
    zero = ways(response, full, torch.zeros_like(change))
    moves = ways(response, full, change) - zero
    return float(((moves @ equations.gram) * moves).sum(1).clamp_min(0).max().sqrt())


def _size(bench: _Bench, found: _Found) -> float:
    """Return how far the last latents are off, over all calls."""
    return float(bench.errors(found.recordings).sum().sqrt())


# --- refining on the end


def _directions(bench: _Bench, found: _Found) -> list[Tensor]:
    """Return by what rows are changed to measure derivatives, (J, J) each: well apart, as outputs are nearly alike."""
    gram = bench.equations(found.full, found.recordings, found.rows).gram
    error = float(bench.errors(found.recordings).mean().sqrt())
    result = []
    for j, (begin, end) in enumerate(pairwise([*found.full, bench.steps])):
        if end == begin + 1:
            continue
        moves = float(bench.response[end, begin + 1 : end].abs().sum())
        for k in range(j + 1):
            row = torch.zeros(len(found.full), dtype=torch.float64)
            row[k] = 1.0
            if k < j:
                row[k + 1] = -1.0
            size = float((row @ gram @ row).clamp_min(TINY).div(len(bench.weights)).sqrt()) * moves
            change = torch.zeros_like(found.rows)
            change[j] = row * (NUDGE * error / max(size, TINY))
            result.append(change)
    return result


def _refined(bench: _Bench, found: _Found) -> _Found | None:
    """Take the best damped Gauss-Newton step on sum_calls log |x - x_ref|^2 at the end; None if none is better.

    With the derivatives D of the last latents, the logarithm of |e + D z|^2 is at most that of |e|^2, plus
    |e + D z|^2 / |e|^2 - 1: least squares with weights 1 / |e|^2.
    """
    changes = _directions(bench, found)
    off = bench.off(found.recordings)
    gram = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    slope = torch.zeros(len(changes), dtype=torch.float64)
    moved = [[] for _ in off]
    for change in changes:
        runs = bench.run(bench.predictor(found.full, found.rows + change))
        for some, one, now in zip(moved, runs, found.recordings, strict=True):
            some.append(one.final - now.final)
    for some, error in zip(moved, off, strict=True):
        derivatives = torch.stack(some, 1).double()
        weights = 1 / error.double().square().sum(1).clamp_min(TINY)
        gram += (weights[:, None, None] * (derivatives @ derivatives.mT)).sum(0)
        slope += (weights[:, None] * torch.einsum("pcn,pn->pc", derivatives, error.double())).sum(0)
    best = found
    for damping in DAMPINGS:
        held = gram + damping * torch.diag(gram.diagonal() + TINY)
        step = -torch.linalg.solve(held, slope)
        rows = found.rows + sum((float(z) * change for z, change in zip(step, changes, strict=True)), start=0)
        runs = bench.run(bench.predictor(found.full, rows))
        tried = _Found(found.full, rows, runs, bench.drift(runs))
        best = tried if tried.drift < best.drift else best
    return None if best is found else best


# --- which steps are full


def _search(bench: _Bench, budget: int, most: int) -> tuple[int, ...]:
    """Return the best schedule of so many full steps: by algebra from several starts, then by real runs.

    Raises: ValueError if the budget is not from 1 to S.
    """
    steps = bench.steps
    if not 1 <= budget <= steps:
        raise ValueError(f"a budget is from 1 to {steps} full steps, got {budget}; change it.")
    algebra, known = Algebra(bench.response, torch.cat(bench._velocities), bench.weights), {}
    starts = {algebra.best(budget, forgiveness) for forgiveness in FORGIVENESS}

    def real(full: tuple[int, ...]) -> float:
        if full not in known:
            if len(known) >= most:
                return math.inf
            known[full] = _tried(bench, full)
        return known[full]

    start = min(sorted(starts), key=real)
    bench.report.searched.append((start, real(start)))
    best = descend(start, real, steps)
    bench.report.searched.append((best, real(best)))
    bench.report.tried = len(known)
    return best


def _tried(bench: _Bench, full: tuple[int, ...]) -> float:
    if bench.goes_together:
        return bench.lockstep(full).drift
    quiet = replace(bench.report, rounds=[])
    kept, bench.report = bench.report, quiet
    try:
        return _rounds(bench, full, 2).drift
    finally:
        kept.transformer_runs, bench.report = quiet.transformer_runs, kept


def _words(drifts: Sequence[float]) -> str:
    return ", ".join(f"{drift:.2f}" for drift in drifts)
