import copy

import pytest
import torch
from samplers import CASES, FLOW, Case, call, draws, walk

from lesa.rows import sampler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of numpy, by the thousand
SHAPE = (1, 2, 3, 4)
RUNS = [pytest.param(case, steps, id=f"{case}-{steps}") for case in CASES for steps in case.steps]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def numbers_of(scheduler, shape=SHAPE, **kwargs) -> sampler.Sampler:
    latents = torch.zeros(shape)
    return sampler.of(scheduler, **call(scheduler, torch.zeros(shape), scheduler.timesteps[0], latents, **kwargs))


def combine(coefficients, *inputs) -> torch.Tensor:
    """Return the weighted sum of inputs (latents, outputs, noise) under coefficients side by side."""
    return torch.einsum("sk,k...->s...", torch.cat(coefficients, 1), torch.cat(inputs).double())


def assert_close(got: torch.Tensor, expected: list[torch.Tensor]) -> None:
    for s, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), f"step {s}"


@pytest.mark.parametrize(("case", "steps"), RUNS)
def test_the_numbers_do_what_the_scheduler_does(case, steps):
    scheduler = case.scheduler(steps)
    numbers = numbers_of(scheduler, generator=torch.Generator())
    count = numbers.noise.shape[1]
    outputs, handed = normal(len(numbers), *SHAPE), normal(len(numbers), *SHAPE, seed=1)
    noise = draws(count, SHAPE, seed=2)
    seeded = {"generator": torch.Generator().manual_seed(2)}
    # The latents that a step gives are those of the next: chained.
    chained = [numbers.decay[:, None], numbers.response, numbers.noise_response]
    walked = walk(copy.deepcopy(scheduler), outputs, handed[0], **seeded)
    assert_close(combine(chained, handed[:1], outputs, noise), walked)
    # The latents are rewritten in between: per step.
    seeded["generator"].manual_seed(2)
    walked = walk(scheduler, outputs, handed, **seeded)
    assert_close(combine([numbers.latents, numbers.outputs, numbers.noise], handed, outputs, noise), walked[1:])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_noise_is_injected_where_a_draw_enters_the_latents(case):
    assert numbers_of(case.scheduler(case.steps[0])).injects_noise == case.noisy


def test_arguments_of_the_call_count():
    ddim = Case("DDIM", {"clip_sample": False}).scheduler(6)
    assert not numbers_of(ddim).injects_noise
    assert numbers_of(ddim, eta=1.0).injects_noise
    euler = Case("EulerDiscrete").scheduler(6)
    assert not numbers_of(euler).injects_noise
    churned = numbers_of(euler, s_churn=2.0, s_noise=0.5)
    assert torch.equal(churned.noise, 0.5 * numbers_of(euler, s_churn=2.0).noise)


def test_numbers_at_hand():
    scheduler = Case("FlowMatchEulerDiscrete").scheduler(6)
    numbers = numbers_of(scheduler)
    gaps = scheduler.sigmas.double().diff()
    torch.testing.assert_close(numbers.outputs, gaps.diag())
    torch.testing.assert_close(numbers.latents, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(numbers.response[1:], gaps.repeat(6, 1).tril())
    assert numbers.decay.tolist() == [1] * 7
    assert len(numbers) == 6 and numbers.noise.shape == (6, 0)


@pytest.mark.parametrize("shape", [(3,), (2, 5), (2, 7, 3), (1, 2, 2, 2, 3)])
def test_latents_of_any_shape_have_the_same_numbers(shape):
    name = "FlowMatchEulerDiscrete" if len(shape) == 1 else "UniPCMultistep"
    scheduler = Case(name).scheduler(6)
    numbers, expected = numbers_of(scheduler, shape), numbers_of(scheduler)
    torch.testing.assert_close(numbers.outputs, expected.outputs)


def state(scheduler) -> dict:
    return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in vars(scheduler).items()}


@pytest.mark.parametrize("name", ["SASolver", "UniPCMultistep", "LCM"])
def test_nothing_is_left_behind(name):
    scheduler, generator = Case(name).scheduler(6), torch.Generator().manual_seed(3)
    before = copy.deepcopy(state(scheduler)), torch.get_rng_state(), generator.get_state()
    numbers_of(scheduler, generator=generator)
    numbers_of(scheduler)
    assert str(state(scheduler)) == str(before[0])
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.equal(generator.get_state(), before[2])


@pytest.mark.parametrize("form", ["scalar", "batch", "number", "bfloat16"])
def test_timesteps_in_any_form(form):
    scheduler = Case("UniPCMultistep", FLOW).scheduler(6)
    scheduler.set_begin_index(0)  # as pipelines do; no other form is looked up
    time = scheduler.timesteps[0]
    forms = {"scalar": time, "batch": time.expand(3), "number": time.item(), "bfloat16": time.bfloat16()}
    got = sampler.of(scheduler, torch.zeros(3, 2, 4), forms[form], torch.zeros(3, 2, 4), return_dict=False)
    assert torch.equal(got.outputs, numbers_of(scheduler).outputs)


def test_a_generator_for_each_picture():
    scheduler, latents = Case("LCM").scheduler(4), torch.zeros(3, 2, 4)
    got = sampler.of(scheduler, latents, scheduler.timesteps[0], latents, [torch.Generator() for _ in range(3)])
    assert torch.equal(got.noise, numbers_of(scheduler).noise)


@pytest.mark.parametrize(
    "case", [Case("FlowMatchEulerDiscrete"), Case("HeunDiscrete"), Case("DPMSolverMultistep")], ids=str
)
@pytest.mark.parametrize("told", [True, False])
def test_a_run_that_begins_later(case, told):
    scheduler = case.scheduler(6)
    begin = 2 * scheduler.order
    if told:
        scheduler.set_begin_index(begin)
    latents = torch.zeros(SHAPE)
    numbers = sampler.of(scheduler, latents.clone(), scheduler.timesteps[begin], latents)
    assert len(numbers) == len(scheduler.timesteps) - begin
    scheduler.set_begin_index(begin)
    outputs = normal(len(numbers), *SHAPE)
    walked = walk(scheduler, outputs, latents, begin)
    assert_close(combine([numbers.response[1:]], outputs), walked[1:])


def test_an_output_that_is_the_data():
    """Cosmos hands its output over as the data too: then it is that which counts."""
    scheduler = Case("EDMEuler").scheduler(6)
    output, latents = torch.zeros(SHAPE), torch.zeros(SHAPE)
    numbers = sampler.of(scheduler, output, scheduler.timesteps[0], latents, pred_original_sample=output)
    sigmas = scheduler.sigmas.double()
    torch.testing.assert_close(numbers.outputs, (1 - sigmas[1:] / sigmas[:-1]).diag(), rtol=1e-5, atol=1e-6)


def test_calls_that_are_known():
    """The calls of a run may all be given: here every second timestep of the scheduler's alone."""
    scheduler = Case("DDIM", {"clip_sample": False}).scheduler(6)
    latents = torch.zeros(SHAPE)
    calls = [sampler.bind(scheduler, latents.clone(), time, latents) for time in scheduler.timesteps[::2]]
    everything = numbers_of(scheduler)
    torch.testing.assert_close(sampler.read(scheduler, calls).outputs.diag(), everything.outputs.diag()[::2])


class Toy:
    """A sampler of one's own: no config, no sigmas, with a momentum of which nobody is told."""

    def __init__(self, change=lambda x: x) -> None:
        self.timesteps = torch.tensor([3.0, 2.0, 1.0])
        self.momentum = 0
        self.change = change

    def step(self, model_output, timestep, sample):
        self.momentum = 0.5 * self.momentum + model_output
        return (sample - self.change(self.momentum),)


def test_a_sampler_of_ones_own():
    latents = torch.zeros(SHAPE)
    numbers = sampler.of(Toy(), latents.clone(), 3.0, latents)
    assert numbers.outputs.tolist() == [[-1, 0, 0], [-0.5, -1, 0], [-0.25, -0.5, -1]]
    assert numbers.response[-1].tolist() == [-1.75, -1.5, -1]


class Brownian(Toy):
    """Adds what a Brownian motion gained, whose ends it draws from their seeds whenever it needs them."""

    def step(self, model_output, timestep, sample):
        step = self.timesteps.tolist().index(float(timestep))
        seeds = [torch.Generator().manual_seed(seed) for seed in (step, step + 1)]
        before, after = (torch.randn(sample.shape, generator=seed, dtype=sample.dtype) for seed in seeds)
        return (sample - model_output + after - before,)


def test_a_draw_that_is_made_again_is_the_same_draw():
    latents = torch.zeros(SHAPE)
    numbers = sampler.of(Brownian(), latents.clone(), 3.0, latents)
    assert numbers.noise.tolist() == [[-1, 1, 0, 0], [0, -1, 1, 0], [0, 0, -1, 1]]


@pytest.mark.parametrize(
    "change",
    [
        torch.tanh,
        lambda x: x.clamp(-100, 100),
        lambda x: x - x.mean(),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: x - x.mean(0, keepdim=True),
        lambda x: x.flip(-1),
        lambda x: x / 0,
        lambda x: x + 1,
    ],
    ids=["tanh", "clamp", "mean", "channels", "batch", "flip", "infinite", "constant"],
)
def test_what_is_no_weighted_sum_of_values_is_refused(change):
    latents = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="step 0 of this Toy is not"):
        sampler.of(Toy(change), latents.clone(), 3.0, latents)


@pytest.mark.parametrize(
    ("case", "setting"),
    [
        (Case("DDIM"), "clip_sample"),
        (Case("DDIM", {"clip_sample_range": 50.0}), "clip_sample"),
        (Case("DDPM"), "clip_sample"),
        (Case("DDIM", {"clip_sample": False, "thresholding": True}), "thresholding"),
        (Case("DPMSolverMultistep", {"thresholding": True}), "thresholding"),
        (Case("UniPCMultistep", {"thresholding": True, "sample_max_value": 100.0}), "thresholding"),
        (Case("CMStochasticIterative"), "clip_denoised"),
    ],
    ids=str,
)
def test_clipping_is_refused_by_name(case, setting):
    with pytest.raises(ValueError, match=rf"{case.name}Scheduler is not: .*clips.*{setting}=True.*set {setting}=False"):
        numbers_of(case.scheduler(6))


def test_coefficients_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match=r"step 5 of this UniPCMultistepScheduler is not: .*not finite"):
        numbers_of(Case("UniPCMultistep", {"solver_type": "bh1"}).scheduler(6))


def test_tokens_at_noise_levels_of_their_own():
    """LTX's condition tokens stay where they are until the run has come down to them; each kind has its numbers."""
    scheduler = Case("FlowMatchEulerDiscrete").scheduler(6)
    levels = torch.tensor([[1000.0, 0.0, 500.0, 500.0]])
    time, latents, outputs = scheduler.timesteps[0], normal(1, 4, 5), normal(6, 1, 4, 5)
    with pytest.raises(ValueError, match=r"one noise level a step, got 3 in per_token_timesteps"):
        sampler.of(scheduler, latents.clone(), time, latents, per_token_timesteps=levels)
    walked, run = latents, copy.deepcopy(scheduler)
    for output, later in zip(outputs, scheduler.timesteps, strict=True):
        walked = run.step(output, later, walked, per_token_timesteps=levels.clamp(max=later))[0]
    for k in (slice(0, 1), slice(1, 2), slice(2, 4)):
        kind = latents[:, k]
        numbers = sampler.of(scheduler, kind.clone(), time, kind, per_token_timesteps=levels[:, k])
        ends = combine([numbers.decay[-1:, None], numbers.response[-1:]], kind[None], outputs[:, :, k])
        torch.testing.assert_close(ends[0].float(), walked[:, k])


def test_calls_that_do_not_follow_are_refused():
    scheduler = Case("FlowMatchEulerDiscrete").scheduler(6)
    latents = torch.zeros(1, 3, 4)
    with pytest.raises(ValueError, match="got 3 in timestep"):
        sampler.of(scheduler, latents.clone(), scheduler.timesteps[:3], latents)
    with pytest.raises(ValueError, match="got 1234, which this FlowMatchEulerDiscreteScheduler has not"):
        sampler.of(scheduler, latents.clone(), 1234.0, latents)


def test_arguments_with_a_value_for_each_place_are_refused():
    scheduler = Case("RePaint").scheduler(6)
    latents = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"treats all values of the latents alike, got original_image"):
        sampler.of(scheduler, latents.clone(), scheduler.timesteps[0], latents, latents.clone(), latents.clone())


def test_samplers_of_something_else_are_refused():
    latents = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"which this Toy does not \(RuntimeError"):
        sampler.of(Toy(lambda x: torch.nn.functional.embedding(x, x)), latents.clone(), 3.0, latents)


def test_noise_that_is_handed_over_is_no_coefficient():
    scheduler = Case("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}).scheduler(6)
    got = numbers_of(scheduler, variance_noise=torch.ones(SHAPE))
    assert torch.equal(got.outputs, numbers_of(scheduler).outputs)
    assert not got.injects_noise


def test_outputs_that_hold_more_than_the_latents_are_refused():
    scheduler = Case("DDPM", {"clip_sample": False, "variance_type": "learned_range"}).scheduler(6)
    with pytest.raises(ValueError, match=r"shape of the latents, \(1, 2, 4\), got \(1, 4, 4\)"):
        sampler.of(scheduler, torch.zeros(1, 4, 4), scheduler.timesteps[0], torch.zeros(1, 2, 4))


def test_noise_of_another_shape_is_refused():
    latents = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="noise of a sampler has the shape of its latents"):
        sampler.of(Toy(lambda x: x + torch.randn(5).sum()), latents.clone(), 3.0, latents)
