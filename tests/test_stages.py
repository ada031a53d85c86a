"""Bounds are where the weights change, as many as pay, and the errors that decide it are those of real forecasts."""

from itertools import combinations, pairwise
from types import SimpleNamespace

import pytest
import torch
from test_planning import answering, plain_world
from test_training import GRID, STEPS, head

from lesa.learn import stages
from lesa.learn.planning import Planner
from lesa.learn.stages import Squares, choose, learn
from lesa.rows.plan import histories

FULL = (0, 1, 2, 9)
PASTS = dict(histories(STEPS, FULL, 0, 3, False))
BEGINS = [0, 4, 7, 12]
"""Where stages begin, among the twelve skipped steps, and their end."""
WEIGHTS = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [-1.0, 0.9]])


def planner(seed: int, noise: float = 0.01) -> SimpleNamespace:
    """What a planner says of runs in which three stages of shared weights forecast all but the noise."""
    generator = torch.Generator().manual_seed(seed)
    errors = torch.zeros(STEPS, STEPS, 6, 8)
    alphas = 1 + torch.rand(len(PASTS), generator=torch.Generator().manual_seed(1))
    for n, (step, past) in enumerate(PASTS.items()):
        slopes = torch.randn(2, 6, 8, generator=generator)
        weights = WEIGHTS[sum(n >= begin for begin in BEGINS[1:-1])]
        newest = -alphas[n] * torch.einsum("k,kpd->pd", weights, slopes)
        newest += noise * torch.randn(6, 8, generator=generator)
        errors[past[-1], step] = newest
        errors[list(past[-2::-1]), step] = slopes + newest
    return SimpleNamespace(errors=errors, grid=GRID)


def cuts(bounds) -> list[int]:
    """The number of skipped steps before each bound."""
    return [sum(float(GRID[step]) > bound for step in PASTS) for bound in bounds]


def test_bounds_are_where_the_weights_change():
    assert cuts(learn(planner(0), PASTS, 3)) == BEGINS[1:-1]
    assert set(cuts(learn(planner(0), PASTS, 2))) < set(BEGINS)
    assert learn(planner(0), PASTS, 1) == ()


def test_there_are_as_many_stages_as_pay():
    assert cuts(choose(planner(0), planner(1), PASTS)) == BEGINS[1:-1]


def test_rows_of_a_stage_are_in_proportion_and_the_best_of_their_kind():
    squares = Squares.of(planner(0), PASTS)
    members = torch.ones(1, len(PASTS), dtype=torch.float64)
    (rows,) = squares.fit(members)
    assert torch.linalg.matrix_rank(rows, rtol=1e-9) == 1
    best = squares.left(rows).sum()
    for angle in torch.linspace(0, torch.pi, 200, dtype=torch.float64):
        weights = torch.stack([angle.cos(), angle.sin()])
        bent = torch.einsum("k,nkl,l->n", weights, squares.square, weights)
        alphas = squares.linear @ weights / bent
        assert squares.left(alphas[:, None] * weights).sum() >= best - 1e-9


def test_steps_with_one_past_feature_have_nothing_to_fit():
    pasts = dict(histories(STEPS, (0, 9), 0, 3, False))
    squares = Squares.of(planner(0), pasts)
    rows = squares.fit(torch.ones(1, len(pasts), dtype=torch.float64))[0]
    assert not rows[: list(pasts).index(10)].any() and rows.isfinite().all()


def test_no_other_cut_leaves_less():
    costs = torch.rand(8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    costs = costs.masked_fill(torch.ones(8, 8).tril().bool(), torch.inf)

    def left(cut):
        return sum(float(costs[first, end]) for first, end in pairwise(cut))

    for count in (1, 2, 4, 7):
        best = min(left([0, *inner, 7]) for inner in combinations(range(1, 7), count - 1))
        assert left(stages._cut(costs, count)) == pytest.approx(best)


@pytest.mark.parametrize("count", [0, 13])
def test_each_stage_has_a_skipped_step(count):
    with pytest.raises(ValueError, match="12 of them"):
        learn(planner(0), PASTS, count)


def test_errors_are_those_of_the_forecasts_in_the_latents():
    runs = plain_world(answering).runs(range(6))
    squares = Squares.of(Planner(runs, head, size=4096), PASTS)
    rows = torch.randn(len(PASTS), 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = []
    for (step, past), (newer, older) in zip(PASTS.items(), rows.tolist(), strict=True):
        duration, error = float(GRID[step + 1] - GRID[step]), 0.0
        for run in runs:
            feature = run.features["cond"]
            forecast = (1 - newer - older) * feature[past[-1]] + newer * feature[past[-2]] + older * feature[past[-3]]
            output = head(forecast, run.conditioning["cond"][step])
            error += float((duration * (output - run.outputs["cond"][step])).square().sum())
        expected.append(error)
    torch.testing.assert_close(squares.left(rows), torch.tensor(expected).double(), rtol=0.1, atol=0)
