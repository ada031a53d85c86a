"""Refine solved rows on the end of the run: Gauss-Newton steps whose derivatives are differences of real runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from statistics import fmean

import torch
from torch import Tensor

from lesa.learn.counted import Recording
from lesa.learn.references import TINY
from lesa.learn.solving import Found, Problem

NUDGE = 0.3
"""How far the latents are moved to measure a derivative, as a share of what they are off."""
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""What Gauss-Newton steps may be damped by, as shares of the curvature's diagonal."""
TRIED = 3
"""How many dampings are run at most, those first that gain the most on calls left out; the best one is kept."""
MOST = 21
"""In how many directions rows are changed at most: all of them at 6 full steps; of more, those of newest outputs."""
WORTH = 0.1
"""Refining ends with a step that gains less than this, in dB."""
OF = "refinement"


def refined(problem: Problem, found: Found, steps: int) -> Iterator[Found]:
    """Take damped Gauss-Newton steps on sum_calls log |x - x_ref|^2 at the end, as long as real runs end nearer.

    With the derivatives D of the last latents, the logarithm of |e + D z|^2 is at most that of |e|^2, plus
    |e + D z|^2 / |e|^2 - 1: least squares with weights 1 / |e|^2. They are measured once, where the rows were found:
    later steps differ by what is left alone.
    """
    changes = directions(problem, found) if steps and math.isfinite(found.drift) else []
    if not changes:
        return
    moved = _moved(problem, found, changes)
    for _ in range(steps):
        better = _best_step(problem, found, changes, moved)
        if better is None:
            return
        yield better
        if better.drift > found.drift - WORTH:
            return
        found = better


def _moved(problem: Problem, found: Found, changes: list[Tensor]) -> list[Tensor]:
    """Return how far each change of the rows moves the last latents, (calls, changes, elements) for each recording; a
    change under which a run overflows moves nothing, and is not made."""
    moved: list[list[Tensor]] = [[] for _ in found.recordings]
    for change in changes:
        runs = problem.run_rows(found.full, found.rows + change, of=OF).recordings
        for some, one, now in zip(moved, runs, found.recordings, strict=True):
            move = (_end(one) - _end(now)).float()
            some.append(torch.where(move.isfinite().all(1, keepdim=True), move, 0.0))
    return [torch.stack(some, 1) for some in moved]


def _end(run: Recording) -> Tensor:
    """Return the last latents, (calls, elements), at the elements that are kept."""
    return run.latents([run.ticks])[:, 0]


def _best_step(problem: Problem, found: Found, changes: list[Tensor], moved: list[Tensor]) -> Found | None:
    """Return the best of the steps that promise to gain on other calls; None if none ends nearer."""
    grams: list[Tensor] = []
    slopes: list[Tensor] = []
    for some, run, wanted in zip(moved, found.recordings, problem.reference, strict=True):
        derivatives, error = some.double(), _end(run) - _end(wanted)
        weights = 1 / error.square().sum(1).clamp_min(TINY)
        grams.append(weights[:, None, None] * (derivatives @ derivatives.mT))
        slopes.append(weights[:, None] * torch.einsum("pcn,pn->pc", derivatives, error))
    gram, slope = torch.cat(grams), torch.cat(slopes)
    gains = {damping: _left_out(gram, slope, damping) for damping in DAMPINGS}
    best = found
    for damping in sorted(DAMPINGS, key=gains.__getitem__)[:TRIED]:
        if gains[damping] >= 0:
            break
        step = _damped(gram.sum(0), slope.sum(0), damping)
        rows = found.rows + torch.einsum("c,cjk->jk", step, torch.stack(changes))
        tried = problem.run_rows(found.full, rows, of=OF)
        best = tried if tried.drift < best.drift else best
    return None if best is found else best


def _damped(gram: Tensor, slope: Tensor, damping: float) -> Tensor:
    return -torch.linalg.solve(gram + damping * torch.diag(gram.diagonal() + TINY), slope)


def _left_out(gram: Tensor, slope: Tensor, damping: float) -> float:
    """Return the mean change of log |e|^2, as the derivatives have it, of each call by the step that the others make:
    of curvatures, (calls, changes, changes), and slopes; of one call by its own step."""
    changes: list[float] = []
    for k in range(len(gram)):
        others = [i for i in range(len(gram)) if i != k] or [k]
        step = _damped(gram[others].sum(0), slope[others].sum(0), damping)
        left = 1 + 2 * step @ slope[k] + step @ gram[k] @ step
        changes.append(math.log(max(float(left), TINY)))
    return fmean(changes)


def directions(problem: Problem, found: Found) -> list[Tensor]:
    """Return by what rows are changed to measure derivatives, (J, J + 1) each.

    They are well apart, though outputs are nearly alike. Of many those are left out that change the oldest outputs.
    """
    gaps, count = problem.gaps(found.full), len(found.full)
    gram = problem.equations(gaps, found).gram
    error = float(problem.errors(found.recordings).mean().sqrt())
    result: list[tuple[int, Tensor]] = []
    for j, end in enumerate(gaps.ends):
        if not (steps := list(gaps.steps(j))):
            continue
        moves = float(problem.response[end, steps].abs().sum())
        for k in gaps.columns(j):
            row = torch.zeros(count + 1, dtype=torch.float64)
            row[k] = 1.0
            if k < j:
                row[k + 1] = -1.0
            size = float((row @ gram @ row).clamp_min(TINY).div(len(problem.weights)).sqrt()) * moves
            change = torch.zeros_like(found.rows)
            change[j] = row * (NUDGE * error / max(size, TINY))
            result.append((abs(j - k) if k <= j else 0, change))
    return [change for _, change in sorted(result, key=lambda one: one[0])[:MOST]]
