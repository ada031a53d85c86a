"""Train LinCa by its paper's description, and set it beside rows at the same tap and on the same schedules.

    python benchmarks/linca.py
    python benchmarks/linca.py --schedules paper:7 --prompts 96

`lesa.bench.linca` says what the description leaves open and how it is filled in. Maps are trained on runs of prompts of
train.txt with every step full, recorded at the usual tap of emoji-flux's class; on each schedule they are for it alone,
at the rate that is best on validation.txt. Beside them stand reuse, Taylor-1 and 2, HiCache's rows, and shipped LESAs
for that schedule and tap. PSNR (at most 60 dB a picture) and drift are of held-out pairs against the run with every
step full.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import lesa
from lesa.bench import benchmark, linca
from lesa.bench.compare import shipped
from lesa.bench.lines import Key, Record
from lesa.bench.methods import FEATURE, Method, forecast, label
from lesa.bench.report import markdown
from lesa.host.tap import place_of, tap_of
from lesa.learn.call_files import read_prompts
from lesa.learn.collect import record
from lesa.learn.collecting import TRAINING_SEED, VALIDATION_SEED
from lesa.learn.metrics import interval
from lesa.learn.trajectory import Trajectory, draw_tokens
from lesa.rows.forecasters import Forecaster
from lesa.rows.rivals import Hermite
from lesa.rows.schedule import Schedule

MODEL = Path("models/emoji-flux")
SCHEDULES = ("paper:7", "at:0,16,32,39,43,46,48,49")
ROWS: Mapping[str, Forecaster] = {
    "reuse": lesa.Reuse(),
    "Taylor-1": lesa.Taylor(1),
    "Taylor-2": lesa.Taylor(2),
    "HiCache-2": Hermite(2),
}
RATES, BATCH = (1e-3, 1e-4), 24
HEADS = ("schedule", "full steps", "method", "drift, dB [95 %]", "PSNR, dB [95 %]", "trained, s")


def measured(pipe: Any, methods: Sequence[Method], prompts: Sequence[str], seed: int) -> Mapping[Key, list[Record]]:
    """Draw prompts with each method and return the records."""
    seeds = range(seed, seed + len(prompts))
    return benchmark.compare(pipe, methods, prompts, seeds, timed=0, batch_size=BATCH).records


def drift_of(records: Sequence[Record]) -> float:
    return fmean(record.drift for record in records)


def trained(pipe: Any, runs: Sequence[Trajectory], schedule: Schedule, checks: Sequence[str]) -> Method:
    """Train at each rate, and return what ends nearest to the reference runs of validation prompts."""
    features, grid = linca.features_of(runs), runs[0].grid
    tried: dict[float, Method] = {}
    for rate in RATES:
        made = linca.train(features, grid, schedule, linca.PUBLISHED._replace(rate=rate))
        tried[rate] = linca.method(made, f"LinCa, rate {rate:g}")
    records = measured(pipe, list(tried.values()), checks, VALIDATION_SEED)
    return min(tried.values(), key=lambda one: drift_of(records[one.key]))


def lines(pipe: Any, runs: Sequence[Trajectory], schedule: Schedule, options: argparse.Namespace) -> list[list[str]]:
    """Train and measure on one schedule."""
    checks, held = (read_prompts(MODEL / "prompts" / f"{name}.txt") for name in ("validation", "heldout"))
    began = time.perf_counter()
    ours = trained(pipe, runs, schedule, checks[: options.checks])
    seconds = f"{time.perf_counter() - began:.0f}"
    methods = [forecast(name, rows, schedule) for name, rows in ROWS.items()]
    kind = type(pipe.transformer).__name__
    fits = [one for one in shipped(pipe) if one.schedule == schedule and place_of(kind, one.origin.tap) == FEATURE]
    methods += [*(forecast(label(one), one, schedule) for one in fits), ours]
    found = measured(pipe, methods, held[: options.pairs], 0)
    count = str(len(schedule.full_steps(runs[0].steps)))
    return [
        [
            *(str(schedule), count, method.name),
            f"{interval([record.drift for record in found[method.key]]):.2f}",
            f"{interval([record.psnr for record in found[method.key]]):.2f}",
            seconds if method is ours else "",
        ]
        for method in methods
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES)
    parser.add_argument("--prompts", type=int, default=96, help="recorded runs to train on (96)")
    parser.add_argument("--checks", type=int, default=8, help="validation prompts that choose the rate (8)")
    parser.add_argument("--pairs", type=int, default=24, help="how many held-out prompts, the k-th with seed k (24)")
    options = parser.parse_args()

    pipe = lesa.load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    known = read_prompts(MODEL / "prompts" / "train.txt")[: options.prompts]
    runs: list[Trajectory] = []
    for first in range(0, len(known), BATCH):
        seeds = range(TRAINING_SEED + first, TRAINING_SEED + first + len(known[first : first + BATCH]))
        runs += record(pipe, known[first : first + BATCH], seeds, draw_tokens, tap_of(pipe.transformer))
    table: list[list[str]] = []
    for schedule in map(Schedule.parse, options.schedules):
        table += lines(pipe, runs, schedule, options)
        print(markdown(HEADS, table, text=3), flush=True)


if __name__ == "__main__":
    main()
