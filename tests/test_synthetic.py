"""The benchmark of synthetic fields: velocities are exact, and their sizes go as recorded ones do."""

import importlib
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

from lesa.rows.forecasters import Lagrange, Reuse
from lesa.rows.schedule import Schedule

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "synthetic.py"
RATIOS = FLUX_MAG_RATIOS.tolist()


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        yield importlib.import_module("synthetic")
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.fixture(scope="module")
def world(script):
    return script.World(script.following(RATIOS, 128), 20, planned=3, held=3)


@pytest.mark.parametrize("time", [0.9, 0.5, 0.1])
def test_velocities_are_those_of_the_mixtures_score(script, time):
    """E[noise | x] = -t grad log p_t(x), and x = (1 - t) data + t noise."""
    field = script.blocks([(0.5, 0.1), (2.0, 0.4), (3.0, 1.5)], seed=0)
    x = torch.randn(5, 6, requires_grad=True, generator=torch.Generator().manual_seed(0))
    variance = ((1 - time) ** 2 * field.spreads**2 + time**2)[:, None]
    away = x.unflatten(1, (3, 2))[:, :, None] - (1 - time) * field.modes
    density = (-away.square().sum(-1) / (2 * variance)).logsumexp(-1).sum()
    (score,) = torch.autograd.grad(density, x)
    noise = -time * score
    expected = noise - (x.detach() - time * noise) / (1 - time)
    torch.testing.assert_close(field(x.detach(), time), expected, rtol=1e-4, atol=1e-4)


def test_sizes_go_like_the_recorded_ones(script):
    ours = script.ratios_of(script.following(RATIOS, 512), len(RATIOS))
    early, middle, late = script.thirds(ours)
    theirs = script.thirds(RATIOS)
    assert theirs == pytest.approx([0.60, 0.08, 0.30], abs=0.01)
    assert early > 0.3 and middle < 0.1 and late == pytest.approx(theirs[2], abs=0.1)
    assert np.abs(np.log(ours / np.array(RATIOS))).mean() < 0.03


def test_a_run_with_every_step_full_is_the_reference_run(script, world):
    latents, velocities = script.run(world.field, world.held, world.grid)
    again, _ = script.run(world.field, world.held, world.grid, Lagrange(2), Schedule.every(1))
    assert torch.equal(latents, again) and torch.equal(latents[:, -1], world.ends)
    reused, others = script.run(world.field, world.held, world.grid, Reuse(), Schedule.every(5))
    assert torch.equal(others[:, 0], others[:, 4]) and torch.equal(others[:, 0], velocities[:, 0])
    assert not torch.equal(reused[:, -1], latents[:, -1])


def test_climbing_ends_no_farther_than_it_began(world):
    start, forecaster = Schedule.every(5), Lagrange(1)
    found = world.climb(forecaster, [start], 30)
    world.held = world.known  # what was climbed on
    del world.__dict__["ends"]
    before, after = (world.drift(forecaster, one) for one in (start, found))
    assert after < before and len(found.full_steps(20)) == 4


def test_the_table_has_every_method(monkeypatch, capsys):
    options = "--budgets 4 --steps 12 --blocks 64 --planned 2 --held 2 --tries 4"
    monkeypatch.setattr(sys, "argv", ["synthetic.py", *options.split()])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    text = capsys.readouterr().out
    for name in ("fewer steps", "reuse", "Lagrange-3", "FoCa", "MeanCache-2", "Spectrum, ridge 1e-3", "AB-Cache-2"):
        assert f"| 4          | {name} " in text
    assert "sum of abs ln, by thirds" in text
