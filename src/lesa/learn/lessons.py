"""What goes into a training and what comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lesa.learn.named import FITS, GRADIENT, SQUARES
from lesa.learn.trajectory import Trajectory
from lesa.predictors import Predictor
from lesa.rows.schedule import Schedule

LOSSES = ("latents", "features")


@dataclass(frozen=True)
class Config:
    """How a predictor is trained.

    `loss` is 'latents' (the deviation of the latents that the head makes of a forecast, in logarithms, so that it is
    the mean PSNR that rises) or 'features' (the paper's L1 between forecast and recorded feature). `fit` is by
    'gradient' (an optimiser, on batches of `batch` runs, whose `learning_rate` falls to 0) or 'least-squares'
    (Gauss-Newton steps on all runs, which end where they lower the loss no more; `lesa.learn.squares`). `updates` is a
    number of such steps, at most, for each of: the ground-truth phase, and every one of the `rounds` of the closed-loop
    phase. `free_alphas` fits LESA's alphas themselves and lets the KAN take them up after; without,
    the KAN is trained, as in the paper. Drifts far below `floor`, in dB of the last latents, are not worth lowering:
    where lessons differ in how far their runs drift, those that show in pictures then count for more than those that
    do not. The validation runs are looked at every `check_every` updates for each lesson, of least squares after each.

    Raises: ValueError if one of these is out of range.
    """

    loss: str = "latents"
    fit: str = GRADIENT
    updates: tuple[int, int] = (200, 200)
    rounds: int = 4
    batch: int = 16
    learning_rate: float = 0.02
    free_alphas: bool = True
    floor: float = -120.0
    check_every: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise ValueError(f"a loss is one of {', '.join(LOSSES)}, got {self.loss!r}; name one of these.")
        if self.fit not in FITS:
            raise ValueError(f"a fit is one of {', '.join(FITS)}, got {self.fit!r}; name one of these.")
        if self.fit == SQUARES and not (self.loss == "latents" and self.free_alphas):
            raise ValueError(
                "a fit by least squares is one of rows to the loss 'latents', got another loss, or KANs to train "
                f"themselves (free_alphas=False); take fit={GRADIENT!r} for these."
            )
        if len(self.updates) != 2 or min(self.updates) < 0 or self.rounds < 0:
            raise ValueError(
                f"updates are two numbers from 0 on, and rounds one, got {self.updates} and {self.rounds}; raise them."
            )
        if self.batch < 1 or self.check_every < 1:
            raise ValueError(
                f"batch and check_every are at least 1, got {self.batch} and {self.check_every}; raise them."
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"a learning rate is positive, got {self.learning_rate}; the default is 0.02.")
        if not math.isfinite(self.floor):
            raise ValueError(f"a floor is a number of dB, got {self.floor}; the default is -120.")

    @classmethod
    def paper(cls) -> Config:
        """The paper's loss and learning rate; its updates are one prompt and one step each, ours whole runs."""
        return cls(loss="features", learning_rate=1e-4, free_alphas=False)


class Lesson(NamedTuple):
    """What a predictor learns one grid and schedule from: runs with every step full, to train and to validate on.

    Without a schedule it is the predictor's own for that grid.
    """

    reference: Sequence[Trajectory]
    validation: Sequence[Trajectory]
    schedule: Schedule | None = None


RecordRuns = Callable[[Predictor, Lesson], tuple[Sequence[Trajectory], Sequence[Trajectory]]]
"""Record a predictor's runs of a lesson: on its training prompts and on its validation prompts, in their order."""


@dataclass
class Curve:
    """How the training went: one entry per check, in order."""

    entries: list[dict] = field(default_factory=list)

    def add(self, phase: str, round_: int, update: int, validation_loss: float) -> None:
        self.entries.append(dict(phase=phase, round=round_, update=update, validation_loss=validation_loss))


class Result(NamedTuple):
    """A trained predictor, what it was after the ground-truth phase, and how the training went.

    `scores` holds the drift in dB of every round's real runs on the validation prompts, the mean over the lessons; the
    first is after the ground-truth phase, and the predictor is that of the lowest.
    """

    predictor: Predictor
    ground_truth: Predictor
    scores: list[float]
    curve: Curve
