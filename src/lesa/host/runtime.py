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
from lesa.host.clock import LoopClock, PipelineClock
from lesa.host.conditions import Judge, Noise
from lesa.host.denoiser import attach, compiled_from, refuse_compiled
from lesa.host.executor import Executor, ScheduleFor, StreamOf
from lesa.host.intercept import mark_of
from lesa.host.streams import FIRST, hear
from lesa.host.summary import StreamSummary, Summary
from lesa.host.tap import OUTPUT, tap_of
from lesa.rows.detour import Detours
from lesa.rows.forecasters import Forecaster
from lesa.rows.plan import Plan
from lesa.rows.row import Storage
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

__all__ = ["Run", "StreamSummary", "Summary", "accelerate", "denoisers_of", "disable", "enable"]

DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "prior", "unet", "unet_2")
"""What the modules that a pipeline's loop calls are named in diffusers."""
_lock = threading.RLock()


class Run:
    """An accelerated pipeline or denoiser; what `accelerate` returns. As a context manager it ends the acceleration."""

    def __init__(
        self, pipe: Any, names: Sequence[str], executor: Executor, tap: Tap | str, check: Callable, verify: bool
    ):
        self._pipe, self._names, self._executor = pipe, names, executor
        self._tap, self._check, self._verify = tap, check, verify
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
    def streams(self) -> tuple[str, ...]:
        """The streams found so far, in the order in which they first came."""
        return tuple(self._executor.done)

    def summary(self) -> Summary:
        """Return, per stream, what was done since the acceleration began."""
        found = Summary({name: replace(done, clamped=int(done.clamped)) for name, done in self._executor.done.items()})
        if self._executor.data is not None:
            found.data = replace(self._executor.data, clamped=int(self._executor.data.clamped))
            found.reason = self._executor.data_reason
        found.passed_by = self._executor.clock.passed_by
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
        inner = compiled_from(module)
        tap = self._tap if isinstance(self._tap, Tap) else tap_of(inner, self._tap)
        if tap.modules:
            refuse_compiled(module)
        self._check(inner, tap)
        first = name == self._names[0]
        with ExitStack() as undo:
            begin = partial(self._executor.begin, "" if first else name)
            undo.callback(attach(module, tap, begin, verify=self._verify))
            undo.callback(hear(module, self._executor.within))
            mark = mark_of(module)
            assert mark is not None
            mark.run = self
            return undo.pop_all().close

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
    called; then the model is as it was. Without a forecaster the predictor shipped for the pipeline is taken; without
    a schedule, the forecaster's own. `budget` is a number of full steps: it picks the predictor shipped, or its
    schedule, that has so many (`lesa.accelerate(pipe, budget=6)`).

    All modules that the pipeline's loop calls are accelerated, under whatever names diffusers has for them; `denoisers`
    names others. A module alone needs the `grid` of its loop, S + 1 falling times, and `run.at(step)` before each call.
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
    or 'auto', the data prediction where the sampler adds noise, with which outputs jump, and else the output. A trained
    predictor's rows, and those at a feature tap, with detours or of a module alone, are never of the data prediction.
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
        no predictor is shipped for the pipeline. The pipeline's first call raises ValueError, before its first step is
        done, if its grid, schedule, streams or guidance do not fit the predictor, its sampler adds noise, or it does
        not say what outputs say of the data where that is forecast. A skipped step raises RuntimeError if a block runs
        in it all the same, or an input of it requires a gradient.
    """
    alone = isinstance(pipe, nn.Module)
    if alone != (grid is not None):
        raise ValueError("grid= is for a transformer in a loop of your own, and needed there; a pipeline has its own.")
    names = denoisers_of(pipe, denoisers)
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ValueError(f"a schedule is a lesa.Schedule, got {schedule!r}; lesa.Schedule.parse reads a text.")
    forecaster = predictors.shipped_for(pipe, schedule, budget) if forecaster is None else forecaster
    if isinstance(forecaster, type) or not hasattr(forecaster, "row"):
        raise ValueError(f"a forecaster is an object such as lesa.Taylor(order=1), got {forecaster!r}.")
    schedule_for = _schedule_for(forecaster, schedule, budget)
    own = forecaster if isinstance(forecaster, predictors.Predictor) else None
    storage = Storage.parse(history)
    clock = PipelineClock(pipe) if grid is None else LoopClock(grid)
    tap, noise = tap or (own.origin.tap if own else OUTPUT), Noise()
    at_output = tap in (OUTPUT, Tap())
    may = data.check(of, trained=bool(own), alone=alone, at_output=at_output, detours=detours)
    judge = Judge(forecaster, noise) if check else None
    prediction = data.DataPrediction(of, noise) if may else None
    executor = Executor(clock, forecaster, schedule_for, strict, storage, detours or {}, stream_of, judge, prediction)
    with _lock:
        if any(_run_of(module) for module in _modules(pipe, names)):
            raise ValueError("a transformer is accelerated once, but this one is already; call lesa.disable first.")
        fits = own.check_model if own else lambda _module, _tap: None
        return Run(pipe, names, executor, tap, fits, verify_tap)


enable = accelerate


def disable(pipe: Any) -> None:
    """Leave an accelerated pipeline or denoiser as it was; does nothing if it is not accelerated."""
    for module in [pipe] if isinstance(pipe, nn.Module) else list(vars(pipe).values()):
        run = _run_of(module)
        if run is not None:
            run.close()


def denoisers_of(pipe: Any, named: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of the modules that a pipeline's loop calls; of a module alone, one for it.

    Raises: ValueError if it has none, or not those named, or no scheduler that tells its steps.
    """
    if isinstance(pipe, nn.Module):
        return (DENOISERS[0],)
    names = tuple(name for name in named or DENOISERS if isinstance(getattr(pipe, name, None), nn.Module))
    if not names or (named and len(names) < len(named)):
        modules = sorted(name for name, part in getattr(pipe, "components", {}).items() if isinstance(part, nn.Module))
        raise ValueError(
            f"a pipeline with a transformer, or a module alone, is accelerated; got a {type(pipe).__name__} with the "
            f"modules {', '.join(modules) or 'none'}; name those that its loop calls: denoisers=(...)."
        )
    scheduler = getattr(pipe, "scheduler", None)
    if not (hasattr(scheduler, "step") and hasattr(scheduler, "set_timesteps")):
        raise ValueError(
            f"a pipeline's scheduler tells its steps, but a {type(pipe).__name__} has none; accelerate its "
            f"{names[0]} in a loop of your own: lesa.accelerate(pipe.{names[0]}, ..., grid=grid)."
        )
    return names


def _modules(pipe: Any, names: Sequence[str]) -> list[Any]:
    return [pipe] if isinstance(pipe, nn.Module) else [getattr(pipe, name) for name in names]


def _run_of(module: Any) -> Run | None:
    mark = mark_of(module)
    return mark.run if mark is not None and mark.handlers.get("__call__") else None


def _schedule_for(forecaster: Forecaster, schedule: Schedule | None, budget: int | None) -> ScheduleFor:
    """Find who says which steps of a run are full: the caller, or a predictor, once it sees the grid."""
    own = getattr(forecaster, "schedule", None)
    if schedule is not None and budget is not None:
        raise ValueError("a schedule has its number of full steps; pass schedule= or budget=, not both.")
    if schedule is None and isinstance(forecaster, predictors.Predictor):
        forecaster.schedule_for(forecaster.grid, budget)  # an error now rather than in the run
        return lambda times, start: forecaster.schedule_for(times, budget, start)
    if budget is not None:
        raise ValueError(f"a budget picks among a predictor's schedules, got {forecaster!r}; pass a schedule instead.")
    chosen = schedule or own
    if chosen is None:
        raise ValueError(
            f"{forecaster!r} does not say which steps are full; pass a schedule, e.g. schedule=lesa.Schedule.paper(7)."
        )
    return lambda _times, _start: chosen
