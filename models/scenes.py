"""The pictures and captions of `emoji-scene`: two tinted emoji in relation to each other, and a third in the sky.

A caption says what is drawn and how it lies; how far each thing is moved from its place, where in the sky the third
stands and how the ground is lit are left to chance.
"""

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

PIXELS = 128
COLOURS = {
    "red": (214, 48, 56),
    "yellow": (250, 204, 40),
    "green": (40, 150, 76),
    "blue": (48, 96, 214),
    "purple": (136, 64, 184),
    "brown": (134, 84, 48),
}
GROUNDS = {
    "white": (244, 244, 244),
    "grey": (160, 164, 170),
    "pink": (250, 186, 208),
    "green": (166, 220, 172),
    "blue": (160, 200, 246),
    "yellow": (250, 234, 164),
}
SIZES = {"small": 32, "large": 48}
SKY_SIZE = 32
SKY = ("moon", "sun", "star", "cloud")
BESIDE = ("left of", "right of")
RELATIONS = (*BESIDE, "above", "below")
LATTICE = 8  # pixels between places, one of the transformer's tokens
MOVED = range(-LATTICE, LATTICE + 1, LATTICE)
SLACK = 2  # pixels between the corners at which a bitmap is looked for, and beyond the last places
SKY_ROOM = range(0, PIXELS - SKY_SIZE + 1, LATTICE)


class Thing(NamedTuple):
    """One emoji: of `SIZES`, of `COLOURS` and its name."""

    size: str
    colour: str
    name: str


class Scene(NamedTuple):
    """What a caption says; `sky` is a colour and one of `SKY`, and only there if `relation` is one of `BESIDE`."""

    first: Thing
    relation: str
    second: Thing
    ground: str
    sky: tuple[str, str] | None = None


class Place(NamedTuple):
    """Where a thing is looked for: the corner's coordinates if it lies in the middle, and the corners it may have."""

    xs: range
    ys: range


def caption(scene: Scene) -> str:
    """Describe a scene, e.g. `small red bug left of large blue cow, on green, under a yellow moon`."""
    first, second = " ".join(scene.first), " ".join(scene.second)
    sky = f", under a {' '.join(scene.sky)}" if scene.sky else ""
    return f"{first} {scene.relation} {second}, on {scene.ground}{sky}"


def parse(prompt: str) -> Scene:
    """Read a caption back.

    Raises: ValueError if the prompt is not a caption as `caption` writes it.
    """
    try:
        things, ground, *sky = prompt.split(", ")
        relation = next(r for r in RELATIONS if f" {r} " in things)
        first, second = (Thing(*part.split(" ")) for part in things.split(f" {relation} "))
        colour, kind = sky[0].removeprefix("under a ").split(" ") if sky else ("", "")
        scene = Scene(first, relation, second, ground.removeprefix("on "), (colour, kind) if sky else None)
        if caption(scene) != prompt or not is_drawable(scene):
            raise ValueError(scene)
    except (ValueError, TypeError, StopIteration) as error:
        example = "small red bug left of large blue cow, on green, under a yellow moon"
        raise ValueError(f"a prompt must read like {example!r}, got {prompt!r}.") from error
    return scene


def is_drawable(scene: Scene) -> bool:
    """Tell whether all words are known, the names differ, nothing has the ground's colour and the sky has room."""
    words = all(t.size in SIZES and t.colour in COLOURS for t in (scene.first, scene.second))
    sky = scene.sky is None or (scene.sky[0] in COLOURS and scene.sky[1] in SKY and scene.relation in BESIDE)
    clear = scene.ground not in (scene.first.colour, scene.second.colour, *(scene.sky or ())[:1])
    known = scene.relation in RELATIONS and scene.ground in GROUNDS
    return words and sky and clear and known and scene.first.name != scene.second.name


def pair(scene: Scene) -> tuple[str, str]:
    """Return the names of a scene's two emoji in the alphabet's order: what is held out together."""
    first, second = sorted((scene.first.name, scene.second.name))
    return first, second


def places(scene: Scene) -> list[tuple[Thing, Place]]:
    """Return what is drawn and where, the thing in the sky last."""
    low, high = (PIXELS // 4, 3 * PIXELS // 4)
    if scene.relation in BESIDE:
        y = PIXELS // 2 + (2 * LATTICE if scene.sky else 0)
        centres = [(low, y), (high, y)]
    else:
        centres = [(PIXELS // 2, low), (PIXELS // 2, high)]
    if scene.relation in ("right of", "below"):
        centres.reverse()
    things = [(t, _around(t, *centre)) for t, centre in zip((scene.first, scene.second), centres, strict=True)]
    if scene.sky:
        things.append((Thing("sky", *scene.sky), Place(SKY_ROOM, range(0, LATTICE + 1, LATTICE))))
    return things


def _around(thing: Thing, x: int, y: int) -> Place:
    half = SIZES[thing.size] // 2
    xs, ys = (range(c - half + MOVED.start, c - half + MOVED.stop, LATTICE) for c in (x, y))
    return Place(xs, ys)


class Atlas:
    """The emoji of the scenes, read from `emoji.png` and `emoji.json`: the names of `SKY` come last."""

    def __init__(self, folder: str | Path):
        everything: list[str] = json.loads((Path(folder) / "emoji.json").read_text())
        self.names = [name for name in everything if name not in SKY]
        sheet = Image.open(Path(folder) / "emoji.png")
        side, columns = sheet.height, sheet.width // sheet.height
        assert columns == len(everything), "one row of squares, one for each name"
        self._shapes = {n: sheet.crop((k * side, 0, (k + 1) * side, side)) for k, n in enumerate(everything)}

    @cache  # noqa: B019  (an atlas lives as long as the process)
    def tinted(self, thing: Thing) -> np.ndarray:
        """Return a thing in its colour as floats of shape (side, side, 4), the last channel its opacity in [0, 1]."""
        side = SIZES.get(thing.size, SKY_SIZE)
        shape = np.asarray(self._shapes[thing.name].resize((side, side), Image.Resampling.LANCZOS), np.float32) / 255
        light, opacity = shape[..., :1], shape[..., 1:]
        colour = np.array(COLOURS[thing.colour], np.float32)
        dark, pale = 0.3 * colour, 0.25 * colour + 0.75 * 255
        shades = np.where(light < 0.5, dark + (colour - dark) * 2 * light, colour + (pale - colour) * (2 * light - 1))
        return np.concatenate([shades, opacity], axis=-1)

    def draw(self, scene: Scene, chance: random.Random) -> np.ndarray:
        """Draw a scene as uint8 RGB of shape (PIXELS, PIXELS, 3)."""
        picture = lit(GROUNDS[scene.ground], chance)
        for thing, place in places(scene):
            shape, x, y = self.tinted(thing), chance.choice(place.xs), chance.choice(place.ys)
            part = picture[y : y + len(shape), x : x + len(shape)]
            part += shape[..., 3:] * (shape[..., :3] - part)
        return picture.clip(0, 255).round().astype(np.uint8)

    @cache  # noqa: B019
    def _candidates(self, sky: bool) -> list[tuple[list[Thing], np.ndarray]]:
        """Return all things that might stand in one place, in lists of one size, and their bitmaps."""
        names, sizes = (SKY, ("sky",)) if sky else (self.names, SIZES)
        lists = [[Thing(size, *rest) for rest in product(COLOURS, names)] for size in sizes]
        return [(things, np.stack([self.tinted(thing) for thing in things])) for things in lists]

    def recognise(self, picture: np.ndarray, ground: np.ndarray, place: Place, size: str) -> Thing | None:
        """Say what stands in a place: the thing that leaves the least squared difference, None if the bare ground does.

        All names, colours and sizes are compared, each where it fits best among the place's corners and between them;
        `picture` and its `ground` are floats.
        """
        candidates = self._candidates(size == "sky")
        found = [_best(things, shapes, picture, ground, place, size) for things, shapes in candidates]
        explained, thing = max(found, key=lambda pair: pair[0])
        return thing if explained > 0 else None

    def are_found(self, prompt: str, picture: np.ndarray) -> list[bool]:
        """Tell for each thing that a prompt names whether a uint8 RGB picture has it in its place, colour and size."""
        picture = picture.astype(np.float32)
        ground = bare(picture)
        return [self.recognise(picture, ground, place, t.size) == t for t, place in places(parse(prompt))]

    def is_prompted(self, prompts: Sequence[str], pictures: Sequence[np.ndarray]) -> list[bool]:
        """Tell for each picture whether all that its prompt names is found."""
        return [all(self.are_found(prompt, picture)) for prompt, picture in zip(prompts, pictures, strict=True)]


def _best(
    things: list[Thing], shapes: np.ndarray, picture: np.ndarray, ground: np.ndarray, place: Place, size: str
) -> tuple[float, Thing]:
    """Return how much of the squared difference from the bare ground a thing explains at most, and which."""
    side, wanted = shapes.shape[1], SIZES.get(size, SKY_SIZE)
    corners = product(*(_corners(span, wanted, side) for span in place))
    difference = picture - ground
    windows = np.stack([difference[y : y + side, x : x + side].ravel() for x, y in corners])
    under = ground[np.mean(place.ys, dtype=int) + wanted // 2, np.mean(place.xs, dtype=int) + wanted // 2]
    wholes = (shapes[..., 3:] * (shapes[..., :3] - under)).reshape(len(shapes), -1)
    explained = 2 * windows @ wholes.T - (wholes**2).sum(axis=1)
    return float(explained.max()), things[int(explained.max(axis=0).argmax())]


def bare(picture: np.ndarray) -> np.ndarray:
    """Return the ground of a picture as if nothing stood on it: the plane in each channel that most of it lies on."""
    along = np.linspace(-1, 1, PIXELS, dtype=np.float32)
    y, x = np.meshgrid(along, along, indexing="ij")
    plane = np.stack([np.ones_like(x), x, y], axis=-1)[::2, ::2].reshape(-1, 3)
    pixels = picture[::2, ::2].reshape(-1, 3)
    slopes = np.linalg.lstsq(plane, pixels, rcond=None)[0]
    for _ in range(8):
        distance = np.abs(pixels - plane @ slopes).max(axis=1)
        near = distance <= np.quantile(distance, 0.6)
        slopes = np.linalg.lstsq(plane[near], pixels[near], rcond=None)[0]
    return slopes[0] + x[..., None] * slopes[1] + y[..., None] * slopes[2]


def _corners(span: range, wanted: int, side: int) -> list[int]:
    """Return the corners tried of bitmaps of `side` pixels where those of `wanted` pixels have `span`."""
    inwards = (wanted - side) // 2
    tried = range(span[0] + inwards - SLACK, span[-1] + inwards + SLACK + 1, SLACK)
    return [corner for corner in tried if 0 <= corner <= PIXELS - side]


def lit(colour: tuple[int, int, int], chance: random.Random) -> np.ndarray:
    """Return a ground of one colour, lit more to one side than to the other: floats of shape (PIXELS, PIXELS, 3)."""
    level, slopes = chance.uniform(0.72, 1.04), [chance.uniform(-0.16, 0.16) for _ in range(2)]
    along = np.linspace(-1, 1, PIXELS, dtype=np.float32)
    light = level + slopes[0] * along[:, None] + slopes[1] * along[None, :]
    return light[..., None] * np.array(colour, np.float32)


def recogniser(folder: str | Path) -> Callable[[Sequence[str], Sequence[np.ndarray]], list[bool]]:
    """Return the call by which `lesa bench` tells pictures that show what their prompts name."""
    return Atlas(folder).is_prompted
