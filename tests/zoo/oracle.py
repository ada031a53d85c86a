"""Forecast skipped steps of any pipeline from the outside: an oracle for tests, which knows nothing of lesa.

A step is a tick: the first `step` of any scheduler after a call of a denoiser. A stream is a denoiser and the place of
its call within the tick. On a skipped tick a stream's call gives the weighted sum of what it gave on full ticks.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet", "prior")

Rows = Callable[[Sequence[float], int, Sequence[int]], Sequence[float]]


@dataclass
class Run:
    """What one call of a pipeline did; ticks of all its runs one after the other.

    A pipeline that samples in sections opens one run a section: `runs` holds the ticks of each.
    """

    latents: list[Tensor] = field(default_factory=list)  # what `step` gave in the last tick; else the output's tensors
    output: list[Tensor] = field(default_factory=list)  # tensors of the pipeline's output
    calls: list[list[str]] = field(default_factory=list)  # a tick: the denoisers called, in order
    times: list[float] = field(default_factory=list)  # a tick: the timestep that `step` got
    runs: list[int] = field(default_factory=list)
    steps: int = 0  # calls of `step`, of all copies of all schedulers
    begins: int = 0  # calls of `set_timesteps`
    schedulers: set[str] = field(default_factory=set)
    skipped: int = 0  # calls that the oracle answered

    @property
    def ticks(self) -> int:
        return len(self.times)

    @property
    def streams(self) -> list[int]:
        """Calls of a denoiser in each tick."""
        return [len(names) for names in self.calls]

    @property
    def denoisers(self) -> list[str]:
        return sorted({name for names in self.calls for name in names})


def tensors(value: Any) -> list[Tensor]:
    """List the tensors of a structure, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, np.ndarray):
        return [torch.from_numpy(value)]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        value = vars(value).values() if hasattr(value, "__dataclass_fields__") else ()
    return [tensor for part in value for tensor in tensors(part)]


def combine(values: Sequence[Any], coefficients: Sequence[float]) -> Any:
    """Sum structures of tensors with weights, in float64; what is no tensor is the newest's."""
    newest = values[-1]
    if isinstance(newest, Tensor) and newest.is_floating_point():
        terms = [coefficient * value.double() for coefficient, value in zip(coefficients, values, strict=True)]
        return torch.stack(terms).sum(0).to(newest.dtype)
    if isinstance(newest, dict):
        parts = {key: combine([value[key] for value in values], coefficients) for key in newest}
        return type(newest)(**parts) if is_dataclass(newest) else type(newest)(parts)
    if isinstance(newest, (list, tuple)):
        parts = [combine(part, coefficients) for part in zip(*values, strict=True)]
        return type(newest)(parts)
    return newest


def time_of(step: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> float:
    """Read the timestep among the arguments of `step`: its place differs from class to class."""
    given = inspect.signature(step).bind(*args, **kwargs).arguments
    timestep = next((given[name] for name in ("timestep", "t") if given.get(name) is not None), float("nan"))
    return float(torch.as_tensor(timestep).float().flatten()[0])


class Oracle:
    """Watch one call of a pipeline and answer for its denoisers on skipped ticks."""

    def __init__(self, plain: Run | None = None, full: Collection[int] = (), rows: Rows | None = None):
        """Answer on all ticks but `full` with `rows`, for a call that did `plain` when left alone; else only watch.

        Each run of a call that has several follows the same schedule, as far as it goes.
        """
        self.plain, self.full, self.rows = plain, full, rows
        self.run = Run()
        self.tick, self.fresh = 0, True  # of this run; whether `set_timesteps` came since the last call of a denoiser
        self.calls: list[str] = []  # of denoisers in this tick
        self.past: dict[tuple[str, int], list[tuple[int, Any]]] = {}
        self.shapes: dict[tuple[str, int], list[torch.Size]] = {}
        self.deep = 0  # inside another `step`

    def begins(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for `set_timesteps`: the next call of a denoiser opens a run."""
        self.run.begins += not self.deep
        self.fresh = True
        return original(*args, **kwargs)

    def open(self) -> None:
        """Open a run: ticks count from 0 and nothing is held."""
        self.fresh, self.tick = False, 0
        self.past.clear()
        self.calls = []
        self.run.runs.append(0)

    def skips(self) -> bool:
        """Tell whether this tick is skipped: not one of `full`, and a `step` follows the call in the plain run."""
        return self.plain is not None and self.tick not in self.full and self.tick < len(self.times())

    def times(self) -> list[float]:
        """Give the times of this run in the plain call."""
        run, lengths = len(self.run.runs) - 1, self.plain.runs
        return self.plain.times[sum(lengths[:run]) : sum(lengths[: run + 1])]

    def denoises(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for a call of the denoiser `name`: forecast it on a skipped tick, else run it."""
        if self.fresh:
            self.open()
        stream = (name, self.calls.count(name))
        self.calls.append(name)
        past, shapes = self.past.setdefault(stream, []), [tensor.shape for tensor in tensors([args, kwargs])]
        if self.shapes.get(stream) != shapes:
            past.clear()
            self.shapes[stream] = shapes
        if past and self.skips():
            self.run.skipped += 1
            ticks, outputs = zip(*past, strict=True)
            return combine(outputs, self.rows(self.times(), self.tick, ticks))
        output = original(*args, **kwargs)
        if past and [tensor.shape for tensor in tensors(output)] != [tensor.shape for tensor in tensors(past[-1][1])]:
            past.clear()
        past.append((self.tick, combine([output], [1.0])))  # a copy: pipelines may write into what they get
        return output

    def steps(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand in for `step`; a class whose `step` calls another's counts once."""
        self.deep += 1
        try:
            output = original(*args, **kwargs)
        finally:
            self.deep -= 1
        if not self.deep:
            self.stepped(original, args, kwargs, output)
        return output

    def stepped(self, original: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], output: Any) -> None:
        """Take note of a `step`: the first after a call of a denoiser is a tick."""
        self.run.steps += 1
        self.run.schedulers.add(type(args[0]).__name__)
        if self.calls:
            self.run.times.append(time_of(original, args, kwargs))
            self.run.calls.append(self.calls)
            self.run.latents.clear()
            self.run.runs[-1] += 1
            self.calls, self.tick = [], self.tick + 1
        self.run.latents.append(tensors(output)[0].clone())


@contextmanager
def patched(owner: Any, name: str, hook: Callable[..., Any]) -> Iterator[None]:
    """Let `hook(original, ...)` stand in for a function of a class or a module."""
    own, original = name in vars(owner), getattr(owner, name)

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        return hook(original, *args, **kwargs)

    setattr(owner, name, replacement)
    try:
        yield
    finally:
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)


def watch(pipe: Any, call: Callable[[], Any], oracle: Oracle | None = None) -> Run:
    """Run `call` of the pipeline under an oracle; without one, everything runs in full."""
    oracle = oracle or Oracle()
    with ExitStack() as stack:
        parts = vars(pipe) | pipe.components  # `components` leaves out some that are optional
        schedulers = [part for part in parts.values() if hasattr(part, "step") and hasattr(part, "set_timesteps")]
        for cls in {type(scheduler) for scheduler in schedulers}:
            stack.enter_context(patched(cls, "step", oracle.steps))
            stack.enter_context(patched(cls, "set_timesteps", oracle.begins))
        for name, part in parts.items():
            if name in DENOISERS and isinstance(part, nn.Module):
                stack.enter_context(patched(part, "forward", functools.partial(oracle.denoises, name)))
        oracle.run.output = [tensor.clone() for tensor in tensors(call())]
    oracle.run.latents = oracle.run.latents or oracle.run.output
    return oracle.run


def reuse(times: Sequence[float], tick: int, past: Sequence[int]) -> list[float]:
    """Give the row that repeats the newest output."""
    return [0.0] * (len(past) - 1) + [1.0]


def extrapolate(times: Sequence[float], tick: int, past: Sequence[int]) -> list[float]:
    """Give the row of the line through the two newest outputs, over ticks."""
    if len(past) < 2:
        return reuse(times, tick, past)
    slope = (tick - past[-1]) / (past[-1] - past[-2])
    return [0.0] * (len(past) - 2) + [-slope, 1.0 + slope]
