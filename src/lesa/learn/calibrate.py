"""Calibrate: a planned schedule and rows for a pipeline from a few of its runs, all in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lesa.learn.beginning import Say, quiet
from lesa.learn.calls import Call
from lesa.learn.collecting import CollectOptions, collect
from lesa.learn.options import TrainOptions
from lesa.learn.ranks import ALONE, Ranks
from lesa.learn.train import Trained, place_for, train
from lesa.rows.forecasters import Forecaster, Lagrange

RUNS = "runs"
"""Where the recorded runs lie, in the predictor's folder."""


@dataclass(frozen=True)
class CalibrateOptions:
    """How a pipeline is calibrated.

    `budget` is the number of full steps; the schedule is planned with `forecaster`, and forecasts are made at the place
    `tap` (see `lesa.accelerate`). `batch_size` is in runs. `call` holds more arguments of the pipeline's calls.

    Raises: ValueError as `CollectOptions` and `TrainOptions` do, or if the budget is no number from 1 on.
    """

    budget: int = 8
    forecaster: Forecaster = Lagrange(2)
    tap: str = "feature"
    batch_size: int = 8
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise ValueError(f"a run has a full step or more, got budget={self.budget}; raise it.")
        self.collecting()
        self.training()

    def collecting(self) -> CollectOptions:
        """Record runs that serve any tap: the outputs are part of every run."""
        tap = "feature" if self.tap == "output" else self.tap
        return CollectOptions(tap, batch_size=self.batch_size, call=self.call)

    def training(self) -> TrainOptions:
        """Train free rows on the planned schedule, for one round of few updates."""
        return TrainOptions(
            "l2p",
            budgets=[self.budget],
            forecaster=self.forecaster,
            tap=self.tap,
            rounds=1,
            updates=(100, 100),
            batch_size=self.batch_size,
        )


def calibrate(
    pipe: Any,
    prompts: Sequence[Call],
    folder: str | Path,
    options: CalibrateOptions = CalibrateOptions(),
    *,
    at: Ranks = ALONE,
    say: Say = quiet,
) -> Trained:
    """Record a few runs of a pipeline, plan which steps are full, fit rows to them, and keep the predictor.

    The round is chosen on the same prompts (or calls) with other seeds. `say` takes lines on the way.

        trained = lesa.calibrate(pipe, ["small red apple on blue, left", ...], "my-predictor")
        with lesa.accelerate(pipe, trained.predictor):
            image = pipe("large fish on grey, right").images[0]

    Raises: as `lesa.collect`, `lesa.plan` and `lesa.train` do.
    """
    place_for(folder)
    runs = collect(pipe, prompts, Path(folder) / RUNS, options.collecting(), at=at)
    say(f"{len(runs)} runs in {runs.folder}, digest {runs.digest()}")
    return train(pipe, runs, prompts, folder, options.training(), say=say)
