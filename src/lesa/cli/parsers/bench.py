"""What the commands that compare are asked with."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import Any

from lesa.bench.named import AS_PUBLISHED, BUDGETS, OURS
from lesa.cli import options

EMBEDDED = "models/emoji-flux"
SCORES = "MS-SSIM"


def add(commands: Any) -> None:
    """Add the commands."""
    words = "compare the methods on a few held-out prompts and draw a sheet"
    example = "lesa demo --model models/emoji-flux --pairs 8"
    parser = options.command(commands, "demo", "bench.demo", words, example, EMBEDDED)
    parser.set_defaults(peers=[], fine=None, bound=False, differences=None, predictors=None, only=None, anew=True)
    parser.set_defaults(calibrated=[], rows=None, demo=True, whole=False)
    _add_comparison(parser, pairs=32, timed=4, budgets=(6,), out="out/demo")
    words = "compare the methods on many pairs, with paired differences and the bound"
    examples = (
        "lesa bench models/emoji-flux --pairs 32 --out out/mine",
        "lesa bench models/emoji-flux --pairs 8 --schedules every:3 --budgets 8 --no-bound --rows default reuse",
    )
    parser = options.command(commands, "bench", "bench.bench", words, examples)
    parser.set_defaults(demo=False)
    _add_choices(parser)
    _add_comparison(parser, pairs=200, timed=10, budgets=BUDGETS, out="out/bench")
    _add_records(commands)


def _add_choices(parser: ArgumentParser) -> None:
    parser.add_argument("--predictors", nargs="+", metavar="FOLDER", help="default: those shipped with the model")
    words = "calibrations, in the folders of a shelf (lesa shelf): their rows beside the predictors"
    parser.add_argument("--calibrated", nargs="+", default=[], metavar="FOLDER", help=words)
    _add_differences(parser)
    parser.add_argument(
        "--peers", nargs="+", default=[], metavar="NAME", help="other projects' caches, and better samplers; or: all"
    )
    fine = "measure PSNR against a run of more steps, too"
    parser.add_argument("--fine", type=options.read_count, metavar="STEPS", help=fine)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="the methods of these names alone")
    words = "rows without training, in place of the usual ones: default, reuse, taylor:1, lagrange:2, ..."
    parser.add_argument("--rows", nargs="+", metavar="ROWS", help=words)
    parser.add_argument("--anew", action="store_true", help="remove the folder's records first, of the same setting")
    without = "leave out the bound, which records runs"
    parser.add_argument("--no-bound", dest="bound", action="store_false", help=without)


def _add_differences(parser: ArgumentParser) -> None:
    words = f"the one to compare with the rest ({OURS})"
    parser.add_argument("--differences", metavar="METHOD", default=OURS, help=words)
    words = "print the whole report, however many methods it is of"
    parser.add_argument("--all", dest="whole", action="store_true", help=words)


def _add_comparison(parser: ArgumentParser, pairs: int, timed: int, budgets: Sequence[int], out: str) -> None:
    count = options.read_count
    parser.add_argument("--prompts", metavar="FILE", help="one a line; default: the model's held-out prompts")
    parser.add_argument("--pairs", type=count, default=pairs, help=f"how many prompts, the k-th with seed k ({pairs})")
    parser.add_argument("--timed", type=int, default=timed, help=f"how many of them are timed ({timed})")
    words = "paper:7,paper:10; of few steps, those at 2x"
    parser.add_argument("--schedules", type=options.read_schedules, help=words)
    words = f"full steps to plan for ({','.join(map(str, budgets))}; of few steps, half)"
    parser.add_argument("--budgets", type=options.read_counts, help=words)
    parser.set_defaults(usual=budgets)
    words = "to plan on, of lesa collect; default: runs of its prompts"
    parser.add_argument("--data", metavar="FOLDER", help=words)
    parser.add_argument("--batch-size", type=count, default=16)
    words = f"besides PSNR, float PSNR and SSIM, some of MS-SSIM,LPIPS,CLIP,ImageReward,'{AS_PUBLISHED}' ({SCORES})"
    parser.add_argument("--scores", type=options.read_names, default=SCORES, help=words)
    words = "of plots: png, pdf or svg (png)"
    parser.add_argument("--plots", choices=("png", "pdf", "svg"), default="png", help=words)
    parser.add_argument(
        "--out", default=out, metavar="FOLDER", help=f"for the records, the report and its plots ({out})"
    )


def _add_records(commands: Any) -> None:
    words = "make tables and plots of a run's records"
    examples = ("lesa report out/mine --differences LESA", "lesa report out/mine --all --plots pdf")
    parser = options.add(commands, "report", "bench.report", words, examples)
    parser.add_argument("run", metavar="RUN", help="the folder of a lesa bench")
    _add_differences(parser)
    parser.add_argument("--plots", choices=("png", "pdf", "svg"), default="png", help="their format (png)")

    words = "do two runs differ beyond noise? 0 if not, 1 if they do"
    parser = options.add(commands, "compare", "bench.changes", words, "lesa compare out/mine out/other")
    parser.add_argument("first", metavar="RUN", help="the folder of a lesa bench")
    parser.add_argument("second", metavar="RUN", help="another, whose scores are set against it")
    parser.add_argument("--score", default="PSNR", help="PSNR, SSIM or another that both have (PSNR)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="differences up to this do not count (0.01)")

    words = "measure a record again: 0 if it is the same, 1 if not"
    examples = ("lesa reproduce out/mine/records.jsonl", "lesa reproduce out/mine/records.jsonl 120")
    parser = options.command(commands, "reproduce", "bench.reproduce", words, examples, "")
    parser.add_argument("records", metavar="FILE", help="the records.jsonl of a lesa bench")
    words = "the record's line, from 1 on; default: that of the last picture"
    parser.add_argument("line", metavar="LINE", nargs="?", type=options.read_count, help=words)
    parser.add_argument("--predictors", nargs="+", metavar="FOLDER", help="default: those shipped with the model")
    parser.add_argument("--tolerance", type=float, default=0.01, help="dB of PSNR that count as the same (0.01)")
    parser.set_defaults(device=None)
