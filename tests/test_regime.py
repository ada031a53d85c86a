"""benchmarks/regime.py: what few steps lose and where a run changes, of any model of diffusers."""

import json
import runpy
import sys
from pathlib import Path

import pytest
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "regime.py"


def test_thirds_of_the_recorded_ratios_are_those_that_are_spoken_of():
    thirds = runpy.run_path(str(SCRIPT))["thirds"]
    assert thirds(FLUX_MAG_RATIOS.tolist()) == pytest.approx([0.60, 0.08, 0.30], abs=0.005)
    assert thirds([1.0, 2.0, 1.0, 0.5, 0.5, 1.0]) == pytest.approx([0.693, 0.693, 0.693], abs=1e-3)


def test_a_model_has_its_line_and_the_real_one_too(tiny_flux, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tiny"
    tiny_flux.save_pretrained(folder)
    call = dict(height=32, width=32, num_inference_steps=12, max_sequence_length=16)
    (folder / "call.json").write_text(json.dumps(call))
    (folder / "prompts").mkdir()
    (folder / "prompts" / "validation.txt").write_text("a red apple\na blue fish\n")
    monkeypatch.setattr(sys, "argv", ["regime.py", str(folder), "--pairs", "2"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [row[0] for row in rows] == ["model", rows[1][0], "tiny", "FLUX.1-dev, recorded"]
    mean, lowest, highest = map(float, rows[2][2:5])
    assert rows[2][1] == "2" and lowest <= mean <= highest <= 60
    ours, real = (list(map(float, row[5:8])) for row in rows[2:])
    apart = sum(abs(one - other) for one, other in zip(ours, real, strict=True))
    assert float(rows[2][8]) == pytest.approx(apart, abs=0.02)
