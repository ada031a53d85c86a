"""Measure the same methods on every model of this repository, and write results/NAME.csv for each.

    python benchmarks/all.py
    python benchmarks/all.py --only emoji-flux unseen-letters --pairs 8 --out out/some --results out/some

Each model is calibrated first, on the first 12 prompts of train.txt, with what `lesa calibrate` takes where nothing is
named. Then all methods draw the same held-out prompts, against the model's own run with every step full. With as many
full steps as were calibrated: the same sampler with fewer steps; UniPC-2 and DPM++ 2M at planned times, where the
sampler is flow matching's Euler, on the best of all schedules here by real runs of 8 training prompts; reuse, Taylor-1
and Lagrange-1 to 3 at the output, each on the schedule planned for it, and Lagrange-3 at the final norm, too; the best
of these rows on the calibrated rows' own schedule, which the calibration's checked prompts name; the predictors that
the model ships with; and the calibrated rows. On the paper's schedules Taylor-2 and the predictors made for them.

Records are kept in --out, and what is there is not measured again: started anew it goes on. A model without weights is
skipped, which is said. `benchmarks/tables.py` makes the tables of the pages of results/*.csv.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import measured
import torch
from torch import Tensor

import lesa
from lesa.bench import methods, samplers
from lesa.bench.compare import CompareOptions, compare, shipped
from lesa.bench.lines import Pair
from lesa.bench.methods import Method, forecast, untrained
from lesa.bench.named import SCHEDULES
from lesa.bench.planned import keep_planned, planned
from lesa.host.loading import LoadOptions, loaded
from lesa.host.tap import OUTPUT
from lesa.learn.call_files import read_prompts
from lesa.learn.plan import FEW_STEPS
from lesa.learn.rivals import UNTRAINED
from lesa.predictors.calibration import Calibration
from lesa.predictors.curve import SOLVED, Curve, Point
from lesa.predictors.shelf import Shelf

CALIBRATED_ON, CHOSEN_ON = 12, 8
"""How many training prompts calibrations take, and on how many of them the times of better samplers are chosen."""
TAYLOR = {f"Taylor-2{methods.OURS}": lesa.Taylor(2)}
NAMES = {repr(one): name for name, one in untrained(True, lagrange=True, place=OUTPUT).items()}
"""What rows without training are called in tables."""


@dataclass(frozen=True)
class Case:
    """A model as it is called, the numbers of full steps, and how many held-out prompts."""

    name: str
    model: str
    budgets: tuple[int, ...] = (10, 8, 6, 5)
    lora: str | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    pairs: int = 24

    @property
    def weights(self) -> bool:
        """Tell whether the model can be run."""
        return any(Path(self.model, "transformer").glob("*.safetensors"))

    def prompts(self, part: str, limit: int) -> list[str]:
        return read_prompts(Path(self.model) / "prompts" / f"{part}.txt")[:limit]

    def pipe(self) -> Any:
        return loaded(LoadOptions(self.model, lora=self.lora, call=self.call))


FLUX, QWEN = "models/emoji-flux", "models/emoji-qwen"
CASES = (
    Case("emoji-flux", FLUX),
    Case("unseen-letters", "models/unseen-letters"),
    Case("emoji-qwen", QWEN, pairs=16),
    Case("emoji-video", "models/emoji-video", pairs=12),
    Case("emoji-schnell", "models/emoji-schnell", (3, 2)),
    Case("emoji-qwen-lightning", QWEN, (6, 4), lora=f"{QWEN}/lightning"),
    Case("unseen-flags", "models/unseen-flags"),
    Case("emoji-qwen-guidance-5", QWEN, call={"true_cfg_scale": 5.0}, pairs=16),
    Case("emoji-scene", "models/emoji-scene", (12, 10, 8, 6), pairs=16),
)


def calibration(pipe: Any, case: Case, shelf: Shelf) -> Calibration:
    """Calibrate, unless that is done."""
    if not shelf.all():
        prompts = case.prompts("train", CALIBRATED_ON)
        lesa.calibrate(pipe, prompts, options=lesa.CalibrateOptions(progress=False), budgets=case.budgets, shelf=shelf)
    return shelf.all()[0]


def line_up(pipe: Any, case: Case, found: Calibration, folder: Path) -> list[Method]:
    """Line up the methods, each once; in the folder is kept what was chosen by real runs."""
    ships = [] if case.call else shipped(pipe, variants=False)  # they are for the model's own calls
    curve = Curve.from_dict(found.table["curve"])
    lined_up: list[Method] = []
    for budget in case.budgets:
        predictor, point = found.predictor(budget), curve.at(budget)
        grid = torch.tensor(predictor.origin.grid)
        plans = planned_for(point)
        lined_up += methods.line_up_planned([budget], grid, _never, [*ships, predictor], rows={})
        lined_up += [forecast(NAMES[repr(one)], one, plans[repr(one)], OUTPUT) for one in UNTRAINED]
        lined_up += [forecast("Lagrange-3", lesa.Lagrange(3), plans[repr(lesa.Lagrange(3))])]
        lined_up += on_its_schedule(point, plans)
        if samplers.fits(pipe):
            schedules = list(dict.fromkeys([predictor.schedule, *plans.values()]))
            lined_up += better_samplers(pipe, case, grid, schedules, budget, folder)
    few = FEW_STEPS.get(curve.steps)
    schedules = [lesa.Schedule.parse(text) for text in ([few] if few else SCHEDULES)]
    lined_up += methods.line_up(curve.steps, schedules, ships, rows=TAYLOR)
    return list({method.key: method for method in lined_up}.values())


def _never(*about: Any) -> lesa.Schedule:
    raise AssertionError(f"all schedules are known, got a question for {about}")


def planned_for(point: Point) -> dict[str, lesa.Schedule]:
    """Return the schedule that was planned for each of the rows without training, by what they are."""
    solved = point.tried[0].schedule
    own = {one.rows: one.schedule for one in point.tried if one.rows != SOLVED}
    own |= {one.rows: one.schedule for one in point.tried if one.rows != SOLVED and one.schedule != solved}
    return {rows: lesa.Schedule.parse(schedule) for rows, schedule in own.items()}


def on_its_schedule(point: Point, plans: Mapping[str, lesa.Schedule]) -> list[Method]:
    """Return the rows without training that checked calls name as the best on the schedule of the solved rows, unless
    it is planned for them, too."""
    solved = point.tried[0].schedule
    there = [one for one in point.tried if one.rows != SOLVED and one.schedule == solved]
    best = min(there, key=lambda one: fmean(one.drift)).rows
    if str(plans[best]) == solved:
        return []
    (forecaster,) = [one for one in UNTRAINED if repr(one) == best]
    return [forecast(f"{NAMES[best]}, calibrated schedule", forecaster, lesa.Schedule.parse(solved), OUTPUT)]


def better_samplers(
    pipe: Any, case: Case, grid: Tensor, schedules: Sequence[lesa.Schedule], budget: int, folder: Path
) -> Iterator[Method]:
    """Yield UniPC-2 and DPM++ 2M, each at the best of the times that these schedules have full steps at."""
    known = planned(folder) or {"grid": grid.tolist()}
    pairs = [Pair(prompt, seed) for seed, prompt in enumerate(case.prompts("train", CHOSEN_ON))]
    for name in (name for name, kind in samplers.KINDS.items() if kind):
        tried = {str(one): samplers.at_times(name, samplers.times_of(grid, one), one) for one in schedules}
        key = f"{name} {budget}"
        if known.get(key) not in tried:
            known[key] = samplers.nearest(pipe, list(tried.values()), pairs).schedule
            folder.mkdir(parents=True, exist_ok=True)
            keep_planned(folder, known)
        yield tried[known[key]]


def measure(case: Case, out: Path) -> list[measured.Line]:
    """Measure a model; what is there already is read."""
    folder, pipe = out / case.name, case.pipe()
    found = calibration(pipe, case, Shelf(folder / "shelf"))
    lined_up = line_up(pipe, case, found, folder / "samplers")
    held = case.prompts("heldout", case.pairs)
    options = CompareOptions(lined_up, batch_size=case.pairs, timed=0, bound=False)
    commit = measured.commit(folder)
    comparison = compare(pipe, held, folder / "records", options)
    for key in comparison.failures.keys() - comparison.records.keys():
        print(f"{case.name}: {' on '.join(key)} failed: {comparison.failures[key]}", flush=True)
    return measured.lines(case.name, comparison, commit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES], help="these models alone")
    parser.add_argument("--pairs", type=int, help="held-out prompts of each; default: 24, of slow models 16 or 12")
    parser.add_argument("--out", type=Path, default=Path("out/bench-all"), help="for calibrations and records")
    parser.add_argument("--results", type=Path, default=measured.FOLDER, help="for the CSV files (results)")
    options = parser.parse_args()
    for case in (one for one in CASES if not options.only or one.name in options.only):
        if not case.weights:
            print(f"{case.name}: skipped, {case.model} has no weights", flush=True)
            continue
        case = replace(case, pairs=options.pairs or case.pairs)
        path = measured.write(options.results / f"{case.name}.csv", measure(case, options.out))
        print(f"{case.name}: {path}", flush=True)


if __name__ == "__main__":
    main()
