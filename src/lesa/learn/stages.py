"""Choose the bounds between LESA's stages, and how many there are, from recorded runs.

A stage is a run of skipped steps that share the weights w of past features; each step has its own alpha. With E_ks the
error that reusing the feature of step k leaves in the output of step s (`lesa.learn.planning`), and `new` the newest
feature held, the forecast h_new + alpha_s sum_k w_k (h_k - h_new) leaves

    E_new,s + alpha_s sum_k w_k (E_ks - E_new,s)

in the output, and (t_{s+1} - t_s) times that in the latents. Its square is a quadratic in alpha_s w. So the best
weights and alphas of every possible stage, a least squares fit of rank one, are found on small matrices, and the bounds
whose stages leave least together by dynamic programming.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from lesa.learn.planning import Planner

MOST = 6
ENOUGH = 0.9
"""A number of stages is enough if it gains this share of what any gains over one stage, on validation runs."""
TURNS = 30
RIDGE = 1e-9

Pasts = Mapping[int, Sequence[int]]
"""For every skipped step the steps in its history, oldest first (`lesa.rows.plan.histories`)."""


def learn(planner: Planner, pasts: Pasts, count: int) -> tuple[float, ...]:
    """Return the falling bounds between the `count` stages that forecast a planner's runs best.

    Raises: ValueError if there are not as many skipped steps as stages.
    """
    if not 1 <= count <= len(pasts):
        raise ValueError(f"each stage has a skipped step, got {count} stages for {len(pasts)} of them; change it.")
    return _bounds(planner, pasts, _cut(_costs(Squares.of(planner, pasts)), count))


def choose(planner: Planner, validation: Planner, pasts: Pasts) -> tuple[float, ...]:
    """Return the bounds of as many stages, up to `MOST`, as the runs of `validation` ask for.

    It is the smallest number that is `ENOUGH` there, with rows fitted to the planner's runs.
    """
    squares, unseen = Squares.of(planner, pasts), Squares.of(validation, pasts)
    costs = _costs(squares)
    cuts = [_cut(costs, count) for count in range(1, min(MOST, len(pasts)) + 1)]
    left = [unseen.left(squares.fit(_members(cut)).sum(0)).sum() for cut in cuts]
    enough = left[0] - ENOUGH * (left[0] - min(left))
    return _bounds(planner, pasts, next(cut for cut, error in zip(cuts, left, strict=True) if error <= enough))


class Squares(NamedTuple):
    """The squared error that rows leave at each of n skipped steps: constant - 2 r.linear + r.(square r).

    r are the coefficients of a row before its newest, which makes their sum 1; the newest of them come first. Shapes:
    `constant` (n,), `linear` (n, K - 1) and `square` (n, K - 1, K - 1), 0 where a step has a shorter past than K.
    """

    constant: Tensor
    linear: Tensor
    square: Tensor

    @classmethod
    def of(cls, planner: Planner, pasts: Mapping[int, Sequence[int]]) -> Squares:
        """Sum up what a planner's runs say of the skipped steps; `pasts` holds the steps in each one's history."""
        width = max(len(past) for past in pasts.values()) - 1
        newest = torch.stack([planner.errors[past[-1], step].flatten() for step, past in pasts.items()]).double()
        slopes = torch.zeros(len(pasts), width, newest.shape[1], dtype=torch.float64)
        for n, (step, past) in enumerate(pasts.items()):
            older = planner.errors[list(past[-2::-1]), step].flatten(1).double()
            slopes[n, : len(older)] = older - newest[n]
        return cls(
            newest.square().sum(1),
            -torch.einsum("nkd,nd->nk", slopes, newest),
            torch.einsum("nkd,nld->nkl", slopes, slopes),
        )

    def left(self, rows: Tensor) -> Tensor:
        """Return the error that rows (..., n, K - 1) leave at each step, (..., n)."""
        bent = torch.einsum("...nk,nkl,...nl->...n", rows, self.square, rows)
        return self.constant - 2 * (rows * self.linear).sum(-1) + bent

    def fit(self, members: Tensor) -> Tensor:
        """Return the best rows (Q, n, K - 1) of Q stages, in each of which all are in proportion.

        `members` (Q, n) is 1 for the steps of a stage; the rows of the others are 0. Weights and alphas are solved by
        turns, from the difference of the newest two features on.
        """
        weights = torch.zeros(len(members), self.linear.shape[1], dtype=torch.float64)
        weights[:, :1] = -1.0
        ridge = RIDGE * self.square.diagonal(dim1=1, dim2=2).mean() * torch.eye(self.linear.shape[1])
        for turn in range(TURNS + 1):
            weights = functional.normalize(weights)
            bent = torch.einsum("qk,nkl,ql->qn", weights, self.square, weights)
            alphas = members * (weights @ self.linear.T) / bent.clamp_min(torch.finfo(bent.dtype).tiny)
            if turn < TURNS:
                shared = torch.einsum("qn,nkl->qkl", alphas.square(), self.square)
                weights = torch.linalg.solve(shared + ridge, alphas @ self.linear)
        return alphas[:, :, None] * weights[:, None]


def _members(cut: Sequence[int]) -> Tensor:
    """Mark the steps of each stage, (stages, n); `cut` is 0, where the other stages begin, and n."""
    steps = torch.arange(cut[-1])
    return torch.stack([(steps >= first) & (steps < end) for first, end in pairwise(cut)]).double()


def _costs(squares: Squares) -> Tensor:
    """Return what the best stage over the skipped steps from the i-th up to the j-th leaves, (n + 1, n + 1)."""
    n = len(squares.constant)
    first, last = torch.triu_indices(n, n)
    steps = torch.arange(n)
    members = ((steps >= first[:, None]) & (steps <= last[:, None])).double()
    costs = torch.full((n + 1, n + 1), math.inf, dtype=torch.float64)
    costs[first, last + 1] = (members * squares.left(squares.fit(members))).sum(1)
    return costs


def _cut(costs: Tensor, count: int) -> list[int]:
    """Cut the skipped steps into the stages that leave least together; returned as `_members` takes it."""
    best, begins = costs[0], []
    for _ in range(count - 1):
        best, begin = (best[:, None] + costs).min(0)
        begins.append(begin)
    cut = [len(costs) - 1]
    for begin in reversed(begins):
        cut.insert(0, int(begin[cut[0]]))
    return [0, *cut]


def _bounds(planner: Planner, pasts: Pasts, cut: Sequence[int]) -> tuple[float, ...]:
    """Put each bound half-way between the times of the skipped steps that it parts."""
    times = planner.grid[list(pasts)]
    return tuple(float(times[begin - 1] + times[begin]) / 2 for begin in cut[1:-1])
