"""Accelerate a pipeline: join its denoisers, its sampler and a plan."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from lesa import predictors
from lesa.host import data
from lesa.host.choice import INSTEAD, REFUSE, Named, NamedOrElse, ScheduleFor, Terms, own_schedules
from lesa.host.clock import LoopClock, PipelineClock
from lesa.host.denoiser import attach, compiled_from, denoisers_of, refuse_compiled
from lesa.host.executor import Executor, StreamOf
from lesa.host.found import Found
from lesa.host.intercept import mark_of
from lesa.host.streams import FIRST, hear
from lesa.host.summary import StreamSummary, Summary
from lesa.host.tap import OUTPUT, tap_of
from lesa.rows.detour import Detours
from lesa.rows.forecasters import Forecaster
from lesa.rows.levels import DATA
from lesa.rows.plan import Plan
from lesa.rows.row import Storage
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

__all__ = ["Run", "StreamSummary", "Summary", "accelerate", "denoisers_of", "disable", "enable"]

_lock = threading.RLock()


class Run:
    """An accelerated pipeline or denoiser; what `accelerate` returns. As a context manager it ends the acceleration."""

    def __init__(self, pipe: Any, names: Sequence[str], executor: Executor, check: Callable, verify: bool):
        self._pipe, self._names, self._executor = pipe, names, executor
        self._check, self._verify = check, verify
        self._passages: dict[str, Any] = {}
        self._attached: dict[str, tuple[nn.Module, Callable[[], None]]] = {}
        self._closed = False
        with ExitStack() as undo:
            undo.callback(self._detach)
            undo.callback(executor.clock.attach())
            if isinstance(executor.clock, PipelineClock):
                executor.clock.on_call = self._follow
                executor.clock.on_unheard = self._complain
            self._follow()
            self._undo = undo.pop_all()

    def at(self, step: int, stream: str = FIRST) -> None:
        """Say at which step, and in which stream, a denoising loop of one's own calls the denoiser next.

        A new run begins when the step falls, or when the call that began the present one is said again.

        Raises: ValueError if the grid has no such step; RuntimeError if a pipeline's sampler tells the step, or the
            acceleration has ended.
        """
        self._check_open()
        if not isinstance(self._executor.clock, LoopClock):
            raise RuntimeError("the pipeline's scheduler tells the step; run.at(...) is for loops without a pipeline.")
        self._executor.clock.set(step, stream)
        self._executor.name(stream)

    def plan(self, stream: str = FIRST) -> Plan:
        """Return the plan of a stream's newest run.

        Raises: LookupError if the stream has not run yet.
        """
        known = self._executor.plans
        if stream not in known:
            raise LookupError(f"plans are compiled as runs begin; so far of {sorted(known)}, not of {stream!r}.")
        return known[stream]

    @property
    def plans(self) -> list[Plan]:
        """The plans of the present run that a forecaster's rows are in: of the data prediction where that is forecast,
        once it is planned, else of every stream."""
        executor = self._executor
        if self.forecasts_data:
            return [executor.plans[DATA]] if DATA in executor.plans else []
        return [executor.plans[stream] for stream in self.streams]

    @property
    def forecasts_data(self) -> bool:
        """Tell whether the data prediction was forecast in a run so far."""
        return self._executor.data is not None

    @property
    def streams(self) -> tuple[str, ...]:
        """The streams found so far, in the order in which they first came."""
        return tuple(self._executor.done)

    @property
    def taps(self) -> tuple[Tap | str, ...]:
        """Where forecasts are made, or may be."""
        return self._executor.choice.taps

    def summary(self) -> Summary:
        """Return, per stream, what was done since the acceleration began."""
        found = Summary({name: replace(done, clamped=int(done.clamped)) for name, done in self._executor.done.items()})
        if self._executor.data is not None:
            found.data = replace(self._executor.data, clamped=int(self._executor.data.clamped))
            found.reason = self._executor.data_reason
        found.passed_by, at_sampler = self._executor.clock.passed_by, self._executor.done_at_sampler
        found.at_sampler = replace(at_sampler, clamped=int(at_sampler.clamped))
        for chosen, runs in self._executor.found.items():
            if chosen.label:
                found.chosen[chosen.label] = found.chosen.get(chosen.label, 0) + runs
            found.fallbacks += runs * chosen.is_fallback
        found.promise = "; ".join(dict.fromkeys(one.promise for one in self._executor.found if one.promise))
        return found

    def close(self) -> None:
        """Leave the denoisers as they were, and free the histories; does nothing the second time."""
        with _lock:
            self._closed = True
            self._undo.close()
        self._executor.forget()

    def _follow(self) -> None:
        """Attach to the denoisers that the pipeline has now: one may have been compiled, or replaced."""
        for name in self._names:
            module = self._pipe if isinstance(self._pipe, nn.Module) else getattr(self._pipe, name, None)
            attached, undo = self._attached.pop(name, (None, lambda: None))
            if module is attached and module is not None:
                self._attached[name] = module, undo
                continue
            undo()
            if isinstance(module, nn.Module):
                self._attached[name] = module, self._attach(name, module)

    def _attach(self, name: str, module: nn.Module) -> Callable[[], None]:
        choice = self._executor.choice
        with ExitStack() as undo:
            for tap in choice.taps:
                begin = partial(self._begin, tap, tap == choice.taps[-1], "" if name == self._names[0] else name)
                try:
                    undo.callback(self._attach_at(tap, module, begin))
                except ValueError as error:
                    choice.without(tap, error)
            undo.callback(hear(module, self._executor.within))
            mark = mark_of(module)
            assert mark is not None
            mark.run = self
            undo.callback(setattr, mark, "run", None)  # the mark stays where others watch the module, too
            return undo.pop_all().close

    def _attach_at(self, tap: Tap | str, module: nn.Module, begin: Callable) -> Callable[[], None]:
        inner = compiled_from(module)
        found = tap if isinstance(tap, Tap) else tap_of(inner, tap)
        if found.modules:
            refuse_compiled(module)
        self._check(inner, found)
        return attach(module, found, begin, verify=self._verify)

    def _begin(self, tap: Tap | str, outermost: bool, name: str, args: tuple, kwargs: dict) -> Any:
        """Hand the passage of a call to the tap that its run is at: the outermost tap is asked first."""
        if outermost:
            self._passages[name] = self._executor.begin(name, args, kwargs)
        return self._passages.pop(name, None) if self._executor.is_at(tap) else None

    def _detach(self) -> None:
        for _, undo in self._attached.values():
            undo()
        self._attached.clear()

    def _complain(self) -> None:
        warnings.warn(
            f"a {type(self._pipe).__name__} was called and none of its steps was skipped: its loop steps no "
            "scheduler that lesa listens to; accelerate its denoiser in a loop of your own (grid=...).",
            stacklevel=2,
        )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this acceleration has ended; call lesa.accelerate anew.")

    def __reduce_ex__(self, _protocol: Any) -> Any:
        raise TypeError(
            "an acceleration holds hooks of this process, and is neither copied nor pickled; copy or pickle the "
            "pipeline, which comes without, and accelerate that."
        )

    def __enter__(self) -> Run:
        self._check_open()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def accelerate(
    pipe: Any,
    forecaster: Forecaster | None = None,
    *,
    schedule: Schedule | None = None,
    budget: int | None = None,
    quality: str | None = None,
    hub: str | None = None,
    fallback: str | Forecaster = REFUSE,
    grid: Sequence[float] | Tensor | None = None,
    tap: Tap | str | None = None,
    history: str = "model",
    detours: Detours | None = None,
    of: str = "auto",
    strict: bool = False,
    denoisers: Sequence[str] | None = None,
    stream_of: StreamOf | None = None,
    check: bool = True,
    verify_tap: bool = False,
) -> Run:
    """Make a pipeline, or a denoiser in a loop of one's own, run on the full steps of a schedule only.

        with lesa.accelerate(pipe, lesa.Taylor(order=1), schedule=lesa.Schedule.paper(7)) as run:
            image = pipe("small red apple on blue, left").images[0]
        print(run.summary())

    It holds from the call on (`lesa.enable` is the same function) until the `with` block ends or `lesa.disable` is
    called; then the model is as it was. Without a schedule it is the forecaster's own.

    Without a forecaster either, what fits is found for each run at its first step: what was calibrated for these
    weights and such runs (`lesa.calibrate`, `lesa shelf`), else for others that differ in their times alone, whose rows
    are carried to these where they can be, else what is shipped beside the model, else what is in the
    repository `hub`; where nothing was made for these weights, a cautious default that needs no training, with a
    warning. `budget`, a number of full steps, or `quality`, 'psnr:40', 'ssim:0.97', 'lpips:0.1' or 'drift:-45' as it is
    promised of the mean over other calls, choose among the budgets that were calibrated.

    Where predictors are there, or one is named, and none fits a run (one of another number of steps, of another size,
    image to image, without guidance), that is an error unless `fallback` names what such runs do instead: 'full', every
    step; 'default', rows without training; or a forecaster. The summary counts them.

    All modules that the pipeline's loop calls are accelerated, under whatever names diffusers has for them; `denoisers`
    names others, and so does the pipeline (`pipe.denoisers = ("model",)`), to all functions. A module alone needs the
    `grid` of its loop, S + 1 falling times, and `run.at(step)` before each call.
    With `strict`, a forecast from fewer past features than it is made for is an error.

    `tap` is 'output', what the denoiser returns, of which nothing runs on skipped steps; 'norm', what enters the final
    norm, 'projection', what enters the last projection, or 'feature', the one of them that the paper takes for the
    model; or a `lesa.Tap`. Without one it is the predictor's own, or 'output'. With `verify_tap` the first full step at
    a tap within the denoiser runs twice, to see that the tap is right: ValueError if it is not.

    `history` is how past features are stored: as they are ('model'); the newest as it is and the others as differences
    of a byte an element ('int8', 'fp8'); or the same in the CPU's memory ('cpu', 'int8-cpu', 'fp8-cpu'). In each,
    features that no later step uses are not held.

    `detours` say at which full steps a run may turn out to be unusual, and which schedule it then goes on with (see
    `lesa.learn.planning.detours`). They need a forecaster that is not bound to one schedule.

    `of` is what rows combine: 'output', what the denoiser returns; 'data', what that says of the data, at the sampler;
    or 'auto', the data prediction where the sampler adds noise, with which outputs jump, and else the output. A
    predictor's rows are of what it was made for; those at a feature tap, with detours or of a module alone are never of
    the data prediction.
    `run.summary()` says what was forecast, and `run.plan("data")` is the plan.

    Calls of one step are told apart by the names that a pipeline gives them, else by the conditioning that they bring;
    `stream_of` may name them from a call's arguments and named arguments. `run.streams` says what was found.

    A pipeline's runs are judged at their first step: a sampler that adds noise is refused unless the data prediction is
    forecast, or outputs by reuse, and so is other guidance than a predictor was trained under, if it says which. With
    `check=False` they are not, and what is forecast then may be far off. Calls of a denoiser that belong to no run of
    the pipeline run in full. Another cache within the denoiser, such as diffusers' `enable_cache`, acts in full steps,
    and counts only them.

    Raises: ValueError if the schedule, the grid or the tap is missing or does not fit, if there is no such history, if
        `of` is none of its values or not for this forecaster, or if a denoiser is accelerated already; LookupError if
        a schedule is given and no predictor is shipped for it. The pipeline's first call raises ValueError, before its
        first step is done, if its grid, schedule, streams or guidance do not fit the predictor, or any of those found,
        its sampler adds noise, or it does not say what outputs say of the data where that is forecast. A skipped step
        raises RuntimeError if a block runs in it all the same, or an input of it requires a gradient.
    """
    alone = isinstance(pipe, nn.Module)
    if alone != (grid is not None):
        raise ValueError("grid= is for a transformer in a loop of your own, and needed there; a pipeline has its own.")
    names = denoisers_of(pipe, denoisers)
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ValueError(f"a schedule is a lesa.Schedule, got {schedule!r}; lesa.Schedule.parse reads a text.")
    terms = Terms(of, strict, check, detours, alone)
    storage = Storage.parse(history)
    clock = PipelineClock(pipe) if grid is None else LoopClock(grid)
    own: predictors.Predictor | None = None
    choice: Named | Found
    if forecaster is None and not alone and schedule is None and not detours:
        data.check(of, trained=False, alone=False, at_output=tap in (None, OUTPUT, Tap()), detours=None)
        choice = Found(pipe, names, terms, budget=budget, quality=quality, hub=hub, fallback=fallback, tap=tap)
    else:
        _check_named(quality, hub, fallback, alone or bool(detours))
        forecaster = predictors.shipped_for(pipe, schedule, budget) if forecaster is None else forecaster
        if isinstance(forecaster, type) or not hasattr(forecaster, "row"):
            raise ValueError(f"a forecaster is an object such as lesa.Taylor(order=1), got {forecaster!r}.")
        own = forecaster if isinstance(forecaster, predictors.Predictor) else None
        tap = tap or (own.origin.tap if own else OUTPUT)
        chosen = terms.choose(forecaster, _schedule_for(forecaster, schedule, budget), tap)
        chosen.advice = f"or say what such runs do: {INSTEAD}" if own and not (alone or detours) else ""
        choice = Named(chosen) if fallback == REFUSE else NamedOrElse(chosen, terms, fallback)
    executor = Executor(clock, choice, storage, detours or {}, stream_of)
    with _lock:
        check_free(pipe, names)
        fits = own.check_model if own else lambda _module, _tap: None
        return Run(pipe, names, executor, fits, verify_tap)


enable = accelerate
"""The same function, for what is to hold until `lesa.disable`, without a `with` block."""


def disable(pipe: Any) -> None:
    """Leave an accelerated pipeline or denoiser as it was; does nothing if it is not accelerated."""
    for module in [pipe] if isinstance(pipe, nn.Module) else list(vars(pipe).values()):
        run = _run_of(module)
        if run is not None:
            run.close()


def check_free(pipe: Any, names: Sequence[str]) -> None:
    """Raise ValueError if one of a pipeline's denoisers is accelerated already."""
    if any(_run_of(module) for module in _modules(pipe, names)):
        raise ValueError("a transformer is accelerated once, but this one is already; call lesa.disable first.")


def _modules(pipe: Any, names: Sequence[str]) -> list[Any]:
    return [pipe] if isinstance(pipe, nn.Module) else [getattr(pipe, name) for name in names]


def _run_of(module: Any) -> Run | None:
    mark = mark_of(module)
    return mark.run if mark is not None and mark.handlers.get("__call__") else None


def _check_named(quality: str | None, hub: str | None, fallback: str | Forecaster, bound: bool) -> None:
    if quality is not None or hub is not None:
        raise ValueError(
            "quality= and hub= are for predictors that are found for each run of a pipeline; leave them out with a "
            "forecaster, a schedule or detours of your own, and for a module alone."
        )
    if bound and fallback != REFUSE:
        raise ValueError(
            "fallback= is for the runs of a pipeline that a forecaster does not fit; leave it out for a module alone "
            "and with detours."
        )


def _schedule_for(forecaster: Forecaster, schedule: Schedule | None, budget: int | None) -> ScheduleFor:
    """Find who says which steps of a run are full: the caller, or a predictor, once it sees the grid."""
    own = getattr(forecaster, "schedule", None)
    if schedule is not None and budget is not None:
        raise ValueError("a schedule has its number of full steps; pass schedule= or budget=, not both.")
    if schedule is None and (schedule_for := own_schedules(forecaster, budget)) is not None:
        if isinstance(forecaster, predictors.Predictor):
            forecaster.schedule_for(
                forecaster.grid, budget, forecaster.begins[0]
            )  # an error now rather than in the run
        return schedule_for
    if budget is not None:
        raise ValueError(f"a budget picks among a predictor's schedules, got {forecaster!r}; pass a schedule instead.")
    chosen = schedule or own
    if chosen is None:
        raise ValueError(
            f"{forecaster!r} does not say which steps are full; pass a schedule, e.g. schedule=lesa.Schedule.paper(7)."
        )
    return lambda _times, _start: chosen
