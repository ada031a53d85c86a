"""Calibrate: what is solved on, what is checked, what is kept, and where."""

import errno
import json
from itertools import count

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from tiny import TRAINED
from zoo.pipelines import ZOO

import lesa
from lesa.cli import main
from lesa.host.pipelines import with_call
from lesa.learn.calibrate import CalibrateOptions, _walk, calibrate, split, usual_budget
from lesa.learn.rivals import UNTRAINED
from lesa.learn.solve import Solver
from lesa.predictors.calibration import Quality
from lesa.predictors.curve import SOLVED, Point, Tried
from lesa.predictors.shelf import Shelf

CALL = dict(height=32, width=32, num_inference_steps=6, max_sequence_length=16)
PROMPTS = ["small red apple on white, left", "large blue fish on grey, right", "small green pear on grey, left"]
FAST = CalibrateOptions(refine=1, most=4, progress=False)


@pytest.fixture(scope="module")
def pipe(tiny_flux):
    pipe = with_call(type(tiny_flux)(**tiny_flux.components), CALL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    return Shelf(tmp_path / "shelf")


def draw(pipe, prompt: str = "large red fish on white, right") -> torch.Tensor:
    return pipe(prompt, generator=torch.Generator().manual_seed(5), output_type="latent").images


def rows_of(predictor) -> tuple:
    return predictor.schedule, predictor.coefficients.tolist()


def test_calls_that_are_checked_are_not_solved_on():
    for calls, held in ((1, 0), (3, 0), (4, 1), (8, 2), (12, 4)):
        names = [str(k) for k in range(calls)]
        solved_on, checked_on = split(names, CalibrateOptions())
        assert len(solved_on[0]) == calls - held and len(checked_on[0]) == (held or calls)
        assert not set(solved_on[1]) & set(checked_on[1])
        assert held == 0 or not set(solved_on[0]) & set(checked_on[0])
    with pytest.raises(ValueError, match=r"of 2 calls, 2 cannot be held out"):
        split(["a", "b"], CalibrateOptions(checked=2))
    for calls, held, checked in ((1, 0, 4), (3, 0, 6), (4, 2, 2), (5, 2, 2), (12, 6, 6)):
        names = [str(k) for k in range(calls)]
        solved_on, checked_on = split(names, CalibrateOptions(), promising=True)
        assert len(solved_on[0]) == calls - held and len(checked_on[0]) == len(set(checked_on[1])) == checked
        assert not set(solved_on[1]) & set(checked_on[1])
    with pytest.raises(ValueError, match=r"two checked calls or more, .* got 1"):
        split(["a", "b"], CalibrateOptions(checked=1), promising=True)
    again = split(["a", "b"], CalibrateOptions(seed=1))
    assert not set(again[0][1]) & set(split(["a", "b"], CalibrateOptions())[0][1])


@pytest.mark.parametrize(("steps", "budget"), [(50, 8), (28, 5), (20, 3), (8, 2), (4, 2), (1, 1)])
def test_a_budget_that_nobody_names(steps, budget):
    assert usual_budget(steps) == budget


def test_a_calibration_is_kept_and_found_and_says_what_it_promises(pipe, shelf):
    points = []
    predictor = calibrate(
        pipe, PROMPTS, None, FAST, budgets=(2, 3), shelf=shelf, on_point=lambda point, pictures: points.append(pictures)
    )
    curve = predictor.curve
    assert [point.full_steps for point in curve.points] == [3, 2] and len(predictor.full) == 3
    assert all(x.shape == (32, 32, 3) for pictures in points for x in pictures) and len(points) == 2
    for point in curve.points:
        assert point.tried[0].rows == SOLVED and len(point.tried) > 5 and not point.left_out
        assert all(len(one.drift) == len(one.psnr) == 3 for one in point.tried)
        assert point.kept.score("drift").mean == min(one.score("drift").mean for one in point.tried)
        assert point.transformer_runs["reference"] == 2 * 18 and point.transformer_runs["checks"] > 0
    (kept,) = shelf.all()
    assert kept.budgets == (2, 3) and kept.chosen == 3
    assert kept.checked(2)["drift"].mean == pytest.approx(curve.at(2).kept.score("drift").mean)
    assert rows_of(kept.predictor(3)) == rows_of(predictor)
    with lesa.accelerate(pipe, kept.predictor(2)) as run:
        draw(pipe)
    assert run.summary()["cond"].full_steps == 2


def test_what_is_kept_draws_what_was_measured(pipe, shelf):
    predictor = calibrate(pipe, PROMPTS, None, FAST, budget=3, shelf=shelf)
    checked = split(PROMPTS, FAST)[1]
    reference = [lesa_run(pipe, *pair) for pair in zip(*checked, strict=True)]
    with lesa.accelerate(pipe, predictor):
        drawn = [lesa_run(pipe, *pair) for pair in zip(*checked, strict=True)]
    for x, wanted, drift in zip(drawn, reference, predictor.curve.points[0].kept.drift, strict=True):
        off = 10 * torch.log10((x - wanted).double().square().sum() / wanted.double().square().sum())
        assert float(off) == pytest.approx(drift, abs=1e-2)


def lesa_run(pipe, prompt: str, seed: int) -> torch.Tensor:
    return pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="latent").images


def test_a_stopped_calibration_goes_on(pipe, shelf, monkeypatch):
    whole = calibrate(pipe, PROMPTS, None, FAST, budgets=(3, 2), shelf=Shelf(shelf.folder.parent / "other"))
    solve, calls = Solver.solve, count()

    def stopped(self, *args, **kwargs):
        if next(calls):
            raise KeyboardInterrupt
        return solve(self, *args, **kwargs)

    monkeypatch.setattr(Solver, "solve", stopped)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, PROMPTS, None, FAST, budgets=(3, 2), shelf=shelf)
    assert not shelf.all()
    done = []
    monkeypatch.setattr(
        Solver, "solve", lambda self, budget, **kwargs: done.append(budget) or solve(self, budget, **kwargs)
    )
    again = calibrate(pipe, PROMPTS, None, FAST, budgets=(3, 2), shelf=shelf)
    assert done == [2]
    assert [point.tried for point in again.curve.points] == [point.tried for point in whole.curve.points]
    assert rows_of(again) == rows_of(whole) and len(shelf.all()) == 1
    assert not list(shelf.folder.glob(".under-way/*/*"))


def stop(*_args):
    raise KeyboardInterrupt


def test_another_sampler_does_not_go_on_with_what_was_stopped(pipe, shelf):
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipe, PROMPTS[:2], None, FAST, budgets=(3, 2), shelf=shelf, on_point=stop)
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with_call(other, CALL)
    found = calibrate(other, PROMPTS[:2], None, FAST, budget=3, shelf=shelf)
    assert found.grid.tolist() != calibrate(pipe, PROMPTS[:2], None, FAST, budget=3, shelf=shelf).grid.tolist()


def test_a_second_process_is_refused_until_the_first_is_gone(pipe, shelf):
    refused = []

    def again(*_):
        with pytest.raises(
            RuntimeError, match=r"another process is calibrating into .*; wait for it, or end it"
        ) as one:
            calibrate(pipe, PROMPTS[:2], None, FAST, budget=3, shelf=shelf)
        refused.append(one)

    calibrate(pipe, PROMPTS[:2], None, FAST, budget=3, shelf=shelf, on_point=again)
    calibrate(pipe, PROMPTS[:2], None, FAST, budget=3, shelf=shelf)
    assert len(refused) == 1


@pytest.mark.parametrize("where", ["lesa.learn.journal", "lesa.predictors.calibration"])
def test_a_full_disk_is_said_and_nothing_is_lost(where, pipe, shelf, monkeypatch):
    def full(path, _data):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(f"{where}.write_atomically", full)
        with pytest.raises(OSError, match="the disk is full; free some space and calibrate again") as raised:
            calibrate(pipe, PROMPTS[:2], None, FAST, budget=3, shelf=shelf)
    assert str(shelf.folder) in str(raised.value) and not shelf.all()
    calibrate(pipe, PROMPTS[:2], None, FAST, budget=3, shelf=shelf)
    assert len(shelf.all()) == 1 and not list(shelf.folder.glob("*/.*"))


def test_a_shelf_that_cannot_be_written_to_is_said_before_the_work(pipe, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(Solver, "__init__", stop)
    with pytest.raises(OSError, match="let LESA_HOME name a folder that can be written to"):
        calibrate(pipe, PROMPTS[:2], None, FAST, budget=3, shelf=Shelf(tmp_path / "file"))


def test_rows_without_training_are_kept_where_they_are_better(pipe, shelf, monkeypatch):
    """A solver that is as bad as can be: its rows are zero."""
    solve = Solver.solve

    def zeros(self, budget, **kwargs):
        solution = solve(self, budget, **kwargs)
        with torch.no_grad():
            solution.predictor.coefficients.zero_()
        return solution

    monkeypatch.setattr(Solver, "solve", zeros)
    predictor = calibrate(pipe, PROMPTS, None, FAST, budget=3, shelf=shelf)
    (point,) = predictor.curve.points
    assert not point.is_solved and point.kept.schedule == str(predictor.schedule)
    assert f"| {point.kept.rows} |" in predictor.curve.table()
    assert predictor.origin.training["drift"] == pytest.approx(point.kept.score("drift").mean)
    forecaster = {repr(one): one for one in UNTRAINED}[point.kept.rows]
    with lesa.accelerate(pipe, forecaster, schedule=predictor.schedule):
        wanted = draw(pipe)
    with lesa.accelerate(pipe, predictor):
        assert torch.allclose(draw(pipe), wanted, atol=1e-5)


def test_a_target_is_kept_by_the_fewest_full_steps_of_those_named(pipe, shelf):
    curve = calibrate(pipe, PROMPTS, None, FAST, budgets=(2, 3, 4), target="drift:100", shelf=shelf).curve
    middle = curve.at(3).kept.score("drift").bound + 1e-3
    predictor = calibrate(pipe, PROMPTS, None, FAST, budgets=(2, 3, 4), target=f"drift:{middle}", shelf=shelf)
    least = min(point.full_steps for point in curve.points if point.kept.score("drift").bound <= middle)
    assert len(predictor.full) == least == shelf.all()[0].chosen
    assert shelf.all()[0].budget_for(quality=f"drift:{middle}") == least
    with pytest.raises(LookupError, match="keeps drift:-119"):
        calibrate(pipe, PROMPTS, None, FAST, budgets=(2,), target="drift:-119", shelf=shelf)


def test_a_target_without_budgets_is_looked_for(pipe, shelf):
    loose = calibrate(pipe, PROMPTS, None, FAST, target="drift:20", shelf=shelf)
    assert len(loose.full) == 1
    strict = calibrate(
        pipe, PROMPTS, None, FAST, target=f"drift:{loose.curve.points[0].kept.score('drift').mean - 1}", shelf=shelf
    )
    assert len(strict.full) > 2


@pytest.mark.parametrize(
    ("enough", "tried"),
    [
        (8, [8, 7]),
        (6, [8, 7, 6, 5]),
        (9, [8, 10, 9]),
        (12, [8, 10, 12, 11]),
        (1, [8, 7, 6, 5, 4, 3, 2]),
        (99, [8, 10, 12, 13]),
    ],
)
def test_the_fewest_full_steps_that_are_enough_are_looked_for_up_and_down(enough, tried):
    """From 8 on, of 14 steps, two of which have to be full."""
    seen: list[int] = []

    def found(budget):
        seen.append(budget)
        return Point(budget, -40, (Tried(SOLVED, "at:0", (-50.0 if budget >= enough else -10.0,)),), {}, 1.0)

    _walk(found, Quality.parse("drift:-40"), 8, 2, 14)
    assert seen == tried


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (dict(budget=2, budgets=(3,)), "not both"),
        (dict(budget=0), "a full step or more"),
        (dict(budget=2.0), r"whole numbers of full steps, .*, got \(2\.0,\)"),
        (dict(budgets=(2, "3")), r"whole numbers of full steps, .*, got \(2, '3'\)"),
        (dict(budgets=8), r"budget=8 or budgets=\(4, 6, 8\), got 8"),
        (dict(target="psnr"), "psnr:40"),
        (dict(budget=99), "from 1 to 6"),
    ],
)
def test_what_cannot_be_calibrated(pipe, shelf, named, message):
    with pytest.raises(ValueError, match=message):
        calibrate(pipe, PROMPTS, None, FAST, shelf=shelf, **named)
    with pytest.raises(ValueError, match="needs prompts, or calls, got none"):
        calibrate(pipe, [], None, FAST, shelf=shelf)
    for one, kind in ((PROMPTS[0], "str"), (dict(prompt=PROMPTS[0]), "dict")):
        for work in (calibrate, lesa.collect, lambda pipe, calls, _folder: lesa.plan(pipe, [3], calls)):
            with pytest.raises(ValueError, match=f"a list of prompts .*, got a {kind}; list it"):
                work(pipe, one, shelf.folder)
    with pytest.raises(ValueError, match="most= is at least 1"):
        CalibrateOptions(most=0)


@pytest.mark.parametrize("target", ["psnr:61", "ssim:1.1", "lpips:-0.1", "drift:-121"])
def test_what_no_run_can_keep_is_refused_before_one_is_made(shelf, target):
    with pytest.raises(ValueError, match=f"where nothing differs, got the target {target}; ask for less"):
        calibrate(None, PROMPTS, None, FAST, target=target, shelf=shelf)


@pytest.mark.parametrize(
    ("name", "steps", "usual", "least"),
    [("wan22_guided", 6, 2, 2), ("modular_qwen_interval_guided", 6, 3, 3), ("flux_img2img_guided", 3, 2, 1)],
)
def test_budgets_are_of_the_steps_that_a_run_walks_and_that_have_to_be_full(shelf, name, steps, usual, least):
    """Where a second denoiser takes over, guidance begins and ends, or a run begins in mid-grid."""
    subject, done = ZOO[name](), []
    call = subject.arguments | (dict(strength=0.4) if least == 1 else {})
    options = CalibrateOptions(refine=0, most=1, pictures=False, rivals=False, progress=False)
    how = dict(shelf=shelf, on_point=lambda point, _pictures: done.append(point.full_steps))
    with subject.around():
        found = calibrate(subject.pipe, [call], None, options, **how)
        assert done == [usual] and f"| {usual} | {steps / usual:.2f} |" in found.curve.table()
        found = calibrate(subject.pipe, [call], None, options, target="drift:200", **how)
        assert len(found.full) == min(done) == least
        if least == 1:
            with pytest.raises(LookupError, match="keeps drift:-119"):
                calibrate(subject.pipe, [call], None, options, target="drift:-119", **how)
        wrong = least - 1 or steps + 1
        done.clear()
        with pytest.raises(ValueError, match=f"from {least} to {steps} full steps, got {wrong}"):
            calibrate(subject.pipe, [call], None, options, budgets=(steps, wrong), **how)
    assert not done, "said before any is calibrated"


@pytest.mark.parametrize(("target", "pictures"), [("psnr:40", False), ("lpips:0.1", True)])
def test_a_target_that_is_not_measured_is_refused_before_any_budget_is_calibrated(
    pipe, shelf, target, pictures, monkeypatch
):
    monkeypatch.setattr("lesa.learn.perceptual.lacking", lambda: "AlexNet's weights")
    monkeypatch.setattr(Solver, "solve", stop)
    options = CalibrateOptions(pictures=pictures, progress=False)
    reason = (
        "LPIPS is left out: it needs AlexNet's weights" if pictures else "measured by drift, got the target psnr:40"
    )
    with pytest.raises(ValueError, match=reason):
        calibrate(pipe, PROMPTS[:2], None, options, target=target, shelf=shelf)


def test_a_call_and_a_command_calibrate_alike(pipe, tiny_flux, tmp_path, capsys):
    model = tmp_path / "model"
    tiny_flux.save_pretrained(model)
    (model / "call.json").write_text(json.dumps(CALL))
    (model / "prompts.txt").write_text("\n".join(PROMPTS))
    (model / "calls.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in PROMPTS))
    found = []
    for named in (["--prompts", "prompts.txt"], ["--calls", "calls.jsonl"]):
        out = tmp_path / named[1].split(".")[0]
        options = [
            named[0],
            str(model / named[1]),
            "--budgets",
            "3,2",
            "--out",
            str(out),
            "--plot",
            str(tmp_path / "x.png"),
        ]
        assert main(["calibrate", str(model), *options]) in TRAINED
        found.append((out / "model.safetensors").read_bytes())
    said = capsys.readouterr()
    assert "| full steps | step ratio |" in said.out and "next: lesa generate" in said.err
    assert (tmp_path / "x.png").exists()
    ours = calibrate(lesa.load(model), PROMPTS, tmp_path / "ours", budgets=(3, 2), shelf=Shelf(tmp_path / "shelf"))
    assert found[0] == found[1] == (tmp_path / "ours" / "model.safetensors").read_bytes()
    assert (
        main(["generate", str(model), "x", "--predictor", str(tmp_path / "ours"), "--out", str(tmp_path / "y.png")])
        == 0
    )
    assert len(ours.full) == 3
