"""Apply plans at the denoisers: find run, step and stream of each call, keep what passed, make what is forecast."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lesa.host.at_sampler import AtSampler
from lesa.host.choice import Chosen, FirstStep, Named
from lesa.host.clock import LoopClock, Moment, PipelineClock, argument, with_argument
from lesa.host.data import DataRun
from lesa.host.facts import Heard
from lesa.host.found import Found
from lesa.host.streams import Call, Stream, Streams, name_of
from lesa.host.structure import is_numbers, leaves, replace
from lesa.host.summary import SamplerSummary, StreamSummary
from lesa.rows.detour import Detour, Detours
from lesa.rows.levels import DATA
from lesa.rows.plan import Plan
from lesa.rows.row import History, Row, Storage
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

StreamOf = Callable[[tuple, dict], "str | None"]
"""(arguments, named arguments of a denoiser's call) -> the name of its stream"""


class _Slot(NamedTuple):
    """Stands for a tensor in what a denoiser returned."""

    number: int
    dtype: torch.dtype


class StreamRun:
    """One stream in the present run: its plan, and the histories of the tensors that make its feature.

    A feature is any structure of tensors: what a denoiser returned, or what entered each of its final modules (its
    parts). All of them have one row. What is no tensor of numbers is passed on from the last full step.
    """

    def __init__(self, name: str, storage: Storage, done: StreamSummary, step: int):
        self.name, self.storage, self.done, self.step, self.began = name, storage, done, step, step
        self.plan: Plan
        self.full = True
        self.parts: dict[int, tuple[Any, list[History]]] = {}
        self._live: dict[int, tuple[int, ...]] = {}
        self._slots = 0

    def follow(self, plan: Plan, others: Sequence[Plan] = ()) -> None:
        """Take a plan; the run may go on with one of the others later, which is known after the first step."""
        lives = [one.live(self.storage.of_differences) for one in (plan, *others)]
        self.plan, self._live = plan, lives[0]
        if any(live.get(self.began) for live in lives):
            self._live[self.began] = (self.began,)
        self._slots = max(self._slots, *(len(held) for live in lives for held in live.values()))

    def enter(self, step: int) -> None:
        self.step, self.full = step, step not in self.plan.rows

    def keep(self, feature: Any, part: int = 0) -> None:
        """Keep the feature of a full step, if a later row combines it."""
        if not self.plan.rows:
            return
        found = [x for _, x in leaves(feature) if is_numbers(x)]
        if not found:
            raise RuntimeError(
                f"a feature is made of tensors, got a {type(feature).__name__} without any in stream {self.name!r}; "
                "accelerate the module that returns tensors (denoisers=...)."
            )
        numbers = iter(range(len(found)))
        template = replace(feature, Tensor, lambda x: _Slot(next(numbers), x.dtype) if is_numbers(x) else x)
        held = self.parts[part][1] if part in self.parts else self._make(found)
        for history, x in zip(held, found, strict=True):
            self._remember(history, x)
        self.parts[part] = template, held
        self.done.bytes_held = sum(history.nbytes for _, some in self.parts.values() for history in some)

    def count_full(self, instead: bool = False) -> None:
        """Count a full step, `instead` of one that was counted as skipped."""
        self.done.full_steps += 1
        if instead:
            self._count_skipped(-1)

    def _count_skipped(self, steps: int) -> None:
        self.done.skipped_steps += steps
        self.done.short_rows += steps * (self.step in self.plan.truncated)

    def fits(self, feature: Any, part: int) -> bool:
        """Tell whether a feature has the shapes of those held, if any are."""
        if part not in self.parts:
            return True
        found, held = [x for _, x in leaves(feature) if is_numbers(x)], self.parts[part][1]
        return len(found) == len(held) and all(history.fits(x) for history, x in zip(held, found, strict=True))

    def _make(self, found: Sequence[Tensor]) -> list[History]:
        return [self.storage.history(self._slots, like=x) for x in found]

    def forecast(self, part: int = 0) -> Any:
        """Return the forecast of a skipped step, in the place of what a full step gives."""
        began = time.perf_counter()
        if part == 0:
            self._count_skipped(1)
        template, held = self.parts[part]
        forecasts = [self._forecast(history, slot) for history, slot in zip(held, _slots(template), strict=True)]
        self.done.forecast_seconds += time.perf_counter() - began
        return replace(template, _Slot, lambda slot: forecasts[slot.number])

    def _forecast(self, history: History, slot: _Slot) -> Tensor:
        past, coefficients, offset, _ = self.plan.rows[self.step]
        forecast = history.forecast(past, coefficients, offset, slot.dtype)
        self.done.clamped = self.done.clamped + history.clamped  # of a GPU's: nobody waits for it here
        if self.plan.remembers_forecasts:
            self._remember(history, forecast)
        return forecast

    def _remember(self, history: History, feature: Tensor) -> None:
        """Keep a feature if a later row combines it, and in any case no others than such."""
        live = self._live[self.step]
        history.keep(live)
        if self.step in live:
            history.append(self.step, feature)

    def error(self, row: Row, past: Sequence[int], feature: Any) -> float:
        """Return how far a row's forecast is from the feature that is known: |forecast - feature| / |feature|."""
        known = next(x for _, x in leaves(feature) if is_numbers(x)).float()
        history = self.parts[0][1][0]
        forecast = history.forecast(past, row.coefficients.tolist(), float(row.offset)).float()
        return float((forecast - known).norm() / known.norm())

    def move(self, step: int, plan: Plan, others: Sequence[Plan] = ()) -> None:
        """Take the plan of a run that began, with the one step done so far, at another place of the grid."""
        before, self.step = self.step, step
        self.follow(plan, others)
        for _, held in self.parts.values():
            known = [history.forecast((before,), (1.0,), 0.0) if history.steps else None for history in held]
            for k, feature in enumerate(known):
                if feature is not None:
                    (held[k],) = self._make([feature])
                    self._remember(held[k], feature)


def _slots(template: Any) -> list[_Slot]:
    """Return the slots of a template, which are tuples themselves, in order."""
    found: list[_Slot] = []
    replace(template, _Slot, found.append)
    return found


class Executor:
    """Applies plans: finds the run, the step and the stream of each call of a denoiser, and its row."""

    def __init__(
        self,
        clock: PipelineClock | LoopClock,
        choice: Named | Found,
        storage: Storage,
        detours: Detours,
        stream_of: StreamOf | None = None,
    ):
        self.clock, self.choice, self.storage, self.detours = clock, choice, storage, detours
        self._chosen: Chosen | None = None
        self.found: dict[Chosen, int] = {}
        self.done: dict[str, StreamSummary] = {}
        self.plans: dict[str, Plan] = {}
        self._stream_of, self._heard = stream_of, Heard()
        self.data: StreamSummary | None = None
        self.data_reason = ""
        self._data_run: DataRun[StreamRun] | None = None
        self.done_at_sampler = SamplerSummary()
        self._at_sampler = AtSampler(storage, self.done_at_sampler)
        self._name = threading.local()
        self._lock = threading.Lock()
        self._stream_runs: dict[Stream, StreamRun] = {}
        self._moment: Moment | None = None
        self._runs: dict[str, Moment] = {}
        self._judged, self._taken = 0, None

        if isinstance(clock, PipelineClock):
            clock.on_end, clock.on_tick, clock.on_first_step = self.forget, self._tick, self._first_step
            clock.on_step = self._step

    @property
    def chosen(self) -> Chosen:
        """What the present run is forecast with."""
        assert self._chosen is not None
        return self._chosen

    def is_at(self, tap: Tap | str) -> bool:
        """Tell whether the present run's feature is at this tap."""
        return self._chosen is not None and self._chosen.tap == tap

    def begin(self, denoiser: str, args: tuple, kwargs: dict) -> Any:
        """Say what becomes of a call of a denoiser: a `Passage`, or None if it is of no run."""
        with self._lock:
            moment = self.clock.now()
            if moment is None:
                return None
            if moment is not self._moment:
                self.forget()
                self._moment, self._streams, self._places, self._at = moment, Streams(), {}, moment.step
                self._judged, self._taken = moment.start, None
                self._chosen, self._heard = self.choice.begin(moment.times.tolist()), Heard()
            if moment.step != self._at:
                self._places, self._at = {}, moment.step
            if self._data_run is not None and moment.ticks and self._data_run.stream_run is None:
                self._plan_data(moment, self._data_run)
            return _Passing(self, self._stream_run(moment, self._call_of(denoiser, args, kwargs)), kwargs)

    def _call_of(self, denoiser: str, args: tuple, kwargs: dict) -> Call:
        name = getattr(self._name, "now", None)
        if name is None and self._stream_of is not None:
            name = self._stream_of(args, kwargs)
        place = self._places[denoiser] = self._places.get(denoiser, -1) + 1
        return Call(denoiser, name, args, kwargs, place, told=isinstance(self.clock, LoopClock))

    def _stream_run(self, moment: Moment, call: Call) -> StreamRun:
        step = moment.step
        if isinstance(self.clock, LoopClock):
            self._check_loop(call.name, step)
        stream = self._streams.find(call, moment.ticks)
        self._stream_runs = {
            one: stream_run for one, stream_run in self._stream_runs.items() if one in self._streams
        }  # others are freed
        if stream not in self._stream_runs:
            name = name_of(call.denoiser, call.name, call.place)
            stream_run = self._stream_runs[stream] = StreamRun(
                name, self.storage, self.done.setdefault(name, StreamSummary()), step
            )
            if self._runs.get(name) is not moment:
                stream_run.done.runs += 1
                self._runs[name] = moment
            self._plan(stream_run, moment)
        stream_run = self._stream_runs[stream]
        stream_run.enter(step)
        return stream_run

    def _check_loop(self, name: str | None, step: int) -> None:
        """Raise unless a loop that names its streams goes on with each of them step by step."""
        mine = [stream_run for stream_run in self._stream_runs.values() if stream_run.name == name]
        stream_run = max(mine, key=lambda stream_run: stream_run.step, default=None)
        if stream_run is not None and stream_run.step == step:
            raise RuntimeError(
                f"the transformer was called twice at step {step} of stream {name!r}; calls of one step are told apart "
                "by names: run.at(step, name)."
            )
        if stream_run is not None and step != stream_run.step + 1:
            raise RuntimeError(f"stream {name!r} must go on at step {stream_run.step + 1}, got step {step}.")

    def _plan(self, stream_run: StreamRun, moment: Moment, detour: Detour | None = None) -> None:
        stream_run.follow(*self._plans_of(stream_run, moment, detour))

    def _plans_of(self, stream_run: StreamRun, moment: Moment, detour: Detour | None = None) -> tuple[Plan, list[Plan]]:
        """Return a stream's plan in a run, and those that it may go on with."""
        chosen, where = self.chosen, (stream_run.name, moment.start, stream_run.began, tuple(moment.times.tolist()))
        others = [] if detour else [chosen.plan(*where, other.schedule) for other in self.detours.values()]
        if self._begins_later(moment):
            plan = chosen.plan(*where, Schedule.at([stream_run.began]), reuse=True)
        elif self._data_run is not None and self._data_run.schedule is not None:
            plan = chosen.plan(*where, self._data_run.schedule, reuse=stream_run is not self._data_run.stream_run)
        else:
            plan = chosen.plan(*where, detour.schedule if detour else None)
            others += [chosen.plan(*where, reuse=True)] if chosen.data else []
        self.plans[stream_run.name] = plan
        if plan.acts_at_sampler and not isinstance(self.clock, PipelineClock):
            raise ValueError(
                "rows that add a part of the run's first latents, or correct full steps, act at a pipeline's sampler, "
                "got a module alone; accelerate the pipeline."
            )
        return plan, others

    def _begins_later(self, moment: Moment) -> bool:
        """Tell whether a forecaster is for runs from a later step than this one's, before its first step says its own.

        Many schedulers do not know where on their grid they begin until they step.
        """
        begins = self.chosen.forecaster.begins
        return moment.ticks == 0 and not moment.told and bool(begins) and begins[0] > moment.start

    def _tick(self) -> None:
        """Where the first step of a run turns out to be another place of the grid, plan anew from there."""
        moment = self._moment
        if moment is None or moment.ticks != 1:
            return
        for stream_run in self._stream_runs.values():
            if stream_run.began != moment.start:
                stream_run.began = moment.start
                stream_run.move(moment.start, *self._plans_of(stream_run, moment))

    def _first_step(self, scheduler: Any, args: tuple, kwargs: dict) -> None:
        """Decide what the run is forecast with, and judge whether that is right for it."""
        moment, heard, self._heard = self._moment, self._heard, Heard()
        if moment is None:
            return
        first = FirstStep(moment, heard, self.choice.noise, scheduler, args, kwargs)
        chosen = self.choice.decide(first)
        self.found[chosen] = self.found.get(chosen, 0) + 1
        if chosen is not self.chosen or self._begins_later(moment):
            self._turn_to(chosen, moment, first.start)
        followed = [stream_run.plan for stream_run in self._stream_runs.values()]
        skips = any(plan.rows for plan in followed)
        if chosen.data is not None and skips and chosen.data.wanted(scheduler, args, kwargs):
            self._data_run = DataRun()
            self.data, self.data_reason = self.data or StreamSummary(), chosen.data.reason
            self.data.runs += 1
        elif chosen is not first.judged:
            chosen.check(followed, heard, scheduler, args, kwargs)

    def _turn_to(self, chosen: Chosen, moment: Moment, start: int) -> None:
        """Go on with what was chosen after the run began; nothing was skipped yet."""
        self._chosen = chosen
        moment.start, moment.told = start, True
        for stream_run in self._stream_runs.values():
            stream_run.began = start
            stream_run.move(start, *self._plans_of(stream_run, moment))

    def _step(self, scheduler: Any, args: tuple, kwargs: dict, tick: int, part: int) -> tuple[tuple, dict]:
        """Where the data prediction is forecast, keep it at a full step, and exchange the output at a skipped one."""
        moment, run = self._moment, self._data_run
        if moment is None:
            return args, kwargs
        if run is None:
            return self._handed(moment, tick, part, scheduler, args, kwargs)
        if part == len(run):
            assert self.chosen.data is not None
            run.add(tick, self.chosen.data.levels(scheduler, args, kwargs))
        latents, output = (argument(scheduler, name, args, kwargs) for name in ("sample", "model_output"))
        known, step = run.known(part, tick), moment.start + tick
        if part == 0 and self.data is not None:
            self.data.full_steps += run.stream_run is None or step not in run.stream_run.plan.rows
        if run.stream_run is None:  # the first tick: what is skipped is not known yet
            if part == 0:
                self._at_sampler.begin(latents)
            run.first.append(known.data(latents, output))
            return args, kwargs
        run.stream_run.enter(step)
        plan, full = run.stream_run.plan, run.stream_run.full
        if full and not (known.is_finite and step >= run.stream_run.began):
            return args, kwargs
        data = known.data(latents, output) if full else self._forecast_data(run.stream_run, latents, part)
        if full:
            self._keep_data(run.stream_run, data, part)
        handed = self._at_sampler.handed(plan, step, data, latents, part, self._among(step))
        if full and (handed is data or not known.turns_back):  # or no output would make the sampler predict this
            return args, kwargs
        given = self._at_sampler.narrow(known.output(latents, handed), output)
        return with_argument(scheduler, "model_output", given, args, kwargs)

    def _handed(
        self, moment: Moment, tick: int, part: int, scheduler: Any, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict]:
        """Exchange an output where its row acts at the sampler."""
        step = moment.start + tick
        plan = self._plan_at_sampler(step)
        if plan is None or not (plan.acts_at_sampler or self._at_sampler.began):
            return args, kwargs
        latents, output = (argument(scheduler, name, args, kwargs) for name in ("sample", "model_output"))
        if tick == part == 0:
            self._at_sampler.begin(latents)
        handed = self._at_sampler.handed(plan, step, output, latents, part, self._among(step))
        return (args, kwargs) if handed is output else with_argument(scheduler, "model_output", handed, args, kwargs)

    def _plan_at_sampler(self, step: int) -> Plan | None:
        """Return the plan of the stream that began first, of those of a step: one that joined the run later knows of
        no step before."""
        acting = (one for one in self._stream_runs.values() if one.step == step)
        first = min(acting, key=lambda one: one.began, default=None)
        return None if first is None else first.plan

    def _among(self, step: int) -> Hashable:
        """Tell of which streams a step is."""
        return frozenset((id(one), one.began) for one in self._stream_runs.values() if one.step == step)

    def _keep_data(self, stream_run: StreamRun, data: Tensor, part: int) -> None:
        if not stream_run.fits(data, part):
            self.restart(stream_run)
        stream_run.keep(data, part)

    def _forecast_data(self, stream_run: StreamRun, latents: Tensor, part: int) -> Tensor:
        if part in stream_run.parts and stream_run.fits(latents, part):
            return stream_run.forecast(part)
        raise RuntimeError(
            f"the data prediction is forecast for latents that a full step had, got some of {tuple(latents.shape)} at "
            f"step {stream_run.step}, which is skipped; make it full, or pass of='output'."
        )

    def _plan_data(self, moment: Moment, run: DataRun[StreamRun]) -> None:
        """After the first step, plan the data prediction's rows, and let the denoisers repeat their newest outputs."""
        assert self.data is not None
        times, start = tuple(moment.times.tolist()), moment.start
        ticks = len(times) - 1 - start
        began = start + run.begin(ticks)
        full = {*self.chosen.schedule_for(times, start).full_steps(len(times) - 1, start), *range(start, began + 1)}
        run.schedule = Schedule.at(sorted(full.union(start + tick for tick in run.must_run(ticks))))
        run.stream_run = StreamRun(DATA, self.storage, self.data, began)
        for stream_run in (run.stream_run, *self._stream_runs.values()):
            self._plan(stream_run, moment)
        acts = run.stream_run.plan.acts_at_sampler
        if not acts:  # the first latents are not needed
            self._at_sampler = AtSampler(self.storage, self.done_at_sampler)
        for part, data in enumerate(run.first):
            if began == start:
                run.stream_run.keep(data, part)
            if began == start and part == 0:
                self._at_sampler.keep(run.stream_run.plan, start, data, self._among(start))
        run.first.clear()

    def hear(self, stream_run: StreamRun, kwargs: dict, output: Any) -> None:
        """Keep what a run is known by at its first step."""
        if self._moment is not None and self._moment.ticks == 0:
            self._heard.hear(stream_run.name, kwargs, output)

    def detour(self, stream_run: StreamRun, feature: Any) -> None:
        """At a full step, send an unusual run on its detour; the first stream decides for all."""
        moment, plan, step = self._moment, stream_run.plan, stream_run.step
        detour = self.detours.get(step)
        if moment is None:
            return
        if detour is not None and self._taken is None and step != self._judged:
            self._judged = step
            past = [k for k in plan.full if k < step][-plan.memory :]
            row = self.chosen.forecaster.for_stream(stream_run.name).row(plan.grid, step, past)
            if stream_run.error(row, past, feature) > detour.limit:
                self._taken = detour
        if self._taken is not None:
            self._plan(stream_run, moment, self._taken)
            stream_run.done.detours += stream_run.plan is not plan

    def restart(self, stream_run: StreamRun) -> None:
        """Let a stream begin with this step: its features have other shapes now (a first step may prefill tokens)."""
        assert self._moment is not None
        stream_run.parts.clear()
        stream_run.began = stream_run.step
        self._plan(stream_run, self._moment)

    def forget(self) -> None:
        """End the run: its histories are freed."""
        self._stream_runs, self._moment, self._data_run = {}, None, None
        self._at_sampler, self._heard = AtSampler(self.storage, self.done_at_sampler), Heard()

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Let the calls of this thread be a stream's."""
        outer, self._name.now = getattr(self._name, "now", None), name
        try:
            yield
        finally:
            self._name.now = outer

    def name(self, name: str) -> None:
        """Let the next calls of this thread be a stream's."""
        self._name.now = name


class _Passing:
    """A call's passage: its stream_run, and the detours that its run may take."""

    def __init__(self, executor: Executor, stream_run: StreamRun, kwargs: dict):
        self._executor, self._stream_run, self._kwargs, self.full = executor, stream_run, kwargs, stream_run.full
        self._kept: list[tuple[Any, int]] = []
        self._forecast = False

    def keep(self, feature: Any, part: int = 0) -> None:
        stream_run = self._stream_run
        self._kept.append((feature, part))
        if part == 0:
            stream_run.count_full(instead=self._forecast)
        if self._forecast or not stream_run.fits(feature, part):
            self._forecast = False
            self._executor.restart(stream_run)
            for kept in self._kept:  # whichever part it is that changed its shape
                stream_run.keep(*kept)
            return
        if self._executor.detours and part == 0:
            self._executor.detour(stream_run, feature)
        stream_run.keep(feature, part)

    def returned(self, output: Any) -> None:
        self._executor.hear(self._stream_run, self._kwargs, output)

    def fits(self, feature: Any, part: int = 0) -> bool:
        return self._stream_run.fits(feature, part)

    def forecast(self, part: int = 0) -> Any:
        self._forecast = True
        return self._stream_run.forecast(part)
