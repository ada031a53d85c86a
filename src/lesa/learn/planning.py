"""Choose which steps are full: from recorded runs, for a forecaster and a budget.

Forecasts are linear, so what a schedule leaves in the latents is algebra on the recorded runs. With E_ks the error that
reusing the feature of step k leaves in the output of step s, a row with coefficients c leaves sum_k c_k E_ks there (the
head is nearly affine), and (sum_k c_k - 1) G_s if its coefficients do not sum to 1, with G_s what a longer feature of
step s does to its output. The drift d of the latents is then what the sampler makes of the errors e of its velocities,
by its response R (`lesa.rows.sampler`):

    d_s = sum_{j < s} R_sj e_j,    e_j = sum_k c_k E_kj + sum_k c_k r_k d_k

over the full steps k that the row of j combines, a full step being its own. Euler's R_sj is t_{j+1} - t_j. r_k is how
the denoiser answers a drift: full steps take most of an early drift back, which is why full steps are worth more late
in a run.

No one number says it all. Late in a run half of the answer goes across the drift, and a search that does not look at it
finds schedules whose errors seem to cancel, 10 dB and more below what they come to. So most of what was measured there
counts as a drift in a direction of its own: `caution` says how much.

Where there are two streams, an output is the velocity that guidance makes of theirs: guidance multiplies the difference
of the streams, and uncond answers a drift by another picture. How much of that is right to count depends on the
forecaster, so `search` counts none unless it is told, and `plan` tries several by real runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import combinations, pairwise, product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lesa.host.head import head
from lesa.host.runtime import accelerate
from lesa.host.tap import tap_of
from lesa.learn.calls import Call
from lesa.learn.collect import rerun
from lesa.learn.drifts import Drifts, Recorded, Ways
from lesa.learn.sampling import sampler_of
from lesa.learn.sketch import sketched
from lesa.learn.training import TINY, Answers, Head, Runs, drift, response
from lesa.learn.trajectory import Trajectory
from lesa.rows.carry import Carry
from lesa.rows.detour import Detour
from lesa.rows.forecasters import Forecaster, Reuse
from lesa.rows.guidance import Guidance
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

RANDOM_STARTS, TRIED_STARTS = 2, 2
"""How many of the search's starts are random, and from how many, the best ones, it goes on."""
TOGETHER = (-1, 1, -2, 2, -4, 4)
"""By how many steps neighbouring full steps are moved together."""
WARPS = (0.7, 0.85, 1.2)
"""By what a good schedule's distances from its end are scaled, to look for a better one beyond single moves."""
FAR = (-8, -5, -3, -2, -1, 1, 2, 3, 5, 8)
"""By how many steps two neighbours are moved, each by its own, once nothing nearer helps."""
PLANNED_ON, DISTURBED = 16, 8
"""How many recorded runs a pipeline's planner looks at, and how many it runs once more to see drifts answered."""
CAUTIONS = (1.0, 2.0, 4.0, 8.0)
"""The caution of the schedules that `Planner.plan` runs, besides the one without."""
USUAL = 0.75
"""The caution of predictions: what goes across a drift is partly taken back by the next full steps."""
Run = Callable[[Forecaster, Schedule], float]
"""(forecaster, schedule) -> the drift in dB of real runs"""


def disturbance(steps: int, begins: Sequence[int] = (0,)) -> Schedule:
    """Return the schedule whose runs, with reused features, show how full steps answer a drift: early steps skipped.

    Histories begin at the steps `begins`, the first of which is the run's.
    """
    start, length = begins[0], steps - begins[0]
    later = range(start + min(max(2, length // 6), length - 1), steps)
    return Schedule.at(sorted({*begins, *later}))


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
    answers = response(runs, wanted, full, Guidance.of(reference, streams, sampler_of(reference)))
    times = reference[0].grid[:-1].float().clamp_min(TINY)
    first = next((step for before, step in pairwise(full) if step > before + 1), full[-1])
    for found in answers[:2]:
        found[:first] = found[first] * times[first] / times[:first]
    return answers


def spread(steps: int, begins: Sequence[int] = (0,)) -> Schedule:
    """Return the schedule whose runs, with reused features, show how full steps answer what came since the last one.

    Every other step of the second half is full, to the last one: there plans have most of their full steps, and answers
    change most.
    """
    start, length = begins[0], steps - begins[0]
    middle, gap = start + length // 2, max(2, length // 6)
    return Schedule.at(sorted({*begins, *range(start + gap, middle, gap), *range(steps - 1, middle, -2)}))


def freshly(answers: Answers, disturbed: Sequence[Trajectory], reference: Sequence[Trajectory]) -> Answers:
    """Measure how the denoiser answers the part of a drift that came since the last full step, on runs on `spread`.

    What full steps have answered before, `along`, is what they did not take back; they take back more of what is new.
    In between its full steps the answer is on a line from one to the next.

    Raises: ValueError if the runs do not fit each other.
    """
    streams, sampler, full = reference[0].streams, sampler_of(reference), disturbed[0].full
    runs, wanted = (Runs.stack(some, streams) for some in (disturbed, reference))
    guidance, carry = Guidance.of(reference, streams, sampler), Carry(sampler.response)
    wrong = guidance.velocity(runs.outputs.float()) - guidance.velocity(wanted.outputs.float())
    moved = (runs.latents - wanted.latents).float()
    if wrong.shape[2:] != moved.shape[2:]:
        return answers
    found: dict[int, float] = {}
    for before, step in pairwise(full):
        errors = wrong[:, before:step] - wrong[:, before : before + 1]  # without what `before` answered
        new = torch.einsum("s,psnc->pnc", carry.drift_of(step) @ carry.between(before, step)[1], errors)
        size, old = float(new.square().sum()), answers.along[step] * (moved[:, step] - new)
        if size > TINY and step > before + 1:
            found[step] = float((new * (wrong[:, step] - old)).sum()) / size
    if not found:
        return answers
    times, first = reference[0].grid[:-1].float().clamp_min(TINY), min(found)
    fresh = torch.from_numpy(np.interp(range(len(times)), list(found), list(found.values()))).float()
    fresh[:first] = found[first] * times[first] / times[:first]
    return answers._replace(fresh=fresh)


def detours(
    pipe: Any,
    planner: Planner,
    forecaster: Forecaster,
    schedule: Schedule,
    reference: Sequence[Trajectory],
    share: float = 0.1,
    calls: Sequence[Call] = (),
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
    full, stream = schedule.full_steps(planner.steps, planner.begins[0]), reference[0].streams[0]
    with accelerate(pipe, forecaster, schedule=schedule, tap=planner.tap):
        runs = rerun(pipe, reference, planner.tap, calls, **call)
    features = torch.stack([run.features[stream] for run in runs]).float()
    found: dict[int, Detour] = {}
    for number, step in enumerate(full[1:], start=1):
        if planner.steps - 1 - step <= len(full) - 1 - number:
            break
        past = planner.past(forecaster, full[:number])
        row = forecaster.for_stream(stream).row(planner.grid, step, past)
        forecast = torch.einsum("k,pknc->pnc", row.coefficients.detach().float(), features[:, list(past)]) + row.offset
        errors = (forecast - features[:, step]).flatten(1).norm(dim=1) / features[:, step].flatten(1).norm(dim=1)
        longer = planner.search(forecaster, len(full) + 1, begin=full[: number + 1])
        found[step] = Detour(float(errors.quantile(1 - share)), longer)
    return found


class Planner:
    """What recorded reference runs say of schedules: the drift in dB that a forecaster leaves, and the best full steps.

    `size` is to how many random numbers what a sketch does not hold exactly is projected (see `sketched`). `run` gives
    the drift of real runs. The sampler's numbers are those that the runs hold. Steps at which histories begin anew,
    `begins`, are full in every schedule: of two denoisers, the second one's first.

    Raises: ValueError if there are no runs, the runs do not fit each other, or their sampler has no numbers.
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
        self.begins = reference[0].begins
        self.guided = len(streams) > 1
        self.caution = 0.0 if self.guided else USUAL
        self.sampler = sampler_of(reference)
        self._responses = responses or Answers(torch.zeros(self.steps), torch.zeros(self.steps))
        self._errors, growth = sketched(runs, outputs_of, Guidance.of(reference, streams, self.sampler), size)
        self._scale = runs.latents[:, -1].float().square().sum(dim=(1, 2))
        recorded = Recorded(self.grid, self.begins, Carry(self.sampler.response), self._errors, growth, self._scale)
        self._ways = Ways(recorded)
        self._run = run
        self._known: dict[tuple[Forecaster, Schedule], float] = {}

    @cached_property
    def errors(self) -> Tensor:
        """R_Ss E_ks projected: what reusing the feature of step k at step s leaves in the end, (S, S, runs, size), 0
        unless k < s."""
        return self._errors * self.sampler.response[-1].float()[:, None, None]

    @classmethod
    def of(
        cls,
        pipe: Any,
        reference: Sequence[Trajectory],
        tap: Tap | None = None,
        calls: Sequence[Call] = (),
        size: int = 64,
        **call: Any,
    ) -> Planner:
        """Plan for a pipeline: its reference runs are given, and some of them are run once more, disturbed.

        `calls` are those of the runs, where a store holds no more than their labels; `call` what goes with all of them.

        Raises: ValueError as the constructor and `lesa.learn.collect.record` do.
        """
        if not reference:
            raise ValueError("planning needs recorded runs, got none; collect some first.")
        again, sampled = reference[:DISTURBED], reference[0].at_sampler
        tap = Tap() if sampled else tap or tap_of(pipe.transformer)

        def runs(forecaster: Forecaster, schedule: Schedule) -> list[Trajectory]:
            with accelerate(pipe, forecaster, schedule=schedule, tap=tap):
                return rerun(pipe, again, tap, calls, **call)

        def run(forecaster: Forecaster, schedule: Schedule) -> float:
            return drift(runs(forecaster, schedule), again)

        shape = reference[0].steps, reference[0].begins
        answers = responses(runs(Reuse(), disturbance(*shape)), again)
        if len(reference[0].streams) == 1:  # of guided streams one number explains half, and two explain no more
            answers = freshly(answers, runs(Reuse(), spread(*shape)), again)
        outputs_of = _outputs if sampled else head(pipe.transformer, tap)
        return cls(reference[:PLANNED_ON], outputs_of, answers, tap=tap, size=size, run=run)

    def drift(self, forecaster: Forecaster, full: Sequence[int], caution: float | None = None) -> float:
        """Return how far a run would end from its reference run: mean over runs of 10 log10(|d|^2 / |x|^2), in dB.

        With `caution`, so much of what full steps answer `across` a drift is counted too; by default most of what was
        measured, or of guided streams nothing.

        Raises: ValueError if forecasts enter the forecaster's history, which this algebra does not follow.
        """
        return self._drifts(forecaster, caution).of(full)

    def past(self, forecaster: Forecaster, full: Sequence[int]) -> tuple[int, ...]:
        """Return the steps that a forecast after these full steps combines, oldest first."""
        return self._ways.past(forecaster, full)

    def _drifts(self, forecaster: Forecaster, caution: float | None, ahead: bool = False) -> Drifts:
        if forecaster.remembers_forecasts:
            raise ValueError(f"planning follows histories of full steps only, got {forecaster!r}; take e.g. Lagrange.")
        return Drifts(self._ways, self._responses, forecaster, self.caution if caution is None else caution, ahead)

    def plan(self, forecaster: Forecaster, budget: int) -> Schedule:
        """Return the schedule whose real runs end nearest to their reference runs.

        Those of `search` are run: without caution; with the usual one, and with twice as much while it is no worse.

        Raises: ValueError as `real` and `search` do.
        """
        bold = self.search(forecaster, budget, caution=0.0)
        known = {bold: self.real(forecaster, bold)}
        near, least = None, math.inf
        for caution in ((self.caution or 1.0) * times for times in CAUTIONS):
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
        begin: Sequence[int] | None = None,
        *,
        caution: float | None = None,
        near: Schedule | None = None,
    ) -> Schedule:
        """Return the best schedule found with `budget` full steps, by moving full steps until none is better elsewhere.

        It starts from the best of several spreads of the full steps over the run, or from the schedule `near`, and once
        more from what it found, drawn together and apart. The first full steps are those of `begin`, or the run's
        first. The same runs give the same schedule, however busy the machine is. `caution` is that of `drift`.

        Raises: ValueError if the budget is not from 1 to S, or has no room after `begin`, or as `drift` does.
        """
        begin = begin or self.begins[:1]
        later = [step for step in self.begins if step > begin[-1]]  # full in any case
        least, most = len(begin) + len(later), self.steps - begin[-1] - 1 + len(begin)
        if not least <= budget <= most:
            raise ValueError(f"a budget is from {least} to {most} full steps, got {budget}; change it.")

        def cost(full: Sequence[int]) -> float:
            if not set(full).isdisjoint(later):
                return math.inf
            return drifts.of(sorted({*full, *later}) if later else full)

        drifts = self._drifts(forecaster, caution, ahead=True)
        starts = [_beside(start, later, self.steps) for start in _starts(self.steps, budget - len(later), begin)]
        if near:
            starts = [[step for step in near.full_steps(self.steps, self.begins[0]) if step not in later]]
        found = [_descend(start, cost, self.steps, len(begin)) for start in sorted(starts, key=cost)[:TRIED_STARTS]]
        found += [
            _descend(warped, cost, self.steps, len(begin)) for warped in _warped(min(found, key=cost), len(begin))
        ]
        best = _descend(min(found, key=cost), cost, self.steps, len(begin), _far_moves)
        return Schedule.at(sorted({*best, *later}))


def _outputs(features: Tensor, _conditioning: Tensor) -> Tensor:
    """The head of what was recorded at the sampler."""
    return features


def _starts(steps: int, budget: int, begin: Sequence[int]) -> list[list[int]]:
    """Spread full steps after those of `begin` evenly, more and more towards the run's end, and at random."""
    *first, last = begin
    return [[*first, *(last + step for step in some)] for some in _spreads(steps - last, budget - len(first))]


def _beside(full: list[int], taken: Sequence[int], steps: int) -> list[int]:
    """Move the full steps that are taken to the nearest ones that are free."""
    found = [step for step in full if step not in taken]
    while len(found) < len(full):
        lost = full[len(found)]
        free = [step for step in range(full[0] + 1, steps) if step not in taken and step not in found]
        found.append(min(free, key=lambda step: abs(step - lost)))
    return sorted(found)


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


def _moves(full: Sequence[int], steps: int, fixed: int) -> Iterator[list[int]]:
    """Yield the schedules with one full step elsewhere, the nearest first, then those with two of them moved by one,
    then those with a few neighbours moved together; the first `fixed` stay."""
    inner, first = range(fixed, len(full)), full[fixed - 1]
    for distance in range(1, steps):
        for k in inner:
            for place in (full[k] - distance, full[k] + distance):
                if first < place < steps and place not in full:
                    yield sorted([*full[:k], place, *full[k + 1 :]])
    for k, other in combinations(inner, 2):
        for change, another in product((-1, 1), repeat=2):
            yield from _shifted(full, {k: change, other: another}, steps, fixed)
    for k, other in combinations(inner, 2):
        for change in TOGETHER:
            yield from _shifted(full, dict.fromkeys(range(k, other + 1), change), steps, fixed)


def _shifted(full: Sequence[int], changes: Mapping[int, int], steps: int, fixed: int) -> Iterator[list[int]]:
    """Yield the schedule with some full steps moved, if there is one."""
    moved = [step + changes.get(k, 0) for k, step in enumerate(full)]
    if moved == sorted(set(moved)) and moved[fixed] > full[fixed - 1] and moved[-1] < steps:
        yield moved


def _warped(full: Sequence[int], fixed: int) -> Iterator[list[int]]:
    """Yield the schedule with its later full steps drawn together towards the last one, less and more, or apart."""
    last, first = full[-1], full[fixed - 1]
    for factor in WARPS:
        warped = list(full)
        for k in range(len(full) - 2, fixed - 1, -1):
            place = min(last - round((last - full[k]) * factor), warped[k + 1] - 1)
            warped[k] = max(place, first + 1 + k - fixed)
        if warped != full and warped == sorted(set(warped)):
            yield warped


def _far_moves(full: Sequence[int], steps: int, fixed: int) -> Iterator[list[int]]:
    """Yield those of `_moves`, then those with two neighbours moved by different ways: where gaps are long, a better
    place for one of them is seen only with the other one moved."""
    yield from _moves(full, steps, fixed)
    for k in range(fixed, len(full) - 1):
        for change, another in product(FAR, repeat=2):
            yield from _shifted(full, {k: change, k + 1: another}, steps, fixed)


Moves = Callable[[Sequence[int], int, int], Iterator[list[int]]]


def _descend(
    full: list[int], cost: Callable[[Sequence[int]], float], steps: int, fixed: int, moves: Moves = _moves
) -> list[int]:
    """Take every move that makes the cost smaller, until there is none."""
    best, improved = cost(full), True
    while improved:
        improved = False
        for moved in moves(full, steps, fixed):
            if (found := cost(moved)) < best - 1e-6:
                full, best, improved = moved, found, True
                break
    return full
