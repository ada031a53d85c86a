"""What the two models share on which a frozen recipe is judged: pixels in place of latents, prompts and a sheet."""

import argparse
import random
from abc import abstractmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from emoji_training import Recipe, contact_sheet, export, prompts, train_transformer
from torch import Tensor, nn

import lesa
from lesa.bench.recogniser import recogniser
from lesa.host.pipelines import pictures_of

FAINT = 8  # the autoencoder bends latents by tanh(x / 3): at 1 / 8 of the size by less than an 8-bit level
LIFT = 2.0  # keeps what passes the autoencoder's ReLU positive


class PixelRecipe(Recipe):
    """A model whose latents are the pixels: its autoencoder hands them on."""

    haste = 2.5
    splits: tuple[int, int, int]  # captions to train on, to validate with and held out

    @abstractmethod
    def captions(self) -> list[str]:
        """Return all that can be asked for."""

    @abstractmethod
    def draw(self, prompt: str, chance: random.Random) -> np.ndarray:
        """Draw a picture of a caption as uint8 RGB."""

    def pictures(self, folder: Path, captions: list[str]) -> Tensor:
        drawn = np.stack([self.draw(caption, random.Random(k)) for k, caption in enumerate(captions)])
        return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()

    def build_vae(self) -> AutoencoderTiny:
        return pixels()

    def encode(self, vae: Any, pictures: Tensor) -> Any:
        return SimpleNamespace(mean=pictures)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode(latents / vae.config.scaling_factor).sample

    def whiten(self, vae: Any, means: Tensor) -> None:
        """Leave pixels as they are: in [-1, 1]."""

    def pack(self, pipe: Any, means: Tensor) -> Tensor:
        return means


@torch.no_grad()
def pixels() -> AutoencoderTiny:
    """Build an autoencoder of diffusers whose latents are the pixels in [-1, 1], to less than an 8-bit level."""
    one = dict(encoder_block_out_channels=(3,), decoder_block_out_channels=(3,))
    vae = AutoencoderTiny(
        latent_channels=3, num_encoder_blocks=(0,), num_decoder_blocks=(0,), scaling_factor=float(FAINT), **one
    )
    enter, leave = (m for m in vae.encoder.modules() if isinstance(m, nn.Conv2d))
    _pass_on(enter, 2.0, -1.0)  # it gets pixels in [0, 1]
    _pass_on(leave, 1 / FAINT, 0.0)
    enter, leave = (m for m in vae.decoder.modules() if isinstance(m, nn.Conv2d))
    _pass_on(enter, float(FAINT), LIFT)
    _pass_on(leave, 0.5, 0.5 - LIFT / 2)  # it gives pixels in [0, 1]
    return vae


def _pass_on(kernel: nn.Conv2d, scale: float, offset: float) -> None:
    nn.init.zeros_(kernel.weight)
    kernel.weight[:, :, 1, 1] = scale * torch.eye(3)
    assert kernel.bias is not None
    nn.init.constant_(kernel.bias, offset)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Attend in three lines: for so few tokens faster on a CPU, forward and backward, than torch's own."""
    scores = (q * (options.get("scale") or q.shape[-1] ** -0.5)) @ k.transpose(-1, -2)
    if options.get("is_causal"):
        scores = scores + torch.full(scores.shape[-2:], -1e4, dtype=scores.dtype).triu(1)
    return (scores if attn_mask is None else scores + attn_mask).softmax(-1, dtype=scores.dtype) @ v


def write_prompts(recipe: PixelRecipe, folder: Path) -> None:
    """Write captions in lists without overlap, in an order drawn once; those left over are of no use."""
    shuffled = recipe.captions()
    random.Random(0).shuffle(shuffled)
    (folder / "prompts").mkdir(parents=True, exist_ok=True)
    for split, count in zip(("train", "validation", "heldout"), recipe.splits, strict=True):
        chosen, shuffled = shuffled[:count], shuffled[count:]
        (folder / "prompts" / f"{split}.txt").write_text("".join(f"{caption}\n" for caption in chosen))


def evaluate(recipe: PixelRecipe, folder: Path, count: int = 200, batch: int = 50) -> None:
    """Draw validation prompts with every step full, print how many show what is prompted, and draw a contact sheet.

    The held-out prompts are kept for the recipe that is judged.
    """
    pipe, captions = lesa.load(folder), prompts(folder, "validation")[:count]
    pipe.set_progress_bar_config(disable=True)
    drawn: list[np.ndarray] = []
    for first in range(0, count, batch):
        chosen = captions[first : first + batch]
        seeds = [torch.Generator().manual_seed(first + k) for k in range(len(chosen))]
        images = pictures_of(pipe(prompt=chosen, generator=seeds, output_type="np"))
        drawn += [(image * 255).round().astype(np.uint8) for image in images]
    is_prompted = recogniser(folder)
    assert is_prompted is not None, f"{folder} has no recogniser"
    share = float(np.mean(is_prompted(captions, drawn)))
    print(f"{count} validation prompts: {share:.3f} show what is prompted")
    targets = list(recipe.pictures(folder, captions).movedim(1, -1).numpy())
    contact_sheet(drawn[:60], targets[:60], 15).save(folder / "sheet.png", optimize=True)


def main(recipe: PixelRecipe, description: str | None) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["prompts", recipe.name, "export", "evaluate"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=40, help="of training in all, resumed ones included")
    parser.add_argument("--runs", type=Path, help="folder of the checkpoints (default: .runs/ and the model's name)")
    parser.add_argument("--float32", action="store_true", help="train without bfloat16, where it is slower")
    options = parser.parse_args()
    runs = options.runs or Path(".runs") / options.folder.name
    if options.what == "prompts":
        write_prompts(recipe, options.folder)
    elif options.what == recipe.name:
        F.scaled_dot_product_attention = plain_attention
        train_transformer(recipe, options.folder, runs, options.minutes, options.float32)
    elif options.what == "export":
        export(recipe, options.folder, runs)
    else:
        evaluate(recipe, options.folder)
