"""benchmarks/offload.py: what offloading's hooks bring over is what runs, and a skipped step brings nothing."""

import copy
import importlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate import hooks

import lesa
from lesa.host import offload

CALL = dict(height=32, width=32, num_inference_steps=6, max_sequence_length=16, output_type="latent")
HALF = lesa.Schedule.every(2)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    return importlib.import_module("offload")


def brought(script, pipe, tap: str | None = None) -> Counter[str]:
    """What two calls bring over each, which is the same."""
    found = []
    for _ in range(2):
        with script.counted(pipe) as counts:
            if tap:
                with lesa.accelerate(pipe, lesa.Taylor(1), schedule=HALF, tap=tap):
                    pipe("a red apple", generator=torch.Generator().manual_seed(0), **CALL)
            else:
                pipe("a red apple", generator=torch.Generator().manual_seed(0), **CALL)
        found.append(counts)
    assert found[0] == found[1]
    return found[0]


@pytest.mark.parametrize("way", ["model", "sequential", "group"])
def test_a_run_brings_what_its_steps_need(way, script, tiny_flux):
    if way == "group" and not offload.groups_layers():
        pytest.skip("diffusers groups layers for accelerators alone")
    pipe = copy.deepcopy(tiny_flux)
    script.bring(pipe, way, "cpu")
    weights = sum(p.nbytes for p in tiny_flux.transformer.parameters())
    full, few, within = (brought(script, pipe, tap) for tap in (None, "output", "feature"))
    if way == "model":  # it stays for the whole run
        assert full["transformer"] == few["transformer"] == within["transformer"] == weights
    else:
        assert full["transformer"] == 6 * weights and few["transformer"] == 3 * weights
        assert 3 * weights < within["transformer"] < 6 * weights
    others = [{name: count for name, count in one.items() if name != "transformer"} for one in (full, few)]
    assert others[0] == others[1] and set(others[0]) >= {"text_encoder", "text_encoder_2"}


def test_hooks_are_left_as_they_were(script, tiny_flux):
    before = hooks.set_module_tensor_to_device, hooks.CpuOffload.pre_forward, hooks.CpuOffload.init_hook
    with script.counted(tiny_flux):
        assert hooks.CpuOffload.pre_forward is not before[1]
    assert before == (hooks.set_module_tensor_to_device, hooks.CpuOffload.pre_forward, hooks.CpuOffload.init_hook)


def test_a_line_sets_a_method_beside_the_full_run(script, monkeypatch):
    """One that fails is listed with its error."""
    names = ["all full", "ours", "theirs"]
    methods = [script.Method(name, "on", optional=name == "theirs") for name in names]
    monkeypatch.setattr(script, "line_up", lambda *_: methods)
    monkeypatch.setattr(script, "loaded", lambda _: None)
    monkeypatch.setattr(script, "bring", lambda *_: None)
    found = {
        "all full": script.Measured(100.0, 50_000_000, 3_000_000, None),
        "ours": script.Measured(20.0, 10_000_000, 3_000_000, 1.5),
    }
    monkeypatch.setattr(script, "measure", lambda _pipe, method, _pair: found[method.name])
    table = list(script.lines("models/one", "group", "cpu", ["a", "b"]))
    assert table[1] == ["group", "ours", "on", "20.0%", "10.0", "20.0%", "3.0", "1.50"]
    assert table[0][3:] == ["100.0%", "50.0", "100.0%", "3.0", ""]
    assert table[2][:4] == ["group", "theirs", "on", "KeyError: 'theirs'"]
