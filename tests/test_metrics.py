"""Metrics against numbers worked out by hand."""

import math

import numpy as np
import pytest
import torch

from lesa.learn.metrics import (
    MOST_DRIFT,
    MOST_FLOAT_PSNR,
    MOST_PSNR,
    SCALES,
    Interval,
    differing,
    drift,
    float_psnr,
    interval,
    motion_psnr,
    ms_ssim,
    paired_interval,
    psnr,
    psnr_as_published,
    relative_error,
    ssim,
)

RANDOM = np.random.default_rng(0)
PICTURE = RANDOM.integers(0, 256, (32, 24, 3), dtype=np.uint8)


def flat(level: int) -> np.ndarray:
    return np.full((16, 16, 3), level, dtype=np.uint8)


def test_psnr_of_a_constant_difference():
    assert psnr(flat(100), flat(110)) == pytest.approx(20 * math.log10(25.5))
    assert psnr(flat(0), flat(255)) == 0.0


def test_drift_is_the_share_of_the_latents_that_is_wrong():
    reference = torch.full((4, 5), 3.0)
    assert drift(reference + 0.3, reference) == pytest.approx(-20)
    assert drift(reference, reference) == -MOST_DRIFT
    assert drift(reference * math.inf, reference) == drift(reference * 1e30, reference) == MOST_DRIFT
    with pytest.raises(ValueError, match=r"of their shape torch.Size\(\[4, 5\]\), got torch.Size\(\[4\]\)"):
        drift(reference[:, 0], reference)


def test_psnr_does_not_wrap_around_in_uint8():
    assert psnr(flat(250), flat(5)) == psnr(flat(5), flat(250)) < 1.0


def test_60_db_is_the_most_and_the_share_of_values_that_differ_tells_what_is_there_apart():
    almost = PICTURE.copy()
    almost[0, 0, 0] ^= 1
    assert psnr(PICTURE, PICTURE) == MOST_PSNR == 60.0
    assert psnr(almost, PICTURE) == 60.0
    assert differing(PICTURE, PICTURE) == 0.0 < differing(almost, PICTURE) == 1 / PICTURE.size
    assert psnr(flat(101), flat(100)) == pytest.approx(48.1308, abs=1e-4)


def test_float_psnr_goes_on_where_all_values_round_alike():
    exact = RANDOM.uniform(0.1, 0.9, (16, 16, 3))
    for decibels in (20.0, 60.0, 90.0):
        near = exact + 10 ** (-decibels / 20) * RANDOM.choice([-1.0, 1.0], exact.shape)
        assert float_psnr(near, exact) == float_psnr(exact, near) == pytest.approx(decibels, abs=1e-6)
    assert float_psnr(exact, exact) == MOST_FLOAT_PSNR == 150.0
    single = exact.astype(np.float32)
    assert 140 < float_psnr(single, exact) < 155  # of rounding alone
    one_off = single.copy()
    one_off[0, 0, 0] = np.nextafter(one_off[0, 0, 0], 1)
    assert float_psnr(one_off, single) == MOST_FLOAT_PSNR
    whole = RANDOM.integers(0, 256, PICTURE.shape, dtype=np.uint8)
    assert float_psnr(whole / 255, PICTURE / 255) == pytest.approx(psnr(whole, PICTURE))
    clips = np.stack([exact, exact]), np.stack([exact + 0.1, exact + 0.01])
    assert float_psnr(*clips) == pytest.approx(30.0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.zeros((4, 4, 3), np.uint8), np.zeros((4, 4, 3), np.float32)),
        (np.zeros((4, 4, 3), np.float32), np.zeros((4, 5, 3), np.float32)),
        (np.zeros((4, 4), np.float32), np.zeros((4, 4), np.float32)),
    ],
)
def test_float_psnr_is_of_decoded_pictures_of_one_size(one, other):
    with pytest.raises(ValueError, match="two pictures are floats of one shape"):
        float_psnr(one, other)


def test_psnr_as_published_is_psnr_only_where_no_square_wraps_around():
    near = (PICTURE.astype(int) + RANDOM.integers(-15, 16, PICTURE.shape)).clip(0, 255).astype(np.uint8)
    assert psnr(near, PICTURE) < 40 and psnr_as_published(near, PICTURE) == pytest.approx(psnr(near, PICTURE), abs=1e-9)
    assert psnr_as_published(PICTURE, PICTURE) == math.inf
    other = RANDOM.integers(0, 256, PICTURE.shape, dtype=np.uint8)
    assert psnr(other, PICTURE) < 9 and 27 < psnr_as_published(other, PICTURE) < 28.5
    assert psnr_as_published(other, PICTURE) == psnr_as_published(PICTURE, other)
    assert psnr_as_published(flat(116), flat(100)) == math.inf  # 16 squared is 0, modulo 256
    assert psnr_as_published(flat(117), flat(100)) == pytest.approx(10 * math.log10(255**2 / 33))


def test_psnr_as_published_is_what_numpy_makes_of_the_formula():
    other = RANDOM.integers(0, 256, PICTURE.shape, dtype=np.uint8)
    with np.errstate(over="ignore"):
        error = np.mean((other - PICTURE) ** 2)
    assert psnr_as_published(other, PICTURE) == pytest.approx(20 * np.log10(255.0 / np.sqrt(error)), abs=1e-9)


def test_ssim_of_flat_pictures_is_its_luminance_term():
    c1 = (0.01 * 255) ** 2
    expected = (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1)
    assert ssim(flat(100), flat(120)) == pytest.approx(expected, abs=1e-6)


def test_ssim_orders_pictures_by_their_noise():
    def noisy(spread):
        return (PICTURE + RANDOM.normal(0, spread, PICTURE.shape)).clip(0, 255).astype(np.uint8)

    assert ssim(PICTURE, PICTURE) == 1.0
    assert 1.0 > ssim(noisy(10), PICTURE) > ssim(noisy(40), PICTURE)


def noise(spread: float, side: int = 64) -> np.ndarray:
    picture = np.random.default_rng(3).integers(0, 256, (side, side, 3))
    return (picture + np.random.default_rng(4).normal(0, spread, picture.shape)).clip(0, 255).astype(np.uint8)


def test_on_one_scale_ms_ssim_is_ssim():
    pair = noise(20, side=21), noise(0, side=21)
    assert ms_ssim(*pair) == pytest.approx(ssim(*pair), abs=1e-6)
    pair = noise(20, side=22), noise(0, side=22)
    assert ms_ssim(*pair) != pytest.approx(ssim(*pair), abs=1e-4)


@pytest.mark.parametrize(("side", "scales"), [(16, 1), (32, 2), (64, 3), (128, 4), (176, 5), (180, 5)])
def test_ms_ssim_of_flat_pictures_is_the_luminance_term_of_the_last_scale_that_fits(side, scales):
    c1 = (0.01 * 255) ** 2
    luminance = (2 * 100 * 120 + c1) / (100**2 + 120**2 + c1)
    pictures = [np.full((side, side + 8, 3), level, dtype=np.uint8) for level in (100, 120)]
    used = SCALES[:scales]
    assert ms_ssim(*pictures) == pytest.approx(luminance ** (used[-1] / sum(used)), abs=1e-6)


def test_ms_ssim_orders_pictures_by_their_noise_and_needs_room_for_its_window():
    assert ms_ssim(noise(0), noise(0)) == pytest.approx(1.0)
    assert 1.0 > ms_ssim(noise(10), noise(0)) > ms_ssim(noise(40), noise(0)) > 0.0
    assert ms_ssim(255 - noise(0), noise(0)) == 0.0  # what is opposite counts as nothing alike
    with pytest.raises(ValueError, match="at least 11 pixels a side, got 10"):
        ms_ssim(noise(0, side=10), noise(0, side=10))


@pytest.mark.parametrize("measure", [psnr, psnr_as_published, differing, ssim, ms_ssim])
@pytest.mark.parametrize("other", [PICTURE / 255, PICTURE[:-1], PICTURE[..., 0]])
def test_pictures_that_are_no_8_bit_pair_are_refused(measure, other):
    with pytest.raises(ValueError, match="uint8 of one shape"):
        measure(PICTURE, other)


def test_relative_error():
    feature = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 5.0]), feature) == pytest.approx(0.2)
    assert relative_error(feature, feature) == 0.0


def test_the_interval_of_a_mean_is_that_of_the_normal_law():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    mean, low, high = interval(values)
    error = values.std() / math.sqrt(len(values))
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_surer_intervals_are_wider():
    values = np.random.default_rng(1).normal(5.0, 2.0, 400)
    usual, surer = interval(values), interval(values, level=0.999)
    assert surer.low < usual.low and surer.high > usual.high and surer.mean == usual.mean
    error = values.std() / math.sqrt(len(values))
    assert surer.high - surer.low == pytest.approx(2 * 3.29 * error, rel=0.15)


def test_intervals_repeat():
    assert interval([1.0, 2.0, 4.0]) == interval([1.0, 2.0, 4.0])


def test_a_paired_difference_ignores_what_both_share():
    shared = np.random.default_rng(2).normal(30, 5, 100)
    mean, low, high = paired_interval(shared + 0.5, shared)
    assert (mean, low, high) == pytest.approx((0.5, 0.5, 0.5))


def test_unpaired_or_missing_values_are_refused():
    with pytest.raises(ValueError, match="equally many"):
        paired_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least one pair"):
        interval([])


def test_intervals_can_be_printed():
    assert f"{Interval(1.234, -0.5, 2.0)}" == "1.23 [-0.50, 2.00]"
    assert f"{Interval(1.234, -0.5, 2.0):+.1f}" == "+1.2 [-0.5, +2.0]"


def test_clips_are_compared_frame_by_frame():
    generator = np.random.default_rng(0)
    clip, other = generator.integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    for metric in (psnr, ssim):
        frames = [metric(a, b) for a, b in zip(clip, other, strict=True)]
        assert metric(clip, other) == pytest.approx(sum(frames) / 3)


def test_motion_is_what_changes_between_frames():
    clip = np.zeros((3, 8, 8, 3), np.uint8)
    clip[1] += 50
    assert motion_psnr(clip, clip) == MOST_PSNR
    assert motion_psnr(clip + np.uint8(7), clip) == MOST_PSNR  # as bright in every frame
    flicker = clip.copy()
    flicker[1] += 51
    assert motion_psnr(flicker, clip) == pytest.approx(20 * np.log10(255 / 51))
    with pytest.raises(ValueError, match="two frames at least"):
        motion_psnr(clip[:1], clip[:1])
    with pytest.raises(ValueError, match="two frames at least"):
        motion_psnr(clip[0], clip[0])
