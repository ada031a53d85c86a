"""Better samplers at planned times: their grids are the plan's, and Euler's is reuse at the output."""

import json

import pytest
import torch

from lesa.bench import benchmark, samplers
from lesa.bench.methods import REFERENCE, forecast
from lesa.host.pipelines import with_call
from lesa.rows.forecasters import Reuse
from lesa.rows.grid import from_scheduler
from lesa.rows.schedule import Schedule

STEPS = 8
PAIRS = benchmark.pair_up(["small red apple on white, left", "large blue fish on grey, right"], [3, 4])
EULER, *MULTISTEP = samplers.KINDS
SCHEDULE = Schedule.at([0, 3, 5, 6])


@pytest.fixture
def pipe(tiny_flux):
    pipe = type(tiny_flux)(**tiny_flux.components)
    pipe.set_progress_bar_config(disable=True)
    call = dict(num_inference_steps=STEPS, height=32, width=32, guidance_scale=1.0, max_sequence_length=16)
    return with_call(pipe, call)


@pytest.fixture
def grid(pipe):
    benchmark.observe(pipe, REFERENCE, PAIRS)
    return from_scheduler(pipe.scheduler)


def test_euler_at_planned_times_is_reuse_at_the_output(pipe, grid):
    euler = samplers.at_times(EULER, samplers.times_of(grid, SCHEDULE), SCHEDULE)
    ours = benchmark.observe(pipe, euler, PAIRS)
    reused = benchmark.observe(pipe, forecast("reuse", Reuse(), SCHEDULE, "output"), PAIRS)
    torch.testing.assert_close(ours.latents, reused.latents, rtol=1e-4, atol=1e-4)
    assert len(ours.full[0]) == len(reused.full[0]) == 4
    assert not torch.allclose(ours.latents, benchmark.observe(pipe, REFERENCE, PAIRS).latents, atol=1e-3)


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_better_sampler_goes_through_the_planned_times(pipe, grid, name):
    times = samplers.times_of(grid, SCHEDULE)
    own = pipe.scheduler
    drawn = benchmark.observe(pipe, samplers.at_times(name, times, SCHEDULE), PAIRS)
    assert drawn.times == pytest.approx([1000 * time for time in times[:-1]], rel=1e-4)
    assert drawn.latents.isfinite().all() and len(drawn.full[0]) == 4
    assert pipe.scheduler is own  # and it runs as before
    assert benchmark.observe(pipe, REFERENCE, PAIRS).times == pytest.approx((1000 * grid[:-1]).tolist(), rel=1e-4)


@pytest.mark.parametrize("name", MULTISTEP)
def test_a_better_sampler_takes_the_place_of_one_whose_shift_is_fixed(pipe, name):
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, use_dynamic_shifting=False)
    drawn = benchmark.observe(pipe, samplers.at_times(name, [1.0, 0.5, 0.25, 0.0], SCHEDULE), PAIRS)
    assert drawn.times == pytest.approx([1000, 500, 250], rel=1e-4) and drawn.latents.isfinite().all()


@pytest.mark.parametrize("name", MULTISTEP)
def test_with_all_times_a_better_sampler_comes_near_the_reference_run(pipe, grid, name):
    every = Schedule.every(1)
    exact = benchmark.observe(pipe, REFERENCE, PAIRS).latents
    drifts = [
        float(
            (
                benchmark.observe(pipe, samplers.at_times(name, samplers.times_of(grid, on), on), PAIRS).latents - exact
            ).norm()
        )
        for on in (every, Schedule.at([0, 4]))
    ]
    assert drifts[0] < drifts[1]


def test_each_has_the_times_planned_for_it_and_is_rebuilt(pipe, grid):
    asked = []

    def plan(forecaster, budget):
        asked.append((repr(forecaster), budget))
        return Schedule.at(range(budget)) if isinstance(forecaster, Reuse) else Schedule.at([*range(budget - 1), 6])

    methods = samplers.line_up(pipe, grid, [3], plan, PAIRS)
    assert [method.name for method in methods] == list(samplers.KINDS)
    assert methods[0].schedule == "at:0,1,2" and {method.schedule for method in methods} <= {"at:0,1,2", "at:0,1,6"}
    assert asked == [(repr(one), 3) for one in samplers.CANDIDATES]
    for method in methods:
        entry = json.loads(json.dumps(method.entry()))
        assert samplers.rebuild(entry).entry() == method.entry()


def test_the_nearest_by_real_runs_is_taken(pipe, grid):
    every, few = Schedule.every(1), Schedule.at([0, 1])
    tried = [samplers.at_times(EULER, samplers.times_of(grid, on), on) for on in (few, every)]
    assert samplers.nearest(pipe, tried, PAIRS) is tried[1]
    assert samplers.nearest(pipe, tried, []) is tried[0]


def test_they_take_velocities_of_flow_matching_alone(pipe):
    from diffusers import DDIMScheduler

    assert samplers.fits(pipe)
    pipe.scheduler = DDIMScheduler()
    assert not samplers.fits(pipe)
