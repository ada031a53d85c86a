"""The commands that learn: collect, plan, train, calibrate."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from time import monotonic
from typing import Any

from lesa.bench import compare, plots, report
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
    """Collect, plan and train in one, from a few runs."""
    began = monotonic()
    training.place_for(given.out)
    without, load = _plotless(), options.load_options(given)
    forecaster = options.forecaster_of(given) or calibration.CalibrateOptions.forecaster
    call = options.more_of_call(load)
    chosen = calibration.CalibrateOptions(given.budget, forecaster, given.tap, given.batch_size, call)
    prompts = options.runs_of(given.prompts, given.calls, given.limit)
    with ranks.together() as at:
        trained = calibration.calibrate(loaded(load), prompts, given.out, chosen, at=at, say=options.say)
    code = _told(trained, without)
    options.say_aside(f"calibrated in {monotonic() - began:.1f} s, the runs included")
    return code


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
    words = "a planned schedule and rows from a few runs, in minutes"
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
    options.add_prompts(parser)
    parser.add_argument("--limit", type=options.read_count, default=8, help="how many of them (8)")
    parser.add_argument("--budget", type=options.read_count, default=8, help="full steps (8)")
    parser.add_argument("--forecaster", default="lagrange:2", help="what the schedule is planned with (lagrange:2)")
    parser.add_argument("--tap", choices=PLACES, default="feature", help="where forecasts are made")
    parser.add_argument("--batch-size", type=options.read_count, default=8)
    parser.add_argument("--out", required=True, metavar="FOLDER")


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
