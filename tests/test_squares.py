"""Fitted by least squares, rows are as good in a phase's own loss as by gradient, and what can be recovered is."""

from dataclasses import replace

import pytest
import torch
from test_training import BOTH, CHANNELS, GRID, OUT, SMALL, World, bending, head, origin, reacting

from lesa.host.head import Projection
from lesa.learn.lessons import Config, Lesson
from lesa.learn.squares import GaussNewton
from lesa.learn.training import Problem, Runs, train
from lesa.learn.unknowns import Unknowns
from lesa.predictors import L2P, LESA, ContinuousLESA
from lesa.rows.guidance import Guidance
from lesa.rows.plan import compile

SQUARES = Config(fit="least-squares", updates=(20, 20), rounds=1)
MAKE = {
    "lesa": lambda o: LESA(o, **SMALL),
    "with forecasts": lambda o: LESA(o, remembers_forecasts=True, **SMALL),
    "l2p": L2P,
}


def best_losses(result) -> list[float]:
    """The lowest loss of each round on the validation runs."""
    entries = result.curve.entries
    rounds = range(len(result.scores))
    return [min(one["validation_loss"] for one in entries if one["round"] == round_) for round_ in rounds]


@pytest.mark.parametrize("name", MAKE)
def test_the_ground_truth_phase_ends_no_higher_than_by_gradient(name):
    make, world = MAKE[name], World(bending)
    (ours,) = best_losses(world.train(make(origin("every:5:2")), replace(SQUARES, rounds=0)))
    (theirs,) = best_losses(world.train(make(origin("every:5:2")), Config(updates=(40, 0), rounds=0)))
    assert ours < theirs


@pytest.mark.parametrize("name", MAKE)
def test_the_closed_loop_phase_ends_no_higher_than_by_gradient(name):
    """Both go on from the same predictor and its runs, where full steps react."""
    world, start = World(reacting), MAKE[name](origin("every:5:2"))
    lesson, found = Lesson(world.runs(range(6)), world.runs(range(100, 103))), []

    def record_runs(predictor, _lesson):
        return world.runs(range(6), predictor), world.runs(range(100, 103), predictor)

    for config in (SQUARES, Config(updates=(0, 40), rounds=1)):
        result = train(start, [lesson], head, record_runs, replace(config, updates=(0, config.updates[1])))
        found.append(best_losses(result)[1])
    assert found[0] < found[1] + 0.01


@pytest.mark.parametrize("guidance", [None, Guidance(BOTH, 3.0)], ids=str)
@pytest.mark.parametrize("remembers_forecasts", [True, False])
def test_features_of_a_known_lesa_are_forecast_to_the_last_digits(remembers_forecasts, guidance):
    """Full steps' features are drawn, the others are what a LESA with weights and alphas of its own makes of them."""
    streams = (guidance or Guidance()).streams
    its = origin("every:4:2", streams=streams)
    lesa = LESA(its, remembers_forecasts=remembers_forecasts, memories=(2, 2, 2), **SMALL)
    known = drawn_like(lesa)
    plans = {stream: compile(known.for_stream(stream), GRID, known.schedule) for stream in streams}

    def feature(seed, step, _latents):
        stream = streams[seed // 1000]
        if step in known.full:
            generator = torch.Generator().manual_seed(100 * seed + step)
            return torch.randn(5, CHANNELS, generator=generator)
        row = plans[stream].rows[step]
        parts = (c * feature(seed, k, None) for k, c in zip(row.past, row.coefficients, strict=True))
        return sum(parts) + row.offset

    result = World(feature, guidance).train(lesa, replace(SQUARES, rounds=0), prompts=4)
    assert result.scores[0] < -90
    for stream in streams:
        found = compile(result.predictor.for_stream(stream), GRID, known.schedule).rows
        for step, row in plans[stream].rows.items():
            assert found[step].coefficients == pytest.approx(row.coefficients, abs=1e-3), (stream, step)


def drawn_like(lesa: LESA) -> LESA:
    """Another LESA with weights, biases and alphas of its own."""
    known, generator = LESA(lesa.origin, **lesa.options()), torch.Generator().manual_seed(3)
    for stream in lesa.origin.streams:
        for expert in known.stage_experts(stream):
            expert.weight.data += 0.1 * torch.randn(expert.weight.shape, generator=generator)
            expert.bias.data += 0.1 * torch.randn((), generator=generator)
        alphas = known.alphas(stream).detach()
        known.absorb(alphas + 0.2 * torch.rand(alphas.shape, generator=generator), stream)
    return known


@pytest.mark.parametrize("closed_loop", [False, True])
@pytest.mark.parametrize("guidance", [None, Guidance(BOTH, 3.0)], ids=str)
@pytest.mark.parametrize("name", MAKE)
def test_the_curvature_is_made_of_how_latents_move(name, guidance, closed_loop):
    """With full steps that answer to drifts, too, and a head that is linear."""
    world = World(bending, guidance)
    predictor = MAKE[name](origin(streams=world.streams))
    problem, unknowns = Problem(predictor, head, "latents", guidance), Unknowns(predictor, True)
    problem.responses[list(problem.full)] = torch.rand(len(problem.full), generator=torch.Generator().manual_seed(0))
    reference, others = (Runs.stack(world.runs(seeds), world.streams) for seeds in (range(2), range(2, 4)))
    runs = others.at(problem.full) if closed_loop else reference
    weights = torch.rand(2, problem.steps, generator=torch.Generator().manual_seed(1))
    moves = problem.moves(unknowns.rows(problem), runs, reference, closed_loop)
    each = torch.eye(moves.numel()).view(-1, *moves.shape)
    parts = torch.autograd.grad(moves, unknowns.parameters, each, is_grads_batched=True, allow_unused=True)
    sizes = [(part, parameter.numel()) for part, parameter in zip(parts, unknowns.parameters, strict=True)]
    flat = [torch.zeros(len(each), n) if part is None else part.reshape(len(each), n) for part, n in sizes]
    slopes = torch.cat(flat, 1).view(2, problem.steps, -1, sum(n for _, n in sizes)).double()
    wanted = 2 * torch.einsum("ps,psau,psav->uv", weights.double(), slopes, slopes) / slopes.shape[2]
    found = GaussNewton(problem, [(runs, reference)], unknowns, closed_loop)._curvature([weights])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("closed_loop", [False, True])
@pytest.mark.parametrize("guidance", [None, Guidance(BOTH, 3.0, rescaled=True)], ids=str)
def test_one_step_solves_what_is_linear(closed_loop, guidance, monkeypatch):
    """Squares of what free rows of full steps leave are a parabola, and without rescaling a step is at its foot."""
    world = World(bending, guidance)
    free = L2P(origin(streams=world.streams), memory=2)
    torch.manual_seed(0)
    projection = Projection(torch.nn.Linear(CHANNELS, OUT).requires_grad_(False))
    problem = Problem(free, projection, "latents", guidance)
    monkeypatch.setattr(problem, "of_squares", lambda squares, *_: squares.mean())
    known, others = world.runs(range(4)), world.runs(range(4, 8))
    reference, others = (problem.fold(Runs.stack(runs, world.streams)) for runs in (known, others))
    pairs = [(others.at(problem.full) if closed_loop else reference, reference)]
    step = GaussNewton(problem, pairs, Unknowns(free, True), closed_loop)
    step._damping = 1e-9
    before, after = loss_and(step)
    assert after < before
    if guidance is None:
        _, last = loss_and(step)
        assert after - last < 1e-3 * (before - after)


def loss_and(step: GaussNewton) -> tuple[float, float]:
    """The loss before and after a step."""
    with torch.no_grad():
        before = float(step.loss(step.squares()))
    step()
    with torch.no_grad():
        return before, float(step.loss(step.squares()))


def test_a_step_that_would_raise_the_loss_is_not_taken(monkeypatch):
    free = L2P(origin(), memory=2)
    problem, runs = Problem(free, head, "latents"), Runs.stack(World(bending).runs(range(4)), ["cond"])
    step, before = GaussNewton(problem, [(runs, runs)], Unknowns(free, True), False), free.state_dict()
    kept = {name: value.clone() for name, value in before.items()}
    uphill = -torch.eye(free.coefficients["cond"].numel()).double()
    monkeypatch.setattr(step, "_curvature", lambda _weights: uphill)
    assert not step()
    assert all(torch.equal(value, kept[name]) for name, value in free.state_dict().items())


def test_what_least_squares_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="free_alphas=False"):
        Config(fit="least-squares", free_alphas=False)
    with pytest.raises(ValueError, match="the loss 'latents'"):
        Config(fit="least-squares", loss="features")
    with pytest.raises(ValueError, match="one of least-squares, gradient"):
        Config(fit="adam")
    many = ContinuousLESA(origin(), schedules=[(GRID.tolist(), ["every:4:2"])])
    with pytest.raises(ValueError, match="fit it by gradient"):
        World(bending).train(many, SQUARES)
