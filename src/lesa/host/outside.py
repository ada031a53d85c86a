"""Runs in a host that is no pipeline of diffusers: a program with a loop, samplers and guidance of its own.

Such a host knows its times before the first step, and what makes a step: calls of a denoiser that each give one output
or more. It says so, and is told which calls to make. What a call gave it hands over, and of those that it does not make
it gets forecasts instead.

    run = OutsideRun(times)
    for step in range(len(times) - 1):
        run.at(step)
        if run.wants(("cond", "uncond"), kind):
            outputs = run.keep(denoise(latents, step))
        else:
            outputs = run.forecast()
        ...
        if step == 0:
            run.follow(choose(facts, weights, asked))
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from torch import Tensor

from lesa.host.at_sampler import AtSampler
from lesa.host.choice import FULL, REFUSE, Chosen
from lesa.host.executor import StreamRun
from lesa.host.summary import SamplerSummary, StreamSummary, Summary
from lesa.predictors import Predictor
from lesa.predictors.calibration import Calibration
from lesa.predictors.facts import Facts, Mixture
from lesa.predictors.shelf import Shelf
from lesa.rows.default import Default
from lesa.rows.forecasters import Forecaster, Reuse
from lesa.rows.grid import times_in_order
from lesa.rows.guidance import Guidance
from lesa.rows.levels import DATA
from lesa.rows.row import Storage
from lesa.rows.schedule import Schedule

__all__ = ["FULL", "REFUSE", "Asked", "OutsideRun", "choose"]


class OutsideRun:
    """One run on these S + 1 times: which of its calls are made, and forecasts of the others.

    Calls of one step are told apart by their place in it. A call begins a history anew, with a full step, where it did
    not come a step before or is of another `kind`: of other shapes, or of conditions that act only now. Until it is
    told what to `follow`, after its first step, all of its calls are made. With `data`, outputs are data predictions,
    as they are to be where a sampler adds noise, and their rows are asked for under that name.

    Raises: ValueError if the times do not fall from the first to the last.
    """

    def __init__(self, times: Sequence[float], *, data: bool = False, storage: Storage | None = None):
        self.times = tuple(times_in_order(times).tolist())
        self._rows_of = DATA if data else None
        self.done: dict[str, StreamSummary] = {}
        self.chosen: Chosen | None = None
        self.step, self._place, self._storage = -1, -1, storage or Storage()
        self._calls: dict[int, _Call] = {}
        self._done_at_sampler = SamplerSummary()
        self._at_sampler = AtSampler(self._storage, self._done_at_sampler)

    def at(self, step: int) -> None:
        """Say which step the next calls are of."""
        self.step, self._place = step, -1

    def wants(self, names: Sequence[str], kind: Hashable) -> bool:
        """Tell whether the next call of this step is to be made; `names` are those of its outputs, one stream each."""
        self._place += 1
        call = self._calls.get(self._place)
        fresh = call is None or call.kind != kind or call.step != self.step - 1
        if call is None or fresh:
            call = self._calls[self._place] = _Call(kind, self.step, self._stream_runs(names))
            if self.chosen is not None:
                call.follow(self.chosen, self.times, self._rows_of)
        return call.enter(self.step) or fresh

    def _stream_runs(self, names: Sequence[str]) -> list[StreamRun]:
        call = f"call {self._place + 1} " if self._place else ""
        found = [f"{call}{name}" for name in names]
        for name in found:
            self.done.setdefault(name, StreamSummary(runs=1))
        return [StreamRun(name, self._storage, self.done[name], self.step) for name in found]

    def keep(self, outputs: Sequence[Tensor]) -> None:
        """Take what the call gave that was asked about last."""
        self._calls[self._place].keep(outputs)

    def forecast(self) -> list[Tensor]:
        """Return what stands for the outputs of the call that was asked about last."""
        return [stream_run.forecast() for stream_run in self._calls[self._place].stream_runs]

    def handed(self, output: Tensor, latents: Tensor) -> Tensor:
        """Return what the sampler is handed at this step for what guidance made of the outputs; the same tensor where
        nothing acts.

        Solved rows add a part of the run's first latents, and correct full steps: after guidance, of what outputs are.
        A host asks at every step, from the first one on, after it was told what to `follow`.

        Raises: RuntimeError if latents or outputs have not kept their shape.
        """
        acting = [call for call in self._calls.values() if call.planned and call.step == self.step]
        planned = [one.plan for call in acting for one in call.stream_runs]
        plan = min(planned, key=lambda plan: plan.start, default=None)  # a later one knows of no step before
        if plan is None or not (plan.acts_at_sampler or self._at_sampler.began):
            return output
        if self.step == 0:
            self._at_sampler.begin(latents)
        among = frozenset((id(call), call.began) for call in acting)
        return self._at_sampler.handed(plan, self.step, output, latents, among=among)

    def follow(self, chosen: Chosen) -> None:
        """Take what to forecast with, after the first step.

        Raises: ValueError if its schedule or its rows do not fit the run.
        """
        self.chosen = chosen
        for call in self._calls.values():
            call.follow(chosen, self.times, self._rows_of)

    def free(self) -> None:
        """Let go of what was kept: the run is over."""
        self._calls, self._at_sampler = {}, AtSampler(self._storage)

    def summary(self) -> Summary:
        """Return what was done so far, of each stream."""
        found = Summary({name: replace(one, clamped=int(one.clamped)) for name, one in self.done.items()})
        found.at_sampler = replace(self._done_at_sampler, clamped=int(self._done_at_sampler.clamped))
        if self.chosen is not None:
            found.chosen, found.promise = {self.chosen.label: 1}, self.chosen.promise
            found.fallbacks = int(self.chosen.is_fallback)
        return found


class _Call:
    """Calls at one place of their steps, as long as they are of a kind: a stream for each of their outputs."""

    def __init__(self, kind: Hashable, began: int, stream_runs: list[StreamRun]):
        self.kind, self.step, self.began, self.stream_runs = kind, began, began, stream_runs
        self.planned = False
        self._first: Sequence[Tensor] = ()

    def enter(self, step: int) -> bool:
        self.step = step
        if not self.planned:
            return True
        for stream_run in self.stream_runs:
            stream_run.enter(step)
        return any(stream_run.full for stream_run in self.stream_runs)

    def keep(self, outputs: Sequence[Tensor]) -> None:
        if not self.planned:
            self._first = outputs
            return
        for stream_run, output in zip(self.stream_runs, outputs, strict=True):
            stream_run.count_full()
            stream_run.keep(output)

    def follow(self, chosen: Chosen, times: tuple[float, ...], rows_of: str | None) -> None:
        """Plan, and keep what came before there was a plan."""
        for stream_run in self.stream_runs:
            stream_run.follow(chosen.plan(rows_of or stream_run.name, 0, self.began, times))
        self.planned = True
        if self._first:
            self.enter(self.step)
            self.keep(self._first)
            self._first = ()


# --- what is forecast with


@dataclass(frozen=True)
class Asked:
    """What whoever accelerates a host's runs asks for.

    `forecaster` needs no training and says which steps are full, or `schedule` does; `predictor` was read from files.
    Without either, what was calibrated is looked up on the `shelf`. `budget` and `quality` choose among what was
    calibrated, and a budget is that of the default, too. `fallback` says what becomes of a run that no predictor fits:
    'refuse' or 'full'.
    """

    forecaster: Forecaster | None = None
    schedule: Schedule | None = None
    predictor: Predictor | Calibration | None = None
    budget: int | None = None
    quality: str | None = None
    fallback: str = REFUSE
    shelf: Shelf = field(default_factory=Shelf)


def choose(facts: Facts, weights: str, asked: Asked) -> Chosen:
    """Choose what a run is forecast with that is known by these facts, of a denoiser whose weights have a fingerprint.

    Where the sampler adds noise only rows of the data prediction fit, and where it adds none only rows of outputs.

    Raises: ValueError if nothing that was asked for fits the run, and there is no fallback.
    """
    if asked.forecaster is not None:
        return _untrained(facts, asked.forecaster, asked)
    try:
        found = _named(facts, asked) if asked.predictor is not None else _on_the_shelf(facts, weights, asked)
    except ValueError as error:
        if asked.fallback != FULL:
            raise
        full = Schedule.at(range(facts.steps))
        chosen = _made(facts, Reuse(), full, f"fallback: every step full, as {str(error).rstrip('.')}")
        chosen.is_fallback = True
        return chosen
    return found or _default(facts, asked)


def _on_the_shelf(facts: Facts, weights: str, asked: Asked) -> Chosen | None:
    """Choose the newest calibration that fits; None if none is of these weights."""
    reasons: list[tuple[int, str]] = []
    for calibration in asked.shelf.calibrations(weights):
        if not (differences := facts.differences(calibration.facts)):
            return _calibrated(facts, calibration, asked)
        reasons.append((len(differences), f"{calibration.name} is for other runs ({'; '.join(differences)})"))
    if not reasons:
        return None
    raise ValueError(
        f"there are predictors for these weights, but none fits this run: {min(reasons)[1]}. Sample as they were made, "
        "or calibrate for runs like this one."
    )


def _calibrated(facts: Facts, calibration: Calibration, asked: Asked) -> Chosen:
    budget = calibration.budget_for(asked.budget, asked.quality)
    chosen = _trained(facts, calibration.predictor(budget), f"calibrated: {calibration.name}")
    chosen.promise = calibration.promise(budget)
    return chosen


def _named(facts: Facts, asked: Asked) -> Chosen:
    """Choose what the caller read from files, if it fits: of that, weights and sampler are the caller's to know."""
    if isinstance(known := asked.predictor, Calibration):
        same = {name: getattr(known.facts, name) for name in ("sampler", "streams", "shape")}
        if differences := replace(facts, **same).differences(known.facts):
            raise ValueError(f"{known.name} is for other runs ({'; '.join(differences)}); sample as it was made.")
        return _calibrated(facts, known, asked)
    assert isinstance(known, Predictor)
    if asked.quality is not None:
        raise ValueError(f"of {known!r} nothing was checked, got quality {asked.quality!r}; name a budget, or nothing.")
    return _trained(facts, known, f"trained: {known!r}", asked.budget)


def _trained(facts: Facts, predictor: Predictor, label: str, budget: int | None = None) -> Chosen:
    """Choose a predictor.

    Raises: ValueError if it is not for the outputs of such a run.
    """
    origin = predictor.origin
    if facts.noise and predictor.of != DATA:
        raise ValueError(
            f"{predictor!r} is for samplers that add no noise, got {facts.sampler}, which does as it steps; take one "
            "that does not, or forecast without training."
        )
    if predictor.of == DATA and not facts.noise:
        raise ValueError(
            f"{predictor!r} is for samplers that add noise, got {facts.sampler}, which adds none; take one that does, "
            "or forecast without training."
        )
    if origin.tap.modules:
        raise ValueError(
            f"what is forecast here is the output, but {predictor!r} is for what enters {origin.tap.modules[0]!r}; "
            "take one that taps the output."
        )
    _check_guidance(facts, predictor)
    chosen = Chosen(predictor, lambda times, start: predictor.schedule_for(times, budget=budget, start=start))
    chosen.schedule_for(facts.times, facts.start)  # an error now rather than in the run
    chosen.label = label
    return chosen


def _check_guidance(facts: Facts, predictor: Predictor) -> None:
    said, found = predictor.origin.training.get("guidance"), facts.guidance
    if said is None or found is None:
        return
    trained = Guidance(predictor.origin.streams, said["scale"], said["rescaled"])
    known = Mixture(tuple(trained.weights.tolist()), 0.0, found.apart, trained.rescaled)
    if not found.is_like(known):
        raise ValueError(
            f"{predictor!r} was trained under guidance of {known}, got {found}; sample with that, or take another."
        )


def _default(facts: Facts, asked: Asked) -> Chosen:
    """Choose rows without training."""
    if asked.quality is not None:
        raise ValueError(
            f"a quality chooses among calibrated predictors, got {asked.quality!r} and none for these weights; "
            "calibrate them."
        )
    warnings.warn(
        "no predictor was made for these weights: steps are forecast without training, and few are skipped. Calibrate "
        "for more.",
        stacklevel=2,
    )
    return _untrained(facts, Default(), asked)


def _untrained(facts: Facts, forecaster: Forecaster, asked: Asked) -> Chosen:
    schedule = asked.schedule
    if schedule is None:
        schedule_for = getattr(forecaster, "schedule_for", partial(Default().schedule_for))
        schedule = schedule_for(facts.times, start=facts.start, budget=asked.budget)
    return _made(facts, forecaster, schedule, f"without training: {forecaster!r}, {schedule}")


def _made(facts: Facts, forecaster: Forecaster, schedule: Schedule, label: str) -> Chosen:
    chosen = Chosen(forecaster, lambda _times, _start: schedule)
    chosen.label = label + (", of the data prediction, as the sampler adds noise" if facts.noise else "")
    return chosen
