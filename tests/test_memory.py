import json
import runpy
import sys
from pathlib import Path

import lesa
from lesa.host.tap import tap_of
from lesa.predictors import Origin, configuration

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "memory.py"
PROMPTS = ["small red apple on white, left", "large blue fish on grey, right", "large green pear on white, left"]
CALL = dict(height=32, width=32, num_inference_steps=10, max_sequence_length=16)
FEATURE = 16 * 24 * 4
"""16 image tokens of 24 channels; the outputs have 16."""


def test_what_histories_hold_is_printed(tiny_flux, tmp_path, monkeypatch, capsys):
    model, folder = tmp_path / "model", tmp_path / "predictor"
    tiny_flux.save_pretrained(model)
    (model / "call.json").write_text(json.dumps(CALL))
    (model / "prompts").mkdir()
    (model / "prompts" / "heldout.txt").write_text("\n".join(PROMPTS))
    transformer = tiny_flux.transformer
    tiny_flux("an apple", **CALL, output_type="latent")
    origin = Origin(
        model="tiny",
        transformer=type(transformer).__name__,
        config=configuration(transformer),
        tap=tap_of(transformer, "output"),
        grid=tuple(lesa.rows.grid.from_scheduler(tiny_flux.scheduler).tolist()),
        schedule="paper:4",
    )
    lesa.L2P(origin, memory=2).save_pretrained(folder)
    options = ["--pairs", "2", "--batch-size", "1", "--schedule", "paper:4", "--histories", "model", "int8"]
    monkeypatch.setattr(sys, "argv", ["memory.py", "--model", str(model), *options, "--predictors", str(folder)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if "|" in line]
    lines = [[cell.strip() for cell in line] for line in printed]
    rows = [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]
    assert [(row["method"], row["tap"], row["history"]) for row in rows] == [
        (*case, history)
        for case in (("Taylor-2", "feature"), ("Taylor-2", "output"), ("L2P (output tap)", "output"))
        for history in ("model", "int8")
    ]
    share = {(row["method"], row["tap"], row["history"]): float(row["of authors'"].rstrip("%")) / 100 for row in rows}
    scratch, scales = FEATURE, 16 * 4
    assert share["Taylor-2", "feature", "model"] == round((3 * FEATURE + scratch) / (16 * FEATURE), 3)
    assert share["Taylor-2", "feature", "int8"] == round((FEATURE * 1.5 + 2 * scales + scratch) / (16 * FEATURE), 3)
    assert share["L2P (output tap)", "output", "model"] == round(3 * FEATURE * 16 / 24 / (16 * FEATURE), 3)
    assert all(row["difference, dB [95 %]"] == "-" for row in rows[::2])
    assert all("[" in row["PSNR, dB [95 %]"] and "[" in row["difference, dB [95 %]"] for row in rows[1::2])
