import runpy
import sys
from pathlib import Path

import pytest

from lesa.bench import records
from lesa.bench.lines import Record, Start
from lesa.bench.records import REFERENCE

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "claims.py"
PAIRS = [["a red apple", 0], ["a blue fish", 1]]
MANY, PAPER, PLANNED = "LESA-CONTINUOUS (output tap)", "paper:7", "at:0,14,28,35,41,44,46,47,48,49"
SIX, OTHER_SIX = "at:0,25,39,44,47,49", "at:0,30,40,45,48,49"
FULL = {REFERENCE: 50, (MANY, SIX): 6, ("reuse", OTHER_SIX): 6}
METHODS = {  # PSNR and drift
    REFERENCE: (60.0, -120.0),
    ("fewer steps", "10 steps"): (50.0, -40.0),
    ("Taylor-1 (our tap)", PAPER): (44.0, -27.0),
    ("Taylor-2 (our tap)", PAPER): (45.0, -26.0),
    ("L2P", PAPER): (46.5, -28.0),
    ("L2P (per step)", PAPER): (47.0, -29.0),
    ("L2P (output tap)", PAPER): (52.0, -45.0),
    ("LESA", PAPER): (46.0, -28.0),
    ("LESA (phase 1)", PAPER): (59.0, -50.0),
    ("reuse", PLANNED): (59.1, -50.0),
    ("Lagrange-3", PLANNED): (58.5, -53.0),
    ("L2P", PLANNED): (59.9, -59.0),
    (MANY, PLANNED): (60.0, -56.0),
    ("LESA-CONTINUOUS (output tap, phase 1)", PLANNED): (30.0, -20.0),
    ("LESA", PLANNED): (59.5, -54.0),
    ("LESA (phase 1)", PLANNED): (60.0, -57.0),
    ("reuse", OTHER_SIX): (54.5, -44.0),
    (MANY, SIX): (55.0, -49.0),
}


def printed(folder: Path, methods: dict, monkeypatch, capsys, drift: bool = True) -> str:
    with records.writing(folder, {"model": "models/one", "pairs": PAIRS, "batch_size": 2}) as log:
        log.add(Start({}, tuple({"name": name, "schedule": on, "recipe": {}} for name, on in methods)))
        for key, (psnr, drifted) in methods.items():
            full, scores = tuple(range(FULL.get(key, 10))), {"drift": drifted} if drift else {}
            log.add(*(Record(*key, *pair, psnr, 0.9, True, full, scores) for pair in PAIRS))
    monkeypatch.setattr(sys, "argv", ["claims.py", str(folder)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    return capsys.readouterr().out


def test_each_claim_has_its_lines(tmp_path, monkeypatch, capsys):
    text = printed(tmp_path, METHODS, monkeypatch, capsys)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line][2:]
    assert "models/one, 2 held-out pairs" in text
    taylor, calmest = f"Taylor-2 (our tap), {PAPER}", f"Taylor-1 (our tap), {PAPER}"
    assert [(row[1], row[3], row[4], row[5].split()[0], row[6].split()[0], row[7]) for row in rows] == [
        ("10", f"{taylor}; {calmest}", "+6.00", "+15.00", "+29.00", "yes"),
        ("10", f"reuse, {PLANNED}; Lagrange-3, {PLANNED}", "+2.00", "+0.90", "+3.00", "yes"),  # by its drift
        ("6", f"reuse, {OTHER_SIX}", "+2.00", "+0.50", "+5.00", "no"),  # these pictures are not next to identical
        ("6, 10", f"{taylor}; {calmest}", "+0.00", "+10.00", "+22.00", "yes"),
        ("10", taylor, "+1.00", "+1.00", "+2.00", "yes"),
        ("10", f"LESA, {PLANNED}", "-2.00", "+0.50", "+2.00", "yes"),
    ]
    assert "headroom +2.00" in rows[-2][0] and [row[2].split(",")[0] for row in rows[-2:]] == ["LESA", MANY]


def test_a_run_that_lacks_records_claims_nothing(tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="on every:1 has no drift"):
        printed(
            tmp_path / "old",
            {REFERENCE: (60.0, 0.0), ("reuse", "at:0"): (50.0, -40.0)},
            monkeypatch,
            capsys,
            drift=False,
        )
    text = printed(tmp_path / "few", {REFERENCE: (60.0, -120.0), (MANY, PLANNED): (60.0, -56.0)}, monkeypatch, capsys)
    assert text.count("\n|") == 2  # the head and its rule alone
