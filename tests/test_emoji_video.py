"""The embedded model `emoji-video`: what it draws, with guidance and without."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline
from moving_emoji import FRAMES, PIXELS, Reel

import lesa
from lesa.host.pipelines import pictures_of
from lesa.predictors import shipped_for
from lesa.rows.grid import from_scheduler

MODEL = Path(__file__).parent.parent / "models" / "emoji-video"
HELD_OUT = (MODEL / "prompts" / "heldout.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def pipe():
    pipe = lesa.load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts: list[str], **changes) -> list[np.ndarray]:
    seeds = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    clips = pictures_of(pipe(prompts, generator=seeds, **changes))
    return [np.stack([np.asarray(frame) for frame in clip]) for clip in clips]


def test_it_is_small_and_walks_a_shifted_grid(pipe):
    assert sum(p.numel() for p in pipe.transformer.parameters()) <= 8e6
    assert sum(file.stat().st_size for file in MODEL.glob("*/*.safetensors")) <= 25e6
    pipe("panda turning on blue", num_inference_steps=4, output_type="latent")
    shift, times = pipe.scheduler.config.shift, torch.linspace(1, 0.25, 4, dtype=torch.float64)
    expected = shift * times / (1 + (shift - 1) * times)
    torch.testing.assert_close(from_scheduler(pipe.scheduler)[:-1], expected, atol=1e-4, rtol=0)


def test_the_template_is_dropped_and_each_word_is_one_token(pipe):
    _, _, mask = pipe.encode_prompt(["panda turning on blue", ""], max_sequence_length=12)
    assert mask.sum(1).tolist() == [5, 1]  # and what ends the turn
    words = pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer("panda turning on blue").input_ids)
    assert words == ["<|begin_of_text|>", "panda", "Ġturning", "Ġon", "Ġblue"]


def test_it_draws_held_out_clips(pipe):
    prompts = [prompt for prompt in HELD_OUT if prompt.endswith("on blue")][:8]  # a recogniser learns colour by colour
    clips = draw(pipe, prompts)
    assert clips[0].shape == (FRAMES, PIXELS, PIXELS, 3)
    assert sum(Reel(MODEL).is_prompted(prompts, clips)) >= 6


def test_guidance_makes_two_streams(pipe):
    prompts = HELD_OUT[:1]
    guidance = dict(negative_prompt=[""], true_cfg_scale=2.0)
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=lesa.Schedule.every(5)) as run:
        guided, plain = draw(pipe, prompts, **guidance), draw(pipe, prompts)
    assert {name: stream.runs for name, stream in run.summary().items()} == {"cond": 2, "uncond": 1}
    assert not np.array_equal(guided[0], plain[0])


def test_without_a_choice_the_planned_predictor_is_taken(pipe):
    assert shipped_for(pipe).full == lesa.Predictor.from_pretrained(MODEL / "lesa/lesa-planned10").full
    assert shipped_for(pipe, budget=8).schedule.rule == "at"
    assert shipped_for(pipe, lesa.Schedule.paper(7)).schedule == lesa.Schedule.paper(7)


def test_diffusers_loads_it_without_lesa():
    pipe = HunyuanVideoPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    call = {**json.loads((MODEL / "call.json").read_text()), "num_inference_steps": 2}
    [clip] = pipe("panda turning on blue", **call).frames
    assert len(clip) == FRAMES and clip[0].size == (PIXELS, PIXELS)
