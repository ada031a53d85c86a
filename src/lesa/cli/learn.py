"""The commands that learn: collect, plan, train, calibrate."""

from __future__ import annotations

from argparse import Namespace
from time import monotonic
from typing import Any

from lesa.bench import calibrated, compare, plots, report
from lesa.cli import options
from lesa.host import needs
from lesa.host.loading import loaded
from lesa.learn import calibrate as calibration
from lesa.learn import collecting, ranks
from lesa.learn import plan as planning
from lesa.learn import train as training
from lesa.learn.options import TrainOptions
from lesa.learn.outcome import GAINED_NOTHING
from lesa.predictors import Predictor
from lesa.predictors.base import check_place
from lesa.predictors.curve import Curve, Point


def collect(given: Namespace) -> None:
    """Record runs with every step full."""
    prompts, load = options.runs_of(given.prompts, given.calls, given.limit), options.load_options(given)
    chosen = collecting.CollectOptions(given.tap, given.tokens, given.batch_size, options.more_of_call(load))
    with ranks.together() as at:
        store = collecting.collect(loaded(load), prompts, given.out, chosen, seeds=given.seeds, at=at)
        if at.leads:
            options.say(f"{len(store)} runs in {given.out}, digest {store.digest()}")
            more = ("--validation-prompts", "FILE", "--out", "FOLDER")
            options.say_next("train", *options.as_given(given), "--data", given.out, *more)


def plan(given: Namespace) -> None:
    """Choose which steps are full."""
    if given.plot:
        needs.check("lesa plan --plot", "comparison", "plots")
    if given.verify:
        needs.check("lesa plan --verify", "comparison")
    store, load = collecting.opened(given.data) if given.data else None, options.load_options(given)
    prompts = options.runs_of(None, given.calls) if given.calls else None
    pipe, began = loaded(collecting.as_collected(load, store) if store else load), monotonic()
    forecaster, found = options.forecaster_of(given), []
    assert forecaster is not None  # it has a default
    chosen = planning.PlanOptions(forecaster, given.tap, given.refine)
    for planned in planning.plans(pipe, given.budgets, prompts, chosen, data=store):
        drifts = f"drift {planned.promised:.1f} dB, {planned.real:.1f} dB in real runs"
        options.say(f"{planned.schedule}  {planned.drawn}  {drifts}")
        found.append(planned)
    options.say_aside(f"planned in {monotonic() - began:.1f} s{'' if store else ', the runs included'}")
    if given.verify or given.plot:
        _verify(given, pipe, forecaster, found)
    rows = ("--predictor", given.predictor) if given.predictor else ("--forecaster", given.forecaster)
    options.say_next("generate", *options.as_given(given), "PROMPT", *rows, "--schedule", found[-1].schedule)


def _verify(given: Namespace, pipe: Any, forecaster: Any, found: list[planning.Planned]) -> None:
    _, prompts = options.held_out(given, given.verify or 16)
    comparison = compare.verify(pipe, forecaster, [one.schedule for one in found], prompts, found[0].place)
    options.say(f"\n{len(prompts)} held-out prompts\n\n{report.table(comparison.results())}")
    if given.plot:
        plots.psnr_over(comparison.results(), given.plot)
        options.say(f"\n{given.plot}")


def train(given: Namespace) -> int:
    """Train a predictor on collected runs."""
    chosen, load = _train_options(given), options.load_options(given)
    training.place_for(given.out)
    without = _plotless()
    stores = [collecting.opened(place) for place in given.data]
    chosen.check_lessons(len(stores))
    prompts = options.runs_of(given.validation_prompts, given.validation_calls, given.validation)
    code = _told(training.train(loaded(load), stores, prompts, given.out, chosen, say=options.say), without)
    options.say_next("generate", *options.as_given(given), "PROMPT", "--predictor", given.out)
    return code


def _train_options(given: Namespace) -> TrainOptions:
    start = Predictor.from_pretrained(given.predictor) if given.predictor else None
    named = Namespace(forecaster=given.forecaster)
    return TrainOptions(
        method=given.method,
        history=given.history,
        memories=given.memories,
        stages=given.stages,
        schedule=given.schedule,
        budgets=given.budgets or (),
        forecaster=options.forecaster_of(named) or TrainOptions.forecaster,
        tap=given.tap,
        loss=given.loss,
        fit=given.fit,
        paper=given.paper,
        rounds=given.rounds,
        updates=tuple(given.updates),
        floor=given.floor,
        seed=given.seed,
        batch_size=given.batch_size,
        predictor=start,
    )


def calibrate(given: Namespace) -> int:
    """Find a schedule and rows from a few runs, check them, and keep them where `lesa.accelerate` finds them."""
    if given.plot:
        needs.check("lesa calibrate --plot", "plots")
    if given.out:
        check_place(given.out)
    began, load, worst = monotonic(), options.load_options(given), {}
    prompts = options.runs_of(given.prompts, given.calls, given.limit)
    chosen = calibration.CalibrateOptions(
        given.checked, given.seed, given.refine, batch_size=given.batch_size, pictures=given.pictures
    )

    def told(point: Point, pictures: calibrated.Pictures | None) -> None:
        options.say(f"{point.full_steps} full steps, {point.kept.rows} on {point.kept.schedule}: {point.promise}")
        if pictures is not None:
            worst[point.full_steps] = pictures

    asked = dict(budget=given.budget, budgets=given.budgets, target=given.target, near=given.near)
    pipe = loaded(load)
    predictor = calibration.calibrate(pipe, prompts, given.out, chosen, **asked, on_point=told)
    curve = predictor.curve
    assert curve is not None
    options.say(f"\n{curve.table()}\n")
    if given.plot:
        calibrated.plot(curve, worst, given.plot)
        options.say(given.plot)
    return _calibrated(given, curve, len(predictor.full), monotonic() - began)


def _calibrated(given: Namespace, curve: Curve, budget: int, seconds: float) -> int:
    """Say what a calibration came to, and what to do next."""
    point = curve.at(budget)
    options.say_aside(f"calibrated in {seconds:.1f} s, the runs included; the predictors are on the shelf (lesa shelf)")
    options.say_next("generate", *options.as_given(given), "another prompt", "--budget", budget)
    for one in curve.points:
        if one.left_out:
            options.say_aside(f"lesa: at {one.full_steps} full steps, left out: {one.left_out}")
    if point.is_solved:
        return 0
    options.say_aside(
        f"lesa: solving gained nothing at {budget} full steps: {point.kept.rows} is kept, without training"
    )
    return GAINED_NOTHING


def _plotless() -> str:
    """Say whether a training will end without a plot; returns what that would need."""
    without = needs.lacking("plots")
    if without:
        options.say_aside(f"no plot of the training will be drawn: it needs {without}")
    return without


def _told(trained: training.Trained, without: str) -> int:
    """Say what a training came to, and draw its curve."""
    if trained.curve and not without:
        plots.training_curve(trained.curve, trained.folder / training.CURVE)
    for number, score in enumerate(trained.scores):
        options.say(f"round {number}: drift {score:.2f} dB")
    options.say_aside(f"trained in {trained.seconds:.1f} s")
    for line in trained.shortfalls:
        options.say_aside(f"lesa: {line}")
    options.say(str(trained.folder))
    return GAINED_NOTHING if trained.shortfalls else 0
