"""The pictures and captions of `unseen-letters`: a letter or digit in a style, a colour, a size and a place."""

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

PIXELS = 32
FINER = 4  # times that a letter is drawn larger than it is shown
GLYPHS = "acefhkmnprstxz2478"  # drawn as capitals
FONTS = {"plain": "DejaVuSans", "bold": "DejaVuSans-Bold", "italic": "DejaVuSerif-Italic"}
COLOURS = {
    "white": (245, 245, 245),
    "black": (25, 25, 30),
    "red": (205, 45, 45),
    "orange": (245, 150, 50),
    "yellow": (250, 220, 80),
    "green": (60, 150, 75),
    "blue": (50, 90, 200),
    "purple": (130, 70, 170),
}
SIZES = {"small": 12, "large": 19}  # height of a capital in pixels
ASIDE = {"small": 8, "large": 4}  # pixels from the middle: whole patches
PLACES = {"left": -1, "middle": 0, "right": 1}


class Letter(NamedTuple):
    """What a caption says; tilt and exact place are left to chance."""

    size: str
    colour: str
    style: str
    glyph: str
    ground: str
    place: str


LETTERS = [Letter(*parts) for parts in product(SIZES, COLOURS, FONTS, GLYPHS, COLOURS, PLACES) if parts[1] != parts[4]]


def caption(letter: Letter) -> str:
    """Describe a letter, e.g. `large red bold k on blue, left`."""
    return f"{letter.size} {letter.colour} {letter.style} {letter.glyph} on {letter.ground}, {letter.place}"


def parse(prompt: str) -> Letter:
    """Read a caption back.

    Raises: ValueError if the prompt is not a caption as `caption` writes it.
    """
    words = prompt.replace(",", "").split()
    letter = Letter(*(words[:4] + words[5:])) if len(words) == 7 else None
    if letter is None or letter.place not in PLACES or caption(letter) != prompt or letter.glyph not in GLYPHS:
        raise ValueError(f"a prompt must read like 'large red bold k on blue, left', got {prompt!r}.")
    return letter


def draw(letter: Letter, chance: random.Random) -> np.ndarray:
    """Draw a letter as uint8 RGB of shape (PIXELS, PIXELS, 3)."""
    return paint(letter, shape(letter, chance)).round().astype(np.uint8)


def paint(letter: Letter, shape: np.ndarray) -> np.ndarray:
    """Put a letter's shape in its colour on its ground."""
    colour, ground = (np.array(COLOURS[name], dtype=float) for name in (letter.colour, letter.ground))
    return ground + shape[..., None] * (colour - ground)


def shape(letter: Letter, chance: random.Random) -> np.ndarray:
    """Draw how much of each pixel a letter covers, its tilt and exact place left to chance."""
    x = PIXELS / 2 + PLACES[letter.place] * ASIDE[letter.size] + chance.uniform(-0.7, 0.7)
    y = PIXELS / 2 + chance.uniform(-0.7, 0.7)
    return np.asarray(mask(letter, x, y, chance.uniform(-4, 4)), dtype=float) / 255


def mask(letter: Letter, x: float, y: float, tilt: float) -> Image.Image:
    """Draw a letter's shape around a centre in pixels, tilted by degrees, as a grey picture."""
    side = PIXELS * FINER
    shape = Image.new("L", (side, side))
    face, glyph = font(FONTS[letter.style], SIZES[letter.size] * FINER), letter.glyph.upper()
    ImageDraw.Draw(shape).text((side // 2, side // 2), glyph, fill=255, font=face, anchor="mm")
    box = shape.getbbox() or (0, 0, side, side)
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    move = (x * FINER - centre[0], y * FINER - centre[1])
    turned = shape.rotate(tilt, Image.Resampling.BICUBIC, center=centre, translate=move)
    return turned.resize((PIXELS, PIXELS), Image.Resampling.BOX)


@cache
def font(name: str, height: int) -> ImageFont.FreeTypeFont:
    """Open a font of matplotlib's at the size that gives its capitals this height in pixels."""
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    probe = ImageFont.truetype(file, 200)
    top, bottom = probe.getbbox("H")[1::2]
    return ImageFont.truetype(file, round(200 * height / (bottom - top)))


def recogniser(folder: str | Path) -> Callable[[Sequence[str], Sequence[np.ndarray]], list[bool]]:
    """Return the call by which `lesa bench` tells pictures that show what their prompts name."""
    return lambda prompts, pictures: [shows(*pair) for pair in zip(prompts, pictures, strict=True)]


def shows(prompt: str, picture: np.ndarray) -> bool:
    """Tell whether the letter whose drawings, with all else as prompted, come nearest in pixels is the prompted one."""
    letter = parse(prompt)
    drawn = [paint(letter, _drawn(letter._replace(glyph=glyph, colour="", ground=""))) for glyph in GLYPHS]
    distance = [((one - picture) ** 2).mean(axis=(1, 2, 3)).min() for one in drawn]
    return GLYPHS[int(np.argmin(distance))] == letter.glyph


@cache
def _drawn(letter: Letter, count: int = 36) -> np.ndarray:
    """Return a letter's shape as chance may show it: of shape (count, PIXELS, PIXELS)."""
    return np.stack([shape(letter, random.Random(k)) for k in range(count)])
