"""The grid of a run: its S + 1 falling times in [0, 1], 1 being pure noise and the last one 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lesa.rows.schedule import check_steps

TOLERANCE = 1e-4
"""Grids whose times differ by no more than this are the same grid."""


def validate(times: Sequence[float] | Tensor) -> Tensor:
    """Return `times` as a grid: float64 on the CPU, shape (S + 1,), strictly falling within [0, 1], ending in 0.

    Raises: ValueError if `times` is anything else, or has more steps than a run.
    """
    grid = times_in_order(times)
    if grid[-1] != 0:
        raise ValueError(f"the last time of a grid is 0, got {float(grid[-1]):g}; append the final 0.")
    rising = (grid.diff() >= 0).nonzero()
    if len(rising):
        k = int(rising[0])
        raise ValueError(
            f"the times of a grid fall at every step, got {float(grid[k]):g} then {float(grid[k + 1]):g} at step {k}; "
            "pass one time per step, falling."
        )
    return grid


def times_in_order(times: Sequence[float] | Tensor) -> Tensor:
    """Return times that a sampler walks, float64 on the CPU, (S + 1,): in [0, 1]; they may repeat and end above 0.

    Heun's method calls the denoiser twice at a time, and some samplers end before 0.

    Raises: ValueError if `times` are not S + 1 numbers in [0, 1].
    """
    grid = torch.as_tensor(times, dtype=torch.float64, device="cpu").detach().clone()
    if grid.ndim != 1 or len(grid) < 2:
        raise ValueError(
            f"a grid is S + 1 times in one dimension, got shape {tuple(grid.shape)}; pass at least 2 times."
        )
    check_steps(len(grid) - 1)
    if not (grid.isfinite().all() and grid.min() >= 0 and grid.max() <= 1):
        raise ValueError(
            f"the times of a grid lie in [0, 1], got {float(grid.min()):g} to {float(grid.max()):g}; "
            "pass the noise levels of a flow-matching scheduler."
        )
    if not grid[-1] < grid[0]:
        raise ValueError(
            f"times fall from a run's first step to its end, got {float(grid[0]):g} and {float(grid[-1]):g}; pass "
            "them so."
        )
    return grid


def from_scheduler(scheduler: Any) -> Tensor:
    """Return the grid that a flow-matching scheduler of diffusers will walk, once its time steps are set.

    Raises: ValueError if its time steps are not set, or its `sigmas` are no grid (not flow matching, or two model calls
        a step as in Heun's method).
    """
    name = type(scheduler).__name__
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError(
            f"a grid needs the scheduler's time steps, got a {name} without; call its set_timesteps first."
        )
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        raise ValueError(f"a grid needs a scheduler with sigmas, got a {name}; use a flow-matching scheduler.")
    try:
        return validate(sigmas)
    except ValueError as error:
        raise ValueError(f"the sigmas of this {name} are no grid: {error}") from error


def step_of(scheduler: Any) -> int | None:
    """Return the step that a scheduler is at: `step_index`, before the first step `begin_index`, or None if unknown."""
    step = getattr(scheduler, "step_index", None)
    return getattr(scheduler, "begin_index", None) if step is None else step


def stage_of(time: float, bounds: Sequence[float]) -> int:
    """Return the noise band of `time`: 0 above the first of the falling `bounds`, 1 above the second, and so on.

    Example:
        >>> [stage_of(t, (0.9, 0.5)) for t in (1.0, 0.9, 0.5)]
        [0, 1, 2]
    """
    return sum(time <= bound for bound in bounds)


def matches(grid: Tensor, other: Tensor) -> bool:
    """Tell whether two grids are the same: as long as each other, and no time further apart than `TOLERANCE`."""
    return grid.shape == other.shape and bool((grid - other).abs().max() <= TOLERANCE)


def in_words(grid: Tensor) -> str:
    """Say how many steps a grid has and where it begins."""
    first = ", ".join(f"{float(t):.4f}" for t in grid[:3])
    return f"{len(grid) - 1} step{'s' * (len(grid) != 2)} ({first}{', ...' * (len(grid) > 3)})"
