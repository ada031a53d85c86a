"""How streams make one velocity is measured on what runs recorded."""

import copy
from dataclasses import replace

import pytest
import torch
from diffusers import UniPCMultistepScheduler
from test_training import BOTH, World, bending

from lesa.learn.collect import record
from lesa.learn.guidance import facts
from lesa.rows.guidance import Guidance

PROMPT = "small red apple on white, left"
CALL = dict(height=32, width=32, num_inference_steps=6)


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("scale", [0.5, 1.5, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_guidance_of_runs_is_found(scale, rescaled, dtype):
    true = Guidance(BOTH, scale, rescaled)
    found = Guidance.of(World(bending, true, dtype).runs(range(3)), BOTH)
    assert found.rescaled == rescaled
    assert found.scale == pytest.approx(scale, rel=1e-3 if dtype == torch.float32 else 0.05)


def test_the_guidance_of_each_pipeline_is_found(tiny_flux, tiny_qwen):
    for pipe, rescaled in ((tiny_flux, False), (tiny_qwen, True)):
        runs = record(pipe, [PROMPT], [3], torch.arange(16), **CALL, negative_prompt="fish", true_cfg_scale=3.0)
        found = Guidance.of(runs, runs[0].streams)
        assert (found.streams, found.rescaled) == (BOTH, rescaled)
        assert found.scale == pytest.approx(3, rel=1e-2)
        [run] = runs
        velocity = found.velocity(torch.stack([run.outputs[name] for name in BOTH])[None])[0]
        torch.testing.assert_close(
            run.latents.diff(dim=0), run.grid.diff().float()[:, None, None] * velocity, atol=1e-3, rtol=1e-2
        )


def test_what_a_training_says_of_guidance_is_measured_under_the_sampler_of_its_runs(tiny_qwen):
    pipe = copy.copy(tiny_qwen)
    config = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe.scheduler = UniPCMultistepScheduler(**config)
    call = dict(CALL, negative_prompt="fish", true_cfg_scale=3.0)
    runs = record(pipe, [PROMPT], [3], torch.arange(16), **call)
    assert facts(pipe, [runs], call)["guidance"] == {"scale": pytest.approx(3, rel=1e-3), "rescaled": True}


def test_one_stream_is_its_own_velocity():
    outputs = torch.randn(2, 1, 3, 4, 5)
    alone = Guidance.of(World(bending).runs([0]), ("cond",))
    assert torch.equal(alone.velocity(outputs), outputs[:, 0]) and alone.weights.tolist() == [1.0]


def test_streams_are_combined_by_name():
    outputs = torch.randn(2, 2, 3, 4, 5)
    for rescaled in (False, True):
        ours, theirs = (Guidance(order, 3.0, rescaled) for order in (BOTH, BOTH[::-1]))
        torch.testing.assert_close(ours.velocity(outputs), theirs.velocity(outputs.flip(1)))
        assert ours.weights.tolist() == theirs.weights.tolist()[::-1] == [3.0, -2.0]
    rescaled = Guidance(BOTH, 3.0, True).velocity(outputs)
    torch.testing.assert_close(rescaled.norm(dim=-1), outputs[:, 0].norm(dim=-1))


def test_streams_that_agree_need_no_scale():
    [run] = World(bending, Guidance(BOTH, 3.0)).runs([0])
    moves = run.grid.diff().float()[:, None, None] * run.outputs["cond"]
    latents = torch.cat([run.latents[:1], moves]).cumsum(0)
    same = replace(run, outputs={name: run.outputs["cond"] for name in BOTH}, latents=latents)
    guidance = Guidance.of([same], BOTH)
    outputs = torch.randn(1, 1, 3, 4, 5).expand(-1, 2, -1, -1, -1)
    torch.testing.assert_close(guidance.velocity(outputs), outputs[:, 0])


def test_what_no_guidance_explains_is_an_error():
    [run] = World(bending, Guidance(BOTH, 3.0)).runs([0])
    other = replace(run, latents=torch.randn(run.latents.shape, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=r"leaves .* unexplained; record runs with the same guidance"):
        Guidance.of([other], BOTH)
    with pytest.raises(ValueError, match="streams are cond and uncond, or one alone, got cond, text"):
        Guidance.of([run], ("cond", "text"))
