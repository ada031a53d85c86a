"""LESA as a function of times: one predictor for many grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from lesa.predictors.base import MOST_PARTS, Predictor
from lesa.predictors.kan import KAN, KANLayer
from lesa.predictors.lesa import BOUNDS, OTHER_BOUNDS, falling
from lesa.predictors.origin import Origin
from lesa.rows.forecasters import Lagrange
from lesa.rows.grid import in_words, matches, stage_of, validate
from lesa.rows.plan import histories
from lesa.rows.row import Row
from lesa.rows.schedule import Schedule

FEWER, MORE = 1.5, 1.1
"""By what factors the steps of a run may be fewer or more than those that a predictor for many grids was trained for.

Of emoji-flux's, trained for 20 to 50 and with 10 full steps: at 14 it is level with untrained rows or above, at 60
and 70 it is 3 and 7 dB below."""
BENT, FURTHER = 0.25, 1.5
"""How far from the same all along a grid's shift of a trained one may be, in logits, and by how many times the span of
the trained shifts it may lie outside of them.

Of emoji-flux's, trained at 64 and 96 pixels: those of 48 to 128 pixels lie up to 1.4 spans outside and are not bent;
beta, Karras' and exponential sigmas are bent by 0.7 to 1."""


class ContinuousLESA(Predictor):
    """LESA as a function of times: one predictor for many grids, image sizes and schedules.

    Its inputs are the times of the row alone, not the whole grid. A row is Newton's form of the polynomial in t through
    the newest full steps, with every term scaled by the KAN of the step's stage:

        h_s = p_0 + sum_j (1 + a_j) (p_j - p_{j-1}),   (a_1, ..., a_J) = KAN_stage(t_s, t_1, ..., t_{J+1})

    where p_j is the forecast of `Lagrange(j)` and t_1, t_2, ... are the times of the newest full steps, 1 where there
    are none. A new predictor is `Lagrange(J)`, J being its `order`, and the KAN bends it from there.

    It gives a row for any step after any full steps, so any schedule can be run, and planned for it, on grids of about
    as many steps (a KAN extrapolates badly: runs of 4 steps need a predictor of their own) that are the trained ones
    but for their shift. `schedules` are
    the grids that it was trained for with the schedules planned for each, several if they differ in the number of full
    steps; the default is the origin's grid and schedule alone.

    Raises: ValueError if `bounds` do not fall, `order` is less than 1, or `schedules` do not fit their grids.
    """

    method = "lesa-continuous"
    remembers_forecasts = False

    def __init__(
        self,
        origin: Origin,
        *,
        schedules: Sequence[tuple[Sequence[float], Sequence[str]]] = (),
        bounds: Sequence[float] | None = None,
        order: int = 3,
        hidden: Sequence[int] = (16,),
        grid_size: int = 10,
        spline_noise: float = 3.0,
    ):
        super().__init__(origin)
        validate(origin.grid)
        if order < 1:
            raise ValueError(f"a polynomial's order is at least 1, got {order}; raise it.")
        bounds = OTHER_BOUNDS.get(origin.transformer, BOUNDS) if bounds is None else bounds
        self.check_parts(len(bounds) + 1, len(hidden) + 1)
        self.schedules = [(tuple(grid), tuple(texts)) for grid, texts in schedules]
        self.schedules = self.schedules or [(origin.grid, (origin.schedule,))]
        _check_schedules(self.schedules)
        self.bounds, self.order, self.memory = falling(bounds), order, order + 1
        pasts = (_fullest_start(Schedule.parse(text), grid) for grid, texts in self.schedules for text in texts)
        self._fewest = min(self.memory, *pasts)
        self._kan = dict(hidden=list(hidden), grid_size=grid_size, spline_noise=spline_noise)
        widths = [order + 2, *hidden, order]

        def expert() -> KAN:
            return KAN(widths, grid_size, span=(0.0, 1.0), spline_noise=spline_noise, spline_scale=1.0)

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.experts = nn.ModuleDict({s: nn.ModuleList(expert() for _ in (*bounds, 0)) for s in origin.streams})
        if not self.only_shapes:
            self._start()

    @torch.no_grad()
    def _start(self) -> None:
        for parameter in self.parameters():
            parameter.copy_(parameter.half())
        for stream in self.origin.streams:
            for kan in self.stage_kans(stream):
                last = cast("KANLayer", kan[-1])
                last.base.zero_()
                last.spline.zero_()

    def options(self) -> dict[str, Any]:
        schedules = [[list(grid), list(texts)] for grid, texts in self.schedules]
        return dict(schedules=schedules, bounds=list(self.bounds), order=self.order, **self._kan)

    def stage_kans(self, stream: str) -> list[KAN]:
        """Return the KANs of one stream, the noisiest stage's first."""
        return cast("list[KAN]", list(cast("nn.ModuleList", self.experts[stream])))

    def numbers(self, stream: str) -> list[nn.Parameter]:
        return list(self.experts[stream].parameters())

    def check_grid(self, grid: Tensor) -> None:
        """Raise ValueError unless the grid has about as many steps as a trained one, and is one but for its shift."""
        trained = [torch.tensor(times, dtype=torch.float64) for times, _ in self.schedules]
        counts = sorted(len(times) - 1 for times in trained)
        advice = "train one for such a grid, or take a forecaster that needs no training, e.g. lesa.Lagrange(1)."
        if not counts[0] / FEWER <= len(grid) - 1 <= counts[-1] * MORE:
            raise ValueError(
                f"this predictor was trained for {counts[0]} to {counts[-1]} steps, got {in_words(grid)}; {advice}"
            )
        if min(_shift(grid, other)[1] for other in trained) > BENT:
            raise ValueError(
                f"this predictor was trained for grids like {in_words(trained[0])}, up to a shift, got times spread "
                f"otherwise, {in_words(grid)}; {advice}"
            )
        shifts = [_shift(other, trained[0])[0] for other in trained]
        room = FURTHER * (max(shifts) - min(shifts)) + BENT
        if not min(shifts) - room <= _shift(grid, trained[0])[0] <= max(shifts) + room:
            raise ValueError(
                f"this predictor was trained for grids that reach {_middle(trained)} halfway, got {in_words(grid)} "
                f"that reach {_middle([grid])}, a shift too far from those; {advice}"
            )

    def check_past(self, step: int, past: Sequence[int]) -> None:
        """Accept any past."""

    def wants(self, grid: Tensor, step: int) -> int:
        """Return the fewest past features that a row was trained with: with so many or more it is no makeshift.

        Most planned schedules skip step 1, after which rows have one past feature: then that is all that it wants.
        """
        return self._fewest

    def is_for(self, schedule: Schedule | None = None, budget: int | None = None) -> bool:
        known = [(Schedule.parse(text), len(grid) - 1) for grid, texts in self.schedules for text in texts]
        return any(
            schedule in (None, other) and budget in (None, len(other.full_steps(steps))) for other, steps in known
        )

    def schedule_for(self, grid: Sequence[float] | Tensor, budget: int | None = None, start: int = 0) -> Schedule:
        """Return the schedule trained for this grid, or of those of others, with full steps after the same shares of
        the run, the one whose rows are most like trained ones.

        Of several, the one with `budget` full steps, or the most. A run that begins at a later step has a full step
        there, and those of the schedule that come after.

        Raises: ValueError if no schedule has such a budget, or the predictor is not for this grid.
        """
        grid = validate(grid)
        self.check_grid(grid)
        steps, found = len(grid) - 1, self._full_steps()
        budget = max(found) if budget is None else budget
        if budget not in found or budget > steps:
            raise ValueError(
                f"this predictor has schedules of {', '.join(map(str, sorted(found)))} full steps, got a budget of "
                f"{budget} on {in_words(grid)}; name one of these, or plan another (lesa plan) and pass it."
            )
        own = [full for times, full in found[budget] if matches(grid, torch.tensor(times, dtype=torch.float64))]
        made = own or list(dict.fromkeys(_stretched(full, len(times) - 1, steps) for times, full in found[budget]))
        full = min(made, key=lambda one: self._strangeness(grid, one)) if len(made) > 1 else made[0]
        return Schedule.at([start, *(step for step in full if step > start)])

    def _full_steps(self) -> dict[int, list[tuple[tuple[float, ...], tuple[int, ...]]]]:
        """Return the trained schedules by their number of full steps: times of the grid, full steps."""
        found: dict[int, list[tuple[tuple[float, ...], tuple[int, ...]]]] = {}
        for times, texts in self.schedules:
            for text in texts:
                full = Schedule.parse(text).full_steps(len(times) - 1)
                found.setdefault(len(full), []).append((times, full))
        return found

    def _strangeness(self, grid: Tensor, full: Sequence[int]) -> float:
        """Return how far the times that rows are made of are from the nearest trained row's, the mean over rows."""
        trained = [self._inputs(times, some) for known in self._full_steps().values() for times, some in known]
        mine = self._inputs(grid.tolist(), full)
        if not len(mine):
            return 0.0
        return float(torch.cdist(mine, torch.cat(trained), compute_mode="donot_use_mm_for_euclid_dist").amin(1).mean())

    def _inputs(self, times: Sequence[float], full: Sequence[int]) -> Tensor:
        """Return the times that each row of a run combines, (rows, order + 2), as `bends` takes them."""
        pasts = histories(len(times) - 1, full, 0, self.memory, False)
        rows = [[times[step], *(times[k] for k in reversed(past))] for step, past in pasts]
        padded = [row + [1.0] * (self.order + 2 - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.float64).reshape(-1, self.order + 2)

    def stream_rows(self, stream: str, grid: Tensor, pasts: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        times = grid.tolist()
        newest = {step: tuple(times[k] for k in past[-self.memory :]) for step, past in pasts.items()}
        bends = self.bends(stream, [(times[step], *reversed(newest[step])) for step in pasts])
        rows = {}
        for bend, (step, past) in zip(bends, pasts.items(), strict=True):
            terms = _newton_terms(times[step], newest[step], self.order)
            coefficients = terms[0] + (1 + bend) @ terms[1:]
            rows[step] = Row(functional.pad(coefficients, (len(past) - len(coefficients), 0)), torch.zeros(()))
        return rows

    def bends(self, stream: str, times: Sequence[tuple[float, ...]]) -> Tensor:
        """Return by how much each term of each row is scaled besides 1, (rows, order), from (t_s, t_1, t_2, ...)."""
        inputs = torch.ones(len(times), self.order + 2)
        for k, some in enumerate(times):
            inputs[k, : len(some)] = torch.tensor(some)
        stages = torch.tensor([stage_of(some[0], self.bounds) for some in times])
        result = torch.zeros(len(times), self.order)
        for stage, kan in enumerate(self.stage_kans(stream)):
            mine = (stages == stage).nonzero()[:, 0]
            if len(mine):
                result = result.index_copy(0, mine, kan(inputs[mine]))
        return result

    def __repr__(self) -> str:
        return f"ContinuousLESA({self.origin.model!r}, {len(self.schedules)} grids)"


@lru_cache(maxsize=1 << 14)
def _newton_terms(time: float, past: tuple[float, ...], order: int) -> Tensor:
    """Return the rows p_0, p_1 - p_0, ..., p_order - p_{order-1}: (order + 1, len(past)), the polynomials through the
    newest full steps at times `past`, oldest first, at `time`; the last ones are 0 where these are too few."""
    grid = torch.tensor([*past, time], dtype=torch.float64)
    polynomials = [Lagrange(j).row(grid, len(past), range(len(past))).coefficients for j in range(order + 1)]
    terms = torch.stack([polynomials[0], *(b - a for a, b in pairwise(polynomials))])
    return terms.float()


def _fullest_start(schedule: Schedule, grid: Sequence[float]) -> int:
    """Return how many past features the first skipped step of a schedule has, all of them those of full steps."""
    full = schedule.full_steps(len(grid) - 1)
    return next((k for k, step in enumerate(full) if k != step), len(full))


def _stretched(full: Sequence[int], steps: int, wanted: int) -> tuple[int, ...]:
    """Return the full steps of a run of so many steps after the same shares of it: all different, the last one last."""
    result = [round(step * (wanted - 1) / max(steps - 1, 1)) for step in full]
    for k in range(1, len(result)):
        result[k] = max(result[k], result[k - 1] + 1)
    for k in range(len(result)):
        result[k] = min(result[k], wanted - len(result) + k)
    return tuple(result)


def _shift(grid: Tensor, other: Tensor) -> tuple[float, float]:
    """Return by how much a grid is the other one shifted, in logits, and how far from that it is anywhere.

    Shifts of flow matching, t -> s t / (1 + (s - 1) t), add ln s to logits. Looked at from a tenth of the run to nine.
    """
    shares = torch.linspace(0.1, 0.9, 17, dtype=torch.float64)
    moved = _times_after(shares, grid).logit(1e-6) - _times_after(shares, other).logit(1e-6)
    middle = float(moved.median())
    return middle, float((moved - middle).abs().max())


def _times_after(shares: Tensor, grid: Tensor) -> Tensor:
    """Return the times of a run after these shares of its steps, on straight lines between its own."""
    places = shares * (len(grid) - 1)
    before = places.floor().long().clamp(max=len(grid) - 2)
    return torch.lerp(grid[before], grid[before + 1], places - before)


def _middle(grids: Sequence[Tensor]) -> str:
    middles = sorted(
        {f"t = {float(_times_after(torch.tensor([0.5], dtype=torch.float64), grid)):.3f}" for grid in grids}
    )
    return " to ".join(dict.fromkeys([middles[0], middles[-1]]))


def _check_schedules(schedules: Sequence[tuple[Sequence[float], Sequence[str]]]) -> None:
    """Raise ValueError unless these are grids, each with schedules of its runs, and no more than anyone trains for."""
    count = sum(1 + len(texts) for _, texts in schedules)
    if count > MOST_PARTS:
        raise ValueError(f"a predictor is for at most {MOST_PARTS} grids and schedules, got {count}; name fewer.")
    for grid, texts in schedules:
        steps = len(validate(grid)) - 1
        for text in texts:
            Schedule.parse(text).full_steps(steps)
