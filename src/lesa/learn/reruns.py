"""Runs that a training asks for while it goes on: kept in a folder, so that a stopped one records none twice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

from lesa.host.runtime import accelerate
from lesa.learn.calls import Call
from lesa.learn.collect import kept_paths, record_kept
from lesa.learn.collecting import VALIDATION_SEED
from lesa.learn.lessons import Lesson
from lesa.learn.outcome import JUDGED_ON
from lesa.learn.training import drift
from lesa.learn.trajectory import Store, Trajectory
from lesa.predictors import Predictor, disk
from lesa.rows.forecasters import Forecaster
from lesa.rows.tap import Tap


class Reruns:
    """Records runs of a pipeline at a tap, of the prompts of a lesson and of some `prompts` to validate on."""

    def __init__(self, pipe: Any, tap: Tap, prompts: Sequence[Call], folder: Path, batch_size: int):
        self.pipe, self.tap, self.folder, self.batch_size = pipe, tap, folder, batch_size
        self.prompts, self.seeds = prompts, range(VALIDATION_SEED, VALIDATION_SEED + len(prompts))
        self._calls: dict[tuple[float, ...], dict[str, Any]] = {}
        self._used: dict[Path, Sequence[int]] = {}
        self._judged = count()

    def call_as(self, store: Store) -> None:
        """Run on the grid of a store as its runs were collected."""
        self._calls[store.collection.grid] = store.collection.call

    def validation(self, like: Trajectory, name: str, most: int | None = None) -> list[Trajectory]:
        """Record the validation prompts, on the grid and at the tokens of another run, under a name."""
        return self._record(like, self.prompts[:most], self.seeds[:most], name)

    def of(self, predictor: Predictor, lesson: Lesson) -> tuple[list[Trajectory], list[Trajectory]]:
        """Record a predictor's runs of a lesson: on its training prompts and on its validation prompts."""
        first, name = lesson.reference[0], _digest(predictor, lesson)
        with accelerate(self.pipe, predictor, schedule=lesson.schedule):
            prompts = [run.call or run.prompt for run in lesson.reference]
            seeds = [run.seed for run in lesson.reference]
            trained = self._record(first, prompts, seeds, f"trained-{name}")
            return trained, self.validation(first, f"validated-{name}")

    def drift(self, forecaster: Forecaster, lessons: Sequence[Lesson]) -> float:
        """Return how far a forecaster's runs of a few validation prompts end from their reference runs, in dB."""
        total = 0.0
        for number, lesson in enumerate(lessons):
            name = f"judged-{number}-{next(self._judged)}"
            with accelerate(self.pipe, forecaster, schedule=lesson.schedule, tap=self.tap):
                found = self.validation(lesson.reference[0], name, JUDGED_ON)
            total += drift(found, lesson.validation[:JUDGED_ON]) / len(lessons)
        return total

    def forget(self) -> None:
        """Remove the runs."""
        files = [path for folder, seeds in self._used.items() for path in kept_paths(folder, seeds)]
        disk.remove(files, self.folder.parent)

    def _record(self, like: Trajectory, prompts: Sequence[Call], seeds: Sequence[int], name: str) -> list[Trajectory]:
        self._used[self.folder / name] = seeds
        call = self._calls[tuple(like.grid.tolist())]
        where = dict(folder=self.folder / name, batch_size=self.batch_size, seam=like.at_sampler)
        return record_kept(self.pipe, prompts, seeds, like.tokens, self.tap, **where, **call)


def _digest(predictor: Predictor, lesson: Lesson) -> str:
    """Name the runs of a predictor on a lesson: by its numbers, the grid and the schedule."""
    total = hashlib.sha256(f"{lesson.reference[0].grid.tolist()} {lesson.schedule}".encode())
    for name, tensor in sorted(predictor.state_dict().items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()[:16]
