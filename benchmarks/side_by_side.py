"""Draw held-out prompts in full and with what a calibration left on the shelf, side by side.

    python benchmarks/side_by_side.py models/unseen-letters --budget 6 --out out/demo/side-by-side.png

Each prompt is a row of the picture: in full, accelerated, and eight times the difference. PSNR is of 8-bit pictures
against the same call in full; seconds are of whole calls, one after the other, and the first call of all is not timed.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import lesa
from lesa.bench.report import markdown
from lesa.learn.call_files import read_prompts
from lesa.learn.metrics import psnr

SCALE, GAP = 4, 8


def draw(pipe: Any, prompt: str, seed: int) -> tuple[np.ndarray, float]:
    """Return the picture of a call, and its seconds."""
    began = time.perf_counter()
    picture = pipe(prompt, generator=torch.Generator().manual_seed(seed)).images[0]
    return np.asarray(picture.convert("RGB")), time.perf_counter() - began


def sheet(rows: Sequence[Sequence[np.ndarray]]) -> Image.Image:
    """Lay pictures out in rows."""
    height, width = (SCALE * side for side in rows[0][0].shape[:2])
    made = Image.new("RGB", ((width + GAP) * len(rows[0]) + GAP, (height + GAP) * len(rows) + GAP), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            place = GAP + x * (width + GAP), GAP + y * (height + GAP)
            made.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), place)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--budget", type=int, help="full steps, of those calibrated; default: what was chosen there")
    parser.add_argument("--prompts", type=int, default=2, help="how many held-out ones, the k-th with seed k (2)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    given = parser.parse_args()
    pipe = lesa.load(given.model)
    pipe.set_progress_bar_config(disable=True)
    prompts = read_prompts(Path(given.model) / "prompts" / "heldout.txt")[: given.prompts]
    draw(pipe, prompts[0], 0)
    full = [draw(pipe, prompt, seed) for seed, prompt in enumerate(prompts)]
    with lesa.accelerate(pipe, budget=given.budget) as run:
        fast = [draw(pipe, prompt, seed) for seed, prompt in enumerate(prompts)]
    lines, rows = [], []
    for prompt, (wanted, slow), (drawn, seconds) in zip(prompts, full, fast, strict=True):
        lines.append((prompt, f"{psnr(drawn, wanted):.2f}", f"{slow:.2f}", f"{seconds:.2f}"))
        off = 8 * np.abs(drawn.astype(int) - wanted.astype(int))
        rows.append((wanted, drawn, off.clip(0, 255).astype(np.uint8)))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    sheet(rows).save(given.out)
    heads = ("held-out prompt", "PSNR, dB", "seconds in full", "seconds accelerated")
    print(f"{run.summary()}\n\n{markdown(heads, lines, text=1)}\n\n{given.out}")


if __name__ == "__main__":
    main()
