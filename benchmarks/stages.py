"""Measure what LESA's stages are worth: 1 to 6 of them, with fixed bounds and with bounds learned from recorded runs.

    python benchmarks/stages.py --data out/runs --schedules at:0,30,40,45,48,49 paper:7

Trains one LESA for each number of stages, kind of bounds and schedule on the runs that `lesa collect` wrote, and prints
one table. The fixed bounds of 3 stages are the paper's times, 0.9 and 0.5; others are spread evenly. Free rows (L2P)
are as if each step had a stage of its own. Drift is how far runs of the validation prompts end from their reference
runs; PSNR is against the same model's held-out pictures with every step full, and the difference is to 3 stages with
the paper's bounds, pair by pair; both with bootstrap 95 % intervals. The predictors are kept in --out, and those that
are there are not trained again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import lesa
from lesa.bench.benchmark import compare
from lesa.bench.methods import forecast
from lesa.bench.report import markdown
from lesa.cli import main as command
from lesa.learn.call_files import read_prompts
from lesa.learn.collect import record
from lesa.learn.collecting import VALIDATION_SEED
from lesa.learn.metrics import interval
from lesa.learn.outcome import GAINED_NOTHING
from lesa.learn.training import drift
from lesa.learn.trajectory import Store

MODEL = "models/emoji-flux"
PAPER = (0.9, 0.5)
USUAL = "3 fixed"
HEADS = ("schedule", "stages", "at times", "drift, dB", "PSNR, dB [95 %]", "difference, dB [95 %]")


def fixed(count: int) -> tuple[float, ...]:
    """The paper's bounds for 3 stages, and evenly spread ones for other numbers."""
    return PAPER if count == 3 else tuple(round(1 - k / count, 3) for k in range(1, count))


def ways(most: int) -> dict[str, list[str]]:
    """Name every way to set the stages, with the options of `lesa train` for it."""
    found = {"1": ["--stages", "1"]}  # without a bound to learn
    for count in range(2, most + 1):
        found[f"{count} fixed"] = ["--stages", ",".join(map(str, fixed(count)))]
        found[f"{count} learned"] = ["--stages", str(count)]
    return {**found, "free rows": ["--method", "l2p"]}


def trained(options: argparse.Namespace, schedule: str, name: str, how: Sequence[str]) -> lesa.Predictor:
    """Train a predictor, or load it if its training has ended."""
    out = options.out / f"{schedule} {name}".replace(" ", "-").replace(":", "").replace(",", "-")
    if not (out / "config.json").exists():
        data = ["--data", str(options.data), "--schedule", schedule]
        prompts = ["--validation-prompts", str(validation_file(options)), "--validation", str(options.validation)]
        length = ["--rounds", str(options.rounds), "--updates", *map(str, options.updates)]
        code = command(["train", options.model, *data, *prompts, *length, *how, "--out", str(out)])
        if code not in (0, GAINED_NOTHING):  # what was of no use is to be seen in the table
            raise SystemExit(code)
    return lesa.Predictor.from_pretrained(out)


def validation_file(options: argparse.Namespace) -> Path:
    return Path(options.model) / "prompts" / "validation.txt"


def drifts(options: argparse.Namespace, pipe: Any, predictors: Sequence[lesa.Predictor]) -> list[float]:
    """Run the validation prompts with each predictor, and say how far the runs end from their reference runs, in dB."""
    collection = Store.open(options.data).collection
    prompts = read_prompts(validation_file(options))[: options.validation]
    run = (prompts, range(VALIDATION_SEED, VALIDATION_SEED + len(prompts)), torch.tensor(collection.tokens))
    reference, found = record(pipe, *run, **collection.call), []
    for predictor in predictors:
        with lesa.accelerate(pipe, predictor):
            found.append(drift(record(pipe, *run, **collection.call), reference))
    return found


def times(predictor: lesa.Predictor) -> str:
    """The bounds between a predictor's stages."""
    return " ".join(f"{bound:.2f}" for bound in getattr(predictor, "bounds", ())) or "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--data", type=Path, default=Path("out/runs"), help="what lesa collect wrote (out/runs)")
    parser.add_argument("--schedules", nargs="+", default=["at:0,30,40,45,48,49", "paper:7"])
    parser.add_argument("--most", type=int, default=6, help="stages (6)")
    parser.add_argument("--rounds", type=int, default=2, help="of each training's closed-loop phase (2)")
    parser.add_argument("--updates", type=int, nargs=2, default=(200, 200), help="in each phase or round (200 200)")
    parser.add_argument("--validation", type=int, default=24, help="how many validation prompts (24)")
    parser.add_argument("--pairs", type=int, default=48, help="how many held-out prompts, the k-th with seed k (48)")
    parser.add_argument("--out", type=Path, default=Path("out/stages"), help="for the predictors (out/stages)")
    options = parser.parse_args()

    cases = {
        (name, schedule): trained(options, schedule, name, how)
        for schedule in options.schedules
        for name, how in ways(options.most).items()
    }
    pipe = lesa.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    prompts = read_prompts(Path(options.model) / "prompts" / "heldout.txt")[: options.pairs]
    methods = [forecast(name, one, one.schedule) for (name, _), one in cases.items()]
    compared = compare(pipe, methods, prompts, range(len(prompts)), timed=0, shown=0)
    rows = []
    for (key, predictor), drifted in zip(cases.items(), drifts(options, pipe, list(cases.values())), strict=True):
        name, schedule = key
        usual = (USUAL, schedule)
        psnr = interval([one.psnr for one in compared.records[key]])
        difference = "-" if key == usual or usual not in cases else f"{compared.difference(key, usual):+.2f}"
        rows.append((schedule, name, times(predictor), f"{drifted:.2f}", f"{psnr:.2f}", difference))
    print(f"\n{len(prompts)} held-out and {options.validation} validation prompts\n\n{markdown(HEADS, rows, text=3)}")


if __name__ == "__main__":
    main()
