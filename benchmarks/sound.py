"""Measure what calibrated rows, LESA and rows without training keep of sound, beside the sampler with as few steps.

    python benchmarks/sound.py

Held-out prompts of `emoji-sound`, 10 full steps of 100 and of 50, against the same run with every step full, from the
same noise. Its own sampler adds noise at every step: there rows are of the data prediction, and LESA, whose rows are of
outputs, is refused. So a second half takes the same grid without noise, DPM++ 2M. Signal-to-noise is of samples, the
log-mel distance of spectra, drift of the last latents; PSNR, of pictures of spectra, is left out. Calibrated and
trained is on prompts of train.txt; under the model's own sampler what models/recipes/sound-predictors.sh calibrated is
taken, where it lies beside the model.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import CosineDPMSolverMultistepScheduler, EDMDPMSolverMultistepScheduler

import lesa
from lesa.bench.compare import CompareOptions
from lesa.bench.lines import DRIFT
from lesa.bench.methods import Method, fewer_steps, forecast
from lesa.bench.report import markdown
from lesa.bench.scores import SOUND_SCORES
from lesa.host.pipelines import with_call
from lesa.host.tap import OUTPUT
from lesa.learn.call_files import read_prompts
from lesa.predictors.shelf import Shelf

MODEL = "models/emoji-sound"
FULL = 10
UNTRAINED = {
    "reuse": lesa.Reuse(),
    "Taylor-1": lesa.Taylor(1),
    "Taylor-2": lesa.Taylor(2),
    "Lagrange-1": lesa.Lagrange(1),
}
HEADS = ("sampler", "steps", "method", "schedule", "full steps", "speedup", *SOUND_SCORES, "drift, dB", "as prompted")


class WithoutNoise(EDMDPMSolverMultistepScheduler):
    """DPM++ 2M on the grid, and with the times, of Stable Audio's own sampler."""

    precondition_noise = CosineDPMSolverMultistepScheduler.precondition_noise


SAMPLERS = {"its own": CosineDPMSolverMultistepScheduler, "without noise": WithoutNoise}


def line_up(pipe: Any, steps: int, folder: Path, prompts: Mapping[str, list[str]], own: Path | None) -> list[Method]:
    """Calibrate, or read what lies in the folder of the model's `own`; of other samplers train, too; returns these and
    what needs neither."""
    spread = lesa.Schedule.every(steps // FULL)
    if own is not None and own.is_dir():
        calibrated = lesa.Predictor.from_pretrained(own)
    else:
        calibrated = lesa.calibrate(pipe, prompts["train"], budget=FULL, shelf=Shelf(folder / "shelf"))
    methods = [fewer_steps(FULL)]
    for schedule in dict.fromkeys((spread, calibrated.schedule)):
        methods += [forecast(name, rows, schedule, OUTPUT) for name, rows in UNTRAINED.items()]
    if own is None:
        methods.append(forecast("LESA", train(pipe, folder, prompts, spread), spread))
    return [*methods, forecast("calibrated", calibrated, calibrated.schedule)]


def train(pipe: Any, folder: Path, prompts: Mapping[str, list[str]], schedule: lesa.Schedule) -> lesa.Predictor:
    runs = lesa.collect(pipe, prompts["train"], folder / "runs", lesa.CollectOptions(tap=OUTPUT))
    options = lesa.TrainOptions(schedule=schedule, tap=OUTPUT, rounds=1, updates=(200, 100))
    return lesa.train(pipe, runs, prompts["validation"], folder / "lesa", options).predictor


def lines(
    pipe: Any, sampler: str, steps: int, model: Path, out: Path, prompts: Mapping[str, list[str]]
) -> list[list[str]]:
    """Return the table's lines of a sampler at so many steps."""
    pipe = with_call(pipe, {"num_inference_steps": steps})
    pipe.scheduler = SAMPLERS[sampler].from_config(pipe.scheduler.config)
    folder = out / f"{sampler.replace(' ', '-')}-{steps}"
    own = model / "lesa" / f"calibrated-{steps}" if sampler == "its own" else None
    methods = line_up(pipe, steps, folder, prompts, own)
    found = lesa.compare(
        pipe, prompts["heldout"], folder / "bench", CompareOptions(methods, batch_size=24, timed=1, bound=False)
    )
    table = []
    for result in found.results():
        scores = [f"{result.scores[name]:.2f}" for name in (*SOUND_SCORES, DRIFT)]
        speedup = f"{result.speedup:.2f}x" if result.speedup else "-"
        known = [result.method, result.schedule, f"{result.full_steps:.3g}", speedup, *scores]
        table.append([sampler, str(steps), *known, "-" if result.prompted is None else f"{result.prompted:.1%}"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--prompts", type=int, default=16, help="how many are calibrated and trained on (16)")
    parser.add_argument("--pairs", type=int, default=48, help="how many held-out prompts, the k-th with seed k (48)")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 50])
    parser.add_argument("--out", type=Path, default=Path("out/bench-sound"), metavar="FOLDER")
    given = parser.parse_args()
    pipe = lesa.load(given.model)
    pipe.set_progress_bar_config(disable=True)
    counts = dict(train=given.prompts, validation=given.prompts, heldout=given.pairs)
    prompts = {name: read_prompts(Path(given.model) / "prompts" / f"{name}.txt")[:n] for name, n in counts.items()}
    table: list[list[str]] = []
    for sampler in SAMPLERS:
        for steps in given.steps:
            table += lines(pipe, sampler, steps, Path(given.model), given.out, prompts)
    print(f"\n{given.model}, {given.pairs} held-out prompts, {FULL} full steps\n")
    print(markdown(HEADS, table, text=4))


if __name__ == "__main__":
    main()
