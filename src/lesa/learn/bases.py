"""What rows are carried to other grids by, measured on the real runs that they were solved in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lesa.learn.counted import Recording
from lesa.learn.solving import Found, Problem
from lesa.rows.basis import NONE, Basis
from lesa.rows.gaps import Full

UNLIKE = 1.0
"""By how much real runs may end elsewhere than the rows' algebra says, in dB."""


def basis_of(problem: Problem, found: Found) -> Basis | None:
    """Return the basis of rows that were solved for, given real runs with them.

    None where the algebra of rows does not say where real runs end: it knows of no streams that begin later, no run
    from mid-grid, no noise that a sampler adds, and of no latents that are rewritten between steps.
    """
    if problem.start or problem.begins != (0,) or problem.levels is not None or not math.isfinite(found.drift):
        return None
    pairs = list(zip(problem.reference, found.recordings, strict=True))
    answers = _along(problem, found.full, pairs)
    gram = torch.zeros((), dtype=torch.float64)
    for wanted, run in pairs:
        drifts, answered = _answered(found.full, wanted, run)
        unlike = answered - answers[:, None] * drifts
        gram = gram + problem.weighed(wanted, torch.cat([problem.columns(wanted, range(problem.ticks)), unlike], 1))
    made = Basis.of(problem.times.double(), gram / len(problem.weights), answers, problem.gaps(found.full), found.rows)
    left, real = made.left(problem.response, found.full, found.rows), float(problem.errors(found.recordings).mean())
    return made if left > 0 and real > 0 and abs(10 * math.log10(left / real)) < UNLIKE else None


def _answered(full: Full, wanted: Recording, run: Recording) -> tuple[Tensor, Tensor]:
    """Return how far a run is off before its full steps, and how far their outputs are then, (calls, J, elements)."""
    return run.latents(full) - wanted.latents(full), run.outputs(full) - wanted.outputs(full)


def _along(problem: Problem, full: Full, pairs: Sequence[tuple[Recording, Recording]]) -> Tensor:
    """Return the multiple of the drift before each full step that is nearest to what it answered, (J,)."""
    along, size = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for wanted, run in pairs:
        weights, (drifts, answered) = problem.weights_of(wanted)[:, None], _answered(full, wanted, run)
        along = along + (weights * (answered * drifts).sum(2)).sum(0)
        size = size + (weights * drifts.square().sum(2)).sum(0)
    return torch.where(size > NONE, along / size.clamp_min(NONE), 0.0)
