"""What a calibration keeps: targets, promises, the table."""

import json
from dataclasses import asdict

import pytest

from lesa.predictors.calibration import Quality
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
    ("target", "budget"), [("psnr:44", 5), ("psnr:44.01", 8), ("ssim:0.98", 3), ("drift:-28", 3), ("drift:-39.5", 8)]
)
def test_the_fewest_full_steps_that_keep_a_target_on_the_mean(target, budget):
    assert CURVE.least(Quality.parse(target)).full_steps == budget


def test_a_target_that_nothing_keeps_or_that_was_not_measured():
    with pytest.raises(LookupError, match=r"no budget that was calibrated keeps psnr:58 .*ask for less"):
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


def test_a_promise_says_mean_and_worst():
    pictures = "PSNR 49.00 dB (worst 48.00 dB), SSIM 0.9800 (worst 0.9700)"
    assert CURVE.at(8).promise == f"{pictures}, drift -49.00 dB (worst -48.00 dB) on 2 checked calls"
    with pytest.raises(LookupError, match="of 8, 5, 3 full steps, got 4"):
        CURVE.at(4)


def test_a_curve_survives_json():
    assert Curve.from_dict(json.loads(json.dumps(asdict(CURVE)))) == CURVE


def test_the_table_has_a_line_for_each_budget_and_the_best_of_the_rest():
    lines = CURVE.table().splitlines()
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1
    assert "| 8 | 6.25 | solved | at:0,3 | -51.00 | 49.00 (48.00) |" in lines[2]
    assert lines[2].endswith("| Reuse(), at:0,4 | 0.00 |")
