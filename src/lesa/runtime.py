"""Accelerate a pipeline: join tap, plan and history, per stream."""

from __future__ import annotations

import operator
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from lesa import grid as grids
from lesa import plan as plans
from lesa import predictor as predictors
from lesa.caller import Caller, watch_calls
from lesa.conditions import Watch
from lesa.detour import Detour, Detours
from lesa.forecasters import Forecaster
from lesa.plan import Plan
from lesa.row import History, Row, Storage
from lesa.schedule import Schedule
from lesa.tap import Tap, attach, hear_streams, tap_of

DEFAULT_STREAM = "cond"
ScheduleFor = Callable[[Sequence[float], int], Schedule]
"""(times of the grid, first step of the run) -> which steps are full"""
PLANS_KEPT = 64

_OWN = (
    "call the pipeline that was accelerated, set its scheduler's time steps anew, or, for a loop of your own, "
    "lesa.accelerate(transformer, ..., grid=grid)."
)


class SchedulerClock:
    """Reads run, step and grid from a pipeline's scheduler; a run lasts until its call ends or sigmas are set anew.

    `run` is what differs between runs, None while none is known to go on.
    """

    def __init__(self, pipe: Any):
        self._pipe = pipe
        self.run: object = None
        self._sigmas: object = None  # of the newest run, whether it goes on or not
        self._caller: Caller | None = None

    def now(self) -> tuple[object, int]:
        """Return an object that differs between runs, and the step.

        Raises: RuntimeError if the scheduler is in no run, or the call is none of the run that it is in.
        """
        scheduler = self._pipe.scheduler
        step = grids.step_of(scheduler)
        if step is None and getattr(scheduler, "num_inference_steps", None):
            step = 0  # the pipeline has set its sigmas and says nothing of where it begins
        if step is None or step > (last := len(scheduler.sigmas) - 2):
            self.end()
        elif self._sigmas is not scheduler.sigmas:
            self.run = self._sigmas = scheduler.sigmas
            self._caller = Caller(step, last)
        if step is None or self._caller is None:
            raise RuntimeError(
                f"the accelerated transformer was called while its pipeline's scheduler is in no run; {_OWN}"
            )
        if self._caller.thread == threading.get_ident() and not self._caller.admits(step):
            if self._caller.over():
                self.end()
            raise RuntimeError(
                "a run's calls of the accelerated transformer come from one loop, got one from elsewhere at step "
                f"{step}; if that run was stopped it does not go on: {_OWN}"
            )
        return self.run, step

    def grid(self) -> Tensor:
        return grids.from_scheduler(self._pipe.scheduler)

    def end(self) -> None:
        """Let the run be over, wherever the scheduler is."""
        self.run = self._caller = None


class LoopClock:
    """Is told the step by a loop of one's own; a run lasts until the step falls or its first one is said again."""

    def __init__(self, grid: Sequence[float] | Tensor):
        self._grid = grids.validate(grid)
        self._step: int | None = None
        self._first: tuple[int, str] | None = None
        self.run: object = None

    def set(self, step: int, stream: str) -> None:
        step, steps = operator.index(step), len(self._grid) - 1
        if not 0 <= step < steps:
            raise ValueError(f"the grid has steps 0 to {steps - 1}, got step {step}.")
        if self._step is None or step < self._step or (step, stream) == self._first:
            self.run, self._first = object(), (step, stream)
        self._step = step

    def now(self) -> tuple[object, int]:
        if self._step is None:
            raise RuntimeError("the loop says which step it is at before each call of the transformer: run.at(step).")
        return self.run, self._step

    def grid(self) -> Tensor:
        return self._grid


@dataclass
class StreamSummary:
    """What one stream did in all runs so far.

    Steps are counted over all runs; `short_rows` are the forecasts that had fewer past features than they are made for;
    `detours` the runs that left their schedule because they were unusual; `clamped` the forecasts that were beyond the
    range of their dtype (65504 in float16) somewhere, and were brought back to it; `bytes_held` is the memory on the
    transformer's device of the newest run's history, freed as the run ends; `forecast_seconds` is host time (a GPU may
    still be at work after it).
    """

    runs: int = 0
    full_steps: int = 0
    skipped_steps: int = 0
    short_rows: int = 0
    detours: int = 0
    clamped: int = 0
    bytes_held: int = 0
    forecast_seconds: float = 0.0

    @property
    def step_ratio(self) -> float:
        """Steps for each full step."""
        return (self.full_steps + self.skipped_steps) / max(self.full_steps, 1)


class Summary(dict[str, StreamSummary]):
    """Stream name to `StreamSummary`; prints as a table."""

    def __str__(self) -> str:
        if not self:
            return "no run yet"
        lines = ["stream      runs    full  skipped  step ratio       held  in forecasts"]
        for name, s in self.items():
            lines.append(
                f"{name:<10} {s.runs:>5} {s.full_steps:>7} {s.skipped_steps:>8} {s.step_ratio:>11.2f} "
                f"{_bytes(s.bytes_held):>10} {s.forecast_seconds:>11.3f} s"
            )
            if s.short_rows:
                lines.append(f"{'':<10} {s.short_rows} forecasts had fewer past features than they are made for")
            if s.detours:
                lines.append(f"{'':<10} {s.detours} runs were unusual and took a detour")
            if s.clamped:
                lines.append(f"{'':<10} {s.clamped} forecasts were beyond the range of their dtype and clamped to it")
        return "\n".join(lines)


class Stream:
    """One stream: the plan and history of its present run, and what it has done so far."""

    def __init__(self, name: str, storage: Storage):
        self.name = name
        self.storage = storage
        self.run: object = None
        self.plan: Plan
        self.history: History | None = None
        self.done = StreamSummary()
        self._live: dict[int, tuple[int, ...]] = {}
        self._slots = 0
        self._step = -1
        self._thread = 0
        self._clamped: Tensor | int = 0  # stays on its device until it is asked for

    @property
    def step(self) -> int:
        """The step that the stream is at."""
        return self._step

    def start(self, run: object, plan: Plan, others: Sequence[Plan] = ()) -> None:
        """Begin a run, in the thread that calls; it may go on with one of the other plans."""
        self.run, self.plan = run, plan
        lives = [one.live(self.storage.of_differences) for one in (plan, *others)]
        self._live, self._slots = lives[0], max(len(held) for live in lives for held in live.values())
        self._step = plan.start - 1
        self._thread = threading.get_ident()
        self.done.runs += 1
        if self.history is not None:
            self.history.clear()

    def end(self) -> None:
        """Forget the run, and free its history."""
        self.run = self.history = None

    def summary(self) -> StreamSummary:
        """Return what was done so far."""
        return replace(self.done, clamped=int(self._clamped))

    def follow(self, plan: Plan) -> None:
        """Go on with another plan, that is the same up to here."""
        self.plan, self._live = plan, plan.live(self.storage.of_differences)
        self.done.detours += 1

    def error(self, row: Row, past: Sequence[int], feature: Tensor) -> float:
        """Return how far a row's forecast is from the feature that is known: |forecast - feature| / |feature|."""
        assert self.history is not None, "a run begins with a full step"
        forecast = self.history.forecast(past, row.coefficients.tolist(), float(row.offset), torch.float32)
        return float((forecast - feature.float()).norm() / feature.float().norm())

    def enter(self, step: int) -> bool:
        """Go on to `step`; tells whether it is full.

        Raises: RuntimeError if it is not the one that comes next, or the run is another thread's.
        """
        self._check_thread()
        if step == self._step:
            raise RuntimeError(
                f"the transformer was called twice at step {step} of stream {self.name!r}; calls of one step are told "
                "apart by names alone: transformer.cache_context(name) in a pipeline, run.at(step, name) in a loop."
            )
        if step != self._step + 1:
            raise RuntimeError(f"stream {self.name!r} must go on at step {self._step + 1}, got step {step}.")
        self._step = step
        return step not in self.plan.rows

    def exchange(self, feature: Tensor) -> Tensor:
        """Keep the feature of a full step and pass it on; on a skipped step return the forecast in its place.

        The feature has the dtype that it has in a full step, and so has the forecast. After the last step the history
        is freed.

        Raises: RuntimeError if the feature changed its shape or device since the run began, or the run has ended or is
            another thread's.
        """
        self._check_thread()
        skipped = self._step in self.plan.rows
        self.done.full_steps += not skipped
        if skipped:
            feature = self._forecast(feature)
        elif self.plan.rows:
            self._remember(self._history_for(feature), feature)
        if self._step == self.plan.steps - 1:
            self.history = None
        return feature

    def _forecast(self, feature: Tensor) -> Tensor:
        began = time.perf_counter()
        history = self.history
        assert history is not None, "a run begins with a full step"
        forecast = history.forecast(*self.plan.rows[self._step], feature.dtype)
        if forecast.shape != feature.shape or forecast.device != feature.device:
            raise self._changed(feature)
        if self.plan.remembers_forecasts:
            self._remember(history, forecast)
        self.done.skipped_steps += 1
        self._clamped = self._clamped + history.clamped
        self.done.short_rows += self._step in self.plan.truncated
        self.done.forecast_seconds += time.perf_counter() - began
        return forecast

    def _remember(self, history: History, feature: Tensor) -> None:
        """Keep a feature if a later row combines it, and in any case no others than such."""
        live = self._live[self._step]
        history.keep(live)
        if self._step in live:
            history.append(self._step, feature)
        self.done.bytes_held = history.nbytes

    def _history_for(self, feature: Tensor) -> History:
        if self._step == self.plan.start and not (self.history and self.history.fits(self._slots, feature)):
            self.history = None  # gone before the next one is made
            self.history = self.storage.history(self._slots, like=feature)
        if self.history is None or not self.history.takes(feature):
            raise self._changed(feature)
        return self.history

    def _changed(self, feature: Tensor) -> RuntimeError:
        return RuntimeError(
            f"a feature keeps its shape and device during a run, got {tuple(feature.shape)}, {feature.device} at step "
            f"{self._step} of stream {self.name!r}; start the run anew."
        )

    def _check_thread(self) -> None:
        if self.run is None:
            raise RuntimeError(
                f"the run of stream {self.name!r} ended during a call of the transformer; start it anew."
            )
        if self._thread != threading.get_ident():
            raise RuntimeError(
                f"stream {self.name!r} is in a run of another thread; give each thread a pipeline, with a transformer, "
                "of its own."
            )


class _Here(threading.local):
    """What one thread is at: the name that it said last, and the stream whose feature is to pass."""

    name = DEFAULT_STREAM
    stream: Stream


class Executor:
    """Applies plans: listens at the tap, and finds the stream, the step and its row for each call."""

    def __init__(
        self,
        clock: SchedulerClock | LoopClock,
        forecaster: Forecaster,
        schedule_for: ScheduleFor,
        strict: bool,
        storage: Storage,
        detours: Detours,
        pipe: Any = None,
    ):
        self.clock = clock
        self.forecaster = forecaster
        self.storage = storage
        self.detours = detours
        self._run: object = None  # the one that was judged last, up to which step, and the detour that it took
        self._judged = 0
        self._taken: Detour | None = None
        self.streams: dict[str, Stream] = {}
        self.here = _Here()
        self.watch = None if pipe is None else Watch(pipe, forecaster, lambda: self.here.name)
        self._lock = threading.Lock()

        @lru_cache(PLANS_KEPT)
        def compiled(name: str, start: int, times: tuple[float, ...], detour: Detour | None = None) -> Plan:
            schedule = detour.schedule if detour else schedule_for(times, start)
            return plans.compile(forecaster.for_stream(name), times, schedule, start, strict)

        self._compiled = compiled

    def begin(self) -> bool:
        with self._lock:
            (run, step), name = self._now(), self.here.name
            stream = self.streams.get(name) or Stream(name, self.storage)
            if stream.run is not run:
                times = tuple(self.clock.grid().tolist())
                others = [self._compiled(name, step, times, detour) for detour in self.detours.values()]
                stream.start(run, self._compiled(name, step, times), others)
                self.streams[name] = stream
                self._forget_all_but(run)
                if self.watch is not None:
                    self.watch.begin(run, stream.plan)
            self.here.stream = stream
            return stream.enter(step)

    def _now(self) -> tuple[object, int]:
        """Ask the clock, and free what a run held that goes on no more."""
        try:
            return self.clock.now()
        except RuntimeError:
            self._forget_all_but(self.clock.run)
            raise

    def _forget_all_but(self, run: object) -> None:
        for stream in self.streams.values():
            if stream.run is not run:
                stream.end()

    def forget(self) -> None:
        """End the streams' runs, and free their histories."""
        self._forget_all_but(object())

    @contextmanager
    def call(self) -> Iterator[None]:
        """End, with a call of the pipeline, the run that began in it."""
        before = self.clock.run
        try:
            yield
        finally:
            with self._lock:
                if isinstance(self.clock, SchedulerClock) and self.clock.run is not before:
                    self.clock.end()
                    self.forget()

    def exchange(self, feature: Tensor) -> Tensor:
        with self._lock:
            stream = self.here.stream
            if self.detours and stream.step in stream.plan.full:
                self._judge(stream, feature)
            return stream.exchange(feature)

    def _judge(self, stream: Stream, feature: Tensor) -> None:
        """At a full step, send an unusual run on its detour; the first stream decides for all."""
        plan, step = stream.plan, stream.step
        if self._run is not stream.run:
            self._run, self._judged, self._taken = stream.run, plan.start, None
        detour = self.detours.get(step)
        if detour is not None and self._taken is None and step != self._judged:
            self._judged = step
            past = [k for k in plan.full if k < step][-plan.memory :]
            row = self.forecaster.for_stream(stream.name).row(plan.grid, step, past)
            if stream.error(row, past, feature) > detour.limit:
                self._taken = detour
        if self._taken is not None:
            chosen = self._compiled(stream.name, plan.start, plan.times, self._taken)
            if chosen is not plan:
                stream.follow(chosen)

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Let the calls of this thread be a stream's."""
        outer, self.here.name = self.here.name, name
        try:
            yield
        finally:
            self.here.name = outer


class Run:
    """An accelerated transformer; what `accelerate` returns. As a context manager it ends the acceleration."""

    def __init__(self, pipe: Any, transformer: nn.Module, executor: Executor, tap: Tap):
        self._transformer = transformer
        self._executor = executor
        self._closed = False
        with ExitStack() as undo:
            undo.callback(attach(transformer, tap, executor))
            undo.callback(hear_streams(transformer, executor.within))
            if pipe is not transformer:
                undo.callback(watch_calls(pipe, executor.call))
            if executor.watch is not None:
                undo.callback(executor.watch.close)
                undo.callback(executor.watch.hear(transformer))
            self._undo = undo.pop_all()

    def at(self, step: int, stream: str = DEFAULT_STREAM) -> None:
        """Say at which step, and in which stream, a denoising loop of one's own calls the transformer next.

        A new run begins when the step falls, or when the call that began the present one is said again.

        Raises: ValueError if the grid has no such step; RuntimeError if a pipeline's scheduler tells the step, or the
            acceleration has ended.
        """
        self._check_open()
        if not isinstance(self._executor.clock, LoopClock):
            raise RuntimeError("the pipeline's scheduler tells the step; run.at(...) is for loops without a pipeline.")
        self._executor.clock.set(step, stream)
        self._executor.here.name = stream

    def plan(self, stream: str = DEFAULT_STREAM) -> Plan:
        """Return the plan of a stream's newest run.

        Raises: LookupError if the stream has not run yet.
        """
        streams = self._executor.streams
        if stream not in streams:
            raise LookupError(f"plans are compiled as runs begin; so far of {sorted(streams)}, not of {stream!r}.")
        return streams[stream].plan

    def summary(self) -> Summary:
        """Return, per stream, what was done since the acceleration began."""
        return Summary({name: stream.summary() for name, stream in self._executor.streams.items()})

    def close(self) -> None:
        """Leave the transformer as it was, and free the histories; does nothing the second time."""
        with _lock:
            if self._transformer.__dict__.get(_RUN) is self:
                del self._transformer.__dict__[_RUN]
            self._undo.close()
            self._closed = True
        self._executor.forget()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("an acceleration that has ended does not begin again; call lesa.accelerate anew.")

    def __enter__(self) -> Run:
        self._check_open()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


_RUN = "_lesa_run"  # kept on the transformer itself, so that they are freed together
_lock = threading.RLock()


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
    strict: bool = False,
    check: bool = True,
) -> Run:
    """Make a pipeline, or a transformer in a loop of one's own, run its blocks on the full steps of a schedule only.

        pipe = lesa.load("models/emoji-flux")  # a folder with a predictor beside the model
        with lesa.accelerate(pipe) as run:
            image = pipe("small red apple on blue, left").images[0]
        print(run.summary())

    It holds from the call on (`lesa.enable` is the same function) until the `with` block ends or `lesa.disable` is
    called; then the model is as it was. Without a forecaster the predictor shipped for the pipeline is taken; without
    a schedule, the forecaster's own. `budget` is a number of full steps: it picks the predictor shipped, or its
    schedule, that has so many (`lesa.accelerate(pipe, budget=6)`).

    A transformer alone needs the `grid` of its loop, S + 1 falling times, and `run.at(step)` before each call. With
    `strict`, a forecast from fewer past features than it is made for is an error.

    `tap` is 'norm', what enters the final norm, 'projection', what enters the last projection, 'feature', the one of
    them that the paper takes for the model, or 'output', what the transformer returns: far smaller, and its forwards do
    not run at all on skipped steps; or a `lesa.Tap`. Without one it is the predictor's own, or 'feature'.

    `history` is how past features are stored: as they are ('model'); the newest as it is and the others as differences
    of a byte an element ('int8', 'fp8'); or the same in the CPU's memory ('cpu', 'int8-cpu', 'fp8-cpu'). In each,
    features that no later step uses are not held.

    A run belongs to the call that makes it: the pipeline's, that of another one with its transformer and scheduler, or
    a loop of one's own over its scheduler. Who else calls the transformer is refused, during a run and after it.

    A pipeline's runs are judged at their first step: a sampler that adds noise is refused unless the forecasts are
    reuse, and so is other guidance than a predictor was trained under, if it says which. With `check=False` they are
    not, and what is forecast then may be far off.

    `detours` say at which full steps a run may turn out to be unusual, and which schedule it then goes on with (see
    `lesa.planning.detours`). They need a forecaster that is not bound to one schedule.

    Raises: ValueError if the schedule, the grid or the tap is missing or does not fit, if there is no such history, or
        if the transformer is accelerated already; LookupError if no predictor is shipped for the pipeline. The
        pipeline's call raises ValueError, before its first step is done, if its grid, schedule, streams or guidance do
        not fit the predictor, or its sampler adds noise. Calls of the transformer that belong to no run
        raise RuntimeError.
    """
    transformer = _transformer_of(pipe)
    if (transformer is pipe) != (grid is not None):
        raise ValueError("grid= is for a transformer in a loop of your own, and needed there; a pipeline has its own.")
    if schedule is not None and not isinstance(schedule, Schedule):
        raise ValueError(f"a schedule is a lesa.Schedule, got {schedule!r}; lesa.Schedule.parse reads a text.")
    forecaster = predictors.shipped_for(pipe, schedule, budget) if forecaster is None else forecaster
    if isinstance(forecaster, type) or not hasattr(forecaster, "row"):
        raise ValueError(f"a forecaster is an object such as lesa.Taylor(order=1), got {forecaster!r}.")
    schedule_for = _schedule_for(forecaster, schedule, budget)
    if tap is None and isinstance(forecaster, predictors.Predictor):
        tap = forecaster.origin.tap
    tap = tap if isinstance(tap, Tap) else tap_of(transformer, tap or "feature")
    if isinstance(forecaster, predictors.Predictor):
        forecaster.check_model(transformer, tap)
    storage = Storage.parse(history)
    clock = SchedulerClock(pipe) if grid is None else LoopClock(grid)
    with _lock:
        if _RUN in transformer.__dict__:
            raise ValueError("a transformer is accelerated once, but this one is already; call lesa.disable first.")
        watched = pipe if check and grid is None else None
        executor = Executor(clock, forecaster, schedule_for, strict, storage, detours or {}, watched)
        run = Run(pipe, transformer, executor, tap)
        transformer.__dict__[_RUN] = run
    return run


enable = accelerate


def disable(pipe: Any) -> None:
    """Leave an accelerated pipeline or transformer as it was; does nothing if it is not accelerated."""
    run = _transformer_of(pipe).__dict__.get(_RUN)
    if run is not None:
        run.close()


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
            f"{forecaster!r} does not say which steps are full; pass a schedule, e.g. schedule=lesa.Schedule.at([...]) "
            "with the steps that lesa plan found, or lesa.Schedule.every(3)."
        )
    return lambda _times, _start: chosen


def _transformer_of(pipe: Any) -> nn.Module:
    transformer = pipe if isinstance(pipe, nn.Module) else getattr(pipe, "transformer", None)
    if not isinstance(transformer, nn.Module):
        raise ValueError(
            f"a pipeline with a transformer, or a transformer, is accelerated; got a {type(pipe).__name__}."
        )
    return transformer


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
