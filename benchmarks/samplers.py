"""Plan and train for emoji-flux under better samplers than its own, and measure against the same sampler's full run.

    python benchmarks/samplers.py

UniPC and DPM++ 2M on flow matching's sigmas. Runs of 16 training prompts are recorded at the sampler; schedules are
planned for Lagrange-2 on them, and a LESA is trained on each; 8 validation prompts choose its round. PSNR in dB of
24 held-out prompts, at most 60 a picture, against the sampler's own 50 steps: the same sampler with fewer steps, and on
the planned schedule rows without training and LESA.
"""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

import lesa
from lesa.bench.report import markdown
from lesa.learn.call_files import read_prompts
from lesa.learn.collect import collect
from lesa.learn.collecting import TRAINING_SEED
from lesa.learn.metrics import psnr
from lesa.learn.plan import planner_of

MODEL = Path("models/emoji-flux")
SAMPLERS = {"UniPC": UniPCMultistepScheduler, "DPM++ 2M": DPMSolverMultistepScheduler}
UNTRAINED = (lesa.Reuse(), lesa.Lagrange(1), lesa.Lagrange(2))
HEADS = ("sampler", "full steps", "schedule", "fewer steps", *map(repr, UNTRAINED), "LESA")


def sampled_by(kind: type) -> Any:
    """Load the model with another sampler on its own grid."""
    pipe = lesa.load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True)
    shifts = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    settings = {**flow, "time_shift_type": "exponential", **{name: pipe.scheduler.config[name] for name in shifts}}
    known = inspect.signature(kind.__init__).parameters
    pipe.scheduler = kind(**{name: value for name, value in settings.items() if name in known})
    return pipe


def rows_of(name: str, out: Path) -> list[tuple[str, ...]]:
    """Plan, train and measure under one sampler."""
    pipe = sampled_by(SAMPLERS[name])
    prompts = {part: read_prompts(MODEL / "prompts" / f"{part}.txt") for part in ("train", "validation", "heldout")}
    trained, held = prompts["train"][:16], prompts["heldout"][:24]
    seeds = [TRAINING_SEED + k for k in range(len(trained))]
    store = collect(pipe, trained, seeds, out / "runs", model=str(MODEL), seam=True, batch_size=16)
    planner = planner_of(pipe, store, "output")

    def drawn(**call: Any) -> list[np.ndarray]:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(held))]
        return [np.asarray(picture) for picture in pipe(held, generator=generators, **call).images]

    reference, rows = drawn(), []
    for budget in (10, 8):
        schedule = planner.plan(lesa.Lagrange(2), budget)
        options = lesa.TrainOptions(schedule=schedule, rounds=2)
        predictor = lesa.train(pipe, store, prompts["validation"][:8], out / str(budget), options).predictor
        scores = [drawn(num_inference_steps=budget)]
        for forecaster in (*UNTRAINED, predictor):
            with lesa.accelerate(pipe, forecaster, schedule=schedule):
                scores.append(drawn())
        means = [np.mean([psnr(one, other) for one, other in zip(some, reference, strict=True)]) for some in scores]
        rows.append((name, str(budget), str(schedule), *(f"{mean:.2f}" for mean in means)))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/samplers"), help="for runs and predictors")
    options = parser.parse_args()
    found = [row for name in SAMPLERS for row in rows_of(name, options.out / name.split()[0])]
    print(markdown(HEADS, found, text=3))


if __name__ == "__main__":
    main()
