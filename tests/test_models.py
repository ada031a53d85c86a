"""The models of the paper as facts."""

import json

import pytest
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler

from lesa.bench import models
from lesa.bench.models import MODELS, Size, grid_of, read
from lesa.host.pipelines import CALL_FILE
from lesa.rows import grid as grids

BY_NAME = {model.name: model for model in MODELS}


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("black-forest-labs/FLUX.1-dev", [1.0, 0.98 * 3.158193 / (1 + 0.98 * 2.158193)]),  # e^1.15 = 3.158193
        ("black-forest-labs/FLUX.1-schnell", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("lightx2v/Qwen-Image-Lightning", [1.0, 0.875 * 3 / (1 + 0.875 * 2)]),
        ("hunyuanvideo-community/HunyuanVideo", [1.0, 0.98 * 7 / (1 + 0.98 * 6)]),
    ],
)
def test_a_grid_is_shifted_as_the_model_was_trained(name, start):
    grid = grid_of(BY_NAME[name])
    assert len(grid) == BY_NAME[name].steps + 1
    torch.testing.assert_close(grid[: len(start)], torch.tensor(start, dtype=torch.float64), atol=1e-6, rtol=0)


def test_qwen_images_last_time_but_one_is_its_terminal_one():
    grid = grid_of(BY_NAME["Qwen/Qwen-Image"])
    assert grid[-2] == pytest.approx(0.02, abs=1e-6) and grid[0] == 1


@pytest.mark.parametrize("which", ["tiny_flux", "tiny_qwen"])
def test_a_pipelines_folder_says_all_that_its_runs_say(which, request, tmp_path):
    pipe = request.getfixturevalue(which)
    pipe.save_pretrained(tmp_path)
    call = dict(height=64, width=32, num_inference_steps=5)
    (tmp_path / CALL_FILE).write_text(json.dumps(call))
    model = read(str(tmp_path), text_tokens=7)
    pipe("red apple", output_type="latent", **call)
    torch.testing.assert_close(grid_of(model), grids.from_scheduler(pipe.scheduler), atol=1e-6, rtol=0)
    assert model.size == Size(64, 32, 7) and model.transformer == type(pipe.transformer).__name__
    mine = {name: x.shape for name, x in models.build(model).named_parameters()}
    assert mine == {name: x.shape for name, x in pipe.transformer.named_parameters()}


def test_streams_are_as_the_call_says(tiny_qwen, tmp_path):
    tiny_qwen.save_pretrained(tmp_path)
    assert read(str(tmp_path)).streams == 1
    assert read(str(tmp_path), {"negative_prompt": " "}).streams == 2
    assert read(str(tmp_path), {"negative_prompt": " ", "true_cfg_scale": 1.0}).streams == 1


def test_a_latent_is_as_many_pixels_as_the_vae_says():
    qwen = AutoencoderKLQwenImage(base_dim=8, z_dim=4, dim_mult=[1, 1, 1], temperal_downsample=[False, True])
    assert models._scale(qwen.config) == (4, 1)
    assert models._scale({"block_out_channels": [1, 2, 3, 4]}) == (8, 1)
    assert models._scale({"spatial_compression_ratio": 8, "temporal_compression_ratio": 4}) == (8, 4)


def test_the_schedulers_arguments_are_known_to_diffusers():
    for model in MODELS:
        FlowMatchEulerDiscreteScheduler(**model.scheduler)
