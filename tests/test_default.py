"""The default where nobody calibrated: its schedules, its rows, and what it is worth on fields that are known."""

import math
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lesa
from lesa.host import data
from lesa.learn.metrics import drift
from lesa.rows.default import DATA, FEW, Default, count_for, full_steps, gap
from lesa.rows.forecasters import Lagrange, Reuse
from lesa.rows.plan import compile

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
LAW = settings(deadline=None, derandomize=True, max_examples=60)
WALKS = st.lists(st.integers(0, 19), min_size=3, max_size=3, unique=True).map(sorted)


def grid_of(steps: int, shift: float = 3.0) -> torch.Tensor:
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * even / (1 + (shift - 1) * even)


# --- the schedule


@LAW
@given(length=st.integers(1, 120), start=st.integers(0, 30), shift=st.sampled_from([0.5, 1, 3, 7]))
def test_a_schedule_holds_the_first_and_the_last_steps_of_its_run(length, start, shift):
    grid = grid_of(start + length, shift)
    full = Default().schedule_for(grid, start).full_steps(len(grid) - 1, start)
    assert len(full) == count_for(length) and full[0] == start and full[-1] == len(grid) - 2
    ends = {start + 1, len(grid) - 3, len(grid) - 4} if length > 3 else set()
    assert ends <= set(full)


@LAW
@given(drawn=st.data(), length=st.integers(1, 120))
def test_a_budget_is_how_many_steps_are_full(drawn, length):
    budget = drawn.draw(st.integers(1, length))
    full = Default().schedule_for(grid_of(length), budget=budget).full_steps(length)
    assert len(full) == budget and full[0] == 0 and (budget == 1 or full[-1] == length - 1)


@LAW
@given(length=st.integers(FEW + 1, 200))
def test_on_an_even_grid_gaps_differ_by_one_step_at_most(length):
    full = full_steps(grid_of(length, 1.0), count_for(length))
    gaps = [after - before for before, after in pairwise(full[1:-2])]
    assert max(gaps) - min(gaps) <= 1


def test_where_little_time_passes_in_a_step_gaps_hold_more_steps():
    for shift in (3, 7):
        gaps = [after - before for before, after in pairwise(full_steps(grid_of(50, shift), 17)[1:-2])]
        assert gaps[0] > gaps[-1] and gaps[0] <= 5


@pytest.mark.parametrize(
    ("steps", "drawn"),
    [
        (1, "#"),
        (4, "####"),
        (7, "#######"),
        (8, "##.#.###"),
        (20, "##...#...#..#..#.###"),
        (50, "##....#....#...#....#...#..#...#..#..#..#..#.#.###"),
    ],
)
def test_schedules_of_usual_grids(steps, drawn):
    assert Default().schedule_for(grid_of(steps)).draw(steps) == drawn


def test_a_schedule_scales_with_the_grid():
    """Longer runs have more full steps, of a share that falls to a quarter."""
    counts = [count_for(length) for length in range(FEW + 1, 400)]
    assert counts == sorted(counts) and count_for(50) == 17 and count_for(399) / 399 < 0.27


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(times=grid_of(8), start=8), "begins at one of them, got start 8"),
        (dict(times=grid_of(8), start=-1), "begins at one of them, got start -1"),
        (dict(times=grid_of(8), budget=9), "1 to 8 are full, got a budget of 9"),
        (dict(times=grid_of(8), start=4, budget=5), "1 to 4 are full, got a budget of 5"),
        (dict(times=grid_of(8), budget=0), "got a budget of 0"),
        (dict(times=[0.0, 1.0]), "times fall"),
    ],
)
def test_a_schedule_for_no_such_run_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        Default().schedule_for(**arguments)


def test_a_grid_may_repeat_times_and_end_above_zero():
    """As those of Heun's method do."""
    heun = [1.0, 0.8, 0.8, 0.6, 0.6, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1, 0.05]
    plan = compile(Default(), heun, Default().schedule_for(heun))
    assert all(sum(row.coefficients) == pytest.approx(1) for row in plan.rows.values())


# --- the rows


@LAW
@given(walk=WALKS, shift=st.sampled_from([0.5, 1, 3, 7]))
def test_a_row_sums_to_one_and_is_no_noisier_than_a_line_as_far_ahead_as_its_steps_are_apart(walk, shift):
    *past, step = walk
    coefficients, offset, _ = Default().row(grid_of(20, shift), step, past)
    assert offset == 0 and coefficients.sum().item() == pytest.approx(1)
    assert coefficients.abs().sum() <= 3


@LAW
@given(walk=WALKS, shift=st.sampled_from([0.5, 1, 3, 7]))
def test_a_forecast_lies_between_reuse_and_the_line(walk, shift):
    *past, step = walk
    grid = grid_of(20, shift)
    reuse, ours, line = (one.row(grid, step, past).coefficients[-1] for one in (Reuse(), Default(), Lagrange(1)))
    assert reuse < ours < line


def test_a_constant_is_forecast_exactly_and_a_line_the_nearer_the_shorter_the_gap():
    errors = []
    for steps in (20, 200, 2000):
        grid = grid_of(steps, 1.0)
        coefficients = Default().row(grid, 12, [8, 10]).coefficients
        assert coefficients @ torch.ones(2, dtype=torch.float64) == pytest.approx(1)
        forecast, wanted = coefficients @ grid[[8, 10]], grid[12]
        errors.append(float((forecast - wanted).abs() / (grid[10] - wanted)))
    assert errors[0] == pytest.approx(1 - math.exp(-8 * gap(grid_of(20, 1.0), 10, 12)))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.01


@pytest.mark.parametrize(
    ("grid", "past"), [(grid_of(8), [0]), (torch.tensor([1, 0.5, 0.5, 0.2, 0.0]).double(), [1, 2])]
)
def test_with_one_time_in_its_past_it_is_reuse(grid, past):
    assert Default().row(grid, 3, past).coefficients.tolist() == [*[0.0] * (len(past) - 1), 1.0]


def test_the_data_prediction_is_reused_and_outputs_have_a_slope():
    forecaster = Default()
    assert isinstance(forecaster.for_stream(DATA), Reuse)
    assert forecaster.for_stream("cond") is forecaster.for_stream("uncond") is forecaster
    assert DATA == data.DATA


# --- what it is worth, where the velocity is known exactly


@pytest.fixture(scope="module")
def fields():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return import_module("default")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("name", ["spread 6", "spread 2", "spread 1, wide", "spread 0.3", "spread 6, guidance 3"])
@pytest.mark.parametrize(("steps", "shift"), [(50, 1.0), (50, 3.0), (28, 3.0), (20, 3.0)])
def test_it_is_above_fewer_steps_where_changes_are_early_and_where_they_are_late(fields, name, steps, shift):
    assert gained(fields, name, steps, shift) > 1


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_in_eight_steps_it_is_above_fewer_steps_on_the_mean_of_fields(fields, shift):
    names = [name for name in fields.FIELDS if "fine" not in name]
    assert fmean(gained(fields, name, 8, shift) for name in names) > 3


def gained(fields, name, steps, shift):
    """The drift that the default has less than as few full steps, in dB, on the mean of runs."""
    field, grid = fields.FIELDS[name], grid_of(steps, shift)
    plan = compile(Default(), grid, Default().schedule_for(grid))
    reference, _ = fields.walk(field, grid)
    ours, _ = fields.walk(field, grid, plan)
    fewer, _ = fields.walk(field, grid_of(len(plan.full), shift))
    return fmean(drift(few, at) - drift(own, at) for own, few, at in zip(ours, fewer, reference, strict=True))


def test_fields_change_early_or_late_as_they_are_said_to(fields):
    for name, early in (("spread 6", True), ("spread 0.3", False)):
        _, sizes = fields.walk(fields.FIELDS[name], grid_of(50, 1.0))
        changes = [abs(math.log(b / a)) for a, b in pairwise(sizes)]
        first, last = sum(changes[: len(changes) // 3]), sum(changes[-len(changes) // 3 :])
        assert (first > 2 * last) is early and (last > 2 * first) is not early


def test_a_pipeline_runs_on_it(tiny_flux, call):
    schedule = Default().schedule_for(grid_of(8))
    with lesa.accelerate(tiny_flux, Default(), schedule=schedule) as run:
        tiny_flux("a", **call)
    assert run.summary()[run.streams[0]].full_steps == 6
