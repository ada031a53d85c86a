"""Fit a predictor's numbers by least squares: Gauss-Newton steps on the loss of a phase, in place of an optimiser's.

Forecasts are linear in rows, rows are bilinear in LESA's weights and alphas, and the loss is made of squares of what
forecasts move the latents by. So near the present numbers it is that of a linear least squares problem, in which every
square counts as the loss asks for there. A step solves it for weights and alphas at once, and is damped (Levenberg,
Marquardt) until the loss falls; the gradient is the loss's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.func import jvp
from torch.nn import functional

from lesa.learn.unknowns import Unknowns

if TYPE_CHECKING:
    from lesa.learn.training import Problem, Rows, Runs

DAMPING, MOST_DAMPING, FACTOR = 1e-3, 1e6, 10.0
"""The share of the curvature that is added to it at first and at most, and by what it grows until the loss falls."""
SETTLED = 1e-3
"""Steps end with one that lowers the loss by less, 0.004 dB."""
TOKENS = 10
"""About how many tokens of a run say how the loss is curved; what it is, and which way it falls, all of them say."""
NOTHING = 1e-9
"""The curvature of numbers that nothing depends on, as a share of the mean."""


class GaussNewton:
    """Lowers the mean loss of some runs by a step at each call, which tells whether another may be worth it.

    `pairs` are runs that the problem's rows are fitted on, with their reference runs.
    """

    def __init__(self, problem: Problem, pairs: Sequence[tuple[Runs, Runs]], unknowns: Unknowns, closed_loop: bool):
        self.problem, self.pairs, self.unknowns, self.closed_loop = problem, pairs, unknowns, closed_loop
        self._growths = [_growths(problem, *pair, closed_loop) for pair in pairs]
        self._damping = DAMPING

    def __call__(self) -> bool:
        values, squares = self.unknowns.values(), self.squares()
        loss = self.loss(squares)
        gradient = torch.autograd.grad(loss, self.unknowns.parameters, retain_graph=True, materialize_grads=True)
        slope = torch.cat([one.flatten() for one in gradient]).double()
        curvature = self._curvature(torch.autograd.grad(loss, squares))
        while self._damping < MOST_DAMPING:
            damped = curvature + self._damping * curvature.diagonal().diag()
            self._move(values, torch.linalg.solve(damped, slope))
            with torch.no_grad():
                gained = float(loss - self.loss(self.squares()))
            if gained > 0:
                self._damping /= FACTOR
                return gained > SETTLED
            self._damping *= FACTOR
        self._move(values, torch.zeros_like(slope))
        return False

    def squares(self) -> list[Tensor]:
        """Return what the loss of each pair is made of (see `Problem.squares`)."""
        rows = self.unknowns.rows(self.problem)
        return [self.problem.squares(rows, *pair, self.closed_loop) for pair in self.pairs]

    def loss(self, squares: Sequence[Tensor]) -> Tensor:
        """Return the loss that they make, the mean over pairs."""
        known = zip(squares, self.pairs, strict=True)
        return torch.stack([self.problem.of_squares(x, pair[1], self.closed_loop) for x, pair in known]).mean()

    @torch.no_grad()
    def _move(self, values: Sequence[Tensor], step: Tensor) -> None:
        """Set the numbers to these values less a step."""
        steps = step.split([value.numel() for value in values])
        for parameter, value, change in zip(self.unknowns.parameters, values, steps, strict=True):
            parameter.copy_(value - change.view_as(value))

    def _curvature(self, weights: Sequence[Tensor]) -> Tensor:
        """Return the curvature of squares that count by these weights, (U, U), where what they are the squares of is
        linear in the U numbers."""
        rows = self.unknowns.rows(self.problem)
        slopes = _slopes(self.problem, rows, self.unknowns.parameters, self.closed_loop)
        reach = self.problem.reach(rows, self.closed_loop)[:, self.problem.skipped].detach()
        curvature = torch.zeros(len(slopes), len(slopes), dtype=torch.float64)
        for pair, growths, weight in zip(self.pairs, self._growths, weights, strict=True):
            growths = growths + self._answers(rows, *pair) if self.closed_loop else growths
            for grown, root in zip(growths, weight.sqrt(), strict=True):  # of each prompt
                velocities = torch.einsum("unk,nke->nue", slopes, grown)
                moved = torch.einsum("sn,nue->use", root[:, None] * reach, velocities).flatten(1)
                curvature += (moved @ moved.T).double() * 2 / growths.shape[-1]
        return curvature + NOTHING * curvature.diagonal().mean() * torch.eye(len(slopes))

    @torch.no_grad()
    def _answers(self, rows: Rows, runs: Runs, reference: Runs) -> Tensor:
        """Return what the `_growths` of runs lack, whose full steps would have seen other latents with these rows."""
        problem = self.problem
        if not problem.responses.any():
            return torch.zeros(())
        drifts = functional.pad(problem.moves(rows, runs, reference, closed_loop=True)[:, :-1], (0, 0, 0, 0, 1, 0))
        recorded = (runs.latents - reference.latents)[:, :-1].float()
        answers = problem.responses[:, None, None] * (drifts - recorded)
        combined, counts = _combined(problem, closed_loop=True)
        answers = answers[:, :, _some(runs)].flatten(2)[:, combined] * counts[..., None]
        answers = functional.pad(answers, (0, 0, 0, 1))  # an offset has none
        return torch.cat([weight * answers for weight in problem.guidance.weights], 2)


def _some(runs: Runs) -> slice:
    """Pick some of the tokens."""
    return slice(None, None, max(1, runs.features.shape[3] // TOKENS))


def _growths(problem: Problem, runs: Runs, reference: Runs, closed_loop: bool) -> Tensor:
    """Return what the velocity at each skipped step grows by as its forecast takes in more of each feature that it
    combines, and of an offset, (P, skipped, streams (K + 1), elements), at some of the tokens.

    A head with a norm is taken as it is near the reference run.
    """
    features, at = (x.features[:, :, :, _some(runs)].float() for x in (runs, reference))
    at, conditioning = (x[:, :, problem.skipped] for x in (at, reference.conditioning))
    combined, counts = _combined(problem, closed_loop)
    if closed_loop:
        combined = torch.searchsorted(torch.tensor(problem.full), combined)
    offset = (problem.projection.of_ones().float() if problem.projection else 1.0) * torch.ones_like(at)

    def grown(more: Tensor) -> Tensor:
        def velocity(features: Tensor) -> Tensor:
            return problem.guidance.velocity(problem.outputs(features, conditioning).float())

        return jvp(velocity, (at,), (more,))[1]

    growths = []
    for stream in torch.eye(len(problem.streams))[:, :, None, None, None]:
        for steps, counted in zip(combined.T, counts.T, strict=True):
            growths.append(grown(stream * counted[:, None, None] * features[:, :, steps]))
        growths.append(grown(stream * offset))
    return torch.stack(growths, 2).flatten(3)


def _slopes(problem: Problem, rows: Rows, parameters: Sequence[Tensor], closed_loop: bool) -> Tensor:
    """Return how much more of each feature, and of an offset, forecasts take in as each number grows.

    Shape (U, skipped, streams (K + 1)).
    """
    combined, counts = _combined(problem, closed_loop)
    matrix, offsets = problem.matrix(rows, closed_loop)
    taken = matrix.gather(2, combined.expand(len(matrix), -1, -1)) * counts
    taken = torch.cat([taken, offsets[..., None]], 2)
    each = torch.eye(taken.numel()).view(-1, *taken.shape)
    found = torch.autograd.grad(taken, parameters, each, is_grads_batched=True, allow_unused=True)
    slopes = [
        each.new_zeros(len(each), parameter.numel()) if slope is None else slope.reshape(len(each), -1)
        for slope, parameter in zip(found, parameters, strict=True)
    ]
    return torch.cat(slopes, 1).T.reshape(-1, *taken.shape).transpose(1, 2).flatten(2)


def _combined(problem: Problem, closed_loop: bool) -> tuple[Tensor, Tensor]:
    """Return which features each forecast combines, by their steps, and which of these count: (skipped, K) each.

    In closed loop all is made of full steps. Where there are fewer than K, the others do not count.
    """
    steps = [[k for k in problem.full if k < step] if closed_loop else past for step, past in problem.pasts.items()]
    most = max(map(len, steps))
    padded = torch.tensor([[*some, *some[:1] * (most - len(some))] for some in steps])
    return padded, torch.tensor([[1.0] * len(some) + [0.0] * (most - len(some)) for some in steps])
