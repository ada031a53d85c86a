"""Metrics of pictures and features, and how sure their means are."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

IDENTICAL = 60.0
"""PSNR of identical pictures, in dB, and the most that any pair can have."""


class Interval(NamedTuple):
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        mean, low, high = (format(number, form or ".2f") for number in self)
        return f"{mean} [{low}, {high}]"


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """Return 10 log10(255^2 / mean squared difference) of two 8-bit RGB pictures (H, W, 3), in dB, at most `IDENTICAL`.

    The cap keeps the order: without it a picture that is off by one in a single pixel would beat an identical one. Of
    two clips (frames, H, W, 3) it is the mean over their frames.

    Raises: ValueError if the pictures are not uint8 of one shape (H, W, 3) or (frames, H, W, 3).
    """
    _check_pictures(picture, reference)
    if picture.ndim == 4:
        return fmean(psnr(*frames) for frames in zip(picture, reference, strict=True))
    return _decibels(picture.astype(np.float64) - reference)


def motion_psnr(clip: np.ndarray, reference: np.ndarray) -> float:
    """Return the PSNR of what changes from frame to frame of two 8-bit RGB clips (frames, H, W, 3), as `psnr` does.

    A flicker counts here, and a constant difference does not.

    Raises: ValueError if the clips are not uint8 of one shape (frames, H, W, 3) with two frames at least.
    """
    _check_pictures(clip, reference)
    if clip.ndim != 4 or len(clip) < 2:
        raise ValueError(f"motion is seen in two frames at least, got shape {clip.shape}; pass clips.")
    changes, wanted = (np.diff(frames.astype(np.float64), axis=0) for frames in (clip, reference))
    return fmean(_decibels(change) for change in changes - wanted)


def _decibels(difference: np.ndarray) -> float:
    error = np.mean(difference**2)
    return IDENTICAL if error == 0 else min(IDENTICAL, float(10 * np.log10(255**2 / error)))


def ssim(picture: np.ndarray, reference: np.ndarray) -> float:
    """Return the structural similarity of two 8-bit RGB pictures (H, W, 3), with the Gaussian window of its authors.

    Of two clips (frames, H, W, 3) it is the mean over their frames.

    Raises: ValueError as `psnr` does; ImportError without scikit-image (the extra `bench`).
    """
    from skimage.metrics import structural_similarity

    _check_pictures(picture, reference)
    if picture.ndim == 4:
        return fmean(ssim(*frames) for frames in zip(picture, reference, strict=True))
    similarity: Any = structural_similarity(
        picture,
        reference,
        channel_axis=2,
        data_range=255,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
    return float(similarity)


def relative_error(forecast: Tensor, feature: Tensor) -> float:
    """Return |forecast - feature| / |feature| in the Euclidean norm, over all elements."""
    difference = forecast.double() - feature.double()
    return float(difference.norm() / feature.double().norm())


def interval(values: Sequence[float], resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return the mean of `values` with its bootstrap 95 % interval (percentiles of the resampled means).

    Raises: ValueError if there are no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError(f"an interval needs a list of values, got shape {sample.shape}; measure at least one pair.")
    drawn = np.random.default_rng(seed).integers(len(sample), size=(resamples, len(sample)))
    means = sample[drawn].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(sample.mean()), float(low), float(high))


def paired_interval(values: Sequence[float], others: Sequence[float], resamples: int = 10_000) -> Interval:
    """Return the mean of `values` - `others`, pair by pair, with its bootstrap 95 % interval.

    Raises: ValueError if they are not equally many, or none.
    """
    if len(values) != len(others):
        raise ValueError(f"paired values are equally many, got {len(values)} and {len(others)}; use the same pairs.")
    return interval(np.subtract(values, others).tolist(), resamples)


def _check_pictures(picture: np.ndarray, reference: np.ndarray) -> None:
    for array in (picture, reference):
        if (
            array.dtype != np.uint8
            or array.ndim not in (3, 4)
            or array.shape[-1] != 3
            or array.shape != reference.shape
        ):
            raise ValueError(
                "two pictures are uint8 of one shape (H, W, 3), two clips (frames, H, W, 3), got "
                f"{picture.dtype} {picture.shape} and {reference.dtype} {reference.shape}; decode both to 8-bit RGB of "
                "one size."
            )
