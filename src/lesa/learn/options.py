"""How a predictor is trained on a pipeline's recorded runs, and from what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lesa.host.tap import PLACES, place_of
from lesa.learn.lessons import Config
from lesa.learn.named import CONTINUOUS, FITS, GRADIENT, HISTORIES, LOSSES, METHODS, SQUARES
from lesa.predictors import Predictor
from lesa.rows.forecasters import Forecaster, Lagrange
from lesa.rows.schedule import Schedule


@dataclass(frozen=True)
class TrainOptions:
    """What is trained, on which schedules, and how.

    `method` is one of `METHODS`; its `history` is of full steps, or of forecasts too ('all'); `memories` are how many
    past features each stage of a LESA combines, or the one of L2P (4 where nothing is said), and `stages` how many a
    LESA has, with bounds learned from the runs, the bounds as falling times, or 'learned' for their number too.

    `schedule` says which steps are full; by default it is the paper's, or of few steps that at 2x. `budgets` plan one
    for each number of full steps instead, for `forecaster`. `tap` is the place of forecasts ('feature').

    `loss` is that of `lesa.learn.training.Config`, or 'steps' for the least squares fit of each step alone; so are
    `fit`, `rounds`, `updates`, `floor` and `seed`. `paper` is the paper's predictor, loss and learning rate, whatever
    `method`, `history` and `loss` say. Training begins with `predictor`, a trained one, if it is given, and takes its
    method, history, tap and schedule. `batch_size` is in runs.

    Raises: ValueError if something is out of range, or things do not go together.
    """

    method: str = "lesa"
    history: str = "full"
    memories: Sequence[int] | None = None
    stages: int | str | Sequence[float] | None = None
    schedule: Schedule | None = None
    budgets: Sequence[int] = ()
    forecaster: Forecaster = Lagrange(2)
    tap: str | None = None
    loss: str = "latents"
    fit: str = GRADIENT
    paper: bool = False
    rounds: int = 4
    updates: tuple[int, int] = (200, 200)
    floor: float = Config.floor
    seed: int = 0
    batch_size: int = 16
    predictor: Predictor | None = None

    def __post_init__(self) -> None:
        if self.paper:
            if self.memories:
                raise ValueError("paper= takes the paper's 4, 8 and 8 past features; pass it without memories=.")
            self._set(method="lesa", history="all", loss="features")
        if self.predictor is not None:
            self._begin_with(self.predictor)
        self._check_names()
        if self.stages and self.method != "lesa":
            raise ValueError("stages= are those of LESA: they need method='lesa'.")
        if self.memories and self.method == CONTINUOUS:
            raise ValueError("memories= are those of LESA and L2P: they need method='lesa' or 'l2p'.")
        if self.memories and self.method == "l2p" and len(self.memories) > 1:
            raise ValueError(f"L2P has one stage, got memories={tuple(self.memories)}; name one, memories=(8,).")
        if self.stages and self.memories:
            raise ValueError("memories= are for the stages of the default bounds; pass them without stages=.")
        if self.loss == "steps" and self.method != "l2p":
            raise ValueError("loss='steps' fits each step alone, which free rows can: it needs method='l2p'.")
        if self.fit == SQUARES and (self.loss != "latents" or self.method == CONTINUOUS):
            raise ValueError(
                f"fit={SQUARES!r} is of the rows of LESA and L2P, to the loss 'latents', got method={self.method!r} "
                f"and loss={self.loss!r}; leave fit= out."
            )
        if self.loss != "steps":
            self.config()

    def check_lessons(self, collections: int) -> None:
        """Check that what is trained can learn from so many collections.

        Raises: ValueError if it learns one grid and one schedule, and there are more.
        """
        if collections * max(1, len(self.budgets)) > 1 and self.method != CONTINUOUS:
            raise ValueError(
                f"method={self.method!r} learns one grid and one schedule, got {collections} collections and "
                f"{max(1, len(self.budgets))} budgets; name one of each, or take method={CONTINUOUS!r}."
            )

    @property
    def place(self) -> str:
        """Where forecasts are made."""
        return self.tap or "feature"

    def config(self) -> Config:
        """Return what the fit needs to know of this."""
        recipe = Config.paper() if self.paper else Config(loss=self.loss, fit=self.fit)
        updates: Any = tuple(self.updates)
        return replace(recipe, rounds=self.rounds, updates=updates, seed=self.seed, floor=self.floor)

    def _set(self, **changes: Any) -> None:
        for name, value in changes.items():
            object.__setattr__(self, name, value)

    def _check_names(self) -> None:
        known = {"method": METHODS, "history": HISTORIES, "loss": LOSSES, "fit": FITS, "tap": (None, *PLACES)}
        for name, values in known.items():
            if getattr(self, name) not in values:
                named = ", ".join(str(value) for value in values if value)
                raise ValueError(f"{name}= is one of {named}, got {getattr(self, name)!r}; name one of these.")

    def _begin_with(self, start: Predictor) -> None:
        """Take the method, the history, the tap and the schedule of the predictor that training begins with."""
        self._set(method=start.method, history="all" if start.remembers_forecasts else "full")
        if self.stages or self.memories or self.loss == "steps":
            raise ValueError(
                "training begins with predictor= as it is; pass it without stages=, memories=, loss='steps'."
            )
        if self.paper and start.method != "lesa":
            raise ValueError(f"paper= trains the KANs of a LESA, got a {start.method} as predictor=; leave paper= out.")
        place = place_of(start.origin.transformer, start.origin.tap)
        if self.tap not in (None, place):
            raise ValueError(f"this predictor is for tap={place!r}, got {self.tap}; pass that, or leave it out.")
        self._set(tap=place)
        if start.method != CONTINUOUS:
            self._keep_to(start)
        elif not self.budgets and not self.schedule:
            raise ValueError(f"a {CONTINUOUS} is trained for any schedule; name budgets= to plan for it, or schedule=.")

    def _keep_to(self, start: Predictor) -> None:
        if self.budgets or self.schedule not in (None, start.schedule):
            raise ValueError(
                f"a {start.method} keeps to its schedule, {start.schedule}; pass predictor= without budgets= and "
                "schedule=."
            )
        self._set(schedule=start.schedule)
