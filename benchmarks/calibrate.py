"""Calibrate a pipeline, and measure what was kept on held-out prompts beside everything else that costs as much.

    python benchmarks/calibrate.py models/emoji-flux --budgets 8,6,5,4,3 --pairs 200
    python benchmarks/calibrate.py models/emoji-qwen --budgets 10,8 --prompts 16 --pairs 100
    python benchmarks/calibrate.py models/emoji-qwen --budgets 10,8 --prompts 16 --call '{"true_cfg_scale": 5.0}'
    python benchmarks/calibrate.py models/emoji-flux --budgets 8,6 --sampler "DPM++ 2M"
    python benchmarks/calibrate.py models/emoji-flux --target psnr:45

For every number of full steps: what the calibration kept, the best rows without training on schedules planned for them,
which the calibration's checked prompts named before these were drawn, the predictor shipped with the model if there is
one, and the same sampler with fewer steps. All act on the same held-out prompts, against the model's own run with every
step full: PSNR of 8-bit pictures, at most 60 dB, and the drift of the last latents, with bootstrap 95 % intervals.
With a target, these are measured for the number of full steps that the calibration chose, and the share of held-out
prompts that miss the target is printed. Seconds and transformer runs (of one picture and stream) are the calibration's
own. Calibrated are prompts of train.txt, a third of them checked; held out are those of heldout.txt.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import samplers
import stochastic

import lesa
from lesa.bench.methods import untrained
from lesa.bench.report import markdown
from lesa.host.loading import LoadOptions, loaded
from lesa.host.tap import OUTPUT
from lesa.learn import metrics
from lesa.learn.call_files import read_calls, read_prompts
from lesa.learn.calls import Call
from lesa.learn.checks import Checks
from lesa.learn.collecting import TRAINING_SEED
from lesa.learn.drawn import arrays
from lesa.learn.references import References
from lesa.learn.rivals import UNTRAINED, Rivals
from lesa.predictors.calibration import Quality
from lesa.predictors.curve import SOLVED, Point, Tried
from lesa.predictors.shelf import Shelf
from lesa.predictors.shipped import shipped_for

HEADS = (
    "full steps",
    "what",
    "schedule",
    "PSNR, dB [95 %]",
    "drift, dB [95 %]",
    "less drift than the best of the others, dB",
)


def calls_of(model: str, name: str, limit: int) -> list[Call]:
    """Read prompts of a model, or calls where it takes no prompts."""
    prompts, calls = (Path(model) / "prompts" / f"{name}{end}" for end in (".txt", ".jsonl"))
    return [*(read_calls(calls) if calls.exists() else read_prompts(prompts))][:limit]


def pipeline(options: argparse.Namespace) -> Any:
    if options.sampler in samplers.SAMPLERS:
        return samplers.sampled_by(samplers.SAMPLERS[options.sampler])
    pipe = loaded(LoadOptions(options.model, lora=options.lora, steps=options.steps, call=options.call))
    pipe.set_progress_bar_config(disable=True)
    if options.sampler:
        pipe.scheduler = stochastic.SAMPLERS[options.sampler](pipe.scheduler.config)
    return pipe


def everyone(known: Checks, plans: Rivals, budget: int) -> list[Tried]:
    """Run every row without training on the schedule that real runs choose for it; returns all, the best one first.

    The best of them is found on the held-out prompts themselves, which favours them.
    """
    found = []
    for name, forecaster in untrained(True, lagrange=True, place=OUTPUT, rivals=True).items():
        schedule = plans.refined(forecaster, budget)
        found.append(known.run(f"{name}, refined plan", forecaster, schedule))
        print(f"{budget} full steps, {name} on {schedule}: drift {metrics.interval(found[-1].drift)}", flush=True)
    return sorted(found, key=lambda one: fmean(one.drift))


def fewer_steps(known: Checks, pipe: Any, calls: Sequence[Call], budget: int, batch: int) -> Tried:
    """Run the same sampler with fewer steps."""
    fewer = dict(num_inference_steps=budget)
    runs = References(pipe, calls, range(len(calls)), fewer, pictures=True, batch_size=batch)
    return known.compare("fewer steps", "", runs.reference, arrays(runs.pictures))


def lines(point: Point, found: Sequence[Tried]) -> list[tuple[str, ...]]:
    ours, *others = found
    best = min(others, key=lambda one: fmean(one.drift))
    rows = []
    for one in found:
        psnr = f"{metrics.interval(one.psnr)}" if one.psnr else ""
        gain = f"{metrics.paired_interval(best.drift, one.drift)}" if one is ours else ""
        rows.append((str(point.full_steps), one.rows, one.schedule, psnr, f"{metrics.interval(one.drift)}", gain))
    return rows


def measured(options: argparse.Namespace, pipe: Any, points: Sequence[Point]) -> list[list[Tried]]:
    """Run everything on held-out prompts; returns for each point what that gave, what was kept first."""
    held = calls_of(options.model, "heldout", options.pairs)
    known = Checks(pipe, held, range(len(held)), {}, pictures=True, batch_size=options.batch)
    shelf, everything = Shelf(options.shelf), []
    by_name = {repr(one): one for one in UNTRAINED}
    solved_on = calls_of(options.model, "train", options.prompts)
    plans = Rivals(pipe, solved_on, range(TRAINING_SEED, TRAINING_SEED + len(solved_on)), {})
    for point in points:
        kept = shelf.all()[0].predictor(point.full_steps)
        name = "calibrated" if point.is_solved else f"calibrated ({point.kept.rows})"
        found = [known.run(name, kept, kept.schedule)]
        rival = min((one for one in point.tried if one.rows != SOLVED), key=lambda one: fmean(one.drift))
        found.append(known.run(rival.rows, by_name[rival.rows], lesa.Schedule.parse(rival.schedule)))
        if options.rivals:
            found += everyone(known, plans, point.full_steps)
        try:
            trained = shipped_for(pipe, budget=point.full_steps)
            schedule = trained.schedule_for(kept.grid, point.full_steps)
            found.append(known.run(f"shipped {type(trained).__name__}", trained, schedule))
        except (LookupError, ValueError) as error:
            print(f"{point.full_steps} full steps, no shipped predictor: {str(error)[:200]}", flush=True)
        found.append(fewer_steps(known, pipe, held, point.full_steps, options.batch))
        everything.append(found)
    return everything


def promise(target: Quality, kept: Tried, full_steps: int) -> str:
    """Say what held-out prompts keep of a target: on the mean, the worst of them, and the share that misses it."""
    score, calls = kept.score(target.measure), len(kept.drift)
    assert score is not None
    return (
        f"the target {target} is kept by {full_steps} full steps; of {calls} held-out prompts the mean is "
        f"{score.mean:.4g}, the worst {score.worst:.4g}, and {kept.share_missing(target):.0%} miss it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lora")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--call", type=json.loads, default={})
    names = [*samplers.SAMPLERS, *stochastic.SAMPLERS]
    parser.add_argument("--sampler", choices=names, help="of emoji-flux, in place of its own")
    parser.add_argument("--budgets", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--target")
    parser.add_argument("--prompts", type=int, default=12, help="calibrated on, checked ones included (12)")
    parser.add_argument("--checked", type=int)
    parser.add_argument("--pairs", type=int, default=200, help="held-out ones (200)")
    parser.add_argument("--batch", type=int, default=25)
    parser.add_argument("--rivals", action="store_true", help="every row without training, on a plan that is refined")
    parser.add_argument("--refine", type=int, default=lesa.CalibrateOptions.refine)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration's noise and choice of prompts")
    options = parser.parse_args()
    pipe, began = pipeline(options), time.perf_counter()
    train = calls_of(options.model, "train", options.prompts * (options.seed + 1))[-options.prompts :]
    with tempfile.TemporaryDirectory() as folder:
        options.shelf, asked = folder, dict(budgets=options.budgets, target=options.target)
        how = lesa.CalibrateOptions(options.checked, options.seed, options.refine, progress=False)
        predictor = lesa.calibrate(pipe, train, options=how, shelf=Shelf(folder), **asked)
        print(
            f"calibrated in {time.perf_counter() - began:.1f} s on {len(train)} prompts\n\n{predictor.curve.table()}\n"
        )
        for point in predictor.curve.points:
            print(
                f"{point.full_steps} full steps: {point.seconds:.1f} s, transformer runs {dict(point.transformer_runs)}"
            )
        curve = predictor.curve
        points = [curve.at(len(predictor.full))] if options.target else curve.points
        everything = measured(options, pipe, points)
        rows = [row for point, found in zip(points, everything, strict=True) for row in lines(point, found)]
        print(f"\n{markdown(HEADS, rows, text=3)}")
        if options.target:
            print(f"\n{promise(Quality.parse(options.target), everything[0][0], points[0].full_steps)}")


if __name__ == "__main__":
    main()
