"""Scores that other packages compute: what they are given, and what is said where they cannot be had."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lesa.bench import scores
from lesa.learn.metrics import ms_ssim, psnr_as_published

PROMPTS = ["a red apple", "a blue fish"]
PICTURES = [np.full((64, 64, 3), level, dtype=np.uint8) for level in (0, 255)]
REFERENCES = [np.full((64, 64, 3), 51, dtype=np.uint8)] * 2


def test_our_own_are_always_there():
    found, lacking = scores.load(["MS-SSIM"])
    assert found["MS-SSIM"](PROMPTS, PICTURES, REFERENCES) == [ms_ssim(one, REFERENCES[0]) for one in PICTURES]
    assert not lacking


def test_what_cannot_be_had_is_named_with_the_reason(monkeypatch):
    def without_weights():
        raise OSError("no way to\nthe weights")

    monkeypatch.setitem(scores.SCORES, "LPIPS", without_weights)
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    found, lacking = scores.load(["ImageReward", "LPIPS", "MS-SSIM"])
    assert list(found) == ["MS-SSIM"] and lacking["LPIPS"] == "OSError: no way to the weights"
    assert lacking["ImageReward"] == "ImportError: ImageReward needs image-reward (pip install image-reward)"
    with pytest.raises(ValueError, match=r"the scores are MS-SSIM, LPIPS, CLIP, ImageReward, no PSNR: .*, got beauty"):
        scores.load(["beauty"])


def test_psnr_as_published_is_had_for_the_asking_under_a_name_that_nobody_mistakes():
    found, lacking = scores.load([scores.AS_PUBLISHED])
    assert found[scores.AS_PUBLISHED](PROMPTS, PICTURES, REFERENCES) == [
        psnr_as_published(one, REFERENCES[0]) for one in PICTURES
    ]
    assert not lacking and scores.AS_PUBLISHED.startswith("no PSNR") and "," not in scores.AS_PUBLISHED


def test_lpips_is_given_pictures_from_0_to_1(monkeypatch):
    def metric(net_type, normalize):
        assert net_type == "alex" and normalize
        return distance

    def distance(picture, reference):
        assert picture.shape == reference.shape == (1, 3, 64, 64)
        assert picture.min() >= 0 and picture.max() <= 1
        return (picture - reference).abs().mean()

    package = SimpleNamespace(LearnedPerceptualImagePatchSimilarity=metric)
    monkeypatch.setitem(sys.modules, "torchmetrics.image", package)
    monkeypatch.setitem(sys.modules, "torchvision.models", SimpleNamespace())
    found, _ = scores.load(["LPIPS"])
    assert found["LPIPS"](PROMPTS, PICTURES, REFERENCES) == pytest.approx([0.2, 0.8])


def test_clip_and_image_reward_are_given_each_picture_with_its_prompt(monkeypatch):
    def clip(name):
        assert name.startswith("openai/clip")
        return lambda picture, prompt: float(picture.float().mean()) + len(prompt)

    reward = SimpleNamespace(score=lambda prompt, image: image.getpixel((0, 0))[0] - len(prompt))
    monkeypatch.setitem(sys.modules, "torchmetrics.multimodal", SimpleNamespace(CLIPScore=clip))
    monkeypatch.setitem(sys.modules, "ImageReward", SimpleNamespace(load=lambda _name: reward))
    found, lacking = scores.load(["CLIP", "ImageReward"])
    assert not lacking
    assert found["CLIP"](PROMPTS, PICTURES, REFERENCES) == [11.0, 255.0 + 11]
    assert found["ImageReward"](PROMPTS, PICTURES, REFERENCES) == [-11.0, 255.0 - 11]
