"""Measure one predictor on many grids, beside a specialist for each of them.

    make bench-grids

or by hand, with a predictor of the method lesa-continuous, and one that was trained on a single grid for each folder:

    python benchmarks/grids.py --one models/emoji-flux/lesa/lesa-many --specialists out/specialists/*

Every grid is that of a number of steps at an image size, as a specialist's name says: 64-28 is 28 steps at 64 pixels.
Each method is on the schedule planned for it, and all tap where the one predictor does. PSNR is against the same
model's pictures with every step full; the difference is the one predictor's to the specialist, pair by pair; both with
bootstrap 95 % intervals. Drift is how far the latents end from the reference run's, which goes on where PSNR ends,
at its cap of 60 dB.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import lesa
from lesa.bench.benchmark import batches, pair_up
from lesa.bench.lines import Pair
from lesa.bench.report import markdown
from lesa.learn.call_files import read_prompts
from lesa.learn.collect import record
from lesa.learn.collecting import TRAINING_SEED
from lesa.learn.metrics import drift, interval, paired_interval, psnr
from lesa.learn.planning import PLANNED_ON, Planner
from lesa.learn.trajectory import draw_tokens
from lesa.rows.tap import Tap

MODEL = "models/emoji-flux"
HEADS = ("grid", "schedule", "method", "PSNR, dB [95 %]", "drift, dB", "one - specialist, dB [95 %]")


def draw(pipe: Any, batch: Sequence[Pair], size: int, steps: int) -> tuple[list[np.ndarray], torch.Tensor]:
    """Return a batch's pictures, and its last latents."""
    latents: dict[int, torch.Tensor] = {}

    def keep(_pipe: Any, step: int, _time: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        latents[step] = tensors["latents"].float().clone()
        return tensors

    images = pipe(
        prompt=[pair.prompt for pair in batch],
        generator=[torch.Generator().manual_seed(pair.seed) for pair in batch],
        **dict(height=size, width=size, num_inference_steps=steps, callback_on_step_end=keep),
    ).images
    return [np.asarray(image.convert("RGB")) for image in images], latents[steps - 1]


def planned(pipe: Any, prompts: Sequence[str], tap: Tap, budget: int, size: int, steps: int) -> lesa.Schedule:
    """Return the schedule that is planned for Lagrange-3 on a grid."""
    call = dict(height=size, width=size, num_inference_steps=steps)
    seeds = range(TRAINING_SEED, TRAINING_SEED + len(prompts))
    runs = record(pipe, prompts, seeds, draw_tokens, tap, **call)
    return Planner.of(pipe, runs, tap, **call).search(lesa.Lagrange(3), budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--one", required=True, metavar="FOLDER", help="the predictor for all grids")
    parser.add_argument("--specialists", nargs="+", required=True, metavar="FOLDER", help="SIZE-STEPS each")
    parser.add_argument("--budget", type=int, default=6, help="full steps (6)")
    parser.add_argument("--pairs", type=int, default=200, help="how many prompts, the k-th with seed k (200)")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()

    pipe = lesa.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    one = lesa.Predictor.from_pretrained(options.one)
    known, prompts = (read_prompts(Path(options.model) / "prompts" / f"{name}.txt") for name in ("train", "heldout"))
    known, prompts = known[:PLANNED_ON], prompts[: options.pairs]
    pairs = batches(pair_up(prompts, range(len(prompts))), options.batch_size)
    rows = []
    for folder in tqdm(options.specialists, desc="grids", unit="grid"):
        size, steps = map(int, Path(folder).name.split("-"))
        specialist = lesa.Predictor.from_pretrained(folder)
        chosen, own = (some.schedule_for(specialist.grid, options.budget) for some in (one, specialist))
        methods = {
            "Lagrange-3": (lesa.Lagrange(3), planned(pipe, known, one.origin.tap, options.budget, size, steps)),
            "specialist": (specialist, own),
            "one predictor": (one, chosen),
        }
        quality: dict[str, list[float]] = {name: [] for name in methods}
        drifts: dict[str, list[float]] = {name: [] for name in methods}
        for batch in pairs:
            reference, wanted = draw(pipe, batch, size, steps)
            for name, (forecaster, schedule) in methods.items():
                with lesa.accelerate(pipe, forecaster, schedule=schedule, tap=one.origin.tap):
                    pictures, latents = draw(pipe, batch, size, steps)
                quality[name] += [psnr(a, b) for a, b in zip(pictures, reference, strict=True)]
                drifts[name] += [drift(*both) for both in zip(latents, wanted, strict=True)]
        for name, (_, schedule) in methods.items():
            difference = paired_interval(quality[name], quality["specialist"]) if name == "one predictor" else None
            rows.append(
                (
                    *(f"{size} x {size}, {steps} steps", str(schedule), name, f"{interval(quality[name]):.2f}"),
                    *(f"{fmean(drifts[name]):.1f}", f"{difference:+.2f}" if difference else ""),
                )
            )
    print(f"{options.model}, {len(prompts)} held-out prompts, {options.budget} full steps\n")
    print(markdown(HEADS, rows, text=3))


if __name__ == "__main__":
    main()
