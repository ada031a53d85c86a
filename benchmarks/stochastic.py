"""Measure what is worth forecasting where a sampler adds noise at every step: the output, or what it says of the data.

    python benchmarks/stochastic.py

Draws held-out prompts under samplers that add noise, with 10 of 50 steps full: evenly spread, and at times chosen for
each line, among a few, on validation prompts. PSNR is against the same sampler with every step full, from the same
noise. Beside them stands the same sampler with 10 steps, whose noise is drawn for other steps. Bootstrap 95 %
intervals.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from tqdm import tqdm

import lesa
from lesa.bench.benchmark import Pair, pair_up
from lesa.bench.report import markdown
from lesa.learn.call_files import read_prompts
from lesa.learn.metrics import interval, psnr

MODEL = "models/emoji-flux"
FLOW = dict(algorithm_type="sde-dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True)
SAMPLERS = {
    "stochastic Euler": lambda config: FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True),
    "SDE-DPM++": lambda config: DPMSolverMultistepScheduler.from_config(config, **FLOW),
}
EVENLY = lesa.Schedule.every(5)
PLANNED = [
    lesa.Schedule.parse(f"at:{full}")
    for full in (
        "0,24,35,40,43,45,46,47,48,49",
        "0,10,19,27,33,38,42,45,47,49",
        "0,30,38,42,44,45,46,47,48,49",
        "0,34,40,43,44,45,46,47,48,49",
        "0,37,41,43,44,45,46,47,48,49",
    )
]
"""That of a shipped predictor, one that is more evenly spread, and some that are less."""
FORECASTERS = {"reuse": lesa.Reuse(), "line": lesa.Lagrange(1)}
WORDS = {"output": "the output", "data": "the data prediction"}
CHOSEN_ON = 16


def draw(pipe: Any, pairs: Sequence[Pair], **call: Any) -> list[np.ndarray]:
    """Return the pictures of pairs; noise that a sampler draws from the global generator is the same in every call."""
    torch.manual_seed(0)
    generators = [torch.Generator().manual_seed(pair.seed) for pair in pairs]
    images = pipe([pair.prompt for pair in pairs], generator=generators, **call).images
    return [np.asarray(image.convert("RGB")) for image in images]


def quality(pictures: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> list[float]:
    return [psnr(*pair) for pair in zip(pictures, references, strict=True)]


def accelerated(pipe: Any, pairs: Sequence[Pair], name: str, schedule: lesa.Schedule, of: str) -> list[np.ndarray]:
    with lesa.accelerate(pipe, FORECASTERS[name], schedule=schedule, of=of, check=False):
        return draw(pipe, pairs)


def lines(pipe: Any, sampler: str, pairs: Sequence[Pair], validation: Sequence[Pair]) -> list[list[str]]:
    """Return the table's lines of the sampler that a pipeline has."""
    known, references = draw(pipe, validation), draw(pipe, pairs)
    table = []
    for of in WORDS:
        for name in FORECASTERS:
            tried = {
                plan: fmean(quality(accelerated(pipe, validation, name, plan, of), known))
                for plan in tqdm(PLANNED, desc=f"{sampler}, {name} of {WORDS[of]}", unit="schedule")
            }
            chosen = max(tried, key=lambda plan: tried[plan])
            for schedule in (EVENLY, chosen):
                found = quality(accelerated(pipe, pairs, name, schedule, of), references)
                table.append([sampler, f"{name} of {WORDS[of]}", str(schedule), f"{interval(found):.2f}"])
    fewer = quality(draw(pipe, pairs, num_inference_steps=10), references)
    return [*table, [sampler, "the sampler with 10 steps", "", f"{interval(fewer):.2f}"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--pairs", type=int, default=24, help="how many held-out prompts, the k-th with seed k (24)")
    options = parser.parse_args()

    pipe, prompts = lesa.load(options.model), Path(options.model) / "prompts"
    pipe.set_progress_bar_config(disable=True)
    pairs, validation = (
        pair_up(read_prompts(prompts / f"{name}.txt")[:count], range(first, first + count))
        for name, count, first in (("heldout", options.pairs, 0), ("validation", CHOSEN_ON, 10_000))
    )
    config, table = pipe.scheduler.config, []
    for sampler, make in SAMPLERS.items():
        pipe.scheduler = make(config)
        table += lines(pipe, sampler, pairs, validation)
    print(f"\n{options.model}, {len(pairs)} held-out prompts, 10 of 50 steps full\n")
    print(markdown(("sampler", "forecast", "schedule", "PSNR, dB [95 %]"), table, text=3))


if __name__ == "__main__":
    main()
