"""Scores of pictures and of sound: our own, and those that other packages compute where these can be had."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from PIL import Image

from lesa.bench.named import AS_PUBLISHED
from lesa.bench.sounds import log_mel_distance, signal_to_noise
from lesa.host import needs
from lesa.learn import metrics, perceptual

Score = Callable[[Sequence[str], Sequence[np.ndarray], Sequence[np.ndarray]], list[float]]
"""(prompts, pictures, those of the reference run) -> one number for each"""


def load(names: Sequence[str]) -> tuple[dict[str, Score], dict[str, str]]:
    """Load scores by their names in tables; returns those that can be had, and of the others why not.

    Raises: ValueError if there is no score of a name.
    """
    if unknown := set(names) - set(SCORES):
        raise ValueError(f"the scores are {', '.join(SCORES)}, got {', '.join(sorted(unknown))}; name some of these.")
    found: dict[str, Score] = {}
    lacking: dict[str, str] = {}
    for name in names:
        try:
            found[name] = _of_frames(SCORES[name]())
        except Exception as error:  # whatever a package raises that finds no weights and no way to them
            words = " ".join(str(error).split())
            lacking[name] = f"{type(error).__name__}: {words[:200]}"
    return found, lacking


def _of_frames(score: Score) -> Score:
    """Let a score of pictures be one of clips (frames, H, W, 3) too: the mean over their frames."""

    def mean(prompts: Sequence[str], pictures: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> list[float]:
        if pictures[0].ndim == 3:
            return score(prompts, pictures, references)
        clips = zip(prompts, pictures, references, strict=True)
        return [fmean(score([prompt] * len(clip), list(clip), list(wanted))) for prompt, clip, wanted in clips]

    return mean


def _ms_ssim() -> Score:
    def score(_prompts: Any, pictures: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> list[float]:
        return [metrics.ms_ssim(*pair) for pair in zip(pictures, references, strict=True)]

    return score


def _as_published() -> Score:
    """What published tables call PSNR: see `metrics.psnr_as_published`, it is another number."""

    def score(_prompts: Any, pictures: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> list[float]:
        return [metrics.psnr_as_published(*pair) for pair in zip(pictures, references, strict=True)]

    return score


def _lpips() -> Score:
    between = perceptual.lpips()

    def score(_prompts: Any, pictures: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> list[float]:
        return [between(*pair) for pair in zip(pictures, references, strict=True)]

    return score


def _clip() -> Score:
    """100 times the cosine between a picture and its prompt in CLIP (Hessel et al., 2021), by torchmetrics."""
    metric = needs.module("CLIP").CLIPScore("openai/clip-vit-base-patch16")

    def score(prompts: Sequence[str], pictures: Sequence[np.ndarray], _references: Any) -> list[float]:
        with torch.no_grad():
            return [
                float(metric(torch.from_numpy(np.array(picture)).movedim(-1, 0), prompt))
                for prompt, picture in zip(prompts, pictures, strict=True)
            ]

    return score


def _image_reward() -> Score:
    """ImageReward (Xu et al., 2023): what people would prefer, by its own package."""
    model = needs.module("ImageReward").load("ImageReward-v1.0")

    def score(prompts: Sequence[str], pictures: Sequence[np.ndarray], _references: Any) -> list[float]:
        with torch.no_grad():
            return [
                float(model.score(prompt, Image.fromarray(picture)))
                for prompt, picture in zip(prompts, pictures, strict=True)
            ]

    return score


SOUND_SCORES: dict[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
    "signal-to-noise, dB": lambda clip, reference, _rate: signal_to_noise(clip, reference),
    "log-mel distance, dB": log_mel_distance,
}
"""Scores of sound, measured of all of it: (clip, that of the reference run, samples a second) -> a number"""
SCORES: dict[str, Callable[[], Score]] = {
    "MS-SSIM": _ms_ssim,
    "LPIPS": _lpips,
    "CLIP": _clip,
    "ImageReward": _image_reward,
    AS_PUBLISHED: _as_published,
}
