"""What recorded runs say of their sampler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lesa.learn.trajectory import Trajectory
from lesa.rows.guidance import UNEXPLAINED
from lesa.rows.sampler import Sampler


def euler(grid: Tensor) -> Sampler:
    """Return the numbers of Euler's method: x_{s+1} = x_s + (t_{s+1} - t_s) v_s."""
    durations = grid.diff().double()
    steps = len(durations)
    return Sampler(torch.eye(steps, dtype=torch.float64), torch.diag(durations), durations.new_zeros(steps, 0))


def sampler_of(runs: Sequence[Trajectory]) -> Sampler:
    """Return the numbers of the sampler of recorded runs; of runs that were stored without them, Euler's.

    Raises: ValueError if the sampler has none, runs have different ones, or Euler's are not those of the runs.
    """
    first = runs[0]
    if refused := next((run.refusal for run in runs if run.refusal), ""):
        raise ValueError(
            f"planning and training take the sampler as numbers, and this one has none: {refused} Its runs are "
            "accelerated all the same, on a schedule that is given."
        )
    if first.sampler is None:
        for run in runs:
            _check_euler(run)
        return euler(first.grid)
    for run in runs:
        if run.sampler is None or not _alike(run.sampler, first.sampler):
            raise ValueError(f"all runs have one sampler, {run!r} has another than {first!r}; collect them alike.")
    return first.sampler


def _alike(one: Sampler, other: Sampler) -> bool:
    return one is other or (len(one) == len(other) and torch.allclose(one.response, other.response, 1e-3, 1e-6))


def _check_euler(run: Trajectory) -> None:
    """Raise ValueError if a run without its sampler's numbers did not go by Euler's, as far as one stream shows it."""
    outputs = run.outputs[run.streams[0]].float()
    moved = run.latents.float().diff(dim=0)
    if len(run.streams) > 1 or outputs.shape != moved.shape:
        return
    missed = float((moved - run.grid.diff().float()[:, None, None] * outputs).norm() / moved.norm())
    if missed > UNEXPLAINED:
        raise ValueError(
            f"runs stored without their sampler's numbers went by Euler's method, of which {run!r} leaves "
            f"{missed:.0%} unexplained; collect it anew, and its numbers are kept."
        )
