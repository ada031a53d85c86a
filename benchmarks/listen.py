"""Say held-out prompts in full and accelerated: WAV files of both, and a picture of their spectra side by side.

    python benchmarks/listen.py models/emoji-sound --out out/listen

Each prompt is a row of the picture: in full, accelerated, and the absolute difference. What is accelerated takes what
ships with the model, or lies on the shelf. Seconds are of whole calls, one after the other; the first of either kind is
not timed. In the first accelerated one the numbers of a sampler that adds noise are read, which takes seconds.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_by_side import sheet

import lesa
from lesa.bench.report import markdown
from lesa.bench.scores import SOUND_SCORES
from lesa.bench.sounds import sound_picture
from lesa.host.loading import LoadOptions, loaded
from lesa.host.pipelines import pictures_of, rate_of, save_sound
from lesa.learn.call_files import read_prompts


def say(pipe: Any, prompt: str, seed: int) -> tuple[np.ndarray, float]:
    """Return the clip of a call, and its seconds."""
    began = time.perf_counter()
    [clip] = pictures_of(pipe(prompt, generator=torch.Generator().manual_seed(seed), output_type="np"))
    return clip, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompts", type=int, default=3, help="how many held-out ones, the k-th with seed k (3)")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    given = parser.parse_args()
    pipe = loaded(LoadOptions(given.model, steps=given.steps))
    pipe.set_progress_bar_config(disable=True)
    rate = rate_of(pipe)
    if rate is None:
        parser.error(f"the model makes sound, got {given.model}, which makes none")
    prompts = read_prompts(Path(given.model) / "prompts" / "heldout.txt")[: given.prompts]
    say(pipe, prompts[0], 0)
    full = [say(pipe, prompt, seed) for seed, prompt in enumerate(prompts)]
    with lesa.accelerate(pipe) as run:
        say(pipe, prompts[0], 0)
        fast = [say(pipe, prompt, seed) for seed, prompt in enumerate(prompts)]

    given.out.mkdir(parents=True, exist_ok=True)
    lines, rows = [], []
    for number, (prompt, (wanted, slow), (said, seconds)) in enumerate(zip(prompts, full, fast, strict=True)):
        for what, clip in (("full", wanted), ("accelerated", said)):
            save_sound(clip, rate, given.out / f"{number}-{what}.wav")
        scores = [f"{score(said, wanted, rate):.2f}" for score in SOUND_SCORES.values()]
        lines.append((prompt, *scores, f"{slow:.2f}", f"{seconds:.2f}"))
        pictures = [sound_picture(clip, rate) for clip in (wanted, said)]
        rows.append((*pictures, np.abs(np.subtract(*pictures, dtype=int)).astype(np.uint8)))
    sheet(rows).save(given.out / "spectra.png")
    heads = ("held-out prompt", *SOUND_SCORES, "seconds in full", "seconds accelerated")
    print(f"{run.summary()}\n\n{markdown(heads, lines, text=1)}\n\n{given.out}")


if __name__ == "__main__":
    main()
