"""On the embedded FLUX the drift of real runs is predicted within 1 dB, under Euler, UniPC and DPM++."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

import lesa
from lesa.learn.collect import read_prompts, record
from lesa.learn.planning import Planner
from lesa.rows.forecasters import Lagrange, Reuse

MODEL = Path(__file__).parents[1] / "models" / "emoji-flux"
SHIFT = ("base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift")
SAMPLERS = {"Euler": None, "UniPC": UniPCMultistepScheduler, "DPM++": DPMSolverMultistepScheduler}
STEPS, RUNS = 50, 8


@cache
def pipeline() -> Any:
    pipe = lesa.load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_drift_of_real_runs_is_predicted(name):
    pipe, kind = pipeline(), SAMPLERS[name]
    before = pipe.scheduler
    if kind is not None:
        flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True)
        pipe.scheduler = kind(**flow, time_shift_type="exponential")
        pipe.scheduler.register_to_config(**{setting: before.config[setting] for setting in SHIFT})
    try:
        prompts = read_prompts(MODEL / "prompts" / "validation.txt")[:RUNS]
        reference = record(pipe, prompts, range(RUNS), seam=True, num_inference_steps=STEPS)
        planner = Planner.of(pipe, reference, num_inference_steps=STEPS)
        for forecaster, budget in ((Reuse(), 8), (Lagrange(1), 6), (Lagrange(2), 8)):
            schedule = planner.search(forecaster, budget)
            predicted = planner.drift(forecaster, schedule.full_steps(STEPS))
            assert predicted == pytest.approx(planner.real(forecaster, schedule), abs=1.0), (forecaster, schedule)
    finally:
        pipe.scheduler = before
