"""A pipeline that no table knows: a class, a loop and names of its own, calls without prompts."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UniPCMultistepScheduler
from zoo.parts import redraw

import lesa
from lesa.predictors.shelf import Shelf


class Own(DiffusionPipeline):
    def __init__(self, model, scheduler):
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, label, steps=12, generator=None):
        latents = torch.randn(1, 4, 8, 8, generator=generator)
        self.scheduler.set_timesteps(steps)
        for time in self.scheduler.timesteps:
            output = self.model(latents, timestep=time.expand(1), class_labels=torch.tensor([label])).sample
            latents = self.scheduler.step(output, time, latents).prev_sample
        return SimpleNamespace(latents=latents)


@pytest.fixture
def own():
    small = dict(num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8, num_embeds_ada_norm=11)
    model = DiTTransformer2DModel(in_channels=4, out_channels=4, norm_type="ada_norm_zero", **small)
    return Own(redraw(model.eval()), UniPCMultistepScheduler())


def draw(pipe) -> torch.Tensor:
    return pipe(3, generator=torch.Generator().manual_seed(0)).latents


def test_a_denoiser_under_a_name_of_its_own_has_to_be_named(own):
    for work in (lesa.accelerate, lambda pipe: lesa.calibrate(pipe, [dict(label=1)], budget=4)):
        with pytest.raises(ValueError, match=r"the modules model, none of .*pipe.denoisers = \('model',\)"):
            work(own)
    own.denoisers = ("model", "other")
    with pytest.raises(ValueError, match="got a Own without other; name them"):
        lesa.accelerate(own)


@pytest.mark.parametrize("named", [("model",), "model"])
def test_once_it_is_named_all_functions_know_it(own, named, tmp_path):
    own.denoisers = named
    shelf, options = Shelf(tmp_path), lesa.CalibrateOptions(refine=0, most=2, progress=False)
    made = lesa.calibrate(own, [dict(label=k) for k in range(3)], budget=4, options=options, shelf=shelf)
    full, calls = draw(own), []
    hook = own.model.register_forward_hook(lambda *_: calls.append(1))
    with lesa.accelerate(own, made) as run:
        fast = draw(own)
    hook.remove()
    assert len(calls) == 4 and run.summary()["cond"].skipped_steps == 8
    assert 0 < float((fast - full).norm() / full.norm()) < 0.1
