"""Measure what a full step more is worth to runs that turn out to be unusual, and how often that is.

    python benchmarks/hybrid.py

Plans a schedule for a forecaster from recorded runs, and detours from it (`lesa.learn.planning.detours`), then draws
held-out prompts one by one: on the schedule, with the detours, with a full step more in every run, and with detours
taken at random as often. PSNR and drift are against the same model's runs with every step full; the worst are the runs
that end furthest off on the fixed schedule. Bootstrap 95 % intervals.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import lesa
from lesa.bench.benchmark import pair_up
from lesa.bench.lines import Pair
from lesa.bench.report import markdown
from lesa.host.runtime import Run
from lesa.learn.call_files import read_prompts
from lesa.learn.collect import record
from lesa.learn.collecting import TRAINING_SEED
from lesa.learn.metrics import drift, interval, psnr
from lesa.learn.planning import Planner, detours
from lesa.learn.trajectory import draw_tokens
from lesa.rows.detour import Detour

MODEL = "models/emoji-flux"


def draw(pipe: Any, pair: Pair) -> tuple[np.ndarray, torch.Tensor]:
    """Return a pair's picture, and its last latents."""
    latents: list[torch.Tensor] = []

    def keep(_pipe: Any, _step: int, _time: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents[:] = [tensors["latents"].double()]
        return tensors

    seeded = torch.Generator().manual_seed(pair.seed)
    image = pipe(pair.prompt, generator=seeded, callback_on_step_end=keep).images[0]
    return np.asarray(image.convert("RGB")), latents[0]


def at_random(found: dict[int, Detour], rate: float, generator: random.Random) -> dict[int, Detour]:
    """Take a detour whatever the error, in a share `rate` of the runs."""
    if generator.random() >= rate:
        return {}
    step = generator.choice(list(found))
    return {step: replace(found[step], limit=-1.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--predictor", metavar="FOLDER", help="a lesa-continuous; default: Lagrange-3")
    parser.add_argument("--budget", type=int, default=6, help="full steps (6)")
    parser.add_argument("--share", type=float, default=0.05, help="of the runs that are unusual, at each step (0.05)")
    parser.add_argument("--runs", type=int, default=48, help="recorded runs that set the limits (48)")
    parser.add_argument("--pairs", type=int, default=200, help="how many prompts, the k-th with seed k (200)")
    options = parser.parse_args()

    pipe, prompts = lesa.load(options.model), Path(options.model) / "prompts"
    pipe.set_progress_bar_config(disable=True)
    known = read_prompts(prompts / "train.txt")[: options.runs]
    reference = record(pipe, known, range(TRAINING_SEED, TRAINING_SEED + len(known)), draw_tokens)
    predictor = lesa.Predictor.from_pretrained(options.predictor) if options.predictor else None
    planner = Planner.of(pipe, reference, predictor and predictor.origin.tap)
    forecaster = predictor or lesa.Lagrange(3)
    shortest, longer = (planner.search(forecaster, options.budget + more) for more in (0, 1))
    if predictor is not None and predictor.is_for(budget=options.budget):
        shortest = predictor.schedule_for(planner.grid, options.budget)
    found = detours(pipe, planner, forecaster, shortest, reference, options.share)
    for step, detour in found.items():
        print(f"step {step}: above {detour.limit:.3f} {detour.schedule}")

    held_out = read_prompts(prompts / "heldout.txt")[: options.pairs]
    generator, rate = random.Random(0), 0.0
    Switch = Callable[[], AbstractContextManager[Run]]
    cases: dict[str, Switch] = {
        "fixed": lambda: lesa.accelerate(pipe, forecaster, schedule=shortest),
        "with detours": lambda: lesa.accelerate(pipe, forecaster, schedule=shortest, detours=found),
        "detours at random": lambda: lesa.accelerate(
            pipe, forecaster, schedule=shortest, detours=at_random(found, rate, generator)
        ),
        "one full step more": lambda: lesa.accelerate(pipe, forecaster, schedule=longer),
    }
    pairs = pair_up(held_out, range(len(held_out)))
    references = [draw(pipe, pair) for pair in tqdm(pairs, desc="reference", unit="run")]
    quality, drifts, full, fired = ({name: [] for name in cases} for _ in range(4))
    for name, switch in cases.items():
        rate = float(np.mean(fired["with detours"])) if fired["with detours"] else 0.0
        for pair, (picture, latents) in zip(tqdm(pairs, desc=name, unit="run"), references, strict=True):
            with switch() as run:
                mine, reached = draw(pipe, pair)
            summary = next(iter(run.summary().values()))
            quality[name].append(psnr(mine, picture))
            drifts[name].append(drift(reached, latents))
            full[name].append(summary.full_steps)
            fired[name].append(summary.detours)
    print(f"\n{options.model}, {forecaster!r}, {shortest}, {len(pairs)} held-out prompts\n")
    print(report(quality, drifts, full, fired))


def report(
    quality: dict[str, list[float]], drifts: dict[str, list[float]], full: dict[str, list], fired: dict[str, list]
) -> str:
    worst = np.argsort(drifts["fixed"])[-max(1, len(drifts["fixed"]) // 20) :]
    rows = []
    for name in quality:
        gain = np.array(quality[name]) - np.array(quality["fixed"])
        rows.append(
            [
                *(name, f"{np.mean(full[name]):.2f}", f"{np.mean(fired[name]):.1%}"),
                *(f"{interval(quality[name]):.2f}", f"{np.mean(drifts[name]):.1f}"),
                *(f"{np.mean(np.array(quality[name])[worst]):.2f}", _gain(gain[worst]) if name != "fixed" else ""),
                _gain(gain[np.array(fired[name]) > 0]) if any(fired[name]) else "",
            ]
        )
    heads = ("runs", "full steps", "detours", "PSNR, dB [95 %]", "drift, dB", "worst 5 %, dB", "gain there", "of those")
    return markdown(heads, rows, text=1)


def _gain(values: Sequence[float] | np.ndarray) -> str:
    return f"{interval(list(values)):+.2f}"


if __name__ == "__main__":
    main()
