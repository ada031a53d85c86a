"""Choose which steps are full: from recorded runs, for a forecaster and a budget.

Forecasts are linear, so what a schedule leaves in the latents is algebra on the recorded runs. With E_ks the error that
reusing the feature of step k leaves in the output of step s, a row with coefficients c leaves sum_k c_k E_ks there
(rows whose coefficients sum to 1; the head is nearly affine). The drift d of the latents then runs as

    d_{s+1} = d_s + (t_{s+1} - t_s) (sum_k c_k E_ks + sum_k c_k r_k d_k)

over the full steps k that the row of s combines, a full step being its own. r_k is how the transformer answers a drift:
full steps take most of an early drift back, which is why full steps are worth more late in a run. Where there are two
streams, an output is the velocity that guidance makes of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor

from lesa.collect import record
from lesa.detour import Detour
from lesa.forecasters import Forecaster, Reuse
from lesa.guidance import Guidance
from lesa.runtime import accelerate
from lesa.schedule import Schedule
from lesa.tap import Tap, head, tap_of
from lesa.training import TINY, Head, Runs, response
from lesa.trajectory import Trajectory

RANDOM_STARTS, TRIED_STARTS = 2, 4
"""How many of the search's starts are random, and from how many, the best ones, it goes on."""
PLANNED_ON, DISTURBED = 16, 8
"""How many recorded runs a pipeline's planner looks at, and how many it runs once more to see drifts answered."""


def disturbance(steps: int) -> Schedule:
    """Return the schedule whose runs, with reused features, show how full steps answer a drift: early steps skipped."""
    return Schedule.at([0, *range(min(max(2, steps // 6), steps - 1), steps)])


def responses(disturbed: Sequence[Trajectory], reference: Sequence[Trajectory]) -> Tensor:
    """Return how the transformer answers a drift at every step, (S,), from runs on `disturbance` and their references.

    Before their first full step after the skipped ones it is taken to be in proportion to 1 / t, as where a model sees
    noise alone.

    Raises: ValueError if there are no runs, or not one disturbed run for each reference run.
    """
    if not disturbed or len(disturbed) != len(reference):
        raise ValueError(
            f"each disturbed run has its reference run, got {len(disturbed)} and {len(reference)}; record the same."
        )
    full = disturbed[0].full
    streams = reference[0].streams
    runs, wanted = (Runs.stack(some, streams) for some in (disturbed, reference))
    found = response(runs, wanted, full, Guidance.of(reference, streams))
    times, first = reference[0].grid[:-1].float(), full[1]
    found[:first] = found[first] * times[first] / times[:first]
    return found


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

    The reference prompts are run on the schedule. At each full step with room for another one after it, the limit is
    what a `share` of them exceed there. Their features are a sample of tokens, a run's are all; so limits are rough.

    Raises: ValueError if there are no runs, or as `Planner.search` does.
    """
    if not reference:
        raise ValueError("planning needs recorded runs, got none; collect some first.")
    full, stream = schedule.full_steps(planner.steps), reference[0].streams[0]
    with accelerate(pipe, forecaster, schedule=schedule):
        prompts, seeds = [run.prompt for run in reference], [run.seed for run in reference]
        runs = record(pipe, prompts, seeds, reference[0].tokens, **call)
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
    holds (t_{s+1} - t_s) E_ks so projected, (S, S, runs, size), 0 unless k < s.

    Raises: ValueError if there are no runs, or the runs do not fit each other.
    """

    def __init__(
        self,
        reference: Sequence[Trajectory],
        outputs_of: Head,
        responses: Tensor | None = None,
        *,
        tap: Tap | None = None,
        size: int = 64,
    ):
        streams = reference[0].streams if reference else ()
        runs = Runs.stack(reference, streams, tap=tap)
        self.grid, self.steps = reference[0].grid, reference[0].steps
        self._durations = self.grid.diff().float()
        self._responses = torch.zeros(self.steps) if responses is None else responses
        self.errors, self._scale = _errors(runs, outputs_of, Guidance.of(reference, streams), self._durations, size)
        self._gaps: dict[tuple, tuple[Tensor, list[float]]] = {}

    @classmethod
    def of(cls, pipe: Any, reference: Sequence[Trajectory], tap: Tap | None = None, **call: Any) -> Planner:
        """Plan for a pipeline: its reference runs are given, and some of them are run once more, disturbed.

        Raises: ValueError as the constructor and `lesa.collect.record` do.
        """
        if not reference:
            raise ValueError("planning needs recorded runs, got none; collect some first.")
        tap, again = tap or tap_of(pipe.transformer), reference[:DISTURBED]
        tokens = reference[0].tokens
        with accelerate(pipe, Reuse(), schedule=disturbance(reference[0].steps)):
            disturbed = record(pipe, [run.prompt for run in again], [run.seed for run in again], tokens, **call)
        answers = responses(disturbed, again)
        return cls(reference[:PLANNED_ON], head(pipe.transformer, tap), answers, tap=tap)

    def drift(self, forecaster: Forecaster, full: Sequence[int]) -> float:
        """Return how far a run would end from its reference run: mean over runs of 10 log10(|d|^2 / |x|^2), in dB.

        Raises: ValueError if forecasts enter the forecaster's history, which this algebra does not follow.
        """
        if forecaster.remembers_forecasts:
            raise ValueError(f"planning follows histories of full steps only, got {forecaster!r}; take e.g. Lagrange.")
        drifts = [torch.zeros(self.errors.shape[2:])]
        for k, end in enumerate([*full[1:], self.steps]):
            past = tuple(full[max(0, k + 1 - forecaster.memory) : k + 1])
            left, answers = self._gap(forecaster, past, end)
            drift = drifts[-1] + left
            for answer, earlier in zip(answers, drifts[-len(past) :], strict=True):
                drift = drift + answer * earlier
            drifts.append(drift)
        error = drifts[-1].square().sum(-1) / self._scale
        return float(10 * error.add(TINY).log10().mean())

    def search(self, forecaster: Forecaster, budget: int, begin: Sequence[int] = (0,)) -> Schedule:
        """Return the best schedule found with `budget` full steps, by moving full steps until none is better elsewhere.

        It starts from the best of several spreads of the full steps over the run. The first full steps are those of
        `begin`. The same runs give the same schedule, however busy the machine is.

        Raises: ValueError if the budget is not from 1 to S, or has no room after `begin`, or as `drift` does.
        """
        if not len(begin) <= budget <= self.steps - begin[-1] - 1 + len(begin):
            raise ValueError(
                f"a budget is from {len(begin)} to {self.steps - begin[-1] - 1 + len(begin)} full steps, got {budget}; "
                "change it."
            )

        def cost(full: Sequence[int]) -> float:
            return self.drift(forecaster, full)

        starts = sorted(_starts(self.steps, budget, begin), key=cost)[:TRIED_STARTS]
        found = [_descend(start, cost, self.steps, len(begin)) for start in starts]
        return Schedule.at(min(found, key=cost))

    @torch.no_grad()
    def _gap(self, forecaster: Forecaster, past: tuple[int, ...], end: int) -> tuple[Tensor, list[float]]:
        """Return what the steps from the newest of `past` to `end` add to the drift: (P, size), and a share of each
        drift that the steps of `past` saw."""
        key = (forecaster, past, end)
        if key not in self._gaps:
            newest, skipped = past[-1], range(past[-1] + 1, end)
            answers, left = torch.zeros(len(past)), torch.zeros(self.errors.shape[2:])
            answers[-1] = self._durations[newest]
            if skipped:
                rows = forecaster.rows_of(self.grid, dict.fromkeys(skipped, past)).values()
                coefficients = torch.stack([row.coefficients.float() for row in rows])
                left = torch.einsum("sk,kspd->pd", coefficients, self.errors[list(past)][:, list(skipped)])
                answers += self._durations[list(skipped)] @ coefficients
            self._gaps[key] = left, (answers * self._responses[list(past)]).tolist()
        return self._gaps[key]


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
