"""On the embedded FLUX the drift of real runs is predicted within 1 dB, under Euler, UniPC and DPM++."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

import lesa
from lesa.learn.call_files import read_prompts
from lesa.learn.collect import record
from lesa.learn.planning import Planner
from lesa.rows.forecasters import Lagrange, Reuse
from lesa.rows.schedule import Schedule

MODEL = Path(__file__).parents[1] / "models" / "emoji-flux"
SHIFT = ("base_image_seq_len", "base_shift", "max_image_seq_len", "max_shift")
SAMPLERS = {"Euler": None, "UniPC": UniPCMultistepScheduler, "DPM++": DPMSolverMultistepScheduler}
RUNS = 8
PLANNED = [
    (Reuse(), (0, 25, 37, 42, 45, 47, 48, 49)),
    (Lagrange(1), (0, 31, 41, 45, 48, 49)),
    (Lagrange(2), (0, 18, 33, 40, 44, 47, 48, 49)),
]


@cache
def pipeline() -> Any:
    pipe = lesa.load(MODEL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def under(name: str) -> Iterator[Any]:
    """The embedded FLUX under another sampler, with its own shift."""
    pipe, kind = pipeline(), SAMPLERS[name]
    before = pipe.scheduler
    if kind is not None:
        flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True)
        pipe.scheduler = kind(**flow, time_shift_type="exponential")
        pipe.scheduler.register_to_config(**{setting: before.config[setting] for setting in SHIFT})
    try:
        yield pipe
    finally:
        pipe.scheduler = before


def planner_of(pipe: Any, runs: int, **call: Any) -> Planner:
    prompts = read_prompts(MODEL / "prompts" / "validation.txt")[:runs]
    return Planner.of(pipe, record(pipe, prompts, range(runs), seam=True, **call), **call)


@pytest.mark.parametrize("name", [pytest.param(one, marks=[pytest.mark.broad] * (one == "DPM++")) for one in SAMPLERS])
def test_the_drift_of_real_runs_is_predicted(name):
    with under(name) as pipe:
        planner = planner_of(pipe, RUNS)
        for forecaster, full in PLANNED:
            real = planner.real(forecaster, Schedule.at(full))
            assert planner.drift(forecaster, full) == pytest.approx(real, abs=1.0), forecaster


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_search_finds_no_drift_that_real_runs_do_not_keep(name):
    """Among thousands of schedules there are those on which every fault of a prediction looks like a good plan."""
    with under(name) as pipe:
        planner = planner_of(pipe, RUNS // 2, num_inference_steps=24)
        for forecaster, budget in [(Reuse(), 10), (Lagrange(1), 8), (Lagrange(2), 8)]:
            found = planner.search(forecaster, budget)
            real = planner.real(forecaster, found)
            assert planner.drift(forecaster, found.full_steps(24)) == pytest.approx(real, abs=1.0), forecaster
