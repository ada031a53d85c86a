"""LPIPS: where it can be had it is measured, kept and promised; else it is left out, and the table says why."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from lesa.host.pipelines import with_call
from lesa.learn import perceptual
from lesa.learn.calibrate import CalibrateOptions, calibrate
from lesa.learn.checks import Checks
from lesa.predictors.curve import Curve
from lesa.predictors.shelf import Shelf

CALL = dict(height=32, width=32, num_inference_steps=4, max_sequence_length=16)
PROMPTS = ["small red apple on white, left", "large blue fish on grey, right"]
FAST = CalibrateOptions(refine=0, most=1, rivals=False, progress=False)


class Random(nn.Module):
    """What torchmetrics has, of a network that nobody trained: the mean squared distance of its features."""

    def __init__(self, net_type: str, normalize: bool):
        super().__init__()
        assert net_type == "alex" and normalize
        torch.manual_seed(0)
        self.features = nn.Conv2d(3, 8, 11, stride=4)

    def forward(self, picture: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        return (self.features(picture) - self.features(reference)).square().mean()


@pytest.fixture
def package(monkeypatch, tmp_path):
    """Both packages with a network of random weights, and a place for the weights where there are none."""
    address = SimpleNamespace(DEFAULT=SimpleNamespace(url="https://somewhere/models/alexnet-0000.pth"))
    found = SimpleNamespace(LearnedPerceptualImagePatchSimilarity=Random)
    monkeypatch.setitem(sys.modules, "torchmetrics.image", found)
    monkeypatch.setitem(sys.modules, "torchvision.models", SimpleNamespace(AlexNet_Weights=address))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints" / "alexnet-0000.pth"


@pytest.fixture
def weights(package):
    package.parent.mkdir(parents=True)
    package.touch()


@pytest.fixture(scope="module")
def pipe(tiny_flux):
    pipe = with_call(type(tiny_flux)(**tiny_flux.components), CALL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_identical_pictures_are_at_no_distance_and_clips_at_the_mean_of_their_frames(package):
    between = perceptual.lpips()
    one, other = np.random.default_rng(0).integers(256, size=(2, 32, 32, 3)).astype(np.uint8)
    assert between(one, one) == 0 < between(one, other)
    assert between(np.stack([one, one]), np.stack([one, other])) == pytest.approx(between(one, other) / 2)


@pytest.fixture
def ssim():
    """What the table has beside it: without scikit-image another line says that SSIM is left out."""
    return pytest.importorskip("skimage")


def test_it_is_in_the_table_and_can_be_promised(pipe, weights, tmp_path, ssim):
    predictor = calibrate(pipe, PROMPTS, None, FAST, budgets=(3,), target="lpips:1e9", shelf=Shelf(tmp_path / "shelf"))
    (point,) = predictor.curve.points
    assert len(point.kept.lpips) == 4 and point.kept.score("lpips").worst == max(point.kept.lpips) > 0
    head, *_, line = predictor.curve.table().splitlines()
    assert "| LPIPS (worst) |" in head and f"| {point.kept.score('lpips').mean:.4f} (" in line
    assert f"LPIPS {point.kept.score('lpips').mean:.4f}" in point.promise
    assert Shelf(tmp_path / "shelf").all()[0].checked(3)["lpips"].mean == pytest.approx(point.kept.score("lpips").mean)


def test_weights_that_are_not_there_are_named_under_a_table_without_it(pipe, package, tmp_path, ssim):
    curve = calibrate(pipe, PROMPTS, None, FAST, budget=3, shelf=Shelf(tmp_path / "shelf")).curve
    head, *_, said = curve.table().splitlines()
    assert "LPIPS" not in head and not curve.points[0].kept.lpips
    assert said == f"LPIPS is left out: it needs AlexNet's weights, {package} (lesa bench --scores LPIPS fetches them)."
    kept = Shelf(tmp_path / "shelf").all()[0].table["curve"]
    assert Curve.from_dict(kept).left_out == said


def test_pictures_that_are_too_small_for_it_are_told(pipe, weights, ssim):
    checks = Checks(pipe, PROMPTS[:1], [0], dict(height=16, width=16), pictures=True)
    assert checks.left_out == "LPIPS is left out: it needs pictures of 32 pixels a side or more, got 16."


def test_a_package_that_is_not_there_is_named(monkeypatch):
    for name in ("torchmetrics", "torchmetrics.image"):
        monkeypatch.setitem(sys.modules, name, None)
    assert perceptual.lacking().startswith("torchmetrics") and ".[scores]" in perceptual.lacking()
