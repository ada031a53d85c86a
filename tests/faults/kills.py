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
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch

import lesa
from lesa.bench import records
from lesa.bench.methods import fewer_steps, forecast
from lesa.host.pipelines import with_call
from lesa.learn.ranks import ALONE, Ranks
from lesa.predictors.calibration import CALIBRATION_FILE, Calibration
from lesa.predictors.shelf import LOCK, Shelf

CALL = dict(height=32, width=32, num_inference_steps=4, max_sequence_length=16)
PROMPTS = ["small red apple on white, left", "large blue fish on grey, right", "small green pear on grey, left"]
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate")
DEATH = -signal.SIGKILL
AUTOGRAD_FORKS = not torch.backends.cuda.is_built()
"""Whether a process that is forked from one that trained can train: with a torch built for CUDA it cannot."""

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


def collect(pipe: Any, folder: Path, at: Ranks = ALONE) -> None:
    lesa.collect(pipe, PROMPTS, folder / "runs", lesa.CollectOptions(tokens=6, batch_size=2), at=at)


def train(pipe: Any, folder: Path) -> None:
    options = lesa.TrainOptions("l2p", schedule=lesa.Schedule.at([0, 2]), rounds=1, updates=(2, 2))
    lesa.train(pipe, folder.parent / "runs", PROMPTS[:1], folder / "predictor", options)


def bench(pipe: Any, folder: Path, at: Ranks = ALONE) -> None:
    methods = [forecast("reuse", lesa.Reuse(), lesa.Schedule.at([0, 2])), fewer_steps(2)]
    options = lesa.CompareOptions(methods, timed=0, bound=False, batch_size=2)
    lesa.compare(pipe, PROMPTS, folder / "bench", options, at=at)


def calibrate(pipe: Any, folder: Path) -> None:
    options = lesa.CalibrateOptions(refine=1, most=2, progress=False)
    shelf = Shelf(folder / "shelf")
    lesa.calibrate(pipe, PROMPTS[:2], folder / "predictor", options, budgets=(3, 2), shelf=shelf)


Work = Callable[[Any, Path], None]
TWO = [Ranks(1, 2), Ranks(0, 2)]
WORKS: dict[str, list[Work]] = {
    "collect": [collect],
    "train": [train],
    "bench": [bench],
    "calibrate": [calibrate],
    "collect, two processes": [partial(collect, at=at) for at in TWO],
    "bench, two processes": [partial(bench, at=at) for at in TWO],
}
"""Works, each by what its processes do at once."""
NOT_FORKED = () if AUTOGRAD_FORKS else ("train",)


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


def events_of(work: Work, pipe: Any, folder: Path) -> int:
    """Do a work whole; returns of how many moments it is."""
    _count.append(0)
    try:
        work(pipe, folder)
        return _count[0]
    finally:
        _count.clear()


def _die(work: Work, pipe: Any, folder: Path, moment: int) -> None:
    _count.append(0)
    _armed.append(moment)
    work(pipe, folder)


def killed(name: str, pipe: Any, folder: Path, count: int, seed: int = 0) -> list[str]:
    """Kill one process of a work at so many moments, and let all go on each time; returns what went wrong."""
    works, random, wrong = WORKS[name], Random(f"{name} {seed}"), []
    collect(pipe, folder)
    # A forked process finds some of what it needs open already, and one of two some of the work done.
    moments = [events_of(work, pipe, folder / "whole") * (9 if len(works) == 1 else 6) // 10 for work in works]
    wanted = results(folder / "whole")
    victims = [(which := random.randrange(len(works)), random.randint(1, moments[which])) for _ in range(count)]
    for k, (which, moment) in enumerate(sorted(victims)):
        place = folder / f"{k}-at-{moment}"
        ends = _ends(works, pipe, place, which, moment)
        if ends != [DEATH if one == which else 0 for one in range(len(works))]:
            wrong.append(f"{name} at {moment}: one process was not killed, or others were: they ended with {ends}")
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for work in works:
                work(pipe, place)
        found = results(place)
        wrong += [f"{name} at {moment} of {moments[which]}: {key} is another" for key in _other(found, wanted)]
    return wrong


def _ends(works: list[Work], pipe: Any, place: Path, which: int, moment: int) -> list[int | None]:
    """Do a work with one process that is killed at a moment; returns how each ended."""
    context, children = multiprocessing.get_context("fork"), []
    for k, work in enumerate(works):
        arguments = (work, pipe, place, moment) if k == which else (pipe, place)
        children.append(context.Process(target=_die if k == which else work, args=arguments))
        children[-1].start()
    for child in children:
        child.join(120)
    return [child.exitcode for child in children]


def _other(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    return sorted(key for key in found.keys() | wanted.keys() if found.get(key) != wanted.get(key))
