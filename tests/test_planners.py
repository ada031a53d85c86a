"""Others' planners: their paths are the best ones, their costs what they say, and their search ends where nothing near
is better; and the benchmark that sets them beside ours."""

import json
import runpy
import sys
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from lesa.bench import planners
from lesa.rows.forecasters import Lagrange, Reuse

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "planners.py"
GRID = torch.tensor([1.0, 0.9, 0.7, 0.45, 0.3, 0.1, 0.0], dtype=torch.float64)
STEPS = len(GRID) - 1


def costs(seed: int, steps: int = 9) -> np.ndarray:
    return np.random.default_rng(seed).random((steps + 1,) * 3)


def total(cost: np.ndarray, full: tuple[int, ...], first: int = 1) -> float:
    """What the gaps of a schedule cost from its `first`-th full step on."""
    ends = [full[0], *full, len(cost) - 1]
    return sum(cost[ends[m], ends[m + 1], ends[m + 2]] for m in range(first - 1, len(full)))


def velocities(seed: int = 0) -> torch.Tensor:
    return torch.randn(2, STEPS, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("first", [1, 2, 3])
@pytest.mark.parametrize("budget", [3, 4, 5, 9])
def test_an_exact_path_is_the_best_of_all(budget, first):
    for seed in range(5):
        cost = costs(seed)
        every = [(*range(first), *some) for some in combinations(range(first, 9), budget - first)]
        assert planners.path(cost, budget, first) == min(every, key=lambda full: total(cost, full, first))


def by_tables(cost: np.ndarray, budget: int, first: int) -> tuple[int, ...]:
    """DPCache's recurrence as published: of every step the least cost to it and the way there, by how many are full."""
    steps = len(cost) - 1
    best: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(first, first - 1): (0.0, tuple(range(first)))}
    for m in range(first + 1, budget + 2):
        for k in [steps] if m == budget + 1 else range(m - 1, steps):
            ways = [
                (known[0] + cost[known[1][-2] if j else 0, j, k], (*known[1], k))
                for j in range(k)
                if (known := best.get((m - 1, j)))
            ]
            if ways:
                best[m, k] = min(ways)
    return best[budget + 1, steps][1][:-1]


def test_the_recurrence_is_the_published_one_and_misses_the_best_at_times():
    missed = 0
    for seed in range(30):
        for first in (1, 3):
            cost = costs(seed)
            found = planners.dpcache(cost, 5, first)
            assert found == by_tables(cost, 5, first)
            best = planners.dpcache(cost, 5, first, exact=True)
            assert total(cost, best, first) <= total(cost, found, first)
            missed += found != best
    assert 0 < missed < 60


def test_where_costs_know_one_step_alone_both_paths_are_one():
    for seed in range(10):
        cost = np.broadcast_to(np.random.default_rng(seed).random((10, 10)), (10, 10, 10))
        assert planners.path(cost, 5, exact=False) == planners.path(cost, 5)


def test_a_path_has_room():
    with pytest.raises(ValueError, match="from 3 to 9"):
        planners.path(costs(0), 2, 3)
    with pytest.raises(ValueError, match="change the budget"):
        planners.path(costs(0), 10)
    assert planners.dpcache(costs(0), 2) == (0, 1)


def test_dpcaches_costs_are_sums_of_what_forecasts_from_two_full_steps_miss():
    v = velocities()
    cost = planners.pact(v, GRID, Lagrange(2))
    t = GRID
    for i, j in combinations(range(STEPS - 1), 2):
        line = [v[:, j] + (v[:, j] - v[:, i]) / (t[j] - t[i]) * (t[s] - t[j]) for s in range(j + 1, STEPS)]
        off = [float((v[:, j + 1 + n] - f).abs().mean()) for n, f in enumerate(line)]
        for k in range(j + 1, STEPS):
            assert cost[i, j, k] == pytest.approx(sum(off[: k - j]))
        assert cost[i, j, STEPS] == pytest.approx(sum(off))
    reused = planners.pact(v, GRID, Reuse())
    assert reused[0, 2, 4] == reused[2, 2, 4] == pytest.approx(float((v[:, 3:5] - v[:, 2:3]).abs().mean((0, 2)).sum()))


def test_meancaches_edges_are_how_far_mean_velocities_are_off():
    v, t = velocities(), GRID
    edges = planners.stability(v, GRID, spans=3)

    def mean(k: int, j: int) -> torch.Tensor:
        return sum(v[:, s] * (t[s + 1] - t[s]) for s in range(k, j)) / (t[j] - t[k])  # type: ignore[return-value]

    for k, j in combinations(range(STEPS + 1), 2):
        slopes = [(mean(k - n, k) - v[:, k - n]) / (t[k] - t[k - n]) for n in (1, 2) if n <= k]
        ways = [v[:, k], *(v[:, k] + (t[j] - t[k]) * slope for slope in slopes)]
        assert edges[k, j] == pytest.approx(min(float((mean(k, j) - way).norm(dim=1).mean()) for way in ways))
    assert np.isinf(edges[np.tril_indices(STEPS + 1)]).all()


def test_peaks_are_suppressed():
    edges = np.full((5, 5), np.inf)
    for (k, j), cost in {(0, 1): 0.0, (1, 4): 9.0, (0, 2): 5.0, (2, 4): 5.0}.items():
        edges[k, j] = cost
    assert planners.meancache(edges, 2, peaks=1.0) == (0, 1)
    assert planners.meancache(edges, 2) == (0, 2)


# --- BudCache


WANTED = (0, 5, 11, 17)


def apart(full: tuple[int, ...]) -> float:
    return 1.0 + sum(abs(one - other) for one, other in zip(full, WANTED, strict=True))


def test_budcache_finds_what_is_best_without_running_a_schedule_twice():
    run: list[tuple[int, ...]] = []

    def loss(full: tuple[int, ...]) -> float:
        run.append(full)
        return apart(full)

    found = planners.budcache(loss, 20, 4, seed=1)
    assert (found.full, found.loss) == (WANTED, 1.0)
    assert found.tried == len(run) == len(set(run))
    assert found == planners.budcache(apart, 20, 4, seed=1)


def test_hill_climbing_ends_where_nothing_near_is_better():
    still = planners.PUBLISHED._replace(iterations=0, rounds=100, window=1, jumps=0)
    found = planners.budcache(apart, 20, 4, settings=still).full
    for k, step in pairwise(found[1:]):
        assert k < step
    shifted = [tuple(sorted({*found, s + d} - {s})) for s in found[1:] for d in (-1, 1) if 0 < s + d < 20]
    assert all(apart(full) >= apart(found) for full in shifted if len(full) == 4)


def test_budcache_keeps_its_first_steps_and_its_limit():
    run: list[tuple[int, ...]] = []

    def loss(full: tuple[int, ...]) -> float:
        run.append(full)
        return float(sum(full))

    found = planners.budcache(loss, 30, 8, most=25)
    assert found.tried == len(run) == 25
    assert all(full[:2] == (0, 1) and len(full) == 8 for full in run)  # a quarter of the budget
    planners.budcache(loss, 30, 8, first=1, most=60)
    assert any(full[:2] != (0, 1) for full in run)
    assert planners.budcache(loss, 4, 4).full == (0, 1, 2, 3)
    with pytest.raises(ValueError, match="change the budget"):
        planners.budcache(loss, 4, 5)


# --- the benchmark


def test_the_table_has_a_line_of_each_planner_and_goes_on_where_it_was(tiny_flux, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tiny"
    tiny_flux.save_pretrained(folder)
    call = dict(height=32, width=32, num_inference_steps=8, max_sequence_length=16)
    (folder / "call.json").write_text(json.dumps(call))
    (folder / "prompts").mkdir()
    for name in ("validation", "heldout"):
        (folder / "prompts" / f"{name}.txt").write_text("a red apple\na blue fish\n")
    names = ["ours", "evenly spread", "DPCache", "MeanCache", "BudCache, runs as ours"]
    given = ["--rows", "reuse", "solved", "--budgets", "3", "--prompts", "2", "--pairs", "2"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["planners.py", "--model", str(folder), "--out", str(tmp_path), *given, "--planners", *names],
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line[:1] == "|"][2:]
    assert [row[2] for row in rows] == names * 2 and {row[0] for row in rows} == {"reuse", "solved"}
    by = {(row[0], row[2]): row for row in rows}
    assert by["reuse", "evenly spread"][3] == "0, 2, 5" and by["reuse", "evenly spread"][4] == "0"
    assert by["reuse", "DPCache"][4] == by["solved", "MeanCache"][4] == "16"  # two reference runs of eight steps
    for which in ("reuse", "solved"):
        assert 16 < int(by[which, names[-1]][4]) <= int(by[which, "ours"][4])
    kept = next(tmp_path.glob("tiny-2-2.json")).read_text()
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out == printed and next(tmp_path.glob("tiny-2-2.json")).read_text() == kept
