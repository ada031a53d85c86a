"""A calibration's curve, drawn: what each number of full steps keeps, and the worst checked call's pictures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lesa.host import needs
from lesa.predictors.curve import MEASURES, Curve

NAMES = {"psnr": "PSNR, dB", "ssim": "SSIM", "lpips": "LPIPS", "drift": "drift, dB"}
Pictures = tuple[np.ndarray, np.ndarray]


def plot(curve: Curve, pictures: Mapping[int, Pictures], path: str | Path) -> None:
    """Draw a curve of each measure over the full steps, its mean and its worst call; under them, for each budget, the
    `pictures` of the worst call: the reference's, what was drawn, and eight times their difference.

    Raises: ImportError without matplotlib (the extra `bench`).
    """
    needs.check("a plot", "plots")
    from matplotlib.figure import Figure

    measured = [name for name in MEASURES if all(point.kept.score(name) for point in curve.points)]
    shown = [point.full_steps for point in curve.points if point.full_steps in pictures]
    figure = Figure(figsize=(4 * len(measured), 3.5 + 1.8 * 3 * bool(shown)), layout="constrained")
    top, *under = figure.subfigures(2 if shown else 1, 1, squeeze=False)[:, 0]
    for axes, name in zip(np.atleast_1d(top.subplots(1, len(measured))), measured, strict=True):
        _curve(axes, curve, name)
    if shown:
        panels = under[0].subplots(3, len(shown), squeeze=False)
        under[0].suptitle("the worst checked call: in full, with fewer full steps, eight times the difference")
        for column, budget in zip(panels.T, shown, strict=True):
            _column(column, *pictures[budget], f"{budget} full steps")
    figure.savefig(path, dpi=120)


def _curve(axes: Any, curve: Curve, name: str) -> None:
    at = [point.full_steps for point in curve.points]
    scores = [score for point in curve.points if (score := point.kept.score(name))]
    axes.plot(at, [score.mean for score in scores], marker="o", label="mean")
    axes.plot(at, [score.worst for score in scores], marker="v", linestyle="--", label="worst call")
    axes.set(xlabel="full steps", ylabel=NAMES[name])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _column(axes: Any, drawn: np.ndarray, wanted: np.ndarray, title: str) -> None:
    off = np.abs(drawn.astype(int) - wanted.astype(int)) * 8
    for one, picture in zip(axes, (wanted, drawn, off.clip(0, 255).astype(np.uint8)), strict=True):
        one.imshow(picture)
        one.set_axis_off()
    axes[0].set_title(title, fontsize=9)
