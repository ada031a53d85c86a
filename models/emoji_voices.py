"""Let espeak-ng say the names of emoji for `emoji-sound`, choose among them, and split the captions of the clips.

    python models/emoji_voices.py models/emoji-flux models/emoji-sound

Writes clips.npz and prompts/{train,validation,heldout}.txt. The package espeakng-loader brings espeak-ng and its data.
"""

import ctypes
import json
import random
import sys
from pathlib import Path

import espeakng_loader
import numpy as np
from scipy.signal import resample_poly
from spoken_emoji import CLIPS, PITCHES, RATE, SAMPLES, SPEAKERS, SPEEDS, VOICES, Voice, caption, compress

from lesa.bench.sounds import log_mel

COUNT = 40
SHARE = {"heldout": 0.20, "validation": 0.05}
ENGLISH = dict(zip(SPEAKERS, ("en-us", "en-us+f3"), strict=True))
WORDS_A_MINUTE = dict(zip(SPEEDS, (140, 210), strict=True))
PITCH = dict(zip(PITCHES, (15, 50, 85), strict=True))  # of espeak's 0 to 99
RATE_PARAMETER, PITCH_PARAMETER, SYNCHRONOUS, UTF8, CHARACTERS = 1, 3, 2, 1, 1  # of speak_lib.h
LEAD = 400  # samples of silence before a name
QUIET = 0.02
LOUDEST = 0.7  # of full scale


class Speaker:
    """The espeak-ng that a package brings, called through its C interface."""

    def __init__(self):
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self.rate: int = self._library.espeak_Initialize(SYNCHRONOUS, 0, espeakng_loader.get_data_path().encode(), 0)
        self._heard: list[np.ndarray] = []
        receiver = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self._receiver = receiver(self._receive)  # held as long as the library may call it
        self._library.espeak_SetSynthCallback(self._receiver)

    def _receive(self, samples, count: int, _events) -> int:
        if samples and count:
            self._heard.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: Voice) -> np.ndarray:
        """Return a text in a voice as float samples in [-1, 1].

        Raises: RuntimeError if espeak-ng has no such voice or cannot speak.
        """
        self._heard.clear()
        spoken = text.encode()
        failed = self._library.espeak_SetVoiceByName(ENGLISH[voice.speaker].encode())
        failed |= self._library.espeak_SetParameter(RATE_PARAMETER, WORDS_A_MINUTE[voice.speed], 0)
        failed |= self._library.espeak_SetParameter(PITCH_PARAMETER, PITCH[voice.pitch], 0)
        failed |= self._library.espeak_Synth(spoken, len(spoken) + 1, 0, CHARACTERS, 0, UTF8, None, None)
        if failed or not self._heard:
            raise RuntimeError(f"espeak-ng said nothing of {text!r} in the voice {ENGLISH[voice.speaker]}.")
        return np.concatenate(self._heard) / 32768


def clip_of(speaker: Speaker, name: str, voice: Voice) -> np.ndarray | None:
    """Return a name in a voice as SAMPLES samples that begin with the same silence, or None if it takes longer."""
    said = resample_poly(speaker.say(name, voice), RATE, speaker.rate)
    loud = np.flatnonzero(np.abs(said) > QUIET * np.abs(said).max())
    said = said[loud[0] : loud[-1] + 1]
    if len(said) > SAMPLES - 2 * LEAD:
        return None
    return np.pad(said * (LOUDEST / np.abs(said).max()), (LEAD, SAMPLES - LEAD - len(said)))


def distinct(spectra: dict[str, np.ndarray], count: int) -> list[str]:
    """Pick `count` names so that no two sound alike: drop one of the nearest pair until `count` are left."""
    left = list(spectra)
    apart = {(a, b): float(np.square(spectra[a] - spectra[b]).mean()) for a in left for b in left if a < b}
    while len(left) > count:
        _, dropped = min((pair for pair in apart if set(pair) <= set(left)), key=apart.__getitem__)
        left.remove(dropped)
    return left


def main(source: Path, folder: Path) -> None:
    speaker = Speaker()
    names = json.loads((source / "emoji.json").read_text())
    said = {name: [clip_of(speaker, name, voice) for voice in VOICES] for name in names}
    short = {name: np.stack(clips) for name, clips in said.items() if all(clip is not None for clip in clips)}
    chosen = distinct({name: log_mel(clips, RATE) for name, clips in short.items()}, COUNT)
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / CLIPS, names=chosen, clips=compress(np.stack([short[name] for name in chosen])))

    prompts = [caption(name, voice) for name in chosen for voice in VOICES]
    random.Random(0).shuffle(prompts)
    total = len(prompts)
    for split, share in SHARE.items():
        part, prompts = prompts[: (n := round(share * total))], prompts[n:]
        (folder / "prompts" / f"{split}.txt").write_text("\n".join(part) + "\n")
    (folder / "prompts" / "train.txt").write_text("\n".join(prompts) + "\n")
    print(f"{len(short)} names fit, {len(chosen)} chosen, {len(prompts)} clips to train on: {', '.join(chosen)}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
