"""What calibrating takes: counted in real calibrations, within the limits that the page of costs is made of."""

import sys
from pathlib import Path

import numpy as np
import pytest
from zoo.pipelines import ZOO

from lesa.learn import counted
from lesa.learn.calibrate import CalibrateOptions, calibrate
from lesa.learn.checks import Checks
from lesa.learn.metrics import WINDOW
from lesa.learn.references import References
from lesa.learn.rivals import Rivals
from lesa.learn.solve import Solver
from lesa.predictors.shelf import Shelf
from lesa.rows.forecasters import Reuse
from lesa.rows.schedule import Schedule

ROOT = Path(__file__).parents[1]
CALL = dict(height=32, width=32, num_inference_steps=6, max_sequence_length=16)
PROMPTS = ["small red apple on white, left", "large blue fish on grey, right", "small green pear on grey, left"]


@pytest.fixture(scope="module")
def cost():
    """The script that counts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import calibration_cost

        yield calibration_cost
        sys.modules.pop("calibration_cost")


class Watch:
    """Counts what the transformers of a pipeline really run, and the largest batch."""

    def __init__(self, pipe, names=("transformer",)):
        self.runs, self.largest = 0, 0
        self._undo = [getattr(pipe, name).register_forward_pre_hook(self._see, with_kwargs=True) for name in names]

    def _see(self, _module, args, kwargs):
        batch = len(args[0] if args else kwargs["hidden_states"])
        self.runs, self.largest = self.runs + batch, max(self.largest, batch)

    def stop(self) -> int:
        for one in self._undo:
            one.remove()
        return self.runs


def check(cost, points, runs, options, seen):
    """Hold what was counted against the limits, and against what really ran."""
    limits = [cost.most_runs(runs, [point.full_steps], options) for point in points]
    for point, limit in zip(points, limits, strict=True):
        found = point.transformer_runs
        assert all(found[kind] <= limit[kind] for kind in cost.KINDS), (found, limit)
        assert found["reference"] == limit["reference"] and not point.left_out
        assert found["rounds"] <= 8 * point.full_steps * runs.solved_on * runs.streams
        assert found["search"] and found["refinement"] and found["checks"]
    assert sum(point.transformer_runs["rivals"] for point in points) == limits[0]["rivals"], "planned on once"
    kinds = [kind for kind in cost.KINDS if kind != "reference"]
    total = limits[0]["reference"] + sum(point.transformer_runs[kind] for point in points for kind in kinds)
    assert total == seen


@pytest.mark.parametrize("together", [True, False])
def test_a_calibration_runs_what_it_says_and_no_more_than_the_limits(cost, tiny_flux, tmp_path, together):
    options = CalibrateOptions(refine=1, most=4, progress=False, batch_size=None if together else 1)
    watch = Watch(tiny_flux)
    curve = calibrate(tiny_flux, PROMPTS, None, options, budgets=(3, 2), shelf=Shelf(tmp_path), **CALL).curve
    check(cost, curve.points, cost.Runs(6, 1, (0,), 3, 3, together), options, watch.stop())
    assert watch.largest == (3 if together else 1)


def test_guided_runs_of_two_denoisers_are_counted_by_stream(cost, tmp_path):
    subject = ZOO["wan22_guided"]()
    options = CalibrateOptions(refine=1, most=3, progress=False, pictures=False)
    with subject.around():
        watch = Watch(subject.pipe, ("transformer", "transformer_2"))
        curve = calibrate(subject.pipe, [subject.arguments], None, options, budget=4, shelf=Shelf(tmp_path)).curve
    check(cost, curve.points, cost.Runs(6, 2, (0, 2), 1, 1), options, watch.stop())


def test_rounds_and_reference_runs_of_any_budget_are_s_and_eight_j_at_most(cost):
    for steps, budget in ((50, 10), (50, 3), (8, 4), (4, 2)):
        runs = cost.Runs(steps, 2, checked=0, solved_on=8)
        found = cost.most_runs(runs, [budget])
        assert found["reference"] + found["rounds"] <= 8 * 2 * (steps + 8 * budget)


@pytest.mark.parametrize("elements", [64, 1 << 15])
def test_what_is_kept_of_runs_has_the_size_that_was_measured(cost, tiny_flux, monkeypatch, elements):
    monkeypatch.setattr(counted, "ELEMENTS", elements)
    solver = Solver(tiny_flux, PROMPTS, [3, 4, 5], CALL, batch_size=1)
    numbers = solver.reference[0].final.numel()
    kept = [[*run.velocities.values(), *run._latents.values(), run.final] for run in solver.reference]
    assert sum(x.nbytes for tensors in kept for x in tensors) == 3 * sum(cost.recorded(numbers, 6, 6))
    rows = solver.gaps((0, 3)).reuse()
    (run,) = solver.first(1).run_rows((0, 3), rows, of="rounds").recordings
    live = [*run.velocities.values(), *run._latents.values(), run.final]
    assert sum(x.nbytes for x in live) == sum(cost.recorded(numbers, 6, 2))
    references = References(tiny_flux, PROMPTS[:1], [3], CALL).reference
    assert sum(x.nbytes for run in references for x in (*run.velocities.values(), run.final)) == 4 * numbers


def test_rows_without_training_are_planned_one_call_at_a_time_where_there_is_no_room_for_more(tiny_flux):
    plans, watched = {}, {}
    for size in (2, 3):
        watch = Watch(tiny_flux)
        rivals = Rivals(tiny_flux, PROMPTS, [3, 4, 5], CALL, batch_size=size)
        plans[size], why = rivals.of(Schedule.at([0, 3]), 2)
        assert rivals.transformer_runs == watch.stop() and not why
        watched[size] = watch.largest
    assert watched == {2: 1, 3: 3} and plans[2] == plans[3]


def test_of_all_that_is_drawn_the_worst_pair_of_the_best_rows_is_kept(tiny_flux):
    checks = Checks(tiny_flux, PROMPTS, [3, 4, 5], CALL, pictures=True)
    assert {one.dtype for one in checks._known.pictures} == {np.dtype("uint8")}, "what is measured against"
    schedules = [Schedule.at([0, 5]), Schedule.at([0, 1, 2, 3, 4]), Schedule.at([0])]
    tried = [checks.run("reuse", Reuse(), schedule) for schedule in schedules]
    best = min(tried, key=lambda one: one.score("drift").mean)
    assert list(checks.worst) == [best] != [tried[0]]
    checks.forget()
    assert not checks.worst


def test_pictures_without_room_for_the_window_of_ssim_are_measured_by_psnr_alone():
    subject = ZOO["unconditional_ddpm"]()
    with subject.around():
        checks = Checks(subject.pipe, [subject.arguments], [0], {}, pictures=True)
        tried = checks.run("reuse", Reuse(), Schedule.every(2))
    (pair,) = checks.worst.values()
    assert pair[0].shape[0] < WINDOW and len(tried.psnr) == 1 and not tried.ssim


def test_the_page_has_the_table_of_today_and_disks_have_room(cost):
    printed = cost.tables()
    assert printed in (ROOT / "docs" / "calibrate.md").read_text(), "benchmarks/calibration_cost.py prints it anew"
    rows = [line.strip("| ").split("|") for line in printed.rpartition("\n\n")[2].splitlines()[2:]]
    assert len(rows) == 6 and all(0 < float(row[-1]) <= 300 for row in rows)
