"""The way of real checkpoints: real configurations with fewer layers and heads, bfloat16 shards of a variant, offload,
kills."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, QwenImageTransformer2DModel
from faults.kills import AUTOGRAD_FORKS
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from tiny import TRAINED
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import lesa
from lesa.bench import models
from lesa.cli import main
from lesa.host.offload import groups_layers
from lesa.learn import collect
from lesa.learn.trajectory import Store, Trajectory
from lesa.predictors import Predictor

FORK = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="a warm process must be forked")
FORKED_TRAINING = pytest.mark.skipif(not AUTOGRAD_FORKS, reason="a torch built for CUDA does not train in a forked one")
CONFIGS = {model.name: dict(model.config) for model in models.MODELS}
STEPS, PROMPTS = (
    6,
    ["small red apple on white, left", "large blue fish on grey, right", "small green pear on grey, left"],
)
LOADED = ["--dtype", "bfloat16", "--variant", "bf16"]


def flux(pipe):
    """FLUX.1-dev with one block of each kind and 2 heads of 128 channels; its text encoders are as wide as the real."""
    config = dict(CONFIGS["black-forest-labs/FLUX.1-dev"], num_layers=1, num_single_layers=1, num_attention_heads=2)
    clip, t5 = pipe.text_encoder.config, pipe.text_encoder_2.config
    pipe.text_encoder = CLIPTextModel(CLIPTextConfig(**{**clip.to_dict(), "hidden_size": 768, "intermediate_size": 16}))
    pipe.text_encoder_2 = T5EncoderModel(T5Config(**{**t5.to_dict(), "d_model": 4096, "d_ff": 16}))
    pipe.vae = AutoencoderKL.from_config({**pipe.vae.config, "latent_channels": 16})
    pipe.transformer = FluxTransformer2DModel(**config)
    return pipe, dict(height=32, width=32, num_inference_steps=STEPS, max_sequence_length=16)


def qwen(pipe):
    """Qwen-Image with one block and 2 heads of 128 channels; text and latents stay as narrow as those of the tests."""
    config = dict(CONFIGS["Qwen/Qwen-Image"], num_layers=1, num_attention_heads=2)
    pipe.transformer = QwenImageTransformer2DModel(
        **{**config, "joint_attention_dim": 32, "in_channels": 16, "out_channels": 4}
    )
    return pipe, dict(height=32, width=32, num_inference_steps=STEPS, negative_prompt=" ", true_cfg_scale=4.0)


BUILT = {"flux": (flux, "model"), "qwen": (qwen, "group" if groups_layers() else "model")}


@pytest.fixture(scope="module", params=BUILT)
def real(request, tmp_path_factory) -> tuple[Path, list[str]]:
    """A folder as it lies on the hub, without a call.json, and the options of a command that runs it."""
    build, offload = BUILT[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    pipe, call = build(request.getfixturevalue(f"new_{request.param}"))
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16)
    pipe.save_pretrained(folder, variant="bf16", max_shard_size="2MB")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return folder, [*LOADED, "--offload", offload, "--call", json.dumps(call)]


@pytest.fixture(scope="module")
def new_flux():
    from tiny import build_pipeline

    return build_pipeline()


@pytest.fixture(scope="module")
def new_qwen():
    from tiny import build_qwen_pipeline

    return build_qwen_pipeline()


def run_until(arguments: list[str], saved: int) -> None:
    """Run a command in this process, which is killed outright when it is about to keep one more run."""
    save, done = Trajectory.save, []

    def fateful(self, path, *of):
        if len(done) == saved:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(save(self, path, *of))

    Trajectory.save = fateful
    main(arguments)


def killed(arguments: list[str], saved: int) -> None:
    child = multiprocessing.get_context("fork").Process(target=run_until, args=(arguments, saved))
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def runs(real, tmp_path_factory) -> Path:
    """Collected offloaded, killed after one run, and resumed."""
    folder, options = real
    out = tmp_path_factory.mktemp("runs")
    arguments = ["collect", str(folder), *options, "--prompts", str(folder / "prompts.txt"), "--batch-size", "1"]
    killed([*arguments, "--out", str(out / "x")], 1)
    assert len(Store.open(out / "x")) == 1
    assert main([*arguments, "--out", str(out / "x")]) == 0
    whole = [argument for argument in arguments if argument not in ("--offload", "model", "group")]
    assert main([*whole, "--out", str(out / "whole")]) == 0
    assert Store.open(out / "x").digest() == Store.open(out / "whole").digest()
    return out / "x"


def test_the_checkpoint_lies_in_bfloat16_shards_of_a_variant(real):
    files = {path.name for path in (real[0] / "transformer").iterdir()}
    assert "diffusion_pytorch_model.safetensors.index.bf16.json" in files
    assert sum("bf16-0000" in name for name in files) > 1 and not (real[0] / "call.json").exists()


@FORK
def test_runs_are_recorded_as_if_nothing_had_happened(real, runs):
    store = Store.open(runs)
    first = store.load(0)
    assert len(store) == 3 and first.features["cond"].dtype == torch.bfloat16
    assert first.features["cond"].shape[-1] == 256 and first.latents.isfinite().all()
    assert first.streams == (("cond", "uncond") if "negative_prompt" in real[1][-1] else ("cond",))


@FORK
@FORKED_TRAINING
def test_training_goes_on_where_it_was_killed_and_its_predictor_draws(real, runs, tmp_path, monkeypatch, capsys):
    folder, options = real
    loaded = options[: options.index("--call")]
    arguments = ["train", str(folder), *loaded, "--data", str(runs), "--schedule", "every:2", "--batch-size", "1"]
    arguments += ["--validation-prompts", str(folder / "prompts.txt"), "--validation", "1"]
    arguments += ["--rounds", "1", "--updates", "2", "2"]
    killed([*arguments, "--out", str(tmp_path / "x")], 1 + 2)  # one run of reference, two of round 0
    kept = tmp_path / "x" / "rounds" / "recorded"
    assert len(list(kept.glob("*/*.safetensors"))) == 3
    recorded, record = [], collect.record
    monkeypatch.setattr(collect, "record", lambda *args, **more: recorded.append(args[1]) or record(*args, **more))
    assert main([*arguments, "--out", str(tmp_path / "x")]) in TRAINED
    assert len(recorded) == 1 + 1 + 4 + 5 and not kept.exists()  # the rest of round 0, round 1, and its judgement
    assert main([*arguments, "--out", str(tmp_path / "whole")]) in TRAINED
    whole, resumed = (Predictor.from_pretrained(tmp_path / name) for name in ("whole", "x"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    out = tmp_path / "x.png"
    drawing = ["generate", str(folder), PROMPTS[0], *options, "--predictor", str(tmp_path / "x"), "--out", str(out)]
    assert main(drawing) == 0
    assert out.exists() and "       3        3        2.00" in capsys.readouterr().out


@FORK
def test_schedules_are_planned_and_methods_compared(real, runs, tmp_path, capsys):
    folder, options = real
    loaded = options[: options.index("--call")]
    planning = ["plan", str(folder), *loaded, "--steps", str(STEPS), "--data", str(runs), "--budgets", "3"]
    assert main([*planning, "--forecaster", "reuse"]) == 0
    assert capsys.readouterr().out.startswith("at:0")
    comparing = ["bench", str(folder), *options, "--prompts", str(folder / "prompts.txt"), "--pairs", "1"]
    comparing += ["--schedules", "every:2", "--budgets", "", "--timed", "0", "--no-bound", "--batch-size", "1"]
    assert main([*comparing, "--only", "reuse", "--out", str(tmp_path)]) == 0
    assert "| reuse" in capsys.readouterr().out


def test_settings_of_the_scheduler_are_changed(real, tmp_path, capsys):
    folder, options = real
    picture = ["generate", str(folder), PROMPTS[0], *options, "--full", "--out", str(tmp_path / "x.png")]
    assert main(picture) == 0
    plain = (tmp_path / "x.png").read_bytes()
    assert main([*picture, "--scheduler", '{"use_dynamic_shifting": false, "shift": 9.0}']) == 0
    assert (tmp_path / "x.png").read_bytes() != plain
    assert main([*picture, "--vae-tiling"]) == 0
    assert (tmp_path / "x.png").read_bytes() == plain  # it fits in one piece
    assert main([*picture, "--variant", "fp8"]) == 2
    assert "fp8" in capsys.readouterr().err


def test_a_lora_is_put_on_before_all_else(real, tmp_path):
    folder, options = real
    pipe = lesa.load(folder, torch_dtype=torch.bfloat16, variant="bf16")
    pipe.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "proj_out"]))
    layers = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers, weight_name="x.safetensors")

    def picture(*more: str) -> bytes:
        drawing = ["generate", str(folder), PROMPTS[0], *options, "--full", "--out", str(tmp_path / "x.png")]
        assert main([*drawing, *more]) == 0
        return (tmp_path / "x.png").read_bytes()

    lora = ["--lora", str(tmp_path / "lora" / "x.safetensors")]
    plain, changed = picture(), picture(*lora)
    assert plain != changed and changed == picture(*lora, "--offload", "none")
