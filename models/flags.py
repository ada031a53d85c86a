"""The pictures and captions of `unseen-flags`: a waving flag of a layout in two colours, with an emblem in a third."""

import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

HEIGHT, WIDTH = 24, 40
FINER = 3  # points a pixel along each side
LAYOUTS = ("rows", "columns", "halves", "cross", "saltire", "quarters", "border")
EMBLEMS = ("star", "disc", "ring", "diamond", "crescent", "heart")
COLOURS = {
    "white": (240, 240, 236),
    "black": (36, 34, 40),
    "red": (196, 40, 56),
    "orange": (240, 140, 40),
    "yellow": (248, 208, 64),
    "green": (24, 132, 84),
    "blue": (36, 76, 172),
    "cyan": (110, 190, 226),
}
PLACES = {"left": 0.25, "middle": 0.5, "right": 0.75}  # of the width


class Flag(NamedTuple):
    """What a caption says; how the flag waves and the emblem is turned are left to chance."""

    layout: str
    first: str
    second: str
    colour: str
    emblem: str
    place: str


FLAGS = [
    Flag(*parts) for parts in product(LAYOUTS, COLOURS, COLOURS, COLOURS, EMBLEMS, PLACES) if len(set(parts[1:4])) == 3
]


def caption(flag: Flag) -> str:
    """Describe a flag, e.g. `cross of red and white, blue star, left`."""
    return f"{flag.layout} of {flag.first} and {flag.second}, {flag.colour} {flag.emblem}, {flag.place}"


def parse(prompt: str) -> Flag:
    """Read a caption back.

    Raises: ValueError if the prompt is not a caption as `caption` writes it.
    """
    words = prompt.replace(",", "").split()
    flag = Flag(words[0], words[2], words[4], *words[5:]) if len(words) == 8 else None
    if flag is None or flag.layout not in LAYOUTS or flag.emblem not in EMBLEMS or caption(flag) != prompt:
        raise ValueError(f"a prompt must read like 'cross of red and white, blue star, left', got {prompt!r}.")
    return flag


def draw(flag: Flag, chance: random.Random) -> np.ndarray:
    """Draw a flag as uint8 RGB of shape (HEIGHT, WIDTH, 3)."""
    return _paint(flag, _shares(flag, chance)).round().astype(np.uint8)


def _paint(flag: Flag, shares: np.ndarray) -> np.ndarray:
    """Give each share of a pixel its colour."""
    return shares @ np.array([COLOURS[flag.first], COLOURS[flag.second], COLOURS[flag.colour]], dtype=float)


def _shares(flag: Flag, chance: random.Random) -> np.ndarray:
    """Return how much of a pixel has which of the three colours, dimmed by the waves: of shape (HEIGHT, WIDTH, 3)."""
    y, x = np.mgrid[0 : HEIGHT * FINER, 0 : WIDTH * FINER] / FINER + 0.5 / FINER
    wave = 2 * np.pi * (x / chance.uniform(22, 34) + chance.random())
    y = y + chance.uniform(0.3, 1.3) * np.sin(wave)
    light = 1 - chance.uniform(0.03, 0.12) * (1 + np.cos(wave))
    turn, size = chance.uniform(-0.3, 0.3), chance.uniform(5.2, 6.4)
    across, down = x - PLACES[flag.place] * WIDTH, y - HEIGHT / 2 + chance.uniform(-1, 1)
    right = (across * np.cos(turn) + down * np.sin(turn)) / size
    up = (across * np.sin(turn) - down * np.cos(turn)) / size
    second, emblem = _is_second(flag.layout, y, x), _is_emblem(flag.emblem, right, up)
    shares = np.stack([~second & ~emblem, second & ~emblem, emblem], axis=-1) * light[..., None]
    return shares.reshape(HEIGHT, FINER, WIDTH, FINER, 3).mean(axis=(1, 3))


def _is_second(layout: str, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Tell where a layout has its second colour."""
    v, u = y / HEIGHT, x / WIDTH
    return {
        "rows": (4 * v).astype(int) % 2 == 1,
        "columns": (4 * u).astype(int) % 2 == 1,
        "halves": u > v,
        "cross": (abs(v - 0.5) < 0.14) | (abs(u - 0.5) < 0.085),
        "saltire": np.minimum(abs(u - v), abs(u + v - 1)) < 0.13,
        "quarters": (u > 0.5) ^ (v > 0.5),
        "border": np.minimum.reduce([y, HEIGHT - y, x, WIDTH - x]) < 3.2,
    }[layout]


def _is_emblem(emblem: str, right: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Tell where an emblem is, in coordinates in which it reaches 1."""
    far, fifth = np.hypot(right, up), np.pi / 5
    fold = abs((np.arctan2(right, up) + fifth) % (2 * fifth) - fifth)  # from the nearest tip of a star
    tip, notch = 1.1, (0.45 * np.cos(fifth), 0.45 * np.sin(fifth))
    along, aside = far * np.cos(fold), far * np.sin(fold)
    hearty = (1.15 * right) ** 2 + (1.15 * up + 0.1) ** 2 - 0.75
    return {
        "star": along * notch[1] + aside * (tip - notch[0]) < tip * notch[1],
        "disc": far < 0.95,
        "ring": abs(far - 0.75) < 0.25,
        "diamond": abs(right) + abs(up) < 1.1,
        "crescent": (far < 1) & (np.hypot(right - 0.45, up) > 0.75),
        "heart": hearty**3 < (1.15 * right) ** 2 * (1.15 * up + 0.1) ** 3,
    }[emblem]


def recogniser(folder: str | Path) -> Callable[[Sequence[str], Sequence[np.ndarray]], list[bool]]:
    """Return the call by which `lesa bench` tells pictures that show what their prompts name."""
    return lambda prompts, pictures: [shows(*pair) for pair in zip(prompts, pictures, strict=True)]


def shows(prompt: str, picture: np.ndarray) -> bool:
    """Tell whether the prompted flag's drawings come nearer in pixels than those with one word changed."""
    flag = parse(prompt)
    words = (LAYOUTS, COLOURS, COLOURS, COLOURS, EMBLEMS, PLACES)
    changed = (flag._replace(**{part: w}) for part, others in zip(Flag._fields, words, strict=True) for w in others)
    distance = {one: ((_paint(one, _candidates(one)) - picture) ** 2).mean((1, 2, 3)).min() for one in changed}
    return bool(distance.pop(flag) <= min(distance.values()))


def _candidates(flag: Flag) -> np.ndarray:
    """Return the shares of a flag's colours as chance may show them: of shape (count, HEIGHT, WIDTH, 3)."""
    return _drawn(flag._replace(first="", second="", colour=""))


@cache
def _drawn(flag: Flag, count: int = 48) -> np.ndarray:
    return np.stack([_shares(flag, random.Random(k)) for k in range(count)])
