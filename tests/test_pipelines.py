import inspect
import json

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, FluxImg2ImgPipeline, FluxPipeline, QwenImagePipeline

from lesa.host.pipelines import CALL_FILE, load, with_call
from lesa.host.runtime import accelerate
from lesa.rows.forecasters import Reuse
from lesa.rows.schedule import Schedule

CALL = dict(height=32, width=32, num_inference_steps=3, max_sequence_length=16, output_type="latent")
PROMPT = "small red apple on white, left"


@pytest.fixture(scope="module")
def folder(tiny_flux, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-flux")
    tiny_flux.save_pretrained(folder)
    (folder / CALL_FILE).write_text(json.dumps(CALL))
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    pipe = load(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded() -> dict:
    return dict(generator=torch.Generator().manual_seed(0))


def test_a_call_starts_from_its_file(tiny_flux, loaded):
    assert torch.equal(loaded(PROMPT, **seeded()).images, tiny_flux(PROMPT, **CALL, **seeded()).images)


def test_the_arguments_of_a_call_win_by_name_and_by_position(tiny_flux, loaded):
    wide = tiny_flux(PROMPT, **{**CALL, "height": 64, "width": 16}, **seeded()).images
    assert torch.equal(loaded(PROMPT, height=64, width=16, **seeded()).images, wide)
    assert torch.equal(loaded(PROMPT, None, None, None, 1.0, 64, 16, **seeded()).images, wide)


def test_a_loaded_pipeline_is_still_of_its_class(loaded, tmp_path):
    assert isinstance(loaded, FluxPipeline) and type(loaded).__name__ == "FluxPipeline"
    assert inspect.signature(loaded.__call__) == inspect.signature(FluxPipeline(**loaded.components).__call__)
    loaded.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    assert type(FluxPipeline.from_pretrained(tmp_path)) is FluxPipeline


def test_other_pipelines_come_from_a_loaded_one(loaded):
    assert type(FluxImg2ImgPipeline.from_pipe(loaded)) is FluxImg2ImgPipeline
    assert type(AutoPipelineForImage2Image.from_pipe(loaded)) is FluxImg2ImgPipeline
    assert type(FluxPipeline.from_pipe(loaded)) is FluxPipeline


def test_a_loaded_pipeline_is_accelerated_as_any_other(loaded):
    with accelerate(loaded, Reuse(), schedule=Schedule.every(2)) as run:
        loaded(PROMPT)
    assert (run.summary()["cond"].full_steps, run.summary()["cond"].skipped_steps) == (2, 1)


def test_options_go_to_diffusers(tiny_flux, folder):
    scheduler = tiny_flux.scheduler
    assert load(folder, scheduler=scheduler).scheduler is scheduler


def test_without_a_file_a_pipeline_keeps_its_own_defaults(tiny_flux, tmp_path):
    tiny_flux.save_pretrained(tmp_path)
    assert type(load(tmp_path)) is FluxPipeline


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"hieght": 32}', "hieght; see its __call__"), ("{", "as a JSON object"), ("[1, 2]", "as a JSON object")],
)
def test_a_file_that_holds_no_arguments_is_an_error(tiny_flux, tmp_path, text, message):
    tiny_flux.save_pretrained(tmp_path)
    (tmp_path / CALL_FILE).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load(tmp_path)
    assert str(tmp_path / CALL_FILE) in str(raised.value)


def test_one_pipelines_defaults_are_not_anothers(tiny_flux):
    mine, other = FluxPipeline(**tiny_flux.components), FluxPipeline(**tiny_flux.components)
    assert with_call(mine, CALL) is mine
    assert type(other) is FluxPipeline and type(mine) is not FluxPipeline


def test_a_text_of_the_file_goes_with_every_prompt(tiny_qwen):
    call = dict(height=32, width=32, num_inference_steps=3, output_type="latent")
    guided = dict(negative_prompt="fish", true_cfg_scale=3.0)
    mine = with_call(QwenImagePipeline(**tiny_qwen.components), {**call, **guided})
    mine.set_progress_bar_config(disable=True)
    prompts = [PROMPT, "large pear"]
    both = mine(prompts, **seeded()).images
    named = mine(prompt=prompts, **seeded()).images
    given = tiny_qwen(prompts, **call, **{**guided, "negative_prompt": ["fish"] * 2}, **seeded()).images
    assert torch.equal(both, given) and torch.equal(named, given)
    other = mine(prompts, negative_prompt=["pear", "pear"], **seeded()).images
    assert not torch.equal(other, given)
