"""Rows of their own for the streams of guidance, noise by token, ridges and weights: what they would gain beside
calibrated rows.

    python benchmarks/stream_rows.py
    python benchmarks/stream_rows.py --guidance 5
    python benchmarks/stream_rows.py --only "noise by token"

Of a pipeline such as emoji-qwen's, which calls its transformer twice a step (`cond`, `uncond`), rows are solved gap by
gap in one run of a few prompts of train.txt, as `lesa.calibrate` solves them before it refines, and run on prompts of
validation.txt in the same batch: those of calibrations, over the guided velocities v of full steps and the first
latents, and variants of them. Rows per stream are over the difference d of the streams besides: with the norms that
guidance rescales, v = r (u + g d), each token's r taken from the full step, they span what rows of each stream's own
give. Noise by token is over the first latents of each token besides. A ridge of 'LOPO' is chosen for each gap by
leave-one-prompt-out. Printed is the drift of the last latents in dB, on prompts solved on and on validation prompts,
and how much less that is than with the shared row, with its bootstrap 95 % interval.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor

import lesa
from lesa.bench.report import markdown
from lesa.host.pipelines import arguments_of, for_each
from lesa.learn.call_files import read_prompts
from lesa.learn.collecting import TRAINING_SEED, VALIDATION_SEED
from lesa.learn.metrics import interval, paired_interval
from lesa.rows.gaps import RIDGE
from lesa.rows.schedule import Schedule

HEADS = ("schedule", "rows", "drift solved on, dB", "drift on validation, dB [95 %]", "less than the shared row's, dB")
SCHEDULES = ("at:0,9,19,30,36,40,43,45,47,48", "at:0,17,28,35,40,44,46,48")
RIDGES = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1e6)
"""What is chosen among by leave-one-prompt-out, as shares of the columns' mean square; the last one leaves nothing."""


@dataclass
class Walk:
    """What passed in a run of a batch so far: how many tokens a picture has; the noise levels of the steps and the end;
    of full steps velocities and the differences of streams, and the latents before every step and at the end,
    (prompts, elements) each, float64."""

    tokens: int = 0
    levels: list[float] = field(default_factory=list)
    velocities: dict[int, Tensor] = field(default_factory=dict)
    differences: dict[int, Tensor] = field(default_factory=dict)
    latents: list[Tensor] = field(default_factory=list)


Forecast = Callable[[int, Walk], Tensor]


def walk(
    pipe: Any,
    call: Mapping[str, Any],
    seeds: Sequence[int],
    full: Collection[int] | None = None,
    forecast: Forecast | None = None,
) -> Walk:
    """Run a batch, a prompt with each seed: all steps in full, or those of `full` alone and others with the velocities
    that are forecast."""
    run, streams, calls = Walk(), list[Any](), count()
    transformer, step = pipe.transformer.forward, pipe.scheduler.step

    def denoise(*args: Any, **kwargs: Any) -> Any:
        stream = next(calls) % 2
        if full is None or len(run.latents) in full:
            streams[stream:] = [transformer(*args, **kwargs)]
        return streams[stream]

    def stepped(velocity: Tensor, time: Any, latents: Tensor, **kwargs: Any) -> Any:
        tick, run.levels, run.tokens = len(run.latents), pipe.scheduler.sigmas.tolist(), latents.shape[1]
        run.latents.append(_flat(latents))
        if full is None or tick in full:
            run.velocities[tick] = _flat(velocity)
            (cond,), (uncond,) = streams
            run.differences[tick] = _flat(_difference(velocity, cond, uncond, call["true_cfg_scale"]))
        elif forecast is not None:
            velocity = forecast(tick, run).to(velocity).reshape(velocity.shape)
        return step(velocity, time, latents, **kwargs)

    with patch.object(pipe.transformer, "forward", denoise), patch.object(pipe.scheduler, "step", stepped):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        run.latents.append(_flat(pipe(**call, generator=generators).images))
    return run


def _difference(velocity: Tensor, cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """Return the difference of the streams, each token's scaled as guidance has scaled its velocity."""
    difference = cond - uncond
    norms = (uncond + guidance * difference).norm(dim=-1, keepdim=True)
    return difference * velocity.norm(dim=-1, keepdim=True) / norms


def _by_token(noise: Tensor, tokens: int) -> list[Tensor]:
    """Return a column for each token: the noise there, and nothing elsewhere."""
    columns = torch.zeros(tokens, len(noise), tokens, noise.shape[1] // tokens, dtype=noise.dtype)
    each = torch.arange(tokens)
    columns[each, :, each] = noise.unflatten(1, (tokens, -1)).movedim(1, 0)
    return list(columns.flatten(2))


def _flat(x: Tensor) -> Tensor:
    return x.detach().double().flatten(1)


class Variant(NamedTuple):
    """How rows are solved: the ridges that each gap's is chosen among, of the shared columns and of those of streams or
    of tokens, if there are any, and whether prompts count by what the shared rows left of them rather than alike."""

    name: str
    shared: Sequence[float] = (RIDGE,)
    streams: Sequence[float] = ()
    tokens: Sequence[float] = ()
    by_error: bool = False


SHARED = Variant("one row for all streams")
VARIANTS = (
    SHARED,
    Variant("ridge: LOPO", RIDGES),
    Variant("prompts weighed by their error", by_error=True),
    *(Variant(f"rows per stream, ridge {ridge:g}", streams=(ridge,)) for ridge in (1e-5, 1e-3, 1e-1)),
    Variant("rows per stream, ridge: LOPO", streams=RIDGES),
    *(Variant(f"noise by token, ridge {ridge:g}", tokens=(ridge,)) for ridge in (1e-3, 1e-1)),
    Variant("noise by token, ridge: LOPO", tokens=RIDGES),
)


class Solving:
    """Solves the row of each gap as the run comes to it, on the first prompts of the batch, `weights` (prompts,)."""

    def __init__(self, reference: Walk, full: Sequence[int], variant: Variant, weights: Tensor):
        self._wanted, self._variant, self._weights = reference, variant, weights
        self._ends = dict(pairwise([*full, len(reference.latents) - 1]))
        self._row = torch.empty(0)
        self.chosen: list[str] = []

    def __call__(self, tick: int, run: Walk) -> Tensor:
        newest = max(run.velocities)
        columns, shared = self._columns(run)
        if tick == newest + 1:
            end, known = self._ends[newest], len(self._weights)
            lacks = (self._wanted.latents[end] - run.latents[tick]) / (run.levels[end] - run.levels[tick])
            left = (lacks - run.velocities[newest])[:known]
            self._row = self._solved(columns[:known], left, shared)
        return run.velocities[newest] + torch.einsum("k,pkn->pn", self._row, columns)

    def _columns(self, run: Walk) -> tuple[Tensor, int]:
        """Return what a row combines, (prompts, columns, elements), and how many of these are the shared ones."""
        shared = [*run.velocities.values(), run.latents[0]]
        apart = list(run.differences.values()) if self._variant.streams else []
        apart += _by_token(run.latents[0], run.tokens) if self._variant.tokens else []
        return torch.stack([*shared, *apart], 1), len(shared)

    def _solved(self, columns: Tensor, target: Tensor, shared: int) -> Tensor:
        weighed = columns * self._weights[:, None, None]
        grams, targets = weighed @ columns.mT, torch.einsum("pkn,pn->pk", weighed, target)
        apart = self._variant.streams or self._variant.tokens or (0.0,)
        ridges = [(one, other) for one in self._variant.shared for other in apart]
        best = min(ridges, key=lambda ridge: _left_out(grams, targets, shared, ridge)) if len(ridges) > 1 else ridges[0]
        self.chosen.append("/".join(f"{one:.0e}" for one in best))
        return _ridged(grams.sum(0), targets.sum(0), shared, best)


def _ridged(gram: Tensor, target: Tensor, shared: int, ridge: tuple[float, float]) -> Tensor:
    parts = gram.diagonal().tensor_split([shared])
    held = [share * part.mean().expand(len(part)) for share, part in zip(ridge, parts, strict=True) if len(part)]
    return torch.linalg.lstsq(gram + torch.diag(torch.cat(held)), target, driver="gelsd").solution


def _left_out(grams: Tensor, targets: Tensor, shared: int, ridge: tuple[float, float]) -> float:
    """Return what rows solved on all prompts but one leave of that one, more than nothing would; the sum over all."""
    total = 0.0
    for gram, target in zip(grams, targets, strict=True):
        row = _ridged(grams.sum(0) - gram, targets.sum(0) - target, shared, ridge)
        total += float(row @ gram @ row - 2 * row @ target)
    return total


def drifts(run: Walk, reference: Walk) -> list[float]:
    """Return 10 log10(|x - x_ref|^2 / |x_ref|^2) of the last latents, in dB, of each prompt."""
    last, wanted = run.latents[-1], reference.latents[-1]
    return (10 * ((last - wanted).square().sum(1) / wanted.square().sum(1)).log10()).tolist()


def compared(
    pipe: Any,
    call: Mapping[str, Any],
    seeds: Sequence[int],
    known: int,
    schedules: Sequence[str],
    variants: Sequence[Variant] = VARIANTS,
) -> Iterator[tuple[str, ...]]:
    """Run variants, the shared one first, on every schedule, solved on the first `known` prompts of the batch; yields
    the lines of a table."""
    reference = walk(pipe, call, seeds)
    size = reference.latents[-1][:known].square().sum(1)
    for schedule in schedules:
        full = Schedule.parse(schedule).full_steps(len(reference.latents) - 1)
        best, error = list[float](), size
        for variant in variants:
            solving = Solving(reference, full, variant, 1 / (error if variant.by_error else size))
            found = drifts(walk(pipe, call, seeds, full, solving), reference)
            if not best:
                best, error = found[known:], size * torch.tensor([10 ** (one / 10) for one in found[:known]])
            gain = f"{paired_interval(best, found[known:])}"
            yield schedule, variant.name, f"{fmean(found[:known]):.2f}", f"{interval(found[known:])}", gain
            print(f"{schedule}, {variant.name}: {fmean(found[known:]):.2f} dB, ridges {solving.chosen}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/emoji-qwen")
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--prompts", type=int, default=12, help="how many to solve on (12)")
    parser.add_argument("--checks", type=int, default=12, help="how many of validation.txt (12)")
    parser.add_argument("--only", default="", help="the variants whose names begin so, beside the shared row")
    options = parser.parse_args()
    pipe = lesa.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    counts = {"train": (options.prompts, TRAINING_SEED), "validation": (options.checks, VALIDATION_SEED)}
    prompts, seeds = list[str](), list[int]()
    for name, (many, seed) in counts.items():
        prompts += read_prompts(Path(options.model) / "prompts" / f"{name}.txt")[:many]
        seeds += range(seed, seed + many)
    call = dict(arguments_of(pipe), true_cfg_scale=options.guidance, output_type="latent")
    batch = dict(for_each(prompts, call), prompt=prompts)
    variants = [SHARED, *(one for one in VARIANTS if one.name.startswith(options.only) and one is not SHARED)]
    rows = list(compared(pipe, batch, seeds, options.prompts, options.schedules, variants))
    print(f"\n{options.model}, guidance {options.guidance:g}, {options.prompts} prompts solved on\n")
    print(markdown(HEADS, rows, text=2))


if __name__ == "__main__":
    main()
