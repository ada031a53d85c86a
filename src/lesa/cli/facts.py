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
from lesa.host.tap import PLACES, tap_of
from lesa.predictors import Predictor
from lesa.predictors import convert as conversion
from lesa.predictors.base import check_place
from lesa.predictors.disk import DAMAGED
from lesa.rows.plan import compile
from lesa.rows.schedule import Schedule

CONVERTED = {
    "flux": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "qwen": "Qwen/Qwen-Image",
    "qwen-lightning": "lightx2v/Qwen-Image-Lightning",
    "hunyuanvideo": "hunyuanvideo-community/HunyuanVideo",
}


def rows(given: Namespace) -> None:
    """Print the rows of a predictor."""
    predictor = Predictor.from_pretrained(given.predictor)
    stream = given.stream or predictor.origin.streams[0]
    print(compile(predictor.for_stream(stream), predictor.grid, predictor.schedule))


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


def add(commands: Any) -> None:
    """Add the commands."""
    parser = commands.add_parser("rows", help="print the rows of a predictor")
    parser.add_argument("predictor", metavar="PREDICTOR", help="its folder")
    parser.add_argument("--stream", help="cond or uncond; default: its first")
    parser.set_defaults(command=rows)
    _add_flops(commands)
    _add_convert(commands)


def _add_flops(commands: Any) -> None:
    words = "count the FLOPs of steps and runs from configurations alone, without weights"
    parser = commands.add_parser("flops", help=words, description=words)
    parser.add_argument(
        "--model", metavar="MODEL", help="folder or hub name of a pipeline; default: the real models, as published"
    )
    parser.add_argument("--steps", type=options.read_count, help="default: the model's own, or 50")
    parser.add_argument(
        "--call", type=options.read_call, default={}, help="""arguments of its call, e.g. '{"height": 512}'"""
    )
    parser.add_argument("--streams", type=options.read_count, help="2 under guidance; default: as the call says")
    parser.add_argument(
        "--text-tokens", type=options.read_count, help="default: as many as prompts are padded to; Qwen-Image: 23"
    )
    parser.add_argument(
        "--schedules",
        type=options.read_schedules,
        default="every:1,paper:7,paper:10",
        help="of --model (every:1,paper:7,paper:10)",
    )
    parser.set_defaults(command=flops)


def _add_convert(commands: Any) -> None:
    words = "make a predictor of ours of a checkpoint of the authors' released code"
    more = "Nothing in the file is executed. Its KANs may take all S + 1 times of the grid, or S, without the last one."
    parser = commands.add_parser("convert", help=words, description=f"{words}. {more}")
    parser.add_argument("file", metavar="FILE", help="the checkpoint, a .pt file")
    parser.add_argument("--model", choices=CONVERTED, required=True, help="which model it was trained for")
    parser.add_argument("--pipeline", metavar="MODEL", help="another pipeline's folder or hub name, of that class")
    parser.add_argument(
        "--grid",
        required=True,
        help="what it was trained on: steps of the model's own grid (50), all S + 1 times (1.0,0.98,...,0), or a JSON "
        "file that holds them, alone or under 'grid'",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--interval", type=options.read_count, help="of the paper's schedule, e.g. 7")
    which.add_argument("--schedule", type=options.read_schedule, help="another schedule, e.g. at:0,2")
    parser.add_argument("--bounds", type=options.read_bounds, help="falling times between stages; default: the paper's")
    parser.add_argument("--tap", choices=PLACES, default="feature", help="where it was trained; default: the paper's")
    parser.add_argument(
        "--order",
        choices=("newest", "oldest"),
        default="newest",
        help="the past feature that a stage's first weight belongs to (newest, as in the paper's equations)",
    )
    parser.add_argument("--out", required=True, metavar="FOLDER")
    parser.set_defaults(command=convert)
