"""Measure what a history holds, and what storing less of it costs in quality.

    python benchmarks/memory.py
    python benchmarks/memory.py --predictors out/lesa-paper7 out/lesa-output-paper7

Draws held-out prompts with each forecaster, at each tap and with each way to store the history, and prints one table.
Bytes are those of one stream for one picture, as a run of a batch holds them, with scratch and scales; the share is of
what the authors' code holds, eight features and a stack of the same eight in the model's dtype. PSNR is against the
same model's pictures with every step full; the difference is to the same forecaster at the same tap with the history
as it is, pair by pair; both with bootstrap 95 % intervals. On a machine without a GPU a history 'cpu' is 'model'.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import lesa
from lesa.bench.benchmark import batches, draw, pair_up
from lesa.bench.lines import Pair
from lesa.bench.methods import REFERENCE, Method, label
from lesa.host.tap import PLACES, place_of, tap_of
from lesa.learn.call_files import read_prompts
from lesa.learn.metrics import interval, paired_interval, psnr

MODEL = "models/emoji-flux"
AUTHORS_FEATURES = 16
HEADS = ("method", "tap", "schedule", "history", "held", "of authors'", "PSNR, dB [95 %]", "difference, dB [95 %]")


class Case(NamedTuple):
    """A forecaster at a tap."""

    name: str
    forecaster: lesa.Forecaster
    schedule: lesa.Schedule
    place: str


class Measured(NamedTuple):
    """Bytes of a stream for one picture, and the PSNR of every pair."""

    held: float
    psnr: list[float]


def cases(predictors: Sequence[lesa.Predictor], schedule: lesa.Schedule, places: Sequence[str]) -> list[Case]:
    """Taylor-2 at each place, and each predictor at its own."""
    plain = [Case("Taylor-2", lesa.Taylor(2), schedule, place) for place in places]
    return plain + [
        Case(label(one), one, one.schedule, place_of(one.origin.transformer, one.origin.tap)) for one in predictors
    ]


def feature_bytes(pipe: Any, pair: Pair) -> int:
    """Bytes of the feature, for one picture."""
    seen: list[int] = []
    name = tap_of(pipe.transformer).module
    if name is None:
        hook = pipe.transformer.register_forward_hook(lambda _module, _args, output: seen.append(output[0].nbytes))
    else:
        module = getattr(pipe.transformer, name)
        hook = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].nbytes))
    draw(pipe, Method("two steps", "2 steps", call={"num_inference_steps": 2}), [pair])
    hook.remove()
    return seen[0]


def measure(pipe: Any, case: Case, history: str, pairs: Sequence[Sequence[Pair]], references: Any) -> Measured:
    """Draw all pairs, batch by batch."""
    held: list[float] = []

    @contextmanager
    def switch(pipe: Any) -> Iterator[None]:
        with lesa.accelerate(pipe, case.forecaster, schedule=case.schedule, tap=case.place, history=history) as run:
            yield
        held.append(max(stream.bytes_held for stream in run.summary().values()))

    method, values = Method(case.name, str(case.schedule), switch=switch), []
    for batch, reference in zip(pairs, references, strict=True):
        pictures, _ = draw(pipe, method, batch)
        values += [psnr(picture, exact) for picture, exact in zip(pictures, reference, strict=True)]
    return Measured(held[0] / len(pairs[0]), values)


def table(rows: list[tuple[str, ...]]) -> str:
    """Lay rows out as Markdown."""
    widths = [max(map(len, column)) for column in zip(HEADS, *rows, strict=True)]
    lines = [HEADS, tuple("-" * width for width in widths), *rows]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--predictors", nargs="+", metavar="FOLDER", help="default: the LESA shipped with the model")
    parser.add_argument("--schedule", default="paper:7", help="of Taylor-2, and of the predictor by default (paper:7)")
    parser.add_argument("--taps", nargs="+", default=["feature", "output"], choices=PLACES, help="of Taylor-2")
    parser.add_argument("--histories", nargs="+", default=["model", "int8", "fp8", "cpu"])
    parser.add_argument("--pairs", type=int, default=48, help="how many prompts, the k-th with seed k (48)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dtype", default="float32", help="of the transformer, e.g. bfloat16 (float32)")
    options = parser.parse_args()

    pipe = lesa.load(options.model, torch_dtype=getattr(torch, options.dtype))
    pipe.set_progress_bar_config(disable=True)
    folders = options.predictors or [f"{options.model}/lesa/lesa-{options.schedule.replace(':', '')}"]
    predictors = [lesa.Predictor.from_pretrained(folder) for folder in folders]
    prompts = read_prompts(Path(options.model) / "prompts" / "heldout.txt")[: options.pairs]
    pairs = batches(pair_up(prompts, range(len(prompts))), options.batch_size)
    references = [draw(pipe, REFERENCE, batch)[0] for batch in pairs]
    authors = AUTHORS_FEATURES * feature_bytes(pipe, pairs[0][0])
    rows = []
    compared = cases(predictors, lesa.Schedule.parse(options.schedule), options.taps)
    with tqdm(total=len(compared) * len(options.histories), desc="cases", unit="case") as bar:
        for case in compared:
            plain = None
            for history in options.histories:
                measured = measure(pipe, case, history, pairs, references)
                plain = plain or measured
                rows.append(
                    (
                        *(case.name, case.place, str(case.schedule), history, f"{measured.held / 1000:.1f} kB"),
                        f"{measured.held / authors:.1%}",
                        f"{interval(measured.psnr):.2f}",
                        f"{paired_interval(measured.psnr, plain.psnr):+.2f}" if measured is not plain else "-",
                    )
                )
                bar.update()
    print(
        f"{options.model}, {options.dtype}, {len(prompts)} held-out prompts, batches of {options.batch_size}; the "
        f"authors' history: {authors / 1000:.1f} kB a stream and picture\n\n{table(rows)}"
    )


if __name__ == "__main__":
    main()
