import doctest

import diffusers
import numpy as np
import pytest
import torch

from lesa.rows import grid


def test_a_grid_keeps_its_times_in_float64():
    times = [1.0, 0.7, 0.1, 0.0]
    assert grid.validate(times).tolist() == times
    assert grid.validate(torch.tensor(times)).dtype == torch.float64


def test_a_grid_is_a_copy():
    times = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    copy = grid.validate(times)
    times[1] = 0.4
    assert copy[1] == 0.5


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0.0], "at least 2 times"),
        ([[1.0, 0.0]], r"shape \(1, 2\)"),
        ([1.2, 0.5, 0.0], "got 0 to 1.2"),
        ([1.0, float("nan"), 0.0], "nan"),
        ([1.0, -0.1, 0.0], "got -0.1"),
        ([1.0, 0.5, 0.1], "got 0.1; append the final 0"),
        ([1.0, 0.5, 0.5, 0.0], "0.5 then 0.5 at step 1"),
        ([0.5, 0.8, 0.0], "0.5 then 0.8 at step 0"),
    ],
)
def test_other_times_are_no_grid(times, message):
    with pytest.raises(ValueError, match=message):
        grid.validate(times)


FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
EULER = diffusers.FlowMatchEulerDiscreteScheduler


@pytest.mark.parametrize(
    ("scheduler", "settings"),
    [
        (EULER(shift=3.0), {"num_inference_steps": 50}),
        (EULER(use_dynamic_shifting=True), {"sigmas": np.linspace(1, 1 / 50, 50), "mu": 1.15}),
        (diffusers.UniPCMultistepScheduler(**FLOW), {"num_inference_steps": 50}),
        (diffusers.DPMSolverMultistepScheduler(**FLOW), {"num_inference_steps": 50}),
    ],
    ids=["euler", "flux", "unipc", "dpm"],
)
def test_the_grid_of_a_flow_matching_scheduler_is_its_sigmas(scheduler, settings):
    with pytest.raises(ValueError, match="set_timesteps"):
        grid.from_scheduler(scheduler)
    scheduler.set_timesteps(**settings)
    assert grid.from_scheduler(scheduler).tolist() == [float(sigma) for sigma in scheduler.sigmas]
    assert len(grid.from_scheduler(scheduler)) == len(scheduler.timesteps) + 1


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (diffusers.FlowMatchHeunDiscreteScheduler(), "FlowMatchHeun.*fall at every step"),
        (diffusers.EulerDiscreteScheduler(), "EulerDiscrete.*flow-matching"),
        (diffusers.DPMSolverMultistepScheduler(), "DPMSolver.*flow-matching"),
        (diffusers.DDIMScheduler(), "DDIM.*flow-matching"),
        (EULER(invert_sigmas=True), "times fall from a run's first step to its end, got 0 and 1"),
    ],
)
def test_other_schedulers_have_no_grid(scheduler, message):
    scheduler.set_timesteps(10)
    with pytest.raises(ValueError, match=message):
        grid.from_scheduler(scheduler)


def test_the_step_of_a_scheduler_through_its_run():
    scheduler = EULER()
    scheduler.set_timesteps(4)
    assert grid.step_of(scheduler) is None
    scheduler.set_begin_index(1)
    assert grid.step_of(scheduler) == 1
    latents = torch.zeros(1, 2)
    for step, timestep in enumerate(scheduler.timesteps[1:], start=1):
        assert grid.step_of(scheduler) == step
        scheduler.step(latents, timestep, latents)


def test_stages_are_cut_at_their_bounds():
    times = [1.0, 0.91, 0.9, 0.51, 0.5, 0.0]
    assert [grid.stage_of(t, (0.9, 0.5)) for t in times] == [0, 0, 1, 1, 2, 2]
    assert grid.stage_of(0.3, ()) == 0


def test_grids_match_within_the_tolerance():
    times = torch.linspace(1, 0, 11, dtype=torch.float64)
    moved = times.clone()
    moved[3] += 0.9e-4
    assert grid.matches(times, moved)
    moved[3] += 0.2e-4
    assert not grid.matches(times, moved)
    assert not grid.matches(times, times[1:])


def test_examples():
    assert doctest.testmod(grid) == (0, 1)
