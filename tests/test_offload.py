"""Pipelines whose weights are elsewhere run, record, train and are named as those whose weights are here."""

import copy

import accelerate
import diffusers
import pytest
import torch
from torch import nn

import lesa
from lesa.host import offload
from lesa.host.head import head
from lesa.host.offload import place
from lesa.host.tap import tap_of
from lesa.learn.collect import record
from lesa.predictors.fingerprint import pipeline_fingerprint

CALL = dict(height=32, width=32, num_inference_steps=4, max_sequence_length=16)
PLACES = ("feature", "output", "feature")


def bring_layers(pipe) -> None:
    """Offload a transformer layer by layer, to the CPU, for which accelerate needs parameters in its map."""
    weights = {name: nn.Parameter(x.clone()) for name, x in pipe.transformer.state_dict().items()}
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"), state_dict=weights)
    offload._keep_head(pipe.transformer, "cpu")


WAYS = {"model": lambda pipe: place(pipe, "cpu", "model"), "group": lambda pipe: place(pipe, "cpu", "group")}
WAYS["layer by layer"] = bring_layers
if not offload.groups_layers():
    del WAYS["group"]


def drawn(pipe) -> list[torch.Tensor]:
    """What two calls give at each tap, since the first call's end may undo what the second needs."""
    latents = []
    for where in PLACES:
        with lesa.accelerate(pipe, lesa.Taylor(1), schedule=lesa.Schedule.every(2), tap=where) as run:
            for seed in range(2):
                generator = torch.Generator().manual_seed(seed)
                latents.append(pipe("small red apple", generator=generator, output_type="latent", **CALL).images)
        assert run.summary()["cond"].full_steps == 4
    return latents


@pytest.fixture(scope="module")
def whole(tiny_flux):
    return drawn(tiny_flux), pipeline_fingerprint(tiny_flux)


@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_pipeline_is_the_same(way, tiny_flux, whole):
    pipe = copy.deepcopy(tiny_flux)
    WAYS[way](pipe)
    assert pipeline_fingerprint(pipe) == whole[1]
    for ours, wanted in zip(drawn(pipe), whole[0], strict=True):
        assert torch.equal(ours, wanted)
    assert pipeline_fingerprint(pipe) == whole[1]
    (run,) = record(pipe, ["small red apple"], [0], torch.arange(4), **CALL)
    features = run.features["cond"].clone().requires_grad_()
    outputs = head(pipe.transformer, tap_of(pipe.transformer))(features, run.conditioning["cond"])
    outputs.sum().backward()
    torch.testing.assert_close(outputs, run.outputs["cond"])
    assert features.grad.abs().max() > 0


def test_layer_by_layer_all_but_the_head_is_elsewhere(tiny_flux):
    pipe = copy.deepcopy(tiny_flux)
    bring_layers(pipe)
    here = {name for name, x in pipe.transformer.named_parameters() if not x.is_meta}
    assert here == {f"{name}.{x}" for name in ("norm_out.linear", "proj_out") for x in ("weight", "bias")}
    changed = copy.deepcopy(tiny_flux)
    changed.transformer.x_embedder.weight.data.add_(1.0)
    bring_layers(changed)
    assert pipeline_fingerprint(changed) != pipeline_fingerprint(pipe)


def test_other_ways_are_refused(tiny_flux):
    with pytest.raises(ValueError, match=r"none, model, sequential, group, got 'disk'"):
        place(tiny_flux, "cpu", "disk")
    with pytest.raises(ValueError, match="another device than the CPU"):
        place(tiny_flux, "cpu", "sequential")


def test_an_older_diffusers_groups_layers_for_an_accelerator_alone(tiny_flux, monkeypatch):
    monkeypatch.setattr(diffusers, "__version__", "0.40.0")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"before 0\.41 diffusers brings groups .* take 'model'"):
        place(tiny_flux, "cpu", "group")
    for version, found in (("0.40.0", True), ("0.41.0", False), ("0.42.1", False)):
        monkeypatch.setattr(diffusers, "__version__", version)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda found=found: found)
        assert offload.groups_layers()
