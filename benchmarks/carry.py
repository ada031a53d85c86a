"""Measure rows carried to other grids beside rows that were solved for there.

    python benchmarks/carry.py models/emoji-flux --grids 64:50,64:20,64:24,64:28,64:36,80:28 --budgets 8,5

A grid is a size in pixels and a number of steps. On the first one rows are solved for, with a search by real runs. On
each other one there are

- carried: the first one's rows, carried by algebra and what the denoiser makes of times: no run on that grid; without
  the latter with --times-alone;
- begun near: rows solved for on the reference runs there, with the full steps that the first one's algebra says, so
  that no schedule is tried;
- solved there: rows solved for with a search by real runs, as a calibration made there would.

All are measured on the same validation prompts, by the drift of the last latents from the model's own runs with every
step full, a mean over prompts, with what is lost to the rows solved there, pair by pair, with bootstrap 95 % intervals.
Transformer runs are of one picture each; reference runs are among them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from calibrate import calls_of

from lesa.bench.report import markdown
from lesa.host.embedding import embedding_of
from lesa.host.loading import LoadOptions, loaded
from lesa.host.runtime import denoisers_of
from lesa.learn.collecting import TRAINING_SEED, VALIDATION_SEED
from lesa.learn.metrics import paired_interval
from lesa.learn.references import References
from lesa.learn.solve import Solution, Solver
from lesa.predictors.solved import Solved

GRIDS = "64:50,64:20,64:24,64:28,64:36,80:28"
HEADS = (
    "grid",
    "full steps",
    "rows",
    "schedule",
    "drift, dB",
    "worse than solved there, dB [95 %]",
    "transformer runs",
)


class Grid:
    """One grid: rows solved on some prompts there, and what any rows leave on others."""

    def __init__(self, pipe: Any, options: argparse.Namespace, size: int, steps: int):
        self.call = dict(height=size, width=size, num_inference_steps=steps)
        self.name = f"{size} x {size}, {steps} steps"
        prompts = calls_of(options.model, "train", options.prompts)
        held = calls_of(options.model, "validation", options.pairs)
        self._options, self._pipe = options, pipe
        self.solver = Solver(pipe, prompts, range(TRAINING_SEED, TRAINING_SEED + len(prompts)), self.call)
        self._held = References(pipe, held, range(VALIDATION_SEED, VALIDATION_SEED + len(held)), self.call)

    def solve(self, budget: int, near: Sequence[Solved] = ()) -> Solution:
        return self.solver.solve(budget, refine=self._options.refine, most=self._options.most, near=near)

    def carried(self, known: Solved) -> Solved:
        """Carry rows here, as a run of the pipeline at its first step would."""
        solver, denoisers = self.solver, [getattr(self._pipe, name) for name in denoisers_of(self._pipe)]
        embed = embedding_of(denoisers, self._pipe.scheduler, solver.times.tolist())
        return known.carried(solver.times, solver.response, None if self._options.times_alone else embed)

    def line(self, rows: str, predictor: Solved, runs: int, best: Sequence[float] = ()) -> tuple[list[float], tuple]:
        """Return the drifts of a predictor, and its line of the table."""
        drifts = self._held.drift_of(predictor)
        worse = f"{paired_interval(drifts, best):+.2f}" if best else ""
        budget, schedule = str(len(predictor.full)), str(predictor.schedule)
        line = (self.name, budget, rows, schedule, f"{fmean(drifts):.2f}", worse, f"{runs:,}")
        print("| " + " | ".join(line) + " |", flush=True)
        return drifts, line


def compared(there: Grid, budget: int, first: Solved, *, search: bool) -> list[tuple]:
    """Return the lines of a grid that rows are carried to."""
    found = []
    if search:
        report = there.solve(budget)
        best, line = there.line("solved there", report.predictor, report.report.transformer_runs)
        found.append(line)
    else:
        best = []
    near = there.solve(budget, near=[first])
    found.append(there.line("begun near", near.predictor, near.report.transformer_runs, best)[1])
    found.append(there.line("carried", there.carried(first), 0, best)[1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="models/emoji-flux")
    parser.add_argument(
        "--grids", default="64:50,64:20,64:24,64:28,64:36,80:28", help="SIZE:STEPS, the first one first"
    )
    parser.add_argument("--budgets", default="8,5", help="full steps")
    parser.add_argument("--prompts", type=int, default=8, help="how many prompts rows are solved on (8)")
    parser.add_argument("--pairs", type=int, default=32, help="how many validation prompts (32)")
    parser.add_argument("--refine", type=int, default=0, help="steps of refinement on the end of the run (0)")
    parser.add_argument("--most", type=int, default=60, help="how many schedules a search tries (60)")
    parser.add_argument("--no-search", action="store_true", help="leave out the rows solved there")
    parser.add_argument("--times-alone", action="store_true", help="carry by what is known of t alone")
    options = parser.parse_args()

    pipe = loaded(LoadOptions(options.model))
    pipe.set_progress_bar_config(disable=True)
    budgets = sorted(map(int, options.budgets.split(",")), reverse=True)
    first, *others = (tuple(map(int, grid.split(":"))) for grid in options.grids.split(","))
    grid, lines, known = Grid(pipe, options, *first), [], {}
    for budget in budgets:
        known[budget], report = grid.solve(budget, near=list(known.values())[-1:])
        lines.append(grid.line("solved there", known[budget], report.transformer_runs)[1])
    for size, steps in others:
        there = Grid(pipe, options, size, steps)
        for budget in budgets:
            lines += compared(there, budget, known[budget], search=not options.no_search)
    about = f"{options.model}, solved on {options.prompts} prompts, {options.pairs} validation prompts"
    print(
        f"\n{about}, {options.most} schedules tried, {options.refine} refinements\n\n{markdown(HEADS, lines, text=4)}"
    )


if __name__ == "__main__":
    main()
