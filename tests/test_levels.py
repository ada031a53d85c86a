import copy

import pytest
import torch
from diffusers import CosineDPMSolverMultistepScheduler
from samplers import CASES, FLOW, Case, call

from lesa.host.times import times_of
from lesa.rows import levels

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, by the thousand
SHAPE = (1, 2, 3, 4)
UNKNOWN = ("IPNDM",)
KNOWN = [case for case in CASES if case.name not in UNKNOWN]


def levels_of(scheduler, begin=0, **kwargs) -> levels.Levels:
    latents = torch.zeros(SHAPE)
    return levels.of(scheduler, **call(scheduler, latents.clone(), scheduler.timesteps[begin], latents, **kwargs))


def flow(scheduler):
    sigmas = scheduler.sigmas.double()
    return 1 - sigmas if scheduler.config.get("invert_sigmas") else sigmas


def ratio(scheduler):
    sigmas = scheduler.sigmas.double()
    return sigmas / (1 + sigmas)


def interpolated(scheduler):
    """KDPM2 evaluates at a sigma and between it and the next one, in turn."""
    sigmas = scheduler.sigmas.double()
    sigmas[1:-1:2] = scheduler.sigmas_interpol.double()[1:-1:2]
    return sigmas / (1 + sigmas)


def products(scheduler):
    kept = scheduler.alphas_cumprod[scheduler.timesteps.long()].double()
    return (1 - kept).sqrt() / (kept.sqrt() + (1 - kept).sqrt())


def trigflow(scheduler):
    angles = scheduler.timesteps.double()
    return angles.sin() / (angles.cos() + angles.sin())


BY_PRODUCTS = ("PNDM", "DDIM", "DDPM", "CogVideoXDDIM", "CogVideoXDPM", "LCM", "TCD")


def expected(case, scheduler) -> torch.Tensor:
    """Return the times of a run by what is known of its class: all, or all but the last."""
    if case.name in BY_PRODUCTS:
        return products(scheduler)
    if case.name == "KDPM2Discrete":
        return interpolated(scheduler)
    if case.name == "SCM":
        return trigflow(scheduler)
    is_flow = "Flow" in case.name or "RF" in case.name or case.name in ("MiniMaxH3", "Helios")
    return flow(scheduler) if is_flow or case.settings.get("use_flow_sigmas") else ratio(scheduler)


@pytest.mark.parametrize("case", KNOWN, ids=str)
def test_times_are_the_noise_levels_of_the_scheduler(case):
    scheduler = case.scheduler(case.steps[0])
    times, known = levels_of(scheduler).times, expected(case, scheduler)
    assert len(times) == len(scheduler.timesteps) + (case.name != "SCM")  # whose timesteps have the end too
    compared = min(len(times), len(known))
    torch.testing.assert_close(times[:compared], known[:compared], rtol=0, atol=3e-4)
    assert 0 <= times[-1] <= times[-2] + 1e-4


def test_times_by_hand():
    euler = levels_of(Case("FlowMatchEulerDiscrete", {"shift": 3.0}).scheduler(50))
    torch.testing.assert_close(euler.signal + euler.noise, torch.ones(51, dtype=torch.float64))
    repeated = levels_of(Case("FlowMatchHeunDiscrete").scheduler(3)).times
    torch.testing.assert_close(repeated, torch.tensor([1, 0.5005, 0.5005, 0.001, 0.001, 0], dtype=torch.float64))
    assert levels_of(Case("DEISMultistep", FLOW).scheduler(6)).times[-1] > 0.3  # its last step does nothing


def predicted(scheduler, step, output, latents):
    """Return the data that a scheduler itself takes an output for."""
    if hasattr(scheduler, "convert_model_output"):
        scheduler._step_index = step
        return scheduler.convert_model_output(output, sample=latents)
    return scheduler.step(output, scheduler.timesteps[step], latents).pred_original_sample


PREDICTING = (
    *("EulerDiscrete", "EulerAncestralDiscrete", "DDIM", "DDPM", "CogVideoXDDIM", "EDMEuler", "SCM", "UniPCMultistep"),
    *("DPMSolverMultistep", "DPMSolverSinglestep", "EDMDPMSolverMultistep"),
)


def is_predicting(case) -> bool:
    return case.name in PREDICTING and case.settings.get("algorithm_type") != "dpmsolver"  # which is for the noise


@pytest.mark.parametrize("case", list(filter(is_predicting, CASES)), ids=str)
def test_the_data_prediction_is_the_schedulers(case):
    scheduler = case.scheduler(case.steps[0])
    found = levels_of(scheduler)
    generator = torch.Generator().manual_seed(0)
    for s in range(len(found.of_output)):
        output, latents = torch.randn(2, *SHAPE, generator=generator)
        got = found.of_latents[s] * latents + found.of_output[s] * output
        torch.testing.assert_close(got.float(), predicted(scheduler, s, output, latents), rtol=1e-3, atol=1e-3)


def test_clipping_does_not_hide_the_levels():
    clipped, free = (Case("DDIM", {"clip_sample": clips}).scheduler(6) for clips in (True, False))
    assert torch.equal(levels_of(clipped).times, levels_of(free).times)
    assert clipped.config.clip_sample
    thresholded = Case("UniPCMultistep", {"thresholding": True}).scheduler(6)
    assert torch.equal(levels_of(thresholded).times, levels_of(Case("UniPCMultistep").scheduler(6)).times)


@pytest.mark.parametrize("begin", [1, 3, 5])
@pytest.mark.parametrize(
    "case",
    [
        Case("FlowMatchEulerDiscrete"),
        Case("FlowMatchEulerDiscrete", {"invert_sigmas": True}),
        Case("MiniMaxH3"),
        Case("HeunDiscrete"),
        Case("DDIM", {"clip_sample": False}),
    ],
    ids=str,
)
def test_a_run_that_begins_later_has_the_last_of_the_levels(case, begin):
    scheduler = case.scheduler(8)
    whole = levels_of(scheduler)
    begin *= scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    later = levels_of(scheduler, begin)
    for name in ("times", "of_latents", "of_output"):
        torch.testing.assert_close(getattr(later, name), getattr(whole, name)[begin:], rtol=1e-4, atol=1e-4)


def test_an_output_that_is_the_data():
    scheduler = Case("EDMEuler").scheduler(6)
    output, latents = torch.zeros(SHAPE), torch.zeros(SHAPE)
    found = levels.of(scheduler, output, scheduler.timesteps[0], latents, pred_original_sample=output)
    torch.testing.assert_close(found.times, ratio(scheduler), rtol=0, atol=1e-5)
    assert found.of_latents.tolist() == [0] * 6 and found.of_output.tolist() == [1] * 6


def test_nothing_is_left_behind():
    scheduler = Case("DDPM").scheduler(6)
    before = copy.deepcopy(vars(scheduler)), torch.get_rng_state()
    levels_of(scheduler)
    assert str(vars(scheduler)) == str(before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    "case",
    [
        Case("IPNDM"),
        Case("DDIMInverse", {"clip_sample": False}),
        Case("DPMSolverMultistepInverse"),
        Case("DDPM", {"clip_sample": False, "variance_type": "fixed_large"}),
    ],
    ids=str,
)
def test_levels_that_are_not_known_are_not_guessed(case):
    with pytest.raises(ValueError, match=rf"noise levels are known where .*{case.name}Scheduler"):
        levels_of(case.scheduler(6))


def test_what_rounding_leaves_of_the_last_time_is_zero():
    """Sigmas from 500 leave some 1e-8 of the noise."""
    pytest.importorskip("torchsde", reason="its sampler draws noise with it")
    scheduler = CosineDPMSolverMultistepScheduler(sigma_max=500, sigma_min=0.3, sigma_data=1.0)
    scheduler.set_timesteps(12)
    times = times_of(scheduler)
    assert times[-1] == 0 and (times[:-1] > 1e-3).all() and len(times) == 13
