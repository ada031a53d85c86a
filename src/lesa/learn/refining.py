"""Refine solved rows on the end of the run: Gauss-Newton steps whose derivatives are differences of real runs."""

from __future__ import annotations

import torch
from torch import Tensor

from lesa.learn.references import TINY
from lesa.learn.solving import Found, Problem

NUDGE = 0.3
"""How far the latents are moved to measure a derivative, as a share of what they are off."""
DAMPINGS = (1e-4, 1e-2, 1.0)
"""What Gauss-Newton steps are damped by, as shares of the curvature's diagonal; all are run, and the best one kept."""
MOST = 21
"""In how many directions rows are changed at most: all of them at 6 full steps; of more, those of newest outputs."""
OF = "refinement"


def refined(problem: Problem, found: Found) -> Found | None:
    """Take the best damped Gauss-Newton step on sum_calls log |x - x_ref|^2 at the end; None if none is better.

    With the derivatives D of the last latents, the logarithm of |e + D z|^2 is at most that of |e|^2, plus
    |e + D z|^2 / |e|^2 - 1: least squares with weights 1 / |e|^2.
    """
    changes = directions(problem, found)
    if not changes:
        return None
    off = problem.off(found.recordings)
    moved: list[list[Tensor]] = [[] for _ in off]
    for change in changes:
        runs = problem.run_rows(found.full, found.rows + change, of=OF).recordings
        for some, one, now in zip(moved, runs, found.recordings, strict=True):
            some.append(one.final - now.final)
    gram = torch.zeros(len(changes), len(changes), dtype=torch.float64)
    slope = torch.zeros(len(changes), dtype=torch.float64)
    for some, error in zip(moved, off, strict=True):
        derivatives, error = torch.stack(some, 1).double(), error.double()
        weights = 1 / error.square().sum(1).clamp_min(TINY)
        gram += (weights[:, None, None] * (derivatives @ derivatives.mT)).sum(0)
        slope += (weights[:, None] * torch.einsum("pcn,pn->pc", derivatives, error)).sum(0)
    return _best_step(problem, found, changes, gram, slope)


def _best_step(problem: Problem, found: Found, changes: list[Tensor], gram: Tensor, slope: Tensor) -> Found | None:
    best = found
    for damping in DAMPINGS:
        held = gram + damping * torch.diag(gram.diagonal() + TINY)
        step = -torch.linalg.solve(held, slope)
        rows = found.rows + torch.einsum("c,ctjk->tjk", step, torch.stack(changes))
        tried = problem.run_rows(found.full, rows, of=OF)
        best = tried if tried.drift < best.drift else best
    return None if best is found else best


def directions(problem: Problem, found: Found) -> list[Tensor]:
    """Return by what rows are changed to measure derivatives, (T, J, J) each.

    They are well apart, though outputs are nearly alike. Of many those are left out that change the oldest outputs.
    """
    gaps, count = problem.gaps(found.full), len(found.full)
    gram = problem.equations(gaps, found).gram
    error = float(problem.errors(found.recordings).mean().sqrt())
    result: list[tuple[int, Tensor]] = []
    for j, (begin, end) in enumerate(zip(found.full, gaps.ends, strict=True)):
        if end == begin + 1:
            continue
        moves = float(problem.response[end, begin + 1 : end].abs().sum())
        for kind in range(gaps.kinds):
            for k in range(gaps.lows[j], j + 1):
                row = torch.zeros(gaps.kinds, count, dtype=torch.float64)
                row[kind, k] = 1.0
                if k < j:
                    row[kind, k + 1] = -1.0
                flat = row.flatten()
                size = float((flat @ gram @ flat).clamp_min(TINY).div(len(problem.weights)).sqrt()) * moves
                change = torch.zeros_like(found.rows)
                change[:, j] = row * (NUDGE * error / max(size, TINY))
                result.append((j - k, change))
    return [change for _, change in sorted(result, key=lambda one: one[0])[:MOST]]
