"""What a command says where something is wrong: one line that names what is, and how to go on."""

import copy
import json
import pickle
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

import lesa
from lesa import cli
from lesa.cli import learn, main
from lesa.cli import parser as parsers
from lesa.host import loading
from lesa.host.pipelines import arguments_of, save_picture, with_call
from lesa.learn.trajectory import Trajectory
from lesa.predictors import Predictor, hub

CALL = dict(height=32, width=32, num_inference_steps=4, max_sequence_length=16)


@pytest.fixture(scope="module")
def model(tiny_flux, tmp_path_factory) -> Path:
    """A pipeline in a folder, without prompts and predictors."""
    folder = tmp_path_factory.mktemp("tiny-flux")
    tiny_flux.save_pretrained(folder)
    (folder / "call.json").write_text(json.dumps(CALL))
    return folder


def line_of(capfd, *arguments: str) -> str:
    """Run a command that fails; returns its one line."""
    assert main(list(arguments)) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lesa: ")]
    return line


@pytest.mark.parametrize("command", [["bench"], ["demo", "--model"]])
@pytest.mark.parametrize("name", ["nope", "some-owner/some-model"])
def test_a_model_without_held_out_prompts_is_told_from_a_wrong_name(capfd, command, name, model):
    line = line_of(capfd, *command, name)
    assert f"{name} is no folder here with held-out prompts" in line and "--prompts FILE" in line
    assert f"{model} has no held-out prompts" in line_of(capfd, *command, str(model))


@pytest.fixture
def away(monkeypatch):
    """No server can be reached; returns what was asked for."""
    asked = []

    def unknown(name, *_args):
        asked.append(name)
        raise OSError("Name or service not known")

    hub.reachable.cache_clear()
    monkeypatch.setattr(hub.socket, "getaddrinfo", unknown)
    for name in hub.PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield asked
    hub.reachable.cache_clear()


@pytest.mark.parametrize("name", ["nope", "./nope", "/nowhere/x", "a/b/c", "../x", "~/x"])
def test_what_is_no_name_of_a_repository_is_not_looked_for_on_the_hub(away, name):
    for load in (Predictor.from_pretrained, lesa.load):
        with pytest.raises(
            FileNotFoundError, match=r"is neither a folder here nor .* on the hub, where names are OWNER/NAME"
        ):
            load(name)
    assert not away


def test_a_hub_that_is_away_is_asked_for_once(away):
    with pytest.raises(FileNotFoundError, match=r"owner/name is neither .* \(which cannot be reached from here\)"):
        Predictor.from_pretrained("owner/name")
    with pytest.raises(FileNotFoundError, match="no folder owner/name, and the hub cannot be reached"):
        lesa.load("owner/name")
    assert len(away) <= 2  # ours, and one of diffusers'


def test_drawing_without_a_predictor_says_which_options_there_are(capfd, model):
    """On a schedule alone; without one there is a default, which says so."""
    out = ["--out", str(model / "x.png")]
    line = line_of(capfd, "generate", str(model), "small red apple", "--schedule", "every:2", *out)
    assert "--predictor FOLDER" in line and "--forecaster lagrange:1 --schedule every:3" in line and "(" in line
    assert "lesa.accelerate(" not in line
    assert main(["generate", str(model), "x", "--forecaster", "lagrange:1", "--schedule", "every:3", *out]) == 0
    capfd.readouterr()
    assert main(["generate", str(model), "x", *out]) == 0
    said = capfd.readouterr().err
    assert "lesa calibrate MODEL --prompts FILE --budget 8." in said and "lesa.calibrate" not in said


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "make them: lesa.calibrate(pipe, prompts, target='psnr:40').",
            "lesa calibrate MODEL --prompts FILE --target psnr:40.",
        ),
        ("for this call: lesa.calibrate(pipe, prompts, budget=8, ...), or", "--prompts FILE --budget 8, or"),
        ("or fallback='full' (every step full)", "or --fallback full (every step full)"),
    ],
)
def test_advice_of_calls_is_told_as_commands(text, told):
    assert told in cli._as_typed(text, ["fallback", "budget"])


def test_a_dtype_is_asked_for_without_a_warning(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        pipe = loading.loaded(loading.LoadOptions(str(model), dtype="bfloat16"))
    assert pipe.transformer.dtype == torch.bfloat16


@pytest.mark.parametrize("text", ["", "{", "[1]", "7", '{"a":' * 50_000])
def test_damaged_arguments_of_calls_are_named(capfd, model, tmp_path, text):
    for file in model.rglob("*"):
        if file.is_file():
            (tmp_path / file.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file.relative_to(model)).write_bytes(file.read_bytes())
    (tmp_path / "call.json").write_text(text)
    assert f"{tmp_path / 'call.json'} holds the arguments" in line_of(capfd, "flops", "--model", str(tmp_path))
    assert f"{tmp_path / 'call.json'} holds the arguments" in line_of(capfd, "generate", str(tmp_path), "x", "--full")


@pytest.mark.parametrize("text", ["", "[1, 2", '{"grid": {}}', '["x"]', "[" * 100_000])
def test_a_damaged_grid_is_named(capfd, tmp_path, text):
    from test_convert import weights, write

    grid = tmp_path / "grid.json"
    grid.write_text(text)
    file = str(write(tmp_path / "x.pt", weights(9)))
    common = ["convert", file, "--model", "flux", "--interval", "4", "--out", str(tmp_path / "out")]
    assert f"{grid} holds a grid" in line_of(capfd, *common, "--grid", str(grid))


@pytest.mark.parametrize("name", ["model_index.json", "scheduler/scheduler_config.json", "transformer/config.json"])
def test_damaged_settings_of_a_pipeline_are_named(capfd, model, tmp_path, name):
    shutil.copytree(model, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text('{"a": ')
    assert str(tmp_path / name) in line_of(capfd, "generate", str(tmp_path), "x", "--full")


@pytest.mark.parametrize("options", ["--prompts", "--calls"])
def test_prompts_that_are_not_there_are_named(capfd, tmp_path, options):
    line = line_of(capfd, "calibrate", "anything", options, str(tmp_path / "none.txt"))
    assert f"{tmp_path / 'none.txt'} cannot be read (No such file or directory)" in line


def test_damaged_weights_name_their_pipeline(capfd, tiny_flux, tmp_path):
    tiny_flux.save_pretrained(tmp_path)
    file = next((tmp_path / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    line = line_of(capfd, "generate", str(tmp_path), "x", "--full", "--out", str(tmp_path / "x.png"))
    assert str(tmp_path) in line


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_picture_that_finds_no_room_is_named(tmp_path):
    from PIL import Image

    (tmp_path / "x.png").symlink_to("/dev/full")
    noise = Image.effect_noise((256, 256), 99)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_picture(noise, tmp_path / "x.png")
    assert caught.value.filename == str(tmp_path / "x.png")


# copies


def test_a_pipeline_with_arguments_is_copied_and_pickled(tiny_flux):
    pipe = with_call(type(tiny_flux)(**tiny_flux.components), dict(height=32, width=32))
    pipe = with_call(pipe, dict(width=48, num_inference_steps=4))
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=lesa.Schedule.every(2)):
        copies = [copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))]
    wanted = pipe("small red apple", max_sequence_length=16, output_type="latent", generator=torch.manual_seed(0))
    for one in copies:
        assert arguments_of(one) == arguments_of(pipe) and isinstance(one, type(tiny_flux))
        assert type(one).__name__ == type(pipe).__name__ and one.transformer is not pipe.transformer
        one.set_progress_bar_config(disable=True)
        found = one("small red apple", max_sequence_length=16, output_type="latent", generator=torch.manual_seed(0))
        assert torch.equal(found.images, wanted.images)


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_acceleration_is_not_copied(tiny_flux, make):
    with (
        lesa.accelerate(tiny_flux, lesa.Reuse(), schedule=lesa.Schedule.every(2)) as run,
        pytest.raises(TypeError, match="neither copied nor pickled; copy or pickle the pipeline"),
    ):
        make(run)


# stopped


def stop(*_args, **_more):
    raise KeyboardInterrupt


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("small red apple on white, left\nlarge blue fish on grey, right\n")
    return str(file)


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize(
    "command",
    [
        "generate MODEL x --full --out OUT/x.png",
        "collect MODEL --prompts PROMPTS --batch-size 1 --out OUT/runs",
        "bench MODEL --prompts PROMPTS --pairs 2 --batch-size 1 --budgets , --no-bound --timed 0 --out OUT/bench",
        "demo --model MODEL --prompts PROMPTS --pairs 2 --batch-size 1 --budgets , --timed 0 --out OUT/demo",
        "calibrate MODEL --prompts PROMPTS --batch-size 1 --budget 2 --out OUT/p",
    ],
    ids=lambda command: command.split()[0],
)
def test_a_stop_in_a_command_is_one_line_and_leaves_nothing_half(
    command, after, model, prompts, tmp_path, monkeypatch, capfd
):
    kind, count = FluxTransformer2DModel, []
    forward = kind.forward

    def stopping(*args, **kwargs):
        count.append(1)
        return stop() if len(count) > after else forward(*args, **kwargs)

    monkeypatch.setattr(kind, "forward", stopping)
    names = {"MODEL": str(model), "PROMPTS": prompts}
    arguments = [names.get(word, word.replace("OUT", str(tmp_path))) for word in command.split()]
    assert main(arguments) == 130
    said = capfd.readouterr().err
    assert [line for line in said.splitlines() if line.startswith("lesa: ")][-1:] == ["lesa: stopped"]
    assert "Traceback" not in said and not list(tmp_path.rglob("*.partial"))
    assert all(Trajectory.load(path) for path in tmp_path.rglob("runs/*.safetensors"))


def test_a_stop_while_arguments_are_read_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(parsers, "parser", stop)
    assert main(["plan", "anything"]) == 130
    assert capsys.readouterr().err == "lesa: stopped\n"


def test_a_warning_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(learn, "plan", lambda _: warnings.warn("runs are\nunverified", stacklevel=1))
    assert main(["plan", "anything"]) == 0
    assert capsys.readouterr().err == "lesa: runs are unverified\n"
