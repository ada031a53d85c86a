"""The embedded model `emoji-qwen`: what it draws with guidance and without, and the predictors beside it."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from composed_emoji import PIXELS, Atlas
from diffusers import QwenImagePipeline

import lesa
from lesa.learn.collect import record
from lesa.learn.metrics import psnr
from lesa.learn.training import drift
from lesa.rows.grid import from_scheduler

MODEL = Path(__file__).parent.parent / "models" / "emoji-qwen"
HELD_OUT = (MODEL / "prompts" / "heldout.txt").read_text().splitlines()


@pytest.fixture(scope="module")
def pipe():
    pipe = lesa.load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts: list[str], **changes) -> list[np.ndarray]:
    seeds = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    return [np.asarray(image) for image in pipe(prompts, generator=seeds, **changes).images]


def test_it_has_the_pictures_and_prompts_of_emoji_flux():
    for name in ("emoji.json", "emoji.png", *(f"prompts/{split}.txt" for split in ("train", "validation", "heldout"))):
        assert (MODEL / name).read_bytes() == (MODEL.parent / "emoji-flux" / name).read_bytes()


def test_it_is_small_and_walks_a_grid_of_qwen_image(pipe):
    assert sum(p.numel() for p in pipe.transformer.parameters()) <= 8e6
    assert sum(file.stat().st_size for file in MODEL.glob("*/*.safetensors")) <= 25e6
    pipe("small red apple on blue, left", num_inference_steps=4, output_type="latent")
    shift, times = math.exp(5 / 6), torch.linspace(1, 0.25, 4, dtype=torch.float64)  # mu at 1328 x 1328 pixels
    shifted = shift / (shift + 1 / times - 1)
    expected = 1 - (1 - shifted) * (1 - 0.02) / (1 - shifted[-1])
    torch.testing.assert_close(from_scheduler(pipe.scheduler)[:-1], expected, atol=1e-4, rtol=0)


def test_the_template_is_dropped_and_each_word_is_one_token(pipe):
    words = "small red apple on blue, left"
    embedded, mask = pipe.encode_prompt([words, ""])
    assert embedded.shape[1] == 7 + 5 and mask.sum(1).tolist() == [12, 5]  # and what follows the prompt


def test_it_draws_held_out_prompts(pipe):
    prompts = HELD_OUT[:8]
    pictures = draw(pipe, prompts)
    assert pictures[0].shape == (PIXELS, PIXELS, 3)
    assert sum(Atlas(MODEL).is_prompted(prompts, pictures)) >= 6


def test_it_is_guided(pipe):
    prompts = HELD_OUT[:1]
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=lesa.Schedule.every(5)) as run:
        guided, plain = draw(pipe, prompts), draw(pipe, prompts, true_cfg_scale=1.0)
    assert {name: stream.runs for name, stream in run.summary().items()} == {"cond": 2, "uncond": 1}
    assert not np.array_equal(guided[0], plain[0])


def test_the_shipped_predictor_keeps_the_picture_with_a_fifth_of_the_steps_full(pipe):
    prompts = HELD_OUT[8:12]
    reference = draw(pipe, prompts)
    with lesa.accelerate(pipe) as run:
        pictures = draw(pipe, prompts)
    assert {name: (s.full_steps, s.skipped_steps) for name, s in run.summary().items()} == dict.fromkeys(
        ("cond", "uncond"), (10, 40)
    )
    with lesa.accelerate(pipe, lesa.Taylor(order=1), schedule=lesa.Schedule.paper(7)):
        extrapolated = draw(pipe, prompts)
    ours, theirs = (np.mean(list(map(psnr, x, reference))) for x in (pictures, extrapolated))
    assert ours > theirs + 1.5


def test_the_rows_of_one_stream_are_not_for_the_other(pipe):
    prompts, seeds, tokens = HELD_OUT[12:14], range(2), torch.arange(64)
    reference = record(pipe, prompts, seeds, tokens)
    right = lesa.Predictor.from_pretrained(MODEL / "lesa" / "lesa-paper7")
    swapped = copy.deepcopy(right)
    swapped.load_state_dict(
        {
            ".".join({"cond": "uncond", "uncond": "cond"}.get(x, x) for x in name.split(".")): number
            for name, number in right.state_dict().items()
        }
    )
    drifts = []
    for predictor in (right, swapped):
        with lesa.accelerate(pipe, predictor):
            drifts.append(drift(record(pipe, prompts, seeds, tokens), reference))
    assert drifts[0] < drifts[1] - 1


def test_every_shipped_predictor_loads_and_fits(pipe):
    folders = [file.parent for file in MODEL.glob("lesa/*/config.json")]
    assert len(folders) == 6
    for folder in folders:
        predictor = lesa.Predictor.from_pretrained(folder)
        with lesa.accelerate(pipe, predictor) as run:
            pipe("small red apple on blue, left", output_type="latent")
        assert run.plan("uncond").full == predictor.schedule.full_steps(50)


def test_diffusers_loads_it_without_lesa():
    pipe = QwenImagePipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    call = {**json.loads((MODEL / "call.json").read_text()), "num_inference_steps": 2}
    assert pipe("small red apple on blue, left", **call).images[0].size == (64, 64)
