"""The command from end to end on a tiny pipeline: collect, train, compare, draw; and its errors."""

import json
import re
import runpy
import shutil
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import TRAINED

from lesa.bench import benchmark, records
from lesa.bench.methods import forecast
from lesa.cli import learn, main
from lesa.cli.options import read_schedules, read_seeds
from lesa.host import needs, pipelines
from lesa.learn import outcome
from lesa.predictors import L2P, Predictor
from lesa.predictors.base import FILES
from lesa.predictors.shelf import Shelf
from lesa.rows.schedule import Schedule

STEPS = 10
CALL = dict(height=32, width=32, num_inference_steps=STEPS, max_sequence_length=16)
PROMPTS = {
    "heldout": ["small red apple on white, left", "large blue fish on grey, right", "large green pear on white, left"],
    "train": ["small blue pear on grey, left", "large red fish on white, right", "small green fish on grey, right"],
    "validation": ["large red apple on grey, left"],
}
TRAIN = ["train", "MODEL", "--data", "OUT", "--validation-prompts", "EMPTY", "--out", "OUT"]


@pytest.fixture(scope="module")
def model(tiny_flux, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-flux")
    tiny_flux.save_pretrained(folder)
    (folder / "call.json").write_text(json.dumps(CALL))
    (folder / "prompts").mkdir()
    for split, prompts in PROMPTS.items():
        (folder / "prompts" / f"{split}.txt").write_text("\n".join(prompts) + "\n\n")
    return folder


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "runs"
    prompts = model / "prompts" / "train.txt"
    assert (
        main(["collect", str(model), "--prompts", str(prompts), "--limit", "2", "--seeds", "0:2", "--out", str(folder)])
        == 0
    )
    return folder


@pytest.fixture(scope="module")
def predictor(model, runs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("predictors") / "lesa"
    assert train(model, runs, folder) in TRAINED
    return folder


def train(model: Path, runs: Path, out: Path, *more: str) -> int:
    validation = model / "prompts" / "validation.txt"
    arguments = ["--data", runs, "--validation-prompts", validation, "--schedule", "paper:4", "--out", out]
    settings = ["--rounds", "1", "--updates", "3", "3"]
    return main(["train", str(model), *map(str, arguments), *settings, *more])


def results(folder: Path) -> list[records.Result]:
    return records.load(folder).results()


def bench(model: Path, out: Path, *more: str) -> int:
    options = ["--pairs", "2", "--timed", "0", "--budgets", "", "--schedules", "paper:4", "--out", str(out), "--all"]
    return main(["bench", str(model), *options, *more])


def test_demo_compares_on_held_out_prompts(model, tmp_path, capsys):
    out = tmp_path / "out" / "demo"
    options = ["--pairs", "2", "--timed", "1", "--schedules", "paper:4,at:0,3,6", "--out", str(out)]
    options += ["--budgets", ""]
    assert main(["demo", "--model", str(model), *options]) == 0
    printed = capsys.readouterr()
    names = ["fewer steps", "Taylor-1 (our tap)", "Taylor-2 (our tap)"]
    assert [result.method for result in results(out)] == ["all full", *names, *names]
    assert [result.full_steps for result in results(out)] == [10, 5, 5, 5, 3, 3, 3]
    assert all(result.seconds > 0 for result in results(out))
    assert records.load(out).setting["pairs"] == [[prompt, k] for k, prompt in enumerate(PROMPTS["heldout"][:2])]
    plots = {"psnr-over-ratio.png", "psnr-over-speedup.png", "error-per-step.png", "rows.png"}
    assert plots <= {path.name for path in out.iterdir()}
    assert printed.out.count("| Taylor-1 (our tap) |") == 4  # on each schedule, in the tables of quality and of cost
    assert "no predictor" in printed.err
    assert Image.open(out / "pictures.png").width > 7 * 128


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, but for its locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_demo_begins_anew_and_leaves_what_is_none_of_its_own(model, tmp_path, capsys):
    demo = ["demo", "--model", str(model), "--timed", "0", "--schedules", "at:0,3", "--budgets", "2"]
    demo += ["--out", str(tmp_path), "--pairs"]
    (tmp_path / "pictures").mkdir()
    for name in ("pictures/holiday.jpg", "notes.txt"):
        (tmp_path / name).write_text("another's")
    assert main([*demo, "1"]) == 0
    first = contents(tmp_path)
    assert first["pictures/holiday.jpg"] == first["notes.txt"] == b"another's"
    made = {name for name in first if "/" not in name} - {"notes.txt", "records.jsonl"}
    assert made <= set(records.WRITTEN) and records.PLANNED in made
    assert main([*demo, "1"]) == 0
    assert contents(tmp_path).keys() == first.keys()
    assert first["records.jsonl"] != contents(tmp_path)["records.jsonl"]  # another start
    before = contents(tmp_path)
    capsys.readouterr()
    assert main([*demo, "2"]) == 2
    assert "records of another pairs" in capsys.readouterr().err and contents(tmp_path) == before


def test_a_demo_does_not_remove_a_benchmark(model, tmp_path, capsys):
    assert bench(model, tmp_path, "--no-bound", "--only", "reuse") == 0
    before = contents(tmp_path)
    assert main(["demo", "--model", str(model), "--pairs", "2", "--out", str(tmp_path)]) == 2
    assert "records of another command" in capsys.readouterr().err and contents(tmp_path) == before
    assert bench(model, tmp_path, "--no-bound", "--only", "reuse", "--anew", "--pairs", "1") == 2
    assert "records of another pairs" in capsys.readouterr().err and contents(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "training.png", "ground-truth/config.json"])
def test_training_writes_over_nothing(model, runs, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(pipelines, "load", None)  # nothing is loaded before it is known
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    calibrate = ["calibrate", str(model), "--prompts", str(model / "prompts" / "train.txt"), "--out", str(tmp_path)]
    commands = [lambda: train(model, runs, tmp_path)]
    commands += [lambda: main(calibrate)] if name in FILES else []  # it writes a predictor there and nothing else
    for command in commands:
        assert command() == 2
        assert f"{Path(name).name}; name another folder" in capsys.readouterr().err
    assert contents(tmp_path) == {name: b"{}"}


def test_training_removes_its_own_runs_alone(model, runs, tmp_path):
    others = "rounds/recorded/holiday.jpg", "rounds/recorded/trained-0/00000-0.safetensors", "rounds/notes.txt"
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("another's")
    for _ in range(2):
        assert train(model, runs, tmp_path, "--method", "l2p") == 0
        kept = {name for name in contents(tmp_path) if name.startswith("rounds/recorded/")}
        assert kept == set(others[:2]) and contents(tmp_path)[others[2]] == b"another's"


def test_bench_sets_a_trained_predictor_beside_the_others(model, predictor, tmp_path, capsys):
    named = ["--predictors", str(predictor), str(predictor / "ground-truth")]
    assert bench(model, tmp_path, *named) == 0
    printed = capsys.readouterr().out
    found = {result.method: result for result in results(tmp_path)}
    assert {"reuse", "LESA", "LESA (phase 1)", "bound (output tap)"} < set(found)
    assert found["LESA"].full_steps == 5 and found["LESA"].seconds is None
    for other in ("LESA (phase 1)", "reuse", "fewer steps", "Taylor-1 (our tap)", "bound (output tap)"):
        assert f"LESA - {other}" in printed
    file = tmp_path / "records.jsonl"
    before = file.read_text()
    trained = next(k for k, line in enumerate(before.splitlines(), start=1) if '"method": "LESA"' in line)
    reproduce = ["reproduce", str(file), str(trained), "--predictors"]
    assert main([*reproduce, str(predictor)]) == 0
    assert main([*reproduce, str(predictor / "ground-truth")]) == 2
    assert main([*reproduce, str(predictor), "--steps", "5"]) == 2
    errors = capsys.readouterr().err
    assert "is not at hand" in errors and "leave --steps out" in errors
    assert file.read_text() == before


def test_bench_sets_peers_beside_the_others(model, tmp_path, capsys):
    options = ["--no-bound", "--fine", "14", "--differences", "reuse", "--only", "reuse", "PAB (diffusers)"]
    assert bench(model, tmp_path, "--peers", "pab", *options) == 0
    printed, file = capsys.readouterr().out, tmp_path / "records.jsonl"
    assert "PSNR to 14 steps" in printed and "reuse at no more FLOPs" in printed
    found = {result.method: result for result in results(tmp_path)}
    assert 1 < found["PAB (diffusers)"].step_ratio < 2 and found["more steps"].full_steps == 14
    line = next(k for k, text in enumerate(file.read_text().splitlines(), start=1) if '"method": "PAB' in text)
    assert main(["reproduce", str(file), str(line)]) == 0
    assert bench(model, tmp_path, "--peers", "nobody") == 2
    assert "the peers are" in capsys.readouterr().err


def test_a_model_without_prompts_is_planned_for_on_recorded_runs(model, runs, tmp_path, capsys):
    bare = shutil.copytree(model, tmp_path / "bare", ignore=shutil.ignore_patterns("prompts"))
    options = ["--prompts", str(model / "prompts" / "heldout.txt"), "--schedules", "", "--budgets", "4", "--no-bound"]
    options += ["--only", "reuse"]
    assert bench(bare, tmp_path / "out", *options) == 2
    assert "name its folder as --data" in capsys.readouterr().err
    assert bench(bare, tmp_path / "out", *options, "--data", str(runs)) == 0
    assert [result.full_steps for result in results(tmp_path / "out")] == [10, 4]


def test_a_run_that_is_there_is_not_measured_again(model, tmp_path, monkeypatch, capsys):
    only = ["--no-bound", "--only", "reuse"]
    assert bench(model, tmp_path, *only) == 0
    first, written = capsys.readouterr().out, results(tmp_path)
    monkeypatch.setattr(benchmark, "observe", None)
    assert bench(model, tmp_path, *only) == 0
    assert results(tmp_path) == written and capsys.readouterr().out.splitlines()[:8] == first.splitlines()[:8]
    assert bench(model, tmp_path, *only, "--pairs", "3") == 2
    assert "records of another pairs" in capsys.readouterr().err
    with pytest.raises(TypeError):  # what is to be measured anew is
        bench(model, tmp_path, *only, "--anew")


def test_a_report_is_made_of_the_records_alone(model, tmp_path, capsys):
    assert bench(model, tmp_path, "--no-bound", "--timed", "1", "--only", "reuse", "fewer steps") == 0
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".md", ".png")}
    for name in made:
        (tmp_path / name).unlink()
    assert main(["report", str(tmp_path)]) == 0
    again = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".md", ".png")}
    assert again.keys() == made.keys() and again["report.md"] == made["report.md"]
    assert np.array_equal(*(np.asarray(Image.open(BytesIO(of["pictures.png"]))) for of in (made, again)))
    assert "| skipped step, ms |" in made["report.md"].decode()
    capsys.readouterr()
    assert main(["report", str(tmp_path), "--differences", "reuse"]) == 0
    assert "| reuse - fewer steps |" in capsys.readouterr().out
    assert main(["report", str(tmp_path), "--differences", "oracle"]) == 2
    assert "got 'oracle'" in capsys.readouterr().err


def test_two_runs_are_compared(model, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert bench(model, first, "--no-bound", "--only", "reuse") == 0
    assert main(["compare", str(first), str(first)]) == 0
    assert capsys.readouterr().out.count("no |") == 2
    second.mkdir()
    lines = (first / "records.jsonl").read_text().splitlines()
    better = [{**json.loads(line), "batch": None} for line in lines]
    better[0]["format"] = "lesa-records-1"  # nobody sealed these
    for line in better:
        if line.get("method") == "reuse":
            line["psnr"] += 0.5
    (second / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in better))
    assert main(["compare", str(first), str(second)]) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| reuse")]
    assert "+0.500 [+0.500, +0.500]" in line and "yes" in line
    assert main(["compare", str(first), str(second), "--tolerance", "0.6"]) == 0
    assert main(["compare", str(first), str(second), "--score", "beauty"]) == 2
    assert "got 'beauty'" in capsys.readouterr().err


def test_free_rows_are_trained_per_step(model, runs, tmp_path, capsys):
    assert train(model, runs, tmp_path / "l2p", "--method", "l2p", "--loss", "steps") in TRAINED
    assert main(["rows", str(tmp_path / "l2p")]) == 0
    assert "Plan of 10 steps, 5 full" in capsys.readouterr().out


def test_the_runs_recorded_once_train_a_predictor_of_the_output_too(model, runs, tmp_path, capsys):
    out = tmp_path / "lesa-output"
    assert train(model, runs, out, "--tap", "output") in TRAINED
    assert json.loads((out / "config.json").read_text())["tap"][1] is None
    assert main(["generate", str(model), "x", "--out", str(tmp_path / "x.png"), "--predictor", str(out)]) == 0
    assert "     5        5        2.00" in capsys.readouterr().out
    assert train(model, runs, out) == 2
    assert "holds a training with other tap" in capsys.readouterr().err


def test_training_leaves_a_curve_and_what_it_took_and_goes_on_where_it_stopped(model, runs, tmp_path, capsys):
    out = tmp_path / "lesa"
    assert train(model, runs, out) in TRAINED
    assert (out / "training.png").exists() == (not needs.lacking("plots"))
    before, trained = (out / "model.safetensors").read_bytes(), Predictor.from_pretrained(out)
    stored = sum(path.stat().st_size for path in runs.glob("*.safetensors"))
    assert trained.origin.training["bytes"] == stored > 0 and trained.origin.training["seconds"] > 0
    assert forecast("LESA", trained, trained.schedule).recipe["bytes"] == stored
    capsys.readouterr()
    assert train(model, runs, out) in TRAINED
    assert (out / "model.safetensors").read_bytes() == before
    assert "update/s" not in capsys.readouterr().err  # nothing was fitted again
    assert "seconds" not in Predictor.from_pretrained(out).origin.training  # nobody knows how long the rounds took


def test_the_recipe_of_the_paper_is_one_option_away(model, runs, tmp_path):
    assert train(model, runs, tmp_path, "--paper") in TRAINED
    entries = json.loads((tmp_path / "config.json").read_text())
    assert entries["options"]["remembers_forecasts"] and entries["options"]["hidden"] == [256, 256]
    assert entries["training"]["loss"] == "features" and entries["training"]["paper"]


@pytest.mark.parametrize(("stages", "count"), [("2", 2), ("learned", None), ("0.8,0.4,0.2", 4)])
def test_stages_are_learned_or_named(model, runs, tmp_path, capsys, stages, count):
    assert train(model, runs, tmp_path, "--stages", stages) in TRAINED
    bounds = json.loads((tmp_path / "config.json").read_text())["options"]["bounds"]
    assert len(bounds) < 6 if count is None else len(bounds) == count - 1
    assert bounds == [0.8, 0.4, 0.2] or count != 4
    assert f"{len(bounds) + 1} stages" in capsys.readouterr().out


def test_what_stages_are_worth_is_printed(model, runs, tmp_path, monkeypatch, capsys):
    options = ["--data", str(runs), "--schedules", "at:0,3,6", "--most", "3", "--rounds", "0", "--updates", "2", "2"]
    options += ["--validation", "1", "--pairs", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["stages.py", "--model", str(model), *options])
    script = Path(__file__).parents[1] / "benchmarks" / "stages.py"
    runpy.run_path(str(script), run_name="__main__")
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| at:")]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert [row[1] for row in cells] == ["1", "2 fixed", "2 learned", "3 fixed", "3 learned", "free rows"]
    assert [len(row[2].split()) for row in cells[1:5]] == [1, 1, 2, 2] and cells[3][2] == "0.90 0.50"
    assert [row[5] == "-" for row in cells] == [False, False, False, True, False, False]
    assert all(float(row[3]) < 0 < float(row[4].split()[0]) for row in cells)


def test_both_fits_of_the_phases_are_printed(model, runs, tmp_path, monkeypatch, capsys):
    options = ["--data", str(runs), "--schedules", "at:0,3,6", "--fits", "least-squares", "gradient", "--rounds", "0"]
    options += ["--validation", "1", "--pairs", "2", "--calibrated", "0", "--methods", "l2p", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["phases.py", "--model", str(model), *options])
    script = Path(__file__).parents[1] / "benchmarks" / "phases.py"
    runpy.run_path(str(script), run_name="__main__")
    lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| 3 ")]
    cells = [[cell.strip() for cell in line] for line in lines]
    assert [row[1] for row in cells] == ["L2P, least-squares", "L2P, gradient"]
    assert all(float(row[4].split()[0]) < 0 < float(row[5].split()[0]) and int(row[6]) > 0 for row in cells)


def test_training_refuses_runs_of_other_weights(model, runs, tmp_path, tiny_flux, capsys):
    bias = tiny_flux.transformer.proj_out.bias
    before = bias.detach().clone()
    try:
        bias.data.add_(1e-2)
        tiny_flux.save_pretrained(tmp_path / "other")
    finally:
        bias.data.copy_(before)
    for part in ("call.json", "prompts"):
        (tmp_path / "other" / part).symlink_to(model / part)
    assert train(tmp_path / "other", runs, tmp_path / "out") == 2
    assert "collected from other weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_steps_of_a_call_count(model, tmp_path, capsys):
    arguments = ["--forecaster", "reuse", "--schedule", "every:2", "--call", '{"num_inference_steps": 4}']
    assert main(["generate", str(model), "x", "--out", str(tmp_path / "x.png"), *arguments]) == 0
    assert "     2        2        2.00" in capsys.readouterr().out


def test_generate_draws_with_and_without_acceleration(model, predictor, tmp_path, capsys):
    def picture(*options: str) -> np.ndarray:
        out = tmp_path / "picture.png"
        assert main(["generate", str(model), PROMPTS["heldout"][0], "--seed", "3", "--out", str(out), *options]) == 0
        return np.asarray(Image.open(out))

    full = picture("--full")
    assert "skipped" not in capsys.readouterr().out
    assert np.array_equal(full, picture("--forecaster", "taylor:1", "--schedule", "every:1"))
    reused = picture("--forecaster", "reuse", "--schedule", "every:5")
    assert "     2        8        5.00" in capsys.readouterr().out
    assert not np.array_equal(full, reused)
    trained = picture("--predictor", str(predictor))
    assert np.square(trained - full.astype(float)).mean() < np.square(reused - full.astype(float)).mean()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["bench"], "MODEL"),
        (["generate", "MODEL", "a prompt", "--schedule", "every:2"], "no predictor is shipped"),
        (["generate", "MODEL", "a prompt", "--schedule", "sometimes"], "a schedule reads"),
        (["generate", "MODEL", "a prompt", "--predictor", "/nowhere"], "nowhere"),
        (["generate", "MODEL", "a prompt", "--forecaster", "oracle"], "got 'oracle'"),
        (["generate", "MODEL", "a prompt", "--forecaster", "reuse"], "which steps are full"),
        (["generate", "MODEL", "a prompt", "--dtype", "float7"], "float7"),
        (["generate", "MODEL", "a prompt", "--call", "height=3"], "--call"),
        (["generate", "MODEL", "a prompt", "--call", '{"colour": 3}'], "got colour"),
        (["generate", "/nowhere/at/all", "a prompt"], "/nowhere/at/all"),
        (["generate", "MODEL", "a prompt", "--device", "cuda:77"], "cuda"),
        (["generate", "MODEL", "a prompt", "--full", "--out", "picture"], "--out names a picture file"),
        (["bench", "MODEL", "--prompts", "/nowhere.txt"], "/nowhere.txt"),
        (["bench", "MODEL", "--prompts", "EMPTY"], "holds no prompt"),
        (["bench", "MODEL", "--pairs", "0"], "at least 1"),
        (["bench", "MODEL", "--out", "EMPTY"], "EMPTY"),
        (["collect", "MODEL", "--prompts", "EMPTY", "--out", "OUT"], "holds no prompt"),
        (["collect", "MODEL", "--prompts", "EMPTY", "--out", "OUT", "--seeds", "3:1"], "at least one seed"),
        ([*TRAIN, "--loss", "steps"], "l2p"),
        ([*TRAIN, "--method", "l2p", "--stages", "2"], "--method lesa"),
        (TRAIN, "lesa collect"),
        (["rows", "/nowhere"], "nowhere"),
    ],
)
def test_errors_are_one_line_and_2(model, tmp_path, monkeypatch, capfd, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("EMPTY").touch()
    try:
        code = main([str(model) if argument == "MODEL" else argument for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("lesa")]
    assert code == 2 and words in line and "Traceback" not in line


def test_a_traceback_is_shown_when_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "rows", str(tmp_path)])


def test_a_stop_is_no_error(monkeypatch, capsys):
    def stopped(_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(learn, "plan", stopped)
    assert main(["plan", "anything"]) == 130
    assert capsys.readouterr().err == "lesa: stopped\n"


def test_without_a_command_there_is_help(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(
        f"\n    {name} " in printed for name in ("demo", "bench", "collect", "train", "generate", "plan", "rows")
    )


@pytest.mark.parametrize(("text", "seeds"), [("0", [0]), ("2:5", [2, 3, 4]), ("7,1", [7, 1])])
def test_seeds_are_read(text, seeds):
    assert read_seeds(text) == seeds


def test_schedules_may_hold_commas():
    assert [str(one) for one in read_schedules("paper:7,at:0,3,9,ratio:5")] == [
        "paper:7",
        "at:0,3,9",
        "ratio:5",
    ]
    assert read_schedules("") == []


def test_plan_prints_a_schedule_for_each_budget(model, runs, capsys):
    common = ["plan", str(model), "--budgets", "2,4", "--forecaster", "taylor:1"]
    assert main(common) == 0
    assert main([*common, "--data", str(runs)]) == 0
    assert main([*common, "--data", str(runs), "--tap", "output"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[2:4] != lines[4:]  # the drift is another one
    for line, budget in zip(lines, [2, 4] * 3, strict=True):
        schedule, drawing, *_ = line.split()
        assert re.search(r"drift -?\d+\.\d dB, -?\d+\.\d dB in real runs$", line)  # promised, and what came of it
        assert schedule.startswith("at:0") and len(schedule.split(",")) == budget == drawing.count("#")


def test_plans_of_recorded_runs_are_for_their_number_of_steps(model, runs, tmp_path, capsys):
    other, prompts = tmp_path / "other", str(model / "prompts" / "train.txt")
    assert main(["collect", str(model), "--prompts", prompts, "--limit", "2", "--steps", "6", "--out", str(other)]) == 0
    plan = ["plan", str(model), "--data", str(other), "--budgets", "2"]
    capsys.readouterr()
    for options in ([], ["--steps", "6"], ["--no-refine"]):
        assert main([*plan, *options]) == 0
        schedule, drawing, *_ = capsys.readouterr().out.split()
        assert len(drawing) == 6 and schedule.startswith("at:0,")
    for options in (["--steps", "10"], ["--call", '{"num_inference_steps": 10}']):
        assert main([*plan, *options]) == 2
        assert "(num_inference_steps=6), got num_inference_steps=10; leave that out" in capsys.readouterr().err
    assert bench(model, tmp_path / "bench", "--data", str(other), "--steps", "10") == 2
    assert "got num_inference_steps=10" in capsys.readouterr().err


def test_a_training_of_no_use_says_so(model, runs, tmp_path, capsys):
    """Nothing is updated here: it ends where it began."""
    prompts, out = str(model / "prompts" / "train.txt"), tmp_path / "out"
    common = ["train", str(model), "--data", str(runs), "--validation-prompts", prompts, "--validation", "2"]
    common += ["--rounds", "0", "--updates", "0", "0", "--schedule", "every:3", "--out", str(out)]
    assert main(common) == outcome.GAINED_NOTHING == 3
    shown = capsys.readouterr()
    assert "the training gained nothing: its runs have a drift of" in shown.err and str(out) in shown.out
    assert Predictor.from_pretrained(out).full == (0, 3, 6, 9)


def test_plans_are_verified_on_held_out_prompts(model, runs, tmp_path, capsys):
    plot, options = tmp_path / "curve.png", ["--data", str(runs), "--budgets", "2,4", "--forecaster", "reuse"]
    prompts = str(model / "prompts" / "train.txt")
    assert main(["plan", str(model), *options, "--verify", "2", "--prompts", prompts, "--plot", str(plot)]) == 0
    printed = capsys.readouterr().out
    assert "2 held-out prompts" in printed and printed.count("| Reuse()") == 2 and printed.count("| fewer steps") == 2
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_one_predictor_is_trained_on_several_collections_and_budgets(model, runs, tmp_path, capsys):
    other, prompts = tmp_path / "other", str(model / "prompts" / "train.txt")
    collected = ["collect", str(model), "--prompts", prompts, "--limit", "2", "--steps", "6", "--out", str(other)]
    assert main(collected) == 0
    options = ["--budgets", "2,3", "--forecaster", "lagrange:1", "--rounds", "1", "--updates", "0", "2"]
    common = [
        "train",
        str(model),
        "--data",
        str(runs),
        str(other),
        "--validation-prompts",
        prompts,
        "--validation",
        "2",
    ]
    assert main([*common, *options, "--out", str(tmp_path / "x")]) == 2
    assert "learns one grid and one schedule, got 2 collections and 2 budgets" in capsys.readouterr().err
    out = tmp_path / "many"
    assert main([*common, *options, "--method", "lesa-continuous", "--out", str(out)]) in TRAINED
    schedules = json.loads((out / "config.json").read_text())["options"]["schedules"]
    assert [len(grid) - 1 for grid, _ in schedules] == [10, 6] and all(len(texts) == 2 for _, texts in schedules)
    picture = str(tmp_path / "x.png")
    assert main(["generate", str(model), "x", "--steps", "7", "--predictor", str(out), "--out", picture]) == 0
    assert "3        4" in capsys.readouterr().out  # full and skipped
    options, again = ["--budgets", "3", "--rounds", "0", "--updates", "0", "0"], tmp_path / "again"
    assert main([*common, *options, "--predictor", str(out), "--out", str(again)]) in TRAINED
    first, second = Predictor.from_pretrained(out), Predictor.from_pretrained(again)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in first.state_dict().items())
    assert second.origin.training["start"] == first.digest() != second.digest()
    assert [len(texts) for _, texts in second.schedules] == [1, 1]


def test_training_begins_with_a_predictor_of_its_kind(model, runs, tmp_path, capsys):
    prompts, first, again = str(model / "prompts" / "train.txt"), tmp_path / "first", tmp_path / "again"
    common = ["train", str(model), "--data", str(runs), "--validation-prompts", prompts, "--validation", "2"]
    common += ["--rounds", "0", "--updates", "20", "0"]
    assert main([*common, "--method", "l2p", "--schedule", "every:3", "--out", str(first)]) in TRAINED
    assert main([*common, "--predictor", str(first), "--updates", "0", "0", "--out", str(again)]) in TRAINED
    old, new = Predictor.from_pretrained(first), Predictor.from_pretrained(again)
    assert (new.method, new.schedule) == ("l2p", Schedule.every(3))
    assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in old.state_dict().items())
    assert L2P(old.origin).digest() != old.digest()  # else what it began with could be a new one
    assert new.origin.training["seconds"] > old.origin.training["seconds"]

    def refused(words: str, *options: str) -> None:
        assert main([*common, "--predictor", str(first), *options, "--out", str(tmp_path / "x")]) == 2
        assert words in capsys.readouterr().err

    refused("keeps to its schedule, every:3", "--budgets", "3")
    refused("keeps to its schedule, every:3", "--schedule", "every:2")
    refused("is for --tap feature, got output", "--tap", "output")
    refused("trains the KANs of a LESA, got a l2p", "--paper")
    refused("as it is; pass it without --stages", "--stages", "2")


def test_a_training_goes_on_only_from_the_predictor_that_it_began_with(model, runs, tmp_path, capsys):
    prompts, out = str(model / "prompts" / "train.txt"), tmp_path / "out"
    common = ["train", str(model), "--data", str(runs), "--validation-prompts", prompts, "--validation", "2"]
    common += ["--rounds", "0", "--updates", "1", "0", "--out", str(out)]
    assert main([*common, "--schedule", "every:3"]) in TRAINED
    assert main([*common, "--predictor", str(out)]) == 2
    assert "start" in capsys.readouterr().err


def test_training_goes_on_with_the_papers_kans(model, runs, tmp_path, capsys):
    prompts, first = str(model / "prompts" / "train.txt"), tmp_path / "first"
    common = ["train", str(model), "--data", str(runs), "--validation-prompts", prompts, "--validation", "2"]
    common += ["--rounds", "0", "--updates", "1", "0"]
    assert main([*common, "--schedule", "every:3", "--paper", "--out", str(first)]) in TRAINED
    again = [*common, "--predictor", str(first)]
    assert main([*again, "--out", str(tmp_path / "free")]) == 2
    assert "free_alphas=False, --paper" in capsys.readouterr().err
    assert main([*again, "--paper", "--out", str(tmp_path / "papers")]) in TRAINED
    assert Predictor.from_pretrained(tmp_path / "papers").remembers_forecasts


def test_a_predictor_for_many_grids_is_trained_again_for_named_schedules_alone(model, runs, tmp_path, capsys):
    prompts, out = str(model / "prompts" / "train.txt"), str(tmp_path / "out")
    common = ["train", str(model), "--data", str(runs), "--validation-prompts", prompts, "--validation", "2"]
    common += ["--rounds", "0", "--updates", "0", "0"]
    many = ["--method", "lesa-continuous", "--tap", "output", "--schedule", "every:3", "--out", out]
    assert main([*common, *many]) in TRAINED
    again = [*common, "--predictor", out, "--out", str(tmp_path / "again")]
    assert main(again) == 2
    assert "name --budgets to plan for it, or --schedule" in capsys.readouterr().err
    assert main([*again, "--schedule", "every:2"]) in TRAINED  # at the output, without saying so
    assert Predictor.from_pretrained(tmp_path / "again").origin.tap.module is None


def test_calibrate_solves_on_a_few_runs(model, tmp_path, capsys):
    options = ["--prompts", str(model / "prompts" / "train.txt"), "--limit", "2", "--budget", "3"]
    assert main(["calibrate", str(model), *options, "--out", str(tmp_path)]) in TRAINED
    entries = json.loads((tmp_path / "config.json").read_text())
    assert entries["method"] == "solved" and len(entries["schedule"].split(",")) == 3
    assert f"on {entries['schedule']}: " in capsys.readouterr().out
    assert main(["generate", str(model), "x", "--predictor", str(tmp_path), "--out", str(tmp_path / "x.png")]) == 0
    (kept,) = Shelf().all()
    bench = ["bench", str(model), "--calibrated", str(kept.folder), "--only", "calibrated", "--schedules", "every:3"]
    bench += ["--budgets", "", "--pairs", "1", "--timed", "0", "--no-bound", "--scores", ""]
    assert main([*bench, "--out", str(tmp_path / "bench")]) == 0
    assert ("calibrated", entries["schedule"]) in records.load(tmp_path / "bench").records


def test_a_collection_grows_by_a_larger_limit(model, tmp_path, capsys):
    """Its first runs keep their bytes, whole batches or not."""
    collect = [
        "collect",
        str(model),
        "--prompts",
        str(model / "prompts" / "train.txt"),
        "--out",
        str(tmp_path / "runs"),
    ]
    assert main([*collect, "--limit", "2"]) == 0
    before = contents(tmp_path / "runs")
    assert main([*collect, "--limit", "3"]) == 0
    after = contents(tmp_path / "runs")
    runs = {name: data for name, data in before.items() if name.endswith(".safetensors")}
    assert len(runs) == 2 and runs.items() <= after.items()
    assert len([name for name in after if name.endswith(".safetensors")]) == 3
    hint = f"next: lesa train {model} --data {tmp_path / 'runs'} --validation-prompts FILE --out FOLDER"
    assert hint in capsys.readouterr().err


def test_rows_are_compared_by_name_the_default_on_its_own_schedule(model, tmp_path):
    assert bench(model, tmp_path, "--no-bound", "--rows", "default", "lagrange:1") == 0
    found = {(result.method, result.schedule): result.full_steps for result in results(tmp_path)}
    assert found[("default", "its own")] == 7  # ceil(10 / 4) + 4
    assert found[("default", "paper:4")] == found[("lagrange:1", "paper:4")] == 5
    assert not [name for name, _ in found if "Taylor" in name]


def test_a_predictor_that_is_named_is_compared_on_its_own_schedule(model, predictor, tmp_path, capsys):
    """Though it is none of those asked for; and refused in runs of another length."""
    named = ["--no-bound", "--rows", "reuse", "--predictors", str(predictor), "--schedules", "every:5"]
    assert bench(model, tmp_path, *named) == 0
    assert {("LESA", "paper:4"), ("reuse", "paper:4"), ("reuse", "every:5")} <= {
        (r.method, r.schedule) for r in results(tmp_path)
    }
    capsys.readouterr()
    assert bench(model, tmp_path / "other", *named, "--steps", "9") == 2
    assert "of 10 steps, got runs of 9" in capsys.readouterr().err


def test_a_plot_of_another_kind_is_asked_for(model, tmp_path):
    assert bench(model, tmp_path, "--no-bound", "--rows", "reuse", "--plots", "svg") == 0
    assert (tmp_path / "psnr-over-ratio.svg").read_text().startswith("<?xml") and not list(tmp_path.glob("psnr*.png"))
