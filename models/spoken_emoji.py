"""The clips and captions of the embedded model of sound: names of emoji, said in a few voices."""

from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lesa.bench.sounds import log_mel

RATE = 8000  # samples a second
SAMPLES = 8192  # of a clip
CLIPS = "clips.npz"
PITCHES, SPEEDS, SPEAKERS = ("low", "middle", "high"), ("slow", "quick"), ("male", "female")
STEPS = 255  # of the mu-law curve


class Voice(NamedTuple):
    """How a name is said: one of `PITCHES`, `SPEEDS` and `SPEAKERS` each."""

    pitch: str
    speed: str
    speaker: str


VOICES = [Voice(*parts) for parts in product(PITCHES, SPEEDS, SPEAKERS)]


def caption(name: str, voice: Voice) -> str:
    """Describe a clip, e.g. `low slow male voice: red apple`."""
    return f"{' '.join(voice)} voice: {name}"


def parse(prompt: str) -> tuple[str, Voice]:
    """Read a caption back into the emoji's name and the voice.

    Raises: ValueError if the prompt is not a caption as `caption` writes it.
    """
    said, _, name = prompt.partition(" voice: ")
    for voice in VOICES:
        if said == " ".join(voice) and name:
            return name, voice
    raise ValueError(f"a prompt must read like 'low slow male voice: red apple', got {prompt!r}.")


def compress(clip: np.ndarray) -> np.ndarray:
    """Turn samples in [-1, 1] into bytes along a mu-law curve; silence is 127."""
    curve = np.sign(clip) * np.log1p(STEPS * np.abs(clip)) / np.log1p(STEPS)
    return (127 + np.round(127 * curve)).astype(np.uint8)


def expand(stored: np.ndarray) -> np.ndarray:
    """Turn what `compress` made back into float32 samples in [-1, 1]."""
    curve = stored / 127 - 1
    return (np.sign(curve) * np.expm1(np.abs(curve) * np.log1p(STEPS)) / STEPS).astype(np.float32)


class Tape:
    """The clips of an embedded model of sound, read from `clips.npz`: one for each name in each voice."""

    def __init__(self, folder: str | Path):
        with np.load(Path(folder) / CLIPS) as kept:
            self.names: list[str] = kept["names"].tolist()
            self.clips = expand(kept["clips"])  # (names, voices, SAMPLES)
        self._spectra: dict[Voice, np.ndarray] = {}

    def say(self, name: str, voice: Voice) -> np.ndarray:
        """Return a name in a voice as float32 samples of shape (SAMPLES,)."""
        return self.clips[self.names.index(name), VOICES.index(voice)]

    def recognise(self, clip: np.ndarray, voice: Voice) -> str:
        """Name the emoji whose clip in this voice is nearest in log-mel spectrum to float samples (1, SAMPLES)."""
        if voice not in self._spectra:
            self._spectra[voice] = log_mel(self.clips[:, VOICES.index(voice)], RATE)
        distance = np.square(log_mel(clip.reshape(-1), RATE) - self._spectra[voice]).sum(axis=(1, 2))
        return self.names[int(distance.argmin())]

    def is_prompted(self, prompts: Sequence[str], clips: Sequence[np.ndarray]) -> list[bool]:
        """Tell for each clip whether it says the name that its prompt names."""
        parsed = [parse(prompt) for prompt in prompts]
        return [self.recognise(clip, voice) == name for (name, voice), clip in zip(parsed, clips, strict=True)]


def recogniser(folder: str | Path) -> Callable[[Sequence[str], Sequence[np.ndarray]], list[bool]]:
    """Return the call by which `lesa bench` tells clips that say what their prompts name."""
    return Tape(folder).is_prompted
