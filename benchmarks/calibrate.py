"""Calibrate a pipeline, and measure what was kept on held-out prompts beside everything else that costs as much.

    python benchmarks/calibrate.py models/emoji-flux --budgets 8,6,5,4,3 --pairs 200
    python benchmarks/calibrate.py models/emoji-qwen --budgets 10,8 --prompts 16 --pairs 100
    python benchmarks/calibrate.py models/emoji-qwen --budgets 10,8 --prompts 16 --call '{"true_cfg_scale": 5.0}'
    python benchmarks/calibrate.py models/emoji-flux --budgets 8,6 --sampler "DPM++ 2M"
    python benchmarks/calibrate.py models/emoji-flux --target psnr:45
    python benchmarks/calibrate.py models/emoji-flux --budgets 8,5 --seeds 4 --pairs 48

For every number of full steps: what the calibration kept, the best rows without training on schedules planned for them,
which the calibration's checked prompts named before these were drawn, the predictor shipped with the model if there is
one, and the same sampler with fewer steps. All act on the same held-out prompts, against the model's own run with every
step full: PSNR of 8-bit pictures, at most 60 dB, and the drift of the last latents, with bootstrap 95 % intervals.
With a target, these are measured for the number of full steps that the calibration chose, and the share of held-out
prompts that miss the target is printed. Seconds and transformer runs (of one picture and stream) are the calibration's
own. Calibrated are prompts of train.txt, a third of them checked, for a target a half; held out are those of
heldout.txt.

With several seeds the calibration alone is repeated, each time on other prompts of train.txt with other noise, and the
table is of what these gave on the held-out prompts: mean, standard deviation, least and most over the seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

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
from lesa.predictors.curve import SOLVED, Curve, Point, Tried
from lesa.predictors.shelf import Shelf
from lesa.predictors.shipped import shipped_for
from lesa.rows.forecasters import Forecaster

HEADS = (
    "full steps",
    "what",
    "schedule",
    "PSNR, dB [95 %]",
    "drift, dB [95 %]",
    "less drift than the best of the others, dB",
)
SPREAD = ("full steps", "schedules", "drift, dB", "from", "to", "PSNR, dB", "from", "to")


class Calibrated(NamedTuple):
    """What a calibration found, the predictors by their full steps, and for how many it was made."""

    curve: Curve
    predictors: dict[int, lesa.Predictor]
    chosen: int


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


def everyone(known: Checks, plans: Rivals, budget: int, refined: int) -> list[Tried]:
    """Run every row without training on the schedule that algebra plans for it, and so many of the best of them on the
    one that real runs choose; returns all, the best one first.

    What is best is found on the held-out prompts themselves, which favours them.
    """
    found: list[Tried] = []

    def run(name: str, forecaster: Forecaster, schedule: lesa.Schedule) -> float:
        found.append(known.run(name, forecaster, schedule))
        print(f"{budget} full steps, {name} on {schedule}: drift {metrics.interval(found[-1].drift)}", flush=True)
        return fmean(found[-1].drift)

    rows = untrained(True, lagrange=True, place=OUTPUT, rivals=True)
    planned = {name: run(f"{name}, planned", one, plans.planned(one, budget)) for name, one in rows.items()}
    for name in sorted(rows, key=planned.__getitem__)[:refined]:
        run(f"{name}, refined plan", rows[name], plans.refined(rows[name], budget))
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


def calibrated(options: argparse.Namespace, pipe: Any, seed: int) -> Calibrated:
    """Calibrate on the prompts and with the noise of a seed."""
    began, train = time.perf_counter(), calls_of(options.model, "train", options.prompts * (seed + 1))
    how = lesa.CalibrateOptions(options.checked, seed, options.refine, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        shelf, asked = Shelf(folder), dict(budgets=options.budgets, target=options.target)
        chosen = lesa.calibrate(pipe, train[-options.prompts :], options=how, shelf=shelf, **asked)
        assert chosen.curve is not None
        (kept,) = shelf.all()
        found = {budget: kept.predictor(budget) for budget in kept.budgets}
    print(f"calibrated in {time.perf_counter() - began:.1f} s on {options.prompts} prompts, seed {seed}\n")
    print(f"{chosen.curve.table()}\n")
    for point in chosen.curve.points:
        print(f"{point.full_steps} full steps: {point.promise}")
        print(f"{point.seconds:.1f} s, transformer runs {dict(point.transformer_runs)}")
    return Calibrated(chosen.curve, found, len(chosen.full))


def held_out(options: argparse.Namespace, pipe: Any) -> tuple[list[Call], Checks]:
    """Return held-out prompts, and what measures runs of them."""
    held = calls_of(options.model, "heldout", options.pairs)
    return held, Checks(pipe, held, range(len(held)), {}, pictures=True, batch_size=options.batch)


def measured(options: argparse.Namespace, pipe: Any, ours: Calibrated, points: Sequence[Point]) -> list[list[Tried]]:
    """Run everything on held-out prompts; returns for each point what that gave, what was kept first."""
    held, known = held_out(options, pipe)
    everything = []
    by_name = {repr(one): one for one in UNTRAINED}
    solved_on = calls_of(options.model, "train", options.prompts)
    plans = Rivals(pipe, solved_on, range(TRAINING_SEED, TRAINING_SEED + len(solved_on)), {})
    for point in points:
        kept = ours.predictors[point.full_steps]
        name = "calibrated" if point.is_solved else f"calibrated ({point.kept.rows})"
        found = [known.run(name, kept, kept.schedule)]
        rival = min((one for one in point.tried if one.rows != SOLVED), key=lambda one: fmean(one.drift))
        found.append(known.run(rival.rows, by_name[rival.rows], lesa.Schedule.parse(rival.schedule)))
        if options.rivals:
            found += everyone(known, plans, point.full_steps, options.rivals)
        for one in map(lesa.Predictor.from_pretrained, options.trained):
            schedule = lesa.Schedule.parse(one.origin.schedule)
            if len(schedule.full_steps(ours.curve.steps)) == point.full_steps:
                found.append(known.run(f"trained {type(one).__name__}", one, schedule))
        try:
            trained = shipped_for(pipe, budget=point.full_steps)
            schedule = trained.schedule_for(kept.grid, point.full_steps)
            found.append(known.run(f"shipped {type(trained).__name__}", trained, schedule))
        except (LookupError, ValueError) as error:
            print(f"{point.full_steps} full steps, no shipped predictor: {str(error)[:200]}", flush=True)
        found.append(fewer_steps(known, pipe, held, point.full_steps, options.batch))
        everything.append(found)
    return everything


def promise(target: Quality, point: Point, held: Tried) -> str:
    """Say what checked prompts promise of a target, and what held-out ones keep of it: on the mean, the worst of them,
    and the share that misses it."""
    promised, score = point.kept.score(target.measure), held.score(target.measure)
    assert promised is not None and score is not None
    return (
        f"{point.full_steps} full steps are to keep {target}, as {len(point.kept.drift)} checked prompts have "
        f"{promised.told(target.measure, '.4g')}; of {len(held.drift)} held-out ones the mean is {score.mean:.4g}, the "
        f"worst {score.worst:.4g}, and {held.share_missing(target):.0%} miss it"
    )


def spread(options: argparse.Namespace, pipe: Any) -> list[tuple[str, ...]]:
    """Calibrate with one seed after the other, run each on the same held-out prompts, and say how far they differ."""
    _, known = held_out(options, pipe)
    found: dict[int, list[Tried]] = {}
    for seed in range(options.seed, options.seed + options.seeds):
        for budget, kept in calibrated(options, pipe, seed).predictors.items():
            one = known.run(f"seed {seed}", kept, kept.schedule)
            found.setdefault(budget, []).append(one)
            scores = [f"{name} {metrics.interval(getattr(one, name))}" for name in ("drift", "psnr") if one.score(name)]
            print(f"seed {seed}, {budget} full steps, held-out: {', '.join(scores)}", flush=True)
    return [(str(budget), _schedules(some), *_over_seeds(some)) for budget, some in sorted(found.items(), reverse=True)]


def _schedules(some: Sequence[Tried]) -> str:
    return " and ".join(sorted({one.schedule for one in some}))


def _over_seeds(some: Sequence[Tried]) -> Iterator[str]:
    for measure in ("drift", "psnr"):
        means = [score.mean for one in some if (score := one.score(measure))]
        told = [f"{fmean(means):.2f} +- {stdev(means):.2f}", f"{min(means):.2f}", f"{max(means):.2f}"] if means else []
        yield from told or [""] * 3


def main() -> None:
    options = parsed()
    pipe = pipeline(options)
    if options.seeds > 1:
        print(f"\n{markdown(SPREAD, spread(options, pipe), text=2)}")
        return
    ours = calibrated(options, pipe, options.seed)
    points = [ours.curve.at(ours.chosen)] if options.target else ours.curve.points
    everything = measured(options, pipe, ours, points)
    rows = [row for point, found in zip(points, everything, strict=True) for row in lines(point, found)]
    print(f"\n{markdown(HEADS, rows, text=3)}")
    if options.target:
        print(f"\n{promise(Quality.parse(options.target), points[0], everything[0][0])}")


def parsed() -> argparse.Namespace:
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
    parser.add_argument("--rivals", type=int, default=0, help="every row without training, planned; so many refined")
    parser.add_argument("--trained", nargs="+", default=[], help="predictors, each measured beside as many full steps")
    parser.add_argument("--refine", type=int, default=lesa.CalibrateOptions.refine)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration's noise and choice of prompts")
    parser.add_argument("--seeds", type=int, default=1, help="repeat it with so many, and say how far they differ")
    return parser.parse_args()


if __name__ == "__main__":
    main()
