"""Under samplers that add noise the data prediction is forecast, as an oracle says that knows nothing of lesa."""

import inspect
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from zoo.oracle import Oracle, Run, extrapolate, patched, reuse, tensors, watch
from zoo.pipelines import ZOO, Specimen

from lesa.host.data import DataRun
from lesa.host.runtime import accelerate
from lesa.host.tap import tap_of
from lesa.predictors import L2P, Origin, configuration
from lesa.rows.detour import Detour
from lesa.rows.forecasters import Lagrange, Reuse, Taylor
from lesa.rows.levels import Levels
from lesa.rows.levels import of as of_levels
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NOISY = (
    *("stable_diffusion_euler_ancestral_guided", "cogvideox_dpm_guided", "cogvideox_i2v_guided", "latent_consistency"),
    *("unconditional_ddpm", "hunyuan_dit_guided", "sana_sprint", "sana_sprint_img2img", "stable_audio3_stochastic"),
    *("allegro_guided", "kandinsky22_prior_guided", "stable_audio_guided", "flux stochastic"),
)
QUIET = ("flux_img2img_guided", "ltx2_guided", "cosmos_video2world_guided")


@cache
def built(name: str) -> Specimen:
    specimen = ZOO[name.split()[0]]()
    if name == "flux stochastic":
        config = specimen.pipe.scheduler.config
        specimen.pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True)
    return specimen


@cache
def plain(name: str) -> Run:
    return watch(built(name).pipe, built(name).call)


def outputs(name: str) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors(built(name).call())]


def formula(scheduler, time, given) -> tuple[float, float]:
    """Return a and b of x_0 = a x + b v by the textbook, one time after the other."""
    config = scheduler.config
    kind = config.get("prediction_type")
    if given.get("pred_original_sample") is not None:
        return 0.0, 1.0
    if type(scheduler).__name__ == "SCMScheduler":
        return float(time.double().cos()), -float(time.double().sin())  # per unit of sigma_data
    if type(scheduler).__name__ == "EDMEulerScheduler":
        sigma, data = float(scheduler.sigmas[scheduler.step_index]), config.sigma_data
        return data**2 / (sigma**2 + data**2), sigma * data / (sigma**2 + data**2) ** 0.5
    if kind is None:
        return 1.0, -float(scheduler.sigmas[scheduler.step_index])
    if hasattr(scheduler, "sigmas"):
        signal, noise = 1.0, float(scheduler.sigmas[scheduler.step_index])
    else:
        kept = float(scheduler.alphas_cumprod[int(time)])
        signal, noise = kept**0.5, (1 - kept) ** 0.5
    if kind == "sample":
        return 0.0, 1.0
    if kind == "epsilon":
        return 1 / signal, -noise / signal
    assert kind == "v_prediction"
    return signal / (signal**2 + noise**2), -noise / (signal**2 + noise**2) ** 0.5


class DataOracle(Oracle):
    """Repeats outputs on skipped ticks, and hands `step` what predicts the data that rows over the past's say."""

    def __init__(self, plain, full, rows):
        super().__init__(plain, full, reuse)
        self.data_rows, self.data = rows, {}
        self.part = 0

    def open(self):
        super().open()
        self.data.clear()

    def steps(self, original, *args, **kwargs):
        if self.deep:
            return super().steps(original, *args, **kwargs)
        self.part = 0 if self.calls else self.part + 1
        tick = self.tick if self.calls else self.tick - 1
        given = inspect.signature(original).bind(*args, **kwargs)
        named, scheduler = given.arguments, args[0]
        if hasattr(scheduler, "_init_step_index") and scheduler.step_index is None:
            scheduler._init_step_index(named["timestep"])
        a, b = formula(scheduler, torch.as_tensor(named["timestep"]).flatten()[0], named)
        past = self.data.setdefault(self.part, [])
        if tick in self.full or not past:
            past.append((tick, a * named["sample"].double() + b * named["model_output"].double()))
        else:
            ticks, data = zip(*past, strict=True)
            forecast = sum(c * x for c, x in zip(self.data_rows(self.times(), tick, ticks), data, strict=True))
            output = ((forecast - a * named["sample"].double()) / b).to(named["model_output"].dtype)
            for name in ("model_output", "pred_original_sample"):
                if named.get(name) is not None:
                    named[name] = output
        return super().steps(original, *given.args, **given.kwargs)


@pytest.fixture(params=NOISY)
def name(request) -> str:
    return request.param


def test_with_every_step_full_nothing_changes(name):
    for of in ("auto", "data"):
        with accelerate(built(name).pipe, Taylor(1), schedule=Schedule.every(1), of=of):
            assert all(torch.equal(a, b) for a, b in zip(outputs(name), plain(name).output, strict=True))


@pytest.mark.parametrize(("forecaster", "rows"), [(Reuse(), reuse), (Taylor(1), extrapolate)], ids=["reuse", "a line"])
@pytest.mark.parametrize("name", [*NOISY, *QUIET])
def test_a_run_is_what_the_oracle_says(name, forecaster, rows):
    run = plain(name)
    expected = watch(built(name).pipe, built(name).call, DataOracle(run, range(0, run.ticks, 3), rows))
    of = "data" if name in QUIET else "auto"
    with accelerate(built(name).pipe, forecaster, schedule=Schedule.every(3), of=of) as accelerated:
        for ours, theirs in zip(outputs(name), expected.output, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    summary = accelerated.summary()
    assert sum(done.skipped_steps for done in summary.values()) == expected.skipped > 0
    assert summary.data.skipped_steps == len(accelerated.plan("data").rows) > 0
    assert summary.data.full_steps == run.ticks - summary.data.skipped_steps
    why = "as the sampler adds noise" if name in NOISY else "as asked for"
    assert f"forecast: the data prediction, {why}" in str(summary)


@pytest.mark.parametrize("name", [name for name in NOISY if "kandinsky" not in name])  # whose output is the data
def test_outputs_are_another_thing_to_forecast(name):
    results = {}
    for of in ("output", "data"):
        with accelerate(built(name).pipe, Reuse(), schedule=Schedule.every(3), of=of) as run:
            results[of] = outputs(name)
    assert not all(torch.allclose(a, b, atol=1e-2) for a, b in zip(*results.values(), strict=True))
    assert run.streams == tuple(run.summary())


def test_no_denoiser_runs_on_a_skipped_step(name):
    with accelerate(built(name).pipe, Reuse(), schedule=Schedule.every(3)):
        run = watch(built(name).pipe, built(name).call)  # it sees the calls of forwards, which are below ours
    assert sum(map(len, run.calls)) == sum(map(len, plain(name).calls[::3])) > 0


def noise_of(name: str, sample, time):
    """Return what a denoiser that knows the data, 0.3 everywhere, makes of its input."""
    scheduler = built(name).pipe.scheduler
    if name == "flux stochastic":
        return (sample - 0.3) / time.flatten()[0]
    if hasattr(scheduler, "sigmas"):
        index = int((scheduler.timesteps == time.flatten()[0]).nonzero()[0])
        sigma = scheduler.sigmas[index]
        return (sample * (sigma**2 + 1) ** 0.5 - 0.3) / sigma
    kept = scheduler.alphas_cumprod[int(time.flatten()[0])]
    return (sample - 0.3 * kept**0.5) / (1 - kept) ** 0.5


@contextmanager
def knowing(name: str):
    """Let a pipeline's denoiser know the data."""

    def forward(original, *args, **kwargs):
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        sample = given.get("sample", given.get("hidden_states"))
        found = noise_of(name, sample, torch.as_tensor(given["timestep"]))
        output = original(*args, **kwargs)
        return (found,) if isinstance(output, tuple) else type(output)(sample=found)

    pipe = built(name).pipe
    with patched(getattr(pipe, "unet", None) or pipe.transformer, "forward", forward):
        yield


@pytest.mark.parametrize(
    "name",
    ["flux stochastic", "stable_diffusion_euler_ancestral_guided", "latent_consistency", "unconditional_ddpm"],
)
def test_data_that_is_known_comes_out_whatever_is_skipped(name):
    with knowing(name):
        expected = outputs(name)
        for schedule in (Schedule.at([0]), Schedule.every(2), Schedule.at([0, 4])):
            for forecaster in (Reuse(), Lagrange(1)):
                with accelerate(built(name).pipe, forecaster, schedule=schedule):
                    for ours, theirs in zip(outputs(name), expected, strict=True):
                        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def trained(name: str) -> L2P:
    transformer = built(name).pipe.transformer
    origin = Origin(
        model="tiny",
        transformer=type(transformer).__name__,
        config=configuration(transformer),
        tap=Tap(),
        grid=tuple(built(name).pipe.scheduler.sigmas.tolist()),
        schedule="every:3",
    )
    return L2P(origin)


def test_trained_rows_are_not_of_the_data():
    pipe = built("flux stochastic").pipe
    outputs("flux stochastic")  # its grid is set
    predictor = trained("flux stochastic")
    with accelerate(pipe, predictor) as run, pytest.raises(ValueError, match="is for samplers that add no noise, got"):
        outputs("flux stochastic")
    assert run.summary()["cond"].skipped_steps == 0
    with pytest.raises(ValueError, match=r"of='data' is for an untrained forecaster.* got the rows of a trained pred"):
        accelerate(pipe, predictor, of="data")


def test_what_cannot_be_is_refused_before_a_run():
    pipe, schedule = built("flux stochastic").pipe, Schedule.every(3)
    detours = {3: Detour(1.0, Schedule.every(2))}
    with pytest.raises(ValueError, match="one of auto, output, data, got of='velocity'"):
        accelerate(pipe, Reuse(), schedule=schedule, of="velocity")
    for words, more in (("a feature tap", dict(tap="norm")), ("detours", dict(detours=detours))):
        with pytest.raises(ValueError, match=f"got {words}; leave it out"):
            accelerate(pipe, Reuse(), schedule=schedule, of="data", **more)
    with pytest.raises(ValueError, match="a module alone, which has no sampler"):
        accelerate(pipe.transformer, Reuse(), schedule=schedule, of="data", grid=[1, 0.5, 0.25, 0])


def test_outputs_and_a_feature_tap_are_refused_under_noise_but_for_reuse():
    pipe, schedule = built("flux stochastic").pipe, Schedule.every(3)
    for more in (dict(of="output"), dict(tap=tap_of(pipe.transformer))):
        refused = pytest.raises(ValueError, match=r"samplers that add no noise, got a FlowMatchEuler.*of='auto'")
        with accelerate(pipe, Taylor(1), schedule=schedule, **more), refused:
            outputs("flux stochastic")
        with accelerate(pipe, Reuse(), schedule=schedule, **more) as run:
            outputs("flux stochastic")
        assert run.summary().data is None and "forecast:" not in str(run.summary())


@pytest.mark.parametrize(
    ("name", "of", "why"),
    [
        ("stable_cascade_prior_guided", "auto", "as the sampler adds noise"),
        ("ltx_condition_guided", "data", "as asked for"),
    ],
)
def test_a_sampler_that_does_not_say_its_levels_is_named(name, of, why):
    words = f"the data prediction is forecast, {why}, where the sampler says .*, got a .*Scheduler, and .*of='output'"
    every = Schedule.every(3)
    with accelerate(built(name).pipe, Taylor(1), schedule=every, of=of), pytest.raises(ValueError, match=words):
        outputs(name)
    with accelerate(built(name).pipe, Reuse(), schedule=Schedule.every(3), of="output") as run:
        outputs(name)
    assert sum(done.skipped_steps for done in run.summary().values()) > 0
    with accelerate(built(name).pipe, Taylor(1), schedule=Schedule.every(1), of=of):
        assert all(torch.equal(a, b) for a, b in zip(outputs(name), plain(name).output, strict=True))


def levels(of_latents, of_output) -> Levels:
    numbers = [torch.tensor(x, dtype=torch.float64) for x in (of_latents, of_output)]
    return Levels(torch.zeros(len(of_latents) + 1), torch.ones(len(of_latents) + 1), *numbers)


@pytest.mark.parametrize(
    ("of_output", "ticks", "full", "begin"),
    [
        ([-1.0, -0.5, -0.2], 3, [], 0),
        ([-float("inf"), -0.5, -0.2], 3, [0], 1),  # noise alone says nothing of the data
        ([-1.0, -0.5, 0.0], 3, [2], 0),  # and data nothing of the noise
        ([-1.0, 0.0, -0.2], 3, [1], 0),
        ([-1.0, -0.5], 3, [2], 0),  # the end is not known
        ([-1.0, -0.5, float("nan"), -0.2, float("nan")], 5, [2, 4], 3),
        ([float("nan")] * 2, 2, [0, 1], 0),
    ],
)
def test_steps_whose_outputs_do_not_follow_from_the_data_are_full(of_output, ticks, full, begin):
    run = DataRun()
    run.add(0, levels([1.0] * len(of_output), of_output))
    assert run.must_run(ticks) == full and run.begin(ticks) == begin
    run.add(0, levels([1.0] * 5, [-1.0] * 5))  # a second part of each step
    assert run.must_run(ticks) == full and run.begin(ticks) == begin


def test_a_run_begins_to_forecast_where_its_outputs_say_something(monkeypatch):
    """The first of six steps says nothing of the data, the last but one cannot be turned back."""
    name, read = "flux stochastic", of_levels

    def odd(*args, **kwargs):
        found = read(*args, **kwargs)
        numbers = found.of_output.clone()
        numbers[0], numbers[4] = -float("inf"), 0.0
        return replace(found, of_output=numbers)

    monkeypatch.setattr("lesa.host.data._known", {})
    monkeypatch.setattr("lesa.host.data.levels.of", odd)
    with accelerate(built(name).pipe, Reuse(), schedule=Schedule.at([0]), of="data") as run:
        assert all(x.isfinite().all() for x in outputs(name))
    assert run.plan("data").full == (1, 4) and run.plan().full == (0, 1, 4)
    assert run.summary()["cond"].skipped_steps == run.summary().data.skipped_steps == 3
    assert run.summary()["cond"].full_steps == run.summary().data.full_steps == 3


def test_a_sampler_is_looked_at_once_for_all_pipelines_that_use_it(monkeypatch):
    name, read, looked = "flux stochastic", of_levels, []
    monkeypatch.setattr("lesa.host.data._known", {})
    monkeypatch.setattr("lesa.host.data.levels.of", lambda *args, **kwargs: looked.append(1) or read(*args, **kwargs))
    for _ in range(2):
        with accelerate(built(name).pipe, Reuse(), schedule=Schedule.every(2), of="data"):
            outputs(name)
    assert looked == [1]
