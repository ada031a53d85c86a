"""Train a predictor in two phases, ground-truth and closed-loop.

Training sees tensors only: what runs recorded, the head as a callable, and a callable that records the runs of a
predictor. The rows of a run are a matrix, so a whole closed loop unrolls as one product, differentiable to the rows.
The rows of all streams are fitted together: their errors meet in one velocity, where guidance multiplies what differs
between them, and cancels what they share.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from lesa.host.head import Projection
from lesa.learn import metrics
from lesa.learn.kept import Rounds, settings_of
from lesa.learn.lessons import Config, Curve, Lesson, RecordRuns, Result
from lesa.learn.named import SQUARES
from lesa.learn.progress import Bar
from lesa.learn.sampling import euler, sampler_of
from lesa.learn.squares import GaussNewton
from lesa.learn.trajectory import Trajectory
from lesa.learn.unknowns import Unknowns
from lesa.predictors import L2P, LESA, Predictor
from lesa.rows.grid import matches
from lesa.rows.guidance import Guidance
from lesa.rows.row import Row
from lesa.rows.sampler import Sampler
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

Head = Callable[[Tensor, Tensor], Tensor]
"""(features (..., n, C), conditioning (..., D)) -> outputs (..., n, C_out)"""
TINY = 1e-12


class Runs(NamedTuple):
    """Runs of several prompts on one grid, as they were recorded.

    `features` (P, streams, S, n, C), or those of some steps only; `outputs` (P, streams, S, n, C_out), `conditioning`
    (P, streams, S, D), `latents` (P, S + 1, n, latent channels).
    """

    features: Tensor
    outputs: Tensor
    conditioning: Tensor
    latents: Tensor

    @classmethod
    def stack(
        cls,
        trajectories: Sequence[Trajectory],
        streams: Sequence[str],
        steps: Sequence[int] | None = None,
        tap: Tap | None = None,
    ) -> Runs:
        """Join trajectories of one collection, keeping the features of these steps (all, if none are named).

        At the output tap the features are the outputs, whatever tap they were recorded at.

        Raises: ValueError if there are none or they differ in grid or tokens or recorded no such streams.
        """
        if not trajectories:
            raise ValueError("training needs recorded runs, got none; collect some first.")
        _check_alike(trajectories, trajectories[0], streams)
        kept = slice(None) if steps is None else list(steps)
        at_output = tap is not None and tap.module is None

        def joined(of_run: Callable[[Trajectory], Mapping[str, Tensor]], kept: Any = slice(None)) -> Tensor:
            return torch.stack([torch.stack([of_run(t)[stream][kept] for stream in streams]) for t in trajectories])

        return cls(
            joined(lambda t: t.outputs if at_output else t.features, kept),
            joined(lambda t: t.outputs),
            joined(lambda t: t.conditioning),
            torch.stack([t.latents for t in trajectories]),
        )

    def pick(self, chosen: Tensor) -> Runs:
        return Runs(*(t[chosen] for t in self))

    def at(self, steps: Sequence[int]) -> Runs:
        """Keep the features of these steps only."""
        return self._replace(features=self.features[:, :, list(steps)])

    def folded(self, projection: Projection) -> Runs:
        """Fold the features: a loss of the outputs that the projection makes of them needs no more."""
        return self._replace(features=projection.fold(self.features))

    def finite(self) -> bool:
        return all(bool(t.isfinite().all()) for t in self)


Rows = Mapping[str, Mapping[int, Row]]
"""By stream and step."""


class Problem:
    """What a predictor's rows are fitted to: the head, the guidance, the loss, and the shape of a schedule on a grid.

    Grid and schedule are the predictor's own if not given, the sampler is Euler's, and `floor` is that of `Config`.
    Where the head is a `projection` and the loss one of outputs, it takes folded runs.

    Raises: ValueError if the schedule skips no step.
    """

    def __init__(
        self,
        predictor: Predictor,
        head: Head,
        loss: str,
        guidance: Guidance | None = None,
        grid: Tensor | None = None,
        schedule: Schedule | None = None,
        floor: float = Config.floor,
        sampler: Sampler | None = None,
    ):
        self.grid = predictor.grid if grid is None else grid
        schedule = schedule or predictor.schedule_for(self.grid, None, predictor.begins[0])
        self.steps = len(self.grid) - 1
        self.full = predictor.full_of(schedule, self.steps)
        self.pasts = predictor.pasts_of(self.full, self.steps)
        self.skipped = list(self.pasts)
        if not self.skipped:
            raise ValueError(f"there is nothing to forecast where {schedule!r} skips no step; skip some.")
        self.response = (sampler or euler(self.grid)).response.float()  # of x_s to v_k
        self.guidance = Guidance(predictor.origin.streams) if guidance is None else guidance
        self.streams, self.head, self.loss_name = predictor.origin.streams, head, loss
        self.floor = 10 ** (floor / 10)
        self.responses = torch.zeros(self.steps)
        self.projection = head if isinstance(head, Projection) and loss != "features" else None

    def fold(self, runs: Runs) -> Runs:
        return runs.folded(self.projection) if self.projection else runs

    def loss(self, rows: Rows, runs: Runs, reference: Runs, closed_loop: bool) -> Tensor:
        """Return the mean over prompts of how far the forecasts on `runs` lead away from the reference runs.

        In closed loop `runs` holds the features of the full steps alone.
        """
        if self.loss_name == "features":
            forecasts = self.forecasts(rows, runs.features, closed_loop)
            return (forecasts - reference.features[:, :, self.skipped]).abs().mean()
        return self.of_squares(self.squares(rows, runs, reference, closed_loop), reference, closed_loop)

    def squares(self, rows: Rows, runs: Runs, reference: Runs, closed_loop: bool) -> Tensor:
        """Return the mean squares over tokens and channels of `moves`, (P, S)."""
        return self.moves(rows, runs, reference, closed_loop).square().mean(dim=(2, 3))

    def moves(self, rows: Rows, runs: Runs, reference: Runs, closed_loop: bool) -> Tensor:
        """Return what the error at each step moves the last latents by, (P, S, n, C_out); in closed loop, how far the
        latents are from the reference run's after each step."""
        forecasts = self.forecasts(rows, runs.features, closed_loop)
        outputs = self.outputs(forecasts, runs.conditioning[:, :, self.skipped]).float()
        outputs = runs.outputs.float().index_copy(2, torch.tensor(self.skipped), outputs)
        velocity, wanted = (self.guidance.velocity(x) for x in (outputs, reference.outputs.float()))
        errors = velocity - wanted
        return self.drift(rows, errors, runs, reference) if closed_loop else self.response[-1, :, None, None] * errors

    def of_squares(self, squares: Tensor, reference: Runs, closed_loop: bool) -> Tensor:
        """Return the loss of latents that are off by these `squares`: logarithms, the mean over prompts."""
        if not closed_loop:
            return squares.mean(1).add(TINY).log().mean()
        floor = self.floor * reference.latents[:, -1].float().square().mean(dim=(1, 2))
        return 0.5 * ((squares[:, -1] + floor).log() + (squares.mean(1) + floor).log()).mean()

    def drift(self, rows: Rows, errors: Tensor, runs: Runs, reference: Runs) -> Tensor:
        """Return how far the latents are from the reference run's after every step, (P, S, n, C_out), where velocities
        are off by `errors`.

        The full steps were recorded at latents that drifted by r_k. Where these rows make them drift by d_k, the
        velocity of full step k differs by `responses[k]` (d_k - r_k), and so does what is forecast from it. With R the
        sampler's response and m the matrix of the closed loop, its streams weighted as guidance does,
        d_s = sum_j R_sj (errors_j + sum_k m_jk responses_k (d_k - r_k)).
        """
        if self.responses.any():
            recorded = (runs.latents - reference.latents)[:, :-1].float()
            errors = errors - torch.einsum("sk,pknc->psnc", self.feedback(rows), recorded)
        return torch.einsum("sj,pjnc->psnc", self.reach(rows, closed_loop=True), errors)

    def reach(self, rows: Rows, closed_loop: bool) -> Tensor:
        """Return how far an error of each step's velocity moves the last latents, on the diagonal of (S, S); in closed
        loop, the latents after every step."""
        later = self.response[1:]
        if not closed_loop:
            return later[-1].diag()
        if not self.responses.any():
            return later
        carried = functional.pad((later @ self.feedback(rows))[:, 1:], (0, 1))  # of the drifts after all steps
        return torch.linalg.solve(torch.eye(self.steps) - carried, later)

    def feedback(self, rows: Rows) -> Tensor:
        """Return how a drift of the latents at each full step answers in the velocity of every step, (S, S)."""
        matrix = torch.einsum("i,isk->sk", self.guidance.weights, self.matrix(rows, True)[0])
        return torch.eye(self.steps).index_copy(0, torch.tensor(self.skipped), matrix) * self.responses

    def forecasts(self, rows: Rows, features: Tensor, closed_loop: bool) -> Tensor:
        """Return the skipped steps' forecasts (P, streams, skipped, n, C) of all features, or those of full steps."""
        matrix, offsets = self.matrix(rows, closed_loop)
        matrix = matrix[:, :, list(self.full)] if closed_loop else matrix
        ones = self.projection.of_ones().float() if self.projection else 1.0
        return torch.einsum("isk,piknc->pisnc", matrix, features.float()) + offsets[:, :, None, None] * ones

    def outputs(self, forecasts: Tensor, conditioning: Tensor) -> Tensor:
        """Return what the head makes of forecasts, (P, streams, skipped, n, C_out)."""
        return self.projection.of_folded(forecasts) if self.projection else self.head(forecasts, conditioning)

    def matrix(self, rows: Rows, closed_loop: bool) -> tuple[Tensor, Tensor]:
        """Stack rows into matrices (streams, skipped, S) over the steps' features and offsets (streams, skipped).

        In closed loop the forecasts among the past are replaced by what they are made of: only full steps are left.
        """
        identity = torch.eye(self.steps + 1)  # the last column is the offset
        stacked = []
        for stream in self.streams:
            unrolled = list(identity[: self.steps])
            for step, past in self.pasts.items():
                row = rows[stream][step]
                sources = torch.stack([unrolled[k] if closed_loop else identity[k] for k in past])
                unrolled[step] = row.coefficients @ sources + row.offset * identity[-1]
            stacked.append(torch.stack([unrolled[step] for step in self.skipped]))
        matrices = torch.stack(stacked)
        return matrices[..., :-1], matrices[..., -1]


def drift(runs: Sequence[Trajectory], reference: Sequence[Trajectory]) -> float:
    """Return how far real runs ended from their reference runs: the mean over runs of `metrics.drift`, in dB.

    Raises: ValueError if they are not runs of the same prompts and seeds, in the same order.
    """
    _check_pairs(runs, reference)
    return fmean(metrics.drift(*(one.latents[-1] for one in pair)) for pair in zip(runs, reference, strict=True))


def train(
    predictor: Predictor,
    lessons: Sequence[Lesson],
    head: Head,
    record_runs: RecordRuns,
    config: Config = Config(),
    folder: str | Path | None = None,
) -> Result:
    """Fit a predictor's rows: first to recorded runs, then in closed loop to what its own runs record.

    A predictor for one grid and schedule has one lesson. Round 0 is the ground-truth phase. Each closed-loop round fits
    the predictor on the runs of all rounds before it, the reference runs among them; after every round the predictor's
    runs are recorded, and the round whose runs end nearest to the validation prompts' reference runs is returned. With
    a `folder`, every round's predictor is kept there, and a stopped training goes on after the newest (it records the
    runs of finished rounds again). The predictor given stays as it is.

    Raises: ValueError if there are no lessons, their runs do not fit the predictor or each other, or the folder holds
        another training.
    """
    if not lessons:
        raise ValueError("training needs recorded runs, got no lessons; collect some first.")
    predictor = copy.deepcopy(predictor)
    fit = _Fit(predictor, lessons, head, config)
    kept = Rounds(Path(folder) if folder else None, settings_of(predictor, lessons, config))
    curve, scores, finished = Curve(), [], []
    for round_ in range(config.rounds + 1):
        if not kept.load(round_, predictor, curve):
            fit.run(round_, curve)
            kept.save(round_, predictor, curve)
        finished.append(copy.deepcopy(predictor).eval())
        drifts = []
        for lesson, task in zip(lessons, fit.tasks, strict=True):
            trained, validated = record_runs(finished[-1], lesson)
            drifts.append(drift(validated, lesson.validation))
            task.add(trained, validated)
            del trained, validated  # they hold the features of all steps, and the next round's fit needs few
        scores.append(sum(drifts) / len(drifts))
    best = scores.index(min(scores))
    return Result(finished[best], finished[0], scores, curve)


class Answers(NamedTuple):
    """How the velocity of every step answers a drift d of the latents: by `along` d, and by more of the size `across`
    |d|, which no one number explains. (S,) each, 0 at steps that are not full. What came since the last full step is
    answered by `fresh` in the place of `along`, where that is known."""

    along: Tensor
    across: Tensor
    fresh: Tensor | None = None


def response(runs: Runs, reference: Runs, full: Sequence[int], guidance: Guidance) -> Answers:
    """Return how the velocity answers a drift of the latents at every full step.

    `along` is the least squares fit of one number per step, v - v_ref = along (x - x_ref): near 1 / t where the model
    sees noise and takes most of a drift back, 0 where it trusts the latents. On FLUX this one number explains 97 % and
    more of the change; under guidance, which multiplies what the streams answer differently, half of it. Both are 0
    where outputs and latents are not alike, or nothing drifted.
    """
    steps = list(full)
    along, across = torch.zeros(2, runs.outputs.shape[2])
    velocity, wanted = (guidance.velocity(x.outputs[:, :, steps].float()) for x in (runs, reference))
    moved = (runs.latents - reference.latents)[:, steps].float()
    if velocity.shape != moved.shape:
        return Answers(along, across)
    size = moved.square().sum(dim=(0, 2, 3))
    drifted = size > TINY
    along[steps] = (moved * (velocity - wanted)).sum(dim=(0, 2, 3)) / size.clamp_min(TINY) * drifted
    rest = velocity - wanted - along[steps, None, None] * moved
    across[steps] = (rest.square().sum(dim=(0, 2, 3)) / size.clamp_min(TINY)).sqrt() * drifted
    return Answers(along, across)


class _Task:
    """One lesson: its problem, and the runs that it is fitted on."""

    def __init__(self, predictor: Predictor, lesson: Lesson, truth: tuple[Runs, Runs], problem: Problem):
        self.predictor, self.lesson, self.problem, self.truth = predictor, lesson, problem, truth
        reference, validation, _ = lesson
        _check_alike([*reference, *validation], reference[0], problem.streams)
        predictor.check_grid(problem.grid)
        for step, past in problem.pasts.items():
            predictor.check_past(step, past)
        if other := [run for run in (*reference, *validation) if run.begins != predictor.begins]:
            raise ValueError(
                f"this predictor is for runs whose histories begin at the steps {list(predictor.begins)}, got "
                f"{list(other[0].begins)}; say so in its origin: training=dict(begins={list(other[0].begins)})."
            )
        if skipping := [run for run in (*reference, *validation) if not run.whole]:
            raise ValueError(f"reference runs have every step full, got {skipping[0]!r}; record it unaccelerated.")
        self.sets = [(truth[0].at(problem.full), truth[1].at(problem.full))]

    def add(self, trained: Sequence[Trajectory], validated: Sequence[Trajectory]) -> None:
        """Take a round's runs in; of runs that ended in numbers that are not finite nothing can be learned."""
        problem = self.problem
        for runs, wanted in ((trained, self.lesson.reference), (validated, self.lesson.validation)):
            _check_pairs(runs, wanted)
            _check_alike(runs, wanted[0], problem.streams)
            if other := [run for run in runs if _full_of(run) != problem.full]:
                raise ValueError(f"a round's runs are accelerated by {self.predictor!r}, got {other[0]!r}; do so.")
        tap = self.predictor.origin.tap
        stacked = [Runs.stack(runs, problem.streams, problem.full, tap) for runs in (trained, validated)]
        if all(runs.finite() for runs in stacked):
            self.sets.append((problem.fold(stacked[0]), problem.fold(stacked[1])))
            problem.responses = response(stacked[0], self.truth[0], problem.full, problem.guidance).along

    def loss(self, rows: Rows, batch: int, generator: torch.Generator, closed_loop: bool) -> Tensor:
        """Return the loss on a batch of the runs of one round."""
        sets = self.sets_of(closed_loop)
        runs, _ = sets[int(torch.randint(len(sets), (), generator=generator))]
        chosen = torch.randperm(len(runs.outputs), generator=generator)[:batch]
        return self.problem.loss(rows, runs.pick(chosen), self.truth[0].pick(chosen), closed_loop)

    def check(self, rows: Rows, closed_loop: bool) -> float:
        """Return the mean loss on the validation runs of all rounds."""
        losses = [self.problem.loss(rows, runs, self.truth[1], closed_loop) for _, runs in self.sets_of(closed_loop)]
        return float(torch.stack(losses).mean())

    def sets_of(self, closed_loop: bool) -> list[tuple[Runs, Runs]]:
        return self.sets if closed_loop else [self.truth]


class _Fit:
    """The tasks, a lesson each, and the fit of the rows to them."""

    def __init__(self, predictor: Predictor, lessons: Sequence[Lesson], head: Head, config: Config):
        self.predictor, self.config, streams = predictor, config, predictor.origin.streams
        stacked: dict[int, Runs] = {}  # lessons on one grid share their runs

        def stack(runs: Sequence[Trajectory]) -> Runs:
            if id(runs) not in stacked:
                whole = Runs.stack(runs, streams, tap=predictor.origin.tap)
                if isinstance(head, Projection) and config.loss != "features":
                    whole = whole.folded(head)
                stacked[id(runs)] = whole
            return stacked[id(runs)]

        if config.fit == SQUARES and (len(lessons) > 1 or not isinstance(predictor, LESA | L2P)):
            raise ValueError(
                f"least squares fit the rows of a LESA or an L2P to one lesson, got {predictor!r} and {len(lessons)} "
                "of them; fit it by gradient."
            )
        self.tasks: list[_Task] = []
        for lesson in lessons:
            truth = stack(lesson.reference), stack(lesson.validation)
            sampler, grid = sampler_of([*lesson.reference, *lesson.validation]), lesson.reference[0].grid
            guidance = Guidance.of(lesson.reference, streams, sampler)
            problem = Problem(predictor, head, config.loss, guidance, grid, lesson.schedule, config.floor, sampler)
            self.tasks.append(_Task(predictor, lesson, truth, problem))
        if config.free_alphas and isinstance(predictor, LESA):  # better known before the training than after
            rough = torch.rand(self.tasks[0].problem.steps, generator=torch.Generator().manual_seed(0))
            copy.deepcopy(predictor).absorb(rough, streams[0])

    def run(self, round_: int, curve: Curve) -> None:
        """Fit the rows on the runs of all rounds and keep the update with the best loss on the validation runs."""
        config, closed_loop = self.config, round_ > 0
        unknowns = Unknowns(self.predictor, config.free_alphas)
        updates = config.updates[int(closed_loop)]
        best, best_loss = unknowns.values(), math.inf
        phase = "closed-loop" if closed_loop else "ground-truth"
        by_squares = config.fit == SQUARES
        check_every = 1 if by_squares else config.check_every * len(self.tasks)
        go_on = self._squares(unknowns, closed_loop) if by_squares else self._descent(unknowns, round_, updates)
        settled = False
        with Bar(total=updates, desc=f"{phase} {round_ or ''}".strip(), unit="update") as bar:
            for update in range(updates + 1):
                if update % check_every == 0 or update == updates:
                    checked = self._check(unknowns, closed_loop)
                    curve.add(phase, round_, update, checked)
                    bar.set_postfix(validation=f"{checked:.4f}")
                    if checked < best_loss:
                        best, best_loss = unknowns.values(), checked
                if settled or update == updates:
                    break
                settled = not go_on()
                bar.update()
            bar.total = bar.n  # it may be settled sooner
        unknowns.settle(best)

    def _squares(self, unknowns: Unknowns, closed_loop: bool) -> GaussNewton:
        (task,) = self.tasks
        pairs = [(runs, task.truth[0]) for runs, _ in task.sets_of(closed_loop)]
        return GaussNewton(task.problem, pairs, unknowns, closed_loop)

    def _descent(self, unknowns: Unknowns, round_: int, updates: int) -> Callable[[], bool]:
        """Return a call that takes one optimiser step on a batch of one lesson."""
        config, taken = self.config, count()
        generator = torch.Generator().manual_seed(config.seed + round_)
        optimiser = torch.optim.Adam(unknowns.parameters, lr=config.learning_rate, betas=(0.9, 0.98))

        def update() -> bool:
            optimiser.param_groups[0]["lr"] = _falling(config.learning_rate, next(taken), updates)
            task = self.tasks[int(torch.randint(len(self.tasks), (), generator=generator))]
            optimiser.zero_grad()
            task.loss(unknowns.rows(task.problem), config.batch, generator, round_ > 0).backward()
            nn.utils.clip_grad_norm_(unknowns.parameters, 1.0)
            optimiser.step()
            return True

        return update

    @torch.no_grad()
    def _check(self, unknowns: Unknowns, closed_loop: bool) -> float:
        """Return the mean over lessons of the loss on the validation runs."""
        return sum(task.check(unknowns.rows(task.problem), closed_loop) for task in self.tasks) / len(self.tasks)


def _falling(learning_rate: float, update: int, updates: int) -> float:
    """Let the learning rate fall to 0 along half a cosine."""
    return learning_rate * 0.5 * (1 + math.cos(math.pi * update / max(updates, 1)))


def least_squares(predictor: L2P, reference: Sequence[Trajectory]) -> None:
    """Set free rows to the least squares fit of each step's recorded feature.

    No row over the same past, without an offset, has a smaller feature error on these runs.

    Raises: ValueError if the runs do not fit the predictor or each other.
    """
    pasts = Problem(predictor, lambda x, _: x, "features").pasts
    for stream in predictor.origin.streams:
        features = Runs.stack(reference, [stream], tap=predictor.origin.tap).features[:, 0]
        predictor.check_grid(reference[0].grid)
        table = predictor.coefficients[stream]
        for step, past in pasts.items():
            known = torch.stack([features[:, k].flatten() for k in past], dim=1).double()
            solved = torch.linalg.lstsq(known, features[:, step].double().flatten()[:, None]).solution[:, 0]
            table.data[step, predictor.memory - len(past) :] = solved.to(table.dtype)


def _full_of(run: Trajectory) -> tuple[int, ...]:
    """Return the full steps of a run from its first one on."""
    return tuple(step for step in run.full if step >= run.begins[0])


def _check_alike(runs: Sequence[Trajectory], first: Trajectory, streams: Sequence[str]) -> None:
    for other in runs:
        other.check_finite()
        if not (matches(first.grid, other.grid) and torch.equal(first.tokens, other.tokens)):
            raise ValueError(f"all runs share grid and tokens, {other!r} differs from {first!r}; collect them alike.")
        if missing := [stream for stream in streams if stream not in other.features]:
            raise ValueError(
                f"{other!r} recorded no stream {missing[0]!r}; collect with the guidance that the predictor is for."
            )


def _check_pairs(runs: Sequence[Trajectory], reference: Sequence[Trajectory]) -> None:
    if [(run.prompt, run.seed) for run in runs] != [(run.prompt, run.seed) for run in reference]:
        raise ValueError("runs come one for each reference run, in their order, got others; record the same prompts.")
    for run, wanted in zip(runs, reference, strict=True):
        if not torch.allclose(run.latents[0].float(), wanted.latents[0].float(), rtol=0.02, atol=0.02):
            raise ValueError(f"{run!r} starts from other noise than its reference run; record both with one pipeline.")
