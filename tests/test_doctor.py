"""`lesa.examine` and `lesa doctor`: what will work with a pipeline, what will not and why, from a call's first step."""

import copy
import json
import warnings
from dataclasses import replace

import pytest
import torch
from test_choice import CALL, GUIDED, calibrate, draw
from tiny import build_transformer
from zoo.pipelines import ZOO

import lesa
from lesa.cli import main
from lesa.host import needs
from lesa.host.doctor import Examination, installed
from lesa.host.facts import listen
from lesa.predictors.shelf import Shelf


@pytest.fixture
def pipe(tiny_flux):
    pipe = copy.copy(tiny_flux)
    pipe.transformer = build_transformer()
    return pipe


def examined(pipe, **call) -> Examination:
    return lesa.examine(pipe, "pear", generator=torch.Generator().manual_seed(0), **{**CALL, **call})


def marks(found: Examination, topic: str) -> dict[str, str]:
    return {one.words: one.mark for one in found.findings if one.topic == topic}


def test_one_run_of_the_transformer_tells_what_a_call_is_like_and_leaves_the_pipeline_as_it_was(pipe):
    with listen(pipe) as facts:
        before = draw(pipe)
    count = []
    handle = pipe.transformer.register_forward_hook(lambda *_: count.append(1))
    found = examined(pipe)
    handle.remove()
    assert len(count) == 1 and found.facts == facts[0]
    assert found.accelerates and list(marks(found, "sampler").values()) == ["yes"]
    assert any("default: Default(), 6 full of 8 steps" in words for words in marks(found, "accelerate"))
    assert torch.equal(draw(pipe), before)
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=lesa.Schedule.every(2)):  # nobody holds it
        pass


def test_what_was_calibrated_fits_such_calls_and_says_why_not_others(pipe):
    folder, _ = calibrate(pipe)
    fits, not_so = examined(pipe), examined(pipe, num_inference_steps=7)
    assert fits.accelerates and marks(fits, "there") == {f"calibration {folder.name} fits": "yes"}
    assert any(f"calibrated: {folder.name}, 5 full of 8 steps" in words for words in marks(fits, "accelerate"))
    assert not not_so.accelerates and list(marks(not_so, "there").values()) == ["no"]
    assert "7 steps instead of 8" in str(not_so) and "fallback=" in str(not_so)


def test_what_does_not_fit_is_named_once_with_the_reason_and_what_can_be_carried_fits(pipe):
    """A calibration for another size, one for other steps whose rows can be carried, one whose cannot."""
    options = lesa.CalibrateOptions(pictures=False, rivals=False, progress=False, refine=0, most=2)
    lesa.calibrate(pipe, ["apple"], budget=3, options=options, **{**CALL, "num_inference_steps": 10})
    (name,) = [one.name for one in Shelf().all()]
    fewer = examined(pipe)
    assert marks(fewer, "there") == {f"calibration {name} fits": "yes"} and fewer.accelerates
    assert any("rows carried from 10 steps to 8" in words for words in marks(fewer, "accelerate"))
    for call in (dict(height=64, width=64), dict(num_inference_steps=14)):
        found = examined(pipe, **call)
        assert list(marks(found, "there").values()) == ["no"] and not found.accelerates
        (words,) = marks(found, "there")
        assert words.startswith(f"calibration {name} is for other runs (")
        assert str(found).count(f"calibration {name}") == str(found).count(f"{name} is for") == 1


def test_guidance_is_told(tiny_qwen):
    found = examined(copy.copy(tiny_qwen), **GUIDED)
    (streams,) = marks(found, "streams")
    assert streams.startswith("cond, uncond; guidance 3 : -2")


@pytest.mark.parametrize(
    "name",
    ["flux_guided", "flux_img2img_guided", "stable_diffusion_euler_ancestral_guided", "stable_audio3_stochastic"],
)
def test_what_it_says_of_acceleration_holds(name):
    subject = ZOO[name]()
    subject = replace(subject, arguments={**subject.arguments, "num_inference_steps": 10})
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        found = lesa.examine(subject.pipe, **subject.arguments, generator=torch.Generator().manual_seed(0))
        with lesa.accelerate(subject.pipe) as run:
            try:
                subject.call()
                runs = True
            except ValueError:
                runs = False
    assert found.accelerates == runs, str(found)
    assert found.facts is not None and ("it adds noise" in " ".join(marks(found, "sampler"))) == found.facts.noise
    assert ("forecasting the data prediction" in str(found)) == (run.summary().data is not None)


def test_what_is_no_pipeline_or_whose_call_fails_is_told(pipe):
    nothing = lesa.examine(object())
    assert not nothing.accelerates and "name them: pipe.denoisers" in str(nothing)
    failing = examined(pipe, no_such_argument=1)
    assert not failing.accelerates and "TypeError" in str(failing) and failing.facts is None
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=lesa.Schedule.every(2)) as run:
        assert "is accelerated once" in str(examined(pipe))
        draw(pipe)
        assert run.summary()["cond"].skipped_steps == 4


def test_what_is_installed_is_told_and_what_lacks_with_how_to_have_it(monkeypatch, tmp_path):
    known = {one.topic: one for one in installed()}
    assert "torch" in known["versions"].words and known["shelf"].mark == "yes"
    assert {f"extra {package.extra}" for some in needs.NEEDS.values() for package in some if package.extra} <= set(
        known
    )
    monkeypatch.setattr(needs, "_why_not", lambda package: "" if package.extra == "video" else None)
    known = {one.topic: one for one in installed()}
    assert known["extra bench"].mark == "yes" and known["extra video"].mark == "no"
    assert "imageio" in known["extra video"].words and "pip install '.[video]'" in known["extra video"].words
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LESA_HOME", str(tmp_path / "file"))
    assert {one.topic: one for one in installed()}["shelf"].mark == "no"


def test_the_command_exits_with_1_where_a_call_would_be_refused(tiny_flux, tmp_path, capsys):
    tiny_flux.save_pretrained(tmp_path)
    call = {name: value for name, value in CALL.items() if name != "output_type"}
    (tmp_path / "call.json").write_text(json.dumps(call))
    assert main(["doctor"]) == 0 and "next: lesa doctor MODEL" in capsys.readouterr().err
    assert main(["doctor", str(tmp_path), "--prompt", "pear"]) == 0
    assert f"next: lesa generate {tmp_path} pear" in capsys.readouterr().err
    pipe = lesa.load(tmp_path)
    calibrate(pipe, output_type="latent")
    assert main(["doctor", str(tmp_path), "--steps", "7"]) == 1
    said = capsys.readouterr()
    assert (
        "7 steps instead of 8" in said.out and f"next: lesa calibrate {tmp_path} --steps 7 --prompts FILE" in said.err
    )
