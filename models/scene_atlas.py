"""Make the atlas and the captions of `emoji-scene` from the bitmaps of `emoji-flux`.

    python models/scene_atlas.py models/emoji-flux models/emoji-scene

Writes emoji.png (brightness and opacity, one square for each name), emoji.json and
prompts/{train,validation,heldout}.txt. No two of the lists name the same pair of emoji.
"""

import json
import random
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import scenes
from composed_emoji import bitmaps
from PIL import Image, ImageDraw
from scenes import BESIDE, COLOURS, GROUNDS, RELATIONS, SIZES, SKY, Scene, Thing

COUNT = 20
SIDE = max(SIZES.values())
CAPTIONS = {"validation": 400, "heldout": 1000, "train": 12000}
PAIRS = {"validation": 0.04, "heldout": 0.10}  # of all pairs of names
FINER = 8  # points a pixel along each side, of what is drawn here


def shape(bitmap: Image.Image) -> Image.Image:
    """Return an emoji's brightness, stretched over what is opaque, and its opacity."""
    pixels = np.asarray(bitmap.resize((SIDE, SIDE), Image.Resampling.LANCZOS)).astype(np.float32)
    light, opacity = pixels[..., :3] @ [0.299, 0.587, 0.114], pixels[..., 3]
    low, high = np.percentile(light[opacity > 128], [4, 96])
    stretched = ((light - low) / max(high - low, 40.0)).clip(0, 1) * 255
    return Image.fromarray(np.stack([stretched, opacity], axis=-1).round().astype(np.uint8), "LA")


def sky_shape(name: str) -> Image.Image:
    """Draw a moon, a sun or a star, all of one brightness."""
    side = SIDE * FINER
    mask = Image.new("L", (side, side), 0)
    pen, middle = ImageDraw.Draw(mask), side / 2
    if name == "star":
        points = _rays(5, middle, 0.49 * side, 0.2 * side)
        pen.polygon(points, fill=255)
    elif name == "sun":
        pen.polygon(_rays(10, middle, 0.49 * side, 0.34 * side), fill=255)
    else:
        pen.ellipse((0.06 * side, 0.02 * side, 0.98 * side, 0.94 * side), fill=255)
        pen.ellipse((0.34 * side, -0.08 * side, 1.14 * side, 0.72 * side), fill=0)
    opacity = mask.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return Image.merge("LA", (Image.new("L", (SIDE, SIDE), 150), opacity))


def _rays(count: int, middle: float, outer: float, inner: float) -> list[tuple[float, float]]:
    angles = np.arange(2 * count) * np.pi / count - np.pi / 2
    radii = np.where(np.arange(2 * count) % 2 == 0, outer, inner)
    return [(float(middle + r * np.cos(a)), float(middle + r * np.sin(a))) for a, r in zip(angles, radii, strict=True)]


def distinct(shapes: dict[str, Image.Image], count: int) -> list[str]:
    """Pick `count` names so that no two are near duplicates: drop one of the nearest pair until `count` are left."""
    pixels = {}
    for name, picture in shapes.items():
        light, opacity = np.moveaxis(np.asarray(picture.resize((28, 28)), np.float32) / 255, -1, 0)
        pixels[name] = np.stack([(light - 0.5) * opacity, opacity]).ravel()
    left = list(shapes)
    while len(left) > count:
        first, second = min(combinations(left, 2), key=lambda two: np.linalg.norm(pixels[two[0]] - pixels[two[1]]))
        left.remove(max(first, second))
    return left


def random_scene(names: tuple[str, str], chance: random.Random) -> Scene:
    """Return a drawable scene of two names, every second one beside each other with something in the sky."""
    while True:
        order = chance.sample(names, 2)
        first, second = (Thing(chance.choice(list(SIZES)), chance.choice(list(COLOURS)), name) for name in order)
        sky = (chance.choice(list(COLOURS)), chance.choice(SKY)) if chance.random() < 0.5 else None
        relation = chance.choice(BESIDE if sky else RELATIONS)
        scene = Scene(first, relation, second, chance.choice(list(GROUNDS)), sky)
        if scenes.is_drawable(scene):
            return scene


def write_prompts(names: list[str], folder: Path) -> None:
    """Write captions in three lists; each has pairs of names of its own."""
    chance, pairs = random.Random(0), list(combinations(names, 2))
    chance.shuffle(pairs)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in CAPTIONS.items():
        taken = round(PAIRS[split] * len(names) * (len(names) - 1) / 2) if split in PAIRS else len(pairs)
        chosen, pairs = pairs[:taken], pairs[taken:]
        captions: dict[str, None] = {}
        while len(captions) < count:
            captions[scenes.caption(random_scene(chance.choice(chosen), chance))] = None
        (folder / f"{split}.txt").write_text("".join(f"{caption}\n" for caption in captions))


def main(source: Path, folder: Path) -> None:
    known = json.loads((source / "emoji.json").read_text())
    cut = bitmaps(source / "emoji.png", known)
    shapes = {name: shape(cut[name]) for name in known if " " not in name}
    names = distinct({name: s for name, s in shapes.items() if name not in SKY}, COUNT)
    drawn = {**{name: shapes[name] for name in names}, **{name: shapes.get(name) or sky_shape(name) for name in SKY}}
    sheet = Image.new("LA", (len(drawn) * SIDE, SIDE))
    for k, picture in enumerate(drawn.values()):
        sheet.paste(picture, (k * SIDE, 0))
    folder.mkdir(parents=True, exist_ok=True)
    sheet.save(folder / "emoji.png", optimize=True)
    (folder / "emoji.json").write_text(json.dumps(list(drawn), indent=0) + "\n")
    write_prompts(names, folder / "prompts")
    print(f"{len(names)} emoji, {len(SKY)} in the sky, {CAPTIONS['train']} captions to train on")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
