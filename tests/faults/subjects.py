"""What is damaged: artefacts of every kind that the library reads, small, each with all that is made of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from test_bombs import KINDS
from test_convert import BY_NAME, HERE, weights, write
from test_facts import KNOWN
from test_predictor import flux_grid
from test_shelf import TABLE, solved
from test_trajectory import STEPS as FEW
from test_trajectory import collection, trajectory

from lesa.bench import records, report
from lesa.bench.lines import Pair, Record, Start, Time
from lesa.bench.planned import keep_planned, planned
from lesa.host.pipelines import call_of, check_call
from lesa.learn.call_files import read_calls, read_prompts
from lesa.learn.collecting import opened
from lesa.learn.journal import Journal
from lesa.learn.kept import Rounds
from lesa.learn.lessons import Curve
from lesa.learn.trajectory import Store
from lesa.predictors import Predictor
from lesa.predictors import curve as curves
from lesa.predictors.convert import convert, read
from lesa.predictors.curve import SOLVED, Point, Tried
from lesa.predictors.origin import Origin
from lesa.predictors.shelf import Shelf
from lesa.predictors.solved import Solved
from lesa.rows.plan import Plan, compile
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap


class Subject(NamedTuple):
    """A kind of artefact: how one is made in a folder of a number, and all that reading it gives.

    `signed`: nothing of it may change unnoticed. What is not is its user's to write, and any of it is a valid wish.
    """

    make: Callable[[Path, int], None]
    use: Callable[[Path], Any]
    signed: bool = True


# --- predictors


def _make_predictor(kind: str) -> Callable[[Path, int], None]:
    def make(folder: Path, number: int) -> None:
        predictor = KINDS[kind]()
        with torch.no_grad():
            for parameter in predictor.parameters():
                parameter.add_(number * 0.125)
        predictor.save_pretrained(folder)

    return make


def _use_predictor(folder: Path) -> Any:
    predictor = Predictor.from_pretrained(folder)
    streams = predictor.origin.streams
    return predictor.digest(), [_plan_of(predictor.for_stream(name), predictor) for name in streams]


def _plan_of(forecaster: Any, predictor: Predictor) -> str:
    return compile(forecaster, predictor.grid, predictor.schedule_for(predictor.grid)).to_json()


# --- recorded runs, rounds of a training


def _make_store(folder: Path, number: int) -> None:
    store = Store.create(folder, collection(weights=str(number), grid=tuple(trajectory().grid.tolist())))
    for k, seed in store.collection.pairs:
        run = trajectory(store.collection.prompts[k], seed + 100 * number, torch.float32)
        store.add(k, seed, replace(run, seed=seed, full=tuple(range(FEW))))


def _use_store(folder: Path) -> Any:
    store = opened(folder)
    runs = [(run.prompt, run.seed, run.full, _hashed(run._tensors())) for run in store]
    return store.collection.mark, store.collection.model, runs


def _hashed(tensors: dict[str, torch.Tensor]) -> str:
    total = hashlib.sha256()
    for name, x in tensors.items():
        total.update(f"{name}{x.dtype}{tuple(x.shape)}".encode() + x.contiguous().numpy().tobytes())
    return total.hexdigest()


SETTINGS = {"loss": "latents", "seed": 0}


def _make_rounds(folder: Path, number: int) -> None:
    rounds, curve = Rounds(folder, SETTINGS), Curve()
    for round_ in range(2):
        curve.add("ground-truth", round_, 20, 0.5 + round_ + number)
        predictor = KINDS["l2p"]()
        with torch.no_grad():
            next(predictor.parameters()).add_(0.25 * round_ + number)
        rounds.save(round_, predictor, curve)


def _use_rounds(folder: Path) -> Any:
    """Rounds that are damaged are trained again, and so are those after: nothing of them is taken."""
    rounds, found = Rounds(folder, SETTINGS), []
    for round_ in range(2):
        predictor, curve = KINDS["l2p"](), Curve()
        if not rounds.load(round_, predictor, curve):
            break
        found.append((_hashed(predictor.state_dict()), curve.entries))
    return found


# --- calibrations: on the shelf, and under way


def _found(budget: int, number: int) -> Point:
    tried = [Tried(SOLVED, f"at:0,{budget}", (-40.0 - number, -41.5), (39.0, 40.5), (0.9, 0.91))]
    tried.append(Tried("Reuse()", "at:0,1", (-20.0, -21.5)))
    return Point(budget, -44.0 - number, tuple(tried), {"reference": 18, "search": 60 + budget}, 1.5)


def _make_shelf(folder: Path, number: int) -> None:
    for first in range(2):
        predictors = {budget: solved(budget) for budget in (1, 2)}
        for predictor in predictors.values():
            predictor.coefficients.data.mul_(number + 2)
        table = {**TABLE, **curves.Curve(3, tuple(_found(budget, number) for budget in (2, 1))).to_table()}
        Shelf(folder).put(f"{first}" * 64, KNOWN, predictors, table)


def _use_shelf(folder: Path) -> Any:
    found = []
    for one in Shelf(folder).all():
        assert not one.facts.differences(one.facts) and one.budget_for(quality="drift:-1") in one.budgets
        predictors = [one.predictor(budget).digest() for budget in one.budgets]
        found.append((one.fingerprint, one.facts, one.chosen, one.table, one.versions, one.promise(2), predictors))
    return tuple(found)


def _make_journal(folder: Path, number: int) -> None:
    for budget in (1, 2):
        pictures = np.random.default_rng([budget, number]).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
        Journal(folder, prompts=["a fish"]).keep(_found(budget, number), solved(budget), tuple(pictures))


def _use_journal(folder: Path) -> Any:
    """Budgets whose files are damaged are calibrated again: nothing of them is taken."""
    journal, found = Journal(folder, prompts=["a fish"]), {}
    for budget in (1, 2):
        if (kept := journal.point(budget)) is not None:
            pictures = [x.tobytes() for x in journal.worst(budget) or ()]
            found[budget] = kept[0], kept[1].digest(), pictures
    return found


# --- records of a benchmark


PAIRS = [Pair("a red apple", 0), Pair("a blue fish", 1)]
METHODS = [records.REFERENCE, ("LESA", "at:0,3"), ("reuse", "every:2")]


def _make_records(folder: Path, number: int) -> None:
    setting = {"model": "tiny", "weights": str(number), "call": {"height": 32}, "batch_size": 2, "pairs": PAIRS}
    entries = tuple({"name": name, "schedule": schedule, "call": {}, "recipe": {}} for name, schedule in METHODS)
    random = np.random.default_rng(number)
    with records.writing(folder, setting) as log:
        log.add(Start({"cpu": "fast", "cores": 2, "threads": 1, "date": "2026-01-01"}, entries))
        for k, key in enumerate(METHODS):
            psnr = 60.0 if k == 0 else 30.0 + number
            rows = [Record(*key, *pair, psnr, 0.9, None, (0, 2), {"drift": -9.0}, (0.0, 0.1)) for pair in PAIRS]
            log.add(*rows)
            log.add(Time(*key, *PAIRS[0], 1.5 - k / 4, 2.5))
            log.keep(key, 0, random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
    keep_planned(folder, {"grid": [1.0, 0.5, 0.0], f"Reuse() {2 + number} feature": "at:0,1"})


def _use_records(folder: Path) -> Any:
    found = records.load(folder)
    pictures = {key: [picture.tobytes() for picture in kept] for key, kept in found.pictures.items()}
    lines = [one for group in (found.records, found.times) for some in group.values() for one in some]
    assert report.summary(found, None)
    return {"setting": dict(found.setting), "lines": lines, "pictures": pictures, "planned": planned(folder)}


# --- texts: plans, calls, prompts, a model's arguments


def _make_plan(folder: Path, number: int) -> None:
    grid, schedule = flux_grid(8), Schedule.at([0, 5, 6, 7])
    rows = torch.eye(4, 5, dtype=torch.float64)
    rows[2, :3], rows[3, -1] = torch.tensor([0.25, -0.5, 1.25 + number]), 0.125
    origin = Origin("a model", "Linear", {}, Tap(), tuple(grid.tolist()), str(schedule), ("all",))
    predictor = Solved(origin, latents=True)
    predictor.set_gaps(rows)
    plan = compile(predictor, grid, schedule)
    assert set(plan.rows) == {1, 2, 3, 4} and set(plan.corrections) == {6, 7}
    (folder / "plan.json").write_text(plan.to_json())


def _use_plan(folder: Path) -> Any:
    return Plan.from_json((folder / "plan.json").read_text(encoding="utf-8", errors="replace")).to_json()


def _make_calls(folder: Path, number: int) -> None:
    Image.new("RGB", (8, 8), (number, 0, 9)).save(folder / "a.png")
    calls = [{"prompt": f"a fish {number}", "image": "a.png"}, {"class_labels": [1, 2], "width": 32}]
    (folder / "calls.jsonl").write_text("".join(json.dumps(call) + "\n" for call in calls))
    (folder / "call.json").write_text(json.dumps({"height": 32, "num_inference_steps": 4 + number}))
    (folder / "prompts.txt").write_text("a red apple\na blue fish\na pear\n")


def _use_calls(folder: Path) -> Any:
    calls = read_calls(folder / "calls.jsonl")
    arguments = call_of(folder)
    check_call(arguments)
    return calls, arguments, read_prompts(folder / "prompts.txt")


# --- the authors' checkpoints


def _make_checkpoint(folder: Path, number: int) -> None:
    write(folder / "x.pt", weights(9, seed=number))


def _use_checkpoint(folder: Path) -> Any:
    found = read(folder / "x.pt")
    predictor = convert(found, BY_NAME["FLUX.1-dev"], HERE, torch.linspace(1, 0, 9), Schedule.paper(4))
    return _hashed(predictor.state_dict())


SUBJECTS: dict[str, Subject] = {
    "predictor (LESA)": Subject(_make_predictor("lesa"), _use_predictor),
    "predictor (L2P)": Subject(_make_predictor("l2p"), _use_predictor),
    "predictor (many grids)": Subject(_make_predictor("many"), _use_predictor),
    "recorded runs": Subject(_make_store, _use_store),
    "rounds of a training": Subject(_make_rounds, _use_rounds),
    "shelf": Subject(_make_shelf, _use_shelf),
    "calibration under way": Subject(_make_journal, _use_journal),
    "records": Subject(_make_records, _use_records),
    "plan": Subject(_make_plan, _use_plan),
    "calls and prompts": Subject(_make_calls, _use_calls, signed=False),
    "checkpoint of the authors": Subject(_make_checkpoint, _use_checkpoint),
}
