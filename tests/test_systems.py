import runpy
import sys
from pathlib import Path

from lesa.bench import records
from lesa.bench.lines import Cost, Record, Start
from lesa.bench.records import REFERENCE

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "systems.py"
PAIRS = [["a red apple", 0], ["a blue fish", 1]]
PSNR = {
    REFERENCE: 60.0,
    ("fewer steps", "2 steps"): 30.0,
    ("Taylor-1 (our tap)", "paper:4"): 33.0,
    ("Taylor-2 (our tap)", "paper:4"): 32.0,
    ("L2P", "paper:4"): 34.5,
    ("LESA", "paper:4"): 34.0,
    ("LESA (phase 1)", "paper:4"): 50.0,
    ("reuse", "at:0,3"): 41.0,
    ("Lagrange-1 (output tap)", "at:0,2"): 42.0,
    ("LESA", "at:0,3"): 42.5,
    ("LESA (output tap)", "at:0,2"): 43.0,
}


def test_each_system_has_its_lines(tmp_path, monkeypatch, capsys):
    for model in ("one", "other"):
        setting = {"model": f"models/{model}", "pairs": PAIRS, "batch_size": 2}
        with records.writing(tmp_path / model, setting) as log:
            log.add(Start({}, tuple({"name": name, "schedule": on, "recipe": {}} for name, on in PSNR)))
            for key, psnr in PSNR.items():
                full = (0, 1, 2, 3) if key == REFERENCE else (0, 2)
                log.add(*(Record(*key, *pair, psnr + k, 0.9, True, full) for k, pair in enumerate(PAIRS)))
            log.add(Cost("LESA", "paper:4", (0, 2), bytes_held=2500))
    monkeypatch.setattr(sys, "argv", ["systems.py", *(str(tmp_path / model) for model in ("one", "other"))])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if "|" in line][2:]
    assert "- models/one: 2 pairs, 4 steps" in printed and [row[0] for row in rows] == ["one"] * 6 + ["other"] * 6
    assert [(row[2], row[3], row[7], row[8]) for row in rows[:6]] == [
        ("fewer steps", "2 steps", "-", "+4.00 [+4.00, +4.00]"),
        ("Taylor-1 (our tap)", "paper:4", "-", "+1.00 [+1.00, +1.00]"),
        ("L2P", "paper:4", "-", "-0.50 [-0.50, -0.50]"),
        ("LESA", "paper:4", "2.5", ""),
        ("Lagrange-1 (output tap)", "at:0,2", "-", "+1.00 [+1.00, +1.00]"),
        ("LESA (output tap)", "at:0,2", "-", ""),
    ]
    assert rows[3][4:7] == ["34.50 [34.00, 35.00]", "0.900", "100.0%"]
