"""Set PSNR beside what many published tables call PSNR, whose error wraps around modulo 256.

    python benchmarks/published.py

Four photographs that scikit-image brings along (nothing is fetched), each with smooth errors of a random shape, as
large as a true PSNR asks for; and all pairs of them, which have nothing in common. Each line is a mean over the pairs.
What the formula is, and whose tables have it: docs/published.md.
"""

import argparse
from collections.abc import Iterator
from itertools import combinations
from statistics import fmean

import numpy as np
from skimage import data

from lesa.bench.report import markdown
from lesa.learn.metrics import psnr, psnr_as_published

HEADS = ("pairs", "PSNR, dB", "as published, dB", "lowest", "highest")
TARGETS = (10, 15, 20, 22, 25, 28, 30, 33, 36, 40)
SIDE, WAVES, SHAPES = 256, 5, 2
"""Pixels of a photograph's side; half waves of an error along it, at most; errors for each photograph."""
HALVINGS = 16
Pair = tuple[np.ndarray, np.ndarray]


def photographs() -> list[np.ndarray]:
    """Return the middles of four photographs, uint8 (SIDE, SIDE, 3). All are PNG: no decoder has a say in them."""
    whole = [data.astronaut(), data.coffee(), data.chelsea(), data.stereo_motorcycle()[0]]
    return [_middle(picture) for picture in whole]


def _middle(picture: np.ndarray) -> np.ndarray:
    top, left = ((size - SIDE) // 2 for size in picture.shape[:2])
    return np.ascontiguousarray(picture[top : top + SIDE, left : left + SIDE])


def smooth(seed: int) -> np.ndarray:
    """Return an error of mean square 1 made of a few waves, (SIDE, SIDE, 3)."""
    places = (np.arange(SIDE) + 0.5) / SIDE
    waves = np.cos(np.pi * np.arange(WAVES)[:, None] * places)
    weights = np.random.RandomState(seed).standard_normal((WAVES, WAVES, 3))  # of this class the numbers stay the same
    error = np.einsum("ai,bj,abc->ijc", waves, waves, weights)
    return error / np.sqrt(np.mean(error**2))


def spoilt(picture: np.ndarray, error: np.ndarray, target: float) -> np.ndarray:
    """Return the picture with as much of the error as leaves it with this PSNR, in dB."""
    low, high = 0.0, 1024.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        made = (picture + middle * error).round().clip(0, 255).astype(np.uint8)
        low, high = (middle, high) if psnr(made, picture) > target else (low, middle)
    return made


def lines() -> Iterator[tuple[str, list[Pair]]]:
    """Yield the pairs of each line, with its name."""
    pictures = photographs()
    yield "of two unrelated photographs", list(combinations(pictures, 2))
    errors = [smooth(seed) for seed in range(SHAPES * len(pictures))]
    for target in TARGETS:
        made = [(spoilt(pictures[k // SHAPES], error, target), pictures[k // SHAPES]) for k, error in enumerate(errors)]
        yield f"with smooth errors, {target} dB", made


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for name, pairs in lines():
        true, wrapped = ([measure(*pair) for pair in pairs] for measure in (psnr, psnr_as_published))
        rows.append((name, *(f"{value:.2f}" for value in (fmean(true), fmean(wrapped), min(wrapped), max(wrapped)))))
    print(markdown(HEADS, rows, text=1))


if __name__ == "__main__":
    main()
