"""Find what the skipped steps of a run are forecast with, where the caller names nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from weakref import WeakSet

from torch import nn

from lesa.host.choice import (
    AT_OUTPUT,
    INSTEAD,
    REFUSE,
    Chosen,
    FirstStep,
    ScheduleFor,
    Terms,
    beginning,
    fallen_back,
    own_schedules,
    without_stop,
)
from lesa.host.denoiser import compiled_from
from lesa.host.embedding import embedding_of
from lesa.host.tap import tap_of
from lesa.predictors import Predictor
from lesa.predictors.calibration import Calibration, Quality, folder_of
from lesa.predictors.fingerprint import fingerprint, stamp
from lesa.predictors.shelf import Shelf, fetch
from lesa.predictors.shipped import calibrations_beside, shipped
from lesa.predictors.solved import Solved
from lesa.rows.default import Default
from lesa.rows.forecasters import Forecaster
from lesa.rows.grid import matches, times_in_order
from lesa.rows.tap import Tap

_warned: WeakSet = WeakSet()


class NoneFits(ValueError):
    """There are predictors for a pipeline's weights, and none of them fits a run; `advice` is what to do then."""

    def __init__(self, why: str, advice: str):
        super().__init__(f"there are predictors for these weights, but none fits this run: {why}. {advice}")
        self.advice = advice


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
        fallen_back(terms, fallback, AT_OUTPUT)  # an error now rather than in a run
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
            self._kept["begin", tap] = beginning(tap)
        self._tap = tap
        return self._kept["begin", tap]

    def decide(self, first: FirstStep) -> Chosen:
        """Choose what fits the run.

        Raises: ValueError if there are predictors for these weights and none of them fits, unless there is a fallback.
        """
        reasons: list[tuple[int, str]] = []
        calibrations = [*self._calibrations, *self._of_hub()]
        for calibration in calibrations:
            if (found := self._calibrated(calibration, first, reasons)) is not None:
                return found
        for calibration in sorted(calibrations, key=partial(_apart, first.times)):
            if (found := self._carried(calibration, first, reasons)) is not None:
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
        """Choose among the budgets of a calibration if it fits; else add why not, unless its rows may be carried."""
        if self._is_elsewhere(calibration, first):
            return None
        differences = first.facts.differences(calibration.facts)
        if calibration.fingerprint != self._weights:
            differences.insert(0, "other weights")
        if differences:
            reasons.append((len(differences), f"{calibration.name} is for other runs ({'; '.join(differences)})"))
            return None
        try:
            budget = calibration.budget_for(self._budget, self._quality)
        except ValueError as error:
            reasons.append((0, without_stop(error)))
            return None
        key = "calibrated", calibration.folder, calibration.when, budget, self._tap
        if key not in self._kept and (predictor := self._loaded(calibration, budget, reasons)) is not None:
            self._keep(key, predictor, f"calibrated: {calibration.name}", reasons)
            if key in self._kept:
                self._kept[key].promise = calibration.promise(budget)
        return self._judged(key, first, reasons)

    def _carried(self, calibration: Calibration, first: FirstStep, reasons: list[tuple[int, str]]) -> Chosen | None:
        """Choose rows of a calibration carried to other times, if nothing else differs; else add the reason why not."""
        if not self._is_elsewhere(calibration, first):
            return None
        try:
            key = self._carry(calibration, first, reasons)
        except ValueError as error:
            differences = "; ".join(first.facts.differences(calibration.facts))
            why = f"({differences}), and not carried to these: {without_stop(error)}"
            reasons.append((1, f"{calibration.name} is for other runs {why}"))
            return None
        return self._judged(key, first, reasons)

    def _is_elsewhere(self, calibration: Calibration, first: FirstStep) -> bool:
        """Tell whether a run differs from those of a calibration in its times, and in nothing else."""
        known = replace(calibration.facts, times=first.facts.times)
        others = calibration.fingerprint != self._weights or first.facts.differences(known)
        return not others and _other_times(calibration, first.times)

    def _carry(self, calibration: Calibration, first: FirstStep, reasons: list[tuple[int, str]]) -> tuple:
        """Keep rows carried to the run's times as a choice; returns its key.

        Raises: ValueError, with the reason, if they cannot be carried.
        """
        if self._quality is not None:
            raise ValueError(f"nothing was checked there, got quality {self._quality!r}")
        budget = calibration.budget_for(self._budget)
        key = "carried", calibration.folder, calibration.when, budget, self._tap, first.times
        if key not in self._kept and (predictor := self._loaded(calibration, budget, reasons)) is not None:
            if not isinstance(predictor, Solved):
                raise ValueError(f"rows that were solved for are carried, got {predictor!r}")
            embed = embedding_of(self._denoisers().values(), first.step[0], first.times)
            made = predictor.carried(first.times, first.response, embed)
            known, here = calibration.facts.steps, first.steps
            to = f"{here}" if here != known else f"{here} at other times"
            self._keep(key, made, f"calibrated: {calibration.name}, rows carried from {known} steps to {to}", reasons)
            if key in self._kept:
                drift = f"drift {made.origin.training['drift']:.4g} dB by algebra, nothing checked"
                self._kept[
                    key
                ].promise = f"{budget} full of {to}: {drift}; where calibrated, {calibration.promise(budget)}"
        return key

    def _loaded(self, calibration: Calibration, budget: int, reasons: list[tuple[int, str]]) -> Predictor | None:
        """Load a predictor of a calibration; where that cannot be, warn."""
        try:
            return calibration.predictor(budget)
        except (OSError, ValueError) as error:
            folder, why = folder_of(calibration.folder, budget), without_stop(error)
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
            reasons.append((1, without_stop(error)))

    def _judged(self, key: tuple, first: FirstStep, reasons: list[tuple[int, str]]) -> Chosen | None:
        """Return what is kept there if the run fits it; else add the reason why not."""
        if (chosen := self._kept.get(key)) is None:
            return None
        try:
            first.judge(chosen)
        except ValueError as error:
            reasons.append((1, without_stop(error)))
            return None
        return chosen

    def _trained(self, predictor: Predictor, first: FirstStep, reasons: list[tuple[int, str]]) -> Chosen | None:
        """Choose a predictor that was shipped, or is on the hub, if it fits; else add the reason why not."""
        if self._quality is not None:
            reasons.append((1, f"of {predictor!r} nothing was checked, got quality {self._quality!r}"))
            return None
        if (missing := self._missing.get(predictor.origin.tap)) is not None:
            reasons.append((1, without_stop(missing)))
            return None
        key = "trained", id(predictor), self._tap
        try:
            predictor.check_grid(times_in_order(first.times))
        except ValueError as error:
            reasons.append((1, without_stop(error)))
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
        """Choose the fallback, or raise NoneFits with the reason why the nearest predictor does not fit."""
        key = "fallback", self._tap
        if key not in self._kept and (chosen := fallen_back(self._terms, self._fallback, self._tap)) is not None:
            self._kept[key] = chosen
        if key in self._kept:
            return self._kept[key]
        nearest = min(reasons, key=lambda reason: reason[0])[1]
        took = next((f" ({one.name} took {one.took})" for one in self._calibrations if one.took), "")
        more = f" ({len(reasons) - 1} more fit less)" if len(reasons) > 1 else ""
        raise NoneFits(
            f"{nearest}{more}",
            "Call the pipeline as they were made, or calibrate with the arguments of this call: "
            f"lesa.calibrate(pipe, prompts, budget={self._budget or 8}, ...){took}, or say what such runs do instead: "
            f"{INSTEAD}.",
        )


def _shipped(pipe: Any, budget: int | None) -> tuple[list[Predictor], str]:
    """Return the predictors shipped for a pipeline, best first, and why there is none of those that are there."""
    found = shipped(pipe)
    fitting = [one for one in found if one.is_for(None, budget)]
    if found and not fitting:
        names = ", ".join(sorted({str(len(one.full)) for one in found}, key=int))
        return [], f"predictors shipped with it are for {names} full steps, got a budget of {budget}"
    return fitting, ""


def _apart(times: Sequence[float], calibration: Calibration) -> float:
    """Return how far a calibration's number of steps is from that of a run, as a factor's logarithm."""
    return abs(math.log(calibration.facts.steps / (len(times) - 1)))


def _other_times(calibration: Calibration, times: Sequence[float]) -> bool:
    return not matches(times_in_order(calibration.facts.times), times_in_order(times))
