"""FLOPs counted from configurations alone."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lesa.bench import flops, models
from lesa.bench.flops import Cost, count
from lesa.bench.models import MODELS, Model, Size, build
from lesa.cli import main
from lesa.host import tap
from lesa.rows.schedule import Schedule

ROOT = Path(__file__).parents[1]
BY_NAME = {model.name: model for model in MODELS}
PUBLISHED = {  # TFLOPs of a run of 50 steps, and what others count by the same tool
    "black-forest-labs/FLUX.1-dev": (3719.50, 3719.23),
    "Qwen/Qwen-Image": (12917.56, 12917.46),
    "hunyuanvideo-community/HunyuanVideo": (29773.0, 29771.41),
}
SMALL = dict(num_attention_heads=2, attention_head_dim=12)
SMALL_FLUX = dict(SMALL, in_channels=16, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 4))
SMALL_VIDEO = dict(SMALL, in_channels=4, out_channels=4, text_embed_dim=32, pooled_projection_dim=32)
SMALL_MODELS = {
    "flux": Model(
        "x", "FluxTransformer2DModel", dict(SMALL_FLUX, num_layers=3, num_single_layers=2), {}, Size(64, 48, 7)
    ),
    "qwen": Model(
        "x",
        "QwenImageTransformer2DModel",
        dict(SMALL, in_channels=16, out_channels=4, joint_attention_dim=32, axes_dims_rope=(4, 4, 4), num_layers=3),
        {},
        Size(64, 48, 7),
    ),
    "hunyuanvideo": Model(
        "x",
        "HunyuanVideoTransformer3DModel",
        dict(SMALL_VIDEO, rope_axes_dim=(4, 4, 4), num_layers=2, num_single_layers=3, num_refiner_layers=2),
        {},
        Size(64, 48, 7, frames=5),
    ),
}


@pytest.fixture(scope="module")
def counted() -> dict[tuple[str, str], Cost]:
    return {(model.name, place): count(model, place) for model in MODELS for place in flops.PLACES}


@pytest.fixture(scope="module")
def costs(counted) -> dict[str, Cost]:
    return {name: counted[name, "norm"] for name in BY_NAME}


@pytest.mark.parametrize("name", PUBLISHED)
def test_whole_runs_come_out_as_published(costs, name):
    published, counted = PUBLISHED[name]
    model, whole = BY_NAME[name], costs[name].run(Schedule.every(1), 50, BY_NAME[name].streams) / 1e12
    assert model.published == published
    assert whole == pytest.approx(published, rel=1e-3) and round(whole, 2) == counted


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_skipped_step_runs_no_block(costs, name):
    cost = costs[name]
    assert 0 < cost.row < cost.skipped < 3e-4 * cost.full


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_schedule_has_its_published_ratio(costs, name):
    model = BY_NAME[name]
    whole = costs[name].run(Schedule.every(1), model.steps, model.streams)
    assert {run.method for run in model.runs} > {"all full", "LESA N=7"}
    for run in model.runs:
        cost = costs[name].run(run.schedule, run.steps or model.steps, model.streams)
        assert whole / cost == pytest.approx(run.ratio, rel=8e-3)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_one_block_counted_often_is_all_blocks_counted_once(name):
    model = SMALL_MODELS[name]
    transformer = build(model)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        transformer(**flops.INPUTS[model.transformer](transformer.config, model))
    cost = count(model)
    assert cost.full == counter.get_total_flops() > cost.skipped > 0


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_at_the_output_nothing_runs_on_a_skipped_step(name):
    model = SMALL_MODELS[name]
    norm, output = (count(model, place) for place in ("norm", "output"))
    assert output.skipped == 0 and output.full == norm.full
    elements = {"flux": 4 * 3 * 16, "qwen": 4 * 3 * 16, "hunyuanvideo": 2 * 8 * 6 * 4}  # latents, of any shape
    assert output.row == 2 * 8 * elements[name]
    assert norm.row == 2 * 8 * 4 * 3 * 24 * (2 if name == "hunyuanvideo" else 1)  # tokens of 24 channels


@pytest.mark.parametrize("kind", sorted(set(tap.TAPS) & set(flops.INPUTS)))
def test_the_blocks_counted_are_those_that_the_tap_bypasses(kind):
    model = next(model for model in SMALL_MODELS.values() if model.transformer == kind)
    lists = {name for name, child in build(model).named_children() if isinstance(child, torch.nn.ModuleList)}
    assert lists == set(tap.TAPS[kind].blocks)


def test_the_transformer_is_left_whole():
    transformer = build(SMALL_MODELS["flux"])
    with pytest.raises(ZeroDivisionError), flops._one_block_each(transformer, ["transformer_blocks"]) as repeats:
        assert (
            repeats == {"FluxTransformer2DModel.transformer_blocks.0": 2} and len(transformer.transformer_blocks) == 1
        )
        raise ZeroDivisionError
    assert len(transformer.transformer_blocks) == 3


def test_blocks_that_differ_are_not_counted_as_one():
    transformer = build(SMALL_MODELS["flux"])
    transformer.transformer_blocks[1] = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="different ones in 'transformer_blocks'"):
        flops._one_block_each(transformer, ["transformer_blocks"]).__enter__()


def test_a_run_is_its_full_and_its_skipped_steps():
    assert Cost(full=1000, skipped=10, row=1).run(Schedule.at([0, 3]), 5) == 2 * 1000 + 3 * 11
    assert Cost(full=1000, skipped=10, row=1).run(Schedule.at([0, 3]), 5, streams=2) == 2 * (2 * 1000 + 3 * 11)


def test_a_pipelines_folder_is_counted_from_its_configurations(tmp_path, capsys):
    for part in (
        "model_index.json",
        "transformer/config.json",
        "vae/config.json",
        "call.json",
        "scheduler/scheduler_config.json",
    ):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_text((ROOT / "models" / "emoji-qwen" / part).read_text())
    assert main(["flops", "--model", str(tmp_path), "--schedules", "paper:7,at:0,3"]) == 0
    steps, runs, memory = capsys.readouterr().out.split("\n\n")
    cells = [cell.strip() for cell in steps.splitlines()[2].split("|")]
    assert cells[1:5] == [str(tmp_path), "64x64", "23", "2"]
    rows = [[cell.strip() for cell in line.split("|")] for line in runs.splitlines()[2:]]
    assert [row[3:6] for row in rows] == [["paper:7", "50", "10"], ["at:0,3", "50", "2"]]
    assert [cell.strip() for cell in memory.splitlines()[2].split("|")][2] == "4.78 M"
    model = models.read(str(tmp_path), {"height": 128, "negative_prompt": None}, text_tokens=9)
    assert model.size == Size(128, 64, 9) and model.streams == 1
    assert count(model).full > 0


def test_the_real_models_table_is_that_of_the_documents(counted, monkeypatch, capsys):
    monkeypatch.setattr(flops, "count", lambda model, place: counted[model.name, place])
    assert main(["flops"]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed in (ROOT / "docs" / "flops.md").read_text()


def test_other_classes_are_refused(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text(
        json.dumps({"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]})
    )
    assert main(["flops", "--model", str(tmp_path)]) == 2
    assert "got WanTransformer3DModel" in capsys.readouterr().err
    with pytest.raises(ValueError, match="got a WanTransformer3DModel"):
        count(Model("x", "WanTransformer3DModel", {}, {}, Size(64, 64, 8)))
