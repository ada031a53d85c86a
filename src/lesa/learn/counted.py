"""Real runs of a pipeline, recorded at its sampler and counted in runs of its transformer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lesa.host.clock import Moment, PipelineClock, argument
from lesa.host.data import Known
from lesa.host.intercept import intercept, unmarked
from lesa.host.runtime import denoisers_of
from lesa.host.streams import Call, Stream, Streams, hear
from lesa.host.structure import is_numbers, leaves
from lesa.rows import levels, sampler
from lesa.rows.levels import Levels
from lesa.rows.sampler import Sampler

ELEMENTS = 1 << 15
"""How many elements of each call's latents the equations are made of, drawn once; all of them where there are fewer."""

_Streams = set[tuple[Stream, tuple]]
"""Streams, each with the shapes of what its call gave"""


class Recording:
    """One run of a batch of calls: of the ticks to keep, velocities and latents before them at some elements, and the
    last latents whole; all float32 on the CPU.

    Ticks count from the run's first step. `begins` are those at which other streams ran than before, or a stream's
    outputs had other shapes (a first step may prefill tokens).
    """

    def __init__(self, moment: Moment, calls: int, keep: Collection[int] | None):
        self.moment, self.calls, self._keep = moment, calls, keep
        self.velocities: dict[int, Tensor] = {}
        self._latents: dict[int, Tensor] = {}
        self.final = torch.empty(0)
        self.ticks, self.batch, self.number = 0, 0, 0  # which of the batches, and which run of its call
        self.begins: list[int] = []
        self.size: int | None = None
        self.streams, self._mine, self._before = Streams(), _Streams(), _Streams()
        self._places: dict[str, int] = {}

    def call(self, name: str, stream: str | None, args: tuple, kwargs: dict) -> Stream:
        """Take note of a denoiser's call; returns its stream."""
        place = self._places[name] = self._places.get(name, -1) + 1
        return self.streams.find(Call(name, stream, args, kwargs, place), self.moment.ticks)

    def gave(self, stream: Stream, output: Any) -> None:
        """Take note of what a call gave."""
        self._mine.add((stream, tuple(tuple(x.shape) for _, x in leaves(output) if is_numbers(x))))

    def add(self, velocity: Tensor, latents: Tensor) -> None:
        """Keep what a tick begins with."""
        if self._mine != self._before:
            self.begins.append(self.ticks)
        self._before, self._mine, self._places = self._mine, _Streams(), {}
        if self.size not in (None, latents.numel()):
            raise ValueError(
                f"the latents of a run that rows are solved for keep their size, got {latents.numel()} numbers after "
                f"{self.size}; runs that shrink or grow their latents are accelerated with untrained forecasters."
            )
        self.size = latents.numel() if self._keep is None else None
        if self._keep is None or self.ticks in self._keep:
            self.velocities[self.ticks] = self._sample(velocity)
            self._latents[self.ticks] = self._sample(latents)
        self.ticks += 1

    def end(self, latents: Tensor) -> None:
        self.final = self._split(latents)

    def forget(self) -> None:
        """Let go of what the calls brought."""
        self.streams, self._mine, self._before = Streams(), _Streams(), _Streams()

    def _split(self, x: Tensor) -> Tensor:
        if x.shape[0] % self.calls:
            raise ValueError(
                f"calls go in one batch where latents have a row for each of them, got {tuple(x.shape)} for "
                f"{self.calls} calls; run them one by one (batch_size=1)."
            )
        return x.detach().reshape(self.calls, -1).float().cpu()

    def _sample(self, x: Tensor) -> Tensor:
        rows = self._split(x)
        if rows.shape[1] <= ELEMENTS:
            return rows.clone()
        drawn = torch.randint(rows.shape[1], (ELEMENTS,), generator=torch.Generator().manual_seed(0))
        return rows[:, drawn]

    @property
    def thinned(self) -> float:
        """How many elements of its latents stand behind each that is kept."""
        return max(self.final.shape[1] / ELEMENTS, 1.0)

    def first(self, calls: int) -> Recording:
        """Return what passed of the first so many calls."""
        part = copy(self)
        part.calls = calls
        part.velocities = {tick: x[:calls] for tick, x in self.velocities.items()}
        part._latents, part.final = {tick: x[:calls] for tick, x in self._latents.items()}, self.final[:calls]
        return part

    def outputs(self, ticks: Collection[int]) -> Tensor:
        """Return the velocities at some ticks, (calls, ticks, elements), float64."""
        return torch.stack([self.velocities[tick] for tick in ticks], 1).double()

    def latents(self, ticks: Collection[int]) -> Tensor:
        """Return the latents before some ticks, or at the end, (calls, ticks, elements), float64."""
        end = {self.ticks: self._sample(self.final)}
        return torch.stack([(self._latents | end)[tick] for tick in ticks], 1).double()


@contextmanager
def counting(pipe: Any) -> Iterator[Callable[[], int]]:
    """Count the calls of a pipeline's denoisers that really run meanwhile, and return what tells how many there were.

    A call for several pictures at once is one.
    """
    counted = 0

    def count(go_on: Callable, _denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal counted
        counted += 1
        return go_on(*args, **kwargs)

    with ExitStack() as undo:
        for name in denoisers_of(pipe):
            undo.callback(intercept(getattr(pipe, name), "__call__", count, inner=True))
        yield lambda: counted


class Recorder(PipelineClock):
    """Records the runs of one call of a pipeline at its sampler, accelerated or not, and counts transformer runs.

    Of each run the ticks to `keep` are recorded, or all of them (None). `on_record` is called with the recording before
    each tick, and after it. Where its numbers are wanted, a sampler that has none is refused at its first step. Of one
    that adds noise the `levels` are known too, and what is recorded in the place of velocities is what they say of the
    data.
    """

    def __init__(self, pipe: Any, calls: int, keep: Collection[int] | None = None):
        super().__init__(pipe)
        self._parts = {name: getattr(pipe, name) for name in denoisers_of(pipe)}
        self._batch, self._keep, self._stream = calls, keep, None
        self.numbers: Sampler | None = None
        self.wants_numbers = False
        self.levels: Levels | None = None
        self.runs: list[Recording] = []
        self.counted = 0
        self.on_record: Callable[[Recording], None] = lambda _recording: None

    def attach(self) -> Callable[[], None]:
        with ExitStack() as undo:
            for name, part in self._parts.items():
                undo.callback(intercept(part, "__call__", self._count, inner=True))
                undo.callback(intercept(part, "__call__", partial(self._hear, name)))
                undo.callback(hear(part, self._within))
            undo.callback(super().attach())
            return undo.pop_all().close

    def whole_runs(self) -> list[Recording]:
        """Return the runs that were stepped.

        Raises: ValueError if there is none.
        """
        self.runs = [run for run in self.runs if run.ticks]
        if not self.runs:
            raise ValueError(
                f"runs are measured where their scheduler steps, got a {type(self._pipe).__name__} that did not step "
                "one; use a pipeline whose loop calls its scheduler's step."
            )
        for number, run in enumerate(self.runs):
            run.number = number
            run.forget()
        return self.runs

    @contextmanager
    def _within(self, stream: str) -> Iterator[None]:
        outer, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = outer

    def _hear(self, name: str, go_on: Callable, _denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        moment = self.now()
        if moment is None:
            return go_on(*args, **kwargs)
        if not self.runs or self.runs[-1].moment is not moment:
            self.runs = [*(run for run in self.runs if run.ticks), Recording(moment, self._batch, self._keep)]
        run = self.runs[-1]
        stream = run.call(name, self._stream, args, kwargs)
        output = go_on(*args, **kwargs)
        run.gave(stream, output)
        return output

    def _count(self, go_on: Callable, _denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        self.counted += self._batch
        return go_on(*args, **kwargs)

    def _step(self, go_on: Callable, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        moment = self.moment
        if moment is None or not moment.called:
            return super()._step(go_on, scheduler, *args, **kwargs)
        if self.wants_numbers and self.numbers is None:
            self.numbers, self.levels = _numbers_of(scheduler, args, kwargs)
        run = self.runs[-1]
        output, latents = (argument(scheduler, name, args, kwargs) for name in ("model_output", "sample"))
        if self.levels is not None:
            output = Known.at(self.levels, run.ticks).data(latents, output)
        run.add(output, latents)
        self.on_record(run)
        result = super()._step(go_on, scheduler, *args, **kwargs)
        run.end(result[0] if isinstance(result, tuple) else result.prev_sample)
        self.on_record(run)
        return result


def _numbers_of(scheduler: Any, args: tuple, kwargs: dict) -> tuple[Sampler, Levels | None]:
    """Return a sampler as numbers, and, of one that adds noise, its levels: what rows combine there is the data."""
    found = sampler.of(unmarked(scheduler), *args, **kwargs)
    if not found.injects_noise:
        return found, None
    known = levels.of(unmarked(scheduler), *args, **kwargs)
    return levels.of_data(found, known), known
