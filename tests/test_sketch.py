"""Errors as few numbers keep their size: exactly where forecasts are of outputs, and nearly behind a feature tap."""

import pytest
import torch

from lesa.learn.sketch import sketched
from lesa.learn.training import Runs
from lesa.rows.guidance import Guidance

RUNS, STEPS, TOKENS, CHANNELS = 2, 6, 100, 3


def runs() -> Runs:
    outputs = torch.randn(RUNS, 1, STEPS, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(3))
    return Runs(outputs, outputs, torch.linspace(1, 2, STEPS).expand(RUNS, 1, STEPS)[..., None], outputs[:, 0])


def test_of_outputs_every_sum_of_errors_keeps_its_size():
    given, weights = runs(), torch.tensor([0.7, -2.0, 1.3])
    errors, growth = sketched(given, lambda features, _: features, Guidance(), size=1)
    velocity = given.outputs[:, 0].flatten(2)
    summed = sum(w * (velocity[:, k] - velocity[:, 4]) for k, w in enumerate(weights))
    found = torch.einsum("k,kpd->pd", weights, errors[:3, 4])
    torch.testing.assert_close(found.norm(dim=1), summed.norm(dim=1), rtol=1e-4, atol=0)
    assert errors.shape[-1] == STEPS and not errors[4, :5].any()
    torch.testing.assert_close(growth[2].norm(dim=1), velocity[:, 2].norm(dim=1), rtol=1e-4, atol=0)


def test_behind_a_feature_tap_the_rest_is_drawn():
    given = runs()

    def bent(features, conditioning):
        return features + 0.5 * features**2 * (conditioning[..., None] - 1)

    errors, _ = sketched(given, bent, Guidance(), size=64)
    reused = bent(given.features[:, 0, 1:2], given.conditioning[:, 0, 4:5])
    missed = (reused - given.outputs[:, 0, 4:5]).flatten(1)
    assert errors.shape[-1] == STEPS + 64
    assert errors[1, 4].norm(dim=1).tolist() == pytest.approx(missed.norm(dim=1).tolist(), rel=0.3)
