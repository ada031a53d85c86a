import doctest
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lesa.rows import plan as plans
from lesa.rows.forecasters import Forecaster, Lagrange, PlannedRow, Reuse, Taylor
from lesa.rows.grid import stage_of
from lesa.rows.plan import Plan, compile
from lesa.rows.rivals import ABCache, FoCa, Hermite, MeanCache, Spectrum
from lesa.rows.row import Row
from lesa.rows.schedule import Schedule

LAW = settings(deadline=None, derandomize=True, max_examples=50)
BOUNDS = (0.91, 0.51)
GRID = torch.linspace(1, 0, 51, dtype=torch.float64)


class Staged(Forecaster):
    """Random rows in the shape of LESA's: an expert a stage, its own forecasts remembered, the newest weights used."""

    memory = 8

    def __repr__(self):
        return f"Staged({self.remembers_forecasts})"

    def __init__(self, remembers_forecasts: bool):
        self.remembers_forecasts = remembers_forecasts
        self.experts = torch.randn(3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) / 4

    def wants(self, grid, step):
        return (4, 8, 8)[stage_of(float(grid[step]), BOUNDS)]

    def row(self, grid, step, past):
        used = min(len(past), self.wants(grid, step))
        coefficients = torch.zeros(len(past), dtype=torch.float64)
        coefficients[len(past) - used :] = self.experts[stage_of(float(grid[step]), BOUNDS), 8 - used :]
        return Row(coefficients, torch.tensor(0.1 * float(grid[step]), dtype=torch.float64))


RIVALS = [Hermite(), Spectrum(), Spectrum(1e-3), ABCache(), ABCache(3, full_only=True), FoCa(), MeanCache()]
FORECASTERS = [Reuse(), *map(Taylor, range(4)), *map(Lagrange, range(3)), *RIVALS, Staged(True), Staged(False)]
SCHEDULES = [
    Schedule.paper(7),
    Schedule.every(5),
    Schedule.every(3, warmup=4),
    Schedule.ratio(6),
    Schedule.at([0, 3, 9, 16, 21, 28, 36, 42, 46, 48]),
    Schedule.every(1),
]
each_forecaster = pytest.mark.parametrize("forecaster", FORECASTERS, ids=str)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


def run(forecaster, grid, full, start, features):
    """Run step by step with lists of features: what a plan must be equal to."""
    history, felt = [], []
    for step in range(start, len(grid) - 1):
        if step in full:
            feature = features[step]
        else:
            held = history[-forecaster.memory :]
            coefficients, offset, _ = forecaster.row(grid, step, [past for past, _ in held])
            feature = sum(c * h for c, (_, h) in zip(coefficients, held, strict=True)) + offset
        if step in full or forecaster.remembers_forecasts:
            history.append((step, feature))
        felt.append(feature)
    return torch.stack(felt)


@each_forecaster
@each_schedule
@pytest.mark.parametrize("start", [0, 9])
def test_a_history_of_what_is_live_has_all_that_rows_use_and_no_more(forecaster, schedule, start):
    plan = compile(forecaster, GRID, schedule, start)
    live, apart = plan.live(), plan.live(differences=True)
    assert list(live) == list(apart) == list(range(start, 50))
    used = {step: {k for k, c in zip(row.past, row.coefficients, strict=True) if c} for step, row in plan.rows.items()}
    for step in live:
        later = set().union(*(past for s, past in used.items() if s > step))
        assert set(live[step]) == {k for k in later if k <= step}
        assert list(live[step]) == sorted(live[step])
        held = {k for k in range(start, step + 1) if k in live[k]}  # what is not live from the first is never held
        assert set(apart[step]) == {k for k in held if k >= min(live[step], default=50)}
        assert set(live.get(step - 1, ())) >= set(live[step]) - {step}, "nothing comes back"
        assert set(apart.get(step - 1, ())) >= set(apart[step]) - {step}
    assert live[49] == ()
    assert max(map(len, live.values())) <= forecaster.memory


def test_what_is_live_by_hand():
    rows = {2: (2.0, -1.0), 3: (1.0, 0.0), 5: (0.0, 0.0, 1.0), 6: (0.0, 0.0, 1.0)}
    pasts = {2: (0, 1), 3: (0, 1), 5: (0, 1, 4), 6: (0, 1, 4)}
    planned = {step: PlannedRow(pasts[step], row, 0.0) for step, row in rows.items()}
    plan = Plan(tuple(torch.linspace(1, 0, 9).tolist()), (0, 1, 4, 7), 0, 4, False, planned)
    assert plan.live() == {0: (0,), 1: (0, 1), 2: (0,), 3: (), 4: (4,), 5: (4,), 6: (), 7: ()}
    assert plan.live(differences=True) == {0: (0,), 1: (0, 1), 2: (0, 1), 3: (), 4: (4,), 5: (4,), 6: (), 7: ()}


@each_forecaster
@each_schedule
@pytest.mark.parametrize("start", [0, 9])
def test_the_unrolled_plan_is_the_run_step_by_step(forecaster, schedule, start):
    features = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    plan = compile(forecaster, GRID, schedule, start)
    unrolled = plan.unroll()
    skipped = [step for step in range(50) if step not in plan.full]
    assert unrolled.shape == (50, 51)
    assert not unrolled[:, skipped].any() and not unrolled[:start].any()
    got = unrolled[start:, :50] @ features + unrolled[start:, 50:]
    expected = run(forecaster, GRID, plan.full, start, features)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@LAW
@given(
    st.sampled_from(FORECASTERS),
    st.lists(st.floats(0.01, 0.99), min_size=3, max_size=20, unique_by=lambda t: round(t, 3)),
    st.data(),
)
def test_the_unrolled_plan_is_the_run_on_any_grid_and_schedule(forecaster, times, data):
    grid = torch.tensor([*sorted(times, reverse=True), 0.0], dtype=torch.float64)
    steps = len(times)
    full = sorted({0} | data.draw(st.sets(st.integers(0, steps - 1))))
    features = torch.randn(steps, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    plan = compile(forecaster, grid, Schedule.at(full))
    got = plan.unroll() @ torch.cat([features, torch.ones(1, 1, dtype=torch.float64)])
    scale = 1 + plan.unroll().abs().max().item()
    torch.testing.assert_close(got, run(forecaster, grid, full, 0, features), rtol=0, atol=1e-9 * scale)


@each_forecaster
@each_schedule
def test_json_gives_the_same_plan_back(forecaster, schedule):
    plan = compile(forecaster, GRID / 3, schedule)
    again = Plan.from_json(plan.to_json())
    assert again == plan and again.to_json() == plan.to_json()
    assert torch.equal(again.unroll(), plan.unroll()) and torch.equal(again.grid, GRID / 3)


@each_forecaster
def test_frozen_rows_compile_to_the_same_plan(forecaster):
    plan = compile(forecaster, GRID, SCHEDULES[0])
    frozen = compile(plan.freeze(), GRID, SCHEDULES[0])
    assert frozen.rows == plan.rows and torch.equal(frozen.unroll(), plan.unroll())
    with pytest.raises(ValueError, match="schedule"):
        compile(plan.freeze(), GRID, Schedule.every(4))


def test_what_the_history_holds():
    schedule = Schedule.at([0, 1, 4])
    grid = torch.linspace(1, 0, 8)
    held = {step: row.past for step, row in compile(Taylor(1), grid, schedule).rows.items()}
    assert held == {2: (0, 1), 3: (0, 1), 5: (1, 4), 6: (1, 4)}
    staged = Staged(True)
    staged.memory = 3
    held = {step: row.past for step, row in compile(staged, grid, schedule).rows.items()}
    assert held == {2: (0, 1), 3: (0, 1, 2), 5: (2, 3, 4), 6: (3, 4, 5)}
    held = {step: row.past for step, row in compile(Reuse(), grid, Schedule.at([0, 1, 4]), start=4).rows.items()}
    assert held == {5: (4,), 6: (4,)}


@pytest.mark.parametrize(("order", "gain"), [(1, 11), (2, 61), (3, 228)])
def test_the_noise_gain_of_the_first_gap(order, gain):
    plan = compile(Taylor(order), GRID, Schedule.every(6, warmup=4))
    assert plan.full[:5] == (0, 1, 2, 3, 9)
    assert round(plan.noise_gain()[8].item()) == gain


def test_the_noise_gain_is_one_at_full_steps_and_under_reuse():
    gain = compile(Reuse(), GRID, SCHEDULES[0], start=5).noise_gain()
    assert gain.tolist() == [0.0] * 5 + [1.0] * 45
    taylor = compile(Taylor(1), GRID, SCHEDULES[0])
    assert (taylor.noise_gain()[list(taylor.full)] == 1).all()
    assert taylor.noise_gain()[4] == 3  # 2 h3 - h2


@pytest.mark.parametrize(
    ("forecaster", "schedule", "short"),
    [
        (Staged(True), Schedule.paper(7), (5, 6, 7)),  # from step 5 on, below t = 0.91, 8 features are wanted
        (Staged(False), Schedule.at([0, 1, 2, 3, 10, 20, 30]), tuple(s for s in range(5, 50) if s not in (10, 20, 30))),
        (Taylor(2), Schedule.every(4), (1, 2, 3, 5, 6, 7)),
        (Taylor(2), Schedule.paper(7), ()),
        (Reuse(), Schedule.every(4), ()),
    ],
)
def test_short_histories_are_counted_and_strictly_refused(forecaster, schedule, short):
    plan = compile(forecaster, GRID, schedule)
    assert plan.truncated == short
    assert f"{len(short)} rows with a short history" in repr(plan)
    if short:
        with pytest.raises(ValueError, match=f"step {short[0]} is skipped"):
            compile(forecaster, GRID, schedule, strict=True)
    else:
        assert compile(forecaster, GRID, schedule, strict=True) == plan


def test_the_repr_shows_schedule_rows_and_gain():
    text = repr(compile(Taylor(1), GRID, Schedule.paper(7)))
    lines = text.splitlines()
    assert "50 steps, 10 full (step ratio 5.00), noise gain up to 11" in lines[0]
    assert lines[1] == Schedule.paper(7).draw(50)
    assert lines[2].split("(")[0].split() == ["4", "=", "+2", "h3", "-1", "h2"]
    assert len(lines) == 2 + 40


def test_a_long_row_is_shown_by_its_newest_terms():
    staged = Staged(True)
    staged.memory = 12
    staged.experts = torch.ones(3, 12, dtype=torch.float64)
    staged.wants = lambda grid, step: 8
    staged.row = lambda grid, step, past: Row(torch.ones(len(past)), torch.tensor(0.5))
    assert "+1 h19 +1 h18" in repr(compile(staged, GRID, Schedule.every(20)))
    assert "and 4 more +0.5" in repr(compile(staged, GRID, Schedule.every(20)))


class Broken(Reuse):
    def __init__(self, coefficients, offset=0.0):
        self.answer = Row(torch.tensor(coefficients), torch.tensor(offset))

    def row(self, grid, step, past):
        return self.answer


@pytest.mark.parametrize(
    ("forecaster", "message"),
    [
        (Broken([0.5, 0.5]), "got 2 for 1 at step 1"),
        (Broken([]), "got 0 for 1 at step 1"),
        (Broken([float("nan")]), "finite, got .*nan.* at step 1"),
        (Broken([1.0], float("inf")), "finite, got .*inf at step 1"),
    ],
)
def test_a_broken_row_is_an_error_before_the_run(forecaster, message):
    with pytest.raises(ValueError, match=message):
        compile(forecaster, GRID, Schedule.every(5))


def test_a_schedule_that_skips_the_first_step_is_an_error():
    with pytest.raises(ValueError, match="first step of a run is full"):
        compile(Reuse(), GRID, Schedule.at([1, 5]))


def test_an_all_full_schedule_has_no_rows():
    plan = compile(Taylor(3), GRID, Schedule.every(1), strict=True)
    assert plan.rows == {} and torch.equal(plan.unroll()[:, :50], torch.eye(50, dtype=torch.float64))


def _change(path, value):
    def change(data):
        *parents, last = path
        for name in parents:
            data = data[name]
        data[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        _change(["format"], "lesa-plan-0"),
        _change(["times", 3], 1.01),
        _change(["full", 0], 1),
        _change(["full", 4], 10),
        _change(["memory"], 3),
        _change(["remembers_forecasts"], True),
        _change(["start"], 1),
        _change(["extra"], 1),
        _change(["rows"], {}),
        _change(["rows", "4"], None),
        _change(["rows", "4", "past"], [1, 2]),
        _change(["rows", "4", "coefficients"], [1.0]),
        _change(["rows", "4", "coefficients", 0], "1"),
        _change(["rows", "4", "offset"], float("nan")),
        lambda data: data["rows"].pop("4"),
        lambda data: data.pop("times"),
    ],
)
def test_a_tampered_plan_is_an_error(change):
    data = json.loads(compile(Taylor(1), GRID, Schedule.paper(7)).to_json())
    Plan.from_json(json.dumps(data))
    change(data)
    with pytest.raises(ValueError, match="a plan is the JSON"):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "{}", '"plan"', None])
def test_other_text_is_no_plan(text):
    text = compile(Reuse(), GRID, Schedule.every(2)).to_json()[:-20] if text is None else text
    with pytest.raises(ValueError, match="a plan is the JSON"):
        Plan.from_json(text)


def test_examples():
    assert doctest.testmod(plans) == (0, 2)
