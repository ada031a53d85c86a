"""The commands that compare: demo, bench, report, compare, reproduce."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lesa.bench import again, page, scores
from lesa.bench.compare import BUDGETS, CompareOptions, compare, shipped
from lesa.bench.lines import FLOAT_PSNR
from lesa.cli import options
from lesa.host import needs
from lesa.host.loading import loaded
from lesa.host.pipelines import source_of
from lesa.learn import ranks
from lesa.learn.collecting import as_collected, opened
from lesa.learn.ranks import Ranks
from lesa.predictors import Predictor
from lesa.predictors.shipped import SHIPPED_FOLDER

EMBEDDED = "models/emoji-flux"
SCORES = "MS-SSIM"


def demo(given: Namespace) -> None:
    """Compare the methods on a few held-out prompts."""
    _compare(given, "demo")


def bench(given: Namespace) -> None:
    """Compare the methods on many pairs."""
    _compare(given, "bench")


def _compare(given: Namespace, name: str) -> None:
    needs.check(f"lesa {name}", "comparison", "plots")
    source, prompts = options.held_out(given, given.pairs)
    with ranks.together() as at:
        chosen = _options(given, at)
        load = options.load_options(given)
        out = options.folder(given.out)
        pipe = loaded(as_collected(load, chosen.data) if chosen.data else load)
        chosen = replace(chosen, predictors=_predictors(pipe, given.predictors, not chosen.demo))
        steps = compare(pipe, prompts, out, chosen, at=at).setting["call"]["num_inference_steps"]
        if at.leads:
            options.say(f"\n{len(prompts)} prompts of {source}, {steps} steps\n")
            _show(page.write(out, given.differences))


def _options(given: Namespace, at: Ranks) -> CompareOptions:
    found, lacking = scores.load(given.scores)
    for name, why in lacking.items() if at.leads else ():
        options.say_aside(f"lesa: {name} will not be measured: {why}")
    return CompareOptions(
        schedules=given.schedules,
        budgets=given.budgets,
        usual=given.usual,
        data=opened(given.data) if given.data else None,
        peers=given.peers,
        fine=given.fine,
        bound=given.bound,
        only=given.only,
        batch_size=given.batch_size,
        timed=given.timed,
        scores=found,
        lacking=lacking,
        anew=given.anew,
        demo=given.command is demo,
    )


def _predictors(pipe: Any, named: list[str] | None, variants: bool) -> list[Predictor]:
    """Load the predictors named, or those shipped with the model."""
    found = shipped(pipe, variants) if named is None else [Predictor.from_pretrained(place) for place in named]
    if not found:
        place = source_of(pipe).home / SHIPPED_FOLDER
        options.say_aside(f"no predictor lies in {place}: rows without training only")
    return found


def _show(written: page.Page) -> None:
    options.say(written.text)
    options.say("\n".join(map(str, written.files)))


def report(given: Namespace) -> None:
    """Make tables and plots of a run's records."""
    needs.check("lesa report", "plots")
    _show(page.write(given.run, given.differences))


def changes(given: Namespace) -> int:
    """Do two runs differ beyond noise?"""
    verdict = page.changes(given.first, given.second, given.score, given.tolerance)
    options.say(verdict.text)
    return int(verdict.differs)


def reproduce(given: Namespace) -> int:
    """Measure a record again."""
    needs.check("lesa reproduce", "comparison")
    named = given.predictors and [Predictor.from_pretrained(place) for place in given.predictors]
    found = again.reproduce(given.records, given.line, options.load_options(given), named)
    then, now = found
    options.say(f"{then.method} on {then.schedule}, {then.prompt!r}, seed {then.seed}")
    psnr = f"PSNR {then.psnr:.4f} dB then, {now.psnr:.4f} dB now"
    floats = [one.scores.get(FLOAT_PSNR) for one in found]
    if None not in floats:
        psnr += "; float PSNR {:.4f} dB then, {:.4f} dB now".format(*floats)
    options.say(f"{psnr}; SSIM {then.ssim:.6f} then, {now.ssim:.6f} now")
    return int(found.off > given.tolerance)


def add(commands: Any) -> None:
    """Add the commands."""
    words = "compare the methods on a few held-out prompts and draw a sheet"
    parser = options.command(commands, "demo", demo, words, EMBEDDED)
    parser.set_defaults(peers=[], fine=None, bound=False, differences=None, predictors=None, only=None, anew=True)
    _add_comparison(parser, pairs=32, timed=4, budgets=(6,), out="out/demo")
    words = "compare the methods on many pairs, with paired differences and the bound"
    parser = options.command(commands, "bench", bench, words)
    _add_choices(parser)
    _add_comparison(parser, pairs=200, timed=10, budgets=BUDGETS, out="out/bench")
    _add_records(commands)


def _add_choices(parser: ArgumentParser) -> None:
    parser.add_argument("--predictors", nargs="+", metavar="FOLDER", help="default: those shipped with the model")
    parser.add_argument(
        "--differences", metavar="METHOD", default=page.OURS, help=f"the one to compare with the rest ({page.OURS})"
    )
    parser.add_argument(
        "--peers", nargs="+", default=[], metavar="NAME", help="other projects' caches, and better samplers; or: all"
    )
    fine = "measure PSNR against a run of more steps, too"
    parser.add_argument("--fine", type=options.read_count, metavar="STEPS", help=fine)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="the methods of these names alone")
    parser.add_argument("--anew", action="store_true", help="remove the folder's records first, of the same setting")
    without = "leave out the bound, which records runs"
    parser.add_argument("--no-bound", dest="bound", action="store_false", help=without)


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
    words = (
        f"besides PSNR, float PSNR and SSIM, some of MS-SSIM,LPIPS,CLIP,ImageReward,'{scores.AS_PUBLISHED}' ({SCORES})"
    )
    parser.add_argument("--scores", type=options.read_names, default=SCORES, help=words)
    parser.add_argument(
        "--out", default=out, metavar="FOLDER", help=f"for the records, the report and its plots ({out})"
    )


def _add_records(commands: Any) -> None:
    parser = commands.add_parser("report", help="make tables and plots of a run's records")
    parser.add_argument("run", metavar="RUN", help="the folder of a lesa bench")
    parser.add_argument("--differences", metavar="METHOD", default=page.OURS, help="the one to compare with the rest")
    parser.set_defaults(command=report)

    parser = commands.add_parser("compare", help="do two runs differ beyond noise? 0 if not, 1 if they do")
    parser.add_argument("first", metavar="RUN", help="the folder of a lesa bench")
    parser.add_argument("second", metavar="RUN", help="another, whose scores are set against it")
    parser.add_argument("--score", default="PSNR", help="PSNR, SSIM or another that both have (PSNR)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="differences up to this do not count (0.01)")
    parser.set_defaults(command=changes)

    words = "measure a record again: 0 if it is the same, 1 if not"
    parser = options.command(commands, "reproduce", reproduce, words, "")
    parser.add_argument("records", metavar="FILE", help="the records.jsonl of a lesa bench")
    parser.add_argument("line", metavar="LINE", type=options.read_count, help="the record's line, from 1 on")
    parser.add_argument("--predictors", nargs="+", metavar="FOLDER", help="default: those shipped with the model")
    parser.add_argument("--tolerance", type=float, default=0.01, help="dB of PSNR that count as the same (0.01)")
    parser.set_defaults(device=None)
