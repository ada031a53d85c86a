"""Real runs of a pipeline, recorded at its sampler and counted in runs of its transformer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from lesa.host.clock import Moment, PipelineClock
from lesa.host.intercept import intercept, unmarked
from lesa.host.runtime import denoisers_of
from lesa.rows import sampler
from lesa.rows.sampler import Sampler

ELEMENTS = 1 << 16
"""How many elements of each call's latents the equations are made of, drawn once; all of them where there are fewer."""


class Recording:
    """One run of a batch of calls, at some elements: velocities, latents before each step and at the end, float32."""

    def __init__(self, moment: Moment, calls: int):
        self.moment, self.calls = moment, calls
        self._velocities: list[Tensor] = []
        self._latents: list[Tensor] = []
        self.final = torch.empty(0)

    def add(self, velocity: Tensor, latents: Tensor) -> None:
        self._velocities.append(self._sample(velocity))
        self._latents.append(self._sample(latents))

    def end(self, latents: Tensor) -> None:
        self.final = self._split(latents)

    def _split(self, x: Tensor) -> Tensor:
        """Return a row for each call, or one for all where the pipeline does not stack them."""
        return x.detach().reshape(self.calls if x.shape[0] % self.calls == 0 else 1, -1).float().cpu()

    def _sample(self, x: Tensor) -> Tensor:
        rows = self._split(x)
        if rows.shape[1] <= ELEMENTS:
            return rows.clone()
        drawn = torch.randint(rows.shape[1], (ELEMENTS,), generator=torch.Generator().manual_seed(0))
        return rows[:, drawn]

    @property
    def velocities(self) -> Tensor:
        """(calls, ticks, elements)"""
        return torch.stack(self._velocities, 1)

    @property
    def latents(self) -> Tensor:
        """(calls, ticks + 1, elements)"""
        end = self._sample(self.final)
        return torch.stack([*self._latents, end], 1)


class Recorder(PipelineClock):
    """Records the runs of one call of a pipeline at its sampler, accelerated or not, and counts transformer runs.

    `on_record` is called with the recording before each tick.
    """

    def __init__(self, pipe: Any, calls: int):
        super().__init__(pipe)
        self._parts = [getattr(pipe, name) for name in denoisers_of(pipe)]
        self._batch = calls
        self.numbers: Sampler | None = None
        self.wants_numbers = False
        self.runs: list[Recording] = []
        self.counted = 0
        self.on_record: Callable[[Recording], None] = lambda _recording: None

    def attach(self) -> Callable[[], None]:
        with ExitStack() as undo:
            for part in self._parts:
                undo.callback(intercept(part, "__call__", self._count, inner=True))
                undo.callback(intercept(part, "__call__", self._hear))
            undo.callback(super().attach())
            return undo.pop_all().close

    def _hear(self, go_on: Callable, _denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        self.now()
        return go_on(*args, **kwargs)

    def _count(self, go_on: Callable, _denoiser: Any, *args: Any, **kwargs: Any) -> Any:
        self.counted += self._batch
        return go_on(*args, **kwargs)

    def _step(self, go_on: Callable, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        moment = self.moment
        if moment is None or not moment.called:
            return super()._step(go_on, scheduler, *args, **kwargs)
        if not self.runs or self.runs[-1].moment is not moment:
            self.runs.append(Recording(moment, self._batch))
            if self.wants_numbers and self.numbers is None:
                self.numbers = sampler.of(unmarked(scheduler), *args, **kwargs)
        named, run = sampler.bind(scheduler, *args, **kwargs), self.runs[-1]
        run.add(named["model_output"], named["sample"])
        self.on_record(run)
        result = super()._step(go_on, scheduler, *args, **kwargs)
        run.end(result[0] if isinstance(result, tuple) else result.prev_sample)
        return result
