"""The clips and captions of the embedded model of videos: a colour emoji that moves on a coloured ground."""

import json
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from composed_emoji import COLOURS, bitmaps
from PIL import Image

FRAMES, PIXELS = 9, 48
NAMES = "clips.json"
GROUNDS = ("white", "grey", "yellow", "pink", "blue", "green")


class Pose(NamedTuple):
    """Where an emoji is in one frame: its place between the edges, from -1 to 1, its turn to the left and its side."""

    x: float = 0.0
    y: float = 0.0
    turns: float = 0.0
    side: float = 28.0


MOTIONS: dict[str, Callable[[float], Pose]] = {
    "sliding left": lambda t: Pose(x=1 - 2 * t),
    "sliding right": lambda t: Pose(x=2 * t - 1),
    "rolling left": lambda t: Pose(x=1 - 2 * t, turns=t / 2),
    "rolling right": lambda t: Pose(x=2 * t - 1, turns=-t / 2),
    "bouncing": lambda t: Pose(y=2 * (2 * t - 1) ** 2 - 1),
    "turning": lambda t: Pose(turns=-t / 2),
    "growing": lambda t: Pose(side=14 + 22 * t),
    "shrinking": lambda t: Pose(side=36 - 22 * t),
}
"""The pose at each moment of a clip, from 0 to 1."""


class Scene(NamedTuple):
    """How an emoji moves, one of `MOTIONS`, and on which colour, one of `GROUNDS`."""

    motion: str
    colour: str


SCENES = [Scene(motion, colour) for motion in MOTIONS for colour in GROUNDS]


def caption(name: str, scene: Scene) -> str:
    """Describe a clip, e.g. `red apple rolling left on blue`."""
    return f"{name} {scene.motion} on {scene.colour}"


def parse(prompt: str) -> tuple[str, Scene]:
    """Read a caption back into the emoji's name and its scene.

    Raises: ValueError if the prompt is not a caption as `caption` writes it.
    """
    rest, _, colour = prompt.rpartition(" on ")
    for motion in MOTIONS:
        if colour in GROUNDS and (name := rest.removesuffix(f" {motion}")) != rest and name:
            return name, Scene(motion, colour)
    raise ValueError(f"a prompt must read like 'red apple rolling left on blue', got {prompt!r}.")


class Reel:
    """The emoji of an embedded model of videos: their names and bitmaps, read from `emoji.png` and `clips.json`."""

    def __init__(self, folder: str | Path):
        self.names: list[str] = json.loads((Path(folder) / NAMES).read_text())
        self._bitmaps = bitmaps(Path(folder) / "emoji.png", self.names)

    def draw(self, name: str, scene: Scene) -> np.ndarray:
        """Draw one clip as uint8 RGB of shape (FRAMES, PIXELS, PIXELS, 3)."""
        return film(self._bitmaps[name], scene)

    @lru_cache(maxsize=len(GROUNDS))  # noqa: B019  (a reel lives as long as the process)
    def _candidates(self, colour: str) -> list[tuple[str, str, np.ndarray]]:
        pairs = [(name, motion) for name in self.names for motion in MOTIONS]
        return [(name, motion, self.draw(name, Scene(motion, colour))) for name, motion in pairs]

    def recognise(self, clip: np.ndarray, colour: str) -> tuple[str, str]:
        """Name the emoji and the motion whose clip on this colour is nearest in pixels to a uint8 RGB clip."""
        wide = clip.astype(np.int32)
        *best, _ = min(self._candidates(colour), key=lambda candidate: int(np.square(wide - candidate[2]).sum()))
        return best[0], best[1]

    def is_prompted(self, prompts: Sequence[str], clips: Sequence[np.ndarray]) -> list[bool]:
        """Tell for each clip whether it shows the emoji and the motion that its prompt names."""
        parsed = [parse(prompt) for prompt in prompts]
        return [
            self.recognise(clip, scene.colour) == (name, scene.motion)
            for (name, scene), clip in zip(parsed, clips, strict=True)
        ]


def film(bitmap: Image.Image, scene: Scene) -> np.ndarray:
    """Move an RGBA bitmap over a coloured ground; returns uint8 RGB of shape (FRAMES, PIXELS, PIXELS, 3)."""
    pose = MOTIONS[scene.motion]
    return np.stack([_frame(bitmap, pose(k / (FRAMES - 1)), scene.colour) for k in range(FRAMES)])


def _frame(bitmap: Image.Image, pose: Pose, colour: str) -> np.ndarray:
    ground = Image.new("RGB", (PIXELS, PIXELS), COLOURS[colour])
    turned = bitmap.rotate(360 * pose.turns, Image.Resampling.BICUBIC)
    side = round(pose.side)
    emoji = turned.resize((side, side), Image.Resampling.LANCZOS)
    room = PIXELS - side
    corner = round(room / 2 + pose.x * (room / 2 - 1)), round(room / 2 + pose.y * (room / 2 - 1))
    ground.paste(emoji, corner, emoji)
    return np.asarray(ground)


def recogniser(folder: str | Path) -> Callable[[Sequence[str], Sequence[np.ndarray]], list[bool]]:
    """Return the call by which `lesa bench` tells clips that show what their prompts name."""
    return Reel(folder).is_prompted
