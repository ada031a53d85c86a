"""The commands that compare: demo, bench, report, compare, reproduce."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from lesa.bench import again, page, scores
from lesa.bench.compare import CompareOptions, compare, shipped
from lesa.bench.lines import FLOAT_PSNR
from lesa.cli import options
from lesa.host import needs
from lesa.host.loading import loaded
from lesa.host.pipelines import source_of
from lesa.learn import ranks
from lesa.learn.collecting import as_collected, opened
from lesa.learn.ranks import Ranks
from lesa.predictors import Predictor
from lesa.predictors.calibration import Calibration
from lesa.predictors.shipped import SHIPPED_FOLDER
from lesa.rows.named import named


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
        calibrated = [found for place in given.calibrated for found in Calibration.read(place).predictors()]
        chosen = replace(chosen, predictors=_predictors(pipe, given.predictors), calibrated=calibrated)
        steps = compare(pipe, prompts, out, chosen, at=at).setting["call"]["num_inference_steps"]
        if at.leads:
            options.say(f"\n{len(prompts)} prompts of {source}, {steps} steps\n")
            written = page.write(out, given.differences, given.plots)
            _show(written, given)
            _hint(given, name, bool(written.short))


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
        rows=None if given.rows is None else {name: named(name) for name in given.rows},
        batch_size=given.batch_size,
        timed=given.timed,
        scores=found,
        lacking=lacking,
        anew=given.anew,
        demo=given.demo,
    )


def _predictors(pipe: Any, named: list[str] | None) -> list[Predictor] | None:
    """Load the predictors named; None are those shipped with the model, if there are any."""
    if named is not None:
        return [Predictor.from_pretrained(place) for place in named]
    if not shipped(pipe):
        place = source_of(pipe).home / SHIPPED_FOLDER
        options.say_aside(f"no predictor lies in {place}: rows without training only")
    return None


def _show(written: page.Page, given: Namespace) -> None:
    options.say(written.shown(given.whole))
    options.say("\n".join(map(str, written.files)))


def _hint(given: Namespace, name: str, short: bool) -> None:
    """Say what may come next: the whole report of a short one, or a benchmark of more pairs."""
    if name == "demo":
        options.say_next("bench", *options.as_given(given), "--pairs", 100)
    else:
        options.say_next("report", given.out, *(["--all"] if short else ["--plots", "pdf"]))


def report(given: Namespace) -> None:
    """Make tables and plots of a run's records."""
    needs.check("lesa report", "plots")
    _show(page.write(given.run, given.differences, given.plots), given)
    options.say_next("compare", given.run, "RUN")


def changes(given: Namespace) -> int:
    """Do two runs differ beyond noise?"""
    verdict = page.changes(given.first, given.second, given.score, given.tolerance)
    options.say(verdict.text)
    options.say_next("report", given.second)
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
    options.say_next("report", Path(given.records).parent)
    return int(found.off > given.tolerance)
