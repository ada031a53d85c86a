"""Every pipeline of the zoo runs, twice the same, and the oracle forecasts it; every transformer of the zoo runs."""

import copy
import importlib
from functools import cache

import diffusers
import pytest
import torch
from zoo import parts
from zoo.oracle import Oracle, Run, combine, extrapolate, reuse, tensors, watch
from zoo.pipelines import ZOO, Specimen
from zoo.transformers import MODELS, model_call


@cache
def built(name: str) -> Specimen:
    return ZOO[name]()


@cache
def plain(name: str) -> Run:
    return watch(built(name).pipe, built(name).call)


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def test_the_zoo_is_large():
    assert len(ZOO) >= 190 and len(MODELS) == 60


@pytest.mark.broad
@pytest.mark.parametrize("name", ZOO)
def test_a_call_repeats_to_the_bit_and_is_left_as_it_was(name: str):
    run, unwatched = plain(name), tensors(built(name).call())
    assert unwatched and equal(run.output, unwatched)
    assert run.ticks >= 4 and run.denoisers and all(run.streams) and run.steps >= run.ticks


@pytest.mark.broad
@pytest.mark.parametrize("name", ZOO)
def test_the_oracle_with_every_tick_full_is_the_plain_call(name: str):
    run = plain(name)
    full = watch(built(name).pipe, built(name).call, Oracle(run, range(run.ticks), reuse))
    assert full.skipped == 0 and equal(full.latents, run.latents) and full.times == run.times


@pytest.mark.broad
@pytest.mark.parametrize("name", ZOO)
def test_the_oracle_skips_ticks(name: str):
    run = plain(name)
    forecast = watch(built(name).pipe, built(name).call, Oracle(run, range(0, run.ticks, 2), reuse))
    assert forecast.skipped and forecast.runs == run.runs and forecast.calls == run.calls
    assert all(latents.isfinite().all() for latents in run.latents + forecast.latents)
    assert distance(forecast.latents, run.latents) > 1e-3


@pytest.mark.parametrize(
    ("name", "runs", "steps", "begins", "streams"),
    [
        ("flux_guided", [6], 6, 1, {2}),
        ("z_image_truncated", [6], 6, 1, {1}),  # its batch shrinks when guidance ends
        ("flux_img2img_guided", [5], 5, 1, {2}),  # begins late
        ("sdxl_heun_guided", [11], 11, 1, {1}),  # evaluates twice a step, at times that repeat
        ("stable_diffusion_pndm_guided", [15], 15, 1, {1}),
        ("sd3_skip_layer_guided", [6], 6, 1, {1, 2}),  # a third call, or a second, on a part of the steps
        ("modular_qwen_interval_guided", [6], 6, 1, {1, 2}),
        ("motif_video_i2v_guided", [6], 6, 1, {2, 3}),
        ("allegro_guided", [6], 6, 2, {1}),  # sets its times twice
        ("cosmos_text2world_guided", [6], 12, 1, {2}),  # steps twice, with an index that it sets back
        ("ltx2_guided", [6], 12, 2, {3}),  # steps a copy for the sound
        ("modular_minimax_h3", [5], 10, 2, {1}),
        ("skyreels_forcing_guided", [6], 18, 4, {2}),  # steps a copy for every frame of latents
        ("skyreels_forcing_asynchronous_guided", [10], 18, 4, {2}),  # not every frame in every tick
        ("skyreels_forcing_long_guided", [6, 6], 24, 7, {2}),  # samples in sections
        ("framepack_guided", [6, 6], 12, 2, {2}),
        ("wan_animate_guided", [6, 6], 12, 3, {2}),
        ("helios_pyramid_guided", [3, 3, 3], 9, 3, {2}),
        ("anyflow_far_guided", [6, 6], 12, 2, {1}),  # calls once more between its runs, to fill a cache
    ],
)
def test_clocks_that_a_counter_of_steps_would_get_wrong(name, runs, steps, begins, streams):
    run = plain(name)
    if parts.OLDER and name == "flux_img2img_guided" and set(run.streams) == {1}:
        pytest.skip("this older diffusers guides it by a negative prompt in words alone")
    assert (run.runs, run.steps, run.begins, set(run.streams)) == (runs, steps, begins, streams)


def test_rows_see_the_times_and_past_of_their_run():
    seen = []

    def row(times, tick, past):
        seen.append((len(times), tick, tuple(past)))
        return extrapolate(times, tick, past)

    name = "helios_pyramid_guided"  # three runs of three ticks
    watch(built(name).pipe, built(name).call, Oracle(plain(name), {0, 1}, row))
    assert plain(name).runs == [3, 3, 3] and seen == [(3, 2, (0, 1))] * 6


class Sampler:
    """Step along the velocity, as a scheduler that a pipeline copies."""

    def set_timesteps(self, steps: int) -> None:
        self.timesteps = list(range(steps))

    def step(self, velocity, timestep, latents):
        return (latents + velocity,)


class Doubler(torch.nn.Module):
    def forward(self, x, scale):
        return dict(sample=scale * x)


class Toy:
    """Guide by a second call, from the second step on, and step twice with a copy of the sampler."""

    def __init__(self) -> None:
        self.components = dict(scheduler=Sampler(), transformer=Doubler())

    def __call__(self):
        scheduler, transformer = copy.deepcopy(self.components["scheduler"]), self.components["transformer"]
        scheduler.set_timesteps(5)
        latents = torch.ones(1)
        for step in scheduler.timesteps:
            velocity = transformer(latents, 1.0)["sample"]
            velocity += transformer(latents, 10.0)["sample"] if step else 0  # in place, as pipelines may
            scheduler.step(velocity, step, latents)
            latents = scheduler.step(velocity, step, latents)[0]
        return latents


def test_the_oracle_on_a_toy_with_the_answer_in_ones_head():
    toy, step = Toy(), Sampler.step
    run = watch(toy, toy)
    assert run.streams == [1, 2, 2, 2, 2] and run.steps == 10 and run.times == [0, 1, 2, 3, 4] and run.runs == [5]
    assert run.latents[-1].item() == 2 * 12**4  # doubled, then times 1 + 11 in each step
    forecast = watch(toy, toy, Oracle(run, {0, 2, 4}, reuse))
    # Step 1: the first stream repeats 1, the second is new and runs: 2 + 1 + 20 = 23, then 23 * 12 = 276;
    # step 3 repeats the 253 of step 2: 529; then times 12
    assert forecast.skipped == 3 and forecast.latents[-1].item() == 529 * 12
    line = watch(toy, toy, Oracle(run, {0, 2, 4}, extrapolate))
    # Step 3: the line of the first stream through (0, 1), (2, 23), that of the second through (1, 20), (2, 230)
    assert line.latents[-1].item() == (276 + 34 + 440) * 12
    assert Sampler.step is step and "forward" not in vars(toy.components["transformer"])


def test_combine_sums_every_tensor_and_hands_on_the_rest():
    values = [dict(a=torch.full((2,), x), b=[torch.tensor(2 * x), "rest", x], c=(torch.tensor(3),)) for x in (1.0, 3.0)]
    got = combine(values, [-1.0, 2.0])
    assert got["a"].tolist() == [5.0, 5.0] and got["b"][0].item() == 10.0 and got["b"][1:] == ["rest", 3.0]
    assert got["c"][0].item() == 3  # whole numbers are no features


@pytest.mark.broad
@pytest.mark.parametrize("name", MODELS)
def test_a_model_runs(name: str):
    module, args, kwargs = model_call(name)
    assert type(module).__name__ == name
    with torch.no_grad():
        outputs = [tensors(module(*args, **kwargs)) for _ in range(2)]
    assert outputs[0] and outputs[0][0].isfinite().all() and equal(*outputs)


def test_a_pipeline_that_this_diffusers_is_without_is_skipped(monkeypatch):
    monkeypatch.setattr(parts, "ZOO", {})

    @parts.entry
    def newer() -> parts.Specimen:
        return diffusers.PipelineOfANewerRelease()

    with pytest.raises(pytest.skip.Exception, match=r"is without it: .*PipelineOfANewerRelease"):
        parts.ZOO["newer"]()


def import_of_what_is_not_installed() -> None:
    try:
        importlib.import_module("a_package_of_nobody")
    except ModuleNotFoundError as error:
        raise RuntimeError("Failed to import diffusers.pipelines.some") from error


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(of_a_newer_release=1), "has another class of this name"),
        (import_of_what_is_not_installed, "needs a_package_of_nobody for it"),
    ],
)
def test_what_an_older_diffusers_has_otherwise_is_skipped_there_alone(build, why, monkeypatch):
    monkeypatch.setattr(parts, "ZOO", {})
    parts.entry(build)
    monkeypatch.setattr(parts, "OLDER", True)
    with pytest.raises(pytest.skip.Exception, match=f"diffusers [0-9.]+ {why}: "):
        parts.ZOO[build.__name__]()
    monkeypatch.setattr(parts, "OLDER", False)
    with pytest.raises((TypeError, RuntimeError)):
        parts.ZOO[build.__name__]()
