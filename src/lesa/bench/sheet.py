"""The contact sheet: what methods drew beside the reference's pictures, and by how much it differs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lesa.bench import brief
from lesa.bench.lines import Key, Record
from lesa.bench.named import OURS
from lesa.bench.records import REFERENCE, Comparison, Result

SIDE, GAP, GROUP_GAP = 128, 8, 22
MARGIN, CAPTION, LINE = 140, 20, 17
ACROSS, BANDS, PROMPTS = 5, 2, 6
"""Methods beside each other, rows of these, and prompts: a sheet of every method would be read by nobody."""
TIMES = 8
"""By how much differences are made larger."""
LETTERS = {False: 36, True: 17}
"""Letters of a line of a heading, over two pictures and over one."""
Results = Mapping[Key, Result]
Colour = tuple[int, int, int]
INK, FAINT, WRONG = (25, 25, 25), (110, 110, 110), (200, 30, 30)


def sheets(comparison: Comparison, ours: str = OURS) -> list[Image.Image]:
    """Draw the sheet of every frame of clips."""
    clips = [clip for kept in comparison.pictures.values() for clip in kept if clip.ndim == 4]
    return [sheet(comparison, frame, ours) for frame in range(len(clips[0]) if clips else 0)]


def sheet(comparison: Comparison, frame: int | None = None, ours: str = OURS) -> Image.Image:
    """Draw kept pictures, prompts x methods, methods of as many full steps side by side; of clips one frame.

    Right of each picture is its difference from the reference's, `TIMES` as large, and under it its PSNR, in red and
    'wrong' if it does not show what its prompt names. Of many methods some are shown, first those of a short report, at
    most `ACROSS` in each of `BANDS` rows. Without a `frame` it is the middle one.
    """
    results = {(result.method, result.schedule): result for result in comparison.results()}
    bands = _chosen(comparison, results, ours)
    drawn = [_band(comparison, results, [REFERENCE, *band], frame) for band in bands]
    canvas = Image.new("RGB", (max(band.width for band in drawn), sum(band.height for band in drawn)), "white")
    top = 0
    for band in drawn:
        canvas.paste(band, (0, top))
        top += band.height
    return canvas


def _chosen(comparison: Comparison, results: Results, ours: str) -> list[list[Key]]:
    """Return the methods that are shown beside the reference, in rows: all, or of many some of those with the most full
    steps and of those with the fewest."""
    keys = sorted((key for key in comparison.pictures if key != REFERENCE), key=lambda key: -results[key].full_steps)
    if len(keys) <= ACROSS * BANDS:
        return [keys[k : k + ACROSS] for k in range(0, len(keys), ACROSS)] or [[]]
    budgets = {round(results[key].full_steps): None for key in keys}
    marks, mine = brief.marks_of([results[key] for key in keys], ours), [key for key in keys if key[0].startswith(ours)]
    ends = [*budgets][: BANDS - 1] + [*budgets][-1:]
    bands = [[key for key in keys if round(results[key].full_steps) == budget] for budget in ends]

    def merit(key: Key) -> tuple:
        return key not in marks, key[0] != brief.FEWER, key not in mine, -results[key].psnr

    return [sorted(band, key=merit)[:ACROSS] for band in bands]


def _band(comparison: Comparison, results: Results, keys: Sequence[Key], frame: int | None) -> Image.Image:
    """Draw the reference and some methods beside it, and the prompts at the left."""
    records = comparison.records[REFERENCE][: len(comparison.pictures[REFERENCE])][:PROMPTS]
    headings = [_heading(results[key]) for key in keys]
    top = max(map(len, headings)) * LINE + 2 * GAP
    *lefts, end = _lefts(results, keys)
    canvas = Image.new("RGB", (end, top + len(records) * (SIDE + CAPTION + GAP)), "white")
    draw = ImageDraw.Draw(canvas)
    for k, record in enumerate(records):
        _write(draw, (GAP, top + k * (SIDE + CAPTION + GAP)), textwrap.wrap(record.prompt, 17), INK)
    for key, left, heading in zip(keys, lefts, headings, strict=True):
        _write(draw, (left, GAP), heading, INK)
        for k, picture in enumerate(comparison.pictures[key][: len(records)]):
            y = top + k * (SIDE + CAPTION + GAP)
            still, exact = _still(picture, frame), _still(comparison.pictures[REFERENCE][k], frame)
            canvas.paste(_sized(still), (left, y))
            text, colour = _caption(comparison.records[key][k])
            _write(draw, (left, y + SIDE + 2), [text], colour)
            if key != REFERENCE:
                canvas.paste(_sized(difference(still, exact)), (left + SIDE + 2, y))
    return canvas


def difference(picture: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """Return by how much the values of two pictures differ, `TIMES` as large, grey where pictures are not of a size."""
    if picture.shape != exact.shape:
        return np.full_like(exact, 128)
    return np.minimum(np.abs(picture.astype(int) - exact.astype(int)) * TIMES, 255).astype(np.uint8)


def _still(picture: np.ndarray, frame: int | None) -> np.ndarray:
    if picture.ndim == 3:
        return picture
    return picture[len(picture) // 2 if frame is None else frame]


def _lefts(results: Results, keys: Sequence[Key]) -> Iterator[int]:
    """Place columns from the left, those of as many full steps in one group; last comes where they end."""
    x = MARGIN
    for before, key in zip([None, *keys], keys, strict=False):
        if before is not None and results[before].full_steps != results[key].full_steps:
            x += GROUP_GAP
        yield x
        x += (SIDE if key == REFERENCE else 2 * SIDE + 2) + GAP
    yield x


def _heading(result: Result) -> list[str]:
    reference = (result.method, result.schedule) == REFERENCE
    second = f"{result.full_steps:.3g} full steps, " + ("the reference" if reference else result.schedule)
    mean = [] if reference else [f"mean {result.psnr:.1f} dB; right: {TIMES} x difference"]
    return [line for text in (result.method, second, *mean) for line in textwrap.wrap(text, LETTERS[reference])]


def _caption(record: Record) -> tuple[str, Colour]:
    psnr = "" if record.method == REFERENCE[0] else f"{record.psnr:.1f} dB"
    return (f"{psnr} wrong", WRONG) if record.prompted is False else (psnr, FAINT)


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], lines: Sequence[str], colour: Colour) -> None:
    draw.multiline_text(place, "\n".join(lines), fill=colour, font=ImageFont.load_default(13), spacing=LINE - 13)


def _sized(picture: np.ndarray) -> Image.Image:
    """Bring a picture to the sheet's size: small ones keep their pixels sharp."""
    image = Image.fromarray(picture)
    image.thumbnail((SIDE, SIDE))
    grown = SIDE // max(image.size)
    return image.resize((image.width * grown, image.height * grown), Image.Resampling.NEAREST)
