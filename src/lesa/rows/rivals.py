"""Rivals: forecasters that others published, as rows.

Where a method's own forecasts enter its recursion, they are unrolled: each is known as a combination of full steps'
features, and so is the row. Histories hold full steps alone, and schedules can be planned for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lesa.rows.forecasters import Forecaster, backward_differences, not_negative, zero
from lesa.rows.row import Row

EVERY = 10_000
"""The memory of what looks back to the first full step of a run."""


class Hermite(Forecaster):
    """Continue the full steps' features by contracted Hermite polynomials (HiCache, arXiv 2508.16984).

    With the backward differences d_j of `Taylor`, h_{s+k} = sum_j d_j c^j H_j(c k) / j!, where H_0 = 1, H_1 = 2 x and
    H_{j+1} = 2 x H_j - 2 j H_{j-1}. The paper's contraction c is 0.5, for which the slope counts by half.

    Raises: ValueError if `order` is negative or `contraction` is not between 0 and 1.
    """

    remembers_forecasts = False

    def __init__(self, order: int = 2, contraction: float = 0.5) -> None:
        if not 0 < contraction < 1:
            raise ValueError(f"a contraction is between 0 and 1, got {contraction}; the paper's is 0.5.")
        self.order, self.contraction = not_negative("order", order), contraction
        self.memory = self.order + 1

    def row(self, grid: Tensor, step: int, past: Sequence[int]) -> Row:
        """Put the polynomials for Taylor's powers; with fewer past steps than order + 1 the order drops."""
        x, hermite = self.contraction * (step - past[-1]), [0.0, 1.0]  # H_-1, H_0, ...
        for j in range(self.order):
            hermite.append(2 * x * hermite[-1] - 2 * j * hermite[-2])
        weights = [self.contraction**j * number / math.factorial(j) for j, number in enumerate(hermite[1:])]
        differences = backward_differences(past, self.order)
        return Row(torch.stack([w * d for w, d in zip(weights, differences, strict=False)]).sum(0), zero())

    def __repr__(self) -> str:
        return f"Hermite(order={self.order}, contraction={self.contraction})"


class Spectrum(Forecaster):
    """Fit Chebyshev polynomials of the step to all full steps by ridge regression, mixed with a line (Spectrum).

    With x = 2 s / S - 1 and X_kj = T_j(x_k) of the full steps k and the degrees j = 0 .. `degree`, the fit is
    T(x) (X'X + `ridge` 1)^-1 X' h; the line goes through the two newest full steps. h_s is `mix` times the fit and
    1 - `mix` times the line. Source: arXiv 2603.01623 and its authors' code, whose degree is 4 and ridge 0.1, and whose
    mix for FLUX is 0.5. The ridge shrinks features: rows do not sum to 1.

    Raises: ValueError if `degree` or `ridge` is negative, or `mix` is not from 0 to 1.
    """

    remembers_forecasts = False
    memory = EVERY

    def __init__(self, ridge: float = 0.1, mix: float = 0.5, degree: int = 4) -> None:
        if ridge < 0 or not 0 <= mix <= 1:
            raise ValueError(f"a ridge is at least 0 and a mix from 0 to 1, got {ridge} and {mix}; change them.")
        self.ridge, self.mix, self.degree = ridge, mix, not_negative("degree", degree)

    def row(self, grid: Tensor, step: int, past: Sequence[int]) -> Row:
        """Solve for the fit's coefficients; without ridge and with few full steps they are the least ones."""
        places = 2 * np.array([*past, step]) / (len(grid) - 1) - 1
        design = np.polynomial.chebyshev.chebvander(places, self.degree)
        known, wanted = design[:-1], design[-1]
        normal = known.T @ known + self.ridge * np.eye(self.degree + 1)
        fit = wanted @ np.linalg.pinv(normal, hermitian=True) @ known.T
        return Row(torch.from_numpy(self.mix * fit + (1 - self.mix) * _line(step, past)), zero())

    def wants(self, grid: Tensor, step: int) -> int:
        """Return 2, what the line takes."""
        return 2

    def __repr__(self) -> str:
        return f"Spectrum(ridge={self.ridge}, mix={self.mix}, degree={self.degree})"


def _line(step: int, past: Sequence[int]) -> np.ndarray:
    """Return the coefficients of the line in steps through the two newest full steps; of one alone, it repeats it."""
    line = np.eye(len(past))[-1]
    if len(past) > 1:
        slope = (step - past[-1]) / (past[-1] - past[-2])
        line[-2:] = -slope, 1 + slope
    return line


# --- recursions


class Held(NamedTuple):
    """A step that a recursion has passed: whether it was full, and its feature as a combination of full steps'."""

    step: int
    full: bool
    feature: np.ndarray


class Recursion(Forecaster):
    """Walk from the first full step on, by a rule that makes the next feature of all that came before it."""

    remembers_forecasts = False
    memory = EVERY

    def next(self, grid: Sequence[float], step: int, held: Sequence[Held]) -> np.ndarray:
        """Return the forecast of `step` after what is held, which is every step from the first full one on."""
        raise NotImplementedError

    def row(self, grid: Tensor, step: int, past: Sequence[int]) -> Row:
        """Walk up to `step`."""
        return self.rows_of(grid, {step: past})[step]

    def rows_of(self, grid: Tensor, pasts: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        """Return the rows of several steps; those after one past come of one walk."""
        times = grid.tolist()
        rows: dict[int, Row] = {}
        for past in {tuple(past) for past in pasts.values()}:
            wanted = [step for step, own in pasts.items() if tuple(own) == past]
            walked = {held.step: held.feature for held in self._walk(times, past, max(wanted))}
            rows |= {step: Row(torch.from_numpy(walked[step]), zero()) for step in wanted}
        return rows

    def wants(self, grid: Tensor, step: int) -> int:
        """Return 1: a recursion begins by itself."""
        return 1

    def _walk(self, times: Sequence[float], past: Sequence[int], end: int) -> list[Held]:
        own = dict(zip(past, np.eye(len(past)), strict=True))
        held: list[Held] = []
        for step in range(past[0], end + 1):
            feature = own[step] if step in own else self.next(times, step, held)
            held.append(Held(step, step in own, feature))
        return held


class ABCache(Recursion):
    """Continue the newest features by the binomials of Adams and Bashforth (AB-Cache, arXiv 2504.10540).

    h_s = sum_{i = 1 .. order} (-1)^(i+1) (order over i) h_{-i} of the newest outputs h_{-1}, h_{-2}, ...: 2 h_{-1} -
    h_{-2}, or 3 h_{-1} - 3 h_{-2} + h_{-3}, however far apart they are. Whether a skipped step's own forecast is such
    an output, the description leaves open: as it speaks of the preceding steps, it is; with `full_only` it is not.

    Raises: ValueError if `order` is less than 1.
    """

    def __init__(self, order: int = 2, full_only: bool = False) -> None:
        if order < 1:
            raise ValueError(f"an order is at least 1, which repeats the newest feature, got {order}; raise it.")
        self.order, self.full_only = order, full_only

    def next(self, grid: Sequence[float], step: int, held: Sequence[Held]) -> np.ndarray:
        """Sum up; with fewer outputs than its order the order drops."""
        newest = [one.feature for one in held if one.full or not self.full_only][: -self.order - 1 : -1]
        signed = [-((-1) ** i) * math.comb(len(newest), i) for i in range(1, len(newest) + 1)]
        return np.array(signed) @ np.stack(newest)

    def __repr__(self) -> str:
        return f"ABCache(order={self.order}, full_only={self.full_only})"


class FoCa(Recursion):
    """Forecast by BDF2, calibrate by Heun's rule (FoCa, arXiv 2508.16211).

    With h = 1 step: BDF2's forecast is f = 4/3 F_k - 1/3 F_{k-1} + 2/3 F'_k of the two newest steps, full or not, and
    h_{k+1} = F_k + (F'_full + F'_{k+1}) / 2 with the slope F'_full of the newest full step and that of the forecast,
    F'_{k+1} = f - F_k. How slopes are taken the paper leaves open: here as differences of neighbours, F'_k = F_k -
    F_{k-1} and F'_full of the two newest full steps, by which f - F_k is F'_k. Before there are two full steps the
    newest feature is repeated.
    """

    def next(self, grid: Sequence[float], step: int, held: Sequence[Held]) -> np.ndarray:
        """Take half of each slope."""
        full = [one for one in held if one.full]
        if len(full) < 2:
            return held[-1].feature
        real = [one for one in held if one.full or one.step > full[1].step]  # without what was only repeated
        return held[-1].feature + (_slope(*full[-2:]) + _slope(*real[-2:])) / 2

    def __repr__(self) -> str:
        return "FoCa()"


def _slope(before: Held, after: Held) -> np.ndarray:
    return (after.feature - before.feature) / (after.step - before.step)


class MeanCache(Recursion):
    """Turn the newest velocity into the mean one of the step by a slope from mean velocities (MeanCache).

    Over the newest `span` steps j = r .. k, full or not, u = sum_j (t_{j+1} - t_j) v_j / (t_{k+1} - t_r) is the mean
    velocity, as Euler's latents say it, and J = (v_r - u) / (t_{k+1} - t_r) half the slope, turned round. Then
    v_{k+1} = v_k - J (t_{k+2} - t_{k+1}). Source: arXiv 2601.19961 and its authors' code. They choose a span from 1
    (reuse) to 6 for each gap; here one is for all.

    Raises: ValueError if `span` is less than 1.
    """

    def __init__(self, span: int = 3) -> None:
        if span < 1:
            raise ValueError(f"a span is at least 1, which repeats the newest feature, got {span}; raise it.")
        self.span = span

    def next(self, grid: Sequence[float], step: int, held: Sequence[Held]) -> np.ndarray:
        """Weigh the velocities of the span; where it takes no time they are not weighed."""
        spanned = held[-self.span :]
        time = grid[step] - grid[spanned[0].step]
        if time == 0:
            return held[-1].feature
        moves = np.diff(grid[spanned[0].step : step + 1])
        mean = moves @ np.stack([one.feature for one in spanned]) / time
        return held[-1].feature - (spanned[0].feature - mean) / time * (grid[step + 1] - grid[step])

    def __repr__(self) -> str:
        return f"MeanCache(span={self.span})"
