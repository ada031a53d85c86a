"""Planning predicts the drift of real runs by algebra, and finds the full steps that make it small."""

from itertools import combinations

import pytest
import torch
from test_training import BOTH, CHANNELS, OUT, STEPS, TOKENS, WEIGHTS, World, bending, head, origin

from lesa.host.runtime import accelerate
from lesa.host.tap import tap_of
from lesa.learn.collect import record
from lesa.learn.planning import CAUTIONS, Planner, detours, disturbance, freshly, responses, spread
from lesa.learn.training import Problem, Runs, drift, response
from lesa.learn.trajectory import draw_tokens
from lesa.predictors import L2P
from lesa.rows.forecasters import Lagrange, LinearRows, PlannedRow, Reuse, Taylor
from lesa.rows.guidance import Guidance
from lesa.rows.plan import compile, histories
from lesa.rows.rivals import ABCache, FoCa, Hermite, MeanCache, Spectrum
from lesa.rows.row import Row
from lesa.rows.schedule import Schedule

ANSWER = 0.8
BACK = torch.linalg.pinv(WEIGHTS / 2)  # from outputs to features


def answering(seed, step, latents):
    """Outputs are those of `bending` and ANSWER times the latents: the transformer takes drifts back."""
    return bending(seed, step, latents) + ANSWER * latents @ BACK


class Forecast:
    """Stands for a predictor in a `World`: a forecaster, or one for each stream, with its schedule."""

    def __init__(self, forecaster, schedule):
        self.forecaster, self.schedule = forecaster, schedule

    def for_stream(self, name):
        return self.forecaster[name] if isinstance(self.forecaster, dict) else self.forecaster


def plain_world(feature, guidance: Guidance | None = None) -> World:
    world = World(feature, guidance)
    world.conditioning = torch.ones(STEPS, CHANNELS)
    return world


@pytest.fixture(scope="module")
def reference():
    return plain_world(answering).runs(range(6))


@pytest.fixture(scope="module")
def planner(reference):
    disturbed = plain_world(answering).runs(range(6), Forecast(Reuse(), disturbance(STEPS)))
    return Planner(reference, head, responses(disturbed, reference), size=2048)


SCHEDULES = [(0, 4, 8, 12), (0, 2, 9, 13, 15), (0, 7, 8), (0, 1, 2, 3, 14)]


PLAIN = [Reuse(), Taylor(1), Taylor(2), Lagrange(1), Lagrange(2), Lagrange(3)]
RIVALS = [Hermite(), Spectrum(), Spectrum(1e-3), ABCache(), ABCache(full_only=True), FoCa(), MeanCache()]


@pytest.mark.parametrize("full", SCHEDULES)
@pytest.mark.parametrize("forecaster", [*PLAIN, *RIVALS], ids=repr)
def test_the_drift_of_real_runs_is_known_before_them(forecaster, full, planner, reference):
    real = drift(plain_world(answering).runs(range(6), Forecast(forecaster, Schedule.at(full))), reference)
    assert planner.drift(forecaster, full) == pytest.approx(real, abs=0.3)


TURN = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


def turning(seed, step, latents):
    """No one number says how outputs answer to the latents."""
    return bending(seed, step, latents) + 3 * latents @ TURN @ BACK


def test_caution_counts_what_full_steps_answer_across_a_drift():
    world = plain_world(turning)
    reference = world.runs(range(6))
    disturbed = world.runs(range(6), Forecast(Reuse(), disturbance(STEPS)))
    answers = responses(disturbed, reference)
    assert 2 < float(answers.across[disturbed[0].full[1]]) < 3
    wary, missed = Planner(reference, head, answers, size=2048), {0.0: 0.0, 1.0: 0.0}
    for full in SCHEDULES:
        real = drift(world.runs(range(6), Forecast(Lagrange(2), Schedule.at(full))), reference)
        for caution in missed:
            missed[caution] += abs(wary.drift(Lagrange(2), full, caution) - real)
    assert missed[1.0] < missed[0.0]


def test_what_a_search_promises_real_runs_keep():
    """It took schedules whose errors seem to cancel, where part of the answers that cancel them goes elsewhere."""

    def partly(seed, step, latents):
        return answering(seed, step, latents) + 0.5 * latents @ TURN @ BACK

    world = plain_world(partly)
    reference = world.runs(range(6))
    again = [world.runs(range(6), Forecast(Reuse(), shape(STEPS))) for shape in (disturbance, spread)]
    planner = Planner(reference, head, freshly(responses(again[0], reference), again[1], reference))
    for forecaster, budget in [(Reuse(), 6), (Lagrange(1), 5), (Lagrange(2), 5), (Lagrange(2), 6)]:
        found = planner.search(forecaster, budget)
        real = drift(world.runs(range(6), Forecast(forecaster, found)), reference)
        assert planner.drift(forecaster, found.full_steps(STEPS)) == pytest.approx(real, abs=2.0)


def test_real_runs_choose_among_plans_of_more_and_more_caution(planner, reference):
    """What a real run loses to caution, or without it, is made up here; the planner believes it."""
    across = planner._responses._replace(across=torch.full((STEPS,), 2.0))
    searched = {caution: planner_of(reference, across).search(Lagrange(2), 5, caution=caution) for caution in CAUTIONS}
    assert len(set(searched.values())) > 1
    runs = []

    def run(forecaster, schedule):
        runs.append(schedule)
        return -30.0 + abs(len(runs) - 3)  # best is the second one with caution

    ours, forecaster = planner_of(reference, across, run), Lagrange(2)
    found = ours.plan(forecaster, 5)
    assert len(runs) == 4 and found == runs[2] and ours.real(forecaster, found) == -30.0
    with pytest.raises(ValueError, match="knows recorded runs alone"):
        planner.plan(Lagrange(2), 5)


def test_the_plan_without_caution_is_among_those_that_are_run(planner, reference):
    """It was not tried, so that a worse one was returned where caution does harm."""
    across = planner._responses._replace(across=torch.full((STEPS,), 20.0))
    bold = planner_of(reference, across).search(Lagrange(2), 5, caution=0.0)
    ours = planner_of(reference, across, lambda _, schedule: -49.4 if schedule == bold else -44.8)
    assert ours.search(Lagrange(2), 5, caution=1.0) != bold
    assert ours.plan(Lagrange(2), 5) == bold


def planner_of(reference, answers, run=None):
    return Planner(reference, head, answers, run=run)


def test_without_the_answers_the_drift_is_another(planner, reference):
    deaf = Planner(reference, head, size=2048)
    assert abs(deaf.drift(Reuse(), SCHEDULES[0]) - planner.drift(Reuse(), SCHEDULES[0])) > 0.5


def test_an_autocast_of_the_callers_changes_nothing(reference):
    deaf, full = Planner(reference, head), [0, 3, 7, 9]
    with torch.autocast("cpu", torch.bfloat16):
        assert Planner(reference, head).drift(Taylor(1), full) == deaf.drift(Taylor(1), full)


def test_how_full_steps_answer_a_drift_is_measured(reference):
    disturbed = plain_world(answering).runs(range(6), Forecast(Reuse(), disturbance(STEPS)))
    found, rest, _ = responses(disturbed, reference)
    first, times = disturbed[0].full[1], reference[0].grid.float()
    torch.testing.assert_close(found[first:], torch.full((STEPS - first,), ANSWER), atol=1e-3, rtol=0)
    torch.testing.assert_close(rest, torch.zeros(STEPS), atol=1e-3, rtol=0)
    expected = ANSWER * times[first] / times[:first]
    torch.testing.assert_close(found[:first], expected, atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="each disturbed run has its reference run, got 5 and 6"):
        responses(disturbed[1:], reference)


@pytest.mark.parametrize("budget", [1, 2, 3, 4])
@pytest.mark.parametrize("forecaster", [Reuse(), Lagrange(2)], ids=repr)
def test_the_search_finds_what_trying_all_schedules_finds(forecaster, budget, planner):
    found = planner.search(forecaster, budget).full_steps(STEPS)
    everything = [(0, *rest) for rest in combinations(range(1, STEPS), budget - 1)]
    assert len(found) == budget
    best = min(planner.drift(forecaster, full) for full in everything)
    assert planner.drift(forecaster, found) == pytest.approx(best, abs=0.05)


def test_forecasters_that_look_alike_are_kept_apart(planner):
    def rows(coefficients):
        table = {step: PlannedRow((0, 1), coefficients, 0.0) for step in range(2, STEPS)}
        return LinearRows(planner.grid, table, remembers_forecasts=False)

    newest, oldest = rows((0.0, 1.0)), rows((1.0, 0.0))
    assert repr(newest) == repr(oldest)
    assert planner.drift(newest, (0, 1)) == pytest.approx(planner.drift(Reuse(), (0, 1)), abs=1e-4)
    assert planner.drift(oldest, (0, 1)) > planner.drift(newest, (0, 1)) + 0.1


def test_short_runs_are_disturbed_too():
    assert [disturbance(steps).draw(steps) for steps in (2, 3, 4, 8)] == ["##", "#.#", "#.##", "#.######"]


def test_a_search_may_begin_with_given_full_steps(planner):
    found = planner.search(Lagrange(1), 5, begin=(0, 2, 3)).full_steps(STEPS)
    assert found[:3] == (0, 2, 3) and len(found) == 5
    others = [(0, 2, 3, a, b) for a in range(4, STEPS) for b in range(a + 1, STEPS)]
    assert planner.drift(Lagrange(1), found) == pytest.approx(min(planner.drift(Lagrange(1), x) for x in others))
    assert planner.search(Lagrange(1), 3, begin=(0, 2, 3)) == Schedule.at([0, 2, 3])
    with pytest.raises(ValueError, match=f"a budget is from 3 to {STEPS - 1} full steps, got 2"):
        planner.search(Reuse(), 2, begin=(0, 2, 3))


def test_all_steps_full_leave_no_drift(planner):
    assert planner.search(Taylor(1), STEPS) == Schedule.at(range(STEPS))
    assert planner.drift(Taylor(1), range(STEPS)) == pytest.approx(-120)


def test_what_cannot_be_planned_is_an_error(planner):
    for budget in (0, STEPS + 1):
        with pytest.raises(ValueError, match=f"a budget is from 1 to {STEPS} full steps, got {budget}"):
            planner.search(Reuse(), budget)
    grid = planner.grid
    own = LinearRows(grid, {step: PlannedRow((step - 1,), (1.0,), 0.0) for step in range(1, STEPS)}, memory=1)
    with pytest.raises(ValueError, match="planning follows histories of full steps only"):
        planner.search(own, 3)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(BOTH, 3.0)], ids=str)
def test_training_knows_the_drift_of_rows_that_were_not_run(guidance):
    """Runs of one set of rows, with their answers, tell where other rows would lead, in each stream others."""
    world, schedule = plain_world(answering, guidance), "at:0,4,9,13"
    reference, streams = world.runs(range(6)), guidance.streams
    free = L2P(origin(schedule, streams=streams))
    problem = Problem(free, head, "latents", guidance)
    new = dict(zip(BOTH, (Lagrange(2), Taylor(1)), strict=True))
    runs = world.runs(range(6), Forecast(Reuse(), Schedule.parse(schedule)))
    other = world.runs(range(6), Forecast(new, Schedule.parse(schedule)))
    truth, recorded = Runs.stack(reference, streams), Runs.stack(runs, streams, problem.full)
    problem.responses = response(recorded, truth, problem.full, guidance).along
    pasts = dict(histories(STEPS, problem.full, 0, free.memory, False))

    def row(step, plan):
        past, coefficients, *_ = plan.rows[step]
        missing = [0.0] * (len(pasts[step]) - len(past))
        return Row(torch.tensor([*missing, *coefficients]), torch.tensor(0.0))

    # the features of the full steps are as recorded, so what they answer is all that differs
    plans = {s: compile(new[s], reference[0].grid, Schedule.parse(schedule)) for s in streams}
    rows = {stream: {step: row(step, plan) for step in pasts} for stream, plan in plans.items()}
    outputs = head(problem.forecasts(rows, recorded.features, True), recorded.conditioning[:, :, problem.skipped])
    outputs = recorded.outputs.index_copy(2, torch.tensor(problem.skipped), outputs)
    moved = guidance.velocity(outputs) - guidance.velocity(truth.outputs)
    found = problem.drift(rows, moved, recorded, truth)
    real = torch.stack([run.latents for run in other]) - truth.latents
    torch.testing.assert_close(found, real[:, 1:], atol=1e-4, rtol=1e-3)
    assert found.shape == (6, STEPS, TOKENS, OUT)


@pytest.mark.parametrize(("rescaled", "within"), [(False, 0.3), (True, 1.0)])
def test_the_drift_of_guided_runs_is_known_before_them(rescaled, within):
    world = plain_world(answering, Guidance(BOTH, 3.0, rescaled))
    reference = world.runs(range(6))
    disturbed = world.runs(range(6), Forecast(Reuse(), disturbance(STEPS)))
    planner = Planner(reference, head, responses(disturbed, reference), size=2048)
    for forecaster in (Reuse(), Lagrange(2)):
        real = drift(world.runs(range(6), Forecast(forecaster, Schedule.at(SCHEDULES[1]))), reference)
        assert planner.drift(forecaster, SCHEDULES[1]) == pytest.approx(real, abs=within)


@pytest.mark.parametrize("place", ["feature", "output"])
def test_detours_have_a_full_step_more_and_a_limit_that_a_share_of_the_runs_exceeds(tiny_flux, place):
    call = dict(height=32, width=32, num_inference_steps=10, max_sequence_length=16)
    prompts, seeds, schedule = ["a", "b", "c", "d"], range(4), Schedule.at([0, 3, 6])
    reference = record(tiny_flux, prompts, seeds, draw_tokens, **call)
    planner = Planner.of(tiny_flux, reference, tap_of(tiny_flux.transformer, place), **call)
    found = detours(tiny_flux, planner, Taylor(1), schedule, reference, share=0.5, **call)
    assert set(found) == {3, 6}
    for step, detour in found.items():
        full, begun = detour.schedule.full_steps(10), [k for k in (0, 3, 6) if k <= step]
        assert len(full) == 4 and list(full[: len(begun)]) == begun
    fired = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        with accelerate(tiny_flux, Taylor(1), schedule=schedule, tap=place, detours={3: found[3]}) as run:
            tiny_flux(prompt, generator=torch.Generator().manual_seed(seed), output_type="latent", **call)
        fired.append(run.summary()["cond"].detours)
    assert sum(fired) == 2
