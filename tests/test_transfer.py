import json
import runpy
import sys
from pathlib import Path

import torch

import lesa
from lesa.host.tap import tap_of
from lesa.predictors import Origin, configuration
from lesa.rows.grid import from_scheduler

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "transfer.py"
PROMPTS = ["small red apple on white, left", "large blue fish on grey, right"]
CALL = dict(height=32, width=32, num_inference_steps=6, max_sequence_length=16)


def test_what_a_predictor_keeps_elsewhere_is_printed(tiny_flux, tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    tiny_flux.save_pretrained(model)
    (model / "call.json").write_text(json.dumps(CALL))
    (model / "prompts").mkdir()
    (model / "prompts" / "heldout.txt").write_text("\n".join(PROMPTS))
    tiny_flux("an apple", **CALL, output_type="latent")
    transformer = tiny_flux.transformer
    origin = Origin(
        model="tiny",
        transformer=type(transformer).__name__,
        config=configuration(transformer),
        tap=tap_of(transformer),
        grid=tuple(from_scheduler(tiny_flux.scheduler).tolist()),
        schedule="at:0,1,4",
    )
    predictor = lesa.L2P(origin, memory=2)  # untrained, so that it is Taylor-1
    with torch.no_grad():
        predictor.coefficients["cond"][2:4] += torch.tensor([0.5, -0.5])
    predictor.save_pretrained(model / "lesa" / "mine")
    conditions = ["as trained", "true guidance 2", "upper case"]
    options = ["--pairs", "2", "--predictors", "mine", "--conditions", *conditions]
    monkeypatch.setattr(sys, "argv", ["transfer.py", "--model", str(model), *options])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr()
    lines = [line.split("|")[1:-1] for line in printed.out.splitlines() if "| mine" in line]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert [(row[0], row[2]) for row in cells] == [*zip(conditions, ["yes", "refuses", "yes"], strict=True)]
    assert "trained for the streams cond, got 'uncond'" in printed.out + printed.err
    for row in cells:
        ours, plain, difference = (float(row[k].split()[0]) for k in (3, 4, 5))
        assert abs(ours - plain - difference) < 0.02 and difference < 0  # spoilt rows are worse than Taylor's
