"""Follow what a schedule leaves in the latents from full step to full step, by algebra on recorded errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lesa.learn.training import TINY, Answers
from lesa.rows.carry import Carry
from lesa.rows.forecasters import Forecaster

_Way = tuple[np.ndarray, np.ndarray, np.ndarray]


class Recorded(NamedTuple):
    """What recorded runs say: their `grid`, the steps at which histories begin, what the sampler carries, the `errors`
    E_ks (S, S, P, numbers), what the velocity of each step would grow by if its feature were twice as long, G_s
    (S, P, numbers), and |x|^2 of every run's end (P,)."""

    grid: Tensor
    begins: tuple[int, ...]
    carry: Carry
    errors: Tensor
    growth: Tensor
    scale: Tensor


class Ways:
    """What all schedules share: how errors are carried from one step to another, and rows after some full steps.

    A search looks at thousands of schedules, a state of few numbers at each full step: so these are NumPy's arrays,
    whose calls cost a tenth of a tensor's.
    """

    def __init__(self, recorded: Recorded):
        self.steps, self.begins, self._grid = len(recorded.grid) - 1, recorded.begins, recorded.grid
        self.prompts, self.width = recorded.errors.shape[2:]
        self.errors = recorded.errors.flatten(2).numpy()
        self.growth = recorded.growth.flatten(1).numpy()
        self.scale = recorded.scale.numpy()
        self._carry = recorded.carry
        self._ways: dict[tuple[int, int], _Way] = {}
        self._rows: dict[tuple[Forecaster, tuple[int, ...]], np.ndarray] = {}

    def between(self, begin: int, end: int) -> _Way:
        """Return T and M of `Carry.between`, and D of `Carry.drift_of` the later step."""
        found = self._ways.get((begin, end))
        if found is None:
            kept, moves = self._carry.between(begin, end)
            found = kept.numpy(), moves.numpy(), self._carry.drift_of(end).numpy()
            self._ways[begin, end] = found
        return found

    def rows(self, forecaster: Forecaster, past: tuple[int, ...], end: int, ahead: bool) -> np.ndarray:
        """Return the rows of the steps from the newest of `past` to `end`, (end - newest, past + 1), and what each sums
        to beyond 1 as its last number; the first is the newest step's.

        Looking `ahead`, all to the run's end are made at once: a search will ask for them.
        """
        newest, key = past[-1], (forecaster, past)
        known = self._rows.get(key)
        if known is None:
            known = np.eye(len(past) + 1, dtype=np.float32)[-2:-1]
        if newest + len(known) < end:
            missing = range(newest + len(known), self.steps if ahead else end)
            with torch.no_grad():
                made = forecaster.rows_of(self._grid, dict.fromkeys(missing, past))
                exact = torch.stack([made[step].coefficients for step in missing]).double()
            more = torch.cat([exact, exact.sum(1, keepdim=True) - 1], dim=1).float()  # in double: of most the last is 0
            known = self._rows[key] = np.concatenate([known, more.numpy()])
        return known[: end - newest]

    def past(self, forecaster: Forecaster, full: Sequence[int]) -> tuple[int, ...]:
        """Return the steps that a forecast after these full steps combines, oldest first."""
        newest = tuple(full[-forecaster.memory :])
        if len(self.begins) == 1:
            return newest
        begin = max(step for step in self.begins if step <= full[-1])
        return tuple(step for step in newest if step >= begin)


class Drifts:
    """The drift in dB that a forecaster leaves on one schedule after another; what their beginnings share is kept.

    With `caution`, so much of what full steps answer across a drift is counted too. Where it goes is not known, so it
    has a direction of its own for each full step: one number more of each run, beside those of the errors. A search
    looks `ahead`.
    """

    def __init__(self, ways: Ways, answers: Answers, forecaster: Forecaster, caution: float, ahead: bool = False):
        self._ways, self._forecaster, self._ahead = ways, forecaster, ahead
        fresh = answers.along if answers.fresh is None else answers.fresh
        self._along, self._fresh = answers.along.tolist(), fresh.tolist()
        self._across = (caution * answers.across).tolist()
        self._sketched = ways.prompts * ways.width
        self._numbers = self._sketched + ways.prompts * (ways.steps if any(self._across) else 0)
        self._known: dict[tuple[tuple[int, ...], int], tuple[np.ndarray, np.ndarray]] = {}

    def of(self, full: Sequence[int]) -> float:
        """Return how far a run would end from its reference run: mean over runs of 10 log10(|d|^2 / |x|^2)."""
        ways = self._ways
        _, drift = self._state(tuple(full), ways.steps)
        return float(10 * np.log10(self._squares(drift) / ways.scale + TINY).mean())

    def _squares(self, drift: np.ndarray) -> np.ndarray:
        """Return |d|^2 of every run, (P,)."""
        found = np.square(drift[: self._sketched]).reshape(self._ways.prompts, -1).sum(1)
        if len(drift) > self._sketched:
            found += np.square(drift[self._sketched :]).reshape(self._ways.prompts, -1).sum(1)
        return found

    def _state(self, full: tuple[int, ...], end: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what the sampler carries into step `end` after these full steps, (r, numbers), and what the velocity
        of `end` answers to its drift, (numbers,), or at the run's end the drift."""
        found = self._known.get((full, end))
        if found is None:
            found = self._known[full, end] = self._follow(full, end)
        return found

    def _follow(self, full: tuple[int, ...], end: int) -> tuple[np.ndarray, np.ndarray]:
        ways, newest = self._ways, full[-1]
        past = ways.past(self._forecaster, full)
        kept, moves, onto = ways.between(newest, end)
        rows, beyond = np.split(ways.rows(self._forecaster, past, end, self._ahead), [-1], axis=1)
        state = np.zeros((len(onto), self._numbers), dtype=np.float32)
        own = state[:, : self._sketched]
        if end > newest + 1:
            for number, step in enumerate(past):
                own += (moves[:, 1:] * rows[1:, number]) @ ways.errors[step, newest + 1 : end]
            if beyond.any():
                own += (moves * beyond[:, 0])[:, 1:] @ ways.growth[newest + 1 : end]
        new = onto @ state
        weights = moves @ rows  # (r, past): how much enters of what each full step's velocity answered
        for back in range(1, min(len(past), len(full) - 1) + 1):
            before, answer = self._state(full[: len(full) - back], full[-back])
            state += weights[:, -back, None] * answer
            if back == 1:
                state += kept @ before
        drift = onto @ state
        return state, drift if end == ways.steps else self._answer(drift, new, end)

    def _answer(self, drift: np.ndarray, new: np.ndarray, step: int) -> np.ndarray:
        """Return what the velocity of a full step answers to a drift, part of which is new since the last one."""
        answer = self._along[step] * drift + (self._fresh[step] - self._along[step]) * new
        if self._across[step]:
            answer[self._sketched + step :: self._ways.steps] += self._across[step] * np.sqrt(self._squares(drift))
        return answer
