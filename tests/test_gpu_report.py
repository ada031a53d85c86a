"""`make gpu-report`, whose every row is measured with small models on the CPU."""

import json
import signal
import sys
import time
from pathlib import Path

import accelerate
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu
from gpu_loops import Loop, Moved, chosen, flux_call, materialise, pipeline_of, untrained
from gpu_table import ALL_FULL, HEAD, NOT_REACHED, NoTime, Report, Row, reason

import lesa
from lesa.bench.flops import _one_block_each
from lesa.bench.models import build
from lesa.host.offload import GROUPS_ANYWHERE, groups_layers
from lesa.host.tap import tap_of

CPU = torch.device("cpu")
FLUX, QWEN, VIDEO = chosen(tiny=True)
WHOLE = "transformer compiled as a whole"
BEFORE = () if groups_layers() else (f"ValueError: before {GROUPS_ANYWHERE} diffusers",)
REASONS = ("torchao is not installed", "ImportError: DBCache needs cache-dit", *BEFORE)
TOKENS = 12  # of 64 x 48 pixels


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    gpu.main(["--tiny", "--out", str(folder)])
    return folder


@pytest.fixture(scope="module")
def rows(report) -> list[dict]:
    return json.loads((report / "report.json").read_text())["rows"]


def session_of(folder: Path, cases: list[gpu.Case]) -> tuple[gpu.Session, list[list[Row]]]:
    rows = [case.rows() for case in cases]
    report = Report(folder, {}, [row for mine in rows for row in mine], judged=False)
    return gpu.Session(report, CPU, time.perf_counter() + 1e6), rows


def cells_of(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("| ")]
    return [line.strip("| ").split(" | ") for line in lines]


def test_every_row_has_its_figures_or_says_why(rows):
    for row in rows:
        if row["note"].startswith(REASONS):
            continue
        assert row["note"] != NOT_REACHED
        if row["how"] == WHOLE:
            assert row["full_step"] or "compiled as a whole" in row["note"] or row["tap"] == ALL_FULL
        elif row["tap"] == "-":
            assert min(row["loop"], row["all_full"], row["step_ratio"]) > 0 and row["note"] == "step ratio: of FLOPs"
        else:
            alone = row["note"] == "single steps alone are measured"
            assert alone or row["note"] == ""
            assert row["full_step"] > 0 and (row["all_full"] is None) == alone
            if row["tap"] != ALL_FULL:
                assert row["share"] == row["skipped_step"] / row["full_step"]
                assert row["step_ratio"] == 5 and row["history"] > 0
                assert alone or row["of_ratio"] == row["all_full"] / row["loop"] / 5
        assert row["peak"] is None


def test_all_that_was_asked_for_is_there(rows):
    seen = {(row["model"], row["how"]) for row in rows}
    assert {(model.name, "bfloat16") for model in (FLUX, QWEN, VIDEO)} < seen
    others = {how for model, how in seen if model == FLUX.name}
    assert {"float8 weights (torchao)", "repeated blocks compiled", WHOLE, "model offloading", "group offloading"} < (
        others
    )
    assert any("TaylorSeer" in how for how in others) and any("DBCache" in how for how in others)
    loops = [row for row in rows if row["how"] == "bfloat16" and row["tap"] in gpu.TAPS]
    assert len(loops) == 6 and all(row["loop"] for row in loops)
    ways = ["model offloading"] * 2 + ["group offloading"] * 2 * groups_layers()
    assert [row["how"] for row in rows if row["moved"] is not None] == ways


def test_a_history_is_of_eight_features_and_scratch(rows):
    held = {(row["model"], row["tap"]): row["history"] for row in rows if row["how"] == "bfloat16"}
    as_bytes = (8 + 2) * 2 * TOKENS  # the scratch is in float32
    assert held[FLUX.name, "norm"] == 32 * as_bytes and held[QWEN.name, "norm"] == 2 * 32 * as_bytes
    assert held[FLUX.name, "output"] == 64 * as_bytes and held[QWEN.name, "output"] == 2 * 64 * as_bytes
    assert held[VIDEO.name, "output"] == 2 * 64 * as_bytes  # two frames


def test_markdown_has_the_rows_of_the_json(report, rows):
    head, _, *table = cells_of((report / "report.md").read_text())
    assert tuple(head) == HEAD and len(table) == len(rows)
    assert [line[:3] for line in table] == [[row["model"], row["how"], row["tap"]] for row in rows]
    for line, row in zip(table, rows, strict=True):
        assert line[3] == ("-" if row["full_step"] is None else f"{1e3 * row['full_step']:.2f} ms")
        assert line[8] == ("-" if row["speedup"] is None else f"{row['speedup']:.2f} x")


def test_a_model_that_does_not_fit_says_so_and_the_next_goes_on(tmp_path):
    def fill(_loop):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GB")

    cases = [gpu.Case(FLUX, "too large", fill), gpu.Case(FLUX, "bfloat16", loops=False)]
    session, rows = session_of(tmp_path, cases)
    gpu.run(cases, rows, session)
    assert {row.note for row in rows[0]} == {"does not fit into memory"}
    assert all(row.full_step for row in rows[1])
    assert "does not fit into memory" in (tmp_path / "report.md").read_text()


def test_a_row_that_does_not_fit_leaves_the_others(tmp_path, monkeypatch):
    def too_large(bench, row):
        if row.tap == "norm":
            raise torch.OutOfMemoryError
        row.loop = 1.0

    monkeypatch.setattr(gpu.Bench, "loop_of", too_large)
    cases = [gpu.Case(FLUX, "bfloat16")]
    session, (rows,) = session_of(tmp_path, cases)
    gpu.run(cases, [rows], session)
    assert [row.note for row in rows] == ["", "does not fit into memory", ""]
    assert all(row.full_step for row in rows) and rows[2].loop == 1.0


def test_what_the_budget_does_not_hold_is_left_out_and_said(tmp_path):
    gpu.main(["--tiny", "--budget", "0", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert rows and all("no time" in row["note"] and row["full_step"] is None for row in rows)
    session, (steps,) = session_of(tmp_path, cases := [gpu.Case(FLUX, "bfloat16", setup=1e7)])
    gpu.run(cases, [steps], session)
    assert all("takes about 10000000 s" in row.note for row in steps)


def test_a_killed_report_keeps_what_it_has(tmp_path):
    def kill(_loop):
        raise KeyboardInterrupt

    cases = [gpu.Case(FLUX, "bfloat16", loops=False), gpu.Case(FLUX, "killed", kill), gpu.Case(QWEN, "later")]
    session, rows = session_of(tmp_path, cases)
    with pytest.raises(KeyboardInterrupt):
        gpu.run(cases, rows, session)
    kept = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert all(row["full_step"] for row in kept[:3])
    assert [row["note"] for row in kept[3:]] == [NOT_REACHED] * 6


def test_the_end_of_the_time_comes_whatever_is_done_then():
    with pytest.raises(NoTime), gpu.ending(1000):
        signal.raise_signal(signal.SIGALRM)
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_bytes_that_move_are_counted_to_the_last():
    transformer = materialise(FLUX, CPU)
    weights = sum(weight.nbytes for weight in transformer.parameters())
    away = Loop(FLUX, transformer, torch.device("meta"))
    accelerate.cpu_offload_with_hook(transformer, "meta")
    counters = [Moved() for _ in range(2)]
    away.walk(steps=2, lap=counters.__getitem__)
    assert [counter.total for counter in counters] == [weights, 0]
    with Moved() as moved:
        torch.ones(3).to(torch.float64).copy_(torch.zeros(3))
        assert moved.total == 0
        torch.empty(5, device="meta").copy_(torch.ones(5))
        assert moved.total == 5 * 4


@pytest.mark.parametrize("model", chosen(tiny=False), ids=lambda model: model.transformer)
def test_the_real_models_run_at_their_real_sizes(model):
    """On the meta device, which has shapes and no numbers, with one block of each kind, at both taps."""
    meta = torch.device("meta")
    transformer = materialise(model, meta)
    shapes = {name: weight.shape for name, weight in build(model).named_parameters()}
    assert {name: weight.shape for name, weight in transformer.named_parameters()} == shapes
    assert {weight.dtype for weight in transformer.parameters()} == {torch.bfloat16}
    loop = Loop(model, transformer, meta)
    latents = loop._inputs["cond"]["hidden_states"]
    for tap in gpu.TAPS:
        predictor = untrained(loop, tap, str(gpu.SCHEDULE))
        one_each = _one_block_each(transformer, tap_of(transformer).blocks)
        with one_each, lesa.accelerate(transformer, predictor, grid=loop.grid) as run:
            assert loop.walk(run, steps=5).shape == latents.shape
        done = run.summary()
        assert list(done) == list(loop.streams)
        assert all((stream.full_steps, stream.skipped_steps) == (4, 1) for stream in done.values())


def test_what_a_class_computes_is_no_random_weight():
    for device in ("cpu", "meta"):
        frequencies = materialise(QWEN, torch.device(device)).pos_embed.pos_freqs
        torch.testing.assert_close(frequencies[0], torch.ones_like(frequencies[0]))


def test_the_pipeline_of_the_peers_draws_the_models_latents():
    loop = Loop(FLUX, materialise(FLUX, CPU), CPU)
    pipe = pipeline_of(loop)
    latents = pipe(**{**flux_call(loop), "num_inference_steps": 2}).images
    assert latents.shape == (1, TOKENS, 64) and latents.dtype == torch.bfloat16
    assert len(pipe.scheduler.timesteps) == 2


def test_goals_are_judged_by_the_plain_rows_of_a_gpu(tmp_path):
    good = Row("a", "bfloat16", "output", 0.1, 0.0002, all_full=5.0, loop=1.0, step_ratio=5.0)
    slow = Row("b", "bfloat16", "output", 0.1, 0.0004, all_full=4.8, loop=1.0, step_ratio=5.0)
    at_norm = Row("b", "bfloat16", "norm", 0.1, 0.01)
    other = Row("b", "group offloading", "output", 0.1, 0.09)
    judged = Report(tmp_path, {"gpu": "a card"}, [good, slow, at_norm, other], judged=True)
    assert [goal["met"] for goal in judged.goals()] == ["yes", "yes", "no", "no"]
    assert judged.markdown().count("| yes |") == 2 and "gpu a card" in judged.markdown()
    assert Report(tmp_path, {}, [good], judged=False).goals() == []


def test_reasons_are_in_a_line():
    assert reason(ModuleNotFoundError("No module named 'torchao'", name="torchao")) == REASONS[0]
    assert reason(ValueError("two\n lines")) == "ValueError: two lines"
    assert Row("m", "h", "t", note="a | b").cells()[-1] == "a \\| b"


def test_without_a_gpu_the_real_ones_are_refused(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path / "none")])
    assert "--tiny runs small models on the CPU" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
