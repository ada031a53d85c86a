"""Without a forecaster, what fits a run is found at its first step; what does not is refused, by name."""

import copy
import warnings

import pytest
import torch
from tiny import build_transformer

import lesa
from lesa.host.facts import listen
from lesa.host.tap import tap_of
from lesa.predictors import LESA, Origin, Solved, configuration
from lesa.predictors.fingerprint import fingerprint
from lesa.predictors.shelf import Shelf
from lesa.rows.default import Default
from lesa.rows.tap import Tap

CALL = dict(height=32, width=32, num_inference_steps=8, max_sequence_length=16, output_type="latent")
GUIDED = dict(negative_prompt="fish", true_cfg_scale=3.0)
CHECKED = {"3": {"psnr": {"mean": 40.0, "worst": 35.0}}, "5": {"psnr": {"mean": 50.0}}}
TABLE = {"chosen": 5, "checked": CHECKED}


def draw(pipe, **call):
    with torch.no_grad():
        return pipe("pear", generator=torch.Generator().manual_seed(0), **{**CALL, **call}).images


def weights_of(pipe) -> str:
    return fingerprint({"transformer": pipe.transformer})


def origin(pipe, times, schedule, tap=Tap(), streams=("all",), **training) -> Origin:  # noqa: B008
    name, config = type(pipe.transformer).__name__, configuration(pipe.transformer)
    return Origin("tiny", name, config, tap, times, schedule, streams, training=training)


def solved(pipe, times, *full) -> Solved:
    """Rows that are none of the untrained ones."""
    predictor = Solved(origin(pipe, times, "at:" + ",".join(map(str, full))))
    predictor.set_gaps(torch.eye(len(full), len(full) + 1).double() * 0.9)
    return predictor


def calibrate(pipe, table=TABLE, **call):
    """Put predictors for such calls on the shelf; returns them."""
    with listen(pipe) as facts:
        draw(pipe, **call)
    made = {3: solved(pipe, facts[0].times, 0, 3, 6), 5: solved(pipe, facts[0].times, 0, 1, 3, 5, 7)}
    return Shelf().put(weights_of(pipe), facts[0], made, table), made


@pytest.fixture
def pipe(tiny_flux):
    """A pipeline of its own, which nobody was warned of."""
    pipe = copy.copy(tiny_flux)
    pipe.transformer = build_transformer()
    return pipe


@pytest.fixture
def guided(tiny_qwen):
    return copy.copy(tiny_qwen)


def found(pipe, **options):
    """What a run does with what is found."""
    call = options.pop("call", {})
    with lesa.accelerate(pipe, **options) as run:
        images = draw(pipe, **call)
    return images, run


@pytest.mark.parametrize(("asked", "budget"), [({}, 5), ({"budget": 3}, 3), ({"quality": "psnr:39"}, 3)])
def test_what_was_calibrated_for_such_runs_is_taken(pipe, asked, budget):
    folder, made = calibrate(pipe)
    with lesa.accelerate(pipe, made[budget]):
        expected = draw(pipe)
    images, run = found(pipe, **asked)
    assert torch.equal(images, expected)
    assert run.plan().full == made[budget].full
    assert run.summary()["cond"].full_steps == budget and run.summary()["cond"].skipped_steps == 8 - budget
    assert run.summary().chosen == {f"calibrated: {folder.name}": 1}
    assert run.summary().promise.startswith(f"{budget} full of 8 steps: psnr {40 if budget == 3 else 50} dB")
    assert f"calibrated: {folder.name}, in 1 run\npromised, on prompts checked: {budget} full" in str(run.summary())


def test_guided_runs_get_their_rows_in_all_streams(guided):
    _, made = calibrate(guided, **GUIDED)
    with lesa.accelerate(guided, made[5]):
        expected = draw(guided, **GUIDED)
    images, run = found(guided, call=GUIDED)
    assert torch.equal(images, expected)
    assert [done.skipped_steps for done in run.summary().values()] == [3, 3]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (dict(num_inference_steps=7), "7 steps instead of 8"),
        (dict(sigmas=[1 - k / 9 for k in range(8)]), "other times"),
        (dict(true_cfg_scale=5.0), "guidance of 5 : -4 .*instead of 3 : -2"),
        (dict(true_cfg_scale=1.0), "the streams cond instead of cond and uncond"),
    ],
)
def test_a_run_that_none_fits_is_refused_by_what_differs_before_anything_is_skipped(guided, call, words):
    folder, _ = calibrate(guided, **GUIDED)
    with lesa.accelerate(guided) as run:
        with pytest.raises(ValueError, match=rf"none fits this run: {folder.name} .*{words}.*lesa\.calibrate\(pipe"):
            draw(guided, **{**GUIDED, **call})
        assert all(done.skipped_steps == 0 and done.full_steps == 1 for done in run.summary().values())
        draw(guided, **GUIDED)
        assert run.summary()["cond"].skipped_steps == 3


@pytest.mark.parametrize("fallback", ["full", Default(), "reuse"])
def test_a_fallback_runs_where_none_fits_and_is_counted(guided, fallback):
    calibrate(guided, **GUIDED)
    other = {**GUIDED, "true_cfg_scale": 5.0}
    named = lesa.Reuse()
    named.schedule = lesa.Schedule.every(4)
    fallback = named if fallback == "reuse" else fallback
    expected = draw(guided, **other)
    if fallback != "full":
        with lesa.accelerate(guided, fallback):
            expected = draw(guided, **other)
    with lesa.accelerate(guided, fallback=fallback) as run:
        assert torch.equal(draw(guided, **other), expected)
        draw(guided, **GUIDED)
    assert run.summary().fallbacks == 1 and len(run.summary().chosen) == 2
    assert "1 run fitted no predictor, and fell back" in str(run.summary())
    assert (fallback == "full") == ("fallback: every step full" in run.summary().chosen)


def test_without_any_predictor_a_default_runs_and_says_so_once(pipe):
    with lesa.accelerate(pipe, Default()) as run:
        expected = draw(pipe)
    with lesa.accelerate(pipe) as run:
        with pytest.warns(UserWarning, match=r"without training.*lesa\.calibrate\(pipe, prompts, budget=8\)"):
            assert torch.equal(draw(pipe), expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert found(pipe, budget=3)[1].summary()["cond"].full_steps == 3
    assert run.summary().chosen == {"default: Default()": 2} and not run.summary().promise


def test_what_is_calibrated_or_removed_meanwhile_counts_from_the_next_run_on(pipe):
    with lesa.accelerate(pipe) as run:
        with pytest.warns(UserWarning, match="without training"):
            draw(pipe)
        folder, _ = calibrate(pipe)
        draw(pipe)
        Shelf().remove(folder.name)
        draw(pipe)
    assert run.summary().chosen == {"default: Default()": 3, f"calibrated: {folder.name}": 1}  # one while calibrating


def test_other_weights_are_others(pipe):
    folder, _ = calibrate(pipe)
    with lesa.accelerate(pipe) as run:
        draw(pipe)
        with torch.no_grad():
            pipe.transformer.proj_out.weight.mul_(1.1)
        with pytest.warns(UserWarning, match="without training"):
            draw(pipe)
    assert list(run.summary().chosen) == [f"calibrated: {folder.name}", "default: Default()"]


def test_the_weights_are_looked_at_again_only_when_they_change(pipe, monkeypatch):
    calibrate(pipe)
    looked = []
    monkeypatch.setattr("lesa.host.found.fingerprint", lambda some: looked.append(0) or fingerprint(some))
    with lesa.accelerate(pipe):
        for _ in range(3):
            draw(pipe)
    assert len(looked) == 1


def ship(pipe, folder, times, place="feature"):
    """Let a predictor lie beside the pipeline's files."""
    tap = tap_of(pipe.transformer, place)
    made = LESA(origin(pipe, times, "every:3", tap, ("cond",)), memories=(2, 2, 2), hidden=(4,))
    made.save_pretrained(folder / "lesa" / "mine")
    pipe._lesa_home = str(folder)
    return made


def times_of(pipe, **call):
    with listen(pipe) as facts:
        draw(pipe, **call)
    return facts[0].times


@pytest.mark.parametrize("place", ["feature", "output"])
def test_what_is_shipped_runs_at_its_own_tap_where_nothing_was_calibrated(pipe, tmp_path, place):
    made = ship(pipe, tmp_path, times_of(pipe), place)
    with lesa.accelerate(pipe, made):
        expected = draw(pipe)
    images, run = found(pipe)
    assert torch.equal(images, expected)
    (label,) = run.summary().chosen
    assert label.startswith("trained: LESA") and not run.summary().promise
    with lesa.accelerate(pipe), pytest.raises(ValueError, match=r"none fits this run: .*trained for 8 steps .*got 6"):
        draw(pipe, num_inference_steps=6)
    with lesa.accelerate(pipe, budget=4), pytest.raises(ValueError, match="for 3 full steps, got a budget of 4"):
        draw(pipe)


@pytest.mark.parametrize("place", ["feature", "output"])
def test_what_was_calibrated_wins_over_what_is_shipped_for_the_same_grid(pipe, tmp_path, place):
    shipped = ship(pipe, tmp_path, times_of(pipe, num_inference_steps=6), place)
    _, made = calibrate(pipe)
    with lesa.accelerate(pipe, shipped):
        expected = [draw(pipe, num_inference_steps=6)]
    with lesa.accelerate(pipe, made[5]):
        expected.append(draw(pipe))
    with lesa.accelerate(pipe) as run:
        for _ in range(2):
            assert torch.equal(draw(pipe, num_inference_steps=6), expected[0])
            assert torch.equal(draw(pipe), expected[1])
    assert sorted(run.summary().chosen.values()) == [2, 2]


def test_a_calibration_may_lie_beside_the_model_or_in_a_named_place(pipe, tmp_path):
    folder, made = calibrate(pipe)
    Shelf().export(folder.name, tmp_path / "lesa" / "mine")
    Shelf().remove(folder.name)
    with lesa.accelerate(pipe, made[5]):
        expected = draw(pipe)
    images, run = found(pipe, hub=str(tmp_path / "lesa" / "mine"))
    assert torch.equal(images, expected) and run.summary().chosen == {"calibrated: mine": 1}
    pipe._lesa_home = str(tmp_path)
    assert torch.equal(found(pipe)[0], expected)
    with torch.no_grad():
        pipe.transformer.proj_out.weight.mul_(1.1)
    with pytest.raises(ValueError, match=r"mine is for other runs \(other weights\)"):
        found(pipe, hub=str(tmp_path / "lesa" / "mine"))


def test_a_damaged_predictor_is_named_and_not_run(pipe):
    folder, _ = calibrate(pipe)
    (folder / "5-full" / "model.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match=rf"{folder / '5-full'} is to hold a predictor, which cannot be read"):
        with pytest.raises(ValueError, match="5-full cannot be read"):
            found(pipe)
        found(pipe, fallback="full")
    assert found(pipe, budget=3)[1].summary()["cond"].full_steps == 3


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (dict(budget=4), "calibrated for the budgets 3, 5, got 4"),
        (dict(quality="psnr:60"), "promises psnr 50 at best, with 5 full steps"),
    ],
)
def test_a_budget_that_was_not_calibrated_is_refused(pipe, asked, words):
    calibrate(pipe)
    with pytest.raises(ValueError, match=words):
        found(pipe, **asked)


def test_what_makes_no_sense_is_refused_at_once(pipe):
    for options, words in (
        (dict(quality="good"), "quality reads psnr:40"),
        (dict(fallback="never"), "fallback is 'refuse', 'full', 'default' or a forecaster, got 'never'"),
        (dict(fallback=lesa.Taylor(1)), "a fallback says which of its steps are full"),
        (dict(forecaster=lesa.Taylor(1), schedule=lesa.Schedule.every(2), quality="psnr:40"), "leave them out"),
        (dict(forecaster=lesa.Taylor(1), schedule=lesa.Schedule.every(2), fallback="never"), "got 'never'"),
    ):
        with pytest.raises(ValueError, match=words):
            lesa.accelerate(pipe, **options)
    with pytest.raises(ValueError, match=r"a quality chooses among calibrated .* target='psnr:40'"):
        found(pipe, quality="psnr:40")
    with pytest.raises(FileNotFoundError):
        lesa.accelerate(pipe, hub="/nowhere/at/all")
