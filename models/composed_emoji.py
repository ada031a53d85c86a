"""The pictures and captions of the embedded models: colour emoji composed with a background, a size and a place."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

PIXELS = 64
COLOURS = {
    "white": (246, 246, 246),
    "grey": (140, 144, 150),
    "yellow": (250, 222, 110),
    "orange": (245, 160, 80),
    "pink": (245, 160, 195),
    "purple": (150, 110, 200),
    "blue": (80, 135, 225),
    "green": (95, 180, 110),
}
SIZES = {"small": 32, "large": 46}
PLACES = ("left", "middle", "right")


class Composition(NamedTuple):
    """How an emoji is drawn: one of `SIZES`, `COLOURS` and `PLACES` each."""

    size: str
    colour: str
    place: str


COMPOSITIONS = [Composition(*parts) for parts in product(SIZES, COLOURS, PLACES)]


def caption(name: str, composition: Composition) -> str:
    """Describe a composed emoji, e.g. `small red apple on blue, left`."""
    return f"{composition.size} {name} on {composition.colour}, {composition.place}"


def parse(prompt: str) -> tuple[str, Composition]:
    """Read a caption back into the emoji's name and its composition.

    Raises: ValueError if the prompt is not a caption as `caption` writes it.
    """
    try:
        size, rest = prompt.split(" ", 1)
        name, rest = rest.rsplit(" on ", 1)
        composition = Composition(size, *rest.split(", "))
        if composition not in COMPOSITIONS:
            raise ValueError(composition)
    except (ValueError, TypeError) as error:
        raise ValueError(f"a prompt must read like 'small red apple on blue, left', got {prompt!r}.") from error
    return name, composition


class Atlas:
    """The emoji of an embedded model: their names and one RGBA bitmap each, read from `emoji.png` and `emoji.json`."""

    def __init__(self, folder: str | Path):
        self.names: list[str] = json.loads((Path(folder) / "emoji.json").read_text())
        self._bitmaps = bitmaps(Path(folder) / "emoji.png", self.names)

    def draw(self, name: str, composition: Composition) -> np.ndarray:
        """Draw one emoji as uint8 RGB of shape (PIXELS, PIXELS, 3)."""
        return compose(self._bitmaps[name], composition)

    @lru_cache(maxsize=len(COMPOSITIONS))  # noqa: B019  (an atlas lives as long as the process)
    def _candidates(self, composition: Composition) -> np.ndarray:
        return np.stack([self.draw(name, composition) for name in self.names]).astype(np.float32)

    def recognise(self, picture: np.ndarray, composition: Composition) -> str:
        """Name the emoji whose drawing in this composition is nearest in pixels to a uint8 RGB picture."""
        candidates = self._candidates(composition)
        distance = ((candidates - picture.astype(np.float32)) ** 2).sum(axis=(1, 2, 3))
        return self.names[int(distance.argmin())]

    def is_prompted(self, prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> list[bool]:
        """Tell for each picture whether it shows the emoji that its prompt names."""
        parsed = [parse(prompt) for prompt in prompts]
        return [self.recognise(p, composition) == name for (name, composition), p in zip(parsed, pictures, strict=True)]


def bitmaps(sheet: Path, names: Sequence[str]) -> dict[str, Image.Image]:
    """Cut a sheet of square RGBA bitmaps, row by row, into one for each name."""
    picture, side = Image.open(sheet), max(SIZES.values())
    columns = picture.width // side
    corners = [(k % columns * side, k // columns * side) for k in range(len(names))]
    return {name: picture.crop((x, y, x + side, y + side)) for name, (x, y) in zip(names, corners, strict=True)}


def compose(bitmap: Image.Image, composition: Composition) -> np.ndarray:
    """Put an RGBA bitmap on a coloured ground; returns uint8 RGB of shape (PIXELS, PIXELS, 3)."""
    side = SIZES[composition.size]
    ground = Image.new("RGB", (PIXELS, PIXELS), COLOURS[composition.colour])
    emoji = bitmap.resize((side, side), Image.Resampling.LANCZOS)
    room = PIXELS - side
    x = {"left": 1, "middle": room // 2, "right": room - 1}[composition.place]
    ground.paste(emoji, (x, room // 2), emoji)
    return np.asarray(ground)


def recogniser(folder: str | Path) -> Callable[[Sequence[str], Sequence[np.ndarray]], list[bool]]:
    """Return the call by which `lesa bench` tells pictures that show what their prompts name."""
    return Atlas(folder).is_prompted
