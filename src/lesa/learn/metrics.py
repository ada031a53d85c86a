"""Metrics of pictures and features, and how sure their means are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lesa.host import needs

MOST_PSNR = 60.0
"""The PSNR in dB of identical pictures, and the most that any pair can have: of those that have it many differ."""
MOST_FLOAT_PSNR = 150.0
"""The float PSNR in dB of identical pictures, and the most that any pair can have: what float32's rounding leaves."""
MOST_DRIFT = 120.0
"""The drift in dB of latents that are not finite, and the most that any can have; `-MOST_DRIFT` is the least."""
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""The weights of MS-SSIM's five scales, finest first, as its authors found them."""
WINDOW, SPREAD = 11, 1.5
"""Width and standard deviation of SSIM's Gaussian window, in pixels."""


class Interval(NamedTuple):
    """A mean and its bootstrap interval."""

    mean: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        mean, low, high = (format(number, form or ".2f") for number in self)
        return f"{mean} [{low}, {high}]"


def psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """Return 10 log10(255^2 / mean squared difference) of two 8-bit RGB pictures (H, W, 3), in dB, at most `MOST_PSNR`.

    Two identical pictures have no finite PSNR, and a mean needs one: so both they and all that is nearer than the cap
    count as the cap, of which `differing` tells them apart. Of two clips (frames, H, W, 3) it is the mean over frames.

    Raises: ValueError if the pictures are not uint8 of one shape (H, W, 3) or (frames, H, W, 3).
    """
    _check_pictures(picture, reference)
    if picture.ndim == 4:
        return fmean(psnr(*frames) for frames in zip(picture, reference, strict=True))
    return _decibels(picture.astype(np.float64) - reference)


def float_psnr(picture: np.ndarray, reference: np.ndarray) -> float:
    """Return 10 log10(1 / mean squared difference) of two pictures (H, W, 3) of floats from 0 to 1, in dB.

    They are decoded pictures before rounding to 8 bits, whose PSNR ends where all values round alike. This one ends at
    `MOST_FLOAT_PSNR`, where float32 rounds them. Of two clips (frames, H, W, 3) it is the mean over frames.

    Raises: ValueError if the pictures are not of floats, and of one shape (H, W, 3) or (frames, H, W, 3).
    """
    shapes = f"{picture.dtype} {picture.shape} and {reference.dtype} {reference.shape}"
    floats = all(np.issubdtype(array.dtype, np.floating) for array in (picture, reference))
    if not floats or picture.shape != reference.shape or picture.ndim not in (3, 4) or picture.shape[-1] != 3:
        raise ValueError(
            f"two pictures are floats of one shape (H, W, 3), two clips (frames, H, W, 3), got {shapes}; decode both "
            "to floats from 0 to 1, of one size."
        )
    if picture.ndim == 4:
        return fmean(float_psnr(*frames) for frames in zip(picture, reference, strict=True))
    error = float(np.mean((picture.astype(np.float64) - reference) ** 2))
    return MOST_FLOAT_PSNR if error == 0 else min(MOST_FLOAT_PSNR, -10 * math.log10(error))


def psnr_as_published(picture: np.ndarray, reference: np.ndarray) -> float:
    """Return what many published tables of pictures call PSNR, in dB. **It is not PSNR**: its error wraps around.

    The formula is 10 log10(255^2 / np.mean((a - b) ** 2)) of uint8 arrays that nobody cast, where difference and square
    are uint8, too: modulo 256. Source: the evaluation of pictures in the code that the authors of LESA (arXiv
    2602.20497) released, and the default of cache-dit's metrics (1.5.3, `--psnr-type custom`). It equals PSNR where no
    two values are 16 or more apart; unrelated pictures have about 28 dB, and a difference of 16 everywhere has none at
    all. For reading published tables alone (docs/published.md); what this package reports is `psnr`.

    It has no cap: infinity where no error is left. Of two clips (frames, H, W, 3) it is taken of all frames together.

    Raises: ValueError as `psnr` does.
    """
    _check_pictures(picture, reference)
    difference = picture - reference  # in uint8, and so is its square: what is wrong with it
    error = float(np.mean(difference * difference))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def differing(picture: np.ndarray, reference: np.ndarray) -> float:
    """Return the share of two pictures' or clips' 8-bit values that differ: 0 if, and only if, they are identical.

    Raises: ValueError as `psnr` does.
    """
    _check_pictures(picture, reference)
    return float(np.mean(picture != reference))


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
    return MOST_PSNR if error == 0 else min(MOST_PSNR, float(10 * np.log10(255**2 / error)))


def ssim(picture: np.ndarray, reference: np.ndarray) -> float:
    """Return the structural similarity of two 8-bit RGB pictures (H, W, 3), with the Gaussian window of its authors.

    Of two clips (frames, H, W, 3) it is the mean over their frames.

    Raises: ValueError as `psnr` does; ImportError without scikit-image (the extra `bench`).
    """
    needs.check("SSIM", "comparison")
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
        sigma=SPREAD,
        use_sample_covariance=False,
    )
    return float(similarity)


def ms_ssim(picture: np.ndarray, reference: np.ndarray) -> float:
    """Return the multi-scale structural similarity (Wang et al., 2003) of two 8-bit RGB pictures (H, W, 3).

    Each scale halves the picture before. A scale on which the window does not fit is left out, and the weights of the
    others are divided by their sum: of five scales 176 pixels have all, 128 four, 64 three, 32 two. Values are
    comparable between pictures of one size only.

    Raises: ValueError as `psnr` does, or if the pictures are smaller than the window.
    """
    _check_pictures(picture, reference)
    side = min(picture.shape[:2])
    if side < WINDOW:
        raise ValueError(f"MS-SSIM needs pictures of at least {WINDOW} pixels a side, got {side}; enlarge both.")
    weights = [weight for k, weight in enumerate(SCALES) if side >> k >= WINDOW]
    pair = torch.from_numpy(np.stack([picture, reference])).double().movedim(-1, 1)
    similarity = torch.ones(3, dtype=torch.float64)
    for k, weight in enumerate(weights):
        luminance, structure = _similarities(pair)
        last = luminance if k == len(weights) - 1 else 1.0
        similarity *= (structure * last).mean((1, 2)).clamp(min=0) ** (weight / sum(weights))
        pair = functional.avg_pool2d(pair, 2)
    return float(similarity.mean())


def _similarities(pair: Tensor) -> tuple[Tensor, Tensor]:
    """Return SSIM's two factors at each place where its window fits: of luminance, and of contrast and structure."""
    (mean, other), (square, other_square) = _local(pair), _local(pair**2)
    product = _local(pair[0] * pair[1])
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    luminance = (2 * mean * other + c1) / (mean**2 + other**2 + c1)
    variance = square - mean**2 + other_square - other**2
    return luminance, (2 * (product - mean * other) + c2) / (variance + c2)


def _local(x: Tensor) -> Tensor:
    """Average (..., H, W) under the window, at each place where it fits."""
    weights = [math.exp(-((k - WINDOW // 2) ** 2) / (2 * SPREAD**2)) for k in range(WINDOW)]
    for axis in (-2, -1):
        places = x.shape[axis] - WINDOW + 1
        shifted = (w / sum(weights) * x.narrow(axis, k, places) for k, w in enumerate(weights))
        x = sum(shifted, start=torch.zeros((), dtype=x.dtype))
    return x


def relative_error(forecast: Tensor, feature: Tensor) -> float:
    """Return |forecast - feature| / |feature| in the Euclidean norm, over all elements."""
    difference = forecast.double() - feature.double()
    return float(difference.norm() / feature.double().norm())


def drift(latents: Tensor, reference: Tensor) -> float:
    """Return 10 log10(|x - x_ref|^2 / |x_ref|^2) of two runs' last latents, in dB, between -120 and `MOST_DRIFT`.

    It goes on where PSNR ends, at its cap.

    Raises: ValueError if they differ in shape.
    """
    if latents.shape != reference.shape:
        raise ValueError(f"latents are compared with some of their shape {reference.shape}, got {latents.shape}.")
    wanted = reference.detach().double()
    ratio = float((latents.detach().double() - wanted).square().sum() / wanted.square().sum())
    if not math.isfinite(ratio):
        return MOST_DRIFT
    return min(MOST_DRIFT, max(-MOST_DRIFT, 10 * math.log10(ratio or 1e-300)))


def interval(values: Sequence[float], resamples: int = 10_000, seed: int = 0, level: float = 0.95) -> Interval:
    """Return the mean of `values` with its bootstrap interval (percentiles of the resampled means), of 95 % by default.

    Raises: ValueError if there are no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not len(sample):
        raise ValueError(f"an interval needs a list of values, got shape {sample.shape}; measure at least one pair.")
    drawn = np.random.default_rng(seed).integers(len(sample), size=(resamples, len(sample)))
    means = sample[drawn].mean(axis=1)
    low, high = np.percentile(means, [50 * (1 - level), 50 * (1 + level)])
    return Interval(float(sample.mean()), float(low), float(high))


def paired_interval(values: Sequence[float], others: Sequence[float], **options: Any) -> Interval:
    """Return the mean of `values` - `others`, pair by pair, with its bootstrap interval; options as of `interval`.

    Raises: ValueError if they are not equally many, or none.
    """
    if len(values) != len(others):
        raise ValueError(f"paired values are equally many, got {len(values)} and {len(others)}; use the same pairs.")
    return interval(np.subtract(values, others).tolist(), **options)


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
