"""The embedded model `emoji-flux`: its prompts and pictures, what it draws, and the predictors beside it."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from composed_emoji import COMPOSITIONS, PIXELS, Atlas, Composition, caption, parse
from diffusers import FluxPipeline

import lesa
from lesa.learn.collect import record
from lesa.learn.metrics import psnr
from lesa.learn.planning import PLANNED_ON, Planner
from lesa.learn.trajectory import draw_tokens
from lesa.rows.grid import from_scheduler

MODEL = Path(__file__).parent.parent / "models" / "emoji-flux"
SPLITS = {
    split: (MODEL / "prompts" / f"{split}.txt").read_text().splitlines() for split in ("train", "validation", "heldout")
}


@pytest.fixture(scope="module")
def atlas() -> Atlas:
    return Atlas(MODEL)


@pytest.fixture(scope="module")
def pipe():
    pipe = lesa.load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts: list[str]) -> list[np.ndarray]:
    seeds = [torch.Generator().manual_seed(k) for k in range(len(prompts))]
    return [np.asarray(image) for image in pipe(prompts, generator=seeds).images]


def test_captions_can_be_read_back():
    for composition in COMPOSITIONS:
        assert parse(caption("red apple", composition)) == ("red apple", composition)
    assert parse("small red apple on blue, left") == ("red apple", Composition("small", "blue", "left"))


@pytest.mark.parametrize(
    "prompt", ["", "red apple", "tiny red apple on blue, left", "small red apple on blue", "small x on y, z"]
)
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="a prompt must read like"):
        parse(prompt)


def test_the_prompts_are_split_without_overlap(atlas):
    everything = {caption(name, composition) for name in atlas.names for composition in COMPOSITIONS}
    assert len(atlas.names) >= 200
    assert len(COMPOSITIONS) >= 48
    assert sum(map(len, SPLITS.values())) == len(everything)
    assert set().union(*SPLITS.values()) == everything
    assert len(SPLITS["heldout"]) == round(0.2 * len(everything))


def test_a_drawing_is_recognised_and_a_blank_ground_is_not_what_was_asked(atlas):
    prompts = SPLITS["heldout"][:20]
    assert all(atlas.is_prompted(prompts, [atlas.draw(*parse(prompt)) for prompt in prompts]))
    others = [atlas.draw(atlas.names[atlas.names.index(parse(p)[0]) - 1], parse(p)[1]) for p in prompts]
    assert not any(atlas.is_prompted(prompts, others))


def test_it_is_small_and_walks_the_grid_of_flux(pipe):
    assert sum(p.numel() for p in pipe.transformer.parameters()) <= 8e6
    assert sum(file.stat().st_size for file in MODEL.glob("*/*.safetensors")) <= 25e6
    pipe("small red apple on blue, left", num_inference_steps=4, output_type="latent")
    shift, times = math.exp(1.15), torch.linspace(1, 0.25, 4, dtype=torch.float64)
    expected = shift / (shift + 1 / times - 1)
    torch.testing.assert_close(from_scheduler(pipe.scheduler)[:-1], expected, atol=1e-4, rtol=0)


def test_it_draws_held_out_prompts(pipe, atlas):
    prompts = SPLITS["heldout"][:8]
    pictures = draw(pipe, prompts)
    assert pictures[0].shape == (PIXELS, PIXELS, 3)
    assert sum(atlas.is_prompted(prompts, pictures)) >= 7


def test_diffusers_loads_it_without_lesa():
    pipe = FluxPipeline.from_pretrained(MODEL)
    pipe.set_progress_bar_config(disable=True)
    call = dict(height=64, width=64, max_sequence_length=12, num_inference_steps=2)
    assert pipe("small red apple on blue, left", **call).images[0].size == (64, 64)


def test_the_shipped_predictor_keeps_the_picture_with_a_fifth_of_the_steps_full(pipe):
    prompts = SPLITS["heldout"][8:12]
    reference = draw(pipe, prompts)
    with lesa.accelerate(pipe) as run:
        pictures = draw(pipe, prompts)
    with lesa.accelerate(pipe, lesa.Taylor(order=2), schedule=lesa.Schedule.paper(7)):
        extrapolated = draw(pipe, prompts)
    summary = run.summary()["cond"]
    assert (summary.full_steps, summary.skipped_steps) == (10, 40)
    ours, theirs = ([psnr(a, b) for a, b in zip(x, reference, strict=True)] for x in (pictures, extrapolated))
    assert np.mean(ours) > max(40, np.mean(theirs) + 1)


def test_three_full_steps_where_they_matter_are_worth_ten_on_the_papers_schedule(pipe):
    prompts, seeds = SPLITS["train"][:PLANNED_ON], range(PLANNED_ON)
    planner = Planner.of(pipe, record(pipe, prompts, seeds, draw_tokens))
    planned = planner.search(lesa.Lagrange(2), 3)
    assert len(planned.full_steps(50)) == 3
    prompts = SPLITS["heldout"][:8]
    reference = draw(pipe, prompts)
    with lesa.accelerate(pipe, lesa.Lagrange(2), schedule=planned):
        ours = draw(pipe, prompts)
    with lesa.accelerate(pipe, lesa.Taylor(order=2), schedule=lesa.Schedule.paper(7)):
        theirs = draw(pipe, prompts)
    gained = [psnr(a, wanted) - psnr(b, wanted) for a, b, wanted in zip(ours, theirs, reference, strict=True)]
    assert np.mean(gained) > 1


def test_every_shipped_predictor_loads_and_fits(pipe):
    folders = [file.parent for file in MODEL.glob("lesa/*/config.json")]
    assert len(folders) == 13
    for folder in folders:
        predictor = lesa.Predictor.from_pretrained(folder)
        with lesa.accelerate(pipe, predictor) as run:
            pipe("small red apple on blue, left", output_type="latent")
        assert run.plan().full == predictor.schedule.full_steps(50)


def grid(pipe, steps: int = 50, tokens: int = 64, **settings) -> torch.Tensor:
    """The grid of a call of so many steps and image tokens."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **settings)
    mu = 0.5 + (tokens - 4) * (1.15 - 0.5) / (64 - 4)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist(), mu=mu)
    return from_scheduler(scheduler)


def test_the_predictor_for_many_grids_knows_where_it_works(pipe):
    many = lesa.Predictor.from_pretrained(MODEL / "lesa" / "lesa-many")
    for steps in (14, 20, 28, 35, 50):
        many.schedule_for(grid(pipe, steps))
    for height, width in ((48, 48), (80, 80), (96, 64), (96, 96), (112, 112), (128, 128)):
        for budget in (10, 6, 4):
            full = many.schedule_for(grid(pipe, tokens=height * width // 64), budget).full_steps(50)
            assert len(full) == budget and full[-1] == 49
    for other in (grid(pipe, 70), grid(pipe, use_beta_sigmas=True), grid(pipe, use_karras_sigmas=True)):
        with pytest.raises(ValueError, match="trained for"):
            many.schedule_for(other)


def test_the_predictor_for_many_grids_is_above_untrained_rows_between_two_trained_sizes(pipe):
    """It was below them, on a schedule whose last step was skipped."""
    prompts, call = SPLITS["heldout"][:2], dict(height=80, width=80, output_type="latent")

    def latents() -> torch.Tensor:
        return pipe(prompts, generator=[torch.Generator().manual_seed(k) for k in range(2)], **call).images

    full, errors = latents(), {}
    many = lesa.Predictor.from_pretrained(MODEL / "lesa" / "lesa-many")
    for budget in (10, 6):
        with lesa.accelerate(pipe, many, budget=budget) as run:
            ours = latents()
        with lesa.accelerate(pipe, lesa.Lagrange(2), schedule=lesa.Schedule.at(run.plan().full), tap="output"):
            errors[budget] = [float((x - full).norm()) for x in (ours, latents())]
    assert all(ours < plain for ours, plain in errors.values())
    assert errors[10][0] < 0.03 * float(full.norm())
