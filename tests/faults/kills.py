"""Processes that are killed outright at a moment of their work, and go on: the results are those of one that was not.

A moment is a count of what a process does to files, so that the same one comes at every speed.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import lesa
from lesa.bench import records
from lesa.bench.methods import fewer_steps, forecast
from lesa.host.pipelines import with_call
from lesa.predictors.calibration import CALIBRATION_FILE, Calibration
from lesa.predictors.shelf import LOCK, Shelf

CALL = dict(height=32, width=32, num_inference_steps=4, max_sequence_length=16)
PROMPTS = ["small red apple on white, left", "large blue fish on grey, right", "small green pear on grey, left"]
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")
DEATH = -signal.SIGKILL

_armed: list[int] = []
_count: list[int] = []


def _hear(event: str, args: tuple) -> None:
    if not _count or event not in EVENTS or not isinstance(args[0], (str, os.PathLike)) or ".py" in str(args[0]):
        return
    _count[0] += 1
    if _armed and _count[0] == _armed[0]:
        os.kill(os.getpid(), signal.SIGKILL)


sys.addaudithook(_hear)


def accelerable(tiny_flux: Any) -> Any:
    pipe = with_call(type(tiny_flux)(**tiny_flux.components), CALL)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def collect(pipe: Any, folder: Path) -> None:
    lesa.collect(pipe, PROMPTS, folder / "runs", lesa.CollectOptions(tokens=6, batch_size=2))


def train(pipe: Any, folder: Path) -> None:
    options = lesa.TrainOptions("l2p", schedule=lesa.Schedule.at([0, 2]), rounds=1, updates=(2, 2))
    lesa.train(pipe, folder.parent / "runs", PROMPTS[:1], folder / "predictor", options)


def bench(pipe: Any, folder: Path) -> None:
    methods = [forecast("reuse", lesa.Reuse(), lesa.Schedule.at([0, 2])), fewer_steps(2)]
    options = lesa.CompareOptions(methods, timed=0, bound=False, batch_size=2)
    lesa.compare(pipe, PROMPTS, folder / "bench", options)


def calibrate(pipe: Any, folder: Path) -> None:
    options = lesa.CalibrateOptions(refine=1, most=2, progress=False)
    shelf = Shelf(folder / "shelf")
    lesa.calibrate(pipe, PROMPTS[:2], folder / "predictor", options, budgets=(3, 2), shelf=shelf)


WORKS: dict[str, Callable[[Any, Path], None]] = {
    "collect": collect,
    "train": train,
    "bench": bench,
    "calibrate": calibrate,
}


def results(folder: Path) -> dict[str, Any]:
    """All that a work left: files byte for byte, but for what says when it was done and how long it took."""
    found: dict[str, Any] = {"kept": [_of_shelf(one) for one in Shelf(folder / "shelf").all()]}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or path.name.startswith((".lock", LOCK)) or path.name.endswith(".partial"):
            continue
        if path.name == CALIBRATION_FILE:
            continue
        if path.name == "config.json":  # a stopped training does not say its seconds, and so has another digest
            predictor = lesa.Predictor.from_pretrained(path.parent)
            facts = {k: v for k, v in predictor.origin.training.items() if k != "seconds"}
            found[name] = predictor.origin.grid, predictor.options(), facts
        elif path.suffix != ".jsonl" and path.name != "curve.json":
            found[name] = path.read_bytes()
    if list(folder.glob("bench/records*.jsonl")):
        found["records"] = records.load(folder / "bench").records
    return found


def _of_shelf(kept: Calibration) -> Any:
    """Return a calibration without when it was made, and how long it took: rivals are planned for once a process."""
    points = kept.table["curve"]["points"]
    for point in points:
        del point["seconds"], point["transformer_runs"]["rivals"]
    return kept.fingerprint, kept.facts, kept.digests, {**kept.table, "curve": points}


def events_of(work: Callable[[Any, Path], None], pipe: Any, folder: Path) -> int:
    """Do a work whole; returns of how many moments it is."""
    _count.append(0)
    try:
        work(pipe, folder)
        return _count[0]
    finally:
        _count.clear()


def _die(work: Callable[[Any, Path], None], pipe: Any, folder: Path, moment: int) -> None:
    _count.append(0)
    _armed.append(moment)
    work(pipe, folder)


def killed(name: str, pipe: Any, folder: Path, count: int, seed: int = 0) -> list[str]:
    """Kill a work at so many moments, and let it go on each time; returns what went wrong."""
    work, context, wrong = WORKS[name], multiprocessing.get_context("fork"), []
    collect(pipe, folder)
    moments = events_of(work, pipe, folder / "whole")
    wanted = results(folder / "whole")
    moments = moments * 9 // 10  # a forked process finds some of what it needs open already
    for k, moment in enumerate(sorted(Random(f"{name} {seed}").choices(range(1, moments + 1), k=count))):
        place = folder / f"{k}-at-{moment}"
        child = context.Process(target=_die, args=(work, pipe, place, moment))
        child.start()
        child.join(120)
        if child.exitcode != DEATH:
            wrong.append(f"{name} at {moment}: it was not killed, but ended with {child.exitcode}")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            work(pipe, place)
        found = results(place)
        wrong += [f"{name} at {moment} of {moments}: {key} is another" for key in _other(found, wanted)]
    return wrong


def _other(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
