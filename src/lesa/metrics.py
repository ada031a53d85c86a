"""Metrics of pictures and features, and how sure their means are."""

from __future__ import annotations

from collections.abc import Sequence
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

    The cap keeps the order: without it a picture that is off by one in a single pixel would beat an identical one.

    Raises: ValueError if the pictures are not uint8 of one shape (H, W, 3).
    """
    _check_pictures(picture, reference)
    error = np.mean((picture.astype(np.float64) - reference.astype(np.float64)) ** 2)
    return IDENTICAL if error == 0 else min(IDENTICAL, float(10 * np.log10(255**2 / error)))


def ssim(picture: np.ndarray, reference: np.ndarray) -> float:
    """Return the structural similarity of two 8-bit RGB pictures (H, W, 3), with the Gaussian window of its authors.

    Raises: ValueError as `psnr` does; ImportError without scikit-image (the extra `bench`).
    """
    from skimage.metrics import structural_similarity

    _check_pictures(picture, reference)
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
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.shape != reference.shape:
            raise ValueError(
                f"two pictures are uint8 of one shape (H, W, 3), got {picture.dtype} {picture.shape} and "
                f"{reference.dtype} {reference.shape}; decode both to 8-bit RGB of one size."
            )
