"""Set others' planners beside ours: which full steps each finds for the same rows, what it costs, and what comes out.

    python benchmarks/planners.py
    python benchmarks/planners.py --model models/emoji-qwen --rows solved --budgets 10

All plan for the same rows at the output, on the first prompts of validation.txt, and what they find is measured on
held-out ones. Others' planners are `lesa.bench.planners`: DPCache by its recurrence with three first steps full, as
published, and by an exact path with the first alone; MeanCache's shortest path; BudCache with no more transformer runs
than ours took, with its published settings on one prompt, and on all prompts. Solved rows have no forecast before they
are solved: there, costs of paths are those of Lagrange-2, and the loss of real runs is that of
rows solved on them. `ours, algebra` is `Planner.search` and, with real runs, `ours` `Planner.plan`, or of solved rows
the search of `lesa calibrate`.

Transformer runs are of one picture and stream, the reference runs that a planner looks at included. Solved rows are
solved anew on each schedule found, on the same prompts, without refinement; that is not counted. Drift and PSNR (at
most 60 dB a picture) are against the model's own runs with every step full. What was found is kept in `--out`; a run
that was broken off goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import lesa
from lesa.bench import planners
from lesa.bench.report import markdown
from lesa.learn.call_files import read_prompts
from lesa.learn.collect import record
from lesa.learn.collecting import VALIDATION_SEED
from lesa.learn.counted import counting
from lesa.learn.metrics import interval, psnr
from lesa.learn.planning import Planner
from lesa.learn.references import References
from lesa.learn.searching import Search
from lesa.learn.solve import Solver
from lesa.rows.forecasters import Forecaster
from lesa.rows.named import named
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

SOLVED = "solved"
TRIES = 100
"""How many schedules are left to BudCache where it has as many transformer runs as our planner."""
HEADS = (
    *("rows", "full steps", "planner", "schedule", "transformer runs", "drift on validation, dB"),
    *("drift, dB [95 %]", "PSNR, dB [95 %]"),
)


class Found(NamedTuple):
    """The full steps that a planner found, and how many transformer runs it looked at."""

    full: Sequence[int]
    runs: int


class Model:
    """A pipeline with the prompts to plan on, and those to measure on, and their reference runs."""

    def __init__(self, folder: Path, prompts: int, pairs: int):
        self.pipe = lesa.load(folder)
        self.pipe.set_progress_bar_config(disable=True)
        self.prompts = read_prompts(folder / "prompts" / "validation.txt")[:prompts]
        self._heldout = read_prompts(folder / "prompts" / "heldout.txt")[:pairs]
        self.seeds = range(VALIDATION_SEED, VALIDATION_SEED + len(self.prompts))
        self.solver = Solver(self.pipe, self.prompts, self.seeds)
        self.steps, self.reference_runs = self.solver.ticks, self.solver.counts.reference

    @cached_property
    def velocities(self) -> torch.Tensor:
        """What the sampler got in the reference runs, (calls, S, elements)."""
        return torch.cat([run.outputs(range(self.steps)) for run in self.solver.reference])

    @cached_property
    def planner(self) -> tuple[Planner, int]:
        """Our planner, and how many transformer runs it is made of."""
        with counting(self.pipe) as runs:
            known = record(self.pipe, self.prompts, self.seeds, None, None, seam=True)
            made = Planner.of(self.pipe, known, Tap(), self.prompts)
            return made, runs() * len(self.prompts)

    @cached_property
    def heldout(self) -> References:
        return References(self.pipe, self._heldout, range(len(self._heldout)), pictures=True)

    def rows_on(self, rows: str, schedule: Schedule) -> Forecaster:
        """Return the rows of a name, solved on the schedule if that is what they are."""
        return self.solver.solve(schedule=schedule, refine=0).predictor if rows == SOLVED else named(rows)

    def loss(self, rows: str, prompts: int) -> planners.Loss:
        """Return what says how far real runs end from their references: the mean over prompts of |d|^2 / |x|^2."""
        problem = self.solver.first(prompts)

        def of(full: planners.Full) -> float:
            if rows == SOLVED:
                runs = problem.lockstep(full, "search").recordings
            else:
                runs, _ = problem.run(named(rows), Schedule.at(full), of="search")
            return float(problem.errors(runs).mean())

        return of


# --- planners


class Task(NamedTuple):
    """What is planned for: rows and a number of full steps; and how many transformer runs our planner takes there."""

    model: Model
    rows: str
    budget: int
    limit: int = 0


def evenly(task: Task) -> Found:
    return Found([task.model.steps * k // task.budget for k in range(task.budget)], 0)


def dpcache(task: Task, **options: Any) -> Found:
    model, forecaster = task.model, named("lagrange:2" if task.rows == SOLVED else task.rows)
    cost = planners.pact(model.velocities, model.solver.times, forecaster)
    return Found(planners.dpcache(cost, task.budget, **options), model.reference_runs)


def meancache(task: Task) -> Found:
    edges = planners.stability(task.model.velocities, task.model.solver.times)
    return Found(planners.meancache(edges, task.budget), task.model.reference_runs)


def budcache(task: Task, prompts: int, **options: Any) -> Found:
    model, before = task.model, task.model.solver.counts.search
    found = planners.budcache(model.loss(task.rows, prompts), model.steps, task.budget, **options)
    reference = model.reference_runs * prompts // len(model.prompts)
    return Found(found.full, reference + model.solver.counts.search - before)


def budcache_for_less(task: Task) -> Found:
    """Search with no more transformer runs than our planner takes: on as many prompts as leave enough tries, half of
    them to anneal."""
    model, each = task.model, task.model.reference_runs // len(task.model.prompts)
    one = each * task.budget // model.steps
    prompts = min(max(1, task.limit // (each + TRIES * one)), len(model.prompts))
    most = (task.limit - each * prompts) // (one * prompts)
    settings = planners.PUBLISHED._replace(iterations=min(planners.PUBLISHED.iterations, most // 2))
    return budcache(task, prompts, first=1, most=most, settings=settings)


def algebra(task: Task) -> Found:
    if task.rows == SOLVED:
        return Found(Search(task.model.solver).algebra.best(task.budget, 0.0), task.model.reference_runs)
    planner, runs = task.model.planner
    return Found(planner.search(named(task.rows), task.budget).full_steps(task.model.steps), runs)


def ours(task: Task) -> Found:
    model = task.model
    if task.rows == SOLVED:
        before = model.solver.counts.search
        full = Search(model.solver).best(task.budget).best[0]
        return Found(full, model.reference_runs + model.solver.counts.search - before)
    planner, made = model.planner
    with counting(model.pipe) as runs:
        schedule = planner.plan(named(task.rows), task.budget)
        return Found(schedule.full_steps(model.steps), made + runs() * len(model.prompts))


OURS = "ours"
PLANNERS: dict[str, Callable[[Task], Found]] = {
    OURS: ours,
    "ours, algebra": algebra,
    "evenly spread": evenly,
    "DPCache": dpcache,
    "DPCache, exact, first step alone": lambda task: dpcache(task, first=1, exact=True),
    "MeanCache": meancache,
    "BudCache, runs as ours": budcache_for_less,
    "BudCache": lambda task: budcache(task, 1),
    "BudCache, all prompts": lambda task: budcache(task, len(task.model.prompts), first=1),
}


# --- the table


class Kept:
    """What was found and measured so far, in a file."""

    def __init__(self, file: Path):
        self._file = file
        self._known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def of(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what is kept under a key, or make and keep it."""
        if key not in self._known:
            self._known[key] = make()
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(json.dumps(self._known, indent=1))
        return self._known[key]


def measure(model: Model, rows: str, full: Sequence[int]) -> list[str]:
    """Return how rows do on a schedule: on the prompts planned on, and on held-out ones."""
    schedule = Schedule.at(full)
    forecaster = model.rows_on(rows, schedule)
    own, found = (known.measure(forecaster, schedule) for known in (model.solver, model.heldout))
    pairs = zip(found.pictures, model.heldout.pictures, strict=True)
    quality = [psnr(*(np.asarray(picture) for picture in pair)) for pair in pairs]
    return [f"{own.drift:.2f}", f"{interval(found.drifts):.2f}", f"{interval(quality):.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("models/emoji-flux"))
    parser.add_argument("--rows", nargs="+", default=["lagrange:2", SOLVED, "reuse"], help=f"`{SOLVED}`, or as `plan`")
    parser.add_argument("--budgets", nargs="+", type=int, default=[5, 8], metavar="N", help="full steps")
    parser.add_argument("--planners", nargs="+", default=list(PLANNERS), choices=list(PLANNERS))
    parser.add_argument("--prompts", type=int, default=8, help="how many validation prompts to plan on (8)")
    parser.add_argument("--pairs", type=int, default=24, help="how many held-out prompts, the k-th with seed k (24)")
    parser.add_argument("--out", type=Path, default=Path("out/planners"))
    options = parser.parse_args()

    model = Model(options.model, options.prompts, options.pairs)
    kept = Kept(options.out / f"{options.model.name}-{options.prompts}-{options.pairs}.json")
    table = []
    for budget, rows in product(options.budgets, options.rows):
        limit = 0
        for name in dict.fromkeys([OURS, *options.planners]):
            task = Task(model, rows, budget, limit)
            full, runs = kept.of(f"{rows}, {budget}, {name}", partial(PLANNERS[name], task))
            limit = limit or runs
            scores = kept.of(f"{rows} at {list(full)}", partial(measure, model, rows, full))
            table.append((rows, str(budget), name, ", ".join(map(str, full)), str(runs), *scores))
            print(*table[-1], sep=" | ", flush=True)
    print(f"\n{options.model.name}, {len(model.prompts)} prompts, {options.pairs} held-out pairs\n")
    print(markdown(HEADS, table, text=4))


if __name__ == "__main__":
    main()
