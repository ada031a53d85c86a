"""What training on a pipeline's runs begins with, and how its rounds are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lesa.host.runtime import accelerate, denoisers_of
from lesa.learn.calls import Call
from lesa.learn.collect import rerun
from lesa.learn.training import Lesson, RecordRuns
from lesa.learn.trajectory import Trajectory
from lesa.predictors import Origin, Predictor, configuration
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap


def origin_of(
    pipe: Any, reference: Trajectory, schedule: Schedule, model: str, tap: Tap | None = None, **facts: Any
) -> Origin:
    """Return the origin of a predictor for a pipeline's recorded runs; what was recorded at the sampler is for the
    output tap, in all streams. Facts go to `Origin.training`."""
    denoiser = getattr(pipe, denoisers_of(pipe)[0])
    begins = {} if reference.begins == (0,) else {"begins": list(reference.begins)}
    return Origin(
        model=model,
        transformer=type(denoiser).__name__,
        config=configuration(denoiser),
        tap=Tap() if tap is None or reference.at_sampler else tap,
        grid=tuple(reference.grid.tolist()),
        schedule=str(schedule),
        streams=reference.streams,
        training={**begins, **facts},
    )


def recording(pipe: Any, calls: Sequence[Call] = (), **call: Any) -> RecordRuns:
    """Return what records a predictor's runs of a lesson on a pipeline, for `lesa.learn.training.train`.

    `calls` are those of the runs, where a store holds no more than their labels; `call` is what goes with all of them.
    """

    def record_runs(predictor: Predictor, lesson: Lesson) -> tuple[list[Trajectory], list[Trajectory]]:
        with accelerate(pipe, predictor, schedule=lesson.schedule):
            trained, validated = (
                rerun(pipe, runs, predictor.origin.tap, calls, **call) for runs in (lesson.reference, lesson.validation)
            )
            return trained, validated

    return record_runs
