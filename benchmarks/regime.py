"""Say in which regime a model is: how much its runs lose with fewer steps, and where in a run its transformer changes.

    python benchmarks/regime.py models/emoji-scene models/emoji-flux
    python benchmarks/regime.py models/emoji-scene --guidance 3 --pairs 16

Of each model: the PSNR in dB of pictures drawn in ten evenly spread steps against those in its usual number; and the
sum of |ln| of the magnitude ratios from step to step over the thirds of a run of 28 steps, which is how many were
recorded on FLUX.1-dev (diffusers ships them, FLUX_MAG_RATIOS; found here as there, by MagCache's calibration). `apart`
is the sum of the thirds' differences from the recorded ones: the less, the more a model changes when that one does.
Prompts are of validation.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

import lesa
from lesa.bench.peers import Runs, magnitudes
from lesa.bench.report import markdown
from lesa.host.pipelines import pictures_of, steps_of
from lesa.learn.call_files import read_prompts
from lesa.learn.metrics import psnr

FEW, BATCH, FIRST_SEED = 10, 8, 10_000
HEADS = ["model", "pairs", "10 steps, PSNR", "lowest", "highest", "first third", "middle", "last", "apart"]


def draw(pipe: Any, prompts: Sequence[str], steps: int, **call: Any) -> list[np.ndarray]:
    """Draw prompts, each with its own noise, the same for any number of steps."""
    drawn: list[np.ndarray] = []
    for first in range(0, len(prompts), BATCH):
        part = list(prompts[first : first + BATCH])
        seeds = [torch.Generator().manual_seed(FIRST_SEED + first + k) for k in range(len(part))]
        found = pictures_of(pipe(prompt=part, generator=seeds, num_inference_steps=steps, **call))
        drawn += [np.stack([np.asarray(x) for x in one]) if isinstance(one, list) else np.asarray(one) for one in found]
    return drawn


def thirds(ratios: Sequence[float]) -> list[float]:
    """Return the sum of |ln ratio| over the first, the middle and the last third of the steps."""
    return [float(np.abs(np.log(part)).sum()) for part in np.array_split(np.asarray(ratios), 3)]


def mean_ratios(pipe: Any, prompts: Sequence[str], steps: int) -> list[float]:
    """Return the geometric mean over prompts of each step's ratio."""
    logs = [[math.log(max(ratio, 1e-6)) for ratio in magnitudes(pipe, Runs(steps, prompt))] for prompt in prompts]
    return [math.exp(fmean(column)) for column in zip(*logs, strict=True)]


def line(folder: Path, pairs: int, recorded: Sequence[float], **call: Any) -> list[str]:
    """Measure one model and return its line of the table."""
    pipe = lesa.load(folder)
    pipe.set_progress_bar_config(disable=True)
    prompts = read_prompts(folder / "prompts" / "validation.txt")[:pairs]
    usual = steps_of(pipe) or 50
    quality = list(map(psnr, draw(pipe, prompts, FEW, **call), draw(pipe, prompts, usual, **call)))
    sums = thirds(mean_ratios(pipe, prompts[:BATCH], len(recorded)))
    apart = sum(abs(ours - theirs) for ours, theirs in zip(sums, thirds(recorded), strict=True))
    figures = [f"{value:.2f}" for value in (fmean(quality), min(quality), max(quality), *sums, apart)]
    return [folder.name, str(len(prompts)), *figures]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--pairs", type=int, default=24, help="validation prompts, each with a seed")
    parser.add_argument("--guidance", type=float, help="true_cfg_scale of the calls that PSNR is measured on")
    options = parser.parse_args()
    call = {"true_cfg_scale": options.guidance, "negative_prompt": ""} if options.guidance else {}
    recorded = FLUX_MAG_RATIOS.tolist()
    rows = [line(folder, options.pairs, recorded, **call) for folder in options.models]
    real = ["FLUX.1-dev, recorded", *["-"] * 4, *(f"{value:.2f}" for value in thirds(recorded)), "0.00"]
    print(markdown(HEADS, [*rows, real], text=1))


if __name__ == "__main__":
    main()
