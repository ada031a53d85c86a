"""Predictors in the files of LESA's authors: read without running anything, and equal row by row."""

import json
import os
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import BSpline

import lesa
from lesa.bench.models import MODELS, grid_of
from lesa.cli import main
from lesa.host import tap
from lesa.predictors import LESA, Predictor
from lesa.predictors.convert import convert, read
from lesa.rows import plan
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

BY_NAME = {model.name.split("/")[1]: model for model in MODELS}
HERE = Tap(("transformer_blocks",), "norm_out")
MEMORIES = (4, 8, 8)
CASES = {  # model, streams, bounds, are the KANs as wide as S + 1
    "flux": ("FLUX.1-dev", ("",), (0.9, 0.5), True),
    "flux, S times": ("FLUX.1-dev", ("",), (0.9, 0.5), False),
    "qwen": ("Qwen-Image", ("_cond", "_uncond"), (0.9, 0.4), True),
    "qwen, S times": ("Qwen-Image", ("_cond", "_uncond"), (0.9, 0.4), False),
    "hunyuanvideo": ("HunyuanVideo", ("",), (0.9, 0.5), True),
    "hunyuanvideo, S times": ("HunyuanVideo", ("",), (0.9, 0.5), False),
}
Named = dict[str, torch.Tensor]


# --- files as the authors' code writes them


@dataclass
class KANConfig:
    grid_size: int = 5
    hidden: list = field(default_factory=lambda: [256, 256])


@dataclass
class SolverConfig:
    learning_rate: float = 1e-4


@dataclass
class ModelConfig:
    kan: Any = None
    memories: tuple = MEMORIES


@dataclass
class Config:
    model: Any = None
    solver: Any = None


def weights(inputs: int, streams=("",), memories=MEMORIES, hidden=(16, 16), seed=0) -> Named:
    """Random weights under the authors' names, bfloat16 as theirs are."""
    generator = torch.Generator().manual_seed(seed)
    found, widths = {}, [inputs, *hidden, 1]
    for stream in streams:
        for stage, memory in enumerate(memories):
            found[f"latent{stream}.{stage}.weight"] = torch.randn(1, memory, generator=generator)
            found[f"latent{stream}.{stage}.bias"] = torch.randn(1, generator=generator)
            for layer in range(len(widths) - 1):
                name, size = f"timestep{stream}.{stage}.layers.{layer}.", (widths[layer + 1], widths[layer])
                found[name + "grid"] = (torch.arange(-3, 9) * 1.2 - 3).expand(widths[layer], -1).contiguous()
                found[name + "base_weight"] = torch.randn(*size, generator=generator) / widths[layer] ** 0.5
                found[name + "spline_weight"] = torch.randn(*size, 8, generator=generator) / widths[layer] ** 0.5
                found[name + "spline_scaler"] = torch.rand(*size, generator=generator)
    return {name: tensor.bfloat16() for name, tensor in found.items()}


def write(path: Path, model: Any, **more: Any) -> Path:
    """Save a checkpoint whose configuration is of classes in a module that is not there when it is read."""
    parameters = [torch.nn.Parameter(torch.randn(3))]
    optimiser = torch.optim.AdamW(parameters, lr=1e-4)
    parameters[0].sum().backward()
    optimiser.step()
    falling = torch.optim.lr_scheduler.StepLR(optimiser, 500, 0.5)
    module = ModuleType("predictor.model.config")
    for kind in (Config, ModelConfig, KANConfig, SolverConfig):
        kind.__module__, module.__dict__[kind.__name__] = module.__name__, kind
    packages = {name: ModuleType(name) for name in ("predictor", "predictor.model")}
    sys.modules.update({**packages, module.__name__: module})
    try:
        config = Config(ModelConfig(KANConfig()), SolverConfig())
        entries = dict(model=model, optimizer=optimiser.state_dict(), scheduler=falling.state_dict(), config=config)
        torch.save({**entries, **more}, path)
    finally:
        for name in (*packages, module.__name__):
            del sys.modules[name]
    return path


# --- their forward, from the paper's equations, in float64


def kan(named: Named, name: str, x: np.ndarray) -> np.ndarray:
    """Apply efficient-kan's layers to x (inputs,): base(silu(x)) and scaled cubic B-splines on each input's knots."""
    layer = 0
    while f"{name}.layers.{layer}.grid" in named:
        of = {
            k.rsplit(".", 1)[1]: v.double().numpy() for k, v in named.items() if k.startswith(f"{name}.layers.{layer}.")
        }
        y = of["base_weight"] @ (x / (1 + np.exp(-x)))
        for i, (xi, knots) in enumerate(zip(x, of["grid"], strict=True)):
            basis = [BSpline.basis_element(knots[k : k + 5], extrapolate=False)(xi) for k in range(len(knots) - 4)]
            y += (of["spline_weight"][:, i] @ np.nan_to_num(basis)) * of["spline_scaler"][:, i]
        x, layer = y, layer + 1
    return x


def forecast(named: Named, stream: str, bounds, grid: np.ndarray, step: int, past: list[np.ndarray], inputs: int):
    """h_s = h_{s-1} + KAN(t_s - grid) (sum_k w_k h_{s-k} + b)"""
    stage = sum(grid[step] <= bound for bound in bounds)
    alpha = kan(named, f"timestep{stream}.{stage}", grid[step] - grid[:inputs])[0]
    w = named[f"latent{stream}.{stage}.weight"][0].double().numpy()
    z = named[f"latent{stream}.{stage}.bias"].double().item()
    for k in range(1, len(w) + 1):
        z = z + w[k - 1] * past[-k]
    return past[-1] + alpha * z


def row(named: Named, stream: str, bounds, grid: np.ndarray, step: int, inputs: int) -> tuple[np.ndarray, float]:
    """Coefficients and offset of a forecast, read off the identity."""
    zero = [np.zeros(step)] * step
    offset = forecast(named, stream, bounds, grid, step, zero, inputs)
    return forecast(named, stream, bounds, grid, step, list(np.eye(step)), inputs) - offset, offset[0]


# --- the rows


@pytest.mark.parametrize("case", CASES)
def test_rows_are_theirs(case, tmp_path):
    name, streams, bounds, whole = CASES[case]
    model = BY_NAME[name]
    grid = grid_of(model, 50)
    named = weights(50 + whole, streams)
    predictor = convert(read(write(tmp_path / "x.pt", named)), model, HERE, grid, Schedule.paper(7))
    predictor.save_pretrained(tmp_path / "ours")
    loaded = Predictor.from_pretrained(tmp_path / "ours")
    stages = set()
    for stream in streams:
        ours = plan.compile(loaded.for_stream(stream.strip("_") or "cond"), grid, Schedule.paper(7)).rows
        for step in (6, 25, 49):
            coefficients, offset = row(named, stream, bounds, grid.numpy(), step, 50 + whole)
            past = list(ours[step].past)
            stages.add(loaded.stages[step])
            np.testing.assert_allclose(ours[step].coefficients, coefficients[past], atol=1e-5, rtol=1e-5)
            assert ours[step].offset == pytest.approx(offset, abs=1e-5, rel=1e-5)
            assert not np.delete(coefficients, past).any() and np.abs(coefficients[past[:-1]]).max() > 1e-4
    assert stages == {0, 1, 2} and loaded.bounds == bounds


def test_the_published_size_carries_over_with_its_knots(tmp_path):
    named = weights(51, hidden=(256, 256))
    model = BY_NAME["FLUX.1-dev"]
    predictor = convert(read(write(tmp_path / "x.pt", named)), model, HERE, grid_of(model), Schedule.paper(7))
    kept = predictor.state_dict()
    assert kept["experts.cond.0.kan.1.knots"].shape == (256, 12)
    assert 1.796875 in kept["experts.cond.2.kan.0.knots"][0]  # 1.8 in bfloat16
    assert sum(p.numel() for p in predictor.parameters()) == 2_365_440 + 4 + 8 + 8 + 3
    coefficients, offset = row(named, "", (0.9, 0.5), grid_of(model).numpy(), 45, 51)
    ours = predictor.row(grid_of(model), 45, list(range(37, 45)))
    np.testing.assert_allclose(ours.coefficients.detach(), coefficients[37:], atol=1e-5, rtol=1e-5)
    assert ours.offset.item() == pytest.approx(offset, abs=1e-5, rel=1e-5)


def test_each_input_keeps_its_own_knots(tmp_path):
    named = weights(9)
    knots = named["timestep.1.layers.0.grid"]
    knots += torch.arange(9).unsqueeze(-1) / 8  # exact in bfloat16 but for rounding, which is theirs
    grid = torch.linspace(1, 0, 9, dtype=torch.float64)
    predictor = convert(read(write(tmp_path / "x.pt", named)), BY_NAME["FLUX.1-dev"], HERE, grid, Schedule.paper(4))
    torch.testing.assert_close(predictor.state_dict()["experts.cond.1.kan.0.knots"], knots.float(), atol=0, rtol=0)
    (alpha,) = kan(named, "timestep.1", (grid[3] - grid).numpy())
    assert predictor.alphas("cond")[3].item() == pytest.approx(alpha, abs=1e-5)


def test_weights_of_a_history_in_the_order_of_time_are_taken_so(tmp_path):
    found, grid = read(write(tmp_path / "x.pt", weights(9))), torch.linspace(1, 0, 9)
    converted = [
        convert(found, BY_NAME["FLUX.1-dev"], HERE, grid, Schedule.paper(4), order=order).state_dict()
        for order in ("newest", "oldest")
    ]
    assert torch.equal(converted[0]["experts.cond.1.weight"], converted[1]["experts.cond.1.weight"].flip(0))
    assert torch.equal(converted[1]["experts.cond.1.weight"], weights(9)["latent.1.weight"][0].float())


# --- what is refused


class Command:
    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Evaluated(Command):
    def __reduce__(self):
        return eval, (f"__import__('os').system({self.command!r})",)


@pytest.mark.parametrize("kind", [Command, Evaluated])
@pytest.mark.parametrize("form", ["config", "model", "weight", "whole", "legacy", "pickle"])
def test_a_hostile_file_is_refused_and_not_run(kind, form, tmp_path):
    mark, path = tmp_path / "was-run", tmp_path / "x.pt"
    hostile = kind(f"touch {mark}")
    if form == "config":
        write(path, weights(9), config=hostile)
    elif form == "model":
        write(path, hostile)
    elif form == "weight":
        write(path, {**weights(9), "latent.0.bias": hostile})
    elif form == "pickle":
        path.write_bytes(pickle.dumps({"model": hostile}, protocol=2))
    else:
        torch.save(hostile, path, _use_new_zipfile_serialization=form == "whole")
    with pytest.raises(ValueError, match=r"is refused, and nothing in it was run.*(system|eval|exec)"):
        read(path)
    assert not mark.exists()
    if form in ("whole", "legacy"):  # and it would have been
        torch.load(path, weights_only=False)
        assert mark.exists()


def test_other_classes_of_theirs_are_refused(tmp_path):
    module = ModuleType("predictor.model.solver")

    class Solver:
        pass

    Solver.__module__, Solver.__qualname__, module.Solver = module.__name__, "Solver", Solver
    packages = {"predictor": ModuleType("predictor"), "predictor.model": ModuleType("predictor.model")}
    sys.modules.update({**packages, module.__name__: module})
    try:
        torch.save({"model": weights(9), "config": Solver()}, tmp_path / "x.pt")
    finally:
        for name in (*packages, module.__name__):
            del sys.modules[name]
    with pytest.raises(ValueError, match=r"refused.*predictor.model.solver.Solver"):
        read(tmp_path / "x.pt")


def changed(**more: Any) -> Named:
    return {
        k: v for k, v in {**weights(9), **{k.replace("__", "."): v for k, v in more.items()}}.items() if v is not None
    }


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({}, "weights under 'model'"),
        (torch.zeros(3), "weights under 'model'"),
        (changed(latent__3__weights=torch.zeros(1)), "got 'latent.3.weights'"),
        (changed(latent__0__bias=3), "a int"),
        (changed(latent__0__bias=torch.zeros(1, dtype=torch.int64)), "int64"),
        (changed(latent__0__bias=torch.zeros(())), "dimensions"),
        (changed(latent__0__layers__0__grid=torch.zeros(9, 12)), "got 'latent.0.layers.0.grid'"),
        (changed(timestep__0__weight=torch.zeros(1, 4)), "got 'timestep.0.weight'"),
        (changed(latent__1__weight=None), "none for 'experts.cond.1.weight'"),
        (changed(timestep__2__layers__1__base_weight=None), "none for 'experts.cond.2.kan.1.base'"),
        (
            changed(
                timestep__0__layers__0__grid=None, timestep__0__layers__1__grid=None, timestep__0__layers__2__grid=None
            ),
            "none whole",
        ),
        (changed(timestep__1__layers__1__base_weight=torch.zeros(16, 15)), "shape (16, 16)"),
        (changed(latent__2__weight=torch.zeros(2, 8)), "got shape (2, 8)"),
        (changed(latent__0__weight=torch.full((1, 4), torch.nan)), "finite"),
        (changed(timestep__0__layers__1__grid=torch.zeros(16, 12)), "rise"),
        (changed(timestep__0__layers__0__grid=torch.zeros(9, 11)), "degree 2"),
        (changed(timestep__0__layers__2__base_weight=torch.zeros(2, 16)), "2 numbers"),
        (changed(**{"timestep.1.layers.3.grid": torch.zeros(1, 12)}), "'experts.cond.1.kan.3.knots' beside them"),
        ({**weights(9), **weights(9, ("_cond",))}, "one stream, without a name"),
        (weights(9, ("_uncond",)), "one stream, without a name"),
        (weights(12), "a grid of 11 or 12 steps, got one of 8"),
        (weights(8, memories=(4, 8)), "3 stages"),
    ],
)
def test_weights_that_do_not_fit_are_refused(model, words, tmp_path):
    path, grid = write(tmp_path / "x.pt", model), torch.linspace(1, 0, 9)
    with pytest.raises(ValueError) as error:
        convert(read(path), BY_NAME["FLUX.1-dev"], HERE, grid, Schedule.paper(4))
    assert words in str(error.value)


# --- the command


def test_the_command_writes_a_predictor_that_runs(tiny_flux, call, tmp_path, capsys):
    tiny_flux.save_pretrained(tmp_path / "tiny")
    write(tmp_path / "x.pt", weights(8))
    (tmp_path / "tiny" / "call.json").write_text(json.dumps(dict(height=32, width=32, num_inference_steps=8)))
    options = ["--model", "flux", "--pipeline", str(tmp_path / "tiny"), "--grid", "8", "--interval", "3"]
    out = tmp_path / "ours"
    assert main(["convert", str(tmp_path / "x.pt"), *options, "--bounds", "0.9,0.5", "--out", str(out)]) == 0
    assert "3 stages of 4, 8, 8 past features, streams cond" in capsys.readouterr().out
    entries = json.loads((out / "config.json").read_text())
    assert entries["training"]["file"] == "x.pt" and len(entries["training"]["converted"]) == 64
    assert entries["schedule"] == "paper:3" and entries["options"]["remembers_forecasts"]
    with lesa.accelerate(tiny_flux, Predictor.from_pretrained(out)) as run:
        latents = tiny_flux("small red apple on white, left", **call).images
    assert run.summary()["cond"].full_steps == 5 and torch.isfinite(latents).all()


@pytest.mark.parametrize(
    ("model", "kind", "place", "module", "streams"),
    [
        ("flux", "FLUX.1-dev", "feature", "norm_out", ("",)),
        ("qwen", "Qwen-Image", "feature", "proj_out", ("_cond", "_uncond")),
        ("qwen-lightning", "Qwen-Image-Lightning", "norm", "norm_out", ("",)),
        ("hunyuanvideo", "HunyuanVideo", "feature", None, ("",)),
    ],
)
def test_each_model_is_converted_at_its_tap(model, kind, place, module, streams, tmp_path, monkeypatch):
    blocks = ("transformer_blocks", "single_transformer_blocks")
    monkeypatch.setitem(tap.TAPS, "HunyuanVideoTransformer3DModel", Tap(blocks, None))
    write(tmp_path / "x.pt", weights(21, streams))
    options = ["--model", model, "--grid", "20", "--interval", "7", "--tap", place, "--out", str(tmp_path / "ours")]
    assert main(["convert", str(tmp_path / "x.pt"), *options]) == 0
    predictor = Predictor.from_pretrained(tmp_path / "ours")
    assert isinstance(predictor, LESA) and predictor.origin.tap.module == module
    assert len(predictor.origin.streams) == len(streams) and predictor.bounds[1] == (0.4 if "qwen" in model else 0.5)
    torch.testing.assert_close(predictor.grid, grid_of(BY_NAME[kind], 20))
    assert json.loads(json.dumps(predictor.origin.config)) == json.loads(json.dumps(dict(BY_NAME[kind].config)))


def test_a_grid_is_steps_times_or_a_file(tmp_path, capsys):
    write(tmp_path / "x.pt", weights(5))
    times = [1.0, 0.75, 0.5, 0.25, 0.0]
    (tmp_path / "grid.json").write_text(json.dumps({"grid": times}))
    (tmp_path / "times.json").write_text(json.dumps(times))
    for grid in ("4", "1,0.75,0.5,0.25,0", str(tmp_path / "grid.json"), str(tmp_path / "times.json")):
        options = ["--model", "flux-schnell", "--grid", grid, "--schedule", "at:0,2", "--out", str(tmp_path / "ours")]
        assert main(["convert", str(tmp_path / "x.pt"), *options]) == 0
        assert Predictor.from_pretrained(tmp_path / "ours").grid.tolist() == times
    options[3] = "soon"
    assert main(["convert", str(tmp_path / "x.pt"), *options]) == 2
    assert "--grid is a number of steps" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nowhere.pt"), *options]) == 2
    assert "nowhere.pt" in capsys.readouterr().err


def test_the_models_of_the_command_are_known():
    from lesa.cli.facts import CONVERTED

    assert set(CONVERTED.values()) == {model.name for model in MODELS}
