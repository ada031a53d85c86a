"""What reusing the feature of one step at another leaves in the velocity, as few numbers that keep its size."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lesa.learn.training import Head, Runs
from lesa.rows.guidance import Guidance

LONGER = 1 / 16
"""By how much features are made longer to see what that does to outputs."""
NOTHING = 1e-8
"""What is left of errors' squares beside the runs' own directions is rounding below this share of them."""


@torch.no_grad()
@torch.autocast("cpu", enabled=False)  # of the caller's: what is projected on directions has to be as exact as they are
def sketched(runs: Runs, outputs_of: Head, guidance: Guidance, size: int) -> tuple[Tensor, Tensor]:
    """Return the errors E_ks as numbers whose squares add up to theirs, (S, S, P, numbers), 0 unless k < s; and in the
    same numbers what velocities grow by as features do, G_s (S, P, numbers).

    Along a run's own velocities they are exact, and at the output tap
    that is all there is, so that no search can take a good sketch for a good schedule. What is left behind a feature
    tap is projected to `size` random numbers.
    """
    prompts, _, steps, tokens, channels = runs.outputs.shape
    own = guidance.velocity(runs.outputs.float()).flatten(2)
    known = torch.linalg.qr(torch.cat([own.diff(dim=1), own[:, -1:]], dim=1).mT).Q
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(tokens * channels, size, generator=generator) / math.sqrt(size)
    drawn = drawn - known @ (known.mT @ drawn)  # (P, tokens * channels, size): of what is beside the directions
    width = known.shape[2]
    longer = guidance.velocity(outputs_of(runs.features * (1 + LONGER), runs.conditioning).float()).flatten(2)
    grown = (longer - own) / LONGER
    growth = torch.cat([grown @ known, grown @ drawn], dim=2).movedim(1, 0)
    errors = torch.zeros(steps, steps, prompts, width + size)
    for k in range(steps - 1):
        later = slice(k + 1, steps)
        reused = runs.features[:, :, k : k + 1].expand(-1, -1, steps - k - 1, -1, -1)
        outputs = outputs_of(reused, runs.conditioning[:, :, later]).float()
        missed = guidance.velocity(outputs).flatten(2) - own[:, later]
        errors[k, later] = torch.cat([missed @ known, missed @ drawn], dim=2).movedim(1, 0)
    beside = errors[..., width:]
    if float(beside.square().sum()) <= NOTHING * float(errors.square().sum()):
        return errors[..., :width].contiguous(), growth[..., :width].contiguous()
    return errors, growth
