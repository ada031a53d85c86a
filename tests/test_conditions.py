"""Runs in which rows would be far off are refused at their first step; those in which they work go on."""

import copy
import inspect

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    SASolverScheduler,
    UniPCMultistepScheduler,
)
from test_runtime import EVERY, draw

from lesa.host.conditions import Judge, adds_noise, check_embedded
from lesa.host.intercept import mark_of
from lesa.host.runtime import accelerate
from lesa.host.tap import tap_of
from lesa.learn.collect import record
from lesa.learn.guidance import facts
from lesa.learn.planning import Planner
from lesa.learn.trajectory import draw_tokens
from lesa.predictors import L2P, Origin, configuration
from lesa.rows.forecasters import Lagrange, Reuse, Taylor
from lesa.rows.schedule import Schedule

FLOW = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
STEPS = 8
QUIET = {
    "Euler": FlowMatchEulerDiscreteScheduler(),
    "UniPC": UniPCMultistepScheduler(**FLOW),
    "DPM++ 2M": DPMSolverMultistepScheduler(**FLOW),
    "DDIM": DDIMScheduler(),
    "Euler of sigmas": EulerDiscreteScheduler(),
    "Heun": HeunDiscreteScheduler(),
}
NOISY = {
    "stochastic Euler": FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    "LCM of flow matching": FlowMatchLCMScheduler(),
    "SDE-DPM++": DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW),
    "ancestral": EulerAncestralDiscreteScheduler(),
    "DDPM": DDPMScheduler(),
    "LCM": LCMScheduler(),
    "midway only": SASolverScheduler(tau_func=lambda t: 1.0 if 200 <= t <= 600 else 0.0),
}


def first_step(scheduler, **options):
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(STEPS)
    x = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))
    return scheduler, (x, scheduler.timesteps[0], x), options


@pytest.mark.parametrize("name", [*QUIET, *NOISY])
def test_a_step_of_zeros_tells_who_adds_noise(name):
    scheduler, args, _ = first_step({**QUIET, **NOISY}[name])
    assert adds_noise(scheduler, *args) == (name in NOISY)


def test_an_option_of_the_step_may_add_noise_and_nobodys_random_numbers_are_drawn():
    scheduler, args, _ = first_step(DDIMScheduler())
    generator = torch.Generator().manual_seed(3)
    before = torch.random.get_rng_state(), generator.get_state(), copy.deepcopy(scheduler.__dict__)
    assert adds_noise(scheduler, *args, eta=1.0, generator=generator)
    assert not adds_noise(scheduler, *args, eta=0.0, generator=generator)
    assert torch.equal(before[0], torch.random.get_rng_state()) and torch.equal(before[1], generator.get_state())
    assert before[2].keys() == scheduler.__dict__.keys()


def test_names_are_asked_where_no_step_can_be_tried():
    class Odd(FlowMatchEulerDiscreteScheduler):
        def step(self, velocity, time, x):
            return (x,)

    for stochastic in (False, True):
        scheduler, args, _ = first_step(Odd(stochastic_sampling=stochastic))
        with pytest.warns(UserWarning, match="by its names this one does"):
            assert adds_noise(scheduler, *args) == stochastic


def test_each_run_is_judged_once_at_its_schedulers_own_step(tiny_flux, monkeypatch):
    judged = []
    monkeypatch.setattr(Judge, "judge", lambda _self, _plans, _heard, who, args, _: judged.append((who, len(args))))
    before, members = inspect.signature(tiny_flux.scheduler.step), set(vars(type(tiny_flux.scheduler)))
    with accelerate(tiny_flux, Lagrange(1), schedule=EVERY):
        assert inspect.signature(tiny_flux.scheduler.step) == before, "which pipelines look at"
        for _ in range(2):
            draw(tiny_flux)
    assert judged == [(tiny_flux.scheduler, 3)] * 2
    assert set(vars(type(tiny_flux.scheduler))) == members and mark_of(tiny_flux.scheduler) is None


@pytest.fixture
def noisy(tiny_flux):
    before = tiny_flux.scheduler
    tiny_flux.scheduler = type(before).from_config(before.config, stochastic_sampling=True)
    yield tiny_flux
    tiny_flux.scheduler = before


def test_outputs_but_by_reuse_are_refused_under_noise_before_a_step_is_skipped(noisy):
    torch.manual_seed(0)
    full = draw(noisy)
    for forecaster in (Lagrange(1), Taylor(2)):
        calls = []
        hook = noisy.transformer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        refused = accelerate(noisy, forecaster, schedule=EVERY, of="output")
        with refused as run, pytest.raises(ValueError, match="add no noise, got"):
            draw(noisy)
        hook.remove()
        assert calls == [1] and run.summary()["cond"].skipped_steps == 0
    with accelerate(noisy, Reuse(), schedule=EVERY, of="output") as run:
        assert draw(noisy).isfinite().all()
    assert run.summary()["cond"].skipped_steps == 5
    with accelerate(noisy, Lagrange(1), schedule=EVERY, of="output", check=False) as run:
        draw(noisy)
    assert run.summary()["cond"].skipped_steps == 5
    torch.manual_seed(0)
    with accelerate(noisy, Lagrange(1), schedule=Schedule.every(1)):
        assert torch.equal(draw(noisy), full)  # nobody else drew random numbers


@pytest.mark.parametrize("name", ["UniPC", "DPM++ 2M"])
def test_samplers_without_noise_go_on(tiny_flux, name):
    before, scheduler = tiny_flux.scheduler, QUIET[name]
    tiny_flux.scheduler = type(scheduler).from_config(scheduler.config, use_dynamic_shifting=True)
    try:
        with accelerate(tiny_flux, Lagrange(1), schedule=EVERY) as run:
            for _ in range(2):
                draw(tiny_flux)
        assert run.summary()["cond"].skipped_steps == 10
    finally:
        tiny_flux.scheduler = before


CALL = dict(height=32, width=32, num_inference_steps=STEPS, max_sequence_length=16)


def test_nothing_is_recorded_or_planned_under_noise(noisy):
    with pytest.raises(ValueError, match="runs are recorded with samplers that add no noise"):
        record(noisy, ["a"], [0], draw_tokens, **CALL)
    quiet = type(noisy.scheduler).from_config(noisy.scheduler.config, stochastic_sampling=False)
    stochastic, noisy.scheduler = noisy.scheduler, quiet
    reference = record(noisy, ["a"], [0], draw_tokens, **CALL)
    noisy.scheduler = stochastic
    with pytest.raises(ValueError, match="samplers that add no noise"):
        Planner.of(noisy, reference, **CALL)


GUIDED = dict(height=32, width=32, num_inference_steps=STEPS, max_sequence_length=16, negative_prompt="fish")


@pytest.fixture
def guided(tiny_qwen):
    """A pipeline, and a predictor that says under which guidance it was trained."""
    runs = record(tiny_qwen, ["pear"], [0], draw_tokens, true_cfg_scale=3.0, **GUIDED)
    found = facts(tiny_qwen, [runs], {})
    assert found == {"guidance": {"scale": pytest.approx(3.0, abs=1e-2), "rescaled": True}}
    transformer = tiny_qwen.transformer
    origin = Origin(
        model="tiny",
        transformer=type(transformer).__name__,
        config=configuration(transformer),
        tap=tap_of(transformer),
        grid=tuple(runs[0].grid.tolist()),
        schedule="every:3",
        streams=("cond", "uncond"),
        training=found,
    )
    return tiny_qwen, L2P(origin)


def call_at(pipe, **changes):
    pipe("pear", output_type="latent", generator=torch.Generator().manual_seed(0), **{**GUIDED, **changes})


def test_other_guidance_than_a_predictor_was_trained_under_is_refused(guided):
    pipe, predictor = guided
    with accelerate(pipe, predictor) as run:
        for scale, words in ((5.0, "got 5"), (1.5, "got 1.5"), (1.0, "got a run without uncond")):
            with pytest.raises(ValueError, match=words):
                call_at(pipe, true_cfg_scale=scale)
        assert all(stream.skipped_steps == 0 for stream in run.summary().values())
        for _ in range(2):
            call_at(pipe, true_cfg_scale=3.0)
        call_at(pipe, true_cfg_scale=3.05)
        assert run.summary()["uncond"].skipped_steps == 15


def test_guidance_that_nobody_wrote_down_fits_any(guided):
    pipe, predictor = guided
    del predictor.origin.training["guidance"]
    with accelerate(pipe, predictor) as run:
        call_at(pipe, true_cfg_scale=5.0)
    assert run.summary()["cond"].skipped_steps == 5


def test_guidance_that_the_transformer_is_given_as_a_number(tiny_flux):
    with_it = copy.copy(tiny_flux)
    with_it.transformer = copy.deepcopy(tiny_flux.transformer)
    with_it.transformer.register_to_config(guidance_embeds=True)
    assert facts(with_it, [record(tiny_flux, ["a"], [0], draw_tokens, **CALL)], {}) == {"embedded_guidance": 3.5}
    assert facts(with_it, [record(tiny_flux, ["a"], [0], draw_tokens, **CALL)], {"guidance_scale": 6.0}) == {
        "embedded_guidance": 6.0
    }
    origin = Origin("m", "T", {}, tap_of(tiny_flux.transformer), (1.0, 0.5, 0.0), "every:2")
    origin.training["embedded_guidance"] = 3.5
    for given in (torch.tensor([3.5, 3.5]), torch.tensor([3500.0]), None):
        check_embedded(origin, given)
    for given in (torch.tensor([1.5]), torch.tensor([6000.0]), torch.tensor([3.5, 1.0])):
        with pytest.raises(ValueError, match=r"trained with guidance_scale=3\.5, got a run whose transformer is given"):
            check_embedded(origin, given)
