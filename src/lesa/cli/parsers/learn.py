"""What the commands that learn are asked with."""

from __future__ import annotations

from argparse import ArgumentParser, BooleanOptionalAction
from typing import Any

from lesa.cli import options
from lesa.learn.named import FITS, GRADIENT, HISTORIES, LOSSES, METHODS
from lesa.rows.tap import PLACES

OF_NO_USE = (
    "Exits with 3 where rows without training, on a schedule planned for them, end nearer to the reference runs "
    "than what was solved for; they are kept in its place."
)
GAINED_NOTHING = (
    "Exits with 3 where the training gained nothing over what it began with, or its runs end further from their "
    "reference runs than Lagrange rows on the same schedule; the predictor is saved all the same."
)


def add(commands: Any) -> None:
    """Add the commands."""
    words = "record runs with every step full, to train on; resumable"
    example = "lesa collect models/emoji-flux --prompts models/emoji-flux/prompts/train.txt --limit 32 --out out/runs"
    more = "Called again with a larger --limit, or more prompts or seeds behind the others, it adds what lacks."
    _add_collect(options.command(commands, "collect", "learn.collect", words, example, more=more))
    words = "choose which steps are full, for a number of full steps"
    example = "lesa plan models/emoji-flux --budgets 8,6 --verify 8"
    _add_plan(options.command(commands, "plan", "learn.plan", words, example))
    words = "a schedule and rows from a few runs, checked by others; resumable; 3 if solving was of no use"
    examples = (
        "lesa calibrate models/emoji-flux --prompts models/emoji-flux/prompts/train.txt --budget 6",
        "lesa calibrate MODEL --prompts FILE --target psnr:40 --plot curve.png",
    )
    _add_calibrate(options.command(commands, "calibrate", "learn.calibrate", words, examples, more=OF_NO_USE))
    words = "train a predictor on collected runs; resumable; 3 if it was of no use"
    example = (
        "lesa train models/emoji-flux --data out/runs --validation-prompts models/emoji-flux/prompts/validation.txt "
        "--budgets 6 --out out/lesa"
    )
    parser = options.command(commands, "train", "learn.train", words, example, more=GAINED_NOTHING)
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
    parser.add_argument("--limit", type=options.read_count, default=12, help="how many of them (12)")
    budgets = parser.add_mutually_exclusive_group()
    budgets.add_argument("--budget", type=options.read_count, help="full steps; default: a sixth of all")
    budgets.add_argument("--budgets", type=options.read_counts, metavar="N,M", help="several numbers of full steps")
    words = "what checked calls promise of others, with the fewest full steps: psnr:40, ssim:0.97, lpips:0.1, drift:-45"
    parser.add_argument("--target", type=options.read_target, metavar="MEASURE:VALUE", help=words)
    words = "begin with a calibration on the shelf, of other times: its algebra says which steps are full"
    parser.add_argument("--near", action="store_true", help=words)
    words = "how many of the prompts are checked on (a third, for --target a half; of fewer than four all, other seeds)"
    parser.add_argument("--checked", type=options.read_count, help=words)
    parser.add_argument("--refine", type=int, default=2, help="steps on the end of runs at most (2)")
    parser.add_argument("--seed", type=int, default=0, help="what all noise of the calibration depends on (0)")
    parser.add_argument("--batch-size", type=options.read_count, help="16; of large models 1")
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="measure the last latents alone")
    parser.add_argument("--plot", metavar="FILE", help="draw the curve, and the worst pictures of each budget")
    parser.add_argument("--out", metavar="FOLDER", help="a predictor's folder besides the shelf")


def _add_train_data(parser: ArgumentParser) -> None:
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
    words = "how many past features each stage of a LESA combines (4,8,8), or L2P (4)"
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
    words = "of --method lesa and l2p, for --loss latents: 'least-squares', in far fewer steps (gradient)"
    parser.add_argument("--fit", choices=FITS, default=GRADIENT, help=words)
    parser.add_argument("--rounds", type=int, default=4, help="of the closed-loop phase (4)")
    words = "steps in each phase or round, at most (200 200)"
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
