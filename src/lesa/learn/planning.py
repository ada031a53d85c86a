"""Choose which steps are full: from recorded runs, for a forecaster and a budget.

Forecasts are linear, so what a schedule leaves in the latents is algebra on the recorded runs. With E_ks the error that
reusing the feature of step k leaves in the output of step s, a row with coefficients c leaves sum_k c_k E_ks there
(rows whose coefficients sum to 1; the head is nearly affine). The drift d of the latents then runs as

    d_{s+1} = d_s + (t_{s+1} - t_s) (sum_k c_k E_ks + sum_k c_k r_k d_k)

over the full steps k that the row of s combines, a full step being its own. r_k is how the transformer answers a drift:
full steps take most of an early drift back, which is why full steps are worth more late in a run.

Where there are two streams, an output is the velocity that guidance makes of theirs, and no one number says how it
answers: guidance multiplies the difference of the streams, and uncond answers a drift by another picture. `search` can
count that rest as a drift in some direction, with more or less caution; how much is right depends on the forecaster, so
`plan` tries several by real runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lesa.host.head import head
from lesa.host.runtime import accelerate
from lesa.host.tap import tap_of
from lesa.learn.collect import record
from lesa.learn.training import TINY, Answers, Head, Runs, drift, response
from lesa.learn.trajectory import Trajectory
from lesa.rows.detour import Detour
from lesa.rows.forecasters import Forecaster, Reuse
from lesa.rows.guidance import Guidance
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

RANDOM_STARTS, TRIED_STARTS = 2, 4
"""How many of the search's starts are random, and from how many, the best ones, it goes on."""
PLANNED_ON, DISTURBED = 16, 8
"""How many recorded runs a pipeline's planner looks at, and how many it runs once more to see drifts answered."""
CAUTIONS = (1.0, 2.0, 4.0, 8.0)
"""The caution of the schedules that `Planner.plan` runs, besides the one without."""
Run = Callable[[Forecaster, Schedule], float]
"""(forecaster, schedule) -> the drift in dB of real runs"""


def disturbance(steps: int) -> Schedule:
    """Return the schedule whose runs, with reused features, show how full steps answer a drift: early steps skipped."""
    return Schedule.at([0, *range(min(max(2, steps // 6), steps - 1), steps)])


def responses(disturbed: Sequence[Trajectory], reference: Sequence[Trajectory]) -> Answers:
    """Measure how the transformer answers a drift, from runs on `disturbance` and their references.

    Before their first full step after the skipped ones it is taken to be in proportion to 1 / t, as where a model sees
    noise alone.

    Raises: ValueError if there are no runs, or not one disturbed run for each reference run.
    """
    if not disturbed or len(disturbed) != len(reference):
        raise ValueError(
            f"each disturbed run has its reference run, got {len(disturbed)} and {len(reference)}; record the same."
        )
    full, streams = disturbed[0].full, reference[0].streams
    runs, wanted = (Runs.stack(some, streams) for some in (disturbed, reference))
    answers = response(runs, wanted, full, Guidance.of(reference, streams))
    times, first = reference[0].grid[:-1].float(), full[1]
    for found in answers:
        found[:first] = found[first] * times[first] / times[:first]
    return answers


def detours(
    pipe: Any,
    planner: Planner,
    forecaster: Forecaster,
    schedule: Schedule,
    reference: Sequence[Trajectory],
    share: float = 0.1,
    **call: Any,
) -> dict[int, Detour]:
    """Plan what unusual runs do: at which full steps they show, and the schedule of a full step more that they go on.

    The reference prompts are run on the schedule, tapped where the planner plans for. At each full step with room for
    another one after it, the limit is what a `share` of them exceed there. Their features are a sample of tokens, a
    run's are all; so limits are rough.

    Raises: ValueError if there are no runs, or as `Planner.search` does.
    """
    if not reference:
        raise ValueError("planning needs recorded runs, got none; collect some first.")
    full, stream = schedule.full_steps(planner.steps), reference[0].streams[0]
    with accelerate(pipe, forecaster, schedule=schedule, tap=planner.tap):
        prompts, seeds = [run.prompt for run in reference], [run.seed for run in reference]
        runs = record(pipe, prompts, seeds, reference[0].tokens, planner.tap, **call)
    features = torch.stack([run.features[stream] for run in runs]).float()
    found: dict[int, Detour] = {}
    for number, step in enumerate(full[1:], start=1):
        if planner.steps - 1 - step <= len(full) - 1 - number:
            break
        past = full[max(0, number - forecaster.memory) : number]
        row = forecaster.for_stream(stream).row(planner.grid, step, past)
        forecast = torch.einsum("k,pknc->pnc", row.coefficients.detach().float(), features[:, list(past)]) + row.offset
        errors = (forecast - features[:, step]).flatten(1).norm(dim=1) / features[:, step].flatten(1).norm(dim=1)
        longer = planner.search(forecaster, len(full) + 1, begin=full[: number + 1])
        found[step] = Detour(float(errors.quantile(1 - share)), longer)
    return found


class Planner:
    """What recorded reference runs say of schedules: the drift in dB that a forecaster leaves, and the best full steps.

    `size` is to how many random numbers the error at one step of one run is projected; drifts are theirs. `errors`
    holds (t_{s+1} - t_s) E_ks so projected, (S, S, runs, size), 0 unless k < s. `run` gives the drift of real runs.

    Raises: ValueError if there are no runs, or the runs do not fit each other.
    """

    def __init__(
        self,
        reference: Sequence[Trajectory],
        outputs_of: Head,
        responses: Answers | None = None,
        *,
        tap: Tap | None = None,
        size: int = 64,
        run: Run | None = None,
    ):
        streams = reference[0].streams if reference else ()
        runs = Runs.stack(reference, streams, tap=tap)
        self.grid, self.steps, self.tap = reference[0].grid, reference[0].steps, tap
        self.guided = len(streams) > 1
        self._durations = self.grid.diff().float()
        self._responses = responses or Answers(torch.zeros(self.steps), torch.zeros(self.steps))
        self.errors, self._scale = _errors(runs, outputs_of, Guidance.of(reference, streams), self._durations, size)
        directions = torch.randn(self.errors.shape[1:], generator=torch.Generator().manual_seed(1))
        self._directions = functional.normalize(directions, dim=-1)
        self._run = run
        self._known: dict[tuple[Forecaster, Schedule], float] = {}
        self._gaps: dict[tuple, list[tuple[Tensor, list[float]]]] = {}
        self._states: dict[tuple, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, pipe: Any, reference: Sequence[Trajectory], tap: Tap | None = None, **call: Any) -> Planner:
        """Plan for a pipeline: its reference runs are given, and some of them are run once more, disturbed.

        Raises: ValueError as the constructor and `lesa.learn.collect.record` do.
        """
        if not reference:
            raise ValueError("planning needs recorded runs, got none; collect some first.")
        tap, again = tap or tap_of(pipe.transformer), reference[:DISTURBED]

        def runs(forecaster: Forecaster, schedule: Schedule) -> list[Trajectory]:
            prompts, seeds = [one.prompt for one in again], [one.seed for one in again]
            with accelerate(pipe, forecaster, schedule=schedule, tap=tap):
                return record(pipe, prompts, seeds, reference[0].tokens, tap, **call)

        def run(forecaster: Forecaster, schedule: Schedule) -> float:
            return drift(runs(forecaster, schedule), again)

        answers = responses(runs(Reuse(), disturbance(reference[0].steps)), again)
        return cls(reference[:PLANNED_ON], head(pipe.transformer, tap), answers, tap=tap, run=run)

    def drift(self, forecaster: Forecaster, full: Sequence[int], caution: float = 0.0) -> float:
        """Return how far a run would end from its reference run: mean over runs of 10 log10(|d|^2 / |x|^2), in dB.

        With `caution`, so much of what full steps answer `across` a drift is counted too.

        Raises: ValueError if forecasts enter the forecaster's history, which this algebra does not follow.
        """
        if forecaster.remembers_forecasts:
            raise ValueError(f"planning follows histories of full steps only, got {forecaster!r}; take e.g. Lagrange.")
        end, _ = self._state(forecaster, caution, tuple(full), self.steps)
        error = end.square().sum(-1) / self._scale
        return float(10 * error.add(TINY).log10().mean())

    def _state(self, forecaster: Forecaster, caution: float, full: tuple[int, ...], end: int) -> tuple[Tensor, Tensor]:
        """Return the drift before step `end`, after these full steps, and what the velocity of `end` answers to it:
        (P, size) each."""
        key = (forecaster, caution, full, end)
        if key not in self._states:
            left, weights = self._gap(forecaster, full[-forecaster.memory :], end)
            for k, weight in zip(range(len(full) - 1, 0, -1), reversed(weights), strict=False):
                before, answer = self._state(forecaster, caution, full[:k], full[k])
                left = left + weight * answer + (before if k == len(full) - 1 else 0)
            self._states[key] = left, self._answer(left, end, caution)
        return self._states[key]

    def plan(self, forecaster: Forecaster, budget: int) -> Schedule:
        """Return the schedule whose real runs end nearest to their reference runs.

        Those of `search` are run: without caution; with what was measured, and with twice as much while it is no worse.

        Raises: ValueError as `real` and `search` do.
        """
        bold = self.search(forecaster, budget)
        known = {bold: self.real(forecaster, bold)}
        near, least = None, math.inf
        for caution in CAUTIONS:
            schedule = self.search(forecaster, budget, caution=caution, near=near)
            if schedule == near:
                continue
            found = known[schedule] = self.real(forecaster, schedule)
            if found > least:
                break
            near, least = schedule, found
        return min(known, key=lambda one: known[one])

    def real(self, forecaster: Forecaster, schedule: Schedule) -> float:
        """Return how far real runs end from their reference runs, in dB as `drift`.

        Raises: ValueError if the planner has no pipeline to run (see `of`).
        """
        if self._run is None:
            raise ValueError("this planner knows recorded runs alone; make it with Planner.of(pipe, ...), or search.")
        key = (forecaster, schedule)
        if key not in self._known:
            self._known[key] = self._run(forecaster, schedule)
        return self._known[key]

    def search(
        self,
        forecaster: Forecaster,
        budget: int,
        begin: Sequence[int] = (0,),
        *,
        caution: float = 0.0,
        near: Schedule | None = None,
    ) -> Schedule:
        """Return the best schedule found with `budget` full steps, by moving full steps until none is better elsewhere.

        It starts from the best of several spreads of the full steps over the run, or from the schedule `near`. The
        first full steps are those of `begin`. The same runs give the same schedule, however busy the machine is.
        `caution` is that of `drift`.

        Raises: ValueError if the budget is not from 1 to S, or has no room after `begin`, or as `drift` does.
        """
        if not len(begin) <= budget <= self.steps - begin[-1] - 1 + len(begin):
            raise ValueError(
                f"a budget is from {len(begin)} to {self.steps - begin[-1] - 1 + len(begin)} full steps, got {budget}; "
                "change it."
            )

        def cost(full: Sequence[int]) -> float:
            return self.drift(forecaster, full, caution)

        self._states.clear()
        spread = sorted(_starts(self.steps, budget, begin), key=cost)[:TRIED_STARTS]
        starts = [list(near.full_steps(self.steps))] if near else spread
        found = [_descend(start, cost, self.steps, len(begin)) for start in starts]
        return Schedule.at(min(found, key=cost))

    def _answer(self, drift: Tensor, step: int, caution: float) -> Tensor:
        if step == self.steps:
            return drift
        along, across = (float(found[step]) for found in self._responses)
        answer = along * drift
        if caution:
            answer = answer + caution * across * drift.norm(dim=-1, keepdim=True) * self._directions[step]
        return answer

    @torch.no_grad()
    def _gap(self, forecaster: Forecaster, past: tuple[int, ...], end: int) -> tuple[Tensor, list[float]]:
        """Return what the steps from the newest of `past` to `end` add to the drift, (P, size), and by how much they
        add what the velocity of each step of `past` answered to the drift there."""
        newest = past[-1]
        if (forecaster, past) not in self._gaps:
            own = [0.0] * (len(past) - 1) + [float(self._durations[newest])]
            self._gaps[forecaster, past] = [(torch.zeros(self.errors.shape[2:]), own)]
        gaps = self._gaps[forecaster, past]  # for every end after the newest step, as far as they were asked for
        missing = range(newest + len(gaps), end)
        if missing:
            rows = forecaster.rows_of(self.grid, dict.fromkeys(missing, past))
            for step in missing:
                (left, weights), row = gaps[-1], rows[step].coefficients.float()
                left = left + torch.einsum("k,kpd->pd", row, self.errors[list(past), step])
                moves = (float(self._durations[step]) * row).tolist()
                gaps.append((left, [a + b for a, b in zip(weights, moves, strict=True)]))
        return gaps[end - newest - 1]


@torch.no_grad()
def _errors(runs: Runs, outputs_of: Head, guidance: Guidance, durations: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return (t_{s+1} - t_s) E_ks projected, (S, S, P, size), 0 unless k < s, and |x|^2 of every run's end, (P,)."""
    prompts, _, steps, tokens, channels = runs.outputs.shape
    generator = torch.Generator().manual_seed(0)
    projection = torch.randn(tokens * channels, size, generator=generator) / math.sqrt(size)
    own = guidance.velocity(runs.outputs.float()).flatten(2) @ projection
    errors = torch.zeros(steps, steps, prompts, size)
    for k in range(steps - 1):
        later = slice(k + 1, steps)
        reused = runs.features[:, :, k : k + 1].expand(-1, -1, steps - k - 1, -1, -1)
        outputs = outputs_of(reused, runs.conditioning[:, :, later]).float()
        velocity = guidance.velocity(outputs).flatten(2) @ projection
        errors[k, later] = ((velocity - own[:, later]) * durations[later, None]).movedim(1, 0)
    return errors, runs.latents[:, -1].float().square().sum(dim=(1, 2))


def _starts(steps: int, budget: int, begin: Sequence[int]) -> list[list[int]]:
    """Spread full steps after those of `begin` evenly, more and more towards the run's end, and at random."""
    *first, last = begin
    return [[*first, *(last + step for step in some)] for some in _spreads(steps - last, budget - len(first))]


def _spreads(steps: int, budget: int) -> list[list[int]]:
    if budget == 1:
        return [[0]]
    places = torch.linspace(0, 1, budget, dtype=torch.float64)
    starts = []
    for bend in (1.0, 1.5, 2.2, 3.0):
        full = ((1 - (1 - places) ** bend) * (steps - 1)).round().int().tolist()
        for k in range(1, budget):  # none twice, and none past the end
            full[k] = min(max(full[k], full[k - 1] + 1), steps - budget + k)
        starts.append(full)
    generator = torch.Generator().manual_seed(0)
    drawn = (torch.randperm(steps - 1, generator=generator)[: budget - 1] + 1 for _ in range(RANDOM_STARTS))
    return [*starts, *([0, *sorted(some.tolist())] for some in drawn)]


def _descend(full: list[int], cost: Callable[[Sequence[int]], float], steps: int, fixed: int) -> list[int]:
    """Take every move that makes the cost smaller, until there is none."""
    best, improved = cost(full), True
    while improved:
        improved = False
        for moved in _moves(full, steps, fixed):
            if (found := cost(moved)) < best - 1e-6:
                full, best, improved = moved, found, True
                break
    return full


def _moves(full: Sequence[int], steps: int, fixed: int) -> Iterator[list[int]]:
    """Yield the schedules with one full step elsewhere, the nearest first, then those with two of them moved by one;
    the first `fixed` stay."""
    inner, first = range(fixed, len(full)), full[fixed - 1]
    for distance in range(1, steps):
        for k in inner:
            for place in (full[k] - distance, full[k] + distance):
                if first < place < steps and place not in full:
                    yield sorted([*full[:k], place, *full[k + 1 :]])
    for k, other in combinations(inner, 2):
        for changes in product((-1, 1), repeat=2):
            moved = list(full)
            for which, change in zip((k, other), changes, strict=True):
                moved[which] += change
            if moved == sorted(set(moved)) and moved[fixed] > first and moved[-1] < steps:
                yield moved
