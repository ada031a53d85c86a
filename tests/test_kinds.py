"""Calls of several kinds are told before a reference run is made."""

import copy

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from test_choice import GUIDED

import lesa
from lesa.learn.counted import counting
from lesa.learn.kinds import check_one_kind, kind_of

CALL = dict(height=32, width=32, num_inference_steps=4, max_sequence_length=16)
SQUARE, TALL = dict(prompt="a", height=32), dict(prompt="b", height=64)


@pytest.mark.parametrize("calls", [[SQUARE, TALL], [SQUARE, dict(SQUARE, prompt="c"), SQUARE, TALL]])
def test_calls_on_two_grids_are_refused_at_their_first_steps(tiny_flux, calls):
    """FLUX's times depend on the size; the last call is one to check on."""
    words = r"with height=32 and calls with height=64, whose runs differ \(other times .*; calibrate each kind"
    with counting(tiny_flux) as runs, pytest.raises(ValueError, match=words):
        lesa.calibrate(tiny_flux, calls, budget=2, **{**CALL, "width": 32})
    assert runs() == 2
    assert "_lesa" not in str(vars(tiny_flux.scheduler)) and tiny_flux.transformer.forward.__name__ == "forward"


def test_calls_with_other_numbers_of_steps_are_refused(tiny_flux):
    calls = [dict(prompt="a", num_inference_steps=4), dict(prompt="b", num_inference_steps=3)]
    with pytest.raises(ValueError, match="3 steps instead of 4"):
        check_one_kind(tiny_flux, calls, dict(height=32, width=32, max_sequence_length=16))


def sized(pipe, heights: list[int], **call):
    """Calls of several heights on one grid: those of a scheduler whose times do not depend on the size."""
    pipe = copy.copy(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)
    return pipe, [dict(prompt=f"{height} high", height=height, **call) for height in heights]


def test_calls_of_sizes_that_one_calibration_does_not_fit_are_refused_on_one_grid_too(tiny_flux):
    pipe, calls = sized(tiny_flux, [32, 32, 96, 32])
    words = r"with height=32 and calls with height=96, whose runs differ \(latents of 3 times the size"
    with counting(pipe) as runs, pytest.raises(ValueError, match=words):
        lesa.calibrate(pipe, calls, budget=2, **CALL)
    assert runs() == 2


def test_what_is_calibrated_on_several_sizes_is_found_for_each(tiny_flux):
    pipe, calls = sized(tiny_flux, [32, 64, 32, 64])
    lesa.calibrate(pipe, calls, budget=2, options=lesa.CalibrateOptions(pictures=False, progress=False), **CALL)
    for one in calls:
        with lesa.accelerate(pipe) as run:
            pipe(**{**CALL, **one}, output_type="latent")
        assert "calibrated" in str(run.summary())


def test_calls_under_other_guidance_are_refused(tiny_qwen):
    calls = [dict(prompt="a", true_cfg_scale=scale) for scale in (3.0, 4.0)]
    given = {name: value for name, value in GUIDED.items() if name != "true_cfg_scale"}
    with pytest.raises(ValueError, match=r"guidance of .* instead of "):
        check_one_kind(tiny_qwen, calls, {**CALL, **given})


def test_calls_of_one_kind_are_not_run_and_of_like_runs_pass(tiny_flux):
    with counting(tiny_flux) as runs:
        check_one_kind(tiny_flux, ["a", "b", dict(prompt="c", negative_prompt="d")], CALL)
        assert runs() == 0
        check_one_kind(tiny_flux, [dict(prompt="a", guidance_scale=g) for g in (2.0, 3.0, 3.0)], CALL)
        assert runs() == 2


def test_a_kind_is_told_in_words():
    assert kind_of("a red apple") == kind_of(dict(prompt="a red apple")) == "of prompts alone"
    given = dict(prompt="a", strength=0.5, image=[Image.new("RGB", (64, 48))], mask=torch.zeros(1, 2), m=np.zeros(3))
    assert kind_of(given) == "with image of 64 x 48, m of 3, mask of 1 x 2, strength=0.5"
