"""Train a predictor on a pipeline's recorded runs: plan, fit, run it again and again, judge, keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from torch import nn

from lesa.host.head import head
from lesa.host.pipelines import source_of
from lesa.host.runtime import denoisers_of
from lesa.host.tap import tap_of
from lesa.learn import said, training
from lesa.learn.alone import alone_in
from lesa.learn.beginning import Say, quiet, remember, staged, untrained
from lesa.learn.calls import Call, plain_calls
from lesa.learn.collecting import opened
from lesa.learn.kept import begun
from lesa.learn.lessons import Curve, Lesson, Result
from lesa.learn.options import TrainOptions
from lesa.learn.outcome import shortfalls
from lesa.learn.plan import finder, planner_of, usual_schedule
from lesa.learn.reruns import Reruns
from lesa.learn.trajectory import Store
from lesa.predictors import Predictor
from lesa.predictors.base import check_place
from lesa.predictors.fingerprint import pipeline_fingerprint
from lesa.rows.tap import Tap

CURVE = "training.png"
"""The plot of a training's curve, which the command draws beside its predictor."""
ROUNDS, GROUND_TRUTH, RECORDED = "rounds", "ground-truth", "recorded"


@dataclass(frozen=True)
class Trained:
    """A trained predictor, and what its training came to.

    `scores` holds the drift in dB of every round's real runs, with the `curve` of the fit; a least squares fit has
    neither. `shortfalls` says of what use the training was not (see `lesa.learn.outcome`). `seconds` are those of this
    call, without judging; it is kept in `folder`.
    """

    predictor: Predictor
    folder: Path
    shortfalls: list[str]
    seconds: float
    scores: list[float]
    curve: Curve | None = None


@said.once()
def train(
    pipe: Any,
    data: Store | str | Path | Sequence[Store | str | Path],
    prompts: Sequence[Call],
    folder: str | Path,
    options: TrainOptions = TrainOptions(),
    *,
    say: Say = quiet,
) -> Trained:
    """Train a predictor for a pipeline on its recorded runs (what `lesa.collect` left); resumable.

    `prompts` (or calls) are to validate on: their runs choose the best round. The predictor is kept in `folder`, and
    its rounds below it. Several collections are for a predictor of many grids. `say` takes lines on the way.

        trained = lesa.train(pipe, "runs", prompts, "my-predictor", lesa.TrainOptions(method="l2p", budgets=[8]))

    Raises: ValueError if data, options and folder do not go together, or the folder holds something else;
        FileNotFoundError if there are no recorded runs; RuntimeError if another process trains into the folder.
    """
    place_for(folder)
    stores = [opened(one) for one in ([data] if isinstance(data, (Store, str, Path)) else data)]
    options.check_lessons(len(stores))
    _check_runs(pipe, stores)
    with alone_in(Path(folder), doing="training", again="train again"):
        return _train(pipe, stores, prompts, Path(folder), options, say)


def _train(
    pipe: Any, stores: Sequence[Store], prompts: Sequence[Call], folder: Path, options: TrainOptions, say: Say
) -> Trained:
    began = monotonic()
    denoiser, sampled = getattr(pipe, denoisers_of(pipe)[0]), stores[0].load(0).at_sampler
    tap = Tap() if sampled else tap_of(denoiser, options.place)
    if options.predictor is not None:
        options.predictor.check_model(denoiser, tap)
    resumed = (folder / ROUNDS).exists()
    reruns = Reruns(pipe, tap, plain_calls(prompts), folder / ROUNDS / RECORDED, options.batch_size)
    with _frozen(denoiser):
        lessons = _lessons(pipe, stores, reruns, options, say)
        start = untrained(pipe, stores, lessons, options)
        fit = _least_squares if options.loss == "steps" else _rounds
        result, start = fit(pipe, start, lessons, reruns, options, folder, say)
        seconds = monotonic() - began
        _save(result, stores, options, folder, None if resumed else seconds)
        found = shortfalls(result.predictor, start, lambda forecaster: reruns.drift(forecaster, lessons))
    reruns.forget()
    return Trained(result.predictor, folder, found, seconds, result.scores, result.curve if result.scores else None)


def place_for(folder: str | Path) -> None:
    """Check before the work that a training, or a predictor, written there would take the place of nothing else.

    Raises: ValueError if it would.
    """
    rounds = Path(folder) / ROUNDS
    there = begun(rounds) is not None or (rounds / RECORDED).exists()
    check_place(folder, there, also=[CURVE])
    check_place(Path(folder) / GROUND_TRUTH, there)


def _check_runs(pipe: Any, stores: Sequence[Store]) -> None:
    for store in stores:
        if pipeline_fingerprint(pipe) != store.collection.weights:
            raise ValueError(
                f"{store.folder} was collected from other weights than those of {source_of(pipe).model}; collect anew."
            )
        if not len(store):
            raise ValueError(f"training needs recorded runs, and {store.folder} holds none; run lesa collect.")


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Let nothing of a module be trained: its head is differentiated."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _lessons(pipe: Any, stores: Sequence[Store], reruns: Reruns, options: TrainOptions, say: Say) -> list[Lesson]:
    """Make a lesson of each collection and schedule, with runs of the validation prompts."""
    lessons = []
    for store in stores:
        reference = list(store)
        reruns.call_as(store)
        validation = reruns.validation(reference[0], f"reference-{store.digest()}")
        for schedule in _schedules(pipe, store, options, say):
            lessons.append(Lesson(reference, validation, schedule))
    return lessons


def _schedules(pipe: Any, store: Store, options: TrainOptions, say: Say) -> list[Any]:
    """Return the schedule named, or one planned for each budget."""
    if not options.budgets:
        return [options.schedule or usual_schedule(len(store.collection.grid) - 1)]
    planner = planner_of(pipe, store, options.place)
    found = [finder(planner)(options.predictor or options.forecaster, budget) for budget in options.budgets]
    for schedule in found:
        say(f"planned: {schedule}  {schedule.draw(planner.steps)}")
    return found


def _least_squares(
    _pipe: Any, start: Any, lessons: Sequence[Lesson], _reruns: Reruns, _options: TrainOptions, _folder: Path, _say: Say
) -> tuple[Result, Predictor]:
    """Fit free rows to each step alone."""
    fitted = deepcopy(start)
    training.least_squares(fitted, lessons[0].reference)
    return Result(fitted, fitted, [], Curve()), start


def _rounds(
    pipe: Any,
    start: Predictor,
    lessons: Sequence[Lesson],
    reruns: Reruns,
    options: TrainOptions,
    folder: Path,
    say: Say,
) -> tuple[Result, Predictor]:
    """Train in rounds; returns what that gave, and what it began with."""
    sampled = lessons[0].reference[0].at_sampler
    outputs_of = head(getattr(pipe, denoisers_of(pipe)[0]), Tap() if sampled else reruns.tap)
    start = staged(start, options, lessons[0], outputs_of, say)
    return training.train(start, lessons, outputs_of, reruns.of, options.config(), folder / ROUNDS), start


def _save(result: Result, stores: Sequence[Store], options: TrainOptions, folder: Path, seconds: float | None) -> None:
    """Keep the predictor, and beside it what it was after the ground-truth phase.

    Of a training that was stopped nobody knows how long it took.
    """
    before = options.predictor.origin.training.get("seconds") if options.predictor else 0.0
    took = {} if seconds is None or before is None else {"seconds": round(before + seconds, 1)}
    size = sum(path.stat().st_size for store in stores for path in store.paths)
    score = {"drift": round(min(result.scores), 2)} if result.scores else {}
    remember(result.predictor, **score, **took, bytes=size)
    result.predictor.save_pretrained(folder)
    if result.scores:
        first = result.ground_truth
        remember(first, drift=round(result.scores[0], 2), phase=GROUND_TRUTH, **took, bytes=size)
        first.save_pretrained(folder / GROUND_TRUTH)
