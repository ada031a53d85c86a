"""What a run is known by at its first step, and by what two runs differ."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from zoo.pipelines import ZOO

import lesa
from lesa.host.facts import Facts, listen, mixture
from lesa.predictors.facts import Mixture

CALL = dict(height=32, width=32, num_inference_steps=6, max_sequence_length=16, output_type="latent")
GUIDED = Mixture((3.0, -2.0), 1e-6, 0.1)
KNOWN = Facts((1.0, 0.8, 0.5, 0.0), 0, (4, 8, 8), "Euler", False, ("cond", "uncond"), GUIDED, (3.5,))


def heard(pipe, *args, **call) -> Facts:
    with listen(pipe) as facts, torch.no_grad():
        pipe(*args, generator=torch.Generator().manual_seed(0), **{**CALL, **call})
    (found,) = facts
    return found


def test_a_run_without_guidance_is_known_by_its_grid_and_its_latents(tiny_flux):
    found = heard(tiny_flux, ["apple", "pear"])
    assert found.times[:2] == (1.0, pytest.approx(0.85, abs=0.1)) and found.steps == 6 and found.start == 0
    assert found.shape == (16, 16) and found.sampler == "FlowMatchEulerDiscreteScheduler" and not found.noise
    assert found.streams == ("cond",) and found.guidance is None
    assert found.differences(heard(tiny_flux, "fish")) == []


@pytest.mark.parametrize("scale", [1.5, 4.0])
def test_guidance_of_named_streams_is_measured_with_its_rescaled_norms(tiny_qwen, scale):
    found = heard(tiny_qwen, "apple", negative_prompt="fish", true_cfg_scale=scale)
    assert found.streams == ("cond", "uncond") and found.guidance is not None and found.guidance.rescaled
    assert found.guidance.weights == pytest.approx((scale, 1 - scale), abs=0.01)
    assert found.guidance.unexplained < 1e-3
    assert found.differences(heard(tiny_qwen, "pear", negative_prompt="fish", true_cfg_scale=1.01 * scale)) == []
    (words,) = found.differences(heard(tiny_qwen, "apple", negative_prompt="fish", true_cfg_scale=2 * scale))
    assert f"guidance of {scale:g} : {1 - scale:g} with rescaled norms instead of {2 * scale:g} :" in words


def test_guidance_of_one_batched_call_is_measured_by_its_parts():
    specimen = ZOO["sd3_guided"]()
    with listen(specimen.pipe) as facts:
        specimen.call()
        specimen.pipe(**{**specimen.arguments, "guidance_scale": 2.0}, generator=torch.Generator().manual_seed(0))
    usual = specimen.arguments.get("guidance_scale", 7.0)
    assert [one.streams for one in facts] == [("cond",)] * 2
    assert facts[0].guidance.weights == pytest.approx((1 - usual, usual), abs=0.02)  # the first half is uncond
    assert facts[1].guidance.weights == pytest.approx((-1.0, 2.0), abs=0.02)
    assert len(facts[1].differences(facts[0])) == 1


def test_an_accelerated_run_has_the_same_facts(tiny_qwen):
    call = dict(negative_prompt="fish", true_cfg_scale=3.0)
    plain = heard(tiny_qwen, "apple", **call)
    with lesa.accelerate(tiny_qwen, lesa.Reuse(), schedule=lesa.Schedule.every(3)) as run:
        assert heard(tiny_qwen, "apple", **call) == plain
    assert run.summary()["cond"].skipped_steps > 0
    with listen(tiny_qwen) as facts, lesa.accelerate(tiny_qwen, lesa.Reuse(), schedule=lesa.Schedule.every(3)) as run:
        tiny_qwen("apple", generator=torch.Generator().manual_seed(0), **CALL, **call)
    assert facts == [plain] and run.summary()["cond"].skipped_steps > 0


def test_a_run_that_begins_in_mid_grid_says_where():
    specimen = ZOO["flux_img2img_guided"]()
    with listen(specimen.pipe) as facts:
        specimen.call()
        specimen.pipe(**{**specimen.arguments, "strength": 0.4}, generator=torch.Generator().manual_seed(0))
    assert facts[0].start != facts[1].start or facts[0].times != facts[1].times
    assert facts[0].differences(facts[1])


def test_a_sampler_that_adds_noise_is_told():
    specimen = ZOO["sdxl_guided"]()
    specimen.pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(specimen.pipe.scheduler.config)
    with listen(specimen.pipe) as facts:
        specimen.call()
    assert facts[0].noise and facts[0].sampler == "EulerAncestralDiscreteScheduler"


def test_facts_survive_json():
    for facts in (KNOWN, replace(KNOWN, guidance=None, embedded=())):
        assert Facts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(times=(1.0, 0.5, 0.0)), "2 steps instead of 3"),
        (dict(times=(1.0, 0.8, 0.6, 0.0)), "0.6000 instead of 0.5000 at step 2"),
        (dict(start=1), "begins at step 1 instead of 0"),
        (dict(sampler="Heun"), "a Heun instead of a Euler"),
        (dict(noise=True), "adds noise"),
        (dict(shape=(4, 16, 16)), "4 times the size"),
        (dict(shape=(256, 4)), "2 dimensions instead of 3"),
        (dict(streams=("cond",), guidance=None), "the streams cond instead of cond and uncond"),
        (dict(guidance=replace(GUIDED, weights=(4.0, -3.0))), "guidance of 4 : -3 instead of 3 : -2"),
        (dict(guidance=replace(GUIDED, rescaled=True, weights=(3.1, -2.1))), "with rescaled norms"),
        (dict(guidance=replace(GUIDED, unexplained=0.5)), "a kind of its own (50% unexplained)"),
        (dict(embedded=(5.0,)), "guidance 5 instead of 3.5 as an input"),
    ],
)
def test_differences_are_said_in_words(change, words):
    (found,) = replace(KNOWN, **change).differences(KNOWN)
    assert words in found


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(times=(1.0, 0.80001, 0.5, 0.0)),
        dict(shape=(4, 8, 16)),
        dict(guidance=replace(GUIDED, weights=(3.1, -2.1))),
        dict(guidance=replace(GUIDED, weights=(9.0, -8.0), apart=1e-5)),  # streams that agree show no guidance
        dict(embedded=(3.6,)),
    ],
)
def test_small_differences_are_none(change):
    assert replace(KNOWN, **change).differences(KNOWN) == []


def test_outputs_may_have_more_channels_or_tokens_than_are_moved():
    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 2, 8, 4, 4)
    found = mixture([torch.cat([uncond, cond])], (-1.5 * uncond + 2.5 * cond)[:, :4])
    assert found is not None and found.weights == pytest.approx((-1.5, 2.5), abs=1e-3) and found.unexplained < 1e-5
    assert mixture([cond], cond) is None
    assert mixture([cond.flatten(2), uncond.flatten(2)], cond) is None


def test_guidance_is_measured_where_streams_are_nearly_alike_in_half_precision():
    torch.manual_seed(0)
    cond = torch.randn(1, 4096, 8)
    uncond = (cond + 0.05 * torch.randn(1, 4096, 8)).bfloat16()
    cond = cond.bfloat16()
    found = mixture([cond, uncond], uncond + 3 * (cond - uncond))
    assert found is not None and found.weights == pytest.approx((3.0, -2.0), abs=0.1)


def test_latents_may_be_part_of_the_velocity():
    torch.manual_seed(0)
    cond, uncond, latents = torch.randn(3, 1, 8, 4, 4)
    found = mixture([cond, uncond], 0.5 * latents + 0.2 * (uncond + 3 * (cond - uncond)), latents)
    assert found is not None and found.weights == pytest.approx((0.6, -0.4), abs=1e-3) and found.unexplained < 1e-5
    assert mixture([cond, uncond], torch.zeros_like(cond), latents) is None
