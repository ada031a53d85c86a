"""Rivals' rows give what their published recursions give, step by step on random features."""

import math
from collections import deque

import pytest
import torch

from lesa.rows.forecasters import Reuse, Taylor
from lesa.rows.plan import compile
from lesa.rows.rivals import ABCache, FoCa, Hermite, MeanCache, Spectrum
from lesa.rows.schedule import Schedule

STEPS = 50
GRID = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
GRID = 3 * GRID / (1 + 2 * GRID)  # shifted, as for many tokens
SCHEDULES = [
    Schedule.paper(7),
    Schedule.every(5, warmup=3),
    Schedule.at([0, 1, 3, 9, 16, 21, 28, 36, 42, 46, 48]),
    Schedule.at([0, 8, 15, 20, 27, 35, 41, 45, 47, 49]),
    Schedule.at([0, 40]),
]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=str)


def check(forecaster, schedule, stateful):
    """Drive a stateful method through a run, and compare each feature with what the plan's rows say it is."""
    full = schedule.full_steps(STEPS)
    features = torch.randn(STEPS, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    felt = torch.stack([stateful.full(s, features[s]) if s in full else stateful.skip(s) for s in range(STEPS)])
    unrolled = compile(forecaster, GRID, schedule).unroll()
    assert (unrolled[:, -1] == 0).all()
    torch.testing.assert_close(unrolled[:, :-1] @ features, felt, rtol=1e-9, atol=1e-9 * float(felt.abs().max()))


class StatefulHermite:
    """HiCache keeps a ladder of differences and reads a three-term recurrence."""

    def __init__(self, order, contraction):
        self.order, self.contraction, self.ladder, self.at = order, contraction, [], None

    def full(self, step, feature):
        ladder = [feature]
        for level in range(min(self.order, len(self.ladder))):
            ladder.append((ladder[level] - self.ladder[level]) / (step - self.at))
        self.ladder, self.at = ladder, step
        return feature

    def polynomial(self, n, x):
        if n < 2:
            return [1.0, 2 * x][n]
        return 2 * x * self.polynomial(n - 1, x) - 2 * (n - 1) * self.polynomial(n - 2, x)

    def skip(self, step):
        c, k = self.contraction, step - self.at
        return sum(rung / math.factorial(n) * c**n * self.polynomial(n, c * k) for n, rung in enumerate(self.ladder))


@each_schedule
@pytest.mark.parametrize(("order", "contraction"), [(1, 0.5), (2, 0.5), (3, 0.7)])
def test_hermite_is_hicaches_recursion(order, contraction, schedule):
    check(Hermite(order, contraction), schedule, StatefulHermite(order, contraction))


@pytest.mark.parametrize("order", [0, 1])
def test_hermite_is_taylor_where_the_contraction_gives_the_power(order):
    """c H_1(c x) = 2 c^2 x is x for c^2 = 1/2."""
    ours, theirs = (compile(f, GRID, SCHEDULES[0]) for f in (Hermite(order, math.sqrt(0.5)), Taylor(order)))
    torch.testing.assert_close(ours.unroll(), theirs.unroll())


class StatefulSpectrum:
    """Spectrum appends to buffers and solves for coefficients of features by Cholesky's method."""

    def __init__(self, ridge, mix, degree):
        self.ridge, self.mix, self.degree, self.steps, self.features = ridge, mix, degree, [], []

    def full(self, step, feature):
        self.steps.append(step)
        self.features.append(feature)
        return feature

    def design(self, steps):
        taus = (torch.tensor(steps, dtype=torch.float64) - STEPS / 2) * 2 / STEPS
        return torch.stack([torch.cos(n * torch.arccos(taus)) for n in range(self.degree + 1)], 1)

    def skip(self, step):
        x, h = self.design(self.steps), torch.stack(self.features)
        factor = torch.linalg.cholesky(x.T @ x + self.ridge * torch.eye(self.degree + 1, dtype=torch.float64))
        chebyshev = (self.design([step]) @ torch.cholesky_solve(x.T @ h, factor))[0]
        line = h[-1]
        if len(h) > 1:
            line = h[-1] + (step - self.steps[-1]) / (self.steps[-1] - self.steps[-2]) * (h[-1] - h[-2])
        return self.mix * chebyshev + (1 - self.mix) * line


@each_schedule
@pytest.mark.parametrize(("ridge", "mix", "degree"), [(0.1, 0.5, 4), (1e-3, 0.5, 4), (0.1, 1.0, 3)])
def test_spectrum_is_its_regression(ridge, mix, degree, schedule):
    check(Spectrum(ridge, mix, degree), schedule, StatefulSpectrum(ridge, mix, degree))


def test_spectrum_shrinks_features_by_its_ridge():
    """So its rows do not sum to 1; without ridge they do, and polynomials of its degree are forecast exactly."""
    past = [0, 1, 2, 9, 16, 23]
    assert 0.9 < float(Spectrum(0.1).row(GRID, 28, past).coefficients.sum()) < 0.999
    fit = Spectrum(0.0, mix=1.0).row(GRID, 28, past).coefficients
    for degree in range(5):
        assert float(fit @ torch.tensor([(k / 50) ** degree for k in past], dtype=torch.float64)) == pytest.approx(
            (28 / 50) ** degree, abs=1e-8
        )
    assert abs(float(fit @ torch.tensor([(k / 50) ** 5 for k in past], dtype=torch.float64)) - (28 / 50) ** 5) > 1e-4


class StatefulABCache:
    """AB-Cache keeps a queue of outputs."""

    def __init__(self, order, full_only):
        self.order, self.full_only, self.queue = order, full_only, deque(maxlen=order)

    def full(self, step, feature):
        self.queue.appendleft(feature)
        return feature

    def skip(self, step):
        f = self.queue
        forecast = {
            1: lambda: f[0],
            2: lambda: 2 * f[0] - f[1],
            3: lambda: 3 * f[0] - 3 * f[1] + f[2],
            5: lambda: 5 * f[0] - 10 * f[1] + 10 * f[2] - 5 * f[3] + f[4],
            4: lambda: 4 * f[0] - 6 * f[1] + 4 * f[2] - f[3],
        }[len(f)]()
        if not self.full_only:
            self.queue.appendleft(forecast)
        return forecast


@each_schedule
@pytest.mark.parametrize("full_only", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_ab_cache_is_its_queue(order, full_only, schedule):
    check(ABCache(order, full_only), schedule, StatefulABCache(order, full_only))


class StatefulFoCa:
    """FoCa keeps its two newest features and its two newest full ones; BDF2 and Heun as the paper writes them."""

    def __init__(self):
        self.window, self.anchors = [], []

    def full(self, step, feature):
        self.window = [*self.window[-1:], (step, feature)]
        self.anchors = [*self.anchors[-1:], (step, feature)]
        return feature

    @staticmethod
    def derivative(pair):
        (before, earlier), (after, later) = pair
        return (later - earlier) / (after - before)

    def skip(self, step):
        if len(self.anchors) < 2:
            return self.window[-1][1]
        (at, newest), slope = self.window[-1], self.derivative(self.window)
        h = step - at
        previous = newest - h * slope  # one step before, on the line through the two where they are further apart
        predicted = 4 / 3 * newest - 1 / 3 * previous + 2 / 3 * h * slope
        corrected = newest + h / 2 * (self.derivative(self.anchors) + (predicted - newest) / h)
        self.window = [self.window[-1], (step, corrected)]
        return corrected


@each_schedule
def test_foca_is_bdf2_and_heun(schedule):
    check(FoCa(), schedule, StatefulFoCa())


class StatefulMeanCache:
    """MeanCache logs latents before and after each step, moved by Euler's rule, and reads mean velocities off them."""

    def __init__(self, span):
        self.span, self.latents, self.log = span, torch.zeros(7, dtype=torch.float64), []

    def full(self, step, velocity):
        after = self.latents + (GRID[step + 1] - GRID[step]) * velocity
        self.log.append((self.latents, after, GRID[step], GRID[step + 1], velocity))
        self.latents = after
        return velocity

    def skip(self, step):
        actual = min(self.span, len(self.log))
        first, last = self.log[-actual], self.log[-1]
        elapsed = last[3] - first[2]
        average = (last[1] - first[0]) / elapsed
        slope = (first[4] - average) / elapsed
        return self.full(step, last[4] - slope * (GRID[step + 1] - GRID[step]))


@each_schedule
@pytest.mark.parametrize("span", [1, 2, 3, 5])
def test_mean_cache_is_its_log(span, schedule):
    check(MeanCache(span), schedule, StatefulMeanCache(span))


@pytest.mark.parametrize("rival", [ABCache(1), MeanCache(1)], ids=repr)
def test_the_least_of_them_is_reuse(rival):
    ours, theirs = (compile(f, GRID, SCHEDULES[2]) for f in (rival, Reuse()))
    torch.testing.assert_close(ours.unroll(), theirs.unroll(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rival", [Hermite(), Spectrum(), ABCache(3), FoCa(), MeanCache()], ids=repr)
def test_a_grid_may_repeat_times_and_a_run_begin_late(rival):
    grid = GRID.repeat_interleave(2)[1:]  # as Heun's method has them
    for start in (0, 13):
        plan = compile(rival, grid, Schedule.every(6), start)
        assert math.isfinite(float(plan.noise_gain().max())) and plan.full[0] == start


def test_rows_of_several_steps_are_those_of_each():
    rival, pasts = FoCa(), {7: (0, 1, 4), 9: (0, 1, 4), 12: (0, 1, 4, 11)}
    together = rival.rows_of(GRID, pasts)
    for step, past in pasts.items():
        assert torch.equal(together[step].coefficients, rival.row(GRID, step, past).coefficients)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Hermite(contraction=1.0),
        lambda: Spectrum(ridge=-1e-9),
        lambda: Spectrum(mix=1.5),
        lambda: Spectrum(degree=-1),
        lambda: ABCache(0),
        lambda: MeanCache(0),
    ],
)
def test_settings_out_of_range_are_refused(make):
    with pytest.raises(ValueError, match="got"):
        make()
