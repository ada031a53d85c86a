"""The commands that run no pipeline: flops, rows, convert."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from lesa.bench import flops as counting
from lesa.bench import models, report
from lesa.cli import options
from lesa.cli.parsers.facts import CONVERTED
from lesa.host.tap import tap_of
from lesa.predictors import Predictor
from lesa.predictors import convert as conversion
from lesa.predictors.base import check_place
from lesa.predictors.disk import DAMAGED
from lesa.rows.plan import compile
from lesa.rows.schedule import Schedule


def rows(given: Namespace) -> None:
    """Print the rows of a predictor."""
    predictor = Predictor.from_pretrained(given.predictor)
    stream = given.stream or predictor.origin.streams[0]
    print(compile(predictor.for_stream(stream), predictor.grid, predictor.schedule, predictor.begins[0]))
    options.say_next("generate", "MODEL", "PROMPT", "--predictor", given.predictor)


def flops(given: Namespace) -> None:
    """Count the FLOPs of steps and runs."""
    chosen = models.MODELS
    if given.model:
        model = models.read(given.model, given.call, given.streams, given.text_tokens)
        runs = [models.Published("any row", schedule) for schedule in given.schedules]
        chosen = (replace(model, steps=given.steps or model.steps, runs=runs),)
    costs = {model.name: {place: counting.count(model, place) for place in counting.PLACES} for model in chosen}
    print(f"{report.markdown(*counting.steps_table(chosen, costs), text=1)}\n")
    print(f"{report.markdown(*counting.runs_table(chosen, costs), text=3)}\n")
    print(report.markdown(*counting.memory_table(chosen, costs), text=1))
    options.say_next("plan", given.model or "MODEL", "--budgets", "10,8,6")


def convert(given: Namespace) -> None:
    """Make a predictor of a checkpoint of the authors."""
    check_place(given.out)
    weights = conversion.read(given.file)
    if given.pipeline:
        model = models.read(given.pipeline)
    else:
        model = next(known for known in models.MODELS if known.name == CONVERTED[given.model])
    predictor = conversion.convert(
        weights,
        model,
        tap_of(models.build(model), given.tap),
        _grid(given.grid, model),
        given.schedule or Schedule.paper(given.interval),
        bounds=given.bounds,
        order=given.order,
        training={"file": Path(given.file).name},
        versions={"torch": torch.__version__, "lesa": version("lesa-cache")},
    )
    predictor.save_pretrained(options.folder(given.out))
    memories = ", ".join(map(str, predictor.memories))
    print(f"{len(predictor.memories)} stages of {memories} past features, streams {', '.join(weights.streams)}")
    print(given.out)
    options.say_next("rows", given.out)


def _grid(text: str, model: models.Model) -> Any:
    """Read a grid: a number of steps, times with commas between them, or a JSON file that has it."""
    if text.isdigit():
        return models.grid_of(model, options.read_count(text))
    if not Path(text).is_file():
        try:
            return [float(time) for time in text.split(",")]
        except ValueError as error:
            raise ValueError(
                f"--grid is a number of steps, all times, or a JSON file of them, got {text!r}."
            ) from error
    try:
        entries = json.loads(Path(text).read_text(encoding="utf-8"))
        times = entries["grid"] if isinstance(entries, dict) else entries
        if not isinstance(times, list) or not times:
            raise ValueError("it is no list of times")
        return [float(time) for time in times]
    except DAMAGED as error:
        words = "holds a grid as a JSON list of times, or under 'grid'"
        raise ValueError(f"{text} {words} ({error}); repair it.") from error
