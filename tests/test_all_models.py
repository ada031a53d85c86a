"""benchmarks/all.py: one line for each method, schedule and model, and what it says of calibrated rows."""

import importlib
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import lesa
from lesa.bench.lines import DIFFERING, DRIFT, FLOAT_PSNR, Record, Start
from lesa.bench.records import REFERENCE, Comparison
from lesa.learn.metrics import Interval
from lesa.predictors.curve import SOLVED, Point, Tried

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PAIRS = [("a red apple", 4), ("a blue fish", 5), ("a pear", 6)]
MACHINE = dict(date="2026-11-27T09:00:00", cpu="fast", torch="2.13.0", diffusers="0.42.1")
METHODS = {  # share of FLOPs, and the drift of each pair
    REFERENCE: (1.0, (-120, -120, -120)),
    ("calibrated", "at:0,5,9"): (0.3, (-50, -51, -52)),
    ("calibrated", "at:0,9"): (0.2, (-40, -41, -42)),
    ("reuse", "at:0,4,8"): (0.3, (-45, -46, -47)),
    ("UniPC", "at:0,4,7"): (0.3, (-49, -52, -52)),
    ("Taylor", "at:0,3,8"): (0.3005, (-55, -56, -57)),
    ("cache", "its own"): (0.25, (-39, -40, -41)),
    ("few", "1 steps"): (0.1, (-1, -1, -1)),
}
KINDS = {
    ("fewer steps", "8 steps"): "fewer steps",
    ("calibrated", "at:0,5"): "calibrated",
    ("UniPC-2 at planned times", "at:0,5"): "sampler",
    ("LESA", "paper:7"): "paper",
    ("LESA-CONTINUOUS (output tap)", "at:0,5"): "trained",
    ("Lagrange-3", "at:0,5"): "untrained",
}


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("measured")


@pytest.fixture
def all_models(monkeypatch, results):
    return importlib.import_module("all")


def comparison() -> Comparison:
    setting = {"pairs": PAIRS, "call": {"num_inference_steps": 10, "height": 64}}
    found = Comparison(setting)
    found.add(Start(MACHINE, tuple({"name": name, "schedule": on} for name, on in METHODS)))
    for key, (share, drifts) in METHODS.items():
        for pair, drift in zip(PAIRS, drifts, strict=True):
            scores = {DRIFT: float(drift), FLOAT_PSNR: 15.0 - drift, DIFFERING: 0.1}
            full = tuple(range(round(share * 10)))
            found.add(Record(*key, *pair, min(60.0, 15.0 - drift), 0.9, True, full, scores, (), share))
    return found


def test_a_method_is_held_against_the_calibrated_rows_that_take_no_more(results):
    """Those with the most full steps among them; 'above' if the whole interval is."""
    lines = {one.method: one for one in results.lines("tiny", comparison(), "abc") if one.method != "calibrated"}
    assert {name: one.calibrated for name, one in lines.items()} == {
        "reuse": "above",
        "UniPC": "level",
        "Taylor": "below",
        "cache": "above",
        "few": "",
    }
    assert lines["reuse"].less_drift == pytest.approx(5) and lines["reuse"].more_psnr == pytest.approx(5)
    assert lines["cache"].less_drift == pytest.approx(1)  # the calibrated rows of 0.3 of the FLOPs take more
    assert lines["few"].less_drift is None


def test_a_line_says_what_it_is_of(results):
    (line,) = [one for one in results.lines("tiny", comparison(), "abc") if one.method == "reuse"]
    assert (line.model, line.schedule, line.budget, line.pairs, line.commit) == ("tiny", "at:0,4,8", 3, 3, "abc")
    assert line.seeds == "4 to 6" and line.call == "height=64, num_inference_steps=10"
    assert (line.date, line.cpu, line.torch, line.diffusers) == ("2026-11-27", "fast", "2.13.0", "0.42.1")
    assert line.drift == -46 and line.drift_low <= line.drift <= line.drift_high < 0
    assert line.psnr == 60 and line.float_psnr == pytest.approx(61)


def test_lines_are_read_as_they_were_written(results, tmp_path):
    lines = results.lines("tiny", comparison(), "abc def")
    results.write(tmp_path / "deeper" / "tiny.csv", lines)
    again = results.read(tmp_path / "deeper")
    assert [asdict(one) for one in again] == [pytest.approx(asdict(one), abs=1e-4) for one in lines]


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.1, 2, "above"), (-1, 1, "level"), (0, 1, "level"), (-2, -1, "below")]
)
def test_an_interval_is_above_0_holds_it_or_is_below(results, low, high, word):
    assert results.verdict_of(Interval((low + high) / 2, low, high)) == word


def test_the_commits_that_a_folder_was_measured_at_are_kept(results, tmp_path):
    now = results.commit(tmp_path)
    assert now == results.commit(tmp_path) and len(now.split()) == 1
    (tmp_path / "commits").write_text("before\n")
    assert results.commit(tmp_path) == f"before {now}"


def tried(rows: object, schedule: str, drift: float) -> Tried:
    return Tried(rows if isinstance(rows, str) else repr(rows), schedule, (drift, drift))


def test_rows_without_training_run_on_what_was_planned_for_them_and_the_best_on_the_solved_schedule(all_models):
    known = [tried(SOLVED, "at:0,5", -50), tried(lesa.Reuse(), "at:0,5", -30), tried(lesa.Lagrange(1), "at:0,5", -40)]
    known += [tried(lesa.Reuse(), "at:0,4", -35)]
    point = Point(2, -51, tuple(known), {}, 1.0)
    plans = all_models.planned_for(point)
    assert {rows: str(schedule) for rows, schedule in plans.items()} == {
        repr(lesa.Reuse()): "at:0,4",
        repr(lesa.Lagrange(1)): "at:0,5",
    }
    assert all_models.on_its_schedule(point, plans) == []  # Lagrange-1 is the best there, and it is planned for it
    better = Point(2, -51, (*known, tried(lesa.Reuse(), "at:0,5", -45)), {}, 1.0)
    (method,) = all_models.on_its_schedule(better, plans)
    assert method.key == ("reuse (output tap), calibrated schedule", "at:0,5")


def test_a_model_without_weights_is_skipped_and_the_others_are_not(all_models, results, tmp_path, monkeypatch, capsys):
    (tmp_path / "one" / "transformer").mkdir(parents=True)
    (tmp_path / "one" / "transformer" / "model.safetensors").touch()
    cases = tuple(all_models.Case(name, str(tmp_path / name)) for name in ("one", "other"))
    monkeypatch.setattr(all_models, "CASES", cases)
    monkeypatch.setattr(all_models, "measure", lambda case, out: results.lines(case.name, comparison(), "abc"))
    monkeypatch.setattr("sys.argv", ["all.py", "--results", str(tmp_path / "results")])
    all_models.main()
    assert f"other: skipped, {tmp_path / 'other'} has no weights" in capsys.readouterr().out
    assert {line.model for line in results.read(tmp_path / "results")} == {"one"}


# --- the pages


@pytest.fixture
def tables(monkeypatch, results):
    return importlib.import_module("tables")


def test_kinds_of_methods(results):
    lines = [replace(results.lines("tiny", comparison(), "abc")[0], method=name, schedule=on) for name, on in KINDS]
    assert [line.kind for line in lines] == list(KINDS.values())


def test_pages_have_what_the_results_say(tables, results):
    """The figures of every block are those of results/*.csv: `python benchmarks/tables.py` writes them."""
    lines = results.read()
    changed = [str(page) for page in tables.PAGES if tables.written(page.read_text(), lines) != page.read_text()]
    assert not changed


def test_a_figure_that_is_not_in_the_results_is_seen(tables, results):
    lines = results.lines("tiny", comparison(), "abc")
    page = tables.written("before\n<!-- table: everywhere -->\n<!-- end of table -->\nafter\n", lines)
    assert "-56.0 (Taylor)" in page and page.startswith("before\n") and page.endswith("\nafter\n")
    assert tables.written(page, lines) == page
    assert tables.written(page.replace("-56.0 (Taylor)", "-57.0 (Taylor)"), lines) == page


def test_tables_with_figures_in_no_block_are_named_with_the_command_that_prints_them(tables):
    """Of a row that names dB, or a column that does."""
    for page in tables.PAGES:
        rows = [line for line in tables.BLOCK.sub("", page.read_text()).splitlines() if line.startswith("|")]
        name = str(page.relative_to(tables.ROOT))
        assert any(", dB" in row for row in rows) <= (name in tables.OTHERWISE), name
    for name, command in tables.OTHERWISE.items():
        text = (tables.ROOT / name).read_text()
        assert not re.match("make|python|lesa", command) or command.partition(" bench-")[0] in text, name


def test_what_is_planned_is_held_apart_from_what_is_not(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    page = importlib.import_module("like_for_like")
    methods = [
        ("calibrated", "at:0,9", "5.00", -50.0),
        ("reuse (output tap)", "at:0,8", "5.00", -40.0),
        ("Lagrange-1", "at:0,7", "5.00", -47.0),
        ("cache", "threshold 1", "4.00", -45.0),
        ("fewer steps, UniPC", "10 steps", "5.00", -20.0),
        ("L2P", "at:0,7", "5.00", -49.0),
        ("UniPC-2 at planned times", "at:0,6", "5.00", -41.0),
        ("cache@plan", "at:0,5", "5.00", -42.0),
    ]
    results = ["| method | schedule | step ratio | drift |", "| --- | --- | --- | --- |"]
    results += [f"| {name} | {on} | {ratio} | {drift:.3f} |" for name, on, ratio, drift in methods]
    heads = ["method", "schedule", "FLOP ratio", "calibrated at no more FLOPs", "its schedule", ""]
    equal = [f"| {' | '.join(heads)} |", "| --- | --- | --- | --- | --- | --- |"]
    verdicts = ["level", "level", "above", "above", "level", "above", "below"]
    for (name, on, ratio, _), word in zip(methods[1:], verdicts, strict=True):
        equal.append(f"| {name} | {on} | {ratio} | calibrated | at:0,9 | {word} |")
    empty = ["| cost |", "| --- |", "", "| differences |", "| --- |", ""]
    found = page.table("\n".join(["# A page", "", *results, "", *empty, *equal])).splitlines()[2:]
    cells = {row[0]: row[1:] for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in found)}
    assert cells["without training, planned"] == ["2", "0", "2", "0", "3.0", "0"]
    assert cells["other projects' caches, settings of their own"] == ["1", "1", "0", "0", "5.0", "0"]
    assert cells["samplers with fewer steps"] == ["1", "1", "0", "0", "30.0", "1"]
    assert cells["trained, planned"] == ["1", "0", "1", "0", "1.0", "0"]
    assert cells["samplers at planned times"] == ["1", "1", "0", "0", "9.0", "0"]
    assert cells["other projects' caches on plans"] == ["1", "0", "0", "1", "8.0", "0"]
    assert cells["a run of 500 steps"] == ["0", "0", "0", "0", "", "0"]
