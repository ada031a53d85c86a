"""Calls of a pipeline, their reference runs, and other runs of the same calls measured against these."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lesa.host.pipelines import for_each, pictures_of
from lesa.host.runtime import Run, accelerate, check_free, denoisers_of
from lesa.learn.calls import Call, arguments, plain_calls, seeded, takes
from lesa.learn.counted import Recorder, Recording
from lesa.learn.drawn import arrays
from lesa.rows.forecasters import Forecaster
from lesa.rows.levels import Levels
from lesa.rows.sampler import Sampler
from lesa.rows.schedule import Schedule

if TYPE_CHECKING:
    from typing_extensions import Self

BATCH = 16
"""How many plain prompts go in one call of the pipeline."""
TINY = 1e-12

OnRun = Callable[[int], None]
"""Is told how many calls' runs are done."""


@dataclass
class Counts:
    """Transformer runs, of one picture and stream each, by what they were made for."""

    reference: int = 0
    rounds: int = 0
    search: int = 0
    refinement: int = 0
    measures: int = 0

    @property
    def total(self) -> int:
        return self.reference + self.rounds + self.search + self.refinement + self.measures

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(mine - its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))


class Measured(NamedTuple):
    """How far the runs of each call ended from its reference run, in dB, and what they drew (uint8) if that was asked
    for."""

    drifts: list[float]
    pictures: list[np.ndarray]
    transformer_runs: int

    @property
    def drift(self) -> float:
        return fmean(self.drifts)


class References:
    """Calls of a pipeline, each with a seed: makes their reference runs once, and measures other runs against them.

        known = References(pipe, prompts, seeds, dict(num_inference_steps=50), pictures=True)
        known.measure(lesa.Lagrange(2), lesa.Schedule.at([0, 20, 40])).drifts

    Calls are prompts, or the arguments of calls by name, and `call` holds arguments for all of them. Plain prompts go
    `batch_size` at a time in one call of the pipeline, calls with arguments of their own one by one. With `pictures`,
    what every run draws is decoded and kept. `on_run` is called after every real run, with how many are done of each
    call, all told.

    Of a run its last latents are kept, float32 in the CPU's memory.

    Raises: ValueError if calls and seeds do not pair up, the pipeline is accelerated, or runs of a batch cannot be told
        apart.
    """

    def __init__(
        self,
        pipe: Any,
        calls: Sequence[Call],
        seeds: Sequence[int],
        call: Mapping[str, Any] | None = None,
        *,
        batch_size: int = BATCH,
        pictures: bool = False,
        on_run: OnRun | None = None,
    ):
        if not len(calls) or len(calls) != len(seeds):
            raise ValueError(f"each call needs one seed, got {len(calls)} calls and {len(seeds)} seeds.")
        if batch_size < 1:
            raise ValueError(f"a batch has a call or more, got batch_size={batch_size}; raise it.")
        check_free(pipe, denoisers_of(pipe))  # or the reference runs were accelerated
        self.pipe, self.counts, self.done, self._progress = pipe, Counts(), 0, self
        self._on_run, self._pictures = on_run or (lambda _done: None), pictures
        self._call = dict(call or {})
        self._batches = list(_batches(calls, seeds, 1 if _draws_several(self._call) else batch_size))
        self.pictures: list[np.ndarray] = []
        """Of the reference runs, as `arrays` has them; empty without, or where what is drawn is no picture."""
        self.numbers: Sampler | None = None
        self.levels: Levels | None = None
        self.reference = self._run_in_full()
        first = self.reference[0].moment
        self.times, self.start = first.times, first.start
        self._weigh()

    def _weigh(self) -> None:
        sizes = torch.cat([run.final.double().square().sum(1) for run in self.reference])
        self.weights = 1 / sizes.clamp_min(TINY)

    def first(self, calls: int) -> Self:
        """Return these references of the first so many calls alone; their runs are counted here."""
        if calls >= self.calls:
            return self
        part, left = copy(self), calls
        part._batches = []
        for some, seeds in self._batches:
            part._batches += [(some[:left], seeds[:left])] if left > 0 else []
            left -= len(some)
        sizes = [len(some) for some, _ in part._batches]
        part.reference = [run.first(sizes[run.batch]) for run in self.reference if run.batch < len(sizes)]
        each = len(self.pictures) // self.calls  # a call may draw several
        part._progress, part.pictures = self, self.pictures[: calls * each]
        part._weigh()
        return part

    @property
    def steps(self) -> int:
        """The number of steps of the grid."""
        return len(self.times) - 1

    @property
    def calls(self) -> int:
        return sum(len(some) for some, _ in self._batches)

    def measure(self, forecaster: Forecaster, schedule: Schedule | None = None) -> Measured:
        """Run all calls with a forecaster, on this schedule or its own, and say where they ended.

        Raises: as `lesa.accelerate` does.
        """
        before = self.counts.total
        runs, pictures = self.run(forecaster, schedule, of="measures")
        return Measured(self.drifts(runs), pictures, self.counts.total - before)

    def drift_of(self, forecaster: Forecaster, schedule: Schedule | None = None) -> list[float]:
        """Return how far the runs with a forecaster end from the reference runs, in dB, of each call."""
        return self.measure(forecaster, schedule).drifts

    def drifts(self, runs: Sequence[Recording]) -> list[float]:
        """Return 10 log10(|x - x_ref|^2 / |x_ref|^2) of the last latents of each call; of its sections, the mean."""
        rows = 10 * self.errors(runs).clamp_min(TINY).log10()
        of_batches: dict[int, list[Tensor]] = {}
        for run, some in zip(runs, rows.split([run.calls for run in runs]), strict=True):
            of_batches.setdefault(run.batch, []).append(some)
        found = torch.cat([torch.stack(some).mean(0) for some in of_batches.values()])
        return torch.where(found.isfinite(), found, math.inf).tolist()

    def off(self, runs: Sequence[Recording]) -> list[Tensor]:
        """Return how far the runs' last latents are off, (calls, all elements) each."""
        return [run.final - wanted.final for run, wanted in zip(runs, self.reference, strict=True)]

    def errors(self, runs: Sequence[Recording]) -> Tensor:
        """Return |x - x_ref|^2 / |x_ref|^2 of the last latents of each call."""
        return torch.cat([x.double().square().sum(1) for x in self.off(runs)]) * self.weights

    # --- runs

    def run(
        self,
        forecaster: Forecaster | None = None,
        schedule: Schedule | None = None,
        *,
        of: str,
        keep: Collection[int] | None = (),
        on_record: Callable[[Run, Recording], None] | None = None,
        draw: bool = True,
    ) -> tuple[list[Recording], list[np.ndarray]]:
        """Run all calls, and return what passed at the steps to `keep` (None: all) and what was drawn: nothing unless
        there are `pictures`, and the latents are to be decoded (`draw`)."""
        draw = draw and self._pictures
        runs: list[Recording] = []
        drawn: list[np.ndarray] = []
        for batch, (calls, seeds) in enumerate(self._batches):
            accelerated = accelerate(self.pipe, forecaster, schedule=schedule) if forecaster else nullcontext()
            with accelerated as live:
                recorder = Recorder(self.pipe, len(calls), keep)
                if on_record is not None and live is not None:
                    recorder.on_record = lambda run, live=live: on_record(live, run)
                recorder.wants_numbers = keep is None and self.numbers is None
                recorder.levels = self.levels
                pictures = self._record(recorder, calls, seeds, draw)
            setattr(self.counts, of, getattr(self.counts, of) + recorder.counted)
            if self.numbers is None:
                self.numbers, self.levels = recorder.numbers, recorder.levels
            for run in recorder.whole_runs():
                run.batch = batch
                runs.append(run)
            drawn += arrays(pictures) or []  # clips come as floats, four times as large
            self._progress._count(len(calls))
        return runs, drawn

    def _count(self, calls: int) -> None:
        self.done += calls
        self._on_run(self.done)

    def _run_in_full(self) -> list[Recording]:
        return self._kept(*self.run(of="reference"))

    def _kept(self, runs: list[Recording], drawn: list[np.ndarray]) -> list[Recording]:
        self.pictures = drawn
        return runs

    def _record(self, recorder: Recorder, calls: Sequence[Call], seeds: Sequence[int], draw: bool) -> list[Any]:
        undo = recorder.attach()
        try:
            with torch.no_grad(), seeded(seeds[0]):
                result = self.pipe(**self._arguments(calls, seeds, draw))
        finally:
            undo()
        return list(pictures_of(result)) if draw and _has_pictures(result) else []

    def _arguments(self, calls: Sequence[Call], seeds: Sequence[int], draw: bool) -> dict[str, Any]:
        usual = inspect.signature(type(self.pipe).__call__).parameters.get("output_type")
        decoded = {"output_type": usual.default} if draw and usual is not None else {}
        named = {"return_dict": True} if takes(self.pipe, "return_dict") else {}  # it is told what is a picture
        common = decoded | self._call | named
        if len(calls) == 1:
            return arguments(self.pipe, calls[0], seeds[0], common) | named
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
        given = for_each(calls, common) | {"prompt": list(calls), "generator": generators}
        return ({"output_type": "latent"} if takes(self.pipe, "output_type") else {}) | given


def _has_pictures(result: Any) -> bool:
    return hasattr(result, "frames") or hasattr(result, "images")


def _draws_several(call: Mapping[str, Any]) -> bool:
    """Tell whether a call draws several pictures of each prompt (num_images_per_prompt and its like)."""
    return any(name.endswith("_per_prompt") and value not in (None, 1) for name, value in call.items())


def _batches(calls: Sequence[Call], seeds: Sequence[int], size: int) -> Iterator[tuple[list[Call], list[int]]]:
    """Yield the calls that go in one call of the pipeline, with their seeds."""
    calls = plain_calls(calls)
    together = size if all(isinstance(one, str) for one in calls) else 1
    for start in range(0, len(calls), together):
        yield calls[start : start + together], list(seeds[start : start + together])
