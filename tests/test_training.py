"""Training recovers what can be recovered, and a stopped one goes on as if nothing had happened."""

import copy
import json
import math
import random
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lesa.host.head import Projection
from lesa.learn import kept, training
from lesa.learn.metrics import MOST_DRIFT
from lesa.learn.training import Config, Lesson, Problem, Runs, drift, least_squares, train
from lesa.learn.trajectory import Trajectory
from lesa.predictors import L2P, LESA, Origin, Predictor, base
from lesa.rows.forecasters import Lagrange, Reuse, Taylor
from lesa.rows.guidance import Guidance
from lesa.rows.plan import compile
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

STEPS, TOKENS, CHANNELS, OUT = 16, 5, 6, 3
GRID = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
GRID = 2 * GRID / (1 + GRID)  # a shifted grid, as FLUX's
SMALL = dict(hidden=(6,), grid_size=40)
"""KANs that hold 16 alphas."""
BOTH = ("cond", "uncond")
WEIGHTS = torch.randn(CHANNELS, OUT, generator=torch.Generator().manual_seed(7))


def head(features: Tensor, conditioning: Tensor) -> Tensor:
    return (features * conditioning[..., None, :]) @ WEIGHTS / 2


def origin(schedule: str = "every:4:2", grid: Tensor = GRID, **changes) -> Origin:
    facts = Origin("tiny", "Toy", {}, Tap(("blocks",), "norm"), tuple(grid.tolist()), schedule, data="0123")
    return replace(facts, **changes)


class World:
    """Prompts whose features are known in closed form, or react to the latents; a run is a few lines of numpy's kind.

    `feature(seed, step, latents)` is what the blocks give at a full step; streams differ in their seed.
    """

    def __init__(self, feature, guidance: Guidance | None = None, dtype=torch.float32):
        self.feature, self.dtype = feature, dtype
        self.guidance = guidance or Guidance()
        self.streams = self.guidance.streams
        self.conditioning = 1 + 0.1 * torch.randn(STEPS, CHANNELS, generator=torch.Generator().manual_seed(2))

    def run(self, seed: int, predictor=None) -> Trajectory:
        latents = [torch.randn(TOKENS, OUT, generator=torch.Generator().manual_seed(seed))]
        plans = {}
        if predictor is not None:
            plans = {s: compile(predictor.for_stream(s), GRID, predictor.schedule) for s in self.streams}
        full = plans[self.streams[0]].full if plans else tuple(range(STEPS))
        felt, outputs = ({stream: [] for stream in self.streams} for _ in range(2))
        for step in range(STEPS):
            for number, stream in enumerate(self.streams):
                if step in full:
                    feature = self.feature(seed + 1000 * number, step, latents[-1])
                else:
                    past, coefficients, offset, _ = plans[stream].rows[step]
                    feature = sum(c * felt[stream][k] for k, c in zip(past, coefficients, strict=True)) + offset
                felt[stream].append(feature)
                outputs[stream].append(head(feature, self.conditioning[step]))
            velocity = self.guidance.velocity(torch.stack([outputs[stream][-1] for stream in self.streams])[None])[0]
            latents.append(latents[-1] + float(GRID[step + 1] - GRID[step]) * velocity)
        return Trajectory(
            prompt=f"prompt {seed}",
            seed=seed,
            grid=GRID,
            full=full,
            tokens=torch.arange(TOKENS),
            latents=torch.stack(latents).to(self.dtype),
            features={stream: torch.stack(steps).to(self.dtype) for stream, steps in felt.items()},
            outputs={stream: torch.stack(steps).to(self.dtype) for stream, steps in outputs.items()},
            conditioning={stream: self.conditioning.to(self.dtype) for stream in self.streams},
        )

    def runs(self, seeds: Sequence[int], predictor=None) -> list[Trajectory]:
        return [self.run(seed, predictor) for seed in seeds]

    def train(self, predictor, config: Config, prompts=8, folder=None, head=head):
        """Train on `prompts` runs, validate on others; rounds are recorded in this world."""
        known, others = range(prompts), range(100, 100 + prompts // 2)
        self.recordings = []

        def record_runs(predictor, _lesson):
            self.recordings.append(copy.deepcopy(predictor))
            return self.runs(known, predictor), self.runs(others, predictor)

        return train(predictor, [Lesson(self.runs(known), self.runs(others))], head, record_runs, config, folder)


@lru_cache(None)
def amplitudes(seed: int, count: int) -> Tensor:
    return torch.randn(count, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(5000 + seed))


RADIUS, ANGLE = 0.97, 0.35
NEWEST, OLDER = 2 * RADIUS * math.cos(ANGLE), -(RADIUS**2)
"""Every feature of `swinging` obeys h_s = NEWEST h_{s-1} + OLDER h_{s-2}."""


def swinging(seed: int, step: int, latents: Tensor) -> Tensor:
    a, b = amplitudes(seed, 2)
    return RADIUS**step * (a * math.cos(ANGLE * step) + b * math.sin(ANGLE * step))


def bending(seed: int, step: int, latents: Tensor) -> Tensor:
    """Smooth in time, and no row family fits it exactly."""
    waves = (math.cos(0.9 * k * float(GRID[step]) + k) for k in range(6))
    return sum(wave * a for wave, a in zip(waves, amplitudes(seed, 6), strict=True))


MIXING = torch.randn(OUT, CHANNELS, generator=torch.Generator().manual_seed(8))


def reacting(seed: int, step: int, latents: Tensor) -> Tensor:
    """What a full step gives depends on the latents that it sees."""
    return 2 * latents @ MIXING * math.cos(3 * float(GRID[step]))


def assert_same(a, b) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- recovery


@pytest.mark.parametrize("loss", ["features", "latents"])
@pytest.mark.parametrize("remembers_forecasts", [True, False])
def test_free_rows_find_a_known_recurrence(loss, remembers_forecasts):
    free = L2P(origin(), memory=2, remembers_forecasts=remembers_forecasts)
    config = Config(loss=loss, updates=(120, 20), rounds=1, learning_rate=0.1, batch=4, check_every=40)
    result = World(swinging).train(free, config)
    assert min(result.scores) < -50  # dB
    if remembers_forecasts:
        coefficients = result.predictor.coefficients["cond"][Problem(free, head, loss).skipped]
        wanted = torch.tensor([OLDER, NEWEST]).expand_as(coefficients)
        torch.testing.assert_close(coefficients.detach(), wanted, rtol=0, atol=0.01)


@pytest.mark.parametrize("loss", ["features", "latents"])
def test_lesa_finds_a_known_recurrence(loss):
    lesa = LESA(origin(), remembers_forecasts=True, memories=(2, 2, 2), **SMALL)
    config = Config(loss=loss, updates=(150, 30), rounds=1, learning_rate=0.05, batch=4, check_every=30)
    result = World(swinging).train(lesa, config)
    assert min(result.scores) < -50
    for step, row in compile(result.predictor, GRID, Schedule.every(4, warmup=2)).rows.items():
        assert row.coefficients == pytest.approx((OLDER, NEWEST), abs=0.02), step


def test_the_kans_can_be_trained_themselves():
    lesa = LESA(origin(), remembers_forecasts=True, memories=(2, 2, 2), **SMALL)
    before = copy.deepcopy(lesa)
    config = Config(updates=(80, 0), rounds=0, free_alphas=False, learning_rate=0.01)
    result = World(swinging).train(lesa, config)
    losses = [entry["validation_loss"] for entry in result.curve.entries]
    assert losses[-1] < losses[0] - 4  # 17 dB
    ours, theirs = (p.stage_experts("cond")[0].kan[0].spline for p in (before, result.predictor))
    assert not torch.equal(ours, theirs)
    assert_same(lesa, before)  # the predictor given stays as it was


# --- closed loop


@pytest.mark.parametrize(
    "make", [lambda o: LESA(o, **SMALL), lambda o: LESA(o, remembers_forecasts=True, **SMALL), L2P]
)
def test_rounds_lower_the_drift_where_full_steps_react(make):
    result = World(reacting).train(make(origin("every:5:2")), Config(updates=(60, 60), rounds=1, batch=8))
    assert min(result.scores[1:]) < result.scores[0] - 1.5
    assert drift_of(result.predictor) == pytest.approx(min(result.scores), abs=1e-3)
    assert drift_of(result.ground_truth) == pytest.approx(result.scores[0], abs=1e-3)


def drift_of(predictor) -> float:
    world = World(reacting)
    return drift(world.runs(range(100, 104), predictor), world.runs(range(100, 104)))


def test_the_best_round_is_the_one_whose_runs_end_nearest():
    world = World(bending)
    reference, validation = world.runs(range(4)), world.runs(range(100, 102))
    errors, seen = [0.3, math.nan, 0.1, 0.2], []

    def record_runs(predictor, _lesson):
        seen.append(predictor)
        runs = world.runs(range(100, 102), predictor)
        for run, wanted in zip(runs, validation, strict=True):
            run.latents[-1] = wanted.latents[-1] + errors[len(seen) - 1]
        return world.runs(range(4), predictor), runs

    result = train(L2P(origin()), [Lesson(reference, validation)], head, record_runs, Config(updates=(5, 5), rounds=3))
    power = sum(10 * math.log10(float(run.latents[-1].square().mean())) for run in validation) / 2
    wanted = [20 * math.log10(error) - power if error == error else MOST_DRIFT for error in errors]
    assert result.scores == pytest.approx(wanted, abs=1e-3)
    assert_same(result.predictor, seen[2])
    assert_same(result.ground_truth, seen[0])
    assert result.predictor.coefficients["cond"].ne(result.ground_truth.coefficients["cond"]).any()


def test_a_phase_ends_at_its_best_validation_loss():
    config = Config(updates=(12, 0), rounds=0, learning_rate=1.0, check_every=1)
    result = World(bending).train(L2P(origin()), config)
    losses = [entry["validation_loss"] for entry in result.curve.entries]
    assert min(losses) < losses[-1] - 0.5  # it overshot
    problem = Problem(result.predictor, head, "latents")
    validation = Runs.stack(World(bending).runs(range(100, 104)), ["cond"])
    rows = {"cond": result.predictor.stream_rows("cond", problem.grid, problem.pasts)}
    assert problem.loss(rows, validation, validation, closed_loop=False).item() == pytest.approx(min(losses))


@pytest.mark.parametrize("fit", ["gradient", "least-squares"])
def test_bars_of_updates_end_at_their_end(fit, capsys):
    World(bending).train(L2P(origin()), Config(updates=(2, 12), rounds=1, fit=fit, loss="latents", free_alphas=True))
    ends = re.findall(r"(\d+)%\|.* (\d+)/(\d+) \[", capsys.readouterr().err)
    assert len(ends) == 2 and all(share == "100" and done == total for share, done, total in ends)


def test_rounds_whose_runs_blew_up_are_not_trained_on():
    class Bursting(World):
        def run(self, seed, predictor=None):
            run = super().run(seed, predictor)
            if predictor is not None and len(self.recordings) == 1:
                run = replace(run, features={"cond": run.features["cond"] * math.inf}, latents=run.latents.clone())
                run.latents[-1] = math.nan
            return run

    result = Bursting(reacting).train(L2P(origin()), Config(updates=(20, 20), rounds=2))
    assert result.scores[0] == MOST_DRIFT > max(result.scores[1:])
    assert all(math.isfinite(entry["validation_loss"]) for entry in result.curve.entries)


@pytest.mark.parametrize(
    "make", [lambda o: LESA(o, **SMALL), lambda o: LESA(o, remembers_forecasts=True, **SMALL), L2P]
)
def test_the_closed_loop_is_the_unrolled_plan(make):
    predictor = make(origin())
    with torch.no_grad():
        for parameter in predictor.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    plan, problem = compile(predictor, GRID, predictor.schedule), Problem(predictor, head, "latents")
    rows = {"cond": predictor.stream_rows("cond", problem.grid, problem.pasts)}
    (matrix,), (offsets,) = problem.matrix(rows, closed_loop=True)
    unrolled = plan.unroll()[problem.skipped].float()
    torch.testing.assert_close(matrix, unrolled[:, :-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(offsets, unrolled[:, -1], rtol=1e-4, atol=1e-4)
    (open_,), _ = problem.matrix(rows, closed_loop=False)
    for line, (step, row) in zip(open_, plan.rows.items(), strict=True):
        assert line[list(row.past)].tolist() == pytest.approx(row.coefficients, abs=1e-5), step
        assert line.count_nonzero() <= len(row.past)


@pytest.mark.parametrize("guidance", [None, Guidance(BOTH, 3.0), Guidance(BOTH, 3.0, rescaled=True)], ids=str)
@pytest.mark.parametrize("floor", [-120.0, 0.0])
def test_the_loss_is_the_drift_of_the_run(guidance, floor):
    """Where full steps do not react, the unrolled loss is that of the real run, whatever its streams make of it."""
    world = World(bending, guidance=guidance)
    predictor = LESA(origin(streams=world.streams), remembers_forecasts=True, **SMALL)
    problem = Problem(predictor, head, "latents", guidance, floor=floor)
    reference, run = world.runs(range(3)), world.runs(range(3), predictor)
    rows = {stream: predictor.stream_rows(stream, problem.grid, problem.pasts) for stream in world.streams}
    felt, truth = Runs.stack(run, world.streams), Runs.stack(reference, world.streams)
    got = problem.loss(rows, felt.at(problem.full), truth, closed_loop=True)
    wanted = []
    for mine, theirs in zip(run, reference, strict=True):
        errors = (mine.latents - theirs.latents)[1:].square().mean(dim=(1, 2))
        least = 10 ** (floor / 10) * theirs.latents[-1].square().mean()
        wanted += [(errors[-1] + least).log(), (errors.mean() + least).log()]
    assert got.item() == pytest.approx(torch.stack(wanted).mean().item(), abs=1e-4)
    l1 = Problem(predictor, head, "features", guidance)
    got = l1.loss(rows, felt.at(problem.full), truth, closed_loop=True)
    l1_of_runs = (felt.features - truth.features)[:, :, problem.skipped].abs().mean()
    assert got.item() == pytest.approx(l1_of_runs.item(), abs=1e-5)


def test_gradients_flow_through_the_whole_loop():
    predictor = L2P(origin("at:0,1"), memory=3, remembers_forecasts=True)
    problem = Problem(predictor, head, "latents")
    runs = Runs.stack(World(bending).runs(range(3)), ["cond"])
    table = predictor.coefficients["cond"]

    def rows():
        return {"cond": predictor.stream_rows("cond", problem.grid, problem.pasts)}

    def loss() -> Tensor:
        return problem.loss(rows(), runs.at(problem.full), runs, closed_loop=True)

    loss().backward()
    assert table.grad is not None
    for step in (2, 7, 15):
        with torch.no_grad():
            kept, found = table[step, -1].clone(), []
            for change in (1e-2, -1e-2):
                table[step, -1] = kept + change
                found.append(loss().item())
            table[step, -1] = kept
        assert table.grad[step, -1].item() == pytest.approx((found[0] - found[1]) / 2e-2, rel=0.05), step
    last = problem.forecasts(rows(), runs.at(problem.full).features, True)[:, 0, -1]
    (gradient,) = torch.autograd.grad(last.sum(), table)
    assert gradient[2].abs().max() > 1e-3  # thirteen forecasts later


def test_each_stream_is_fitted_to_its_own_features():
    world = World(swinging, Guidance(BOTH, 0.5))
    both = L2P(origin(streams=BOTH), memory=2, remembers_forecasts=True)
    result = world.train(both, Config(updates=(100, 20), rounds=1, learning_rate=0.1, check_every=20))
    assert min(result.scores) < -30
    tables = [result.predictor.coefficients[stream] for stream in world.streams]
    assert not torch.equal(*tables)
    assert [entry["update"] for entry in result.curve.entries if entry["round"]] == [0, 20]


# --- least squares


@pytest.mark.parametrize("remembers_forecasts", [True, False])
def test_least_squares_are_those_of_numpy(remembers_forecasts):
    reference = World(bending).runs(range(4))
    rows = L2P(origin(), memory=3, remembers_forecasts=remembers_forecasts)
    least_squares(rows, reference)
    features = np.stack([run.features["cond"].double().numpy() for run in reference])
    for step, past in Problem(rows, head, "features").pasts.items():
        known = features[:, list(past)].transpose(0, 2, 3, 1).reshape(-1, len(past))
        wanted = np.linalg.lstsq(known, features[:, step].reshape(-1), rcond=None)[0]
        np.testing.assert_allclose(
            rows.coefficients["cond"].detach()[step, 3 - len(past) :], wanted, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("loss", ["latents", "features"])
def test_at_the_output_tap_the_outputs_are_what_is_fitted(loss):
    """Whatever tap the runs were recorded at: features that say something else are not looked at."""
    world, bound = World(bending), origin(tap=Tap(("blocks",), None))
    runs = [world.runs(range(6)), world.runs(range(100, 103))]
    at_output = [[replace(run, features=run.outputs) for run in some] for some in runs]

    def trained(reference, validation) -> Tensor:
        config = Config(loss=loss, updates=(5, 5), rounds=0)
        rows = L2P(bound)
        result = train(
            rows, [Lesson(reference, validation)], lambda x, _: x, lambda one, _: at_fulls(one, runs), config
        )
        return result.predictor.coefficients["cond"]

    def at_fulls(predictor, recorded):
        return [[replace(run, full=predictor.full) for run in some] for some in recorded]

    assert torch.equal(trained(*runs), trained(*at_output))
    assert not torch.equal(trained(*runs), L2P(bound).coefficients["cond"])
    one, other = L2P(bound), L2P(bound)
    least_squares(one, runs[0])
    least_squares(other, at_output[0])
    assert torch.equal(one.coefficients["cond"], other.coefficients["cond"])


def test_no_forecaster_has_a_smaller_feature_error_than_least_squares():
    world, schedule = World(bending), Schedule.every(4, warmup=2)
    reference = world.runs(range(6))
    rows = L2P(origin(), memory=4)
    least_squares(rows, reference)
    lesa = LESA(origin(), memories=(4, 4, 4), **SMALL)
    trained = world.train(lesa, Config(loss="features", updates=(100, 0), rounds=0), prompts=6).predictor
    for expert in trained.stage_experts("cond"):
        expert.bias.data.zero_()  # free rows have none
    features = torch.stack([run.features["cond"] for run in reference]).double()

    def errors(forecaster) -> Tensor:
        unrolled = compile(forecaster, GRID, schedule).unroll()
        forecast = torch.einsum("sk,pknc->psnc", unrolled[:, :-1], features) + unrolled[:, -1, None, None]
        return (forecast - features).square().mean(dim=(0, 2, 3))

    skipped = list(compile(rows, GRID, schedule).rows)
    best = errors(rows)[skipped]
    assert best.min() > 1e-8
    for other in (Reuse(), Taylor(1), Taylor(2), Taylor(3), Lagrange(2), lesa, trained, L2P(origin())):
        assert (best <= errors(other)[skipped] * (1 + 1e-6)).all(), other
        assert (best < errors(other)[skipped] * 0.99).any(), other


# --- seeds, and going on


CONFIG = Config(updates=(6, 5), rounds=2, batch=1, check_every=3, learning_rate=0.1)


def small(**changes) -> LESA:
    return LESA(origin(**changes), remembers_forecasts=True, **SMALL)


def trained(folder=None, config=CONFIG, predictor=None, head=head):
    return World(reacting).train(predictor or small(), config, prompts=2, folder=folder, head=head)


def assert_same_result(a, b) -> None:
    assert_same(a.predictor, b.predictor)
    assert_same(a.ground_truth, b.ground_truth)
    assert a.scores == b.scores and a.curve == b.curve


@pytest.fixture(scope="module")
def whole():
    """What an uninterrupted training gives."""
    return trained()


def test_the_same_seed_gives_the_same_bits(whole, tmp_path):
    torch.manual_seed(123)
    again = trained()
    assert_same_result(again, whole)
    assert_same_result(trained(tmp_path / "runs"), whole)
    assert len(whole.curve.entries) == 9 and len(whole.scores) == 3
    other = trained(config=replace(CONFIG, seed=1))
    assert other.curve != whole.curve


class Killed(BaseException):
    pass


class Fate:
    """Ends a training at its n-th event: a use of the head, a recording or a write of a file."""

    def __init__(self, monkeypatch, at: float = math.inf):
        self.events, self.at = 0, at
        for module in (kept, base):
            monkeypatch.setattr(module, "write_atomically", self.fateful(module.write_atomically))
        monkeypatch.setattr(World, "runs", self.fateful(World.runs))
        self.head = self.fateful(head)

    def fateful(self, call):
        def wrapped(*args, **kwargs):
            self.events += 1
            if self.events == self.at:
                raise Killed
            return call(*args, **kwargs)

        return wrapped


def count_calls(monkeypatch, module, name: str) -> list:
    calls, call = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: calls.append(args) or call(*args, **kwargs))
    return calls


def count_events(monkeypatch, folder) -> int:
    with monkeypatch.context() as patch:
        fate = Fate(patch)
        trained(folder, head=fate.head)
        return fate.events


def test_a_training_killed_anywhere_goes_on_to_the_same_bits(whole, tmp_path, monkeypatch):
    events = count_events(monkeypatch, tmp_path / "whole")
    for point in random.Random(0).sample(range(1, events + 1), 8):
        folder = tmp_path / str(point)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            fate = Fate(patch, point)
            trained(folder, head=fate.head)
        done = len(list(folder.glob("round-*")))
        with monkeypatch.context() as patch:
            fits = count_calls(patch, torch.optim, "Adam")
            assert_same_result(trained(folder), whole)
        assert len(fits) == 3 - done
        assert {path.name for path in folder.iterdir()} == {"training.json", "round-0", "round-1", "round-2"}


def test_finished_rounds_are_not_trained_again(whole, tmp_path, monkeypatch):
    trained(tmp_path)
    with monkeypatch.context() as patch:
        fits = count_calls(patch, torch.optim, "Adam")
        assert_same_result(trained(tmp_path), whole)
        assert len(fits) == 0
        shutil.rmtree(tmp_path / "round-2")
        assert_same_result(trained(tmp_path), whole)
        assert len(fits) == 1


def cut(name: str):
    def damage(folder: Path) -> None:
        file = folder / "round-1" / name
        file.write_bytes(file.read_bytes()[:-20])

    return damage


def edit(file: Path) -> None:
    """Change a number of a curve."""
    kept = json.loads(file.read_text())
    kept["entries"][-1]["validation_loss"] -= 100.0
    file.write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "damage",
    [
        cut("model.safetensors"),
        cut("config.json"),
        cut("curve.json"),
        lambda folder: (folder / "round-1" / "curve.json").unlink(),
        lambda folder: (folder / "round-1" / "curve.json").write_text("7"),
        lambda folder: shutil.copy(folder / "round-0" / "curve.json", folder / "round-1"),
        lambda folder: edit(folder / "round-1" / "curve.json"),
        lambda folder: (folder / "round-1" / "model.safetensors").unlink(),
        lambda folder: shutil.copytree(folder / "round-1", folder / "part"),
        lambda folder: (folder / "part").mkdir(),
    ],
)
def test_half_a_round_is_written_again(whole, tmp_path, damage):
    trained(tmp_path)
    damage(tmp_path)
    assert_same_result(trained(tmp_path), whole)


def test_a_round_after_a_damaged_one_is_not_trusted(tmp_path):
    trained(tmp_path)
    shutil.rmtree(tmp_path / "round-1")
    shutil.rmtree(tmp_path / "round-2")
    shutil.copytree(tmp_path / "round-0", tmp_path / "round-2")
    trained(tmp_path)
    assert (tmp_path / "round-2" / "curve.json").read_text() != (tmp_path / "round-0" / "curve.json").read_text()


def test_a_round_is_a_predictor_that_loads(whole, tmp_path):
    trained(tmp_path)
    assert_same(Predictor.from_pretrained(tmp_path / "round-0"), whole.ground_truth)
    kept = json.loads((tmp_path / "round-2" / "curve.json").read_text())
    assert kept["entries"] == whole.curve.entries


def test_rounds_of_before_are_gone_on_with(whole, tmp_path, monkeypatch):
    """Their curves have no digest."""
    trained(tmp_path)
    for file in tmp_path.glob("round-*/curve.json"):
        file.write_text(json.dumps(json.loads(file.read_text())["entries"]))
    fits = count_calls(monkeypatch, torch.optim, "Adam")
    assert_same_result(trained(tmp_path), whole)
    assert not fits


def test_a_longer_training_goes_on_from_a_shorter_one(whole, tmp_path):
    trained(tmp_path, replace(CONFIG, rounds=0))
    assert_same_result(trained(tmp_path), whole)
    assert trained(tmp_path, replace(CONFIG, rounds=1)).scores == whole.scores[:2]


@pytest.mark.parametrize(
    ("config", "predictor", "different"),
    [
        (replace(CONFIG, seed=1), small(), "seed"),
        (replace(CONFIG, loss="features", batch=3), small(), "batch, loss"),
        (CONFIG, small(data="4567"), "data"),
        (CONFIG, small(schedule="every:3"), "schedule"),
        (CONFIG, LESA(origin(), remembers_forecasts=True, hidden=(7,)), "options"),
        (CONFIG, L2P(origin()), "method, options"),
    ],
)
def test_a_folder_with_another_training_is_an_error(tmp_path, config, predictor, different):
    trained(tmp_path, replace(CONFIG, rounds=0))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=rf"holds a training with other {different}; name another, or delete it"):
        trained(tmp_path, config, predictor)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("name", ["round-0/notes.txt", "part/notes.txt", "training.json"])
def test_rounds_take_the_place_of_nothing_else(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match="name another folder"):
        trained(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / name]
    assert (tmp_path / name).read_text() == "[]"


@pytest.mark.parametrize("place", ["part", "round-1"])
def test_what_was_put_into_a_round_stays(whole, tmp_path, place):
    trained(tmp_path, replace(CONFIG, rounds=1))
    (tmp_path / place).mkdir(exist_ok=True)
    (tmp_path / place / "notes.txt").write_text("another's")
    (tmp_path / "round-0" / "curve.json").unlink()
    with pytest.raises(ValueError, match=r"notes\.txt; name another folder, or move that"):
        trained(tmp_path)
    (tmp_path / place / "notes.txt").rename(tmp_path / "notes.txt")
    assert_same_result(trained(tmp_path), whole)
    assert (tmp_path / "notes.txt").read_text() == "another's"


def test_other_prompts_are_another_training(tmp_path):
    trained(tmp_path, replace(CONFIG, rounds=0))
    with pytest.raises(ValueError, match="other runs"):
        World(reacting).train(small(), CONFIG, prompts=4, folder=tmp_path)


# --- what is kept in memory, and errors


def test_runs_keep_their_dtype_and_no_more_features_than_needed(monkeypatch):
    world, kept = World(reacting, dtype=torch.bfloat16), []
    add = training._Task.add

    def watched(self, *runs):
        add(self, *runs)
        kept.append(self)

    monkeypatch.setattr(training._Task, "add", watched)
    result = world.train(small(), CONFIG)
    assert len(kept[-1].sets) == 4 and all(math.isfinite(score) for score in result.scores)
    for runs, validation in kept[-1].sets:
        assert runs.features.shape == (8, 1, len(kept[-1].problem.full), TOKENS, CHANNELS)
        assert validation.features.shape[0] == 4
        assert {t.dtype for t in runs} == {torch.bfloat16}


def test_the_loss_changes_no_data():
    predictor = small()
    problem = Problem(predictor, head, "latents")
    runs = Runs.stack(World(reacting).runs(range(2)), ["cond"])
    before = [t.clone() for t in runs]
    problem.loss(
        {"cond": predictor.stream_rows("cond", problem.grid, problem.pasts)}, runs, runs, closed_loop=False
    ).backward()
    assert all(torch.equal(a, b) for a, b in zip(runs, before, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(loss="mse"), "a loss is one of latents, features, got 'mse'"),
        (dict(updates=(-1, 5)), "updates are two numbers from 0 on"),
        (dict(updates=(5,)), "updates are two numbers"),
        (dict(rounds=-1), "and rounds one, got .* and -1"),
        (dict(batch=0), "at least 1, got 0 and 20"),
        (dict(check_every=0), "at least 1, got 16 and 0"),
        (dict(learning_rate=0.0), "a learning rate is positive, got 0.0"),
        (dict(learning_rate=math.nan), "a learning rate is positive, got nan"),
        (dict(floor=-math.inf), "a floor is a number of dB, got -inf"),
    ],
)
def test_a_config_out_of_range_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes)


def test_the_papers_recipe():
    paper = Config.paper()
    assert (paper.loss, paper.learning_rate, paper.free_alphas) == ("features", 1e-4, False)


def test_without_updates_nothing_changes():
    lesa = small()
    result = trained(config=Config(updates=(0, 0), rounds=1), predictor=lesa)
    for stage, expert in enumerate(lesa.stage_experts("cond")):
        assert torch.equal(expert.weight, result.predictor.stage_experts("cond")[stage].weight)
    assert [entry["update"] for entry in result.curve.entries] == [0, 0]


def too_late(_predictor, _lesson):
    pytest.fail("the training has begun")


def other_tokens(run):
    return replace(run, tokens=run.tokens + 1)


def other_grid(run):
    return replace(run, grid=GRID**2)


NO_COND = dict(features={"uncond": torch.zeros(STEPS, TOKENS, CHANNELS)})


@pytest.mark.parametrize(
    ("reference", "validation", "message"),
    [
        (lambda runs: [], lambda runs: runs, "needs recorded runs, got none; collect some"),
        (lambda runs: runs, lambda runs: [], "needs recorded runs, got none"),
        (lambda runs: [*runs, other_tokens(runs[0])], lambda runs: runs, "all runs share grid and tokens"),
        (lambda runs: [*runs, other_grid(runs[0])], lambda runs: runs, "all runs share grid and tokens"),
        (lambda runs: runs, lambda runs: [other_tokens(run) for run in runs], "all runs share grid and tokens"),
        (lambda runs: [replace(runs[0], **NO_COND)], lambda runs: runs, "recorded no stream 'cond'"),
        (lambda runs: [replace(runs[0], full=(0, 5))], lambda runs: runs, "reference runs have every step full"),
        (lambda runs: runs, lambda runs: [replace(runs[0], full=(0, 5))], "reference runs have every step full"),
    ],
)
def test_runs_that_do_not_fit_are_an_error_before_the_training(reference, validation, message):
    runs = World(reacting).runs(range(2))
    with pytest.raises(ValueError, match=message):
        train(small(), [Lesson(reference(runs), validation(runs))], head, too_late, CONFIG)


@pytest.mark.parametrize(
    ("predictor", "message"),
    [
        (lambda: L2P(origin(grid=torch.linspace(1, 0, STEPS + 1))), "trained for 16 steps .*, got 16 steps"),
        (lambda: L2P(origin("every:1")), "nothing to forecast where .*'every:1'.* skips no step"),
        (lambda: LESA.paper(origin()), "cannot hold these alphas"),
        (lambda: small(streams=("cond", "uncond")), "recorded no stream 'uncond'"),
    ],
)
def test_a_predictor_that_does_not_fit_is_an_error_before_the_training(predictor, message):
    runs = World(reacting).runs(range(2))
    with pytest.raises(ValueError, match=message):
        train(predictor(), [Lesson(runs, runs)], head, too_late, CONFIG)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda runs: runs[:-1], "runs come one for each reference run"),
        (lambda runs: runs[::-1], "runs come one for each reference run"),
        (
            lambda runs: [replace(run, full=tuple(range(STEPS))) for run in runs],
            "a round's runs are accelerated by LESA",
        ),
        (lambda runs: [replace(run, latents=run.latents + 1) for run in runs], "starts from other noise"),
        (lambda runs: [other_tokens(run) for run in runs], "all runs share grid and tokens"),
    ],
)
@pytest.mark.parametrize("which", [0, 1])
def test_rounds_that_do_not_fit_are_an_error(which, change, message):
    world = World(reacting)

    def record_runs(predictor, _lesson):
        recorded = [world.runs(range(2), predictor), world.runs(range(2), predictor)]
        recorded[which] = change(recorded[which])
        return recorded[0], recorded[1]

    runs = world.runs(range(2))
    with pytest.raises(ValueError, match=message):
        train(small(), [Lesson(runs, runs)], head, record_runs, CONFIG)


def test_drift_is_in_decibels_of_the_last_latents():
    reference = World(bending).runs(range(3))
    off = [replace(run, latents=torch.cat([run.latents[:-1], run.latents[-1:] * 1.1])) for run in reference]
    assert drift(off, reference) == pytest.approx(-20, abs=1e-4)
    assert drift(reference, reference) == pytest.approx(-120, abs=1e-6)
    with pytest.raises(ValueError, match="runs come one for each"):
        drift(off[:2], reference)


@pytest.mark.parametrize("closed_loop", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_projection_is_trained_on_folded_features_and_gives_the_same_loss(bias, closed_loop):
    torch.manual_seed(0)
    projection = torch.nn.Linear(CHANNELS, OUT, bias=bias).requires_grad_(False)
    head = Projection(projection)
    world, free = World(bending), LESA(origin(), **SMALL)
    for expert in free.stage_experts("cond"):
        expert.bias.data += 0.3  # offsets count
    losses = []
    for whole in (head, projection_of(projection)):
        problem = Problem(free, whole, "latents")
        assert problem.projection is (head if whole is head else None)
        reference, runs = (problem.fold(Runs.stack(world.runs(seeds), BOTH[:1])) for seeds in (range(3), range(3, 6)))
        assert runs.features.shape[-1] == (OUT if whole is head else CHANNELS)
        runs = runs.at(problem.full) if closed_loop else runs
        losses.append(
            problem.loss({"cond": free.stream_rows("cond", GRID, problem.pasts)}, runs, reference, closed_loop)
        )
    torch.testing.assert_close(losses[0], losses[1])


def projection_of(projection):
    return lambda features, _conditioning: projection(features)
