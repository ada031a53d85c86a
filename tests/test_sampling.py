"""Plans and trainings know what any affine sampler makes of errors; Euler's is what it always was."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from samplers import FLOW, Case
from samplers import call as first_call
from test_planning import ANSWER, BACK, SCHEDULES, Forecast, answering, bending, plain_world
from test_training import GRID, OUT, STEPS, TOKENS, head, origin

from lesa.learn.planning import Planner, disturbance, freshly, responses, spread
from lesa.learn.sampling import euler, sampler_of
from lesa.learn.training import Problem, Runs, drift, response
from lesa.learn.trajectory import Trajectory
from lesa.predictors import L2P
from lesa.rows import sampler as samplers
from lesa.rows.carry import Carry
from lesa.rows.forecasters import Lagrange, Reuse, Taylor
from lesa.rows.guidance import Guidance
from lesa.rows.plan import compile, histories
from lesa.rows.sampler import Sampler
from lesa.rows.schedule import Schedule

MULTISTEP = {
    "UniPC": Case("UniPCMultistep", FLOW),
    "DPM++": Case("DPMSolverMultistep", FLOW),
    "DDIM": Case("DDIM", {"clip_sample": False}),
    "LMS": Case("LMSDiscrete"),
}


def numbers(name: str) -> Sampler:
    scheduler = MULTISTEP[name].scheduler(STEPS)
    x = torch.zeros(1, 2, 2, 2)
    return samplers.of(scheduler, **first_call(scheduler, x, scheduler.timesteps[0], x))


class Stepped:
    """A `World` of `test_training` whose latents go by a sampler's numbers."""

    def __init__(self, feature, sampler: Sampler):
        self.world, self.sampler = plain_world(feature), sampler

    def run(self, seed: int, predictor=None) -> Trajectory:
        plan = compile(predictor.forecaster, GRID, predictor.schedule) if predictor else None
        latents = [torch.randn(TOKENS, OUT, generator=torch.Generator().manual_seed(seed)).double()]
        felt, outputs = [], []
        for step in range(STEPS):
            if plan is None or step in plan.full:
                felt.append(self.world.feature(seed, step, latents[-1].float()))
            else:
                past, coefficients, offset, _ = plan.rows[step]
                felt.append(sum(c * felt[k] for k, c in zip(past, coefficients, strict=True)) + offset)
            outputs.append(head(felt[-1], self.world.conditioning[step]))
            moved = torch.einsum("j,jnc->nc", self.sampler.latents[step, : step + 1], torch.stack(latents))
            velocities = torch.stack(outputs).double()
            latents.append(moved + torch.einsum("k,knc->nc", self.sampler.outputs[step, : step + 1], velocities))
        return Trajectory(
            prompt=f"prompt {seed}",
            seed=seed,
            grid=GRID,
            full=plan.full if plan else tuple(range(STEPS)),
            tokens=torch.arange(TOKENS),
            latents=torch.stack(latents).float(),
            features={"cond": torch.stack(felt)},
            outputs={"cond": torch.stack(outputs)},
            conditioning={"cond": self.world.conditioning},
            sampler=self.sampler,
        )

    def runs(self, seeds, predictor=None) -> list[Trajectory]:
        return [self.run(seed, predictor) for seed in seeds]


def softly(seed, step, latents):
    """Answers that none of the samplers blows up by its own numbers."""
    return answering(seed, step, 0.1 * latents)


@pytest.mark.parametrize("name", MULTISTEP)
def test_the_drift_of_real_runs_is_known_before_them_under_any_sampler(name):
    world = Stepped(softly, numbers(name))
    reference = world.runs(range(6))
    disturbed = world.runs(range(6), Forecast(Reuse(), disturbance(STEPS)))
    planner = Planner(reference, head, responses(disturbed, reference), size=2048)
    bare = [replace(run, sampler=None) for run in reference]
    missed = 0.0
    for full in SCHEDULES:
        for forecaster in (Reuse(), Taylor(1), Lagrange(2)):
            real = drift(world.runs(range(6), Forecast(forecaster, Schedule.at(full))), reference)
            assert planner.drift(forecaster, full) == pytest.approx(real, abs=0.4)
            missed += abs(real)
    with pytest.raises(ValueError, match=r"went by Euler's method, of which .* collect it anew"):
        Planner(bare, head)
    assert missed > 0


@pytest.mark.parametrize("name", MULTISTEP)
def test_the_closed_loop_of_a_training_is_a_real_run_under_any_sampler(name):
    world, schedule = Stepped(softly, numbers(name)), Schedule.at(SCHEDULES[1])
    reference = world.runs(range(6))
    other = world.runs(range(6), Forecast(Taylor(1), schedule))
    predictor = L2P(origin(str(schedule)), memory=3)
    problem = Problem(predictor, head, "latents", Guidance(("cond",)), sampler=sampler_of(reference))
    truth, recorded = (Runs.stack(runs, ["cond"]) for runs in (reference, other))
    problem.responses = response(recorded, truth, problem.full, problem.guidance).along
    changed = Forecast(Lagrange(2), schedule)
    real = world.runs(range(6), changed)
    pasts = dict(histories(STEPS, problem.full, 0, predictor.memory, False))
    rows = {"cond": {step: Lagrange(2).row(GRID, step, past) for step, past in pasts.items()}}
    rows = {"cond": {s: row._replace(coefficients=row.coefficients.float()) for s, row in rows["cond"].items()}}
    runs = recorded.at(problem.full)
    outputs = head(problem.forecasts(rows, runs.features, True), runs.conditioning[:, :, problem.skipped])
    outputs = runs.outputs.index_copy(2, torch.tensor(problem.skipped), outputs)
    errors = problem.guidance.velocity(outputs) - problem.guidance.velocity(truth.outputs)
    found = problem.drift(rows, errors, runs, truth)
    moved = torch.stack([run.latents for run in real]) - truth.latents
    torch.testing.assert_close(found, moved[:, 1:], atol=2e-3 * float(moved.abs().max()), rtol=1e-2)


def by_durations(planner: Planner, forecaster, full: tuple[int, ...]) -> float:
    """The drift under Euler's method, step by step as it was computed before samplers had numbers."""
    durations, answer = GRID.diff().float(), planner._responses.along
    drifts, left = {}, torch.zeros(planner._errors.shape[2:])
    for step in range(STEPS):
        if step in full:
            drifts[step] = left
            left = left + durations[step] * answer[step] * left
            continue
        past = [k for k in full if k < step][-forecaster.memory :]
        row = forecaster.row(GRID, step, past).coefficients.float()
        error = sum(c * (planner._errors[k, step] + answer[k] * drifts[k]) for k, c in zip(past, row, strict=True))
        left = left + durations[step] * error
    return float(10 * (left.square().sum(-1) / planner._scale).log10().mean())


@pytest.mark.parametrize("forecaster", [Reuse(), Taylor(1), Lagrange(3)], ids=repr)
def test_under_euler_the_drift_is_that_of_the_durations(forecaster):
    world = plain_world(answering)
    reference = world.runs(range(6))
    disturbed = world.runs(range(6), Forecast(Reuse(), disturbance(STEPS)))
    planner = Planner(reference, head, responses(disturbed, reference))
    read = Planner([replace(run, sampler=euler(GRID)) for run in reference], head, planner._responses)
    for full in SCHEDULES:
        expected = by_durations(planner, forecaster, full)
        assert planner.drift(forecaster, full) == pytest.approx(expected, abs=2e-3)
        assert read.drift(forecaster, full) == pytest.approx(expected, abs=2e-3)
    assert read.search(forecaster, 5) == planner.search(forecaster, 5)


@pytest.mark.parametrize(("name", "rank"), [("DDIM", 1), ("DPM++", 2), ("UniPC", 3)])
def test_a_sampler_carries_few_numbers_from_step_to_step(name, rank):
    found = numbers(name).response
    carry = Carry(found)
    errors = torch.randn(STEPS, 1, 2, generator=torch.Generator().manual_seed(0))
    places, state = [0, 3, 4, 9, 15, 16], torch.zeros(0, 1, 2)
    for begin, end in pairwise(places):
        kept, moves = carry.between(begin, end)
        assert len(kept) <= rank
        state = torch.einsum("rq,qpd->rpd", kept, state) + torch.einsum("rs,spd->rpd", moves, errors[begin:end])
        drifted = torch.einsum("r,rpd->pd", carry.drift_of(end), state)
        expected = torch.einsum("s,spd->pd", found[end].float(), errors)
        torch.testing.assert_close(drifted, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


def test_runs_of_a_sampler_without_numbers_are_not_planned_on():
    run = replace(plain_world(answering).run(0), refusal="it clips its data prediction (clip_sample=True).")
    with pytest.raises(ValueError, match=r"this one has none: it clips .* accelerated all the same"):
        Planner([run], head)


def test_runs_of_two_samplers_are_not_one_collection():
    one = Stepped(softly, numbers("UniPC")).run(0)
    with pytest.raises(ValueError, match="all runs have one sampler"):
        sampler_of([one, replace(one, sampler=numbers("DPM++"))])


def test_where_a_history_begins_anew_nothing_older_is_combined():
    assert dict(histories(6, (0, 3), 0, 4, True, begins=(3,)))[5] == (3, 4)
    predictor = L2P(replace(origin("at:0,2,4"), training=dict(begins=[0, 8])), memory=3, slope=False)
    assert predictor.full == (0, 2, 4, 8) and predictor.past(9) == [8]
    whole, second = compile(predictor, GRID, predictor.schedule), compile(predictor, GRID, Schedule.at([8]), 8)
    assert whole.rows[10] == second.rows[10] and whole.rows[7].past == (0, 2, 4)


def test_what_is_new_in_a_drift_is_answered_by_its_own_number():
    """Half of the numbers of the latents are answered, and what was answered before is mostly in the other half."""

    def halfway(seed, step, latents):
        answered = latents * torch.tensor([1.0, 0.0, 0.0])
        return bending(seed, step, latents) + 8 * ANSWER * answered @ BACK

    world = plain_world(halfway)
    reference = world.runs(range(6))
    old = responses(world.runs(range(6), Forecast(Reuse(), disturbance(STEPS))), reference)
    found = freshly(old, world.runs(range(6), Forecast(Reuse(), spread(STEPS))), reference)
    assert found.fresh is not None and float((found.fresh - old.along)[8:].mean()) > 0.2
    missed = {}
    for answers in (old, found):
        planner, missed[answers is found] = Planner(reference, head, answers, size=2048), 0.0
        for full in SCHEDULES:
            real = drift(world.runs(range(6), Forecast(Lagrange(1), Schedule.at(full))), reference)
            missed[answers is found] += abs(planner.drift(Lagrange(1), full) - real)
    assert missed[True] < missed[False]
