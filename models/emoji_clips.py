"""Choose the emoji of `emoji-video` among those of `emoji-flux`, and split the captions of their clips.

    python models/emoji_clips.py models/emoji-flux models/emoji-video

Writes emoji.png, clips.json and prompts/{train,validation,heldout}.txt.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
from composed_emoji import bitmaps
from moving_emoji import NAMES, SCENES, Scene, caption, film
from PIL import Image

COUNT = 48
COLUMNS = 12
SHARE = {"heldout": 0.20, "validation": 0.04}
TURNED = 30.0  # root mean square difference, in pixel values, that half a turn makes at least


def looks(bitmap: Image.Image) -> np.ndarray:
    """Show an emoji upright, on its side and upside down."""
    return film(bitmap, Scene("turning", "grey"))[[0, 4, 8]].astype(np.float32)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(np.square(a - b).mean()))


def distinct(seen: dict[str, np.ndarray], count: int) -> list[str]:
    """Pick `count` names so that no two are near duplicates: drop one of the nearest pair until `count` are left."""
    left = list(seen)
    apart = {(a, b): distance(seen[a], seen[b]) for a in left for b in left if a < b}
    while len(left) > count:
        _, dropped = min((pair for pair in apart if set(pair) <= set(left)), key=apart.__getitem__)
        left.remove(dropped)
    return left


def main(source: Path, folder: Path) -> None:
    drawn = bitmaps(source / "emoji.png", json.loads((source / "emoji.json").read_text()))
    seen = {name: looks(bitmap) for name, bitmap in drawn.items()}
    turning = {n: s for n, s in seen.items() if min(distance(s[0], s[1]), distance(s[0], s[2])) >= TURNED}
    names = distinct(turning, COUNT)
    side = drawn[names[0]].width
    sheet = Image.new("RGBA", (COLUMNS * side, -(-len(names) // COLUMNS) * side), (0, 0, 0, 0))
    for k, name in enumerate(names):
        sheet.paste(drawn[name], (k % COLUMNS * side, k // COLUMNS * side))
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    sheet.save(folder / "emoji.png", optimize=True)
    (folder / NAMES).write_text(json.dumps(names, indent=0) + "\n")

    prompts = [caption(name, scene) for name in names for scene in SCENES]
    random.Random(0).shuffle(prompts)
    total = len(prompts)
    for split, share in SHARE.items():
        chosen, prompts = prompts[: (n := round(share * total))], prompts[n:]
        (folder / "prompts" / f"{split}.txt").write_text("\n".join(chosen) + "\n")
    (folder / "prompts" / "train.txt").write_text("\n".join(prompts) + "\n")
    print(f"{len(turning)} emoji look different turned, {len(names)} chosen, {len(prompts)} clips to train on")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
