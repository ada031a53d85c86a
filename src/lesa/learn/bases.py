"""What rows are carried to other grids by, measured on the real runs that they were solved in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lesa.learn.solving import Found, Problem
from lesa.rows.basis import NONE, Basis

UNLIKE = 1.0
"""By how much real runs may end elsewhere than the rows' algebra says, in dB."""


def basis_of(problem: Problem, found: Found) -> Basis | None:
    """Return the basis of rows that were solved for, given real runs with them.

    None where the algebra of rows does not say where real runs end: it knows of no streams that begin later, no run
    from mid-grid, no noise that a sampler adds, and of no latents that are rewritten between steps.
    """
    if problem.start or problem.begins != (0,) or problem.levels is not None or not math.isfinite(found.drift):
        return None
    drifts, answered = [], []
    for wanted, run in zip(problem.reference, found.recordings, strict=True):
        drifts.append(run.latents(found.full) - wanted.latents(found.full))
        answered.append(run.outputs(found.full) - wanted.outputs(found.full))
    answers = _along(problem, drifts, answered)
    gram = torch.zeros((), dtype=torch.float64)
    for wanted, drift, answer in zip(problem.reference, drifts, answered, strict=True):
        unlike = answer - answers[:, None] * drift
        gram = gram + problem.weighed(wanted, torch.cat([problem.columns(wanted, range(problem.ticks)), unlike], 1))
    made = Basis.of(problem.times.double(), gram / problem.calls, answers, problem.gaps(found.full), found.rows)
    left, real = made.left(problem.response, found.full, found.rows), float(problem.errors(found.recordings).mean())
    return made if left > 0 and real > 0 and abs(10 * math.log10(left / real)) < UNLIKE else None


def _along(problem: Problem, drifts: list[Tensor], answered: list[Tensor]) -> Tensor:
    """Return the multiple of the drift before each full step that is nearest to what it answered, (J,)."""
    along, size = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for wanted, drift, answer in zip(problem.reference, drifts, answered, strict=True):
        weights = problem.weights_of(wanted)[:, None]
        along = along + (weights * (answer * drift).sum(2)).sum(0)
        size = size + (weights * drift.square().sum(2)).sum(0)
    return torch.where(size > NONE, along / size.clamp_min(NONE), 0.0)
