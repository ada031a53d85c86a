"""The bound: what no plan of a schedule that taps the output comes nearer than, as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lesa.bench.benchmark import Drawn, Recogniser, batches, decoded, pair_up, score
from lesa.bench.lines import Pair
from lesa.bench.methods import BOUND
from lesa.bench.records import Log
from lesa.bench.scores import Score
from lesa.host.head import from_tokens
from lesa.learn.calls import takes
from lesa.learn.collect import record
from lesa.rows.schedule import Schedule


def bound_error(outputs: Tensor, grid: Tensor, full: Sequence[int]) -> Tensor:
    """Return what the best weights of the full steps' outputs miss of the final latents, (P, n, C).

    The last latents of run p are x_0 + sum_s dt_s v_s with dt_s = t_{s+1} - t_s. The sum's skipped part is replaced by
    sum over full f of a_f v_f, with weights a that all runs share, found by least squares on these very runs: one
    number per full step. On these outputs, (P, S, n, C), no plan of this schedule that taps the output comes nearer (in
    the sum of squares); in a real run the full steps' outputs drift too.
    """
    skipped = [step for step in range(len(grid) - 1) if step not in set(full)]
    dt = grid.diff()[skipped].to(outputs.device, torch.float64)
    missing = torch.einsum("s,psnc->pnc", dt, outputs[:, skipped].double())
    basis = outputs[:, list(full)].double().movedim(1, -1)
    weights = torch.linalg.lstsq(basis.flatten(0, -2), missing.flatten().unsqueeze(1)).solution
    return (basis @ weights).squeeze(-1) - missing


def fits(pipe: Any) -> bool:
    """Tell whether a pipeline's call lets latents be put in the place of its own, to be decoded."""
    return takes(pipe, "callback_on_step_end")


def add_bounds(
    log: Log,
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    schedules: Sequence[Schedule],
    *,
    batch_size: int = 16,
    recognise: Recogniser | None = None,
    scores: Mapping[str, Score] | None = None,
) -> None:
    """Record the pairs' reference runs at every token and add the bound of each schedule, as pictures, to a log.

    The velocities are taken from the latents, so that guidance is in them. A bound that the log holds is left as it is.

    Raises: ValueError as `lesa.bench.benchmark.pair_up` and `lesa.learn.collect.record` do.
    """
    pairs = pair_up(prompts, seeds)
    lacking = [one for one in schedules if not log.comparison.holds((BOUND, str(one)), pairs)]
    if not lacking:
        return
    cut, kept_latents = batches(pairs, batch_size), []
    for batch in tqdm(cut, desc="runs for the bound", unit="batch"):
        runs = record(pipe, [pair.prompt for pair in batch], [pair.seed for pair in batch], torch.arange)
        kept_latents += [run.latents.float() for run in runs]  # without the features, which are far larger
        grid = runs[0].grid
    latents = torch.stack(kept_latents)
    velocities = latents.diff(dim=1) / grid.diff().float()[:, None, None]
    for schedule in lacking:
        full = schedule.full_steps(len(grid) - 1)
        ends = latents[:, -1] + bound_error(velocities, grid, full).float()
        for batch, end, exact in zip(cut, ends.split(batch_size), latents[:, -1].split(batch_size), strict=True):
            drawn, reference = (Drawn(decode(pipe, batch, x), x, [full] * len(batch), [], [], []) for x in (end, exact))
            log.add(*score((BOUND, str(schedule)), batch, drawn, reference, recognise, scores))
    log.refresh()


def decode(pipe: Any, pairs: Sequence[Pair], latents: Tensor) -> list[np.ndarray]:
    """Decode final latents as the pipeline does: they are put in the place of its own after the last of two steps.

    A scheduler that stretches its grid to a last time, as Qwen-Image's, divides zero by zero in a run of one step.
    """
    latents = latents.to(pipe.device, pipe.transformer.dtype)

    def put(pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": from_tokens(pipe.transformer, latents, tensors["latents"])}

    return decoded(pipe, pairs, put, num_inference_steps=2)
