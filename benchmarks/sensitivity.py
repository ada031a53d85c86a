"""Say what a plan is worth under other settings than a model's own: shift, size, guidance, sampler, number of steps.

    python benchmarks/sensitivity.py
    python benchmarks/sensitivity.py --settings usual "shift 2" --budget 6

Of each setting: the regime, which is the PSNR of ten evenly spread steps against the setting's own full run; then so
many full steps in three ways: the sampler with as few steps, rows on full steps spread evenly over the run, and the
same rows on the schedule that `Planner.plan` finds, on runs of a few prompts of validation.txt under this setting. The
gain is the plan's over the better of the others, pair by pair, in PSNR (at most 60 dB a picture), and over evenly
spread full steps in the drift of the last latents. Pairs are held-out.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import diffusers
import numpy as np

import lesa
from lesa.bench.report import markdown
from lesa.learn.call_files import read_prompts
from lesa.learn.collect import record
from lesa.learn.collecting import VALIDATION_SEED
from lesa.learn.metrics import paired_interval, psnr
from lesa.learn.planning import Planner
from lesa.learn.references import References
from lesa.rows.named import named
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

REGIME = 10
HEADS = (
    *("10 steps, PSNR, dB", "model", "setting", "planned full steps", "fewer steps, dB", "evenly spread, dB"),
    *("planned, dB", "gain, dB [95 %]", "less drift, dB [95 %]"),
)


class Setting(NamedTuple):
    """What is other than usual: arguments of the call, settings of the scheduler, or its class."""

    model: str = "emoji-flux"
    call: Mapping[str, Any] = {}
    scheduler: Mapping[str, Any] = {}
    sampler: str | None = None


def shift(mu: float) -> Setting:
    """Return the setting whose times are shifted by exp(mu) whatever the size."""
    return Setting(scheduler={"base_shift": mu, "max_shift": mu})


def sampled_by(name: str) -> Setting:
    return Setting(scheduler=dict(use_flow_sigmas=True, prediction_type="flow_prediction"), sampler=name)


SETTINGS: dict[str, Setting] = {
    "usual": Setting(),
    "shift 0": shift(0.0),
    "shift 2": shift(2.0),
    "48 x 48": Setting(call=dict(height=48, width=48)),
    "96 x 96": Setting(call=dict(height=96, width=96)),
    "UniPC": sampled_by("UniPCMultistepScheduler"),
    "DPM++ 2M": sampled_by("DPMSolverMultistepScheduler"),
    "20 steps": Setting(call=dict(num_inference_steps=20)),
    "100 steps": Setting(call=dict(num_inference_steps=100)),
    "guidance 3, usual": Setting("emoji-qwen"),
    "guidance 1": Setting("emoji-qwen", call=dict(true_cfg_scale=1.0)),
    "guidance 5": Setting("emoji-qwen", call=dict(true_cfg_scale=5.0)),
}


def under(setting: Setting) -> Any:
    """Load the model, with the scheduler of the setting."""
    pipe = lesa.load(Path("models") / setting.model)
    pipe.set_progress_bar_config(disable=True)
    own = pipe.scheduler
    kind = getattr(diffusers, setting.sampler) if setting.sampler else type(own)
    pipe.scheduler = kind.from_config(own.config, **setting.scheduler)
    return pipe


def planned(pipe: Any, setting: Setting, options: argparse.Namespace) -> Schedule:
    """Plan under the setting."""
    folder = Path("models") / setting.model / "prompts"
    prompts = read_prompts(folder / "validation.txt")[: options.prompts]
    seeds = range(VALIDATION_SEED, VALIDATION_SEED + len(prompts))
    runs = record(pipe, prompts, seeds, None, None, seam=True, **setting.call)
    return Planner.of(pipe, runs, Tap(), prompts, **setting.call).plan(named(options.rows), options.budget)


def psnrs(pictures: list[Any], reference: list[Any]) -> list[float]:
    return [psnr(np.asarray(one), np.asarray(other)) for one, other in zip(pictures, reference, strict=True)]


def line(name: str, options: argparse.Namespace) -> list[str]:
    """Measure one setting and return its line of the table."""
    setting = SETTINGS[name]
    pipe = under(setting)
    schedule = planned(pipe, setting, options)
    heldout = read_prompts(Path("models") / setting.model / "prompts" / "heldout.txt")[: options.pairs]

    def drawn(**call: Any) -> References:
        return References(pipe, heldout, range(len(heldout)), {**setting.call, **call}, pictures=True)

    full = drawn()
    regime, fewer = (psnrs(drawn(num_inference_steps=n).pictures, full.pictures) for n in (REGIME, options.budget))
    evenly = Schedule.at([full.steps * k // options.budget for k in range(options.budget)])
    ways = [full.measure(named(options.rows), one) for one in (evenly, schedule)]
    spread, best = (psnrs(way.pictures, full.pictures) for way in ways)
    gain = paired_interval(best, max(fewer, spread, key=fmean))
    less = paired_interval(ways[0].drifts, ways[1].drifts)
    steps = ", ".join(map(str, schedule.full_steps(full.steps)))
    means = [f"{fmean(some):.2f}" for some in (fewer, spread, best)]
    return [f"{fmean(regime):.2f}", setting.model, name, steps, *means, f"{gain:+.2f}", f"{less:+.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS), metavar="NAME")
    parser.add_argument("--rows", default="lagrange:2", help="what is planned for, as `lesa plan` (lagrange:2)")
    parser.add_argument("--budget", type=int, default=8, help="full steps (8)")
    parser.add_argument("--prompts", type=int, default=8, help="how many validation prompts to plan on (8)")
    parser.add_argument("--pairs", type=int, default=16, help="how many held-out prompts, the k-th with seed k (16)")
    options = parser.parse_args()

    table = []
    for name in options.settings:
        table.append(line(name, options))
        print(*table[-1], sep=" | ", flush=True)
    print(f"\n{options.rows}, {options.budget} full steps, {options.prompts} prompts, {options.pairs} held-out pairs\n")
    print(markdown(HEADS, table, text=4))


if __name__ == "__main__":
    main()
