"""The pictures and captions of `unseen-letters`: a letter or digit in a style, a colour, a size and a place."""

import random
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

PIXELS = 32
FINER = 4  # times that a letter is drawn larger than it is shown
GLYPHS = "abcdefghijklmnopqrstuvwxyz23456789"  # drawn as capitals; 0 and 1 look like o and i
FONTS = {
    "serif": ("DejaVuSerif", "STIXGeneral", "cmr10"),
    "sans": ("DejaVuSans", "cmss10"),
    "bold": ("DejaVuSans-Bold", "DejaVuSerif-Bold", "STIXGeneralBol"),
    "italic": ("DejaVuSerif-Italic", "STIXGeneralItalic", "cmti10"),
}
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
PLACES = {"left": -1, "middle": 0, "right": 1}


class Letter(NamedTuple):
    """What a caption says; which of the style's fonts, the tilt and the exact place are left to chance."""

    size: str
    colour: str
    style: str
    glyph: str
    ground: str
    place: str


LETTERS = [
    Letter(*parts) for parts in product(SIZES, COLOURS, FONTS, GLYPHS, COLOURS, PLACES) if parts[1] != parts[4]
]


def caption(letter: Letter) -> str:
    """Describe a letter, e.g. `large red serif q on blue, left`."""
    return f"{letter.size} {letter.colour} {letter.style} {letter.glyph} on {letter.ground}, {letter.place}"


def parse(prompt: str) -> Letter:
    """Read a caption back.

    Raises: ValueError if the prompt is not a caption as `caption` writes it.
    """
    words = prompt.replace(",", "").split()
    letter = Letter(*(words[:4] + words[5:])) if len(words) == 7 else None
    if letter is None or letter.place not in PLACES or caption(letter) != prompt or letter.glyph not in GLYPHS:
        raise ValueError(f"a prompt must read like 'large red serif q on blue, left', got {prompt!r}.")
    return letter


def draw(letter: Letter, chance: random.Random) -> np.ndarray:
    """Draw a letter as uint8 RGB of shape (PIXELS, PIXELS, 3)."""
    name = chance.choice(FONTS[letter.style])
    room = (PIXELS - SIZES[letter.size]) / 2 - 3
    x = PIXELS / 2 + PLACES[letter.place] * room + chance.uniform(-1, 1)
    y = PIXELS / 2 + chance.uniform(-2, 2)
    return paint(letter, mask(name, letter, x, y, chance.uniform(-8, 8)))


def mask(name: str, letter: Letter, x: float, y: float, tilt: float) -> Image.Image:
    """Draw a letter's shape around a centre in pixels, tilted by degrees, as a grey picture."""
    side = PIXELS * FINER
    shape = Image.new("L", (side, side))
    face, glyph = font(name, SIZES[letter.size] * FINER), letter.glyph.upper()
    ImageDraw.Draw(shape).text((side // 2, side // 2), glyph, fill=255, font=face, anchor="mm")
    box = shape.getbbox() or (0, 0, side, side)
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    move = (x * FINER - centre[0], y * FINER - centre[1])
    turned = shape.rotate(tilt, Image.Resampling.BICUBIC, center=centre, translate=move)
    return turned.resize((PIXELS, PIXELS), Image.Resampling.BOX)


def paint(letter: Letter, shape: Image.Image) -> np.ndarray:
    """Put a letter's shape in its colour on its ground."""
    ground = Image.new("RGB", (PIXELS, PIXELS), COLOURS[letter.ground])
    ground.paste(COLOURS[letter.colour], (0, 0), shape)
    return np.asarray(ground)


@lru_cache(maxsize=None)
def font(name: str, height: int) -> ImageFont.FreeTypeFont:
    """Open a font of matplotlib's at the size that gives its capitals this height in pixels."""
    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"
    probe = ImageFont.truetype(file, 200)
    top, bottom = probe.getbbox("H")[1::2]
    return ImageFont.truetype(file, round(200 * height / (bottom - top)))
