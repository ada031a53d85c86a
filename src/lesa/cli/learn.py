"""The commands that learn: collect, plan, train, calibrate."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from time import monotonic
from typing import Any

from lesa.bench import calibrated, compare, plots, report
from lesa.cli import options
from lesa.host import needs
from lesa.host.loading import loaded
from lesa.host.tap import PLACES
from lesa.learn import calibrate as calibration
from lesa.learn import collecting, ranks
from lesa.learn import plan as planning
from lesa.learn import train as training
from lesa.learn.options import HISTORIES, LOSSES, METHODS, TrainOptions
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
    return _told(training.train(loaded(load), stores, prompts, given.out, chosen, say=options.say), without)


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

    asked = dict(budget=given.budget, budgets=given.budgets, target=given.target)
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
    options.say_aside(f"next: lesa generate {given.model} 'another prompt' --budget {budget}")
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


def add(commands: Any) -> None:
    """Add the commands."""
    words = "record runs with every step full, to train on; resumable"
    _add_collect(options.command(commands, "collect", collect, words))
    words = "choose which steps are full, for a number of full steps"
    _add_plan(options.command(commands, "plan", plan, words))
    words = "a schedule and rows from a few runs, checked by others; resumable; 3 if solving was of no use"
    _add_calibrate(options.command(commands, "calibrate", calibrate, words))
    words = "train a predictor on collected runs; resumable; 3 if it was of no use"
    parser = options.command(commands, "train", train, words)
    _add_train_data(parser)
    _add_train_method(parser)
    _add_train_fit(parser)


def _add_collect(parser: ArgumentParser) -> None:
    options.add_prompts(parser)
    parser.add_argument("--limit", type=options.read_count, help="take the first prompts only")
    parser.add_argument(
        "--seeds",
        type=options.read_seeds,
        help="each prompt with each of 0,3,7 or 0:4; default: one for each prompt, none the same",
    )
    parser.add_argument("--tap", choices=PLACES[:-1], default="feature", help="where features are taken (feature)")
    words = "tokens kept of each run; default: a hundredth, or up to 41"
    parser.add_argument("--tokens", type=options.read_count, help=words)
    parser.add_argument("--batch-size", type=options.read_count, default=16)
    parser.add_argument("--out", required=True, metavar="FOLDER")


def _add_plan(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--data", metavar="FOLDER", help="what lesa collect wrote; default: runs of the model's prompts"
    )
    options.add_calls(parser)
    words = "numbers of full steps (10,8,6)"
    parser.add_argument("--budgets", type=options.read_counts, default="10,8,6", help=words)
    parser.add_argument(
        "--forecaster", default="lagrange:2", help="what to plan for: reuse, taylor:1, ... (lagrange:2)"
    )
    parser.add_argument("--predictor", metavar="FOLDER", help="plan for a lesa-continuous instead")
    parser.add_argument("--tap", choices=PLACES, help="where forecasts are made; default: as --predictor or --data")
    parser.add_argument(
        "--refine",
        action=BooleanOptionalAction,
        default=True,
        help="choose by real runs among plans of more and more caution (the default)",
    )
    words = "draw N held-out prompts on the schedules found"
    parser.add_argument("--verify", type=options.read_count, metavar="N", help=words)
    parser.add_argument("--prompts", metavar="FILE", help="to verify with; default: the model's held-out ones")
    parser.add_argument("--plot", metavar="FILE", help="draw the PSNR of --verify (16) over the number of full steps")


def _add_calibrate(parser: ArgumentParser) -> None:
    parser.epilog = (
        "Exits with 3 where rows without training, on a schedule planned for them, end nearer to the reference runs "
        "than what was solved for; they are kept in its place."
    )
    options.add_prompts(parser)
    parser.add_argument("--limit", type=options.read_count, default=12, help="how many of them (12)")
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument("--budget", type=options.read_count, help="full steps; default: a sixth of all")
    budgets.add_argument("--budgets", type=options.read_counts, metavar="N,M", help="several numbers of full steps")
    words = "what checked calls keep with the fewest full steps: psnr:40, ssim:0.97 or drift:-45"
    parser.add_argument("--target", type=options.read_target, metavar="MEASURE:VALUE", help=words)
    words = "how many of the prompts are checked on; default: a third, or of less than four the same with other seeds"
    parser.add_argument("--checked", type=options.read_count, help=words)
    parser.add_argument("--refine", type=int, default=2, help="steps on the end of runs at most (2)")
    parser.add_argument("--seed", type=int, default=0, help="what all noise of the calibration depends on (0)")
    parser.add_argument("--batch-size", type=options.read_count, help="16; of large models 1")
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="measure the last latents alone")
    parser.add_argument("--plot", metavar="FILE", help="draw the curve, and the worst pictures of each budget")
    parser.add_argument("--out", metavar="FOLDER", help="a predictor's folder besides the shelf")


def _add_train_data(parser: ArgumentParser) -> None:
    parser.epilog = (
        "Exits with 3 where the training gained nothing over what it began with, or its runs end further from their "
        "reference runs than Lagrange rows on the same schedule; the predictor is saved all the same."
    )
    words = "what lesa collect wrote; several: lesa-continuous"
    parser.add_argument("--data", nargs="+", required=True, metavar="FOLDER", help=words)
    options.add_prompts(parser, "validation-", "one a line; they choose the round")
    parser.add_argument("--validation", type=options.read_count, default=32, help="how many of them (32)")
    words = "which steps are full (paper:7; at:0,2 of 4, at:0,1,3,5 of 8)"
    parser.add_argument("--schedule", type=options.read_schedule, help=words)
    words = "plan the schedule, of N full steps; N,M: lesa-continuous"
    parser.add_argument("--budgets", type=options.read_counts, metavar="N", help=words)
    parser.add_argument("--forecaster", default="lagrange:2", help="what is planned with (lagrange:2)")
    parser.add_argument("--out", required=True, metavar="FOLDER")


def _add_train_method(parser: ArgumentParser) -> None:
    parser.add_argument("--tap", choices=PLACES, help="what is forecast (feature, or as --predictor)")
    parser.add_argument("--method", choices=METHODS, default="lesa")
    parser.add_argument("--history", choices=HISTORIES, default="full", help="of full steps, or of forecasts too")
    words = "of LESA: how many past features each stage combines (4,8,8)"
    parser.add_argument("--memories", type=options.read_counts, help=words)
    parser.add_argument(
        "--paper",
        action="store_true",
        help="the paper's predictor, loss and learning rate, whatever --method, --history and --loss say",
    )
    parser.add_argument(
        "--stages",
        type=options.read_stages,
        help="of LESA: how many, with bounds learned from the runs, 'learned' for their number too, or the bounds, "
        "as falling times (0.9,0.5)",
    )
    parser.add_argument(
        "--predictor",
        metavar="FOLDER",
        help="begin with this trained predictor, whatever --method and --history say; with --budgets a lesa-continuous "
        "is planned for, not a --forecaster",
    )


def _add_train_fit(parser: ArgumentParser) -> None:
    parser.add_argument("--loss", choices=LOSSES, default="latents")
    parser.add_argument("--rounds", type=int, default=4, help="of the closed-loop phase (4)")
    words = "in each phase or round (200 200)"
    parser.add_argument("--updates", type=int, nargs=2, default=(200, 200), help=words)
    parser.add_argument(
        "--floor",
        type=float,
        default=-120.0,
        metavar="DB",
        help="drifts far below this are not worth lowering: of several lessons, those above it count for more (-120)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=options.read_count, default=16)
