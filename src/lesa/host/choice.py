"""Choose what the skipped steps of a run are forecast with: what the caller names; what is `found` is chosen likewise.

What fits is known at a run's first step, which is full in any case: the weights and the grid as its denoisers are first
called, and the rest, such as guidance, as its sampler steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from torch import Tensor

from lesa.host import data
from lesa.host.clock import Moment, start_of
from lesa.host.conditions import Judge, Noise
from lesa.host.data import DataPrediction
from lesa.host.facts import Facts, Heard
from lesa.host.intercept import unmarked
from lesa.host.tap import OUTPUT
from lesa.predictors import Predictor
from lesa.rows import plan as plans
from lesa.rows import sampler
from lesa.rows.default import Default
from lesa.rows.detour import Detours
from lesa.rows.forecasters import Forecaster, Reuse
from lesa.rows.levels import DATA
from lesa.rows.plan import Plan
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

ScheduleFor = Callable[[Sequence[float], int], Schedule]
"""(times of the grid, first step of the run) -> which steps are full"""
PLANS_KEPT = 64
REFUSE, FULL, DEFAULT = "refuse", "full", "default"
INSTEAD = "fallback='full' (every step full) or fallback='default' (rows without training)"
AT_OUTPUT = Tap()


class Chosen:
    """What a run's forecasts are made with, and what it must be like for them to be right.

    `label` says in the summary what was found, and `promise` what was measured of it; of what a caller names nothing
    is said.
    """

    def __init__(
        self, forecaster: Forecaster, schedule_for: ScheduleFor, tap: Tap | str = AT_OUTPUT, strict: bool = False
    ):
        self.forecaster, self.schedule_for, self.tap, self._strict = forecaster, schedule_for, tap, strict
        self.judge: Judge | None = None
        self.data: DataPrediction | None = None
        self.label = self.promise = self.advice = ""
        self.is_fallback = False
        self._reuse = Reuse()
        self.plan = lru_cache(PLANS_KEPT)(self._plan)

    def _plan(
        self,
        name: str,
        start: int,
        began: int,
        times: tuple[float, ...],
        schedule: Schedule | None = None,
        reuse: bool = False,
    ) -> Plan:
        """Compile the plan of a stream that begins at step `began` of a run that begins at `start`."""
        with self._advised():
            return self._compiled(name, start, began, times, schedule or self.schedule_for(times, start), reuse)

    def _compiled(
        self, name: str, start: int, began: int, times: tuple[float, ...], schedule: Schedule, reuse: bool
    ) -> Plan:
        if began > start:  # a stream that joins the run later begins with a full step of its own
            later = [step for step in schedule.full_steps(len(times) - 1, start) if step > began]
            schedule = Schedule.at([began, *later])
        of = self._reuse if reuse else self.forecaster.for_stream(name)
        return plans.compile(of, times, schedule, began, self._strict)

    def check(self, plans: Sequence[Plan], heard: Heard, scheduler: Any, args: tuple, kwargs: dict) -> None:
        """Raise ValueError if forecasts on these plans are not right, given a scheduler's first `step`."""
        if self.judge is not None:
            with self._advised():
                self.judge.judge(plans, heard, scheduler, args, kwargs)

    @contextmanager
    def _advised(self) -> Iterator[None]:
        """Let an error say, too, what whoever named the forecaster may do."""
        try:
            yield
        except ValueError as error:
            if not self.advice:
                raise
            raise ValueError(f"{without_stop(error)}; {self.advice}.") from error


@dataclass(frozen=True)
class Terms:
    """On what terms forecasters are chosen: what a caller of `lesa.accelerate` asks for besides."""

    of: str = "auto"
    strict: bool = False
    check: bool = True
    detours: Detours | None = None
    alone: bool = False
    noise: Noise = field(default_factory=Noise)

    def choose(self, forecaster: Forecaster, schedule_for: ScheduleFor, tap: Tap | str = AT_OUTPUT) -> Chosen:
        """Make a choice.

        Raises: ValueError if the data prediction is asked for and cannot be forecast with it.
        """
        chosen = Chosen(forecaster, schedule_for, tap, self.strict)
        trained, of = isinstance(forecaster, Predictor), self.of
        at_output = tap == OUTPUT or (isinstance(tap, Tap) and not tap.modules)
        if isinstance(forecaster, Predictor) and forecaster.of == DATA:
            if of == OUTPUT:
                raise ValueError(f"{forecaster!r} has rows of the data prediction, got of={of!r}; leave of= out.")
            trained, of = False, DATA
        may = data.check(of, trained=trained, alone=self.alone, at_output=at_output, detours=self.detours)
        asked = "as asked for" if of == self.of else "as the predictor's rows do"
        chosen.data = DataPrediction(of, self.noise, asked) if may else None
        chosen.judge = Judge(forecaster, self.noise) if self.check else None
        return chosen


class FirstStep:
    """A run as its sampler's first `step` is called: what it is known by, and whether a choice is right for it."""

    def __init__(self, moment: Moment, heard: Heard, noise: Noise, scheduler: Any, args: tuple, kwargs: dict):
        self.times, self.start = tuple(moment.times.tolist()), start_of(scheduler, args, kwargs, moment)
        self._moment, self._heard, self._noise = moment, heard, noise
        self.step: tuple[Any, tuple, dict] = scheduler, args, kwargs
        self._facts: Facts | None = None
        self.judged: Chosen | None = None

    @property
    def facts(self) -> Facts:
        """The run's facts, looked at once."""
        if self._facts is None:
            self._facts = self._heard.facts(self._moment, self._noise, *self.step)
        return self._facts

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def response(self) -> Tensor:
        """What the sampler makes of outputs, (S + 1, S), as `lesa.rows.sampler.Sampler` has it.

        Raises: ValueError if that is no weighted sum.
        """
        scheduler, args, kwargs = self.step
        return sampler.of(unmarked(scheduler), *args, **kwargs).response

    def judge(self, chosen: Chosen) -> None:
        """Raise ValueError if the run does not fit what is chosen."""
        followed = [chosen.plan(name, self.start, self.start, self.times) for name in self._heard.outputs]
        if chosen.data is None or not chosen.data.wanted(*self.step):
            chosen.check(followed, self._heard, *self.step)
        elif any(plan.rows for plan in followed):
            chosen.data.levels(*self.step)  # an error now rather than as it steps
        self.judged = chosen


class Named:
    """What the caller names, for every run."""

    def __init__(self, chosen: Chosen, noise: Noise | None = None):
        self._chosen, self.noise = chosen, noise or Noise()
        self.taps: tuple[Tap | str, ...] = (chosen.tap,)

    def begin(self, times: Sequence[float]) -> Chosen:
        """Choose as a run's first call of a denoiser comes."""
        return self._chosen

    def decide(self, first: FirstStep) -> Chosen:
        """Choose as its sampler steps for the first time."""
        return self._chosen

    def without(self, tap: Tap | str, error: ValueError) -> None:
        """Raise why a tap cannot be had."""
        raise error


class NamedOrElse(Named):
    """What the caller names, for every run that it fits, and a fallback for the others."""

    def __init__(self, chosen: Chosen, terms: Terms, fallback: str | Forecaster):
        super().__init__(chosen, terms.noise)
        self._instead = fallen_back(terms, fallback, chosen.tap)
        self._beginning = beginning(chosen.tap)

    def begin(self, times: Sequence[float]) -> Chosen:
        """Go on with what was passed, until the first step says what fits."""
        return self._beginning

    def decide(self, first: FirstStep) -> Chosen:
        """Choose what is named if it fits the run."""
        try:
            first.judge(self._chosen)
            return self._chosen
        except ValueError:
            assert self._instead is not None
            return self._instead


def beginning(tap: Tap | str) -> Chosen:
    """Choose to keep what passes, for a run of which it is not known yet what fits it."""
    return Chosen(Reuse(), lambda _times, start: Schedule.at([start]), tap)


def fallen_back(terms: Terms, fallback: str | Forecaster, tap: Tap | str) -> Chosen | None:
    """Make the choice that a fallback is; None if it is to refuse.

    Raises: ValueError if it is none, or a forecaster that does not say which steps are full.
    """
    if (instead := _instead_of(fallback)) is None:
        return None
    chosen = terms.choose(*instead, tap)
    chosen.is_fallback = True
    chosen.label = "fallback: every step full" if fallback == FULL else f"fallback: {chosen.forecaster!r}"
    return chosen


def _instead_of(fallback: str | Forecaster) -> tuple[Forecaster, ScheduleFor] | None:
    """Return what a fallback forecasts with, and on which schedules; None if it is to refuse."""
    if isinstance(fallback, str):
        known = {REFUSE: None, FULL: (Reuse(), _every_step), DEFAULT: (Default(), Default().schedule_for)}
        if fallback in known:
            return known[fallback]
    if isinstance(fallback, (str, type)) or not hasattr(fallback, "row"):
        raise ValueError(
            f"fallback is 'refuse', 'full', 'default' or a forecaster, got {fallback!r}; name one of these."
        )
    own = getattr(fallback, "schedule", None)
    if (schedule_for := own_schedules(fallback, None)) is not None:
        return fallback, schedule_for
    if not isinstance(own, Schedule):
        raise ValueError(
            f"a fallback says which of its steps are full, got {fallback!r} without a schedule; give it one "
            "(forecaster.schedule = lesa.Schedule.every(2)), or take fallback='full'."
        )
    return fallback, lambda _times, _start: own


def _every_step(times: Sequence[float], start: int) -> Schedule:
    return Schedule.at(range(start, len(times) - 1))


def own_schedules(forecaster: Any, budget: int | None) -> ScheduleFor | None:
    """Return what a forecaster says of a run's full steps once it sees the grid; None if it says nothing of it."""
    if not hasattr(forecaster, "schedule_for"):
        return None
    return lambda times, start: forecaster.schedule_for(times, budget=budget, start=start)


def without_stop(error: Exception) -> str:
    return str(error).rstrip(".")
