"""Choose the emoji of the embedded models, draw their atlas from the Noto font and split the compositions.

    python models/emoji_atlas.py models/emoji-flux

Needs Debian's fonts-noto-color-emoji and PyPI's emoji. Writes emoji.png, emoji.json and
prompts/{train,validation,heldout}.txt.
"""

import json
import random
import re
import sys
from pathlib import Path

import emoji
import numpy as np
from composed_emoji import COMPOSITIONS, SIZES, Composition, caption, compose
from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
COUNT = 200
SHARE = {"heldout": 0.20, "validation": 0.04}
UNCLEAR = re.compile(
    r"flag|clock|keycap|button|skin|symbol|arrow|sign|mark|square|circle|diamond_with|no_|prohibited|zodiac|hour|"
    r"man|woman|men|women|person|people|boy|girl|child|adult|baby|family|hand|finger|face|couple|kiss|japanese|letter|"
    r"input|moon|heart|dots|star_of|wheel_of|cross|infinity|multiply|plus|minus|divide|equals|bars|speaker|"
    r"aries|taurus|gemini|cancer|leo|virgo|libra|scorpi|sagittarius|capricorn|aquarius|pisces|ophiuchus|trigram|"
    r"baggage|luggage|elevator|restroom|closet|passport|potable|place_of|phone|mode|map_of|lavatory|litter|customs|"
    r"oncoming|camera_with|_cat$|card|chart|spiral|night|dusk|city|bridge|railway|monorail|metro|tram|station|suspension|"
    r"worker|officer|guard|detective|elf|fairy|vampire|zombie|genie|mage|prince|supervillain|superhero|mer|"
    r"post_office|hospital|hotel|bank|store|school|castle|building|stadium|department|inbox|outbox|page|folder|"
    r"snowboarder|skier|bathtub|soon|back|end|top|vs|biohazard|radioactive|pager|articulated|light_rail|notebook|ledger|"
    r"sunrise|sunset|bowl|crying|exploding|license|mailbox|hole|bald|om$|star_and|mahjong|softball|closed_book|small_airplane|foggy|milky|delivery|auto_|sport_utility|credit|label"
)


def named_emoji() -> dict[str, str]:
    """Single code points with a short plain English name that are clear at 32 pixels."""
    names = {}
    for glyph, data in emoji.EMOJI_DATA.items():
        name = data["en"].strip(":")
        single = len(glyph.replace("\ufe0f", "")) == 1
        plain = re.fullmatch(r"[a-z]+(_[a-z]+){0,2}", name.lower()) and " on " not in name.replace("_", " ")
        if single and plain and data["E"] <= 13 and not UNCLEAR.search(name.lower()):
            names[name.lower().replace("_", " ")] = glyph
    return dict(sorted(names.items()))


def bitmap(glyph: str) -> Image.Image | None:
    """Render one of the font's 136 x 128 bitmaps, cropped and centred on a square; None if the font lacks it."""
    font = ImageFont.truetype(FONT, 109)
    canvas = Image.new("RGBA", (136, 136), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((0, 4), glyph.replace("\ufe0f", ""), font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None or np.asarray(canvas)[..., 3].std() < 10:
        return None
    inside = canvas.crop(box)
    side = max(inside.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(inside, ((side - inside.width) // 2, (side - inside.height) // 2))
    return square.resize((max(SIZES.values()),) * 2, Image.Resampling.LANCZOS)


def distinct(bitmaps: dict[str, Image.Image], count: int) -> list[str]:
    """Pick `count` names so that no two are near duplicates: drop one of the nearest pair until `count` are left."""
    names = list(bitmaps)
    ground = Composition("small", "grey", "middle")
    pixels = np.stack([compose(bitmaps[name], ground).astype(np.float32).ravel() for name in names])
    squares = (pixels**2).sum(1)
    distance = squares[:, None] + squares[None, :] - 2 * pixels @ pixels.T
    np.fill_diagonal(distance, np.inf)
    left = list(range(len(names)))
    while len(left) > count:
        among = distance[np.ix_(left, left)]
        pair = np.unravel_index(among.argmin(), among.shape)
        left.pop(max(pair))
    return [names[k] for k in left]


def main(folder: Path) -> None:
    bitmaps = {name: b for name, glyph in named_emoji().items() if (b := bitmap(glyph)) is not None}
    names = distinct(bitmaps, COUNT)
    side, columns = max(SIZES.values()), 20
    sheet = Image.new("RGBA", (columns * side, -(-len(names) // columns) * side), (0, 0, 0, 0))
    for k, name in enumerate(names):
        sheet.paste(bitmaps[name], (k % columns * side, k // columns * side))
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    sheet.save(folder / "emoji.png", optimize=True)
    (folder / "emoji.json").write_text(json.dumps(names, indent=0) + "\n")

    prompts = [caption(name, composition) for name in names for composition in COMPOSITIONS]
    random.Random(0).shuffle(prompts)
    for split, share in SHARE.items():
        chosen, prompts = prompts[: (n := round(share * len(names) * len(COMPOSITIONS)))], prompts[n:]
        (folder / "prompts" / f"{split}.txt").write_text("\n".join(chosen) + "\n")
    (folder / "prompts" / "train.txt").write_text("\n".join(prompts) + "\n")
    print(f"{len(bitmaps)} candidates, {len(names)} emoji, {len(prompts)} compositions to train on")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
