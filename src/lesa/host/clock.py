"""The sampler seam: when a run begins and ends, and which step it is at.

A step is a tick: the first `step` of any copy of the scheduler after a call of a denoiser. Some pipelines step several
schedulers, or one twice, and classes count in ways of their own. A run opens at the first call of a denoiser after
`set_timesteps`, and ends at the next such call or with the pipeline's call, whether it returned or raised: whoever
calls the denoiser next is not answered by it. A tick is not taken from the denoiser's time argument: in bfloat16
neighbours are the same, and in some models it rises.
"""

from __future__ import annotations

import inspect
import operator
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from lesa.host.caller import Caller
from lesa.host.intercept import intercept
from lesa.host.times import times_of
from lesa.rows import grid as grids


class Moment:
    """The present run of a clock: where it began on its grid, how many ticks it made, and in whose thread it is."""

    def __init__(self, times: Tensor, start: int, told: bool = True):
        self.times, self.start, self.ticks = times, start, 0
        self.told = told  # where it begins; or its first step will tell
        self.thread = threading.get_ident()
        self.called = False  # a denoiser was, since the last tick
        self.time: Any = None  # of the last tick, as the scheduler counts; on its device
        self.heard, self.parts = 0, 1  # calls of `step` since the last tick, it included; the most that a tick has
        self.caller = Caller(0, len(times) - 2 - start)

    @property
    def step(self) -> int:
        return self.start + self.ticks

    @property
    def over(self) -> bool:
        """Tell whether the grid is walked."""
        return self.step >= len(self.times) - 1


OnStep = Callable[[Any, tuple, dict, int, int], tuple[tuple, dict]]
"""(scheduler, arguments and named ones of its `step`, tick, place in the tick) -> the arguments that go on"""


class LoopClock:
    """Is told the step by a loop of one's own; a run lasts until the step falls or its first one is said again."""

    def __init__(self, grid: Sequence[float] | Tensor):
        self._times = grids.validate(grid)
        self.passed_by = 0  # a loop says which calls are its own
        self._first: tuple[int, str] | None = None
        self.moment: Moment | None = None

    def set(self, step: int, stream: str) -> None:
        step, steps = operator.index(step), len(self._times) - 1
        if not 0 <= step < steps:
            raise ValueError(f"the grid has steps 0 to {steps - 1}, got step {step}.")
        moment = self.moment
        if moment is None or step < moment.step or (step, stream) == self._first:
            moment = self.moment = Moment(self._times, step)
            self._first = (step, stream)
        moment.ticks = step - moment.start

    def now(self) -> Moment:
        """Return the present run.

        Raises: RuntimeError if the loop has not said where it is.
        """
        if self.moment is None:
            raise RuntimeError("the loop says which step it is at before each call of the transformer: run.at(step).")
        self.moment.called = True
        return self.moment

    def attach(self) -> Callable[[], None]:
        return lambda: None


class PipelineClock:
    """Listens to a pipeline's call and to its scheduler; copies of the scheduler made within a run count as it does.

    `on_call` is called as the pipeline's call begins, `on_first_step` before the first `step` of a run, with the
    scheduler and its arguments, `on_step` before every `step` of a run, with these and with its tick and its place
    therein; what it returns goes on in place of the arguments. `on_tick` is called after every tick, `on_end` as a run
    ends, and `on_unheard` where a denoiser was called in a pipeline's call that made no tick. `around_step`
    stands in the way of every `step`: it is given what goes on, the scheduler and the arguments that go on, and returns
    what `step` gives.
    """

    def __init__(self, pipe: Any):
        self._pipe = pipe
        self._opens = _is_set(pipe.scheduler)
        self._caller: int | None = None  # the thread that is in the pipeline's call
        self._entering = threading.Lock()
        self._detach: Callable[[], None] = lambda: None
        self._scheduler: Any = None
        self.moment: Moment | None = None
        self.on_call: Callable[[], None] = lambda: None
        self.on_end: Callable[[], None] = lambda: None
        self.on_first_step: Callable[[Any, tuple, dict], None] = lambda _scheduler, _args, _kwargs: None
        self.on_step: OnStep = lambda _scheduler, args, kwargs, _tick, _part: (args, kwargs)
        self.around_step: Callable[[Callable, Any, tuple, dict], Any] = lambda go_on, _scheduler, a, k: go_on(*a, **k)
        self.on_tick: Callable[[], None] = lambda: None
        self.on_unheard: Callable[[], None] = lambda: None
        self._calls = self._ticks = 0  # within the pipeline's call
        self.passed_by = 0  # calls of a denoiser within the pipeline's, that were of no run of it

    def attach(self) -> Callable[[], None]:
        with ExitStack() as undo:
            if callable(self._pipe):  # or its loop is its user's own
                undo.callback(intercept(self._pipe, "__call__", self._call))
            undo.callback(lambda: self._detach())
            self._follow()
            return undo.pop_all().close

    def now(self) -> Moment | None:
        """Return the run that a call of a denoiser belongs to, or None if it is of no run of this pipeline.

        Raises: RuntimeError if the run is another thread's.
        """
        me = threading.get_ident()
        if self._caller not in (None, me):  # another pipeline's, on the same weights: it opens no run of this one
            return None
        self._calls += 1
        if self._opens:
            self.end()
            self._opens = False
            begin = getattr(self._scheduler, "begin_index", None)
            self.moment = Moment(times_of(self._scheduler), begin or 0, told=begin is not None)
        moment = self.moment
        if moment is None or moment.over:
            self.passed_by += self._caller is not None
            return None
        if moment.thread != me:
            raise RuntimeError(
                "a run goes on in the thread that began it, got a call from another one; give each thread a pipeline, "
                "with a transformer, of its own."
            )
        if not moment.caller.admits(moment.ticks):
            self.passed_by += 1
            return None
        moment.called = True
        return moment

    def end(self) -> None:
        """End the present run."""
        if self.moment is not None:
            self.moment = None
            self.on_end()

    def _follow(self) -> None:
        """Listen to the scheduler that the pipeline has now."""
        scheduler = self._pipe.scheduler
        if scheduler is self._scheduler:
            return
        self._detach()

        def within_a_run() -> bool:
            return self.moment is not None or self._caller is not None

        with ExitStack() as undo:
            undo.callback(intercept(scheduler, "set_timesteps", self._set, of_copies=within_a_run))
            undo.callback(intercept(scheduler, "step", self._step, of_copies=within_a_run))
            self._detach = undo.pop_all().close
        self._scheduler = scheduler

    def _call(self, go_on: Callable, _pipe: Any, *args: Any, **kwargs: Any) -> Any:
        me = threading.get_ident()
        with self._entering:  # two threads may come at once
            if self._caller not in (None, me):
                raise RuntimeError(
                    "an accelerated pipeline is in one call at a time, got another one from a second thread; give each "
                    "thread a pipeline, with a transformer, of its own."
                )
            self._caller = me
        try:
            self.end()
            self._follow()
            self.on_call()
            self._opens = False
            self._calls = self._ticks = 0
            result = go_on(*args, **kwargs)
            if self._calls and not self._ticks:
                self.on_unheard()
            return result
        finally:
            self._caller, self._opens = None, False
            self.end()

    def _set(self, go_on: Callable, _scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        result = go_on(*args, **kwargs)
        self._opens = True
        return result

    def _step(self, go_on: Callable, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        moment, time = self.moment, argument(scheduler, "timestep", args, kwargs)
        if moment is None or moment.thread != threading.get_ident():
            return go_on(*args, **kwargs)
        if moment.called and moment.ticks == 0:
            self.on_first_step(scheduler, args, kwargs)
        if moment.called:
            args, kwargs = self.on_step(scheduler, args, kwargs, moment.ticks, 0)
        elif moment.ticks:
            args, kwargs = self.on_step(scheduler, args, kwargs, moment.ticks - 1, moment.heard)
        result = self.around_step(go_on, scheduler, args, kwargs)
        moment.heard = 1 if moment.called else moment.heard + 1
        moment.parts = max(moment.parts, moment.heard)
        if moment.called:
            self._tick(moment, scheduler, time)
        elif _time_of(time) != _time_of(moment.time):
            raise RuntimeError(
                f"a step is at one time, got a {type(scheduler).__name__} stepped at {_time_of(moment.time)} and "
                f"{_time_of(time)} after one call of the denoiser: frames at different noise levels are not forecast "
                "together. Run this call without lesa, or set it to one noise level for all frames."
            )
        if moment.over and moment.heard >= moment.parts:
            self.end()
        return result

    def _tick(self, moment: Moment, scheduler: Any, time: Any) -> None:
        if moment.ticks == 0:
            moment.start = _place_of(scheduler, time, moment)
        moment.ticks, moment.called, moment.time = moment.ticks + 1, False, time
        self._ticks += 1
        self.on_tick()


def _is_set(scheduler: Any) -> bool:
    """Tell whether a scheduler's times are set and none of its steps is done."""
    set_to = bool(getattr(scheduler, "num_inference_steps", None))
    return set_to and hasattr(scheduler, "step_index") and scheduler.step_index is None


def argument(scheduler: Any, name: str, args: tuple, kwargs: dict) -> Any:
    """Return an argument of a call of a scheduler's `step`, whose order is not the same in all classes."""
    if name in kwargs:
        return kwargs[name]
    places = _places(type(scheduler))
    return args[places.index(name)] if name in places[: len(args)] else None


def with_argument(scheduler: Any, name: str, value: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Return the arguments of a call of a scheduler's `step` with one of them exchanged, wherever it is handed over.

    What is handed over twice, as `pred_original_sample` too, is exchanged twice.
    """
    old = argument(scheduler, name, args, kwargs)
    return (
        tuple(value if given is old else given for given in args),
        {key: value if given is old else given for key, given in kwargs.items()},
    )


@lru_cache(maxsize=64)
def _places(kind: type) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.step).parameters)[1:]


def _time_of(timestep: Any) -> float | None:
    """Return the time that a scheduler is told, in its own count, if it is one number."""
    if timestep is None or torch.as_tensor(timestep).numel() != 1:
        return None
    return float(timestep)


def start_of(scheduler: Any, args: tuple, kwargs: dict, moment: Moment) -> int:
    """Return where on its grid a run begins, given the first `step` of it."""
    return _place_of(scheduler, argument(scheduler, "timestep", args, kwargs), moment)


def _place_of(scheduler: Any, timestep: Any, moment: Moment) -> int:
    """Return the place on the grid of a scheduler's first step of a run: image to image begins in mid-grid.

    Its time is the scheduler's own, in its own dtype; of times that repeat the first one counts.
    """
    now = _time_of(timestep)
    if now is None:
        return moment.start
    times = torch.as_tensor(scheduler.timesteps).flatten().double().cpu()
    distance = (times - now).abs()
    nearest = int(distance.argmin())
    return moment.start if distance[moment.start] == distance[nearest] else nearest
