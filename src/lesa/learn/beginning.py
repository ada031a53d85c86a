"""What a training begins with: a new predictor for the recorded runs, or a trained one's numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from lesa.host.pipelines import arguments_of
from lesa.host.runtime import denoisers_of
from lesa.host.tap import tap_of
from lesa.learn.collecting import recorded
from lesa.learn.guidance import facts
from lesa.learn.lessons import Lesson
from lesa.learn.named import CONTINUOUS, LEARNED
from lesa.learn.options import TrainOptions
from lesa.learn.planning import PLANNED_ON, Planner
from lesa.learn.stages import choose, learn
from lesa.learn.training import Head
from lesa.learn.trajectory import Store
from lesa.predictors import L2P, LESA, ContinuousLESA, Origin, Predictor, configuration
from lesa.rows.tap import Tap

Say = Callable[[str], object]
"""Takes a line of what a long work has found so far."""


def quiet(_line: str) -> None:
    """Say nothing."""


SETTINGS = ("loss", "fit", "rounds", "updates", "floor", "seed", "history", "paper")
"""The options that an origin remembers."""


def untrained(pipe: Any, stores: Sequence[Store], lessons: Sequence[Lesson], options: TrainOptions) -> Predictor:
    """Make what is trained: a new predictor, or one with the numbers of that which training begins with."""
    origin, start = origin_of(pipe, stores, lessons, options), options.predictor
    if options.method == CONTINUOUS:
        chosen = {**(start.options() if start else {}), "schedules": list(_schedules(lessons).items())}
        return _like(start, ContinuousLESA(origin, **chosen))
    if start is not None:
        return _like(start, type(start)(origin, **start.options()))
    return _new(origin, options)


def origin_of(pipe: Any, stores: Sequence[Store], lessons: Sequence[Lesson], options: TrainOptions) -> Origin:
    """Say what a predictor is trained for and on."""
    import diffusers
    import torch

    first, denoiser = lessons[0].reference[0], getattr(pipe, denoisers_of(pipe)[0])
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings |= {} if first.begins == (0,) else {"begins": list(first.begins)}
    settings |= {"start": options.predictor.digest()} if options.predictor else {}
    collected = {id(lesson.reference): lesson.reference for lesson in lessons}
    settings |= facts(pipe, list(collected.values()), {**arguments_of(pipe), **stores[0].collection.call})
    return Origin(
        model=stores[0].collection.model,
        transformer=type(denoiser).__name__,
        config=configuration(denoiser),
        tap=Tap() if first.at_sampler else recorded(stores[0], tap_of(denoiser, options.place)),
        grid=tuple(first.grid.tolist()),
        schedule=str(lessons[0].schedule),
        streams=first.streams,
        data=" ".join(store.digest() for store in stores),
        training=settings,
        versions={"torch": torch.__version__, "diffusers": diffusers.__version__, "lesa": version("lesa-cache")},
    )


def staged(predictor: Predictor, options: TrainOptions, lesson: Lesson, head: Head, say: Say) -> Predictor:
    """Make a LESA anew with other stages: with these bounds, with so many learned ones, or with as many as pay."""
    if not options.stages or not isinstance(predictor, LESA):
        return predictor

    def planner(runs: Sequence[Any]) -> Planner:
        return Planner(runs[:PLANNED_ON], head, tap=predictor.origin.tap)

    skipped = [step for step in range(len(predictor.grid) - 1) if step not in predictor.full]
    pasts, bounds = {step: predictor.past(step) for step in skipped}, options.stages
    if bounds == LEARNED:
        bounds = choose(planner(lesson.reference), planner(lesson.validation), pasts)
    elif isinstance(bounds, int):
        bounds = learn(planner(lesson.reference), pasts, bounds)
    say(f"{len(bounds) + 1} stages, bounds {', '.join(f'{bound:.3f}' for bound in bounds) or 'none'}")
    memories = [predictor.memory] * (len(bounds) + 1)
    return LESA(predictor.origin, **{**predictor.options(), "bounds": bounds, "memories": memories})


def remember(predictor: Predictor, **facts: Any) -> None:
    """Let a predictor's origin say more of its training."""
    predictor.origin = replace(predictor.origin, training={**predictor.origin.training, **facts})


def _new(origin: Origin, options: TrainOptions) -> Predictor:
    if options.paper:
        return LESA.paper(origin)
    remembers_forecasts = options.history == "all"
    if options.method == "l2p":
        if options.memories:
            return L2P(origin, memory=options.memories[0], remembers_forecasts=remembers_forecasts)
        return L2P(origin, remembers_forecasts=remembers_forecasts)
    if options.memories:
        return LESA(origin, memories=options.memories, remembers_forecasts=remembers_forecasts)
    return LESA(origin, remembers_forecasts=remembers_forecasts)


def _schedules(lessons: Sequence[Lesson]) -> dict[tuple[float, ...], list[str]]:
    """Return the schedules of each grid."""
    found: dict[tuple[float, ...], list[str]] = {}
    for lesson in lessons:
        found.setdefault(tuple(lesson.reference[0].grid.tolist()), []).append(str(lesson.schedule))
    return found


def _like(start: Predictor | None, predictor: Predictor) -> Predictor:
    """Give a predictor the numbers of another one of its kind, if there is one."""
    if start is None:
        return predictor
    there, here = start.origin, predictor.origin
    if there.streams != here.streams:
        raise ValueError(
            f"training begins with a predictor of the same streams, got {there.streams}, and {here.streams} in the "
            "recorded runs; name another as predictor=."
        )
    if predictor.method != CONTINUOUS:
        start.check_grid(predictor.grid)
    predictor.load_state_dict(start.state_dict())
    return predictor
