"""Rows solved in closed form: the algebra, rounds against lockstep, any pipeline, and the predictor that holds them."""

import copy
import math
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from itertools import count, pairwise

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from zoo.pipelines import ZOO

from lesa.host.at_sampler import AtSampler
from lesa.host.choice import Chosen
from lesa.host.data import Known
from lesa.host.intercept import mark_of
from lesa.host.outside import OutsideRun
from lesa.host.runtime import accelerate
from lesa.learn.metrics import drift, psnr
from lesa.learn.references import References
from lesa.learn.refining import _left_out
from lesa.learn.rivals import Rivals, baked
from lesa.learn.searching import ending
from lesa.learn.solve import Solver, solve
from lesa.learn.solving import SHOWN
from lesa.predictors import Origin, Predictor
from lesa.predictors.solved import Solved
from lesa.rows.forecasters import Lagrange, PlannedRow, Reuse
from lesa.rows.gaps import Equations, Gaps, moves, spreads
from lesa.rows.plan import Plan, compile
from lesa.rows.row import Row, Storage
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

FULL = (0, 3, 5)
SCHEDULE = Schedule.at(FULL)
PROMPTS = ["small red apple on white, left", "large blue pear on grey, right"]
CALL = dict(height=32, width=32, num_inference_steps=8, max_sequence_length=16)
GRID = tuple(torch.linspace(1, 0, 9).tolist())


def origin(**changes) -> Origin:
    return replace(Origin("a model", "Linear", {}, Tap(), GRID, str(SCHEDULE), ("all",)), **changes)


def some_rows(seed: int = 0) -> torch.Tensor:
    """Rows over three full steps, and the first latents."""
    rows = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([rows[:, :3].tril(), rows[:, 3:]], 1)


def multistep(steps: int = 8) -> torch.Tensor:
    """The response of a sampler whose steps move by this output and the one before."""
    response = torch.zeros(steps + 1, steps, dtype=torch.float64)
    for s in range(steps):
        response[s + 1] = response[s]
        response[s + 1, s] -= 0.2
        response[s + 1, max(s - 1, 0)] += 0.05 * (s + 1) / steps
    return response


def last_latents(pipe, seed: int, predictor: Solved | None = None) -> torch.Tensor:
    call = dict(CALL, output_type="latent", generator=torch.Generator().manual_seed(seed))
    if predictor is None:
        return pipe(PROMPTS[0], **call).images
    with accelerate(pipe, predictor):
        return pipe(PROMPTS[0], **call).images


# --- the predictor


def test_a_new_predictor_reuses():
    plan = compile(Solved(origin()), GRID, SCHEDULE)
    reused = compile(Reuse(), GRID, SCHEDULE)
    assert torch.equal(plan.unroll(), reused.unroll())


def test_the_steps_of_a_gap_share_their_row_over_all_full_steps_so_far():
    predictor, rows = Solved(origin(), latents=True), some_rows().float().double()
    predictor.set_gaps(rows)
    plan = compile(predictor, GRID, SCHEDULE)
    assert [row.past for row in plan.rows.values()] == [(0,), (0,), (0, 3), FULL, FULL]
    for step, gap in {1: 0, 2: 0, 4: 1, 6: 2, 7: 2}.items():
        assert plan.rows[step].coefficients == tuple(rows[gap, : gap + 1].tolist())
        assert plan.rows[step].latents == rows[gap, -1] != 0
    assert torch.equal(predictor.gaps, rows)


def test_it_is_the_same_for_every_stream():
    predictor = Solved(origin())
    assert predictor.for_stream("uncond") is predictor.for_stream("call 2") is predictor


@pytest.mark.parametrize("latents", [False, True])
def test_it_is_saved_and_loaded_to_the_bit(tmp_path, latents):
    predictor = Solved(origin(), latents=latents)
    predictor.set_gaps(some_rows())
    predictor.save_pretrained(tmp_path)
    loaded = Predictor.from_pretrained(tmp_path)
    assert isinstance(loaded, Solved) and loaded.digest() == predictor.digest()
    assert torch.equal(loaded.gaps, predictor.gaps) and (loaded.latents is not None) == latents


def test_it_runs_on_times_that_repeat():
    times = (1.0, 0.8, 0.8, 0.5, 0.5, 0.2, 0.1)
    predictor = Solved(origin(grid=times, schedule="at:0,2"))
    assert predictor.schedule_for(times) == Schedule.at([0, 2])
    assert set(compile(predictor, times, predictor.schedule).rows) == {1, 3, 4, 5}


def test_another_schedule_grid_or_budget_is_refused():
    predictor = Solved(origin())
    with pytest.raises(ValueError, match="got step 2"):
        compile(predictor, GRID, Schedule.at([0, 1]))
    with pytest.raises(ValueError, match="8 steps"):
        predictor.schedule_for(torch.linspace(1, 0, 5))
    with pytest.raises(ValueError, match="a budget of 4"):
        predictor.schedule_for(GRID, 4)


# --- the algebra


def test_ways_are_the_plan_unrolled_through_the_sampler():
    predictor, response = Solved(origin(), latents=True), multistep()
    predictor.set_gaps(some_rows())
    plan = compile(predictor, GRID, SCHEDULE)
    latents = torch.tensor([plan.rows[step].latents if step in plan.rows else 0.0 for step in range(8)])
    unrolled = torch.cat([plan.unroll()[:, list(FULL)], latents.double()[:, None]], 1)
    expected = (response @ unrolled)[[3, 5, 8]]
    torch.testing.assert_close(Gaps(response, FULL).ways(predictor.gaps), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("begins", [(0,), (0, 3)])
@pytest.mark.parametrize("latents", [False, True])
def test_rows_are_recovered_from_the_latents_that_they_gave(monkeypatch, begins, latents):
    monkeypatch.setattr("lesa.rows.gaps.RIDGE", 1e-12)
    gaps, rows = Gaps(multistep(), FULL, begins, latents), some_rows()
    rows[:, -1] *= latents
    if len(begins) > 1:
        rows[1:, 0] = 0
    columns = torch.randn(4, 50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    equations = Equations(columns @ columns.T, (gaps.ways(rows) @ columns) @ columns.T)
    torch.testing.assert_close(gaps.solve_rows(equations), rows, atol=1e-8, rtol=0)


def test_a_large_ridge_leaves_reuse_and_so_does_a_full_step_that_nothing_is_skipped_before(monkeypatch):
    gram, target = torch.eye(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    reuse = torch.tensor([0.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    monkeypatch.setattr("lesa.rows.gaps.RIDGE", 1e12)
    held = Gaps(multistep(), FULL)
    torch.testing.assert_close(held.solve_row(held.reuse(), 2, gram, target), reuse, atol=1e-9, rtol=0)
    for gaps in (Gaps(multistep(), (0, 1, 2)), Gaps(multistep(), (0, 3, 4), latents=False)):
        row = gaps.reuse()[1]
        assert not gaps.steps(1) and torch.equal(gaps.solve_row(gaps.reuse(), 1, gram, target), row)


def test_full_steps_are_corrected_after_skipped_ones_where_the_next_is_full_or_there_is_none():
    gaps = Gaps(multistep(), (0, 1, 4, 5, 7))
    assert [list(gaps.steps(j)) for j in range(5)] == [[], [2, 3], [4], [6], [7]]
    assert [list(Gaps(multistep(), (0, 1, 4, 5, 7), latents=False).steps(j)) for j in (2, 4)] == [[], []]
    whole = Gaps(multistep(), range(8))
    assert not any(whole.steps(j) for j in range(8))


def test_what_has_to_be_full_is_full_in_every_schedule_of_a_search():
    begins = (0, 4)
    for full in spreads(9, 3, begins):
        assert {0, 4} <= set(full) and len(full) == 3
        assert all({0, 4} <= set(moved) for moved in moves(full, 9, begins))


# --- in closed loop


def test_a_part_of_the_first_latents_is_added_at_the_sampler(tiny_flux):
    """By hand: all steps but the first are skipped and move along v_0 + c x_0, in Euler's steps from sigma_1 to 0."""
    given, part = torch.randn_like(last_latents(tiny_flux, 3)), 0.25
    kind, ended = type(tiny_flux.transformer).__name__, {}
    solver = Solver(tiny_flux, PROMPTS[:1], [3], CALL)
    grid = tuple(solver.times.tolist())
    for c in (0.0, part):
        predictor = Solved(origin(schedule="at:0", transformer=kind, grid=grid), latents=True)
        predictor.set_gaps(torch.tensor([[1.0, c]]))
        with accelerate(tiny_flux, predictor, check=False) as run:
            ended[c] = tiny_flux(PROMPTS[0], latents=given, output_type="latent", **CALL).images
        assert run.plan().acts_at_sampler == bool(c)
    moved = -float(tiny_flux.scheduler.sigmas[1]) * part * given
    torch.testing.assert_close(ended[part] - ended[0.0], moved, atol=1e-5, rtol=0)


def test_the_last_full_step_is_corrected_at_the_sampler(tiny_flux):
    """By hand: Euler's last step goes along a v_0 + b v_7 + c x_0, where without a correction it goes along v_7."""
    solver, full = Solver(tiny_flux, PROMPTS, [3, 4], CALL), (0, 7)
    a, b, c = 0.5, 0.75, -0.25
    plain = solver.reuse(full)
    rows = plain.rows.clone()
    rows[1] = torch.tensor([a, b, c])
    corrected = solver.run_rows(full, rows, of="rounds")
    for before, after in zip(plain.recordings, corrected.recordings, strict=True):
        first, last = before.outputs(full).unbind(1)
        assert torch.equal(after.outputs(full), before.outputs(full)), "recorded is what the denoiser gave"
        move = a * first + (b - 1) * last + c * before.latents([0])[:, 0]
        moved = (after.final - before.final).double()
        torch.testing.assert_close(moved, solver.response[8, 7] * move, atol=1e-5, rtol=1e-5)


def test_corrections_are_of_the_plan_in_words_and_in_files():
    predictor = Solved(origin(schedule="at:0,3,6,7"), latents=True)
    rows = torch.eye(4, 5, dtype=torch.float64)
    rows[1, 0], rows[2, :3], rows[3, -1] = 0.5, torch.tensor([0.25, -0.5, 1.25]), 0.125
    predictor.set_gaps(rows)
    plan = compile(predictor, GRID, Schedule.at([0, 3, 6, 7]))
    assert set(plan.corrections) == {6, 7} and plan.corrections[6].past == (0, 3, 6)
    assert plan.corrections[6].coefficients == (0.25, -0.5, 1.25) and plan.corrections[7].latents == 0.125
    assert torch.equal(predictor.gaps, rows) and "corrected" in repr(plan).splitlines()[-1]
    assert plan.live(corrections=True)[3] == (0, 3) and plan.live(corrections=True)[6] == ()
    assert Plan.from_json(plan.to_json()) == plan
    assert compile(plan.freeze(), GRID, Schedule.at([0, 3, 6, 7])) == plan
    predictor.set_gaps(torch.eye(4, 5, dtype=torch.float64))
    assert not compile(predictor, GRID, Schedule.at([0, 3, 6, 7])).corrections, "its own output is no correction"


def corrected(schedule: str = "at:0,5,6,7", **changes) -> Solved:
    """Rows that correct the last two of four full steps."""
    predictor = Solved(origin(schedule=schedule, **changes), latents=True)
    rows = torch.eye(4, 5, dtype=torch.float64)
    rows[2, :3], rows[3, 0], rows[3, -1] = torch.tensor([0.25, -0.5, 1.25]), 0.5, 0.125
    predictor.set_gaps(rows)
    return predictor


@pytest.mark.parametrize("frozen", [False, True])
def test_after_another_past_nothing_is_corrected(frozen):
    """A stream that joins a run late has a plan of its own, and so has a schedule with full steps besides."""
    predictor = corrected()
    taken = compile(predictor, GRID, predictor.schedule).freeze() if frozen else predictor
    assert not compile(taken, GRID, Schedule.at([5, 6, 7]), start=5).corrections
    if not frozen:
        assert not compile(taken, GRID, Schedule.at([0, 4, 5, 6, 7])).corrections
    with pytest.raises(ValueError, match="8 steps"):
        compile(taken, torch.linspace(1, 0, 21), Schedule.every(1))


@pytest.mark.parametrize(
    ("schedule", "step", "latents"),
    [("at:0,5,7", 0, True), ("at:0,1,7", 1, True), ("at:0,5,7", 5, True), ("at:0,5,7", 7, False)],
)
def test_a_row_of_a_full_step_that_is_not_to_be_corrected_is_refused(schedule, step, latents):
    predictor = Solved(origin(schedule=schedule), latents=latents)
    with torch.no_grad():
        predictor.coefficients[step, 0] = 0.5
    with pytest.raises(ValueError, match=f"got a row for step {step} on"):
        compile(predictor, GRID, predictor.schedule)


def test_corrections_of_a_plan_that_are_wrong_are_refused():
    plan = compile(corrected(), GRID, Schedule.at([0, 5, 6, 7]))
    row = plan.corrections[6]
    for wrong, words in (
        ({1: row}, r"corrections of skipped steps \[1\]"),
        ({6: row._replace(past=(0, 5, 7))}, r"holds steps \[0, 5, 6\]"),
        ({6: row._replace(coefficients=(1.0,))}, "one coefficient for each past step"),
        ({6: row._replace(coefficients=(math.nan, 0.0, 1.0))}, "are finite"),
        ({6: row._replace(latents=math.inf)}, "are finite"),
    ):
        with pytest.raises(ValueError, match=words):
            replace(plan, corrections=wrong)


def test_a_correction_combines_no_forecasts():
    class Corrects(Reuse):
        memory, remembers_forecasts = 2, True

        def correction(self, grid, step, past):
            return Row(torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor(0.0)) if step == 7 else None

    assert compile(Corrects(), GRID, Schedule.at([0, 6, 7])).corrections[7].past == (6, 7)
    with pytest.raises(ValueError, match=r"step 7 that combines the skipped steps \[6\]"):
        compile(Corrects(), GRID, Schedule.at([0, 7]))


def test_what_a_correction_amplifies_is_said_of_its_row():
    plan = compile(corrected(), GRID, Schedule.at([0, 5, 6, 7]))
    assert [line.split("(gain ")[1] for line in repr(plan).splitlines()[-2:]] == ["2)  corrected", "1.5)  corrected"]
    assert plan.noise_gain()[6:].tolist() == [1.0, 1.0], "the streams' full steps are what they are"


def test_a_correction_has_its_offset_whatever_it_combines():
    outputs, latents = torch.full((1, 4), 2.0), torch.zeros(1, 4)
    plan = compile(corrected(), GRID, Schedule.at([0, 5, 6, 7]))
    for coefficients, expected in (((0.0, 0.0, 0.5), 1.25), ((0.5, 0.0, 0.5), 2.25)):
        changed = {6: PlannedRow((0, 5, 6), coefficients, 0.25)}
        one, at = replace(plan, corrections=changed), AtSampler(Storage())
        at.begin(latents)
        assert [at.handed(one, step, outputs, latents) is outputs for step in (0, 5)] == [True, True]
        assert torch.equal(at.handed(one, 6, outputs, latents), torch.full((1, 4), expected))


def test_what_is_held_at_the_sampler_is_counted(tiny_flux):
    predictor = Solver(tiny_flux, PROMPTS[:1], [3], CALL).predictor((0, 5, 6, 7), corrected().gaps)
    call = dict(CALL, output_type="latent", generator=torch.Generator().manual_seed(3))
    with accelerate(tiny_flux, predictor, check=False) as run:
        tiny_flux(PROMPTS[0], **call)
        found = run.summary()
    plan, latents = run.plan(), last_latents(tiny_flux, 3).nbytes
    outputs = max(map(len, plan.live(corrections=True).values()))
    assert found.bytes_at_sampler == latents + outputs * latents + latents, "the first, what is combined, and a scratch"
    assert found.bytes_held == found.bytes_at_sampler + sum(one.bytes_held for one in found.values())
    assert "\nsampler " in str(found)
    with accelerate(tiny_flux, Reuse(), schedule=SCHEDULE) as run:
        tiny_flux(PROMPTS[0], **call)
    assert run.summary().bytes_at_sampler == 0


def test_a_run_after_one_that_was_broken_off_is_as_if_there_had_been_none(tiny_flux):
    predictor = Solver(tiny_flux, PROMPTS[:1], [3], CALL).predictor((0, 5, 6, 7), corrected().gaps)
    wanted = last_latents(tiny_flux, 3, predictor)

    def stop(_pipe, step, _time, given):
        if step == 6:
            raise InterruptedError
        return given

    with accelerate(tiny_flux, predictor) as run:
        with pytest.raises(InterruptedError):
            tiny_flux(PROMPTS, **dict(CALL, callback_on_step_end=stop))
        drawn = tiny_flux(PROMPTS[0], **dict(CALL, output_type="latent", generator=torch.Generator().manual_seed(3)))
    assert torch.equal(drawn.images, wanted) and run.summary().bytes_at_sampler > 0


@pytest.mark.parametrize("known", [True, False])
def test_nothing_from_before_other_calls_came_corrects(known):
    """The first call of each step becomes another one at step 5; the second goes on.

    A predictor that knows of it combines what came since. The rows of one that does not would take the jump of what
    guidance makes of the calls for a miss of the forecasts.
    """
    full, begins = ((0, 3, 5, 6, 7), (0, 5)) if known else ((0, 1, 5, 6, 7), (0,))
    predictor = Solved(origin(schedule=str(Schedule.at(full)), training={"begins": begins}), latents=True)
    rows = torch.eye(5, 6, dtype=torch.float64)
    rows[3, 2:4], rows[4, 2], rows[4, 5] = torch.tensor([-0.5, 1.25]), 0.5, 0.125
    predictor.set_gaps(rows)
    run, kept = OutsideRun(GRID), {}
    chosen, latents = Chosen(predictor, lambda _times, _start: predictor.schedule), torch.full((1, 4), 8.0)
    for step in range(8):
        run.at(step)
        for kind in ("other" if step >= 5 else "one", "two"):
            if run.wants(["cond"], kind):
                run.keep([torch.full((1, 4), float(step + 1))])
            else:
                run.forecast()
        if step == 0:
            run.follow(chosen)
        output = torch.full((1, 4), float(step + 1))
        kept[step] = float(run.handed(output, latents)[0, 0])
    six, seven = (-0.5 * 6 + 1.25 * 7, 0.5 * 6 + 8 + 0.125 * 8) if known else (7.0, 8.0)
    assert (kept[5], kept[6], kept[7]) == (6.0, six, seven)
    found = run.summary()
    assert (found.at_sampler.corrected, found.at_sampler.uncorrected) == ((2, 0) if known else (0, 2))
    assert ("2 full steps were not corrected" in str(found)) != known and found.bytes_at_sampler > latents.nbytes


def test_where_no_output_gives_the_data_a_full_step_is_handed_on_as_it_is(monkeypatch):
    subject, at = ZOO["stable_diffusion_euler_ancestral_guided"](), Known.at
    with subject.around():
        solver = Solver(subject.pipe, [subject.arguments], [0])
        rows, ended = solver.gaps((0, 4, 5)).reuse(), {}
        for own in (1.0, 0.5):
            rows[2, 2] = own
            for turns in (True, False):
                zero = (lambda _known, tick: at(_known, tick)._replace(of_output=0.0)) if not turns else at
                monkeypatch.setattr(
                    Known, "at", lambda known, tick, zero=zero: (zero if tick == 5 else at)(known, tick)
                )
                with accelerate(subject.pipe, solver.predictor((0, 4, 5), rows)):
                    ended[own, turns] = torch.as_tensor(subject.call(0)[0])
    assert torch.equal(ended[0.5, False], ended[1.0, False]) and torch.equal(ended[1.0, False], ended[1.0, True])
    assert not torch.equal(ended[0.5, True], ended[1.0, True])


def test_corrections_make_up_for_what_skipped_steps_left(tiny_flux, monkeypatch):
    full = Schedule.at([0, 5, 6, 7])
    corrected, _ = solve(tiny_flux, PROMPTS, [3, 4], schedule=full, refine=0, **CALL)
    monkeypatch.setattr("lesa.rows.gaps.is_corrected", lambda *_about: False)
    plain, _ = solve(tiny_flux, PROMPTS, [3, 4], schedule=full, refine=0, **CALL)
    assert corrected.origin.training["drift"] < plain.origin.training["drift"] - 1


def test_where_nothing_is_skipped_nothing_is_corrected(tiny_flux):
    solver = Solver(tiny_flux, PROMPTS[:1], [3], CALL)
    predictor = solver.solve(8).predictor
    with accelerate(tiny_flux, predictor, check=False) as run:
        drawn = tiny_flux(PROMPTS[0], **dict(CALL, output_type="latent", generator=torch.Generator().manual_seed(3)))
    assert not run.plan().acts_at_sampler and torch.equal(drawn.images, last_latents(tiny_flux, 3))


@pytest.mark.parametrize("storage", ["model", "int8", "cpu"])
def test_outputs_that_are_combined_again_are_stored_as_histories_are(tiny_flux, storage):
    solver = Solver(tiny_flux, PROMPTS, [3, 4], CALL)
    predictor = solver.solve(schedule=Schedule.at([0, 5, 6, 7]), refine=0).predictor
    with accelerate(tiny_flux, predictor, history=storage):
        found = solver.run(of="measures")[0]
    plain = solver.run(predictor, of="measures")[0]
    assert max(solver.drifts(found)) == pytest.approx(max(solver.drifts(plain)), abs=1.0 if storage == "int8" else 1e-3)


def test_a_part_of_the_first_latents_needs_a_sampler(tiny_flux):
    predictor = Solved(origin(transformer=type(tiny_flux.transformer).__name__), latents=True)
    predictor.set_gaps(some_rows())
    with accelerate(tiny_flux.transformer, predictor, grid=GRID) as run:
        run.at(0)
        with pytest.raises(ValueError, match="act at a pipeline's sampler"):
            tiny_flux.transformer()


@pytest.mark.parametrize("schedule", [SCHEDULE, Schedule.at([0, 4, 6, 7])])
@pytest.mark.parametrize("unipc", [False, True])
def test_rounds_one_call_at_a_time_end_where_lockstep_ends(tiny_flux, unipc, schedule):
    pipe = copy.copy(tiny_flux)
    if unipc:
        config = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        pipe.scheduler = UniPCMultistepScheduler(**config)
    together, first = solve(pipe, PROMPTS, [3, 4], schedule=schedule, refine=0, **CALL)
    apart, second = solve(pipe, PROMPTS, [3, 4], schedule=schedule, refine=0, batch_size=1, **CALL)
    assert len(first.rounds) == 1, "what lockstep finds is what a round would find"
    assert 2 <= len(second.rounds) <= len(schedule.full_steps(8)) + 1
    gained = together.origin.training["drift"] - apart.origin.training["drift"]
    assert -0.05 < gained < 0.15, "rounds solve on what steps really gave: as good, or a little better"


def test_the_drift_reported_is_that_of_real_runs_and_below_that_of_reuse(tiny_flux):
    predictor, report = solve(tiny_flux, PROMPTS[:1], [3], schedule=SCHEDULE, **CALL)
    reference = last_latents(tiny_flux, 3)
    found = drift(last_latents(tiny_flux, 3, predictor), reference)
    assert found == pytest.approx(predictor.origin.training["drift"], abs=0.01)
    assert found < drift(last_latents(tiny_flux, 3, Solved(predictor.origin)), reference) - 3
    assert found == pytest.approx(min(report.rounds + report.refined), abs=0.01)


def test_transformer_runs_are_counted(tiny_flux):
    done: list[int] = []
    solver = Solver(tiny_flux, PROMPTS, [3, 4], CALL, batch_size=1, on_run=done.append)
    assert done == [1, 2] and solver.counts.total == solver.counts.reference == 2 * 8
    _, report = solver.solve(schedule=SCHEDULE, refine=0)
    assert report.reference_runs == 2 * 8
    assert report.counts.rounds == (len(report.rounds) + 1) * 2 * len(FULL), "one of them reuse"
    assert report.transformer_runs == report.counts.rounds + 2 * 8 == solver.counts.total
    assert done == list(range(1, 2 * (len(report.rounds) + 2) + 1))
    assert solver.measure(Reuse(), SCHEDULE).transformer_runs == solver.counts.measures == 2 * len(FULL)


def test_refining_takes_only_what_real_runs_confirm(tiny_flux):
    _, report = solve(tiny_flux, PROMPTS, [3, 4], schedule=Schedule.at([0, 4]), refine=3, **CALL)
    falling = [min(report.rounds), *report.refined]
    assert all(b < a for a, b in pairwise(falling)) and len(falling) > 1


def test_a_schedule_searched_by_real_runs_is_no_worse_than_the_one_that_algebra_began_with(tiny_flux):
    predictor, report = solve(tiny_flux, PROMPTS, [3, 4], budget=3, refine=0, most=30, **CALL)
    (_, planned), (full, found) = report.searched
    assert predictor.full == full and len(full) == 3 and full[0] == 0
    assert found <= planned and 1 < report.tried <= 30
    assert predictor.origin.training["drift"] == pytest.approx(found, abs=0.1)


def test_schedules_are_chosen_by_what_they_draw_too_where_there_are_pictures(tiny_flux):
    solver = Solver(tiny_flux, PROMPTS, [3, 4], CALL, pictures=True)
    solver.solve(3, refine=0, most=12)
    assert 1 < len(solver._search.known) <= 12
    assert {full[-1] for full in solver._search.known} > {7}, "runs that end on a full step, and others"
    for full, score in list(solver._search.known.items())[:3]:
        found = solver.lockstep(full, "search")
        measured = solver.measure(solver.predictor(full, found.rows))
        pairs = zip(measured.pictures, solver.pictures, strict=True)
        seen = sum(psnr(np.asarray(one), other) for one, other in pairs) / 2
        assert score == pytest.approx((1 - SHOWN) * measured.drift - SHOWN * seen, abs=0.02)
    assert solver.run_rows(full, found.rows, of="search").score == pytest.approx(measured.drift, abs=0.02)


@pytest.mark.parametrize(
    ("full", "begins", "expected"),
    [
        ((0, 3, 7), (0,), (0, 3, 6)),
        ((0, 5, 6, 7), (0,), (0, 4, 5, 6)),
        ((0, 3, 5), (0,), (0, 3, 7)),
        ((0, 6, 7), (0, 6), (0, 5, 6)),
        ((0, 5, 7), (0, 7), None),
        ((0,), (0,), None),
        (tuple(range(8)), (0,), None),
    ],
)
def test_a_schedule_that_ends_the_other_way_is_near(full, begins, expected):
    assert ending(full, 8, begins, full[-1] != 7) == expected


def test_a_step_that_gains_on_its_own_calls_alone_is_known_as_such():
    """Derivatives of all calls are alike; what they have in common is gained, what each has alone is not."""
    gram = torch.eye(3, dtype=torch.float64).expand(4, 3, 3)
    shared = torch.tensor([0.6, 0.0, 0.0], dtype=torch.float64).expand(4, 3)
    alone = 0.6 * torch.tensor([[1, 1, 0], [-1, 1, 0], [1, -1, 0], [-1, -1, 0]], dtype=torch.float64)
    assert _left_out(gram, shared, 1e-4) == pytest.approx(math.log(1 - 0.6**2), abs=1e-3)
    assert _left_out(gram, alone, 1e-4) == pytest.approx(math.log(1 + 0.72 * (2 / 3 + 1 / 9)), abs=1e-3)
    assert 0 < _left_out(gram, alone, 10.0) < _left_out(gram, alone, 1e-4), "damped, less of it is lost"
    assert _left_out(gram[:1], alone[:1], 1e-4) < 0, "one call has no other"


def test_of_calls_that_draw_several_pictures_each_the_first_calls_have_all_of_theirs(tiny_flux):
    solver = Solver(tiny_flux, PROMPTS, [3, 4], dict(CALL, num_images_per_prompt=2), batch_size=2, pictures=True)
    first = solver.first(1)
    assert len(solver.pictures) == 4 and len(first.pictures) == 2
    assert first.run_rows((0, 3), first.gaps((0, 3)).reuse(), of="search", draw=True).psnr > 10


def test_of_a_call_that_wants_a_tuple_pictures_are_seen_too(tiny_flux):
    solver = Solver(tiny_flux, PROMPTS[:1], [3], dict(CALL, return_dict=False), pictures=True)
    assert len(solver.pictures) == 1


def test_a_curve_begins_each_search_near_the_schedule_before(tiny_flux):
    solver = Solver(tiny_flux, PROMPTS, [3, 4], CALL)
    found = list(solver.curve([2, 4, 3], refine=0, most=10))
    assert [len(one.predictor.full) for one in found] == [4, 3, 2]
    for one in found:
        assert solver.measure(one.predictor).drift == pytest.approx(one.report.drift, abs=0.01)
    known = solver._starts(3, [found[0].predictor])
    assert {frozenset(full) for full in known} == {
        frozenset(found[0].predictor.full) - {k} for k in found[0].predictor.full[1:]
    }


def test_other_forecasters_are_measured_on_the_same_calls_and_pictures_are_kept_if_asked_for(tiny_flux):
    known = References(tiny_flux, PROMPTS, [3, 4], CALL, pictures=True)
    found = known.measure(Reuse(), SCHEDULE)
    assert len(known.pictures) == len(found.pictures) == len(found.drifts) == 2
    assert known.pictures[0].shape == (32, 32, 3) and (known.pictures[0] != np.asarray(found.pictures[0])).any()
    with accelerate(tiny_flux, Reuse(), schedule=SCHEDULE):
        ended = last_latents(tiny_flux, 3)
    assert found.drifts[0] == pytest.approx(drift(ended, last_latents(tiny_flux, 3)), abs=0.01)
    assert known.drift_of(Reuse(), Schedule.every(1)) == pytest.approx([-120.0] * 2), "every step is full"
    assert not any(run.velocities for run in known.reference), "to measure, the last latents are enough"


def test_runs_that_no_scheduler_stepped_are_not_measured(tiny_flux, monkeypatch):
    """Nor is a call of the denoiser after a run's end, be it after times that were set anew."""
    call, known = type(tiny_flux).__call__, References(tiny_flux, PROMPTS[:1], [3], CALL)
    given = {}

    def heard(_module, _args, kwargs):
        given.update(kwargs)

    def probe(pipe, *_args, **_kwargs):
        pipe.scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=0.5)
        pipe.transformer(**given)

    def probed(pipe, *args, **kwargs):
        call(pipe, *args, **kwargs)
        probe(pipe)

    with tiny_flux.transformer.register_forward_pre_hook(heard, with_kwargs=True):
        monkeypatch.setattr(type(tiny_flux), "__call__", wraps(call)(probed))
        (run,) = References(tiny_flux, PROMPTS[:1], [3], CALL).reference
    assert run.ticks == 8 and torch.equal(run.final, known.reference[0].final)
    monkeypatch.setattr(type(tiny_flux), "__call__", wraps(call)(probe))
    with pytest.raises(ValueError, match="got a FluxPipeline that did not step one"):
        References(tiny_flux, PROMPTS[:1], [3], CALL)


def test_any_sampler_is_measured_one_that_adds_noise_too():
    subject = ZOO["stable_diffusion_euler_ancestral_guided"]()
    with subject.around():
        known = References(subject.pipe, [subject.arguments], [0])
        assert known.measure(Reuse(), Schedule.every(2)).drift < 0


ANY = [
    "flux_guided",
    "wan21_guided",
    "sdxl_heun_guided",
    "stable_diffusion_kdpm2_guided",
    "wan22_guided",
    "flux_img2img_guided",
    "wan_v2v_guided",
]


@pytest.mark.parametrize("name", ANY)
def test_any_pipeline_is_solved(name):
    """Batched, named and unnamed guidance, evaluations twice a step, a second denoiser, runs that begin in mid-grid."""
    subject = ZOO[name]()
    with subject.around():
        reference = torch.as_tensor(subject.call(0)[0])
        solver = Solver(subject.pipe, [subject.arguments], [0])
        budget = len(solver.begins) + 2
        predictor, report = solver.solve(budget, refine=0, rounds=3, most=6)
        assert len(predictor.full) == budget and predictor.full[0] == solver.start
        found = {}
        for one in (predictor, Solved(predictor.origin)):
            with accelerate(subject.pipe, one):
                found[one] = drift(torch.as_tensor(subject.call(0)[0]), reference)
    ours, reuse = found.values()
    assert ours <= reuse + 0.01 and reuse == pytest.approx(report.reuse, abs=0.01)
    assert report.rounds and mark_of(subject.pipe.scheduler) is None


@pytest.mark.parametrize("name", [*ANY, "cogvideox_v2v_guided", "latent_consistency"])
def test_what_is_solved_as_a_run_comes_to_it_is_what_the_run_goes_on_with(name):
    """Also where a run is planned anew as its first step tells where it begins, or what its outputs say of the data."""
    subject = ZOO[name]()
    with subject.around():
        solver = Solver(subject.pipe, [subject.arguments], [0])
        full = tuple(sorted({*solver.begins, solver.ticks - 2, solver.ticks - 1}))
        found = solver.lockstep(full, "rounds")
        assert solver.run_rows(full, found.rows, of="rounds").drift == pytest.approx(found.drift, abs=0.01)


@pytest.mark.parametrize("name", ["flux_img2img_guided", "wan_v2v_guided"])
def test_rows_of_runs_from_mid_grid_are_for_no_other_runs(name):
    """Whether the sampler knows where it begins, or only its first step tells."""
    subject = ZOO[name]()
    with subject.around():
        solver = Solver(subject.pipe, [subject.arguments], [0])
        predictor, _ = solver.solve(2, refine=0, most=1)
        with (
            accelerate(subject.pipe, predictor),
            pytest.raises(ValueError, match=rf"from step {solver.start} on.*begins at step 0"),
        ):
            subject.pipe(**{**subject.arguments, "strength": 1.0}, generator=torch.Generator().manual_seed(0))


# --- rows without training, as they are kept


@pytest.mark.parametrize("name", ["wan22_guided", "stable_diffusion_euler_ancestral_guided"])
def test_rows_without_training_are_kept_as_they_run(name):
    """Of a second denoiser, histories begin with its own first step."""
    subject = ZOO[name]()
    with subject.around():
        solver = Solver(subject.pipe, [subject.arguments], [0])
        full = tuple(sorted({*solver.begins, 1, 4}))
        same = solver.predictor(full, solver.gaps(full).reuse())
        for forecaster in (Lagrange(1), Lagrange(2)):
            kept = baked(forecaster, same.origin, same.of)
            (ran,) = solver.drift_of(forecaster, same.schedule)
            assert solver.drift_of(kept) == pytest.approx([ran], abs=0.01)


def test_rows_without_training_have_so_many_full_steps_where_guidance_begins_and_ends():
    subject = ZOO["modular_qwen_interval_guided"]()
    with subject.around():
        solver = Solver(subject.pipe, [subject.arguments], [0])
        assert solver.begins == (0, 1, 4)
        given = Schedule.at([0, 1, 3, 4])
        rivals, why = Rivals(subject.pipe, [subject.arguments], [0], {}).of(given, 4, solver.begins)
    assert not why and any(one.schedule != given for one in rivals)
    for one in rivals:
        full = one.schedule.full_steps(solver.steps)
        assert {0, 1, 4} <= set(full) and len(full) == 4


@pytest.mark.parametrize("name", ["wan22_guided", "stable_diffusion_euler_ancestral_guided", "sdxl_heun_guided"])
def test_a_plan_that_is_frozen_runs_as_it_did(name):
    """With histories that begin anew, on times that repeat or end a little above 0, and with the first latents."""
    subject = ZOO[name]()
    with subject.around():
        solver = Solver(subject.pipe, [subject.arguments], [0])
        full = tuple(sorted({*solver.begins, 4, solver.ticks - 1}))
        rows = solver.gaps(full).reuse()
        rows[:, -1] = 0.1
        rows[-1, -3:-1] = torch.tensor([0.5, 0.75])  # corrects the last step
        predictor = solver.predictor(full, rows)
        with accelerate(subject.pipe, predictor) as run:
            wanted = torch.as_tensor(subject.call(0)[0])
        plan = Plan.from_json(run.plans[0].to_json())
        assert plan.acts_at_sampler and plan == run.plans[0]
        with accelerate(subject.pipe, plan.freeze(), schedule=predictor.schedule, check=False):
            assert torch.equal(torch.as_tensor(subject.call(0)[0]), wanted)


# --- runs that overflow


@contextmanager
def overflows(transformer, every: int):
    """Let one in so many calls of a transformer give numbers that are not finite."""
    calls = count(1)
    undo = transformer.register_forward_hook(
        lambda _transformer, _given, output: tuple(x / (next(calls) % every > 0) for x in output)
    )
    try:
        yield
    finally:
        undo.remove()


@pytest.mark.parametrize(("size", "schedule"), [(2, None), (1, SCHEDULE)])
def test_runs_that_overflow_are_passed_over(tiny_flux, size, schedule):
    """As those of a search may in float16: what is found is of the other runs."""
    solver = Solver(tiny_flux, PROMPTS, [3, 4], CALL, batch_size=size)
    with overflows(tiny_flux.transformer, 7):
        predictor, report = solver.solve(None if schedule else 3, schedule, most=2, rounds=4, refine=1)
    assert report.rounds and report.drift < -20
    assert predictor.coefficients.isfinite().all()
    assert solver.measure(predictor).drift == pytest.approx(report.drift, abs=0.01)


def test_references_that_overflow_are_refused(tiny_flux):
    with overflows(tiny_flux.transformer, 5), pytest.raises(ValueError, match="end in finite numbers"):
        Solver(tiny_flux, PROMPTS, [3, 4], CALL)


def test_what_differs_from_run_to_run_is_named():
    subject = ZOO["helios_pyramid_guided"]()
    with subject.around(), pytest.raises(ValueError, match="got runs at different times"):
        Solver(subject.pipe, [subject.arguments], [0])


# --- what is refused


@pytest.mark.parametrize("options", [{}, dict(budget=3, schedule=SCHEDULE)])
def test_a_budget_or_a_schedule_is_needed(tiny_flux, options):
    with pytest.raises(ValueError, match="pass one of them"):
        solve(tiny_flux, PROMPTS, [3, 4], **options, **CALL)


def test_calls_and_seeds_pair_up(tiny_flux):
    with pytest.raises(ValueError, match="2 calls and 1 seeds"):
        solve(tiny_flux, PROMPTS, [3], budget=3, **CALL)


def test_an_accelerated_pipeline_makes_no_reference_runs(tiny_flux):
    done: list[int] = []
    with accelerate(tiny_flux, Reuse(), schedule=SCHEDULE), pytest.raises(ValueError, match="accelerated once"):
        References(tiny_flux, PROMPTS, [3, 4], CALL, on_run=done.append)
    assert not done


def test_a_budget_beyond_the_run_is_refused(tiny_flux):
    with pytest.raises(ValueError, match="from 1 to 8"):
        solve(tiny_flux, PROMPTS[:1], [3], budget=9, **CALL)


def test_a_schedule_without_a_step_at_which_streams_change_is_refused():
    """To solve for, and to begin a search near."""
    subject = ZOO["wan22_guided"]()
    with subject.around():
        solver = Solver(subject.pipe, [subject.arguments], [0])
    with pytest.raises(ValueError, match="add 2 to them"):
        solver.solve(schedule=Schedule.at([0, 3, 4]))
    with pytest.raises(ValueError, match="add 2 to them"):
        solver.solve(budget=3, near=[Schedule.at([0, 1, 3])])
    with pytest.raises(ValueError, match="from 2 to 6"):
        solver.solve(budget=1)


NOISY = ["stable_diffusion_euler_ancestral_guided", "stable_audio3_stochastic", "stable_audio_guided"]


@pytest.mark.parametrize("name", NOISY)
def test_rows_of_the_data_are_solved_where_a_sampler_adds_noise(tmp_path, name):
    """Outputs jump with the noise; what is kept on disk runs as it was measured."""
    subject = ZOO[name]()
    with subject.around():
        reference = torch.as_tensor(subject.call(0)[0])
        solver = Solver(subject.pipe, [subject.arguments], [0])
        schedule = Schedule.at([0, 2, 4])
        solution = solver.solve(schedule=schedule, refine=0)
        assert solution.predictor.of == "data" and len(solution.report.rounds) == 1, "lockstep found what a round would"
        solution.predictor.save_pretrained(tmp_path)
        drifts = {}
        for one in (Predictor.from_pretrained(tmp_path), Solved(solution.predictor.origin, of="data")):
            with accelerate(subject.pipe, one) as run:
                drifts[one] = drift(torch.as_tensor(subject.call(0)[0]), reference)
            assert run.forecasts_data and "as the predictor's rows do" in str(run.summary())
        with accelerate(subject.pipe, Reuse(), schedule=schedule):
            reused = drift(torch.as_tensor(subject.call(0)[0]), reference)
    ours, reuse = drifts.values()
    assert ours == pytest.approx(solution.report.drift, abs=0.01) and reuse == pytest.approx(reused, abs=0.01)
    assert ours < reuse - 0.1


def test_where_rows_of_the_data_do_not_fit_a_run_it_falls_back(monkeypatch):
    """To a run of other steps, and under a sampler that does not say what outputs say of the data."""
    subject = ZOO["stable_diffusion_euler_ancestral_guided"]()

    def unknown(*_args, **_kwargs):
        raise ValueError("noise levels are not known")

    def draw(steps: int) -> torch.Tensor:
        call = {**subject.arguments, "num_inference_steps": steps}
        return torch.as_tensor(subject.pipe(**call, generator=torch.Generator().manual_seed(0))[0])

    with subject.around():
        solver = Solver(subject.pipe, [subject.arguments], [0])
        predictor = solver.predictor((0, 3, 5), solver.gaps((0, 3, 5)).reuse())
        wanted = draw(5)
        with accelerate(subject.pipe, predictor, fallback="full") as run:
            fitting = draw(6)
            assert torch.equal(draw(5), wanted) and run.summary().fallbacks == 1
            monkeypatch.setattr("lesa.host.data._known", {})
            monkeypatch.setattr("lesa.rows.levels.of", unknown)
            assert not torch.equal(draw(6), fitting) and run.summary().fallbacks == 2


def test_rows_of_the_data_are_for_no_other_forecast(tiny_flux):
    predictor = Solved(origin(transformer=type(tiny_flux.transformer).__name__), of="data")
    with pytest.raises(ValueError, match="leave of= out"):
        accelerate(tiny_flux, predictor, of="output")
    with pytest.raises(ValueError, match="which has no sampler"):
        accelerate(tiny_flux.transformer, predictor, grid=GRID)


def test_nothing_is_left_attached_where_a_run_fails(tiny_flux):
    with pytest.raises(TypeError):
        solve(tiny_flux, PROMPTS[:1], [3], schedule=SCHEDULE, **{**CALL, "height": "tall"})
    assert mark_of(tiny_flux) is None and mark_of(tiny_flux.transformer) is None
    assert math.isfinite(float(last_latents(tiny_flux, 3).sum()))
