"""Clips of moving emoji: their captions, their frames and the recogniser."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from composed_emoji import COLOURS
from moving_emoji import FRAMES, GROUNDS, MOTIONS, PIXELS, SCENES, Reel, Scene, caption, parse

MODEL = Path(__file__).parent.parent / "models" / "emoji-video"


@pytest.fixture(scope="module")
def reel() -> Reel:
    return Reel(MODEL)


def prompts(split: str) -> list[str]:
    return (MODEL / "prompts" / f"{split}.txt").read_text().splitlines()


def centre(frame: np.ndarray, colour: str) -> np.ndarray:
    """The middle (y, x) of what is not ground."""
    places = np.argwhere((frame != np.array(COLOURS[colour])).any(-1))
    return (places.min(0) + places.max(0)) / 2


def test_captions_are_read_back(reel):
    assert caption("beer mug", Scene("rolling left", "blue")) == "beer mug rolling left on blue"
    for name in reel.names:
        for scene in SCENES:
            assert parse(caption(name, scene)) == (name, scene)


@pytest.mark.parametrize(
    "prompt",
    ["", "beer mug", "beer mug on blue", "beer mug rolling on blue", "beer mug turning on red", "turning on blue"],
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="a prompt must read like"):
        parse(prompt)


def test_the_prompts_are_all_clips_in_three_parts(reel):
    parts = [prompts(split) for split in ("train", "validation", "heldout")]
    assert sorted(prompt for part in parts for prompt in part) == sorted(
        caption(name, scene) for name in reel.names for scene in SCENES
    )
    trained = {parse(prompt)[0] for prompt in parts[0]}
    assert all(parse(prompt)[0] in trained for prompt in parts[1] + parts[2])


@pytest.mark.parametrize(("motion", "way"), [("sliding left", (0, -1)), ("rolling right", (0, 1))])
def test_emoji_travel(reel, motion, way):
    clip = reel.draw("soccer ball", Scene(motion, "green"))
    assert clip.shape == (FRAMES, PIXELS, PIXELS, 3) and clip.dtype == np.uint8
    moves = np.array([b - a for a, b in pairwise(centre(frame, "green") for frame in clip)])
    assert (np.sign(moves[:, 1]) == way[1]).all() and (abs(moves[:, 0]) <= 1).all()


def test_emoji_bounce_turn_and_grow(reel):
    heights = [centre(frame, "blue")[0] for frame in reel.draw("drum", Scene("bouncing", "blue"))]
    assert np.argmin(heights) == FRAMES // 2 and heights[0] == heights[-1] == max(heights)
    first, *_, last = reel.draw("drum", Scene("turning", "blue"))
    upright = reel.draw("drum", Scene("sliding left", "blue"))[FRAMES // 2]
    assert np.array_equal(first, upright) and np.abs(last.astype(int) - first).mean() > 5
    grown, shrunk = (reel.draw("drum", Scene(motion, "blue")) for motion in ("growing", "shrinking"))
    sizes = [(frame != np.array(COLOURS["blue"])).any(-1).sum() for frame in grown]
    assert sizes == sorted(sizes) and sizes[-1] > 4 * sizes[0] and np.array_equal(grown, shrunk[::-1])


def test_every_clip_is_recognised_and_no_other(reel):
    pairs = [(name, motion) for name in reel.names[:6] for motion in MOTIONS]
    clips = [reel.draw(name, Scene(motion, GROUNDS[4])) for name, motion in pairs]
    noise = np.random.default_rng(0).normal(0, 25, clips[0].shape)
    noisy = [np.clip(clip + noise, 0, 255).astype(np.uint8) for clip in clips]
    assert [reel.recognise(clip, GROUNDS[4]) for clip in noisy] == pairs
    named = [caption(name, Scene(motion, GROUNDS[4])) for name, motion in pairs]
    assert all(reel.is_prompted(named, noisy)) and not any(reel.is_prompted(named, noisy[1:] + noisy[:1]))
