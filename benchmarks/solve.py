"""Solve for rows in closed form on a few prompts, and measure them on held-out ones beside planned and trained rows.

    python benchmarks/solve.py
    python benchmarks/solve.py --model models/emoji-qwen --budgets 10 8 --prompts 16 --most 40

For every budget of full steps: Lagrange-3 on the schedule planned for it, rows solved on a schedule searched by real
runs, these refined on the end of the run, and the predictor shipped for many grids where there is one. All act at the
output. Rows are solved on the first prompts of train.txt, `drift on validation` is of prompts of validation.txt, and
drift and PSNR (pictures capped at 60 dB) of those of heldout.txt, each against the model's own run with every step
full. Transformer runs are those of one picture and stream, the reference runs of solving included, which are made once
for all budgets; seconds are what searching and solving, or planning, took besides. Budgets go from high to low, as each
search begins near the schedule found before.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

import lesa
from lesa.bench.benchmark import batches, pair_up
from lesa.bench.lines import Pair
from lesa.bench.report import markdown
from lesa.host.tap import OUTPUT, tap_of
from lesa.learn.call_files import read_prompts
from lesa.learn.collect import record
from lesa.learn.collecting import TRAINING_SEED, VALIDATION_SEED
from lesa.learn.metrics import drift, psnr
from lesa.learn.planning import PLANNED_ON, Planner
from lesa.learn.solve import Solver
from lesa.learn.trajectory import draw_tokens
from lesa.predictors.solved import Solved
from lesa.rows.forecasters import Forecaster

MODEL, SHIPPED = "models/emoji-flux", "lesa-many"
HEADS = ("full steps", "schedule", "rows", "drift on validation, dB", "drift, dB", "PSNR, dB", "transformer runs", "s")


class Method(NamedTuple):
    """Rows on a schedule, and what it took to find them."""

    name: str
    forecaster: Forecaster
    schedule: lesa.Schedule
    runs: str = ""
    seconds: str = ""


class Drawn(NamedTuple):
    """The pictures of some pairs and their last latents."""

    pictures: list[np.ndarray]
    latents: list[torch.Tensor]


def draw(pipe: Any, pairs: Sequence[Sequence[Pair]], method: Method | None = None) -> Drawn:
    """Draw batches of pairs, in full or with a method's rows."""
    last: dict[str, torch.Tensor] = {}

    def keep(_pipe: Any, _step: int, _time: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        last["latents"] = tensors["latents"].float().clone()
        return tensors

    drawn = Drawn([], [])
    run = lesa.accelerate(pipe, method.forecaster, schedule=method.schedule, tap=OUTPUT) if method else None
    for batch in pairs:
        seeds = [torch.Generator().manual_seed(pair.seed) for pair in batch]
        images = pipe(prompt=[pair.prompt for pair in batch], generator=seeds, callback_on_step_end=keep).images
        drawn.pictures.extend(np.asarray(image.convert("RGB")) for image in images)
        drawn.latents.extend(last["latents"])
    if run is not None:
        run.close()
    return drawn


def drift_of(drawn: Drawn, reference: Drawn) -> float:
    return fmean(drift(*both) for both in zip(drawn.latents, reference.latents, strict=True))


def psnr_of(drawn: Drawn, reference: Drawn) -> float:
    return fmean(psnr(*both) for both in zip(drawn.pictures, reference.pictures, strict=True))


def planned(pipe: Any, planner: Planner, budget: int) -> Method:
    """Plan for Lagrange-3 at the output."""
    began = time.perf_counter()
    schedule = planner.search(lesa.Lagrange(3), budget)
    return Method("Lagrange-3, planned", lesa.Lagrange(3), schedule, "", f"{time.perf_counter() - began:.0f}")


def solved(solver: Solver, budget: int, near: Sequence[Solved], options: argparse.Namespace) -> list[Method]:
    """Search a schedule and solve on it; then refine."""
    found, report = solver.solve(budget, refine=0, most=options.most, near=near)
    print(f"{budget} full steps, solved: {report}", flush=True)
    methods = [Method("solved", found, found.schedule, str(report.transformer_runs), f"{report.seconds:.0f}")]
    if options.refine:
        better, more = solver.solve(schedule=found.schedule, refine=options.refine)
        print(f"{budget} full steps, refined: {more}", flush=True)
        runs = report.transformer_runs + more.transformer_runs - more.reference_runs
        seconds = f"{report.seconds + more.seconds:.0f}"
        methods.append(Method("solved, refined", better, better.schedule, str(runs), seconds))
    return methods


def shipped(model: str, grid: torch.Tensor, budget: int) -> list[Method]:
    """Return the shipped predictor for many grids on its own schedule, if there is one of so many full steps."""
    folder = Path(model) / "lesa" / SHIPPED
    if not folder.exists():
        return []
    predictor = lesa.Predictor.from_pretrained(folder)
    try:
        return [Method(SHIPPED, predictor, predictor.schedule_for(grid, budget))]
    except ValueError:
        return []


def planner_of(pipe: Any, prompts: Sequence[str]) -> Planner:
    tap = tap_of(pipe.transformer, OUTPUT)
    seeds = range(TRAINING_SEED, TRAINING_SEED + len(prompts))
    return Planner.of(pipe, record(pipe, prompts, seeds, draw_tokens, tap), tap)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--budgets", nargs="+", type=int, default=[8, 6, 5, 4, 3], metavar="N", help="full steps")
    parser.add_argument("--prompts", type=int, default=8, help="how many to solve on (8)")
    parser.add_argument("--checks", type=int, default=4, help="how many of validation.txt to check on (4)")
    parser.add_argument("--pairs", type=int, default=100, help="how many held-out prompts, the k-th with seed k (100)")
    parser.add_argument("--refine", type=int, default=2, help="Gauss-Newton steps on the end of the run (2)")
    parser.add_argument("--most", type=int, default=200, help="schedules to try by real runs, at most (200)")
    parser.add_argument("--batch-size", type=int, default=20)
    options = parser.parse_args()

    pipe = lesa.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    names = ("train", "validation", "heldout")
    known, checks, held = (read_prompts(Path(options.model) / "prompts" / f"{name}.txt") for name in names)
    checks, held = checks[: options.checks], held[: options.pairs]
    groups = [pair_up(checks, range(VALIDATION_SEED, VALIDATION_SEED + len(checks))), pair_up(held, range(len(held)))]
    pairs = [batches(group, options.batch_size) for group in groups]
    reference = [draw(pipe, some) for some in pairs]
    planner, rows = planner_of(pipe, known[:PLANNED_ON]), []
    solver = Solver(pipe, known[: options.prompts], range(TRAINING_SEED, TRAINING_SEED + options.prompts))
    print(f"reference runs: {solver.seconds:.0f} s", flush=True)
    near: list[Solved] = []
    for budget in sorted(options.budgets, reverse=True):
        ours = solved(solver, budget, near, options)
        near = [method.forecaster for method in ours[:1] if isinstance(method.forecaster, Solved)]
        methods = [planned(pipe, planner, budget), *ours]
        for method in [*methods, *shipped(options.model, planner.grid, budget)]:
            drawn = [draw(pipe, some, method) for some in pairs]
            drifts = [drift_of(*both) for both in zip(drawn, reference, strict=True)]
            quality = psnr_of(drawn[1], reference[1])
            full = ", ".join(map(str, method.schedule.full_steps(planner.steps)))
            numbers = [f"{value:.2f}" for value in (*drifts, quality)]
            rows.append((str(budget), full, method.name, *numbers, method.runs, method.seconds))
            print(*rows[-1], sep=" | ", flush=True)
    print(f"\n{options.model}, {len(held)} held-out prompts, solved on {options.prompts}\n")
    print(markdown(HEADS, rows, text=3))


if __name__ == "__main__":
    main()
