"""Plan which steps of a pipeline's runs are full."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from lesa.host.pipelines import source_of
from lesa.host.tap import OUTPUT, PAPER, PLACES, place_of, tap_of
from lesa.learn import said
from lesa.learn.call_files import read_prompts
from lesa.learn.calls import Call, plain_calls
from lesa.learn.collect import record
from lesa.learn.collecting import TRAINING_SEED, opened, recorded, tap_for
from lesa.learn.planning import PLANNED_ON, Planner
from lesa.learn.trajectory import Store
from lesa.predictors import Predictor
from lesa.rows.forecasters import Forecaster, Lagrange
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

FEW_STEPS = {4: "at:0,2", 8: "at:0,1,3,5"}
"""The schedules at 2x of runs of few steps, those of FLUX.1-schnell and Qwen-Image-Lightning."""


@dataclass(frozen=True)
class PlanOptions:
    """What schedules are planned for, and how.

    `forecaster` makes the forecasts, at the place `tap` (see `lesa.accelerate`; by default a predictor's own, or that
    of the recorded runs). `refine` chooses by real runs among plans of more and more caution.

    Raises: ValueError if there is no such place.
    """

    forecaster: Forecaster = Lagrange(2)
    tap: str | None = None
    refine: bool = True

    def __post_init__(self) -> None:
        if self.tap not in (None, *PLACES):
            raise ValueError(f"a tap is at one of {', '.join(PLACES)}, got tap={self.tap!r}; name one of these.")


class Planned(NamedTuple):
    """A schedule of so many steps, the drift in dB promised for it, that of real runs, and the place of forecasts."""

    schedule: Schedule
    promised: float
    real: float
    place: str
    steps: int

    @property
    def drawn(self) -> str:
        """The run, one character a step."""
        return self.schedule.draw(self.steps)


def plan(
    pipe: Any,
    budgets: Sequence[int],
    prompts: Sequence[Call] | None = None,
    options: PlanOptions = PlanOptions(),
    *,
    data: Store | str | Path | None = None,
) -> list[Planned]:
    """Find the best schedule of a pipeline's runs for each budget, a number of full steps.

    It is planned on recorded runs (`data`, what `lesa.collect` left), or on new ones of some `prompts` (or calls), by
    default those in the pipeline's folder.

        schedule = lesa.plan(pipe, [8], prompts)[0].schedule

    Raises: ValueError as `lesa.learn.planning.Planner` does; FileNotFoundError if there is nothing to plan on.
    """
    return list(plans(pipe, budgets, prompts, options, data=data))


def plans(
    pipe: Any,
    budgets: Sequence[int],
    prompts: Sequence[Call] | None = None,
    options: PlanOptions = PlanOptions(),
    *,
    data: Store | str | Path | None = None,
) -> Iterator[Planned]:
    """Yield what `plan` returns, as it is found."""
    store = opened(data) if data is not None else None
    place = options.tap or _place(pipe, options.forecaster, store)
    planner = planner_of(pipe, store, place, prompts)
    find = finder(planner, options.refine)
    for budget in budgets:
        schedule = find(options.forecaster, budget)
        promised = planner.drift(options.forecaster, schedule.full_steps(planner.steps))
        yield Planned(schedule, promised, planner.real(options.forecaster, schedule), place, planner.steps)


@said.once()
def planner_of(pipe: Any, store: Store | None, place: str, prompts: Sequence[Call] | None = None) -> Planner:
    """Make a planner at a tap: of a store's runs, or of new ones, by default of prompts that the model comes with."""
    if store is not None:
        first = [store.load(k) for k in range(min(PLANNED_ON, len(store)))]
        sampled = bool(first) and first[0].at_sampler
        tap = Tap() if sampled else recorded(store, tap_of(pipe.transformer, place))
        return Planner.of(pipe, first, tap, prompts or (), **store.collection.call)
    calls = plain_calls(shipped_prompts(pipe) if prompts is None else prompts)[:PLANNED_ON]
    seeds, tap = range(TRAINING_SEED, TRAINING_SEED + len(calls)), tap_for(pipe, calls, place)
    return Planner.of(pipe, record(pipe, calls, seeds, None, tap), tap, calls)


def shipped_prompts(pipe: Any) -> list[str]:
    """Read the prompts that a model comes with, of those that it was trained on.

    Raises: FileNotFoundError if there are none.
    """
    model = source_of(pipe).model
    file = Path(model) / "prompts" / "train.txt"
    if not file.exists():
        raise FileNotFoundError(
            f"planning needs recorded runs, and {model} comes without prompts to record some (no {file}); run lesa "
            "collect and name its folder as data=, or leave out what is planned for (bench --budgets '')."
        )
    return read_prompts(file)


def finder(planner: Planner, refine: bool = True) -> Callable[[Forecaster, int], Schedule]:
    """Return what finds a schedule for a forecaster and a budget: real runs choose it, or recorded runs alone."""
    return planner.plan if refine else planner.search


def usual_schedule(steps: int) -> Schedule:
    """Return the schedule of a training that names none: the paper's, or of few steps that at 2x."""
    return Schedule.parse(FEW_STEPS.get(steps, "paper:7"))


def _place(pipe: Any, forecaster: Forecaster, store: Store | None) -> str:
    """Name the tap of forecasts that nobody named: a predictor's own, that of recorded runs, or the model's usual."""
    if store is not None and len(store) and store.load(0).at_sampler:
        return OUTPUT
    known = getattr(pipe, "transformer", None)
    if known is None or type(known).__name__ not in PAPER:
        return OUTPUT
    tap = tap_of(known)
    if isinstance(forecaster, Predictor):
        tap = forecaster.origin.tap
    elif store is not None:
        tap = tap._replace(module=store.collection.tap)
    return place_of(type(known).__name__, tap)
