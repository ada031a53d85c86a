import json
import runpy
import sys
from pathlib import Path

from test_predictor import origin

from lesa.cli import main

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "ablation.py"
CALL = dict(height=32, width=32, num_inference_steps=10, max_sequence_length=16)


def test_mlps_and_kans_are_trained_and_compared(tiny_flux, tmp_path, monkeypatch, capsys):
    model, prompts = tmp_path / "model", tmp_path / "model" / "prompts"
    tiny_flux.save_pretrained(model)
    (model / "call.json").write_text(json.dumps(CALL))
    prompts.mkdir()
    for split, prompt in (("train", "red apple"), ("validation", "blue fish"), ("heldout", "grey pear")):
        (prompts / f"{split}.txt").write_text(prompt)
    runs = tmp_path / "runs"
    assert main(["collect", str(model), "--prompts", str(prompts / "train.txt"), "--out", str(runs)]) == 0
    arguments = ["--model", str(model), "--data", str(runs), "--schedule", "paper:3", "--rates", "0.001"]
    arguments += ["--updates", "2", "2", "--rounds", "1", "--validation", "1", "--pairs", "1"]
    monkeypatch.setattr(sys, "argv", ["ablation.py", *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    numbers = {row[1].strip(): row[2].strip() for row in rows}
    mlp, kan = int(numbers["one MLP"]), int(numbers["one KAN"])
    assert numbers["staged MLP"] == str(3 * mlp) and numbers["staged KAN"] == numbers["LESA"] == str(3 * kan)
    drifts = {row[1].strip(): float(row[4]) for row in rows if row[1].strip() in numbers and "." in row[4]}
    assert set(drifts) == {"one MLP", "one KAN", "staged MLP", "staged KAN", "LESA"}


def test_an_mlp_is_as_large_as_the_kan_in_its_place():
    found = runpy.run_path(str(SCRIPT))
    mlp, kan = found["WithMLP"](origin()), found["LESA"](origin())
    assert 0.9 < found["networks"](mlp) / found["networks"](kan) < 1.1
    rows = mlp.stream_rows("cond", mlp.grid, {step: mlp.past(step) for step in range(50) if step not in mlp.full})
    assert all(abs(float(row.coefficients.sum()) - 1) < 1e-5 for row in rows.values())  # a slope and the newest
