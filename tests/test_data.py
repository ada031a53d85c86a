"""Under samplers that add noise the data prediction is forecast, as an oracle says that knows nothing of lesa."""

import copy
import inspect
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from zoo.oracle import Oracle, Run, extrapolate, patched, reuse, tensors, watch
from zoo.pipelines import ZOO, Specimen

from lesa.host.runtime import accelerate
from lesa.predictors.predictor import Predictor
from lesa.rows.forecasters import Lagrange, LinearRows, PlannedRow, Reuse, Taylor
from lesa.rows.schedule import Schedule

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
NOISY = (
    *("stable_diffusion_euler_ancestral_guided", "cogvideox_dpm_guided", "cogvideox_i2v_guided", "latent_consistency"),
    *("unconditional_ddpm", "hunyuan_dit_guided", "sana_sprint", "sana_sprint_img2img", "stable_audio3_stochastic"),
    *("allegro_guided", "kandinsky22_prior_guided", "flux stochastic"),
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


@pytest.mark.parametrize(("forecaster", "rows"), [(Reuse(), reuse), (Taylor(1), extrapolate)], ids=repr)
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
    why = "as the sampler adds noise" if name in NOISY else "as asked for"
    assert f"forecast: the data prediction, {why}" in str(summary)
