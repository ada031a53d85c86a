"""Calls on several grids are told before a reference run is made."""

import numpy as np
import pytest
import torch
from PIL import Image

import lesa
from lesa.learn.counted import counting
from lesa.learn.kinds import check_one_grid, kind_of

CALL = dict(height=32, width=32, num_inference_steps=4, max_sequence_length=16)
SQUARE, TALL = dict(prompt="a", height=32), dict(prompt="b", height=64)


@pytest.mark.parametrize("calls", [[SQUARE, TALL], [SQUARE, dict(SQUARE, prompt="c"), SQUARE, TALL]])
def test_calls_on_two_grids_are_refused_at_their_first_steps(tiny_flux, calls):
    """FLUX's times depend on the size; the last call is one to check on."""
    words = r"with height=32 \(from step 0 of 4\) and with height=64 .* calibrate each kind by itself"
    with counting(tiny_flux) as runs, pytest.raises(ValueError, match=words):
        lesa.calibrate(tiny_flux, calls, budget=2, **{**CALL, "width": 32})
    assert runs() == 2
    assert "_lesa" not in str(vars(tiny_flux.scheduler)) and tiny_flux.transformer.forward.__name__ == "forward"


def test_calls_with_other_numbers_of_steps_are_refused(tiny_flux):
    calls = [dict(prompt="a", num_inference_steps=4), dict(prompt="b", num_inference_steps=3)]
    with pytest.raises(ValueError, match=r"of 4.* of 3"):
        check_one_grid(tiny_flux, calls, dict(height=32, width=32, max_sequence_length=16))


def test_calls_of_one_kind_are_not_run_and_of_one_grid_pass(tiny_flux):
    with counting(tiny_flux) as runs:
        check_one_grid(tiny_flux, ["a", "b", dict(prompt="c", negative_prompt="d")], CALL)
        assert runs() == 0
        check_one_grid(tiny_flux, [dict(prompt="a", guidance_scale=g) for g in (2.0, 3.0, 3.0)], CALL)
        assert runs() == 2


def test_a_kind_is_told_in_words():
    assert kind_of("a red apple") == kind_of(dict(prompt="a red apple")) == "of prompts alone"
    given = dict(prompt="a", strength=0.5, image=[Image.new("RGB", (64, 48))], mask=torch.zeros(1, 2), m=np.zeros(3))
    assert kind_of(given) == "with image of 64 x 48, m of 3, mask of 1 x 2, strength=0.5"
