"""What is compared: ways to run a pipeline, and how they are lined up."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from lesa.bench import records as kept
from lesa.bench.lines import TRAINING, Key
from lesa.host.runtime import accelerate
from lesa.host.tap import OUTPUT, place_of
from lesa.predictors import LESA, ContinuousLESA, Predictor
from lesa.predictors.solved import Solved
from lesa.rows.default import Default
from lesa.rows.forecasters import Forecaster, Lagrange, Reuse, Taylor
from lesa.rows.rivals import ABCache, FoCa, Hermite, MeanCache, Spectrum
from lesa.rows.schedule import Schedule

FEATURE = "feature"
"""The usual tap of a class of transformers (see `lesa.accelerate`)."""
OURS = " (our tap)"
"""What is said of a published method that works in other places than ours."""
ITS_OWN = "its own"
"""The schedule, in tables, of rows that say which steps are full."""
MOST_ORDER = 8
"""Taylor and Lagrange rows up to this order are made again from what records say of them."""
RIVALS: Mapping[str, Forecaster] = {
    f"HiCache-2{OURS}": Hermite(2),
    "Spectrum": Spectrum(),
    "Spectrum, ridge 1e-3": Spectrum(1e-3),
    f"FoCa{OURS}": FoCa(),
    f"MeanCache-2{OURS}": MeanCache(2),
    f"MeanCache-5{OURS}": MeanCache(5),
    f"AB-Cache-2{OURS}": ABCache(2),
    f"AB-Cache-2, full steps{OURS}": ABCache(2, full_only=True),
}
"""Other projects' forecasters that are rows, by their names in tables: on the schedules of all, and planned for."""


@dataclass(frozen=True)
class Method:
    """One way to run a pipeline.

    `name` and `schedule` name it in tables, `call` holds the arguments of the pipeline's call that it changes, and
    `switch` turns it on for a pipeline and off again. What makes a picture in fewer full steps can be one. `recipe` is
    what it is made of, as JSON: records keep it, `rebuild` reads it. If it is `optional`, it may fail: its error is
    listed, and the others go on. If it is `partial`, it may skip parts of a step, and its full steps are a share of
    FLOPs; if it goes `alone`, what it does depends on the whole batch, and each pair is drawn in a call of its own.
    """

    name: str
    schedule: str
    call: Mapping[str, Any] = field(default_factory=dict)
    switch: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    recipe: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False
    partial: bool = False
    alone: bool = False

    @property
    def key(self) -> Key:
        """What tells it from other methods."""
        return self.name, self.schedule

    def entry(self) -> dict[str, Any]:
        """Return what records say of it."""
        entry = {"name": self.name, "schedule": self.schedule, "call": dict(self.call), "recipe": dict(self.recipe)}
        return json.loads(json.dumps(entry))


REFERENCE = Method(*kept.REFERENCE)
"""The run that all others are measured against."""


CALIBRATED = "calibrated"
"""What a calibration kept: solved rows, or rows without training where these were better on its checked calls."""
BOUND = "bound (output tap)"
"""No method: `bound_error` as pictures. Forecasts of what enters the final norm can be above it."""


def fewer_steps(steps: int) -> Method:
    """The same sampler with fewer steps, all of them full."""
    return Method("fewer steps", f"{steps} steps", call={"num_inference_steps": steps}, recipe={"steps": steps})


def forecast(name: str, forecaster: Forecaster, schedule: Schedule, place: str = FEATURE) -> Method:
    """The pipeline accelerated by a forecaster on a schedule; a predictor taps where it was trained, others here."""
    recipe: dict[str, Any] = {"forecaster": repr(forecaster), **({"tap": place} if place != FEATURE else {})}
    tap = None if isinstance(forecaster, Predictor) else place
    if isinstance(forecaster, Predictor):
        took = {name: forecaster.origin.training[name] for name in TRAINING if name in forecaster.origin.training}
        recipe = {"predictor": forecaster.digest(), **took}
    return Method(
        name,
        str(schedule),
        switch=lambda pipe: accelerate(pipe, forecaster, schedule=schedule, tap=tap),
        recipe=recipe,
    )


def on_its_own(name: str, forecaster: Forecaster) -> Method:
    """The pipeline accelerated by rows that say which steps are full once they see the grid, at the output."""
    recipe = {"forecaster": repr(forecaster), "tap": OUTPUT}
    return Method(name, ITS_OWN, switch=lambda pipe: accelerate(pipe, forecaster, tap=OUTPUT), recipe=recipe)


def rebuild(entry: Mapping[str, Any], predictors: Sequence[Predictor] = ()) -> Method:
    """Make a method again from what records say of it; a trained one from the predictors given.

    Raises: LookupError if it is made of something else, or of a predictor that is not given.
    """
    recipe, schedule = entry["recipe"], entry["schedule"]
    if (entry["name"], schedule) == REFERENCE.key:
        return REFERENCE
    if "steps" in recipe:
        return replace(fewer_steps(recipe["steps"]), name=entry["name"])
    named = [Default(), *(kind(k) for kind in (Taylor, Lagrange) for k in range(MOST_ORDER + 1))]
    plain = {repr(one): one for one in [*untrained(reuse=True, lagrange=True, rivals=True).values(), *named]}
    forecaster: Any = plain.get(recipe.get("forecaster"))
    if "predictor" in recipe:
        forecaster = next((one for one in predictors if one.digest() == recipe["predictor"]), None)
    if forecaster is None:
        raise LookupError(f"{entry['name']} is made of {recipe}, which is not at hand; name the predictor's folder.")
    if schedule == ITS_OWN:
        return on_its_own(entry["name"], forecaster)
    return forecast(entry["name"], forecaster, Schedule.parse(schedule), recipe.get("tap", FEATURE))


def label(predictor: Predictor) -> str:
    """Name a predictor in tables: its method, and in brackets what sets it apart from the usual one of its kind."""
    if isinstance(predictor, Solved):
        return CALIBRATED
    training, place = predictor.origin.training, _place(predictor)
    apart = [] if place == FEATURE else [f"{place} tap"]
    apart += ["with forecasts"] if isinstance(predictor, LESA) and predictor.remembers_forecasts else []
    apart += ["phase 1"] if training.get("phase") == "ground-truth" else []
    apart += {"features": ["feature loss"], "steps": ["per step"]}.get(training.get("loss", "latents"), [])
    return predictor.method.upper() + (f" ({', '.join(apart)})" if apart else "")


def _place(predictor: Predictor) -> str:
    return place_of(predictor.origin.transformer, predictor.origin.tap)


def untrained(
    reuse: bool,
    lagrange: bool = False,
    place: str = FEATURE,
    *,
    rivals: bool = False,
    rows: Mapping[str, Forecaster] | None = None,
) -> dict[str, Forecaster]:
    """Return the forecasters that need no training, by their names in tables, for a tap; or `rows` in their place."""
    plain: dict[str, Forecaster] = {"reuse": Reuse()} if reuse else {}
    plain |= {f"Taylor-{order}{OURS}": Taylor(order) for order in (1, 2)}
    plain |= {f"Lagrange-{degree}": Lagrange(degree) for degree in (1, 2, 3)} if lagrange else {}
    plain |= RIVALS if rivals else {}
    plain = plain if rows is None else dict(rows)
    if place == FEATURE:
        return plain
    return {f"{name.removesuffix(OURS)} ({place} tap)": forecaster for name, forecaster in plain.items()}


def line_up_planned(
    budgets: Sequence[int],
    grid: Tensor,
    plan: Callable[[Forecaster, int, str], Schedule],
    predictors: Sequence[Predictor] = (),
    *,
    reuse: bool = True,
    rivals: bool = True,
    rows: Mapping[str, Forecaster] | None = None,
    only: Collection[str] | None = None,
    usual: str = FEATURE,
) -> list[Method]:
    """Line up every method on the schedule that is planned for it, budget by budget, or those of these names only.

    `plan` finds the schedule of a forecaster that needs no training, at a tap; a predictor has its own. At each tap of
    a predictor there are methods without training too, and at the `usual` one.
    """

    def fits(predictor: Predictor, budget: int) -> bool:
        bound = not isinstance(predictor, ContinuousLESA)
        if bound and (predictor.schedule.rule != "at" or len(predictor.grid) != len(grid)):
            return False
        return predictor.is_for(budget=budget)

    methods: list[Method] = []
    for budget in budgets:
        methods.append(fewer_steps(budget))
        chosen = [one for one in predictors if fits(one, budget)]
        for place in _places(chosen, usual):
            plain = untrained(reuse, lagrange=True, place=place, rivals=rivals, rows=rows)
            plain = {name: one for name, one in plain.items() if only is None or name in only}
            methods += [forecast(name, one, plan(one, budget, place), place) for name, one in plain.items()]
        methods += [forecast(label(one), one, one.schedule_for(grid, budget, one.begins[0])) for one in chosen]
    return methods


def line_up(
    steps: int,
    schedules: Sequence[Schedule],
    predictors: Sequence[Predictor] = (),
    *,
    reuse: bool = False,
    rivals: bool = False,
    rows: Mapping[str, Forecaster] | None = None,
    usual: str = FEATURE,
) -> list[Method]:
    """Line up the methods for runs of `steps` steps, schedule by schedule: those without training, then predictors.

    Predictors for other schedules, or for runs of other lengths, are left out. At each tap of a predictor there are
    methods without training too, and at the `usual` one.
    """

    def fits(predictor: Predictor, schedule: Schedule) -> bool:
        bound = not isinstance(predictor, ContinuousLESA)
        return bound and predictor.schedule == schedule and len(predictor.grid) - 1 == steps

    of_their_own = {name: one for name, one in (rows or {}).items() if hasattr(one, "schedule_for")}
    methods = [on_its_own(name, one) for name, one in of_their_own.items()]
    for schedule in schedules:
        fewer = fewer_steps(len(schedule.full_steps(steps)))
        methods += [] if fewer in methods else [fewer]
        chosen = [one for one in predictors if fits(one, schedule)]
        for place in _places(chosen, usual):
            plain = untrained(reuse, place=place, rivals=rivals, rows=rows)
            methods += [forecast(name, forecaster, schedule, place) for name, forecaster in plain.items()]
        methods += [forecast(label(one), one, schedule) for one in chosen]
    return methods


def _places(predictors: Sequence[Predictor], usual: str) -> list[str]:
    """Return the taps of some predictors, the usual one before them."""
    return list(dict.fromkeys([usual, *map(_place, predictors)]))


def more_steps(steps: int) -> Method:
    """The same sampler with more steps: how much of a method's error is the reference run's own."""
    return replace(fewer_steps(steps), name="more steps")
