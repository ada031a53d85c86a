"""Others' planners: how they choose which steps of a run are full, written from their papers' descriptions.

Each is a function of what its paper measures, costs of recorded runs or the loss of real ones. Steps count from the
run's first, which is always full. What a description leaves open is said where it is filled in.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lesa.rows.forecasters import Forecaster

Full = tuple[int, ...]
Loss = Callable[[Full], float]
"""What is left at the end of real runs with these full steps, the less the better."""

SPANS = 6
"""MeanCache's spans go from 0, which is reuse, to one less."""
PEAKS = 5.0
"""The power that MeanCache takes of its costs, the best one in its paper."""
KEPT_FIRST = 3
"""How many first steps are full in all of DPCache's schedules."""


# --- DPCache and MeanCache: paths of least cost


def path(cost: np.ndarray, budget: int, first: int = 1, *, exact: bool = True) -> Full:
    """Return the `budget` full steps whose path costs least; so many `first` steps are among them.

    `cost[i, j, k]` is that of the gap from the full step j to the next one, k, or to the end S, where i is the full
    step before j, or j itself where there is none. It is (S + 1, S + 1, S + 1), and only i <= j < k is looked at.
    The recurrence of DPCache (arXiv 2602.22654), which is not `exact`, D_mk = min_j D_{m-1,j} + cost[P_{m-1,j}, j, k],
    knows of each step one way to it, the cheapest so far, and so one i. An exact one keeps all pairs (i, j): it costs S
    times as much. Where costs do not depend on i they are one.

    Raises: ValueError if the budget does not fit.
    """
    steps = len(cost) - 1
    if not 1 <= first <= budget <= steps:
        raise ValueError(
            f"a path has from {first} to {steps} full steps, of which the first {first} are some, got {budget}; change "
            "the budget."
        )
    ways = np.full((steps + 1, steps + 1), np.inf)  # what it costs to get to i and then j
    ways[max(first - 2, 0), first - 1] = 0.0  # how the first ones cost is the same for all
    later = np.triu(np.ones((steps + 1, steps + 1), dtype=bool), 1)
    back: list[np.ndarray] = []
    for number in range(first, budget + 1):
        if not exact:
            cheapest = ways.min(0, keepdims=True)
            ways = np.where(ways == cheapest, ways, np.inf)
        through = np.where(later, ways[:, :, None] + cost, np.inf)
        if number < budget:
            through[:, :, steps] = np.inf  # the end comes last
        back.append(through.argmin(0))
        ways = through.min(0)
    full = [int(ways[:, steps].argmin()), steps]
    for before in reversed(back):
        full.insert(0, int(before[full[0], full[1]]))
    return (*range(first - 1), *full[1:-1])


def pact(velocities: Tensor, grid: Tensor, forecaster: Forecaster) -> np.ndarray:
    """Return DPCache's path-aware cost tensor of recorded runs, as `path` takes it.

    `velocities` are (calls, S, elements), and cost[i, j, k] is the mean over calls and elements of sum_s |v_s - f_s|
    over the steps s = j + 1 .. k, the full step k among them, of forecasts f from the full steps i and j alone. So a
    forecaster of a higher order than the line counts as one: how the paper's default, of order 2, is made of two full
    steps, its description leaves open. Its features are those of the last layer, here what the sampler gets.
    """
    steps = velocities.shape[1]
    cost = np.zeros((steps + 1,) * 3)
    flat = velocities.double().movedim(1, 0).flatten(1)
    for j in range(steps - 1):
        for i in range(j + 1):
            past = tuple(dict.fromkeys((i, j)))[-forecaster.memory :]
            with torch.no_grad():
                rows = forecaster.rows_of(grid, {step: past for step in range(j + 1, steps)})
            found = torch.stack([rows[step].coefficients.double() for step in range(j + 1, steps)]) @ flat[list(past)]
            errors = (found - flat[j + 1 :]).abs().mean(1).cumsum(0).numpy()
            cost[i, j, j + 1 :] = [*errors, errors[-1]]
    return cost


def dpcache(cost: np.ndarray, budget: int, first: int = KEPT_FIRST, *, exact: bool = False) -> Full:
    """Return DPCache's schedule (arXiv 2602.22654): the path of least cost with the first three steps full.

    Raises: ValueError as `path` does.
    """
    return path(cost, budget, min(first, budget), exact=exact)


def stability(velocities: Tensor, grid: Tensor, spans: int = SPANS) -> np.ndarray:
    """Return MeanCache's edges: how far its mean velocity over each gap is off, (S + 1, S + 1), inf unless it is one.

    Of recorded runs (calls, S, elements), the mean over calls of |u - u'|: u is the mean velocity from step k to j,
    u' = v_k + (t_j - t_k) J, and J = (u_rk - v_r) / (t_k - t_r) of the mean velocity from r = k - K to k. Of a gap's
    spans K = 0 (reuse) .. `spans` - 1 the best counts. Which norm is taken, and whether a gap's length counts, the
    descriptions at hand leave open: here it is the Euclidean one, and it does not.
    """
    steps = velocities.shape[1]
    v, times = velocities.double(), grid.double()
    place = torch.cat([torch.zeros_like(v[:, :1]), torch.cumsum(v * times.diff()[:, None], 1)], 1)
    edges = np.full((steps + 1, steps + 1), np.inf)
    for k in range(steps):
        ahead = (times[k + 1 :] - times[k])[:, None]
        mean = (place[:, k + 1 :] - place[:, k : k + 1]) / ahead
        for span in range(min(spans, k + 1)):
            r, slope = k - span, torch.zeros_like(v[:, k])
            if span:
                time = times[k] - times[r]
                slope = ((place[:, k] - place[:, r]) / time - v[:, r]) / time
            off = (mean - v[:, k : k + 1] - ahead * slope[:, None]).norm(dim=2).mean(0).numpy()
            edges[k, k + 1 :] = np.fmin(edges[k, k + 1 :], off)
    return edges


def meancache(edges: np.ndarray, budget: int, peaks: float = PEAKS) -> Full:
    """Return MeanCache's schedule (arXiv 2601.19961): the path whose edges cost least, to a power that punishes peaks.

    Raises: ValueError as `path` does.
    """
    cost = edges / edges[np.isfinite(edges)].max()
    return path(np.broadcast_to(cost**peaks, (len(cost),) * 3), budget)


# --- BudCache: annealing, then hill climbing


class Annealing(NamedTuple):
    """The settings of BudCache's search, those of its authors' FLUX configuration.

    Temperatures are shares of the first schedule's loss: the authors' loss is a mean square of latents, whose size
    differs from model to model.
    """

    iterations: int = 200
    hottest: float = 0.05
    coldest: float = 1e-5
    rounds: int = 20
    window: int = 3
    jumps: int = 2


PUBLISHED = Annealing()


class Search(NamedTuple):
    """The best full steps found, their loss, and how many schedules were run."""

    full: Full
    loss: float
    tried: int


def budcache(
    loss: Loss,
    steps: int,
    budget: int,
    *,
    first: int | None = None,
    most: float = math.inf,
    seed: int = 0,
    settings: Annealing = PUBLISHED,
) -> Search:
    """Search as BudCache does (arXiv 2606.13496): simulated annealing by real runs, then hill climbing from the best.

    It begins at random, with the first budget / 4 steps full, or so many `first` ones. A move shifts a full step within
    a window, or swaps it with any other; a worse one is taken with probability exp(-change / temperature). Hill
    climbing then goes to the best of all shifts and of some swaps drawn for each full step, while there is a better
    one. No schedule is run twice, and at most so many are.

    Raises: ValueError if the budget does not fit.
    """
    first = max(1, budget // 4) if first is None else first
    if not 1 <= first <= budget <= steps:
        raise ValueError(f"of {steps} steps, from {first} to all can be full, got {budget}; change the budget.")
    drawn, known = random.Random(seed), dict[Full, float]()

    def real(full: Full) -> float:
        if full not in known:
            known[full] = loss(full) if len(known) < most else math.inf
        return known[full]

    here = tuple(sorted([*range(first), *drawn.sample(range(first, steps), budget - first)]))
    start = real(here)
    for number in range(settings.iterations if first < budget < steps else 0):
        cooled = (settings.coldest / settings.hottest) ** (number / settings.iterations)
        moved = drawn.choice(_neighbours(here, steps, first, settings, drawn))
        worse = (real(moved) - real(here)) / (settings.hottest * cooled * start)
        if worse < 0 or drawn.random() < math.exp(-worse):
            here = moved
    best = min(known, key=lambda full: known[full])
    for _ in range(settings.rounds):
        around = min(_neighbours(best, steps, first, settings, drawn), key=real, default=best)
        if real(around) >= known[best]:
            break
        best = around
    return Search(best, known[best], sum(map(math.isfinite, known.values())))


def _neighbours(full: Full, steps: int, first: int, settings: Annealing, drawn: random.Random) -> Sequence[Full]:
    """Return the schedules with one full step shifted within the window, or swapped with one drawn, none twice."""
    others = [step for step in range(first, steps) if step not in full]
    found: dict[Full, None] = {}
    for step in full[first:]:
        near = [other for other in others if abs(other - step) <= settings.window]
        for other in (*near, *drawn.sample(others, min(settings.jumps, len(others)))):
            found[tuple(sorted({*full, other} - {step}))] = None
    return list(found)
