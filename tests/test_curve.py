"""What a calibration keeps: targets, promises, the table."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from lesa.predictors.calibration import SURE, Quality, Score, student
from lesa.predictors.curve import SOLVED, Curve, Point, Tried


def point(budget: int, drift: float, psnr: float = 40.0, rival: float = 0.0) -> Point:
    solved = Tried(SOLVED, "at:0,3", (drift, drift + 2), (psnr, psnr - 2), (0.99, 0.97))
    other = Tried("Reuse()", "at:0,4", (rival, rival), (psnr, psnr), (0.9, 0.9))
    return Point(budget, drift - 1, (solved, other), {"search": 3}, 1.0)


CURVE = Curve(50, (point(8, -50, 50), point(5, -40, 45), point(3, -30, 30)))


def test_what_ends_nearest_on_the_mean_is_kept():
    assert point(8, -50).kept.rows == SOLVED and point(8, -50).is_solved
    assert point(8, -50, rival=-60).kept.rows == "Reuse()" and not point(8, -50, rival=-60).is_solved
    assert point(8, -50, rival=-49).is_solved  # level: what was solved for


@pytest.mark.parametrize(
    ("target", "budget"), [("psnr:41", 5), ("psnr:41.2", 8), ("ssim:0.95", 3), ("drift:-25.5", 3), ("drift:-36.2", 8)]
)
def test_the_fewest_full_steps_whose_promise_keeps_a_target(target, budget):
    """Of PSNR 45 and 43, whose mean is 44, 41.04 is promised; of what is better the lower it is, more."""
    assert CURVE.least(Quality.parse(target)).full_steps == budget


def test_what_checked_calls_promise_of_others():
    """The bound of the mean at 90 %, by the quantiles of Student's t as tables have them."""
    for freedom, quantile in {1: 3.0777, 2: 1.8856, 3: 1.6377, 4: 1.5332, 5: 1.4759, 11: 1.3634, 99: 1.2902}.items():
        assert student(freedom) == pytest.approx(quantile, rel=0.04 if freedom == 1 else 0.004)
    values = (40.0, 44.0, 45.0, 47.0)
    assert Score.of("psnr", values).bound == pytest.approx(44 - 1.638 * (26 / 3) ** 0.5 / 2, abs=1e-2)
    for measure, sign in (("psnr", 1), ("ssim", 1), ("drift", -1), ("lpips", -1)):
        score = Score.of(measure, values)
        assert score.worst == (40 if sign == 1 else 47) and sign * score.promised < sign * score.mean == sign * 44
        alone = Score.of(measure, [44.0])
        assert alone.bound is None and alone.promised == 44


def test_pictures_of_one_call_say_nothing_of_other_calls():
    """Eight pictures of two calls leave the mean as open as their two means do."""
    tried = Tried(SOLVED, "at:0", (-40.0, -44.0), psnr=(40.0, 42.0, 41.0, 41.0, 45.0, 45.0, 44.0, 46.0))
    score = tried.score("psnr")
    assert score.bound == pytest.approx(Score.of("psnr", (41.0, 45.0)).bound) and score[:2] == (43, 40)
    uneven = Tried(SOLVED, "at:0", (-40.0, -44.0), psnr=(40.0, 42.0, 45.0))
    assert uneven.score("psnr") == Score.of("psnr", uneven.psnr)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_run_that_is_no_number_promises_nothing(bad):
    """Such a run has a drift of infinity."""
    tried = Tried(SOLVED, "at:0", (-40.0, bad), psnr=(44.0, 5.0))
    assert tried.score("drift").bound is None and not tried.keeps(Quality.parse("drift:100"))
    assert "drift" in Point(1, -40.0, (tried,), {}, 1.0).promise


@pytest.mark.parametrize("calls", [2, 4, 12])
def test_nine_of_ten_promises_are_kept(calls):
    """Means of normal values lie beyond their bound as often as it says."""
    values = np.random.default_rng(0).normal(40, 3, (4000, calls))
    kept = [Score.of("psnr", some).bound <= 40 for some in values.tolist()]
    assert np.mean(kept) == pytest.approx(SURE, abs=0.02)


def test_a_target_that_nothing_keeps_or_that_was_not_measured():
    with pytest.raises(LookupError, match=r"no budget that was calibrated keeps psnr:58 .*ask for less.*more calls"):
        CURVE.least(Quality.parse("psnr:58"))
    blind = Point(3, -30, (Tried(SOLVED, "at:0,3", (-30.0,)),), {}, 1.0)
    with pytest.raises(ValueError, match="are measured by drift, got the target psnr:40"):
        Curve(50, (blind,)).least(Quality.parse("psnr:40"))


@pytest.mark.parametrize("text", ["psnr", "psnr:", "psnr:nan", "psnr:inf", "fid:3", "40"])
def test_a_quality_is_a_measure_and_a_number(text):
    with pytest.raises(ValueError, match=f"quality reads psnr:40, .* got '{text}'"):
        Quality.parse(text)


@pytest.mark.parametrize(
    ("target", "share"), [("psnr:48", 0), ("psnr:49", 0.5), ("psnr:50.5", 1), ("drift:-48", 0), ("drift:-49", 0.5)]
)
def test_the_share_of_calls_that_miss_a_target(target, share):
    assert CURVE.at(8).kept.share_missing(Quality.parse(target)) == share


def test_a_promise_says_mean_and_bound_and_worst():
    wide, narrow = student(1), student(1) / 100
    promised = [
        f"PSNR 49.00 dB (others' mean at least {49 - wide:.2f} at 90%, worst 48.00)",
        f"SSIM 0.9800 (others' mean at least {0.98 - narrow:.4f} at 90%, worst 0.9700)",
        f"drift -49.00 dB (others' mean at most {wide - 49:.2f} at 90%, worst -48.00)",
    ]
    assert CURVE.at(8).promise == f"{', '.join(promised)} on 2 checked calls"
    with pytest.raises(LookupError, match="of 8, 5, 3 full steps, got 4"):
        CURVE.at(4)


def test_a_curve_survives_json():
    assert Curve.from_dict(json.loads(json.dumps(asdict(CURVE)))) == CURVE


def test_the_table_has_a_line_for_each_budget_and_the_best_of_the_rest():
    lines = CURVE.table().splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "| 8 | 6.25 | solved | at:0,3 | -51.00 | 49.00 (48.00) |" in lines[2]
    assert lines[2].endswith("| Reuse(), at:0,4 | 0.00 |")
