"""What a command needs of an extra is looked for before its work, and named with the extra that brings it."""

import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image
from test_package import CORE, PROJECT, distributions
from tiny import TRAINED

from lesa.bench import benchmark, scores
from lesa.cli import learn, main
from lesa.host import needs, pipelines
from lesa.host.offload import place
from lesa.host.pipelines import save_picture
from lesa.learn import collect

EXTRAS = PROJECT["optional-dependencies"]
CALL = dict(height=32, width=32, num_inference_steps=6, max_sequence_length=16)
BENCH = "(in a checkout of lesa: pip install '.[bench]')"


class Loaded(BaseException):
    """A pipeline was loaded: no error that a command would catch."""


@pytest.fixture
def without(monkeypatch):
    """Let imports of packages fail, and the loading of pipelines end the test."""

    def loading(*_args, **_options):
        raise Loaded

    def hide(*modules: str) -> None:
        for module in modules:
            known = [name for name in sys.modules if name == module or name.startswith(f"{module}.")]
            for name in {module, *known}:
                monkeypatch.setitem(sys.modules, name, None)

    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", loading)
    return hide


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with all that commands read before they load a pipeline."""
    folder = tmp_path / "model"
    (folder / "prompts").mkdir(parents=True)
    for split in ("heldout", "train", "validation"):
        (folder / "prompts" / f"{split}.txt").write_text("a red apple\n")
    return folder


COMMANDS = [
    ("demo --model MODEL", "skimage", "lesa demo needs scikit-image"),
    ("demo --model MODEL", "matplotlib", "lesa demo needs matplotlib"),
    ("bench MODEL", "skimage", "lesa bench needs scikit-image"),
    ("bench MODEL", "matplotlib", "lesa bench needs matplotlib"),
    ("plan MODEL --verify 2", "skimage", "lesa plan --verify needs scikit-image"),
    ("plan MODEL --plot OUT.png", "matplotlib", "lesa plan --plot needs matplotlib"),
    ("plan MODEL --plot OUT.png", "skimage", "lesa plan --plot needs scikit-image"),
    ("report OUT", "matplotlib", "lesa report needs matplotlib"),
    ("reproduce OUT/records.jsonl 3", "skimage", "lesa reproduce needs scikit-image"),
    ("generate MODEL x --full --out OUT/x.png --lora LORA", "peft", "a LoRA needs peft"),
    ("bench MODEL --out OUT --lora LORA", "peft", "a LoRA needs peft"),
    ("generate MODEL x --full --out OUT/x.png --offload model", "accelerate", "offloading (model) needs accelerate"),
    ("collect MODEL --prompts PROMPTS --out OUT --offload group", "accelerate", "offloading (group) needs accelerate"),
    (
        "collect MODEL --prompts PROMPTS --out OUT --device cuda --offload sequential",
        "accelerate",
        "offloading (sequential) needs accelerate",
    ),
]


def command(words: str, model: Path, out: Path) -> list[str]:
    places = {"MODEL": model, "PROMPTS": model / "prompts" / "train.txt", "OUT": out, "LORA": out / "lora"}
    for name, folder in places.items():
        words = re.sub(rf"\b{name}\b", str(folder), words)
    return words.split()


@pytest.mark.parametrize(("words", "hidden", "said"), COMMANDS)
def test_a_command_says_before_its_work_what_it_lacks(words, hidden, said, model, tmp_path, without, capsys):
    without(hidden)
    assert main(command(words, model, tmp_path / "out")) == 2
    assert f"lesa: {said} {BENCH}" in capsys.readouterr().err
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", ["c.mp4", "c.MP4"])
@pytest.mark.parametrize("hidden", ["imageio", "imageio_ffmpeg"])
def test_a_clip_is_not_drawn_where_it_could_not_be_written(name, hidden, model, tmp_path, without, monkeypatch, capsys):
    for module in ("imageio", "imageio_ffmpeg"):
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(get_ffmpeg_exe=lambda: "ffmpeg"))
    without(hidden)
    assert main(["generate", str(model), "x", "--full", "--out", str(tmp_path / name)]) == 2
    said = f"an MP4 needs {hidden.replace('_', '-')} (in a checkout of lesa: pip install '.[video]')"
    assert said in capsys.readouterr().err
    with pytest.raises(ImportError, match=re.escape(said)):
        save_picture([Image.new("RGB", (8, 8))], tmp_path / name)


def test_ffmpeg_that_is_not_there_is_lacking(monkeypatch):
    def nowhere():
        raise RuntimeError("no ffmpeg\nhere")

    monkeypatch.setitem(sys.modules, "imageio", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", SimpleNamespace(get_ffmpeg_exe=nowhere))
    why = "it is there, but: RuntimeError: no ffmpeg here"
    said = f"imageio-ffmpeg ({why}) (in a checkout of lesa: pip install '.[video]')"
    assert needs.lacking("mp4") == said


def test_pictures_and_clips_are_written_as_mp4(tmp_path):
    imageio = pytest.importorskip("imageio.v2")
    pytest.importorskip("imageio_ffmpeg")
    frames = [Image.new("RGB", (48, 48), colour) for colour in ("black", "white", "black")]
    for name, drawn, count in (("clip.mp4", frames, 3), ("picture.MP4", frames[1], 1)):
        save_picture(drawn, tmp_path / name)
        with imageio.get_reader(tmp_path / name, format="FFMPEG") as reader:
            found = [frame.mean() for frame in reader]
        assert len(found) == count and max(found) > 200


def test_a_training_without_matplotlib_says_that_it_draws_no_plot(model, tmp_path, without, capsys):
    without("matplotlib")
    prompts = str(model / "prompts" / "train.txt")
    data = ["--data", str(tmp_path), "--validation-prompts", prompts, "--out", str(tmp_path / "out")]
    assert main(["train", str(model), *data]) == 2  # there are no runs
    assert f"no plot of the training will be drawn: it needs matplotlib {BENCH}" in capsys.readouterr().err


def test_a_calibration_without_matplotlib_ends_well(tiny_flux, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(learn, "loaded", lambda _: pipelines.with_call(tiny_flux, CALL))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red apple\na blue fish\n")

    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"] + ["matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    kind = type(tiny_flux)
    try:
        options = ["--prompts", str(prompts), "--budget", "3", "--out", str(tmp_path / "out")]
        (tmp_path / "prompts").mkdir()
        assert main(["calibrate", str(tmp_path), *options, "--plot", "curve.png"]) == 2
        assert "lesa calibrate --plot needs matplotlib" in capsys.readouterr().err
        assert main(["calibrate", str(tmp_path), *options]) in TRAINED
    finally:
        tiny_flux.__class__ = kind
    assert (tmp_path / "out" / "config.json").exists()


def test_a_pipeline_is_loaded_without_accelerate_and_nothing_is_said(tiny_flux, tmp_path, monkeypatch, caplog):
    tiny_flux.save_pretrained(tmp_path)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.is_accelerate_available", lambda: False)
    monkeypatch.setattr("diffusers.models.modeling_utils.is_accelerate_available", lambda: False)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    DiffusionPipeline.from_pretrained(tmp_path)
    assert "accelerate" in caplog.text
    caplog.clear()
    for name in [name for name in sys.modules if name.split(".")[0] == "accelerate"] + ["accelerate"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert pipelines.load(tmp_path).transformer is not None
    assert caplog.text == ""


def test_scores_that_cannot_be_had_are_named_before_the_pipeline_is_loaded(model, without, tmp_path, capsys):
    without("torchmetrics", "torchvision")
    with pytest.raises(Loaded):
        main(["bench", str(model), "--scores", "CLIP,LPIPS,MS-SSIM", "--out", str(tmp_path / "out")])
    said, install = capsys.readouterr().err, "(in a checkout of lesa: pip install '.[scores]')"
    wanted = {"CLIP": f"torchmetrics {install}", "LPIPS": f"torchmetrics and torchvision {install}"}
    for name, what in wanted.items():
        assert f"{name} will not be measured: ImportError: {name} needs {what}" in said
    assert scores.load(["CLIP"]) == ({}, {"CLIP": f"ImportError: CLIP needs {wanted['CLIP']}"})


def test_the_calls_behind_commands_look_too(without):
    without("skimage", "peft", "accelerate")
    with pytest.raises(ImportError, match="a comparison needs scikit-image"):
        benchmark.compare(None, [], ["a red apple"], [0])
    with pytest.raises(ImportError, match="SSIM needs scikit-image"):
        benchmark.metrics.ssim(*np.zeros((2, 16, 16, 3), dtype=np.uint8))
    with pytest.raises(ImportError, match="a LoRA needs peft"):
        pipelines.load("anything", lora="a LoRA")
    with pytest.raises(ImportError, match="needs accelerate"):
        place(None, "cpu", "model")


def test_what_does_not_run_is_lacking_with_what_it_says(monkeypatch, tmp_path):
    (tmp_path / "skimage").mkdir()
    (tmp_path / "skimage" / "__init__.py").write_text("raise OSError('built for\\nanother machine')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "skimage"]:
        monkeypatch.delitem(sys.modules, name)
    assert needs.lacking("comparison").startswith(
        "scikit-image (it is there, but: OSError: built for another machine) (in a checkout of lesa: pip"
    )


def test_all_that_is_lacking_is_named_at_once(without):
    without("skimage", "matplotlib", "imageio", "imageio_ffmpeg", "ImageReward")
    assert needs.lacking("comparison", "plots", "mp4", "ImageReward") == (
        "scikit-image and matplotlib and imageio and imageio-ffmpeg and image-reward "
        "(in a checkout of lesa: pip install '.[bench,video]' image-reward)"
    )


def test_what_is_there_is_not_lacking():
    asked = ("comparison", "plots", "lora", "offload")
    for package in (one for name in asked for one in needs.NEEDS[name]):
        pytest.importorskip(package.module)
    assert needs.lacking(*asked) == ""
    assert needs.module("comparison").structural_similarity


@pytest.mark.parametrize("package", sorted({one for packages in needs.NEEDS.values() for one in packages}))
def test_an_extra_brings_what_it_is_named_for(package):
    assert package.name not in CORE
    assert package.extra is None or package.name in distributions(EXTRAS[package.extra])


def test_extras_are_told_from_the_core_by_a_fresh_process():
    """No command but those that need it imports a package of an extra: a bare installation runs the others."""
    hidden = sorted({p.module.split(".")[0] for packages in needs.NEEDS.values() for p in packages})
    script = f"""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {hidden}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Hide())
from lesa.bench import benchmark, peers, plots, report
from lesa import cli
from lesa.learn import collect, training
from lesa.host import runtime, needs
assert not [name for name in needs.NEEDS if not needs.lacking(name)]
sys.exit(cli.main(["generate", "nowhere", "x", "--out", "c.mp4"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("lesa: an MP4 needs imageio and imageio-ffmpeg")


def test_kept_runs_have_the_files_that_are_named(tmp_path):
    assert [path.name for path in collect.kept_paths(tmp_path, [7, 9])] == [
        "00000-7.safetensors",
        "00001-9.safetensors",
    ]
