"""Set LESA fitted by least squares beside LESA by gradient, L2P, the continuous LESA and calibrated rows.

    python benchmarks/phases.py --data out/runs --schedules paper:7 paper:10 at:0,25,38,44,47,49
    python benchmarks/phases.py --model models/emoji-qwen --data out/runs-qwen --schedules paper:7 --budgets 10

On every schedule: LESA and L2P trained by least squares on the runs that `lesa collect` wrote (by gradient, too, with
--fits), and the predictors shipped for it. With as many full steps, on schedules of their own: what is shipped for
many grids, and the rows that `lesa.calibrate` keeps. Drift and PSNR, at most 60 dB, are of held-out prompts against the
model's own run with every step full, with bootstrap 95 % intervals; validation prompts choose the round.

Seconds are of one thread's work (those of shipped predictors: as their training took on its machine), transformer runs
of one picture and stream, the recorded runs included (of shipped predictors: as their recipe counts them). Predictors
are kept in --out, and those that are there are not trained again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lesa
from lesa.bench.report import markdown
from lesa.learn.call_files import read_prompts
from lesa.learn.checks import Checks
from lesa.learn.metrics import interval
from lesa.learn.outcome import JUDGED_ON, UNTRAINED
from lesa.learn.trajectory import Store
from lesa.predictors import L2P, LESA
from lesa.predictors.curve import Tried
from lesa.predictors.shelf import Shelf

HEADS = ("full steps", "rows", "tap", "schedule", "drift, dB [95 %]", "PSNR, dB [95 %]", "transformer runs", "s")
BY_RECIPE = 48, 24
"""How many runs shipped predictors were trained and validated on (models/recipes)."""
NAMES = {LESA: "LESA", L2P: "L2P"}


class Rows(NamedTuple):
    """A predictor on a schedule, and what it took to find it."""

    name: str
    predictor: lesa.Predictor
    schedule: lesa.Schedule
    runs: int | None = None
    seconds: float | None = None


class Work:
    """A pipeline whose transformer runs and seconds are counted, for predictors that are kept in a folder."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.pipe, self.count = options, lesa.load(options.model), 0
        self.pipe.set_progress_bar_config(disable=True)
        self.pipe.transformer.transformer_blocks[0].register_forward_pre_hook(self._counted, with_kwargs=True)
        self.store = Store.open(options.data)
        self.steps = len(self.store.collection.grid) - 1

    def _counted(self, _block: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.count += len(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def prompts(self, name: str, limit: int) -> list[str]:
        return read_prompts(Path(self.options.model) / "prompts" / f"{name}.txt")[:limit]

    def kept(self, name: str, make: Callable[[Path], Any], recorded: int = 0) -> tuple[Any, int, float]:
        """Make a predictor, or load it if it is there; returns it with its transformer runs and seconds."""
        folder = self.options.out / name.replace(" ", "-").replace(":", "").replace(",", "-")
        file = folder.with_suffix(".json")
        if not file.exists():
            self.count, began = 0, time.process_time()
            make(folder)
            file.write_text(json.dumps([self.count + recorded, time.process_time() - began]))
        return lesa.Predictor.from_pretrained(folder), *json.loads(file.read_text())

    def trained(self, method: str, fit: str, schedule: lesa.Schedule) -> Rows:
        validation, options = self.prompts("validation", self.options.validation), self.options
        chosen = lesa.TrainOptions(method=method, fit=fit, schedule=schedule, rounds=options.rounds)

        def make(folder: Path) -> None:
            lesa.train(self.pipe, self.store, validation, folder, chosen)

        first = self.store.load(0)
        recorded = len(self.store) * self.steps * len(first.streams)
        found = self.kept(f"{method} {fit} {schedule}", make, recorded)
        return Rows(f"{NAMES[type(found[0])]}, {fit}", found[0], schedule, *found[1:])

    def calibrated(self, budget: int) -> Rows:
        """Calibrate on prompts that training sees, a third of them checked."""
        shelf, how = Shelf(self.options.out / "shelf"), lesa.CalibrateOptions(progress=False)
        prompts = self.prompts("train", self.options.calibrated)

        def make(folder: Path) -> None:
            lesa.calibrate(self.pipe, prompts, folder, how, budget=budget, shelf=shelf)

        found = self.kept(f"calibrated {budget}", make)
        return Rows("calibrated", found[0], found[0].schedule, *found[1:])

    def shipped(self, schedule: lesa.Schedule) -> Iterator[Rows]:
        """Yield the predictors shipped for a schedule."""
        for folder in sorted(Path(self.options.model).glob("lesa/*")):
            predictor = lesa.Predictor.from_pretrained(folder)
            if isinstance(predictor, (LESA, L2P)) and predictor.schedule == schedule:
                seconds = predictor.origin.training.get("seconds")
                yield Rows(f"{NAMES[type(predictor)]}, shipped", predictor, schedule, runs_of(predictor), seconds)

    def many(self, budget: int) -> Iterator[Rows]:
        """Yield the predictor shipped for many grids, if there is one for so many full steps."""
        folder, first = Path(self.options.model) / "lesa" / "lesa-many", self.store.load(0)
        if folder.exists():
            predictor = lesa.Predictor.from_pretrained(folder)
            schedule = predictor.schedule_for(first.grid, budget)
            seconds = predictor.origin.training.get("seconds")
            yield Rows("continuous LESA, shipped", predictor, schedule, None, seconds)

    def all(self) -> Iterator[Rows]:
        for schedule in self.options.schedules:
            yield from self.shipped(schedule)
            for fit in self.options.fits:
                yield from (self.trained(method, fit, schedule) for method in self.options.methods)
        for budget in sorted({*self.options.budgets, *(len(s.full_steps(self.steps)) for s in self.options.schedules)}):
            yield from self.many(budget)
            if self.options.calibrated:
                yield self.calibrated(budget)


def runs_of(predictor: lesa.Predictor) -> int:
    """Count the transformer runs of a training as the recipes have it: recorded runs, rounds, and what judges it."""
    prompts, rounds = sum(BY_RECIPE), predictor.origin.training["rounds"] + 1
    full = rounds * prompts + (2 + len(UNTRAINED)) * JUDGED_ON
    return len(predictor.origin.streams) * (prompts * (len(predictor.grid) - 1) + full * len(predictor.full))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/emoji-flux")
    parser.add_argument("--data", type=Path, default=Path("out/runs"), help="what lesa collect wrote (out/runs)")
    parser.add_argument("--schedules", nargs="*", type=lesa.Schedule.parse, default=[lesa.Schedule.parse("paper:7")])
    parser.add_argument("--budgets", nargs="*", type=int, default=[], help="more numbers of full steps to calibrate")
    parser.add_argument("--methods", nargs="*", default=["lesa", "l2p"])
    parser.add_argument("--fits", nargs="*", default=["least-squares"], help="least-squares, gradient")
    parser.add_argument("--rounds", type=int, default=2, help="of each training's closed-loop phase (2)")
    parser.add_argument("--validation", type=int, default=8, help="how many validation prompts (8)")
    parser.add_argument("--calibrated", type=int, default=12, help="how many prompts to calibrate on (12); 0: none")
    parser.add_argument("--pairs", type=int, default=48, help="how many held-out prompts, the k-th with seed k (48)")
    parser.add_argument("--batch-size", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("out/phases"), help="for the predictors (out/phases)")
    options = parser.parse_args()

    options.out.mkdir(parents=True, exist_ok=True)
    work = Work(options)
    found = list(work.all())  # before anything held out is drawn
    held = work.prompts("heldout", options.pairs)
    known = Checks(work.pipe, held, range(len(held)), {}, pictures=True, batch_size=options.batch_size)
    lines = []
    for one in sorted(found, key=lambda one: -len(one.predictor.full_of(one.schedule, work.steps))):
        lines.append(line(one, known.run(one.name, one.predictor, one.schedule), work.steps))
        print(*lines[-1], sep=" | ", flush=True)
    print(f"\n{options.model}, {len(held)} held-out prompts, trained on {len(work.store)}\n")
    print(markdown(HEADS, lines, text=4))


def line(rows: Rows, tried: Tried, steps: int) -> tuple[str, ...]:
    full = str(len(rows.predictor.full_of(rows.schedule, steps)))
    tap = "feature" if rows.predictor.origin.tap.modules else "output"
    took = ("" if value is None else f"{value:.0f}" for value in (rows.runs, rows.seconds))
    return full, rows.name, tap, str(rows.schedule), f"{interval(tried.drift)}", f"{interval(tried.psnr)}", *took


if __name__ == "__main__":
    main()
