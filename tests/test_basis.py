"""Rows carried to other grids: exact where outputs are polynomials in t, the same on their own grid, else refused."""

import math
from typing import Any

import pytest
import torch
from test_solve import CALL, PROMPTS

import lesa
from lesa.host.facts import listen
from lesa.learn import counted
from lesa.learn.bases import basis_of
from lesa.learn.calibrate import CalibrateOptions, calibrate
from lesa.learn.solve import Solver
from lesa.predictors import Predictor
from lesa.predictors.fingerprint import fingerprint
from lesa.predictors.shelf import Shelf
from lesa.predictors.solved import Solved
from lesa.rows.basis import Basis, check_reach
from lesa.rows.between import interpolation
from lesa.rows.gaps import Gaps
from lesa.rows.schedule import Schedule

FULL = (0, 9, 15, 18)


def grid(steps: int, shift: float = 3.0) -> torch.Tensor:
    """The times of flow matching under a shift."""
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * even / (1 + (shift - 1) * even)


def euler(times: torch.Tensor) -> torch.Tensor:
    steps = len(times) - 1
    return times.diff().repeat(steps + 1, 1) * torch.ones(steps + 1, steps).tril(-1)


class Field:
    """Calls whose velocities are polynomials in t, and answer a drift by a multiple of it in proportion to 1 / t."""

    def __init__(self, degree: int, answer: float, calls: int = 5, elements: int = 40):
        random = torch.Generator().manual_seed(0)
        self.noise = torch.randn(calls, elements, generator=random, dtype=torch.float64)
        self.powers = torch.randn(calls, degree + 1, elements, generator=random, dtype=torch.float64)
        self.answer = answer

    def outputs(self, times: torch.Tensor) -> torch.Tensor:
        """(calls, S, elements) of the reference runs."""
        return torch.einsum("sd,pdn->psn", times[:-1, None] ** torch.arange(self.powers.shape[1]), self.powers)

    def gram(self, times: torch.Tensor, count: int) -> torch.Tensor:
        """The inner products of a basis without anything that is unlike a multiple of drifts."""
        vectors = torch.cat([self.outputs(times), self.noise[:, None]], 1)
        known = (vectors @ vectors.mT).mean(0)
        return torch.block_diag(known, torch.zeros(count, count, dtype=torch.float64))

    def basis(self, times: torch.Tensor, full=FULL) -> Basis:
        gaps, answers = Gaps(euler(times), full), self.answer / times[list(full)]
        made = Basis.of(times, self.gram(times, len(full)), answers, gaps, gaps.reuse())
        return Basis.of(times, made.gram, answers, gaps, made.solve(euler(times), full).rows)

    def run(self, times: torch.Tensor, full, rows: torch.Tensor) -> torch.Tensor:
        """Return |x - x_ref|^2 at the end of real runs, a mean over calls."""
        outputs, drift, held = self.outputs(times), torch.zeros_like(self.noise), []
        for step, ahead in enumerate(times.diff()):
            if step in full:
                held.append(outputs[:, step] + self.answer / times[step] * drift)
                velocity = held[-1]
            else:
                row = rows[len(held) - 1]
                velocity = sum(c * v for c, v in zip(row, held, strict=False)) + row[-1] * self.noise
            drift = drift + ahead * (velocity - outputs[:, step])
        return drift.square().sum(1).mean()


@pytest.mark.parametrize("answer", [0.0, 0.9])
@pytest.mark.parametrize("steps", [20, 28, 36])
def test_rows_are_exact_on_other_grids_where_outputs_are_cubic_in_time(steps, answer):
    field, there = Field(3, answer), grid(steps)
    carried = field.basis(grid(50)).at(there)
    torch.testing.assert_close(carried.gram, field.gram(there, len(FULL)), rtol=0, atol=1e-6)
    rows, left = carried.solve(euler(there), FULL)
    torch.testing.assert_close(rows, field.basis(there).solve(euler(there), FULL).rows, rtol=0, atol=1e-2)
    assert left == pytest.approx(float(field.run(there, FULL, rows)), rel=1e-3, abs=1e-9)


def test_what_algebra_says_of_any_rows_is_where_runs_end():
    field, times = Field(5, 0.9), grid(28)
    basis, gaps = field.basis(times), Gaps(euler(times), FULL)
    for rows in (gaps.reuse(), basis.solve(euler(times), FULL).rows, gaps.reuse() * 0.9):
        assert basis.left(euler(times), FULL, rows) == pytest.approx(float(field.run(times, FULL, rows)), rel=1e-6)


def test_full_steps_are_chosen_near_the_times_recorded_and_leave_less():
    basis = Field(9, 0.9).basis(grid(50), (0, 30, 41, 47)).at(grid(28))
    assert basis.nearest == (0, 17, 23, 26)
    assert basis.at(grid(20, 3.2)).nearest[0] == 0
    chosen = basis.search(euler(grid(28)))
    left = [basis.solve(euler(grid(28)), full).left for full in (chosen, basis.nearest)]
    assert left[0] <= left[1]


@pytest.mark.parametrize("count", [1, 4, 9])
def test_interpolation_is_exact_for_cubic_polynomials_and_at_what_is_known(count):
    known = grid(12)[:-1]
    times = torch.linspace(float(known[0]), float(known[-1]), count, dtype=torch.float64)
    for degree in range(4):
        torch.testing.assert_close(interpolation(known, times) @ known**degree, times**degree, rtol=0, atol=1e-12)
    torch.testing.assert_close(interpolation(known, known), torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("times", "words"),
    [
        (grid(60), r"from 1\.0000 to 0\.0577, where they were recorded, got 1\.0000 to 0\.0484; calibrate with more"),
        (grid(19), "carried to 40% of these or more, got 19"),
        (torch.tensor([1.0, 0.5, 0.5, 0.0]), "whose times fall at every step"),
    ],
)
def test_beyond_what_was_recorded_rows_are_not_carried(times, words):
    check_reach(grid(50), grid(20))
    with pytest.raises(ValueError, match=words):
        Field(2, 0.0).basis(grid(50)).at(times)


def test_rows_of_more_full_steps_than_a_run_has_are_not_carried():
    with pytest.raises(ValueError, match="4 full steps are carried to runs of as many steps or more, got 3"):
        Field(2, 0.0).basis(grid(7), (0, 2, 4, 6)).at(grid(3))


# --- answers


def mapped(times: torch.Tensor, full, rows: torch.Tensor, outputs: torch.Tensor, noise: torch.Tensor):
    """Run where a denoiser answers a drift by 0.5 times it and a random map of it as large, in proportion to 1 / t.

    Returns |x - x_ref|^2 at the end, a mean over calls, and the drifts and answers of full steps, (calls, J, elements).
    """
    elements = noise.shape[1]
    change = torch.randn(elements, elements, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    drift, held, drifts, answers = torch.zeros_like(noise), [], [], []
    for step, ahead in enumerate(times.diff()):
        if step in full:
            drifts.append(drift)
            answers.append((0.5 * drift + 0.5 * drift @ change / elements**0.5) / times[step])
            held.append(outputs[:, step] + answers[-1])
        row = torch.eye(len(full), len(full) + 1)[len(held) - 1] if step in full else rows[len(held) - 1]
        velocity = sum(c * v for c, v in zip(row, held, strict=False)) + row[-1] * noise
        drift = drift + ahead * (velocity - outputs[:, step])
    return drift.square().sum(1).mean(), torch.stack(drifts, 1), torch.stack(answers, 1)


@pytest.mark.parametrize("full", [(0, 9, 15, 18), (0, 7, 17, 18), (0, 12, 13, 14), (0, 4, 10, 16)])
def test_what_a_denoiser_answers_to_other_drifts_has_their_angles(full):
    """Recorded on one schedule, a random map's answers on others are near enough for the drift to be known."""
    field, times = Field(9, 0.0, elements=300), grid(20)
    outputs, gaps = field.outputs(times), Gaps(euler(times), FULL, latents=False)
    _, drifts, answered = mapped(times, FULL, gaps.reuse(), outputs, field.noise)
    multiples = (answered * drifts).sum((0, 2)) / drifts.square().sum((0, 2)).clamp_min(1e-30)
    vectors = torch.cat([outputs, field.noise[:, None], answered - multiples[:, None] * drifts], 1)
    basis = Basis.of(times, (vectors @ vectors.mT).mean(0), multiples, gaps, gaps.reuse())
    rows = Gaps(euler(times), full, latents=False).reuse()
    left, real = basis.left(euler(times), full, rows), float(mapped(times, full, rows, outputs, field.noise)[0])
    assert 10 * math.log10(left / real) == pytest.approx(0, abs=1e-6 if full == FULL else 0.3)


# --- on real runs


@pytest.fixture(scope="module")
def solver(tiny_flux):
    return Solver(tiny_flux, PROMPTS, range(2), CALL)


def test_on_their_own_grid_rows_are_those_that_were_solved(solver):
    full = (0, 3, 5)
    found, _ = solver.rounds(full, 6)
    basis = basis_of(solver, found)
    assert basis is not None
    rows, left = basis.solve(solver.response, full)
    torch.testing.assert_close(rows, found.rows, rtol=0, atol=1e-4)
    assert 10 * math.log10(left / float(solver.errors(found.recordings).mean())) == pytest.approx(0, abs=0.02)


def test_of_large_latents_the_elements_that_are_kept_stand_for_all(tiny_flux, solver, monkeypatch):
    """Else algebra on a part of them would be held against what whole runs leave, and thrown away."""
    monkeypatch.setattr(counted, "ELEMENTS", 128)
    part = Solver(tiny_flux, PROMPTS, range(2), CALL)
    found, _ = part.rounds((0, 3, 5), 1)
    torch.testing.assert_close(part.gram.diagonal(), solver.gram.diagonal(), rtol=0.3, atol=0)
    assert part.reference[0].thinned == 2 and basis_of(part, found) is not None


def test_a_predictor_keeps_what_it_is_carried_by(solver, tmp_path):
    predictor, _ = solver.solve(schedule=Schedule.at([0, 3, 5]), refine=2)
    predictor.save_pretrained(tmp_path)
    loaded = Predictor.from_pretrained(tmp_path)
    assert isinstance(loaded, Solved) and loaded.digest() == predictor.digest()
    assert loaded.carried(predictor.grid, solver.response) is loaded
    six = torch.tensor([*(float(t) for t in solver.times[:-2:1]), 0.0], dtype=torch.float64)
    made, again = (one.carried(six, euler(six)) for one in (predictor, loaded))
    assert made.digest() == again.digest() and len(made.full) == 3 and made.grid.tolist() == six.tolist()
    assert made.origin.training["carried_from"] == 8 and math.isfinite(made.origin.training["drift"])


def test_refined_rows_stay_refined_by_as_much(solver):
    solved, refined = (solver.solve(schedule=Schedule.at([0, 3, 5]), refine=count).predictor for count in (0, 2))
    nudged = solver.times.clone()
    nudged[1:-1] *= 0.9999
    change, carried = refined.gaps - solved.gaps, [one.carried(nudged, euler(nudged)).gaps for one in (refined, solved)]
    assert change.abs().max() > 1e-4
    torch.testing.assert_close(carried[0] - carried[1], change, rtol=1e-2, atol=1e-4)


def test_rows_without_a_basis_are_not_carried(solver):
    made = solver.predictor((0, 3), torch.eye(2, 3, dtype=torch.float64))
    assert made.options() == {"latents": True}
    with pytest.raises(ValueError, match="nothing was kept to carry them"):
        made.carried(grid(7), euler(grid(7)))


def test_rows_solved_near_those_of_another_grid_try_no_schedule(tiny_flux, solver):
    there = Solver(tiny_flux, PROMPTS, range(2), dict(CALL, num_inference_steps=7))
    first, _ = solver.solve(schedule=Schedule.at([0, 3, 5]), refine=0)
    known = first.basis.at(there.times.double(), there.gram / 2)
    torch.testing.assert_close(known.gram[:8, :8], there.gram / 2, rtol=0, atol=0)
    found, report = there.solve(3, near=[first], refine=0)
    assert (
        known.solve(there.response, found.full).left <= known.solve(there.response, known.search(there.response)).left
    )
    assert report.tried == 0 and report.counts.search == 0 < report.counts.rounds
    assert report.drift == pytest.approx(there.rounds(found.full, 6)[0].drift)


def test_where_rows_cannot_be_carried_a_schedule_is_searched_for(tiny_flux, solver):
    there = Solver(tiny_flux, PROMPTS, range(2), dict(CALL, num_inference_steps=3))
    first, _ = solver.solve(schedule=Schedule.at([0, 5]), refine=0)
    found, report = there.solve(2, near=[first], refine=0, most=3)
    assert len(found.full) == 2 and report.tried > 0


def test_a_calibration_begins_near_another_of_the_same_weights(tiny_flux, tmp_path):
    shelf, options = Shelf(tmp_path), CalibrateOptions(most=3, refine=0, progress=False, pictures=False, rivals=False)
    calls: list[dict[str, Any]] = [dict(CALL, num_inference_steps=steps) for steps in (8, 7)]
    calibrate(tiny_flux, PROMPTS, None, options, budget=3, shelf=shelf, **calls[0])
    found = calibrate(tiny_flux, PROMPTS, None, options, budget=3, shelf=shelf, near=True, **calls[1])
    assert found.curve and found.curve.points[0].transformer_runs["search"] == 0 and len(shelf.all()) == 2
    with pytest.raises(LookupError, match="got none on the shelf"):
        calibrate(tiny_flux, PROMPTS, None, options, budget=3, shelf=Shelf(tmp_path / "new"), near=True, **calls[1])


# --- found at a run's first step


def draw(pipe, **call) -> torch.Tensor:
    return pipe(PROMPTS[0], generator=torch.Generator().manual_seed(3), output_type="latent", **call).images


@pytest.fixture
def calibrated(tiny_flux, solver, tmp_path, monkeypatch):
    """Put rows of 8 steps on a shelf of this test's own; returns their name."""
    monkeypatch.setenv("LESA_HOME", str(tmp_path))
    with listen(tiny_flux) as facts:
        draw(tiny_flux, **CALL)
    predictor, _ = solver.solve(schedule=Schedule.at([0, 3, 5]), refine=0)
    points = [{"transformer_runs": {"reference": 1000, "search": 200 + k}} for k in range(2)]
    table = {"checked": {"3": {"psnr": {"mean": 40.0}}}, "curve": {"points": points}}
    return Shelf().put(fingerprint({"transformer": tiny_flux.transformer}), facts[0], {3: predictor}, table).name


def test_rows_carried_to_other_times_are_found_and_it_is_said(tiny_flux, calibrated):
    call = dict(CALL, height=48)
    with lesa.accelerate(tiny_flux) as run:
        draw(tiny_flux, **call)
        draw(tiny_flux, **call)
    ((label, runs),) = run.summary().chosen.items()
    assert label == f"calibrated: {calibrated}, rows carried from 8 steps to 8 at other times" and runs == 2
    assert "by algebra, nothing checked; where calibrated, 3 full of 8 steps: psnr 40 dB" in run.summary().promise
    assert run.summary()["cond"].full_steps == 6


@pytest.mark.parametrize(
    ("call", "asked", "words"),
    [
        (
            {"num_inference_steps": 3},
            {},
            r"3 steps instead of 8\), and not carried to these: rows of 8 steps are carried to 40% of these or more",
        ),
        ({"num_inference_steps": 9}, {}, "rows are carried to times from 1.0000 to"),
        ({"height": 48}, {"quality": "psnr:30"}, "nothing was checked there, got quality 'psnr:30'"),
        ({"height": 48}, {"budget": 5}, "calibrated for the budgets 3, got 5"),
        ({"num_inference_steps": 6, "true_cfg_scale": 3.0, "negative_prompt": "fish"}, {}, "6 steps instead of 8; "),
    ],
)
def test_runs_that_rows_are_not_carried_to_are_refused(tiny_flux, calibrated, call, asked, words):
    with (
        pytest.raises(
            ValueError,
            match=rf"none fits this run: {calibrated} is for other runs .*{words}.* took 1,401 transformer runs",
        ),
        lesa.accelerate(tiny_flux, **asked),
    ):
        draw(tiny_flux, **{**CALL, **call})
