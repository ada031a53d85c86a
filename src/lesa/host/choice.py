"""Choose what the skipped steps of a run are forecast with: what the caller names, or what is found for the run.

What fits is known at a run's first step, which is full in any case: the weights and the grid as its denoisers are first
called, and the rest, such as guidance, as its sampler steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any
from weakref import WeakSet

from torch import nn

from lesa.host import data
from lesa.host.clock import Moment, start_of
from lesa.host.conditions import Judge, Noise
from lesa.host.data import DataPrediction
from lesa.host.denoiser import compiled_from
from lesa.host.facts import Facts, Heard
from lesa.host.tap import OUTPUT, tap_of
from lesa.predictors import Predictor
from lesa.predictors.calibration import Calibration, Quality, folder_of
from lesa.predictors.fingerprint import fingerprint, stamp
from lesa.predictors.shelf import Shelf, fetch
from lesa.predictors.shipped import calibrations_beside, shipped
from lesa.rows import plan as plans
from lesa.rows.default import Default
from lesa.rows.detour import Detours
from lesa.rows.forecasters import Forecaster, Reuse
from lesa.rows.grid import matches, times_in_order
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
_warned: WeakSet = WeakSet()


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
            raise ValueError(f"{_without_stop(error)}; {self.advice}.") from error


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

    def judge(self, chosen: Chosen) -> None:
        """Raise ValueError if the run does not fit what is chosen."""
        followed = [chosen.plan(name, self.start, self.start, self.times) for name in self._heard.outputs]
        chosen.check(followed, self._heard, *self.step)
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
        self._instead = _fallen_back(terms, fallback, chosen.tap)
        self._beginning = _beginning(chosen.tap)

    def begin(self, times: Sequence[float]) -> Chosen:
        """Go on with what was passed, until the first step says what fits."""
        return self._beginning

    def decide(self, first: FirstStep) -> Chosen:
        """Choose what is named if it fits the run."""
        try:
            if self._chosen.data is None or not self._chosen.data.wanted(*first.step):
                first.judge(self._chosen)
            return self._chosen
        except ValueError:
            assert self._instead is not None
            return self._instead


class Found:
    """What is found for each run: on the shelf, beside the model, on the hub; else a default, or an error.

    `fallback` says what becomes of a run that none of the predictors found fits: 'refuse', 'full', 'default', or a
    forecaster.
    """

    def __init__(
        self,
        pipe: Any,
        names: Sequence[str],
        terms: Terms,
        *,
        budget: int | None = None,
        quality: str | None = None,
        hub: str | None = None,
        fallback: str | Forecaster = REFUSE,
        tap: Tap | str | None = None,
    ):
        self._pipe, self._names, self._terms, self.noise = pipe, names, terms, terms.noise
        self._budget, self._quality, self._fallback = budget, quality and str(Quality.parse(quality)), fallback
        _fallen_back(terms, fallback, AT_OUTPUT)  # an error now rather than in a run
        self._hub, self._from_hub = hub, None if hub is None else fetch(hub) or Predictor.from_pretrained(hub)
        self._shipped, self._none_shipped = _shipped(pipe, budget)
        own = [one.origin.tap for one in self._predictors() if one.origin.tap.modules][:1]
        self.taps: tuple[Tap | str, ...] = (*own, AT_OUTPUT) if tap is None else (tap,)
        self._missing: dict[Tap | str, ValueError] = {}
        self._seen: tuple[int, str, int] | None = None
        self._calibrations: list[Calibration] = []
        self._weights = ""
        self._kept: dict[tuple, Chosen] = {}

    def without(self, tap: Tap | str, error: ValueError) -> None:
        """Go on without a tap that cannot be had; raise why, if it is the only one."""
        if len(self.taps) == 1:
            raise error
        self._missing[tap] = error

    def begin(self, times: Sequence[float]) -> Chosen:
        """Look up what there is for the weights as they are now, and take the tap of what fits this grid.

        Until the first step says the rest, the run goes on with what was passed.
        """
        self._look()
        tap = self.taps[-1]
        if not any(not _other_times(one, times) for one in self._calibrations):
            tap = next((one.origin.tap for one in self._predictors() if self._may(one, times)), tap)
        tap = tap if tap in self.taps else self.taps[-1]
        if ("begin", tap) not in self._kept:
            self._kept["begin", tap] = _beginning(tap)
        self._tap = tap
        return self._kept["begin", tap]

    def decide(self, first: FirstStep) -> Chosen:
        """Choose what fits the run.

        Raises: ValueError if there are predictors for these weights and none of them fits, unless there is a fallback.
        """
        reasons: list[tuple[int, str]] = []
        for calibration in [*self._calibrations, *self._of_hub()]:
            if (found := self._calibrated(calibration, first, reasons)) is not None:
                return found
        for predictor in self._predictors():
            if (found := self._trained(predictor, first, reasons)) is not None:
                return found
        if self._none_shipped:
            reasons.append((1, self._none_shipped))
        length = len(first.times) - 1 - first.start
        if not reasons and self._budget is not None and self._budget > length:
            reasons.append(
                (
                    1,
                    f"none was made, and of its {length} steps at most {length} are full, got a budget of "
                    f"{self._budget}",
                )
            )
        return self._default(first) if not reasons else self._refused(first, reasons)

    def _predictors(self) -> list[Predictor]:
        """Return the predictors that are no part of a calibration."""
        return [*self._shipped, *([self._from_hub] if isinstance(self._from_hub, Predictor) else [])]

    def _of_hub(self) -> list[Calibration]:
        return [self._from_hub] if isinstance(self._from_hub, Calibration) else []

    def _denoisers(self) -> dict[str, nn.Module]:
        return {name: getattr(self._pipe, name) for name in self._names}

    def _look(self) -> None:
        """Look up the calibrations for the weights, where these or the shelf have changed."""
        denoisers, shelf = self._denoisers(), Shelf()
        look = stamp(denoisers)
        if self._seen is None or self._seen[0] != look:
            self._weights = fingerprint(denoisers)
        seen = look, str(shelf.folder), shelf.changed(self._weights)
        if seen == self._seen:
            return
        beside = [one for one in calibrations_beside(self._pipe) if one.fingerprint == self._weights]
        self._calibrations = [*shelf.calibrations(self._weights), *beside]
        self._seen = seen

    def _may(self, predictor: Predictor, times: Sequence[float]) -> bool:
        """Tell whether a predictor may fit a run on this grid, as far as is known before the first step."""
        if self._quality is not None or predictor.origin.tap in self._missing:
            return False
        try:
            predictor.check_grid(times_in_order(times))
        except ValueError:
            return False
        return True

    def _calibrated(self, calibration: Calibration, first: FirstStep, reasons: list[tuple[int, str]]) -> Chosen | None:
        """Choose among the budgets of a calibration if it fits; else add the reason why not."""
        differences = first.facts.differences(calibration.facts)
        if calibration.fingerprint != self._weights:
            differences.insert(0, "other weights")
        if differences:
            reasons.append((len(differences), f"{calibration.name} is for other runs ({'; '.join(differences)})"))
            return None
        try:
            budget = calibration.budget_for(self._budget, self._quality)
        except ValueError as error:
            reasons.append((0, _without_stop(error)))
            return None
        key = "calibrated", calibration.folder, calibration.when, budget, self._tap
        if key not in self._kept and (predictor := self._loaded(calibration, budget, reasons)) is not None:
            self._keep(key, predictor, f"calibrated: {calibration.name}", reasons)
            if key in self._kept:
                self._kept[key].promise = calibration.promise(budget)
        return self._judged(key, first, reasons)

    def _loaded(self, calibration: Calibration, budget: int, reasons: list[tuple[int, str]]) -> Predictor | None:
        """Load a predictor of a calibration; where that cannot be, warn."""
        try:
            return calibration.predictor(budget)
        except (OSError, ValueError) as error:
            folder, why = folder_of(calibration.folder, budget), _without_stop(error)
            warnings.warn(
                f"{folder} is to hold a predictor, which cannot be read ({why}), and is passed over; calibrate "
                f"anew, or remove it: lesa shelf remove {calibration.name}.",
                stacklevel=2,
            )
            reasons.append((0, f"{folder} cannot be read ({why})"))
            return None

    def _keep(self, key: tuple, predictor: Predictor, label: str, reasons: list[tuple[int, str]]) -> None:
        """Keep a predictor as a choice if it is for these denoisers, at the tap of this run; else add why it is not."""
        try:
            self._kept[key] = self._make(predictor)
            self._kept[key].label = label
        except ValueError as error:
            reasons.append((1, _without_stop(error)))

    def _judged(self, key: tuple, first: FirstStep, reasons: list[tuple[int, str]]) -> Chosen | None:
        """Return what is kept there if the run fits it; else add the reason why not."""
        if (chosen := self._kept.get(key)) is None:
            return None
        try:
            first.judge(chosen)
        except ValueError as error:
            reasons.append((1, _without_stop(error)))
            return None
        return chosen

    def _trained(self, predictor: Predictor, first: FirstStep, reasons: list[tuple[int, str]]) -> Chosen | None:
        """Choose a predictor that was shipped, or is on the hub, if it fits; else add the reason why not."""
        if self._quality is not None:
            reasons.append((1, f"of {predictor!r} nothing was checked, got quality {self._quality!r}"))
            return None
        if (missing := self._missing.get(predictor.origin.tap)) is not None:
            reasons.append((1, _without_stop(missing)))
            return None
        key = "trained", id(predictor), self._tap
        try:
            predictor.check_grid(times_in_order(first.times))
        except ValueError as error:
            reasons.append((1, _without_stop(error)))
            return None
        if key not in self._kept:
            self._keep(key, predictor, f"trained: {predictor!r}", reasons)
        return self._judged(key, first, reasons)

    def _make(self, predictor: Predictor) -> Chosen:
        """Raise ValueError if a predictor is not for these denoisers at the tap of this run."""
        for module in self._denoisers().values():
            inner = compiled_from(module)
            tap = self._tap if isinstance(self._tap, Tap) else tap_of(inner, self._tap)
            predictor.check_model(inner, tap)
        schedule_for = own_schedules(predictor, self._budget)
        assert schedule_for is not None
        return self._terms.choose(predictor, schedule_for, self._tap)

    def _default(self, first: FirstStep) -> Chosen:
        """Choose rows without training, and say so once for each pipeline."""
        if self._quality is not None:
            raise ValueError(
                f"a quality chooses among calibrated predictors, got quality={self._quality!r} and none for these "
                f"weights; make them: lesa.calibrate(pipe, prompts, target={self._quality!r})."
            )
        if self._pipe not in _warned:
            _warned.add(self._pipe)
            warnings.warn(
                f"no predictor was made for these weights of a {type(self._pipe).__name__}: steps are forecast without "
                "training, and few are skipped. Calibrate for more, of a few prompts and in minutes: "
                "lesa.calibrate(pipe, prompts, budget=8).",
                stacklevel=2,
            )
        return self._untrained("default", Default(), partial(Default().schedule_for, budget=self._budget))

    def _untrained(self, kind: str, forecaster: Forecaster, schedule_for: ScheduleFor) -> Chosen:
        key = kind, self._tap
        if key not in self._kept:
            self._kept[key] = self._terms.choose(forecaster, schedule_for, self._tap)
            self._kept[key].label = f"{kind}: {forecaster!r}"
        return self._kept[key]

    def _refused(self, first: FirstStep, reasons: Sequence[tuple[int, str]]) -> Chosen:
        """Choose the fallback, or raise ValueError with the reason why the nearest predictor does not fit."""
        key = "fallback", self._tap
        if key not in self._kept and (chosen := _fallen_back(self._terms, self._fallback, self._tap)) is not None:
            self._kept[key] = chosen
        if key in self._kept:
            return self._kept[key]
        nearest = min(reasons, key=lambda reason: reason[0])[1]
        more = f" ({len(reasons) - 1} more fit less)" if len(reasons) > 1 else ""
        raise ValueError(
            f"there are predictors for these weights, but none fits this run: {nearest}{more}. Call the pipeline "
            "as they were made, or calibrate with the arguments of this call: lesa.calibrate(pipe, prompts, "
            f"budget=8, ...), or say what such runs do instead: {INSTEAD}."
        )


def _beginning(tap: Tap | str) -> Chosen:
    """Choose to keep what passes, for a run of which it is not known yet what fits it."""
    return Chosen(Reuse(), lambda _times, start: Schedule.at([start]), tap)


def _fallen_back(terms: Terms, fallback: str | Forecaster, tap: Tap | str) -> Chosen | None:
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


def _shipped(pipe: Any, budget: int | None) -> tuple[list[Predictor], str]:
    """Return the predictors shipped for a pipeline, best first, and why there is none of those that are there."""
    found = shipped(pipe)
    fitting = [one for one in found if one.is_for(None, budget)]
    if found and not fitting:
        names = ", ".join(sorted({str(len(one.full)) for one in found}, key=int))
        return [], f"predictors shipped with it are for {names} full steps, got a budget of {budget}"
    return fitting, ""


def _other_times(calibration: Calibration, times: Sequence[float]) -> bool:
    return not matches(times_in_order(calibration.facts.times), times_in_order(times))


def _without_stop(error: Exception) -> str:
    return str(error).rstrip(".")
