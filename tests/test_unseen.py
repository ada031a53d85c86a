"""The two models that a frozen recipe is judged on: they load, draw, and run through `accelerate` as without it."""

import random
from pathlib import Path

import flags
import letters
import numpy as np
import pytest
import torch
from diffusers import PixArtSigmaPipeline, StableDiffusion3Pipeline
from unseen_training import FAINT, pixels

import lesa
from lesa.bench.recogniser import recogniser

MODELS = Path(__file__).parents[1] / "models"
KINDS = {"unseen-letters": (StableDiffusion3Pipeline, letters), "unseen-flags": (PixArtSigmaPipeline, flags)}
SIZES = {"unseen-letters": (32, 32), "unseen-flags": (24, 40)}


@pytest.fixture(scope="module", params=KINDS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def pipe(name):
    pipe = lesa.load(MODELS / name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(name: str, split: str) -> list[str]:
    return (MODELS / name / "prompts" / f"{split}.txt").read_text().splitlines()


def draw(pipe, prompt: str) -> np.ndarray:
    return np.asarray(pipe(prompt, generator=torch.Generator().manual_seed(0), num_inference_steps=8).images[0])


def test_prompts_are_captions_and_their_lists_do_not_overlap(name):
    _, pictures = KINDS[name]
    splits = {split: prompts(name, split) for split in ("train", "validation", "heldout")}
    together = [prompt for split in splits.values() for prompt in split]
    assert len(set(together)) == len(together) and len(splits["heldout"]) >= 100
    assert all(pictures.caption(pictures.parse(prompt)) == prompt for prompt in together)


@pytest.mark.parametrize("prompt", ["", "large red bold q on blue, left", "large red bold k on blue", "a red flag"])
def test_other_prompts_are_refused(name, prompt):
    with pytest.raises(ValueError, match="a prompt must read like"):
        KINDS[name][1].parse(prompt)


def test_drawings_are_recognised_and_others_are_not(name):
    pictures, chosen = KINDS[name][1], prompts(name, "train")[:2]
    drawn = [pictures.draw(pictures.parse(prompt), random.Random(k)) for k, prompt in enumerate(chosen)]
    is_prompted = recogniser(MODELS / name)
    assert is_prompted is not None
    assert is_prompted(chosen, drawn) == [True, True] and is_prompted(chosen, drawn[::-1]) == [False, False]


def test_it_is_small_and_of_its_kind(name, pipe):
    assert isinstance(pipe, KINDS[name][0])
    assert sum(weights.numel() for weights in pipe.transformer.parameters()) <= 8e6
    assert sum(file.stat().st_size for file in (MODELS / name).rglob("*") if file.is_file()) <= 12e6


def test_a_picture_shows_what_is_prompted(name, pipe):
    """By its ground, which a model that has learned nothing does not hit: the median of its edge."""
    height, width = SIZES[name]
    prompt = {
        "unseen-letters": "small red bold k on blue, middle",
        "unseen-flags": "border of red and blue, white disc, middle",
    }
    picture = draw(pipe, prompt[name])
    assert picture.shape == (height, width, 3)
    edge = np.concatenate([picture[0], picture[-1]]).astype(int)
    assert np.abs(np.median(edge, axis=0) - KINDS[name][1].COLOURS["blue"]).max() < 40


def test_with_every_step_full_nothing_changes(name, pipe):
    prompt = prompts(name, "validation")[0]
    plain = draw(pipe, prompt)
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=lesa.Schedule.every(1)):
        assert (draw(pipe, prompt) == plain).all()


def test_the_autoencoder_hands_pixels_on():
    pictures, vae = torch.rand(2, 3, 8, 12) * 2 - 1, pixels()
    level = 2 / 255
    assert vae.config.scaling_factor == FAINT
    with torch.no_grad():
        torch.testing.assert_close(vae.encode(pictures).latents * FAINT, pictures)
        torch.testing.assert_close(vae.decode(pictures / FAINT).sample, pictures, atol=level / 8, rtol=0)
