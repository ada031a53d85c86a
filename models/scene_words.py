"""Teach the T5 of `emoji-scene` to read: which words belong together, and where the thing is that they describe.

FLUX's text encoders have learned to read before a transformer learns to draw what they say; so has this one. Of each
word of a thing, linear heads on its output tell the thing's place, size, colour and name; the heads are then left out.
"""

import copy

import torch
import torch.nn.functional as F
from scenes import COLOURS, LATTICE, PIXELS, SIZES, SKY, SKY_SIZE, parse, places
from torch import Tensor, nn
from transformers import T5EncoderModel

ENDS = {  # where the first and the second thing are
    "left of": ("left", "right"),
    "right of": ("right", "left"),
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
}
SPOTS = ("left", "right", "left, lower", "right, lower", "top", "bottom", "sky")
LOOKED_AT = (-1, 1, -2, 2)  # words away: where a head of the attention begins to look
EAGER = 3.0  # of its logit there
NEAR = 0.1  # weight of the distance from what the encoder gave before
BATCH, RATE = 64, 2e-3
NOTHING = -100  # of words that describe no thing; what cross entropy ignores


def classes(names: list[str]) -> tuple[list[str], ...]:
    """Return what may be told of a thing: its spot, size, colour and name."""
    return list(SPOTS), [*SIZES, "sky"], list(COLOURS), [*names, *SKY]


def labels(prompt: str, names: list[str], tokens: int) -> Tensor:
    """Return what each token of a caption is about, by `classes`: shape (tokens, 4), `NOTHING` where it is no thing's.

    A word is a token, and so is a comma.
    """
    scene, kinds = parse(prompt), classes(names)
    lower = ", lower" if scene.sky else ""
    spots = [spot + lower for spot in ENDS[scene.relation]]
    second = 3 + len(scene.relation.split())
    told = [(0, 3, (spots[0], *scene.first)), (second, second + 3, (spots[1], *scene.second))]
    if scene.sky:
        sky = second + 3 + len([",", "on", scene.ground, ",", "under", "a"])
        told.append((sky, sky + 2, ("sky", "sky", *scene.sky)))
    out = torch.full((tokens, 4), NOTHING)
    for start, stop, words in told:
        out[start:stop] = torch.tensor([kind.index(word) for kind, word in zip(kinds, words, strict=True)])
    return out


def around(prompt: str, names: list[str]) -> Tensor:
    """Return which thing may stand about each image token: shape (tokens, 3), of its size, colour and name."""
    side, kinds = PIXELS // LATTICE, classes(names)[1:]
    out = torch.full((side, side, 3), NOTHING, dtype=torch.int8)
    for thing, (xs, ys) in places(parse(prompt)):
        size = SIZES.get(thing.size, SKY_SIZE)
        wide, high = (slice(span[0] // LATTICE, (span[-1] + size) // LATTICE) for span in (xs, ys))
        out[high, wide] = torch.tensor([kind.index(word) for kind, word in zip(kinds, thing, strict=True)]).to(out)
    return out.flatten(0, 1)


@torch.no_grad()
def look_around(encoder: T5EncoderModel) -> None:
    """Let attention begin anew, with heads that look at the words beside: captions of emoji-flux need no order."""
    config = encoder.config
    for block in encoder.encoder.block:
        attention = block.layer[0].SelfAttention
        nn.init.normal_(attention.q.weight, std=(config.d_model * config.d_kv) ** -0.5)
        nn.init.normal_(attention.k.weight, std=config.d_model**-0.5)
    attention = encoder.encoder.block[0].layer[0].SelfAttention
    for head, away in enumerate(LOOKED_AT):
        bucket = attention._relative_position_bucket(
            torch.tensor([away]),
            bidirectional=True,
            num_buckets=config.relative_attention_num_buckets,
            max_distance=config.relative_attention_max_distance,
        )
        attention.relative_attention_bias.weight[bucket, head] += EAGER


def learn_to_read(
    encoder: T5EncoderModel, tokens: Tensor, told: Tensor, counts: list[int], steps: int
) -> nn.ModuleList:
    """Train an encoder, in place, on token ids (N, S) and what they are about (N, S, 4); return the heads that tell it.

    `counts` are those of the classes. The encoder is kept near to what it gave before, which the transformer reads.
    """
    before = copy.deepcopy(encoder)
    look_around(encoder)
    heads = nn.ModuleList([nn.Linear(encoder.config.d_model, count) for count in counts])
    learner = torch.optim.AdamW(_groups(encoder, heads), betas=(0.9, 0.98), weight_decay=0.0)
    rates = [group["lr"] for group in learner.param_groups]
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group, rate in zip(learner.param_groups, rates, strict=True):
            group["lr"] = rate * min((step + 1) / 30, 1 - step / steps)
        chosen = torch.randint(len(tokens), (BATCH,), generator=generator)
        read = encoder(tokens[chosen])[0]
        with torch.no_grad():
            known = before(tokens[chosen])[0]
        loss = NEAR * F.mse_loss(read, known) / known.var()
        for head, right in zip(heads, told[chosen].unbind(-1), strict=True):
            loss = loss + F.cross_entropy(head(read).flatten(0, 1), right.flatten(), ignore_index=NOTHING)
        learner.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        learner.step()
    return heads


def _groups(encoder: T5EncoderModel, heads: nn.Module) -> list[dict]:
    """Return parameters in groups: what attention asks for learns slowly, and where it looks fast."""
    parts: dict[float, list[nn.Parameter]] = {0.2 * RATE: [], RATE: list(heads.parameters()), 20 * RATE: []}
    for name, parameter in encoder.named_parameters():
        asks, looks = name.endswith((".q.weight", ".k.weight")), "relative_attention_bias" in name
        parts[0.2 * RATE if asks else 20 * RATE if looks else RATE].append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in parts.items()]


@torch.no_grad()
def share_read(encoder: T5EncoderModel, heads: nn.ModuleList, tokens: Tensor, told: Tensor) -> float:
    """Return of how many of the words that describe things everything is told right."""
    read, counted = encoder(tokens)[0], told[..., 0] != NOTHING
    right = torch.stack([head(read).argmax(-1) == told[..., k] for k, head in enumerate(heads)]).all(0)
    return right[counted].float().mean().item()
