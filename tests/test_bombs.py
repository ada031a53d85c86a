"""Small files and texts that claim absurd sizes are refused before anything of that size is made."""

import io
import json
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_convert import BY_NAME, HERE, weights, write
from test_predictor import STEPS, continuous, flux_grid, origin
from test_trajectory import trajectory
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lesa.bench.models import build, grid_of
from lesa.cli.options import read_seeds
from lesa.host.pipelines import check_call, with_call
from lesa.learn.trajectory import Trajectory
from lesa.predictors import L2P, LESA, Predictor
from lesa.predictors import base as predictors
from lesa.predictors.convert import convert, read
from lesa.predictors.kan import KANLayer
from lesa.rows.grid import validate
from lesa.rows.plan import Plan
from lesa.rows.schedule import MOST_STEPS, Schedule

MADE = 200_000
"""Numbers: more than the files here hold, and fewer than they claim."""
KINDS = {"lesa": lambda: LESA(origin(), hidden=(4,), grid_size=3), "l2p": lambda: L2P(origin()), "many": continuous}
PARTS = 5000


class _Small(TorchDispatchMode):
    """Lets no operation make a large tensor that takes memory."""

    def __torch_dispatch__(self, function, _types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(made, torch.Tensor) and not made.is_meta:
                held = made.untyped_storage().nbytes() // made.element_size()
                assert held <= MADE, f"{function} made {tuple(made.shape)}"
        return result


with _Small():
    torch.empty(0)  # its first use imports much


@contextmanager
def little() -> Iterator[None]:
    """Fail if much is made: a large tensor, many modules, or more than 20 MB of Python's objects."""
    count = 0

    def made(*_: Any) -> None:
        nonlocal count
        count += 1
        assert count <= PARTS, "too many modules"

    hook = nn.modules.module.register_module_module_registration_hook(made)
    tracemalloc.start()
    try:
        with _Small():
            yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        hook.remove()
    assert peak < 20e6, f"{peak / 1e6:.0f} MB"


# --- predictors


def bomb(folder, make, entries=(), **options: Any):
    """Save a predictor, and let its configuration claim something else under its own right digest."""
    make().save_pretrained(folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    del config["sha256"]
    config.update(entries)
    config["options"].update(options)
    digest = predictors._digest(config, (folder / "model.safetensors").read_bytes())
    file.write_text(json.dumps({**config, "sha256": digest}))
    return folder


@pytest.mark.parametrize("size", [10**4, 10**9, 10**18, 10**40], ids="{:.0e}".format)
@pytest.mark.parametrize(
    ("kind", "claim"),
    [
        ("lesa", lambda n: dict(hidden=[n])),
        ("lesa", lambda n: dict(hidden=[n, n])),
        ("lesa", lambda n: dict(grid_size=n)),
        ("lesa", lambda n: dict(memories=[n * 100, 8, 8])),
        ("l2p", lambda n: dict(memory=n)),
        ("many", lambda n: dict(hidden=[n, n])),
        ("many", lambda n: dict(grid_size=n)),
        ("many", lambda n: dict(order=n)),
    ],
    ids=lambda x: x if isinstance(x, str) else str(x(1)),
)
def test_sizes_are_those_of_the_weights(kind, claim, size, tmp_path):
    folder = bomb(tmp_path, KINDS[kind], **claim(size))
    with little(), pytest.raises(ValueError, match="holds no whole predictor"):
        Predictor.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["lesa", "many"])
def test_parts_are_few(kind, tmp_path):
    bounds = [1 - k / 300 for k in range(299)]
    many = dict(bounds=bounds, hidden=[1] * 40)
    folder = bomb(tmp_path, KINDS[kind], **many, **({"memories": [1] * 300} if kind == "lesa" else {}))
    with little(), pytest.raises(ValueError, match=r"at most 1000 parts .*, got 24600"):
        Predictor.from_pretrained(folder)


def test_streams_are_few(tmp_path):
    folder = bomb(tmp_path, KINDS["lesa"], {"streams": [f"s{k}" for k in range(6000)]})
    with little(), pytest.raises(ValueError, match="at most 1000 parts"):
        Predictor.from_pretrained(folder)


def test_a_predictor_starts_from_its_weights_and_fits_nothing(tmp_path, monkeypatch):
    """Starting takes the cube of grid_size, of which weights are the first power."""
    made = {kind: make() for kind, make in KINDS.items()}
    for kind, predictor in made.items():
        predictor.save_pretrained(tmp_path / kind)

    def fit(*_: Any) -> None:
        raise AssertionError("fitted")

    monkeypatch.setattr(KANLayer, "_fit", fit)
    monkeypatch.setattr(LESA, "_absorb", fit)
    for kind, predictor in made.items():
        loaded = Predictor.from_pretrained(tmp_path / kind)
        assert loaded.digest() == predictor.digest()
        assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in predictor.parameters()]


@pytest.mark.parametrize(
    ("schedules", "words"),
    [
        ([[flux_grid(MOST_STEPS + 1).tolist(), ["every:1"]]], "at most 2000 steps"),
        ([[flux_grid(STEPS).tolist(), ["every:2:9999999999"]]], None),
        ([[flux_grid(STEPS).tolist(), ["every:1"] * 1000]], "at most 1000 grids and schedules, got 1001"),
        ([[[1.0, 2.0, 0.0], ["every:1"]]], "fall at every step|lie in"),
    ],
    ids=["grid", "rule", "many", "rising"],
)
def test_schedules_fit_their_grids(schedules, words, tmp_path):
    folder = bomb(tmp_path, KINDS["many"], schedules=schedules)
    with little():
        if words is None:
            assert len(Predictor.from_pretrained(folder).schedule_for(flux_grid(STEPS)).numbers) == STEPS
        else:
            with pytest.raises(ValueError, match=words):
                Predictor.from_pretrained(folder)


def test_a_configuration_is_short(tmp_path, monkeypatch):
    folder = bomb(tmp_path / "long", KINDS["l2p"], {"data": "0" * predictors.MOST_BYTES})
    with pytest.raises(ValueError, match="at most 1048576 bytes"):
        L2P(origin(data="0" * predictors.MOST_BYTES)).save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").iterdir())
    monkeypatch.setattr(predictors, "_read", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ValueError, match="has at most 1048576 bytes"):
        Predictor.from_pretrained(folder)


# --- schedules, grids, plans, calls


@pytest.mark.parametrize("rule", ["every:1:{}", "every:7:{}", "paper:7:{}", "paper:{0}:{0}"])
def test_a_rule_makes_no_more_steps_than_the_run_has(rule):
    for number in (10**6, 99999999999, 10**40):
        with little():
            full = Schedule.parse(rule.format(number)).full_steps(50, 2)
        assert full == tuple(range(2, 50))


@pytest.mark.parametrize("rule", ["every:{}", "every:{}:1", "ratio:{}", "at:0,{}"])
def test_absurd_rules_are_no_more_than_a_full_step(rule):
    schedule = Schedule.parse(rule.format(99999999999))
    with little():
        if schedule.rule == "at":
            with pytest.raises(ValueError, match="below 50, got 99999999999"):
                schedule.full_steps(50)
        else:
            assert schedule.full_steps(50) == (0,)


@pytest.mark.parametrize("steps", [10**6, 10**11])
def test_runs_are_of_steps_that_there_are(steps):
    with little():
        with pytest.raises(ValueError, match=f"at most 2000 steps, got {steps}"):
            Schedule.every(1).full_steps(steps)
        with pytest.raises(ValueError, match=f"at most 2000 steps, got {steps}"):
            grid_of(BY_NAME["FLUX.1-dev"], steps)
        with pytest.raises(ValueError, match=f"at most 2000 steps, got {steps}"):
            with_call(object(), {"num_inference_steps": steps})
    assert len(Schedule.every(1).full_steps(MOST_STEPS)) == MOST_STEPS
    with pytest.raises(ValueError, match="at most 2000 steps"):
        validate(flux_grid(MOST_STEPS + 1))


def test_the_numbers_of_a_call_are_pixels_frames_and_tokens():
    check_call({"height": 16384, "guidance_scale": 1e9, "sigmas": [1.0], "negative_prompt": None})
    for name in ("height", "num_frames", "max_sequence_length"):
        with pytest.raises(ValueError, match=f"at most 16384, got {name}=1000000000"):
            with_call(object(), {name: 10**9})


def test_layers_of_a_configuration_are_not_made_without_end():
    model = BY_NAME["FLUX.1-dev"]
    config = {**model.config, "num_layers": 1001, "attention_head_dim": 16, "num_attention_heads": 1}
    with little(), pytest.raises(ValueError, match="at most 1000 layers"):
        build(replace(model, config=config))


def test_a_plan_is_held_against_its_rows_step_by_step():
    times, row = flux_grid(MOST_STEPS).tolist(), {"past": [], "coefficients": [], "offset": 0.0}
    rows = {step: row for step in range(1, MOST_STEPS)}
    entries = dict(times=times, full=[0], start=0, memory=10**30, remembers_forecasts=True, rows=rows, truncated=[])
    text = json.dumps({"format": "lesa-plan-1", **entries})
    with tracemalloc_below(8e6), pytest.raises(ValueError, match="got a row for"):
        Plan.from_json(text)


@contextmanager
def tracemalloc_below(most: float) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most, f"{peak / 1e6:.0f} MB"


def test_seeds_are_few():
    with little(), pytest.raises(Exception, match="at most 1000000 seeds"):
        read_seeds("0:9999999")


# --- checkpoints


def expanded(**more: torch.Tensor):
    return {**weights(9), **{name.replace("__", "."): tensor for name, tensor in more.items()}}


@pytest.mark.parametrize("size", [10**5, 10**12])
@pytest.mark.parametrize(
    "claim",
    [
        lambda n: expanded(latent__0__weight=torch.zeros(1).expand(1, n)),
        lambda n: expanded(timestep__0__layers__0__spline_weight=torch.zeros(1, dtype=torch.bfloat16).expand(16, 9, n)),
        lambda n: expanded(timestep__0__layers__0__base_weight=torch.zeros(1, dtype=torch.bfloat16).expand(n, 9)),
        lambda n: expanded(optimiser=torch.zeros(1).expand(n)),
    ],
)
def test_a_checkpoint_holds_all_its_numbers(claim, size, tmp_path):
    path = write(tmp_path / "x.pt", claim(size))
    with little(), pytest.raises(ValueError, match=r"is refused: .* claim to be \d+ numbers"):
        read(path)


def test_what_a_checkpoint_says_of_its_kans_is_held_against_its_weights(tmp_path):
    """The widths of the first KAN would make a predictor of their product."""
    wide = {f"timestep.0.layers.{k}.base_weight": torch.zeros(4000, 9).bfloat16() for k in range(2)}
    path, grid = write(tmp_path / "x.pt", {**weights(9), **wide}), torch.linspace(1, 0, 9)
    found = read(path)
    with little(), pytest.raises(ValueError, match=r"of shape \(4000, 9, 8\), as those"):
        convert(found, BY_NAME["FLUX.1-dev"], HERE, grid, Schedule.paper(4))


def test_a_converted_predictor_keeps_its_own_numbers(tmp_path):
    """Two names of one tensor are two weights."""
    model = weights(9)
    model["latent.2.weight"] = model["latent.1.weight"]
    path, grid = write(tmp_path / "x.pt", {k: t.float() for k, t in model.items()}), torch.linspace(1, 0, 9)
    predictor = convert(read(path), BY_NAME["FLUX.1-dev"], HERE, grid, Schedule.paper(4), order="oldest")
    first, second = (predictor.stage_experts("cond")[k].weight for k in (1, 2))
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()
    assert all(p.requires_grad and p.is_leaf for p in predictor.parameters())


def test_a_compressed_checkpoint_is_refused(tmp_path, monkeypatch):
    write(tmp_path / "x.pt", weights(9), padding=torch.zeros(10**6))
    packed = io.BytesIO()
    with zipfile.ZipFile(tmp_path / "x.pt") as whole, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as small:
        for name in whole.namelist():
            small.writestr(name, whole.read(name))
    (tmp_path / "x.pt").write_bytes(packed.getvalue())
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match=r"stored as it is, got \d+ bytes that unpack to 4\d{6}"):
        read(tmp_path / "x.pt")


# --- recorded runs


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(latents=torch.zeros(9, 3, 2)), "latents is"),
        (dict(latents=torch.zeros(0, 10**9, 10**6)), "latents is"),
        (dict(tokens=torch.zeros(0, dtype=torch.int64)), "have tokens"),
        (dict(grid=torch.zeros(5, dtype=torch.float64)), "fall from a run"),
        (dict(grid=flux_grid(MOST_STEPS + 1)), "at most 2000 steps"),
        (dict(full=(0, 99999999999)), "99999999999"),
        (dict(features={"cond": torch.zeros(4, 2, 5), "uncond": torch.zeros(4, 3, 5)}), "features.cond is"),
        (dict(conditioning={"cond": torch.zeros(3, 6), "uncond": torch.zeros(4, 6)}), "conditioning.cond is"),
    ],
)
def test_the_parts_of_a_recorded_run_are_of_one_size(change, words, tmp_path):
    replace(trajectory(), **change).save(tmp_path / "x.safetensors")
    with little(), pytest.raises(ValueError, match=rf"is no whole trajectory .*{words}"):
        Trajectory.load(tmp_path / "x.safetensors")


def test_the_header_of_weights_is_held_against_the_file(tmp_path):
    """It is what everything here leans on."""
    save_file({"x": torch.zeros(4)}, tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data.replace(b"[4]", b"[9]"))
    with pytest.raises(ValueError, match="is no whole trajectory"):
        Trajectory.load(tmp_path / "x")
