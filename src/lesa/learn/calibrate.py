"""Calibrate: a schedule and rows for a pipeline from a few of its runs, checked by other runs, in one call.

The reference runs of some calls are made once; rows are solved on them, for one number of full steps after the other
(`lesa.learn.solve`). What is kept is decided on other calls, by real runs: solved rows beside Lagrange, Taylor and
reuse, on schedules planned for these and on the solved one's own. Where one of them is better, it is kept instead.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from torch import nn

from lesa.host.facts import Facts, listen
from lesa.host.pipelines import arguments_of
from lesa.host.runtime import denoisers_of
from lesa.learn import said
from lesa.learn.beginning import remember
from lesa.learn.calls import Call, plain_calls
from lesa.learn.checks import Checks, check_possible
from lesa.learn.collecting import TRAINING_SEED, VALIDATION_SEED
from lesa.learn.journal import Journal
from lesa.learn.kinds import check_one_kind
from lesa.learn.progress import Progress
from lesa.learn.references import BATCH
from lesa.learn.rivals import Rivals, baked
from lesa.learn.solve import Solver
from lesa.predictors.base import check_place
from lesa.predictors.calibration import Calibration, Quality
from lesa.predictors.curve import SOLVED, Curve, Point
from lesa.predictors.fingerprint import fingerprint
from lesa.predictors.shelf import Shelf, versions
from lesa.predictors.solved import Solved
from lesa.rows.schedule import Schedule

OnPoint = Callable[[Point, "tuple[np.ndarray, np.ndarray] | None"], object]
LARGE = 5e8
"""Denoisers of more parameters than this run one call at a time, unless somebody says how many."""
Pairs = tuple[list[Call], list[int]]
"""Calls, and the seed of each."""
APART = 1000
"""How far the seeds of a calibration lie from those of the next `seed`."""
UNDER_WAY = ".under-way"
"""Where a shelf keeps what a calibration has done so far."""
FIRST_SHARE = 6
"""A target is looked for from a full step in so many on."""
FEWEST = 4
"""Of fewer calls none is held out."""


@dataclass(frozen=True)
class CalibrateOptions:
    """How a pipeline is calibrated.

    `checked` of the calls are held out to check on, the last ones: by default a third of them, with a target a half,
    where there are four or more; of fewer all are solved on, and checked with other seeds. All noise depends on `seed`.
    Rows are refined on the end of runs by at most `refine` steps, and at most `most` schedules are run for each budget:
    60, or 12 where calls are run one by one. `batch_size` prompts go in one call of the pipeline: 16, or one where a
    denoiser has more than 5e8 parameters. With `pictures` what checked runs draw is decoded and measured, by PSNR, and
    by SSIM and LPIPS where all that these need is on this machine. `rivals` are rows without training that solved ones
    are held against. `progress` shows a bar.

    Raises: ValueError if a number is out of range.
    """

    checked: int | None = None
    seed: int = 0
    refine: int = 2
    most: int | None = None
    batch_size: int | None = None
    pictures: bool = True
    rivals: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        for name, least in dict(checked=1, seed=0, refine=0, most=1, batch_size=1).items():
            number = getattr(self, name)
            if number is not None and number < least:
                raise ValueError(f"{name}= is at least {least}, got {number}; raise it.")


@said.once()
def calibrate(
    pipe: Any,
    calls: Sequence[Call],
    folder: str | Path | None = None,
    options: CalibrateOptions = CalibrateOptions(),
    *,
    budget: int | None = None,
    budgets: Sequence[int] | None = None,
    target: str | None = None,
    near: bool = False,
    shelf: Shelf | None = None,
    on_point: OnPoint | None = None,
    **call: Any,
) -> Solved:
    """Find a schedule and rows for a pipeline from a few of its calls, check them, and keep them on the shelf.

        predictor = lesa.calibrate(pipe, ["a red apple", "a boat at night", ...], budget=8)
        with lesa.accelerate(pipe) as run:  # finds it, in this process and in the next
            image = pipe("another prompt").images[0]

    The pipeline is taken as it is, with its LoRA, quantisation, offload and sampler. Calls are prompts, or the
    arguments of calls by name; other arguments go to all of them (`num_inference_steps=28, height=768`).

    A `budget` is a number of full steps; several `budgets` are calibrated from high to low. A `target` such as
    'psnr:40', 'ssim:0.97', 'lpips:0.1' or 'drift:-45' is for the mean over other calls, and the smallest budget is
    taken, of those named or of all, of which the checked calls say with 90 % confidence that it is kept. Without any of
    them the budget is a sixth of the run's steps, two at least, and as many as have to be full.

    With `near` it begins with a calibration on the shelf that differs in its times alone, the one of the nearest number
    of steps: of budgets whose rows can be carried no schedule is tried, as their algebra on the reference runs here
    says which steps are full.

    Returns the predictor of the budget asked for, of several the largest, or the one that keeps the target; its `curve`
    says what was found for all. All go to the `shelf`, by default the user's (see `lesa.predictors.shelf`), and that
    one to a `folder` too, if one is named. What is done is kept on the shelf meanwhile: the same call goes on after it
    was stopped. `on_point` takes each budget's point as it is found, and the pictures of the worst checked call there:
    what was drawn, and the reference's; or None.

    Raises: ValueError if there are no calls, if their runs are of several kinds, if the options do not fit, or as
        `lesa.learn.solve.Solver` does; LookupError if no budget keeps the target, or nothing is near; RuntimeError if
        another process makes the same calibration; OSError if the shelf cannot be written to.
    """
    wanted = _Wanted.of(budget, budgets, target)
    if folder is not None:
        check_place(folder)
    plan = _Plan.of(pipe, calls, options, call, shelf or Shelf(), near, target is not None)
    with plan.journal.alone(), Progress(options.progress) as progress:
        bench = _Bench(plan, progress, near)
        curve, chosen = wanted.find(bench, on_point or (lambda _point, _pictures: None))
        bench.keep(curve, chosen.full_steps, wanted.target)
    predictor = bench.predictors[chosen.full_steps]
    if folder is not None:
        predictor.save_pretrained(folder)
    return predictor


@dataclass(frozen=True)
class _Wanted:
    """Which numbers of full steps are calibrated, and which is taken."""

    budgets: tuple[int, ...]
    target: Quality | None

    @classmethod
    def of(cls, budget: int | None, budgets: Sequence[int] | None, target: str | None) -> _Wanted:
        if budget is not None and budgets is not None:
            raise ValueError("name one number of full steps, budget=8, or several, budgets=(4, 6, 8), not both.")
        asked: Any = (budget,) if budget is not None else () if budgets is None else budgets
        try:
            named = tuple(sorted(set(map(index, asked)), reverse=True))
        except TypeError:
            raise ValueError(
                f"budgets are whole numbers of full steps, budget=8 or budgets=(4, 6, 8), got {asked!r}; name such."
            ) from None
        if any(one < 1 for one in named):
            raise ValueError(f"a run has a full step or more, got the budgets {named}; raise them.")
        quality = Quality.parse(target) if target is not None else None
        if quality is not None:
            check_possible(quality)
        return cls(named, quality)

    def find(self, bench: _Bench, on_point: OnPoint) -> tuple[Curve, Point]:
        """Calibrate one budget after the other; returns all points, and the one taken.

        Raises: LookupError if none keeps the target.
        """
        points: dict[int, Point] = {}
        bench.check(self)

        def found(budget: int) -> Point:
            if budget not in points:
                points[budget] = bench.point(budget, points)
                on_point(points[budget], bench.worst(budget))
            return points[budget]

        if self.budgets or self.target is None:
            for one in self.budgets or (bench.usual_budget,):
                found(one)
        else:
            _walk(found, self.target, bench.usual_budget, bench.least_budget, bench.steps)
        ordered = sorted(points.values(), key=lambda point: -point.full_steps)
        curve = Curve(bench.steps, tuple(ordered), bench.left_out)
        return curve, curve.least(self.target) if self.target else ordered[0]


def usual_budget(steps: int) -> int:
    """Return the number of full steps that is calibrated where nobody names one."""
    return max(round(steps / FIRST_SHARE), min(2, steps))


def _walk(found: Callable[[int], Point], target: Quality, budget: int, least: int, steps: int) -> None:
    """Look for the fewest full steps, `least` or more, that keep a target: from a budget up until it is kept, by a
    quarter of the budget at a time, and down from there while it is."""
    missed = least - 1
    while not (kept := found(budget).kept.keeps(target)) and budget < steps - 1:
        missed, budget = budget, min(budget + max(budget // 4, 1), steps - 1)
    while kept and budget - 1 > missed and found(budget - 1).kept.keeps(target):
        budget -= 1


@dataclass(frozen=True)
class _Plan:
    """What a calibration is of, and where it is kept."""

    pipe: Any
    solved_on: Pairs
    checked_on: Pairs
    options: CalibrateOptions
    call: dict[str, Any]
    shelf: Shelf
    fingerprint: str
    journal: Journal
    near: list[Calibration]
    """Those that it may begin with."""

    @classmethod
    def of(
        cls,
        pipe: Any,
        calls: Sequence[Call],
        options: CalibrateOptions,
        call: dict[str, Any],
        shelf: Shelf,
        near: bool,
        promising: bool,
    ) -> _Plan:
        """Raise ValueError if there are no calls, or too few."""
        if not len(calls):
            raise ValueError("a calibration needs prompts, or calls, got none; four to twelve are enough.")
        solved_on, checked_on = split(plain_calls(calls), options, promising)
        weights = fingerprint({name: getattr(pipe, name) for name in denoisers_of(pipe)})
        known = shelf.calibrations(weights) if near else []
        what = dict(
            near=[sorted(one.digests.items()) for one in known] if near else None,
            solved_on=solved_on,
            checked_on=checked_on,
            options=options,
            call=call,
            arguments=arguments_of(pipe),
            pipeline=_described(pipe),
            versions=versions(),
        )
        journal = Journal(shelf.folder / UNDER_WAY / weights[:16], **what)
        return cls(pipe, solved_on, checked_on, options, call, shelf, weights, journal, known)


def _described(pipe: Any) -> list[str]:
    """Tell a pipeline from others: its class, the weights of all its parts, and its scheduler."""
    components = getattr(pipe, "components", None) or vars(pipe)
    parts = {name: part for name, part in components.items() if isinstance(part, nn.Module)}
    scheduler = getattr(pipe, "scheduler", None)
    config = json.dumps(dict(getattr(scheduler, "config", {})), sort_keys=True, default=repr)
    return [type(pipe).__name__, fingerprint(parts), type(scheduler).__name__, config]


class _Bench:
    """What a calibration works with: calls to solve on and calls to check on, their runs, and what is done so far."""

    def __init__(self, plan: _Plan, progress: Progress, near: bool = False):
        self._options, self._shelf, self._fingerprint = plan.options, plan.shelf, plan.fingerprint
        self._journal, self.progress = plan.journal, progress
        pipe, options, call = plan.pipe, plan.options, plan.call
        self.predictors: dict[int, Solved] = {}
        size = options.batch_size or _batch_size(pipe)
        check_one_kind(pipe, [*plan.solved_on[0], *plan.checked_on[0]], call)
        with listen(pipe) as heard:
            self.progress.say("reference runs")
            self._solver = Solver(
                pipe,
                *plan.solved_on,
                call,
                batch_size=size,
                pictures=options.pictures,
                on_run=self.progress.counter(),
            )
        self._facts: Facts = heard[0]
        self._near = self._nearest(plan.near) if near else None
        self._checks = Checks(
            pipe, *plan.checked_on, call, pictures=options.pictures, batch_size=size, on_run=self.progress.counter()
        )
        self._rivals = Rivals(pipe, *plan.solved_on, call, batch_size=size) if options.rivals else None
        self._references = self._solver.counts.reference + self._checks.transformer_runs

    @property
    def steps(self) -> int:
        """How many steps a run walks."""
        return self._solver.ticks

    @property
    def least_budget(self) -> int:
        """How many steps have to be full."""
        return len(self._solver.begins)

    @property
    def usual_budget(self) -> int:
        return max(usual_budget(self.steps), self.least_budget)

    def check(self, wanted: _Wanted) -> None:
        """Raise ValueError if the runs have fewer steps than a budget, or more that have to be full, or if what is
        checked is not measured by what the target is of."""
        for budget in wanted.budgets:
            self._solver.check_budget(budget)
        if wanted.target is not None:
            self._checks.check(wanted.target)

    @property
    def left_out(self) -> str:
        """By what checked calls are not measured, and why."""
        return self._checks.left_out

    def point(self, budget: int, known: Mapping[int, Point]) -> Point:
        """Solve for so many full steps, and check: as it was done before this call was stopped, or now."""
        kept = self._journal.point(budget)
        if kept is None:
            self.progress.say(f"{budget} full steps")
            kept = self._found(budget, known)
            self._journal.keep(*kept, self._checks.worst.get(kept[0].kept))
        point, self.predictors[budget] = kept
        return point

    def worst(self, budget: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return what was drawn of a budget's worst checked call, and its reference; None of what is no picture."""
        return self._journal.worst(budget)

    def _found(self, budget: int, known: Mapping[int, Point]) -> tuple[Point, Solved]:
        began, options = time.perf_counter(), self._options
        checked, planned = self._checks.transformer_runs, self._planned
        self._checks.forget()
        above = min((one for one in known if one > budget), default=None)
        near: list[Solved | Schedule] = [Schedule.parse(known[above].tried[0].schedule)] if above else []
        near += self._elsewhere(budget)
        solution = self._solver.solve(budget, refine=options.refine, most=options.most, near=near)
        tried = {self._checks.run(SOLVED, solution.predictor, solution.predictor.schedule): solution.predictor}
        schedule, begins = solution.predictor.schedule, solution.predictor.begins
        rivals, left_out = self._rivals.of(schedule, budget, begins) if self._rivals else ([], "")
        for rival in rivals:
            origin = replace(solution.predictor.origin, schedule=str(rival.schedule))
            try:
                rows = baked(rival.forecaster, origin, solution.predictor.of)
                one = self._checks.run(repr(rival.forecaster), rows, rival.schedule)  # what is kept, not its model
            except ValueError as error:  # such as a grid that this forecaster is not for
                left_out = f"{left_out} {rival.forecaster!r}: {error}".strip()
                continue
            remember(rows, drift=fmean(one.drift))  # its own, not that of what was solved for
            tried[one] = rows
        point = Point(
            budget,
            solution.report.drift,
            tuple(tried),
            {
                **vars(solution.report.counts),
                "reference": self._references,
                "rivals": self._planned - planned,
                "checks": self._checks.transformer_runs - checked,
            },
            time.perf_counter() - began,
            left_out,
        )
        return point, tried[point.kept]

    def _nearest(self, known: Sequence[Calibration]) -> Calibration:
        """Return the calibration at other times whose number of steps is the nearest.

        Raises: LookupError if there is none.
        """
        same = (one for one in known if not self._facts.differences(replace(one.facts, times=self._facts.times)))
        found = [one for one in same if self._facts.differences(one.facts)]
        if not found:
            raise LookupError(
                "near= begins with a calibration of the same weights and calls at other times, got none on the shelf; "
                "calibrate with more steps first, or leave it out."
            )
        return min(found, key=lambda one: abs(math.log(one.facts.steps / self._facts.steps)))

    def _elsewhere(self, budget: int) -> list[Solved]:
        """Return the predictor of a budget that was calibrated at other times, if one is to begin near."""
        if self._near is None or budget not in self._near.budgets:
            return []
        found = self._near.predictor(budget)
        return [found] if isinstance(found, Solved) else []

    @property
    def _planned(self) -> int:
        """Transformer runs so far to plan for rows without training."""
        return self._rivals.transformer_runs if self._rivals else 0

    def keep(self, curve: Curve, chosen: int, target: Quality | None) -> None:
        """Put all predictors on the shelf, each with what is promised for it."""
        for point in curve.points:
            self.predictors[point.full_steps].curve = curve
        table = dict(curve.to_table(), chosen=chosen, target=None if target is None else str(target))
        self._shelf.put(self._fingerprint, self._facts, self.predictors, table)
        self._journal.clear()


def split(calls: Sequence[Call], options: CalibrateOptions, promising: bool = False) -> tuple[Pairs, Pairs]:
    """Say which calls are solved on and which are checked, each with its seeds.

    For a target more are checked: a half of them; of fewer than four all, with so many seeds each that they are four or
    more.

    Raises: ValueError if none is left to solve on, or if a target is to be kept on one call.
    """
    usual = len(calls) // (2 if promising else 3) if len(calls) >= FEWEST else 0
    held = options.checked if options.checked is not None else usual
    if held >= len(calls):
        raise ValueError(f"of {len(calls)} calls, {held} cannot be held out to check on; pass more, or checked= fewer.")
    if promising and held == 1:
        raise ValueError(
            "a target needs two checked calls or more, as one does not say how far others differ, got 1; raise "
            "checked=, or leave it out."
        )
    solved_on, checked_on = list(calls[: len(calls) - held]), list(calls[len(calls) - held :])
    checked_on = checked_on or list(calls) * (math.ceil(FEWEST / len(calls)) if promising else 1)
    shift = options.seed * APART
    return _seeded(solved_on, TRAINING_SEED + shift), _seeded(checked_on, VALIDATION_SEED + shift)


def _seeded(calls: list[Call], first: int) -> Pairs:
    return calls, list(range(first, first + len(calls)))


def _batch_size(pipe: Any) -> int:
    """Return how many prompts go in one call where nobody says it."""
    modules = [getattr(pipe, name) for name in denoisers_of(pipe)]
    return 1 if any(sum(x.numel() for x in one.parameters()) > LARGE for one in modules) else BATCH
