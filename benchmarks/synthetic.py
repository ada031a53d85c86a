"""Judge rows where no model was trained: on velocity fields known in closed form, whose sizes go like FLUX.1-dev's.

    python benchmarks/synthetic.py

Data are a mixture of Gaussians of as many dimensions as the latents have: in each of many blocks of two numbers one of
four, equally likely, at the corners of a square that is turned anew for every block; the velocity v(x, t) = E[noise -
data | x] is exact. How many blocks are of which size is fitted, so that |v_s| / |v_{s-1}| goes like the magnitude
ratios that were recorded on FLUX.1-dev and that diffusers ships (FLUX_MAG_RATIOS: 28 steps on its grid of 1024 x 1024
pixels). No such mixture follows them all the way: what falls late is there from the beginning. Both are printed.

Reference runs have 50 steps of Euler's method on that model's grid. The table is the drift of the last latents in dB,
the lower the better, the mean over runs that nothing was planned on: each method on evenly spread full steps, on the
paper's, and on those found for it by hill climbing on real runs, which cost nothing here. With --planner, what `lesa
plan` finds for Lagrange-2 stands below, with the drift that it promises. A minute for each number of full steps.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from lesa.bench.methods import OURS, untrained
from lesa.bench.report import markdown
from lesa.learn import metrics
from lesa.learn.planning import Planner, disturbance, freshly, responses, spread
from lesa.learn.training import drift
from lesa.learn.trajectory import Trajectory
from lesa.rows.forecasters import Forecaster, Lagrange, Reuse
from lesa.rows.guidance import ALL
from lesa.rows.plan import compile
from lesa.rows.schedule import Schedule

SHIFT = math.exp(1.15)
"""By which FLUX.1-dev shifts its grid at 1024 x 1024 pixels."""
MODES, WIDTH = 4, 2
"""Gaussians and numbers of a block."""
RADII, SPREADS = np.geomspace(0.005, 100, 31), (0.01, 0.1, 0.4, 1.5)
"""How far from 0 a block's Gaussians may be, and how wide as a share of that: noise is 1."""
PAPERS = {10: "paper:7", 8: "paper:10"}
NO_SCHEDULE = "-"


def grid_of(steps: int) -> Tensor:
    """Return FLUX.1-dev's grid, float64 (S + 1,)."""
    even = torch.cat([torch.linspace(1, 1 / steps, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    return SHIFT * even / (1 + (SHIFT - 1) * even)


@dataclass(frozen=True)
class Field:
    """The velocity field of data that are in each block one of some Gaussians, equally likely.

    `modes` are their means, (blocks, MODES, WIDTH), and `spreads` their standard deviations, (blocks,).
    """

    modes: Tensor
    spreads: Tensor

    def __call__(self, latents: Tensor, time: float) -> Tensor:
        """Return E[noise - data | latents] at a time, both (runs, blocks x WIDTH)."""
        x = latents.unflatten(1, (-1, WIDTH))
        variance = ((1 - time) ** 2 * self.spreads**2 + time**2)[:, None]
        away = x[:, :, None] - (1 - time) * self.modes
        likely = (-away.square().sum(-1) / (2 * variance)).softmax(-1)
        mean = torch.einsum("pbk,bkd->pbd", likely, self.modes)
        rest = (x - (1 - time) * mean) / variance
        return ((time - (1 - time) * self.spreads[:, None] ** 2) * rest - mean).flatten(1)

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Draw the first latents of some runs."""
        size = len(self.spreads) * WIDTH
        return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def blocks(kinds: Sequence[tuple[float, float]], seed: int) -> Field:
    """Turn a square for each kind (radius, spread); its mean is 0, as nothing is known of data at the beginning."""
    turned = torch.rand(len(kinds), 1, generator=torch.Generator().manual_seed(seed))
    angles = 2 * math.pi * (turned + torch.arange(MODES) / MODES)
    size, widths = torch.tensor(kinds, dtype=torch.float64).float().T
    modes = size[:, None, None] * torch.stack([angles.cos(), angles.sin()], 2)
    return Field(modes, size * widths)


def following(ratios: Sequence[float], count: int, seed: int = 0) -> Field:
    """Return a field of so many blocks whose velocities' sizes go from step to step as nearly like `ratios` as any."""
    kinds = [(radius, width) for radius in RADII for width in SPREADS]
    each = 16
    tried = blocks([kind for kind in kinds for _ in range(each)], seed + 1)
    grid = grid_of(len(ratios))
    _, velocities = run(tried, tried.noise(range(16)), grid)
    sizes = velocities.double().square().unflatten(2, (len(kinds), -1)).sum(-1).mean(0).numpy() / each  # (S, kinds)
    chosen = [
        kind for kind, number in zip(kinds, numbers(sizes, np.array(ratios), count), strict=True) for _ in range(number)
    ]
    return blocks(chosen, seed)


def numbers(sizes: np.ndarray, ratios: np.ndarray, count: int) -> np.ndarray:
    """Return how many blocks of each kind go like `ratios`, about `count` in all; `sizes` are their |v|^2, (S, kinds).

    Least squares on the sizes give shares; whole numbers of blocks near these are then changed one by one, as long as
    the logarithms of the ratios come nearer.
    """
    shares, _ = nnls(sizes / np.cumprod(ratios)[:, None] ** 2, np.ones(len(ratios)))
    found = np.round(shares / shares.sum() * count)
    steps = np.concatenate([np.eye(sizes.shape[1]) * size for size in (1, -1, 10, -10)])

    def off(some: np.ndarray) -> np.ndarray:
        logs = np.diff(np.log(np.maximum(some @ sizes.T, 1e-12)), axis=-1) / 2
        error = np.square(logs - np.log(ratios[1:])).sum(-1)
        return np.where((some < 0).any(-1) | (some.sum(-1) < count / 2), np.inf, error)

    while (moved := off(found + steps)).min() < off(found) - 1e-9:
        found = found + steps[moved.argmin()]
    return found.astype(int)


def ratios_of(field: Field, steps: int, runs: int = 32) -> np.ndarray:
    """Return |v_s| / |v_{s-1}|, (S,), the mean over runs; the first is 1."""
    _, velocities = run(field, field.noise(range(runs)), grid_of(steps))
    sizes = velocities.norm(dim=2)
    return torch.cat([torch.ones(1), (sizes[:, 1:] / sizes[:, :-1]).mean(0)]).numpy()


def thirds(ratios: Sequence[float] | np.ndarray) -> list[float]:
    """Return the sum of |ln ratio| over the first, the middle and the last third of the steps."""
    return [float(np.abs(np.log(part)).sum()) for part in np.array_split(np.asarray(ratios)[1:], 3)]


def run(
    field: Field, noise: Tensor, grid: Tensor, forecaster: Forecaster | None = None, schedule: Schedule | None = None
) -> tuple[Tensor, Tensor]:
    """Run Euler's method from some noise: the latents, (runs, S + 1, D), and the velocities, (runs, S, D)."""
    rows = compile(forecaster, grid, schedule).rows if forecaster and schedule else {}
    latents, velocities = [noise], []
    for step, (time, move) in enumerate(zip(grid.tolist(), grid.diff().tolist(), strict=False)):
        if row := rows.get(step):
            parts = zip(row.past, row.coefficients, strict=True)
            velocity = sum((c * velocities[k] for k, c in parts if c), start=torch.zeros_like(noise))
        else:
            velocity = field(latents[-1], time)
        velocities.append(velocity)
        latents.append(latents[-1] + move * velocity)
    return torch.stack(latents, 1), torch.stack(velocities, 1)


class World:
    """A field's runs of so many steps, with its planner."""

    def __init__(self, field: Field, steps: int, planned: int, held: int) -> None:
        self.field, self.grid = field, grid_of(steps)
        self.known, self.held = field.noise(range(1000, 1000 + planned)), field.noise(range(held))

    def recorded(self, forecaster: Forecaster | None = None, schedule: Schedule | None = None) -> list[Trajectory]:
        """Return the runs that are planned on as they are recorded at the sampler."""
        latents, velocities = (part[..., None] for part in run(self.field, self.known, self.grid, forecaster, schedule))
        steps = len(self.grid) - 1
        full = schedule.full_steps(steps) if schedule else tuple(range(steps))
        tokens = torch.arange(latents.shape[2])
        return [
            Trajectory("", k, self.grid, full, tokens, x, {ALL: v}, {ALL: v}, {ALL: torch.ones(steps, 0)})
            for k, (x, v) in enumerate(zip(latents, velocities, strict=True))
        ]

    @cached_property
    def planner(self) -> Planner:
        """A planner that chooses by real runs."""
        reference, steps = self.recorded(), len(self.grid) - 1
        answers = responses(self.recorded(Reuse(), disturbance(steps)), reference)
        answers = freshly(answers, self.recorded(Reuse(), spread(steps)), reference)

        def real(forecaster: Forecaster, schedule: Schedule) -> float:
            return drift(self.recorded(forecaster, schedule), reference)

        return Planner(reference, lambda features, _: features, answers, run=real)

    def climb(self, forecaster: Forecaster, starts: Sequence[Schedule], tries: int) -> Schedule:
        """Move one full step at a time while real runs end nearer, from the best of `starts`, with so many tries."""
        steps, exact = len(self.grid) - 1, run(self.field, self.known, self.grid)[0][:, -1]

        def cost(schedule: Schedule) -> float:
            ends = run(self.field, self.known, self.grid, forecaster, schedule)[0][:, -1]
            return fmean(metrics.drift(*both) for both in zip(ends, exact, strict=True))

        best = min(starts, key=cost)
        least, left = cost(best), tries
        improved = True
        while improved:
            improved = False
            for moved in neighbours(best.full_steps(steps), steps):
                if not left:
                    return best
                left -= 1
                if (found := cost(moved)) < least - 1e-3:
                    best, least, improved = moved, found, True
                    break
        return best

    @cached_property
    def ends(self) -> Tensor:
        """Where the held-out reference runs end."""
        return run(self.field, self.held, self.grid)[0][:, -1]

    def drift(self, forecaster: Forecaster, schedule: Schedule) -> float:
        """Return how far held-out runs end from their reference runs, in dB."""
        return self._mean(run(self.field, self.held, self.grid, forecaster, schedule)[0][:, -1])

    def fewer(self, steps: int) -> float:
        """Return how far runs of fewer steps, all full, end from the reference runs, in dB."""
        return self._mean(run(self.field, self.held, grid_of(steps))[0][:, -1])

    def _mean(self, ends: Tensor) -> float:
        return fmean(metrics.drift(*both) for both in zip(ends, self.ends, strict=True))


def even(steps: int, budget: int) -> Schedule:
    """Spread full steps evenly over a run."""
    return Schedule.at(sorted({round(k * steps / budget) for k in range(budget)}))


def neighbours(full: Sequence[int], steps: int) -> Iterator[Schedule]:
    """Yield the schedules with one full step elsewhere, the nearest first; the first one stays."""
    for distance in range(1, steps // 4):
        for step in full[1:]:
            for place in (step - distance, step + distance):
                if 0 < place < steps and place not in full:
                    yield Schedule.at(sorted({*full, place} - {step}))


def lines(world: World, budgets: Sequence[int], tries: int) -> Iterator[list[str]]:
    """Yield the table's lines."""
    steps = len(world.grid) - 1
    for budget in budgets:
        yield [str(budget), "fewer steps", f"{world.fewer(budget):.2f}", *[NO_SCHEDULE] * 3]
        paper = [Schedule.parse(PAPERS[budget])] if budget in PAPERS and steps == 50 else []
        for name, forecaster in untrained(True, lagrange=True, rivals=True).items():
            climbed = world.climb(forecaster, [even(steps, budget), *paper], tries)
            cells = [f"{world.drift(forecaster, one):.2f}" for one in (even(steps, budget), *paper, climbed)]
            cells = cells if paper else [cells[0], NO_SCHEDULE, cells[1]]
            yield [str(budget), name.removesuffix(OURS), *cells, str(climbed)]


def planned(world: World, budgets: Sequence[int]) -> Iterator[list[str]]:
    """Yield what the library's planner finds for Lagrange-2, what it promises, and what that is worth."""
    for budget in budgets:
        schedule = world.planner.plan(Lagrange(2), budget)
        promised = world.planner.drift(Lagrange(2), schedule.full_steps(len(world.grid) - 1))
        yield [str(budget), str(schedule), f"{promised:.2f}", f"{world.drift(Lagrange(2), schedule):.2f}"]


def main() -> None:
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budgets", type=int, nargs="+", default=[10, 8], help="numbers of full steps (10 8)")
    parser.add_argument("--steps", type=int, default=50, help="of a reference run (50)")
    parser.add_argument("--blocks", type=int, default=512, help="of two numbers each, about (512)")
    parser.add_argument("--planned", type=int, default=8, help="runs that are climbed on (8)")
    parser.add_argument("--held", type=int, default=32, help="runs that the table is of (32)")
    parser.add_argument("--tries", type=int, default=100, help="schedules that climbing runs for a method (100)")
    parser.add_argument("--planner", action="store_true", help="plan with lesa, too: a minute for each budget")
    options = parser.parse_args()
    recorded = FLUX_MAG_RATIOS.tolist()
    field = following(recorded, options.blocks)
    ours = ratios_of(field, len(recorded))
    print(f"{len(field.spreads)} blocks of {MODES} Gaussians, {len(field.spreads) * WIDTH} numbers\n")
    heads = ("step", "recorded on FLUX.1-dev", "here")
    table = [[str(k), f"{a:.3f}", f"{b:.3f}"] for k, (a, b) in enumerate(zip(recorded, ours, strict=True)) if k]
    sums = [" / ".join(f"{part:.2f}" for part in thirds(some)) for some in (recorded, ours)]
    print(markdown(heads, [*table, ["sum of abs ln, by thirds", *sums]], text=1), "\n")
    world = World(field, options.steps, options.planned, options.held)
    heads = ("full steps", "method", "evenly spread", "the paper's", "climbed", "climbed schedule")
    print(markdown(heads, list(lines(world, options.budgets, options.tries)), text=2))
    if options.planner:
        heads = ("full steps", "planned for Lagrange-2", "promised", "real")
        print("", markdown(heads, list(planned(world, options.budgets)), text=2), sep="\n")


if __name__ == "__main__":
    main()
