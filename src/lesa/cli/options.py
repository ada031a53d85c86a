"""Options that commands share, and how they are read."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lesa.host.offload import OFFLOADS
from lesa.learn.named import LEARNED
from lesa.rows.schedule import Schedule

if TYPE_CHECKING:
    from lesa.host.loading import LoadOptions
    from lesa.learn.calls import Call
    from lesa.rows.forecasters import Forecaster

MOST_SEEDS = 1_000_000
DEFAULTS = ("cpu", "none")
"""Of the device and of offloading."""
WIDTH = 100
"""Columns of a help's texts."""


class Command:
    """A command by its file in `lesa.cli` and its function there, which are imported when it is called: to help and to
    complete, the parser needs none of what the commands work with."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, given: argparse.Namespace) -> int | None:
        module, _, function = self.name.partition(".")
        return getattr(import_module(f"lesa.cli.{module}"), function)(given)


def add(
    commands: Any, name: str, run: str, words: str, example: str | tuple[str, ...], more: str = ""
) -> argparse.ArgumentParser:
    """Add a command, `run` as `Command` reads it, whose help ends with examples."""
    examples = (example,) if isinstance(example, str) else example
    epilog = f"{textwrap.fill(more, WIDTH)}\n\n" * bool(more) + "for example:\n" + "\n".join(f"  {e}" for e in examples)
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=words, description=words, epilog=epilog, formatter_class=raw)
    parser.set_defaults(command=Command(run))
    return parser


def command(
    commands: Any,
    name: str,
    run: str,
    words: str,
    example: str | tuple[str, ...],
    model: str | None = None,
    more: str = "",
    optional: bool = False,
) -> argparse.ArgumentParser:
    """Add a command that runs a model, or can do without one where that is `optional`."""
    parser = add(commands, name, run, words, example, more)
    if optional:
        parser.add_argument("model", metavar="MODEL", nargs="?", help="folder or hub name of a diffusers pipeline")
    elif model is None:
        parser.add_argument("model", metavar="MODEL", help="folder or hub name of a diffusers pipeline")
    else:
        parser.add_argument("--model", default=model, help=f"folder of a diffusers pipeline ({model or 'the one run'})")
    parser.add_argument("--lora", metavar="LORA", help="folder, hub name or file of a LoRA, whose predictors are taken")
    parser.add_argument("--steps", type=read_count, help="default: the model's own, or 50")
    parser.add_argument("--device", default=DEFAULTS[0])
    parser.add_argument(
        "--offload", choices=OFFLOADS, default=DEFAULTS[1], help="keep weights in the CPU's memory (none)"
    )
    parser.add_argument("--dtype", help="e.g. bfloat16; default: that of diffusers")
    parser.add_argument("--variant", help="of the weights' files, e.g. fp16")
    parser.add_argument("--revision", help="of the hub repository: a branch, tag or commit")
    parser.add_argument("--vae-tiling", action="store_true", help="decode large pictures and clips in pieces")
    parser.add_argument("--scheduler", type=read_call, help="""other settings, e.g. '{"shift": 3.0}'""")
    parser.add_argument(
        "--call", type=read_call, default={}, help="""more arguments of its call, e.g. '{"height": 512}'"""
    )
    return parser


def add_prompts(parser: argparse.ArgumentParser, name: str = "", words: str = "one a line") -> None:
    """Add the options that name prompts, or calls with arguments of their own; one of them is needed."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(f"--{name}prompts", metavar="FILE", help=words)
    add_calls(which, name)


def add_calls(parser: Any, name: str = "") -> None:
    """Add the option that names calls with arguments of their own."""
    words = "calls in place of prompts: a JSON object of arguments a line; pictures are files in its folder"
    parser.add_argument(f"--{name}calls", metavar="FILE", help=words)


def load_options(options: argparse.Namespace) -> LoadOptions:
    """Return what `command` added."""
    from lesa.host.loading import LoadOptions

    return LoadOptions(
        model=options.model,
        lora=options.lora,
        steps=options.steps,
        device=options.device,
        offload=options.offload,
        dtype=options.dtype,
        variant=options.variant,
        revision=options.revision,
        vae_tiling=options.vae_tiling,
        scheduler=options.scheduler,
        call=options.call,
    )


def more_of_call(options: LoadOptions) -> dict[str, Any]:
    """Return the arguments of a call that are asked for, without its steps."""
    return {name: value for name, value in options.call.items() if name != "num_inference_steps"}


def runs_of(prompts: str | Path | None, calls: str | None, limit: int | None = None) -> list[Call]:
    """Read the first prompts of a file, or calls of another."""
    from lesa.learn.call_files import read_calls, read_prompts

    found: list[Call] = [*(read_calls(calls) if calls else read_prompts(prompts or ""))]
    return found[:limit]


def held_out(options: argparse.Namespace, limit: int | None) -> tuple[Path, list[Call]]:
    """Read the prompts named, or those that the model comes with and was not trained on; and say where they are."""
    source = Path(options.prompts or Path(options.model) / "prompts" / "heldout.txt")
    if not options.prompts and not source.exists():
        there = "has no held-out prompts" if Path(options.model).is_dir() else "is no folder here with held-out prompts"
        raise FileNotFoundError(
            f"{options.model} {there} (prompts/heldout.txt); check its name, or, if that is right, name a file of "
            "prompts, one a line: --prompts FILE."
        )
    return source, runs_of(source, None, limit)


def folder(path: str | Path) -> Path:
    """Make a folder at once: a place that cannot be written to is better known before the work."""
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def say(line: str) -> None:
    """Print a line of what a work has found so far."""
    print(line, flush=True)


def say_aside(line: str) -> None:
    """Print a line that is no result."""
    print(line, file=sys.stderr)


def as_given(given: argparse.Namespace) -> list[str]:
    """Return the model of a command with the options that say how it is loaded and called, as they were typed."""
    words = [str(given.model)]
    for name in ("lora", "steps", "device", "offload", "dtype", "variant", "revision"):
        value = getattr(given, name)
        if value not in (None, *DEFAULTS):
            words += [f"--{name}", str(value)]
    words += ["--vae-tiling"] * given.vae_tiling
    for name in ("scheduler", "call"):
        if getattr(given, name):
            words += [f"--{name}", json.dumps(getattr(given, name))]
    return words


def say_next(*words: Any) -> None:
    """Say which command may come next."""
    say_aside(f"next: lesa {shlex.join(map(str, words))}")


def forecaster_of(options: argparse.Namespace) -> Forecaster | None:
    """Return what is named: a predictor, or rows without training; None is the predictor shipped."""
    from lesa.predictors import Predictor
    from lesa.rows.named import named

    if getattr(options, "predictor", None):
        return Predictor.from_pretrained(options.predictor)
    return named(options.forecaster) if options.forecaster else None


def _told(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let a reader's own words reach the user, where argparse would say 'invalid value' only."""

    def reader(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return reader


@_told
def read_schedule(text: str) -> Schedule:
    return Schedule.parse(text)


@_told
def read_schedules(text: str) -> list[Schedule]:
    return [read_schedule(part) for part in re.split(r",(?=[a-z])", text) if part]


@_told
def read_count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"a whole number, at least 1, is needed, got {text!r}")
    return int(text)


def read_names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


@_told
def read_counts(text: str) -> list[int]:
    return [read_count(part) for part in text.split(",") if part]


@_told
def read_stages(text: str) -> Any:
    if text == LEARNED or text.isdigit():
        return text if text == LEARNED else read_count(text)
    return read_bounds(text)


@_told
def read_target(text: str) -> str:
    from lesa.predictors.calibration import Quality

    return str(Quality.parse(text))


@_told
def read_bounds(text: str) -> tuple[float, ...]:
    return tuple(float(bound) for bound in text.split(","))


@_told
def read_seeds(text: str) -> list[int]:
    first, colon, end = text.partition(":")
    if colon and int(end) - int(first) > MOST_SEEDS:
        raise ValueError(f"at most {MOST_SEEDS} seeds are run, got {text!r}")
    seeds = list(range(int(first), int(end))) if colon else [int(seed) for seed in text.split(",")]
    if not seeds:
        raise ValueError(f"at least one seed is needed, got {text!r}")
    return seeds


@_told
def read_call(text: str) -> dict[str, Any]:
    try:
        arguments = json.loads(text)
    except RecursionError as error:
        raise ValueError("a JSON object of arguments is needed, got one that nests too deeply") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"a JSON object of arguments is needed, got {text!r}")
    return arguments
