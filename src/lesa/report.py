"""Tables, pictures and files of what was measured."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lesa.benchmark import REFERENCE, Comparison, Record, Result, machine
from lesa.metrics import IDENTICAL, Interval
from lesa.training import Curve
from lesa.trajectory import write_atomically


def table(results: Sequence[Result]) -> str:
    """Lay results out as a Markdown table that reads as well in a terminal.

    Speedup is that of the denoising loop at batch 1, the whole call's is beside it; 'as prompted' is the share of
    pictures that still show what their prompts name; 'motion' is the PSNR of what changes between the frames of clips.
    """
    head = ("method", "schedule", "full steps", "step ratio", "speedup", "whole call", "PSNR, dB [95 %]", "SSIM")
    rows = [_cells(result) for result in results]
    if any(result.motion is not None for result in results):
        rows = [[*cells, _or_dash(result.motion, "{:.2f}")] for cells, result in zip(rows, results, strict=True)]
        return markdown((*head, "as prompted", "motion, dB"), rows, text=2)
    return markdown((*head, "as prompted"), rows, text=2)


def _cells(result: Result) -> list[str]:
    psnr = Interval(result.psnr, result.psnr_low, result.psnr_high)
    return [
        result.method,
        result.schedule,
        str(result.full_steps),
        f"{result.step_ratio:.2f}",
        _or_dash(result.speedup, "{:.2f}x"),
        _or_dash(result.call_speedup, "{:.2f}x"),
        "identical" if psnr.low == IDENTICAL else f"{psnr}",
        f"{result.ssim:.3f}",
        _or_dash(result.prompted, "{:.1%}"),
    ]


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def differences(comparison: Comparison, ours: str) -> str:
    """Lay out by how many dB the method named `ours` is above every other of as many full steps, pair by pair."""
    results = comparison.results()
    rows = [
        [
            f"{ours} - {other.method}",
            f"{mine.schedule} - {other.schedule}",
            str(mine.full_steps),
            f"{comparison.difference((ours, mine.schedule), (other.method, other.schedule)):+.2f}",
        ]
        for mine in results
        for other in results
        if mine.method == ours and other is not mine and other.full_steps == mine.full_steps
    ]
    return markdown(("difference", "schedules", "full steps", "PSNR, dB [95 %]"), rows, text=2)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], text: int) -> str:
    """Align a Markdown table: the first `text` columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width if k < text else "-" * (width - 1) + ":" for k, width in enumerate(widths)]
    lines = []
    for cells in (head, rule, *rows):
        sized = enumerate(zip(cells, widths, strict=True))
        lines.append(" | ".join(cell.ljust(width) if k < text else cell.rjust(width) for k, (cell, width) in sized))
    return "\n".join(f"| {line} |" for line in lines)


def write_results(path: str | Path, comparison: Comparison, **facts: Any) -> None:
    """Write everything measured as JSON, whole or not at all: `rows`, `prompts`, `machine`, a record per picture.

    Raises: OSError if it cannot be written.
    """
    pairs = comparison.records[REFERENCE.key]
    content = {
        **facts,
        "machine": machine(),
        "rows": [asdict(result) for result in comparison.results()],
        "prompts": [record.prompt for record in pairs],
        "seeds": [record.seed for record in pairs],
        "records": [asdict(record) for records in comparison.records.values() for record in records],
    }
    write_atomically(Path(path), (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())


# --- the contact sheet

SIDE, GAP, GROUP_GAP = 128, 8, 22
MARGIN, CAPTION, LINE = 140, 20, 17
Colour = tuple[int, int, int]
INK, FAINT, WRONG = (25, 25, 25), (110, 110, 110), (200, 30, 30)


def sheets(comparison: Comparison) -> list[Image.Image]:
    """Draw the sheet of every frame of clips."""
    clips = [clip for kept in comparison.pictures.values() for clip in kept if clip.ndim == 4]
    return [sheet(comparison, frame) for frame in range(len(clips[0]) if clips else 0)]


def sheet(comparison: Comparison, frame: int | None = None) -> Image.Image:
    """Draw the kept pictures, prompts x methods, methods of as many full steps side by side; of clips one frame.

    Under each picture stands its PSNR, in red and 'wrong' if it does not show what its prompt names. Without a `frame`
    it is the middle one.
    """
    results = {(result.method, result.schedule): result for result in comparison.results()}
    keys = sorted(comparison.pictures, key=lambda key: -results[key].full_steps)
    lefts = list(_lefts([results[key].full_steps for key in keys]))
    prompts = [record.prompt for record in comparison.records[REFERENCE.key]][: len(comparison.pictures[keys[0]])]
    top = 5 * LINE
    canvas = Image.new("RGB", (lefts[-1] + SIDE + GAP, top + len(prompts) * (SIDE + CAPTION + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for k, prompt in enumerate(prompts):
        y = top + k * (SIDE + CAPTION + GAP)
        _write(draw, (GAP, y), "\n".join(textwrap.wrap(prompt, 17)), INK)
    for key, left in zip(keys, lefts, strict=True):
        _write(draw, (left, GAP), _heading(results[key]), INK)
        cells = zip(comparison.pictures[key], comparison.records[key], strict=False)
        for k, (picture, record) in enumerate(cells):
            y = top + k * (SIDE + CAPTION + GAP)
            canvas.paste(_sized(_still(picture, frame)), (left, y))
            _write(draw, (left, y + SIDE + 2), *_caption(record))
    return canvas


def _still(picture: np.ndarray, frame: int | None) -> np.ndarray:
    if picture.ndim == 3:
        return picture
    return picture[len(picture) // 2 if frame is None else frame]


def _lefts(full_steps: Sequence[int]) -> Iterator[int]:
    """Place columns from the left, those of as many full steps in one group."""
    x = MARGIN
    for _, group in groupby(full_steps):
        for _ in group:
            yield x
            x += SIDE + GAP
        x += GROUP_GAP


def _heading(result: Result) -> str:
    if result.method == REFERENCE.name:
        return f"{result.method}\n{result.full_steps} full steps\nthe reference"
    name = textwrap.shorten(result.method, 18, placeholder="...")
    schedule = textwrap.shorten(f"{result.full_steps} full, {result.schedule}", 18, placeholder="")
    return f"{name}\n{schedule}\nmean {result.psnr:.1f} dB"


def _caption(record: Record) -> tuple[str, Colour]:
    psnr = "" if record.method == REFERENCE.name else f"{record.psnr:.1f} dB"
    return (f"{psnr} wrong", WRONG) if record.prompted is False else (psnr, FAINT)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: Colour) -> None:
    draw.multiline_text(place, text, fill=colour, font=ImageFont.load_default(13), spacing=LINE - 13)


def _sized(picture: np.ndarray) -> Image.Image:
    """Bring a picture to the sheet's size: small ones keep their pixels sharp."""
    image = Image.fromarray(picture)
    image.thumbnail((SIDE, SIDE))
    grown = SIDE // max(image.size)
    return image.resize((image.width * grown, image.height * grown), Image.Resampling.NEAREST)


# --- curves


def budget_curve(results: Sequence[Result], path: str | Path) -> None:
    """Plot PSNR, with its 95 % interval, over the number of full steps, a line for each method.

    Raises: ImportError without matplotlib (the extra `bench`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="full steps", ylabel="PSNR, dB")
    for method in dict.fromkeys(result.method for result in results if result.method != REFERENCE.name):
        line = sorted((r for r in results if r.method == method), key=lambda r: r.full_steps)
        steps, quality = [r.full_steps for r in line], [r.psnr for r in line]
        (drawn,) = axes.plot(steps, quality, marker=".", label=method)
        low, high = [r.psnr_low for r in line], [r.psnr_high for r in line]
        axes.fill_between(steps, low, high, color=drawn.get_color(), alpha=0.2)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def training_curve(curve: Curve, path: str | Path) -> None:
    """Plot the validation loss over all updates of a training, in the order in which they were done.

    Raises: ImportError without matplotlib (the extra `bench`).
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="updates", ylabel="validation loss")
    before = 0
    for (phase, round_), entries in groupby(curve.entries, key=itemgetter("phase", "round")):
        points = [(before + entry["update"], entry["validation_loss"]) for entry in entries]
        axes.plot(*zip(*points, strict=True), marker=".", label=f"{phase} {round_ or ''}".strip())
        before = points[-1][0]
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
