"""LPIPS (Zhang et al., 2018): how far apart two pictures look, by torchmetrics and the AlexNet of torchvision."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path, PurePosixPath
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from lesa.host import needs

SIDE = 32
"""The fewest pixels a side of what AlexNet takes."""


def lpips() -> Callable[[np.ndarray, np.ndarray], float]:
    """Return the distance of two 8-bit RGB pictures (H, W, 3), 0 for identical ones; of two clips (frames, H, W, 3) it
    is the mean over their frames. Weights that are not on this disk are fetched.

    Raises: ImportError without torchmetrics (the extra `scores`); what torchvision raises that finds no weights.
    """
    metric = needs.module("LPIPS").LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)

    def between(picture: np.ndarray, reference: np.ndarray) -> float:
        if picture.ndim == 4:
            return fmean(between(*frames) for frames in zip(picture, reference, strict=True))
        with torch.no_grad():
            return float(metric(_batch(picture), _batch(reference)))

    return between


def lacking() -> str:
    """Return in words what LPIPS needs and is not on this machine; '' if all is, and nothing would be fetched."""
    if without := needs.lacking("LPIPS"):
        return without
    place = weights()
    return "" if place.exists() else f"AlexNet's weights, {place} (lesa bench --scores LPIPS fetches them)"


def weights() -> Path:
    """Return where torchvision keeps the weights of AlexNet that it has fetched."""
    address = import_module("torchvision.models").AlexNet_Weights.DEFAULT.url
    return Path(torch.hub.get_dir()) / "checkpoints" / PurePosixPath(address).name


def _batch(picture: np.ndarray) -> Tensor:
    """Turn a uint8 picture (H, W, 3) into (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.array(picture)).movedim(-1, 0)[None] / 255
