"""The nodes in a real ComfyUI: its own model classes, samplers and nodes, on the CPU.

Skipped unless COMFYUI_PATH says where one is, and this Python has what it needs. integrations/comfyui/README.md says
which commit this was last run with.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import comfyui_models as models
import pytest
import torch
from torch import Tensor

import lesa
from lesa.host.outside import FULL, Asked
from lesa.learn.metrics import psnr
from lesa.rows.forecasters import Lagrange, Reuse
from lesa.rows.schedule import Schedule

pytestmark = pytest.mark.skipif(bool(models.why_not()), reason=models.why_not())
THIRD = Asked(forecaster=Lagrange(1), schedule=Schedule.every(3))
EVERY = Asked(forecaster=Reuse(), schedule=Schedule.every(1))
FIVE = ("euler", "heun", "dpmpp_2m", "uni_pc", "lms")
STOP = "stop with the reason"


@pytest.fixture(autouse=True, scope="module")
def _comfyui() -> None:
    models.load()


@pytest.fixture(autouse=True)
def _shelf(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LESA_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def flux() -> Any:
    return models.tiny_flux()


@pytest.fixture(scope="module")
def emoji() -> Any:
    pipe = lesa.load(models.ROOT / "models" / "emoji-flux")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampling() -> Any:
    return models.nodes().sampling


def accelerated(model: Any, asked: Asked = THIRD) -> Any:
    return sampling().accelerated(model, asked)


def latent_for(model: Any, size: int = 8, batch: int = 1) -> dict:
    latents = model.model.latent_format
    frames = () if latents.latent_dimensions == 2 else (1,)
    return {"samples": torch.zeros(batch, latents.latent_channels, *frames, size, size)}


def sample(
    model: Any,
    sampler: str = "euler",
    steps: int = 12,
    cfg: float = 1.0,
    positive: Any = None,
    negative: Any = None,
    **options: Any,
) -> Tensor:
    """Run ComfyUI's node KSampler."""
    import nodes

    positive, negative = positive or models.conditioning(1), negative or models.conditioning(2)
    given = options.pop("latent", latent_for(model))
    run = nodes.KSampler().sample
    return run(model, 7, steps, cfg, sampler, "simple", positive, negative, given, **options)[0]["samples"]


@contextmanager
def counted(model: Any) -> Iterator[Callable[[], int]]:
    """Count the calls of the diffusion model itself, of which a batch of conditions is one."""
    calls = 0

    def count(_module: Any, _args: Any) -> None:
        nonlocal calls
        calls += 1

    hook = model.model.diffusion_model.register_forward_pre_hook(count)
    try:
        yield lambda: calls
    finally:
        hook.remove()


def newest(model: Any) -> Any:
    return sampling().of(model).newest


# --- emoji-flux as in diffusers


@pytest.fixture(scope="module")
def drawn(emoji: Any) -> Any:
    """The prompt, noise and sigmas of a run of the pipeline, and ComfyUI's own FLUX with its weights."""
    prompt = "small red apple on blue, left"
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    packed = emoji._pack_latents(noise, 1, 4, 16, 16)

    def draw() -> Tensor:
        latents = emoji(prompt, latents=packed.clone(), output_type="latent").images
        return emoji._unpack_latents(latents, 64, 64, emoji.vae_scale_factor)

    full = draw()
    return models.flux(emoji), models.encoded(emoji, prompt), noise, emoji.scheduler.sigmas.clone(), draw, full


def custom(model: Any, conditioning: Any, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Run ComfyUI's node SamplerCustomAdvanced, on noise that is given."""
    from comfy_extras.nodes_custom_sampler import BasicGuider, KSamplerSelect, SamplerCustomAdvanced

    class Noise:
        seed = 0

        def generate_noise(self, _latent: dict) -> Tensor:
            return noise.clone()

    (guider,), (sampler,) = BasicGuider().get_guider(model, conditioning), KSamplerSelect().get_sampler("euler")
    given = {"samples": torch.zeros_like(noise)}
    return SamplerCustomAdvanced().sample(Noise(), guider, sampler, sigmas, given)[0]["samples"]


@pytest.mark.parametrize("budget", [10, 6])
def test_pictures_are_those_that_lesa_draws_through_diffusers(emoji: Any, drawn: Any, budget: int):
    model, conditioning, noise, sigmas, draw, full = drawn
    folder = models.ROOT / "models" / "emoji-flux" / "lesa" / "lesa-many"
    with lesa.accelerate(emoji, lesa.Predictor.from_pretrained(folder), budget=budget):
        wanted = draw()
    node = models.nodes().NODE_CLASS_MAPPINGS["LESAAccelerate"]()
    (fast,) = node.accelerate(model, models.nodes().nodes.FOLDER, budget, "", STOP, str(folder))

    in_full = custom(model, conditioning, noise, sigmas)
    with counted(model) as calls:
        found = custom(fast, conditioning, noise, sigmas)

    decoder = models.Decoder(emoji)
    pictures = [(decoder.decode(x)[0] * 255).round().byte().numpy() for x in (in_full, full, found, wanted)]
    assert psnr(*pictures[:2]) >= 50 and psnr(*pictures[2:]) >= 50
    assert float((found - wanted).norm() / wanted.norm()) < 1e-4 < float((found - in_full).norm() / in_full.norm())
    assert calls() == budget


# --- every sampler


def samplers() -> tuple[str, ...]:
    if models.why_not():
        return FIVE
    models.load()
    from comfy.samplers import KSampler

    return tuple(KSampler.SAMPLERS)


@pytest.mark.parametrize("sampler", samplers())
def test_with_every_step_full_a_sampling_is_what_it_was(flux: Any, sampler: str):
    fast, wanted = accelerated(flux, EVERY), sample(flux, sampler, 5, 2.0)
    if sampler == "dpm_adaptive":
        with pytest.raises(ValueError, match="chooses them as it goes"):
            sample(fast, sampler, 5, 2.0)
        return
    assert torch.equal(sample(fast, sampler, 5, 2.0), wanted)
    assert newest(fast).summary()["cond"].skipped_steps == 0


@pytest.mark.parametrize("sampler", [name for name in samplers() if name != "dpm_adaptive"])
def test_on_skipped_steps_the_model_does_not_run(flux: Any, sampler: str):
    fast = accelerated(flux)
    with counted(flux) as calls:
        sample(fast, sampler, 12, 2.0)
    done = newest(fast).summary()
    assert calls() == done["cond"].full_steps == done["uncond"].full_steps < newest(fast).steps
    assert done["cond"].full_steps + done["cond"].skipped_steps == newest(fast).steps >= 11


@pytest.mark.parametrize("sampler", FIVE)
def test_what_is_forecast_is_near_and_nearer_with_more_full_steps(flux: Any, sampler: str):
    wanted = sample(flux, sampler, 24, 2.0)
    off = []
    for interval in (6, 2):
        fast = accelerated(flux, Asked(forecaster=Lagrange(1), schedule=Schedule.every(interval)))
        off.append(float((sample(fast, sampler, 24, 2.0) - wanted).norm() / wanted.norm()))
    assert 0 < off[1] < off[0] < 0.2


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde", "lcm"])
def test_where_noise_is_added_the_data_prediction_is_forecast(flux: Any, sampler: str):
    fast = accelerated(flux, Asked())
    with pytest.warns(UserWarning, match="no predictor was made"):
        sample(fast, sampler, 20)
    assert newest(fast).course.noise
    assert "data prediction" in models.nodes().nodes.report_of(fast)


KINDS = ["flux", "wan", "qwen", "lumina", "z_image", "ltx", "unet", "sdxl", "fp8"]
MORE = {name: {"attention_mask": torch.ones(1, 6, dtype=torch.int64)} for name in ("lumina", "ltx")}
"""What the text encoders of a class say besides."""


@pytest.mark.parametrize("kind", KINDS)
def test_model_classes(kind: str):
    check(getattr(models, f"tiny_{kind}")(), **MORE.get(kind, {}))


@pytest.mark.parametrize("loader", ["loaded_fp8", "loaded_gguf"])
def test_weights_in_other_dtypes_as_loaders_give_them(loader: str, tmp_path: Path):
    model = getattr(models, loader)(tmp_path)
    assert not all(x.dtype.is_floating_point and x.itemsize > 1 for x in model.model.diffusion_model.parameters())
    check(model, width=64)


def check(model: Any, width: int = 16, **more: Any) -> None:
    """All full a sampling equals the plain one to the bit, forecasts skip what they say, and a calibration is found."""
    texts = {name: models.conditioning(k, width, **more) for k, name in enumerate(("positive", "negative"), 1)}
    wanted = sample(model, steps=10, cfg=2.0, **texts)
    assert wanted.isfinite().all() and float(wanted.std()) > 0
    assert torch.equal(sample(accelerated(model, EVERY), steps=10, cfg=2.0, **texts), wanted)
    fast = accelerated(model)
    with counted(model) as calls:
        found = sample(fast, steps=10, cfg=2.0, **texts)
    assert calls() == 4 and found.shape == wanted.shape and not torch.equal(found, wanted)

    out = calibrated(model, 2.0, steps=5, budgets="2", runs=2, search=1, **texts)
    (fast,) = models.nodes().nodes.Accelerate().accelerate(model, models.nodes().nodes.CALIBRATED, 0, "", STOP)
    with counted(model) as calls:
        sample(fast, steps=5, cfg=2.0, **texts)
    assert calls() == 2 and "2 full steps" in out["result"][2]


def test_v_prediction_is_forecast_as_a_derivative():
    model = models.tiny_unet(v_prediction=True)
    wanted = sample(model, "euler", 10, 2.0)
    assert torch.equal(sample(accelerated(model, EVERY), "euler", 10, 2.0), wanted)
    assert sample(accelerated(model), "euler", 10, 2.0).isfinite().all()


# --- conditions


def test_conditions_in_one_batch_and_apart(flux: Any, monkeypatch: pytest.MonkeyPatch):
    together = sample(accelerated(flux), cfg=3.0)
    with counted(flux) as calls:
        sample(accelerated(flux), cfg=3.0)
        assert calls() == 4
    monkeypatch.setattr(flux.model, "memory_required", lambda *_a, **_k: float("inf"))
    fast, every = accelerated(flux), accelerated(flux, EVERY)
    with counted(flux) as calls:
        apart = sample(fast, cfg=3.0)
        assert calls() == 8
    assert newest(fast).summary()["uncond"].full_steps == 4
    assert torch.allclose(apart, together, atol=1e-4)
    assert torch.equal(sample(every, cfg=3.0), sample(flux, cfg=3.0))


def test_a_condition_that_begins_within_the_run_begins_with_a_full_step(flux: Any):
    import node_helpers

    late = node_helpers.conditioning_set_values(models.conditioning(5), {"start_percent": 0.5, "end_percent": 1.0})
    fast = accelerated(flux, Asked(forecaster=Reuse(), schedule=Schedule.at([0])))
    with counted(flux) as calls:
        sample(fast, positive=models.conditioning(1) + late)
    assert calls() == 2  # the first step, and the one at which the condition begins
    done = newest(fast).summary()
    assert done["cond"].full_steps == 2


def test_areas_and_batches(flux: Any):
    import node_helpers

    area = node_helpers.conditioning_set_values(models.conditioning(5), {"area": (4, 4, 0, 0), "strength": 0.7})
    given = dict(positive=models.conditioning(1) + area, cfg=2.0, latent=latent_for(flux, batch=3))
    assert torch.equal(sample(accelerated(flux, EVERY), **given), sample(flux, **given))
    fast = accelerated(flux)
    found = sample(fast, **given)
    assert found.shape[0] == 3 and newest(fast).summary()["cond"].full_steps == 4


def test_masks(flux: Any):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., :32] = 1
    given = dict(latent={"samples": torch.randn(1, 4, 8, 8), "noise_mask": mask})
    assert torch.equal(sample(accelerated(flux, EVERY), **given), sample(flux, **given))
    kept = sample(accelerated(flux), **given)[..., 4:]
    assert torch.allclose(kept, given["latent"]["samples"][..., 4:], atol=1e-4)


def two_models(first: Any, second: Any, steps: int, boundary: int) -> dict:
    """Sample with a model for much and one for little noise, as workflows of Wan 2.2 do."""
    import nodes

    given = models.conditioning(1), models.conditioning(2)
    half, begin, end = nodes.KSamplerAdvanced().sample, (0, boundary), (boundary, steps)
    how = 7, steps, 2.0, "euler", "simple", *given
    (latent,) = half(first, "enable", *how, latent_for(first), *begin, "enable")
    return half(second, "disable", *how, latent, *end, "disable")[0]


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_two_models_each_walk_a_part_of_the_steps(kind: str):
    make = getattr(models, f"tiny_{kind}")
    high, low = make(), make(seed=1)
    with counted(high) as mine, counted(low) as its:
        found = two_models(accelerated(high), accelerated(low), 20, 8)["samples"]
        assert (mine(), its()) == (3, 4) and found.isfinite().all()
    in_full = two_models(high, low, 20, 8)["samples"]
    assert torch.equal(two_models(accelerated(high, EVERY), accelerated(low, EVERY), 20, 8)["samples"], in_full)


def test_two_models_are_calibrated_on_their_parts_of_the_steps():
    high, low = models.tiny_wan(), models.tiny_wan(seed=1)
    sigmas, wanted = sigmas_of(high, 10), two_models(high, low, 10, 5)
    calibrated(high, 2.0, sigmas=sigmas[:6], budgets="2", runs=2, search=1)
    calibrated(low, 2.0, sigmas=sigmas[5:], latent=wanted, budgets="3", runs=2, search=1)
    nodes = models.nodes().nodes
    fast = [nodes.Accelerate().accelerate(one, nodes.CALIBRATED, 0, "", STOP)[0] for one in (high, low)]
    with counted(high) as mine, counted(low) as its:
        found = two_models(*fast, 10, 5)["samples"]
    assert (mine(), its()) == (2, 3)
    assert 0 < float((found - wanted["samples"]).norm() / wanted["samples"].norm()) < 0.1


class Control:
    """A ControlNet that always says the same: FLUX takes residuals of its double blocks."""

    def __new__(cls) -> Any:
        import comfy.controlnet

        class Constant(comfy.controlnet.ControlBase):
            calls = 0

            def get_control(self, x: Tensor, *_args: Any) -> dict:
                self.calls += 1
                return {"input": [torch.linspace(-1, 1, 32).square().expand(len(x), 16, 32)], "output": []}

            def get_models(self) -> list:
                return []

        return Constant()


def test_controlnets_run_on_full_steps_only(flux: Any):
    import node_helpers

    control = Control()
    positive = node_helpers.conditioning_set_values(
        models.conditioning(1), {"control": control, "control_apply_to_uncond": False}
    )
    wanted = sample(flux, positive=positive)
    assert not torch.allclose(wanted, sample(flux))
    assert torch.equal(sample(accelerated(flux, EVERY), positive=positive), wanted)
    control.calls = 0
    sample(accelerated(flux), positive=positive)
    assert control.calls == 4


# --- patches, other runs, interruption


def with_patch(model: Any, strength: float) -> Any:
    """Return a clone with a LoRA on its attention."""
    import comfy.weight_adapter

    random = torch.Generator().manual_seed(9)
    up, down = torch.randn(96, 2, generator=random), torch.randn(2, 32, generator=random)
    name = "diffusion_model.double_blocks.0.img_attn.qkv.weight"
    lora = comfy.weight_adapter.LoRAAdapter(set(), (up, down, 2.0, None, None, None))
    clone = model.clone()
    assert clone.add_patches({name: lora}, strength) == [name]
    return clone


def test_loras(flux: Any):
    patched = with_patch(flux, 0.5)
    wanted = sample(patched)
    assert not torch.allclose(wanted, sample(flux))
    assert torch.equal(sample(accelerated(patched, EVERY)), wanted)
    fast = accelerated(patched)
    with counted(flux) as calls:
        sample(fast)
    assert calls() == 4


def test_weights_are_told_apart_loaded_or_not(flux: Any):
    import comfy.model_management

    weights_of = sampling().weights_of
    patched = with_patch(flux, 0.5)
    before = weights_of(flux), weights_of(patched), weights_of(with_patch(flux, 0.25)), weights_of(models.tiny_flux(1))
    assert len(set(before)) == 4
    comfy.model_management.load_models_gpu([patched], force_full_load=True)
    assert patched.backup
    assert (weights_of(patched), weights_of(flux)) == (before[1], before[0])
    comfy.model_management.unload_all_models()
    assert weights_of(patched) == before[1]
    assert weights_of(models.tiny_flux()) == before[0]


def test_workflows_side_by_side_do_not_mix(flux: Any):
    one, other = accelerated(flux), accelerated(flux, Asked(forecaster=Reuse(), schedule=Schedule.every(4)))
    alone = sample(one), sample(other, "heun", cfg=2.0), sample(flux)
    again = sample(one), sample(other, "heun", cfg=2.0), sample(flux)
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))
    assert flux.wrappers.get("sampler_sample", {}) == {}


def test_two_threads_do_not_mix(flux: Any):
    other = models.tiny_flux(seed=1)
    fast = accelerated(flux), accelerated(other)
    wanted = [sample(model) for model in fast]
    found: dict[int, Tensor] = {}
    noises = [torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)]

    def run(k: int, into: dict[int, Tensor]) -> None:
        sigmas = torch.linspace(1, 0, 21)
        into[k] = custom(fast[k], models.conditioning(k), noises[k], sigmas)

    alone: dict[int, Tensor] = {}
    for k in range(2):
        run(k, alone)
    threads = [threading.Thread(target=run, args=(k, found)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wanted) == 2 and all(torch.equal(found[k], alone[k]) for k in range(2))


def test_after_an_interruption_the_next_prompt_is_as_ever(flux: Any, monkeypatch: pytest.MonkeyPatch):
    import comfy.model_management
    import comfy.sample
    import comfy.samplers

    fast = accelerated(flux)
    wanted, plain = sample(fast), sample(flux)
    steps = []

    def stop(step: int, *_args: Any) -> None:
        steps.append(step)
        if step == 5:
            raise comfy.model_management.InterruptProcessingException

    noise = torch.randn(1, 4, 8, 8)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        comfy.sample.sample_custom(
            fast,
            noise,
            1.0,
            comfy.samplers.sampler_object("euler"),
            torch.linspace(1, 0, 13),
            models.conditioning(1),
            models.conditioning(2),
            torch.zeros_like(noise),
            callback=stop,
            disable_pbar=True,
        )
    assert steps == [*range(6)]
    assert torch.equal(sample(fast), wanted) and torch.equal(sample(flux), plain)
    assert not flux.model_options["transformer_options"].get("wrappers")


def test_other_nodes_still_see_every_step(flux: Any):
    """A guidance function of another node is called on skipped steps, too, with forecasts."""
    seen: list[float] = []

    def guide(args: dict) -> Tensor:
        seen.append(float(args["sigma"][0]))
        return args["cond"] * 2 - args["uncond"]

    model = flux.clone()
    model.set_model_sampler_cfg_function(guide)
    fast = accelerated(model)
    sample(fast, cfg=2.0)
    assert len(seen) == 12


def test_a_model_is_accelerated_once(flux: Any):
    with pytest.raises(ValueError, match="accelerated once"):
        accelerated(accelerated(flux))
    sample(accelerated(flux).clone())


def test_context_windows_are_refused(flux: Any):
    model = flux.clone()

    class Windows:
        def should_use_context(self, *_args: Any) -> bool:
            return False

    model.model_options["context_handler"] = Windows()
    with pytest.raises(ValueError, match="context windows"):
        sample(accelerated(model))


# --- calibrate


def calibrated(model: Any, cfg: float = 1.0, sampler: str = "euler", steps: int = 10, **options: Any) -> dict:
    import comfy.samplers

    node = models.nodes().NODE_CLASS_MAPPINGS["LESACalibrate"]()
    given = dict(budgets="4", runs=4, seeds=0, search=2, at_once=2) | options
    return node.calibrate(
        model,
        given.pop("positive", models.conditioning(1)),
        given.pop("negative", models.conditioning(2)),
        cfg,
        comfy.samplers.sampler_object(sampler),
        given.pop("sigmas", sigmas_of(model, steps)),
        given.pop("latent", latent_for(model)),
        **given,
    )


def sigmas_of(model: Any, steps: int) -> Tensor:
    import comfy.samplers

    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", steps)


NOISY = [("euler_ancestral", 1.0), ("dpmpp_2m_sde", 2.0), ("lcm", 1.0)]
"""They add noise: rows combine data predictions."""


@pytest.mark.parametrize(("sampler", "cfg"), [("euler", 1.0), ("euler", 3.0), ("dpmpp_2m", 2.0), ("heun", 1.0), *NOISY])
def test_what_is_calibrated_is_found_and_keeps_its_promise(flux: Any, sampler: str, cfg: float):
    out = calibrated(flux, cfg, sampler, positive_2=models.conditioning(3))
    nodes = models.nodes().nodes
    (fast,) = nodes.Accelerate().accelerate(flux, nodes.CALIBRATED, 0, "", STOP)
    with counted(flux) as calls:
        found = sample(fast, sampler, 10, cfg)
    assert calls() == 4 and found.isfinite().all()
    report = nodes.Report().report(fast, {"samples": found})["result"][1]
    assert "4 full" in report and "calibrated:" in report and "promised" in report
    promised = sampling().of(out["result"][0]).asked
    assert promised.budget == 4
    (made,) = promised.shelf.all()
    checked = made.table["curve"]["points"][0]["tried"]
    best = min(checked, key=lambda one: sum(one["drift"]))
    measured = float(out["result"][2].rsplit("drift", 1)[1].split()[0])
    assert abs(measured - best["drift"][0]) < 0.1  # the sampler itself ends where its numbers said


def test_other_samplings_than_those_calibrated_are_refused(flux: Any):
    calibrated(flux, 3.0)
    nodes = models.nodes().nodes
    (fast,) = nodes.Accelerate().accelerate(flux, nodes.CALIBRATED, 0, "", STOP)
    for change, why in (
        (dict(cfg=5.0), "guidance of 5 : -4"),
        (dict(steps=11), "11 steps instead of 10"),
        (dict(sampler="dpmpp_2m"), "a sample_dpmpp_2m instead of a sample_euler"),
        (dict(sampler="euler_ancestral"), "adds noise"),
    ):
        with counted(flux) as calls, pytest.raises(ValueError, match=why):
            sample(fast, **{**dict(steps=10, cfg=3.0), **change})
        assert calls() == 1  # before anything is skipped
    (fast,) = nodes.Accelerate().accelerate(flux, nodes.CALIBRATED, 0, "", "run every step in full")
    assert torch.equal(sample(fast, steps=11, cfg=3.0), sample(flux, steps=11, cfg=3.0))
    assert newest(fast).summary().fallbacks == 1 and sampling().of(fast).asked.fallback == FULL


def test_samplers_that_rows_are_not_solved_for_are_refused(flux: Any):
    with pytest.raises(ValueError, match="looks at these apart"):
        calibrated(flux, sampler="euler_cfg_pp")


def test_a_calibration_of_a_guided_unet():
    out = calibrated(models.tiny_unet(), 2.0, budgets="5")
    assert "5 full steps" in out["result"][2]


def test_an_interrupted_calibration_goes_on(flux: Any, monkeypatch: pytest.MonkeyPatch):
    import comfy.model_management

    from lesa.learn.solve import Solver

    given = dict(steps=6, budgets="4, 3", runs=2, search=1)
    solved, solve, interrupted = [], Solver.solve, comfy.model_management.InterruptProcessingException

    def noted(solver: Any, budget: int, **options: Any) -> Any:
        solved.append(budget)
        return solve(solver, budget, **options)

    def stop(_point: Any) -> str:
        raise interrupted

    monkeypatch.setattr(Solver, "solve", noted)
    with monkeypatch.context() as patched, pytest.raises(interrupted):
        patched.setattr(models.nodes().nodes, "say", stop)
        calibrated(flux, **given)
    report = calibrated(flux, **given)["result"][2]
    assert solved == [4, 3] and "4 full steps" in report and "3 full steps" in report
    sample(flux)


def test_a_calibration_shows_its_progress_and_can_be_interrupted(flux: Any, monkeypatch: pytest.MonkeyPatch):
    import comfy.model_management
    import comfy.utils

    seen: list[tuple[int, int]] = []

    def show(done: int, total: int, *_args: Any, **_kwargs: Any) -> None:
        seen.append((done, total))
        if len(seen) == 2:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", show)
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0.0, raising=False)
    wanted = dict(steps=5, budgets="2", runs=2, search=1)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        calibrated(flux, **wanted)
    assert len(seen) == 2 and 0 < seen[0][0] < seen[1][0] < seen[1][1]
    assert "2 full steps" in calibrated(flux, **wanted)["result"][2]
    done = [one for one, _ in seen[2:]]
    assert done == sorted(done) and seen[-1][0] == seen[-1][1] == seen[0][1]
