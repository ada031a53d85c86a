"""Plans: the rows of one run, compiled before it."""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from lesa.rows.forecasters import Forecaster, LinearRows, PlannedRow
from lesa.rows.grid import times_in_order
from lesa.rows.row import Row
from lesa.rows.schedule import Schedule, draw

FORMAT = "lesa-plan-1"
SHOWN_TERMS = 8


@dataclass(frozen=True, repr=False)
class Plan:
    """The rows of one run and one stream: what every skipped step is made of, and what full steps are corrected by.

    `times` is the grid, `full` the full steps, `start` the step that the run begins at. `rows` holds the row of every
    skipped step; each combines exactly the steps that the history holds by then, oldest first: the newest `memory` of
    the full steps, or, if it `remembers_forecasts`, of all steps. `truncated` names the skipped steps whose rows are
    makeshifts, because the history was shorter than the forecaster wanted. `corrections` holds rows of some full steps:
    what the sampler is handed there combines their own outputs, the newest, and those of full steps that the history
    holds.

    Raises: ValueError if these do not fit together.
    """

    times: tuple[float, ...]
    full: tuple[int, ...]
    start: int
    memory: int
    remembers_forecasts: bool
    rows: dict[int, PlannedRow]
    truncated: tuple[int, ...] = ()
    begins: tuple[int, ...] = ()
    """Full steps at which the history begins anew."""
    corrections: dict[int, PlannedRow] = field(default_factory=dict)

    def __post_init__(self) -> None:
        times_in_order(self.times)
        if Schedule.at(self.full).full_steps(self.steps, self.start)[0] != self.full[0]:
            raise ValueError(
                f"the first full step is the run's first, {self.start}, got {self.full[0]}; compile it again."
            )
        skipped = set(range(self.start, self.steps)).difference(self.full)
        if skipped != self.rows.keys():
            raise ValueError(
                f"a plan has one row for each skipped step, got rows for {sorted(self.rows)} and skipped steps "
                f"{sorted(skipped)}; compile it again."
            )
        if others := sorted(self.corrections.keys() - set(self.full)):
            raise ValueError(f"what is corrected is full, got corrections of skipped steps {others}; compile it again.")
        held = self.memory, self.remembers_forecasts, self.begins
        for step, past in pasts(self.steps, self.full, self.start, *held):
            row = self.rows.get(step) or self.corrections.get(step)
            if row is not None:
                _check(step, past, row)
        for step, row in self.corrections.items():
            if others := [k for k, c in zip(row.past, row.coefficients, strict=True) if c and k in skipped]:
                raise ValueError(
                    f"a correction combines outputs of full steps, got one of step {step} that combines the skipped "
                    f"steps {others}; put zeros there."
                )

    @property
    def grid(self) -> Tensor:
        """The grid, float64 (S + 1,)."""
        return torch.tensor(self.times, dtype=torch.float64)

    @property
    def steps(self) -> int:
        """The number of steps S of the grid."""
        return len(self.times) - 1

    @property
    def step_ratio(self) -> float:
        """Steps of the run for each full step of it."""
        return (self.steps - self.start) / len(self.full)

    @property
    def acts_at_sampler(self) -> bool:
        """Tell whether the run's first latents enter what the sampler is handed, or full steps are corrected there."""
        return bool(self.corrections) or any(row.latents for row in self.rows.values())

    def unroll(self) -> Tensor:
        """Return every step's feature as a combination of the full steps' features: the closed loop as algebra.

        Shape (S, S + 1): column k is the feature of full step k, the last column the offset. Columns of skipped steps
        are 0, and so are the rows of steps before `start`. What is done at the sampler is not in it: what rows add of
        the run's first latents, and corrections.
        """
        unrolled = torch.zeros(self.steps, self.steps + 1, dtype=torch.float64)
        for step in range(self.start, self.steps):
            if step not in self.rows:
                unrolled[step, step] = 1.0
                continue
            past, coefficients, offset, _ = self.rows[step]
            unrolled[step] = torch.tensor(coefficients, dtype=torch.float64) @ unrolled[list(past)]
            unrolled[step, -1] += offset
        return unrolled

    def noise_gain(self) -> Tensor:
        """Return sum|c| of every step's row, shape (S,): by how much it can amplify the rounding noise of its past.

        It is 1 at full steps, what is done at the sampler left out, and 0 before `start`.
        """
        gain = torch.zeros(self.steps, dtype=torch.float64)
        gain[list(self.full)] = 1.0
        for step, row in self.rows.items():
            gain[step] = _gain(row)
        return gain

    def live(self, differences: bool = False, corrections: bool = False) -> dict[int, tuple[int, ...]]:
        """Return, for each step of the run, those up to it whose features a later row combines, oldest first.

        They are what a history has to hold after the step. With `differences`, each feature but the newest is held as
        its difference to the next one held, and so those in between are held too. With `corrections`, what these
        combine is meant instead.
        """
        rows = self.corrections if corrections else self.rows
        last = {k: step for step in sorted(rows) for k, c in zip(*rows[step][:2], strict=True) if c}
        held: dict[int, tuple[int, ...]] = {}
        stored: list[int] = []
        for step in range(self.start, self.steps):
            stored += [step] if last.get(step, step) > step else []
            used = tuple(k for k in stored if last[k] > step)
            held[step] = tuple(k for k in stored if k >= used[0]) if used and differences else used
        return held

    def freeze(self) -> LinearRows:
        """Return these rows as a forecaster of their own, bound to this grid and schedule.

        Raises: ValueError if no step is skipped.
        """
        return LinearRows(
            self.times,
            self.rows,
            memory=self.memory,
            remembers_forecasts=self.remembers_forecasts,
            begins=(self.start, *self.begins),
            corrections=self.corrections,
        )

    def to_json(self) -> str:
        """Write the plan as JSON, without loss, and with a digest that reading verifies."""
        rows, corrections = (
            {step: _entries(row) for step, row in some.items()} for some in (self.rows, self.corrections)
        )
        entries = {"format": FORMAT, **asdict(self), "rows": rows, "corrections": corrections}
        for name in ("begins", "corrections"):
            if not entries[name]:
                del entries[name]  # as it always was
        entries = json.loads(json.dumps(entries))
        return json.dumps({**entries, "sha256": _digest(entries)})

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises: ValueError if it is no JSON, no plan of this format, or the numbers in it do not fit together.
        """
        try:
            data = json.loads(text)
            if data.pop("sha256", digest := _digest(data)) != digest:
                raise ValueError("it is not as it was written")
            if data.pop("format") != FORMAT:
                raise ValueError("its format is another")
            for name in ("times", "full", "truncated", "begins"):
                data[name] = tuple(data.get(name, ()))
            for name in ("rows", "corrections"):
                data[name] = {int(step): _read(row) for step, row in data.get(name, {}).items()}
            return cls(**data)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"a plan is the JSON of format {FORMAT!r}, got other text ({error!r:.300}); write it again."
            ) from error

    def __repr__(self) -> str:
        gain = self.noise_gain()
        lines = [
            f"Plan of {self.steps - self.start} steps, {len(self.full)} full (step ratio {self.step_ratio:.2f}), "
            f"noise gain up to {float(gain.max()):.3g}, {len(self.truncated)} rows with a short history",
            draw(self.full, self.steps, self.start),
        ]
        for step, row in sorted({**self.rows, **self.corrections}.items()):
            short = "  short history" if step in self.truncated else "  corrected" if step in self.corrections else ""
            lines.append(f"{step:4d} = {_formula(row)}  (gain {_gain(row):.3g}){short}")
        return "\n".join(lines)


@torch.no_grad()
def compile(
    forecaster: Forecaster, grid: Sequence[float] | Tensor, schedule: Schedule, start: int = 0, strict: bool = False
) -> Plan:
    """Ask `forecaster` for the row of every step that `schedule` skips in a run on `grid` that begins at `start`.

    Example:
        >>> from lesa.rows.forecasters import Taylor
        >>> compile(Taylor(), [1, 0.8, 0.6, 0.4, 0.2, 0], Schedule.every(3, warmup=2))
        Plan of 5 steps, 3 full (step ratio 1.67), noise gain up to 5, 0 rows with a short history
        ##..#
           2 = +2 h1 -1 h0  (gain 3)
           3 = +3 h1 -2 h0  (gain 5)

    Raises: ValueError if the grid or the schedule does not fit, a row has not one finite coefficient for each past
        step, or, with `strict`, a row has a shorter history than the forecaster wants.
    """
    grid = times_in_order(grid)
    steps = len(grid) - 1
    begins = tuple(step for step in forecaster.begins if step > start)
    full = tuple(sorted({*schedule.full_steps(steps, start), *begins}))
    rows: dict[int, PlannedRow] = {}
    corrections: dict[int, PlannedRow] = {}
    truncated: list[int] = []
    for step, past in pasts(steps, full, start, forecaster.memory, forecaster.remembers_forecasts, begins):
        if step in full:
            correction = forecaster.correction(grid, step, past)
            corrections |= {} if correction is None else {step: _planned(past, correction)}
            continue
        rows[step] = _planned(past, forecaster.row(grid, step, past))
        wanted = forecaster.wants(grid, step)
        if len(past) >= wanted:
            continue
        truncated.append(step)
        if strict:
            raise ValueError(
                f"step {step} is skipped but {forecaster!r} wants {wanted} past features there, got {len(past)}; "
                f"make more of the steps before it full, or pass strict=False."
            )
    remembers = forecaster.remembers_forecasts
    times = tuple(grid.tolist())
    return Plan(times, full, start, forecaster.memory, remembers, rows, tuple(truncated), begins, corrections)


def _planned(past: tuple[int, ...], row: Row) -> PlannedRow:
    return PlannedRow(past, tuple(row.coefficients.flatten().tolist()), float(row.offset), float(row.latents))


def histories(
    steps: int, full: Sequence[int], start: int, memory: int, remembers_forecasts: bool, begins: Sequence[int] = ()
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Walk a run and yield every skipped step with the steps whose features the history holds by then.

    It begins anew at the steps `begins`.
    """
    skipped = set(range(start, steps)).difference(full)
    walked = pasts(steps, full, start, memory, remembers_forecasts, begins)
    return ((step, past) for step, past in walked if step in skipped)


def pasts(
    steps: int, full: Sequence[int], start: int, memory: int, remembers_forecasts: bool, begins: Sequence[int] = ()
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """Walk a run as `histories` does, and yield full steps too, each with a history that ends with its own feature."""
    history: deque[int] = deque(maxlen=min(memory, steps))
    all_full = frozenset(full)
    for step in range(start, steps):
        if step in begins:
            history.clear()
        if step in all_full:
            history.append(step)
        yield step, tuple(history)
        if remembers_forecasts and step not in all_full:
            history.append(step)


def _digest(entries: Any) -> str:
    """Return the SHA-256 of a plan's entries but for that itself."""
    plain = {name: value for name, value in entries.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _read(row: dict[str, Any]) -> PlannedRow:
    return PlannedRow(tuple(row["past"]), tuple(row["coefficients"]), row["offset"], row.get("latents", 0.0))


def _entries(row: PlannedRow) -> dict[str, Any]:
    """Return a row as JSON has it; most have nothing of the latents, and are as they always were."""
    return {name: value for name, value in row._asdict().items() if name != "latents" or value}


def _check(step: int, past: tuple[int, ...], row: PlannedRow) -> None:
    if row.past != past:
        raise ValueError(
            f"the history at step {step} holds steps {list(past)}, got a row for {list(row.past)}; compile it again."
        )
    if len(row.coefficients) != len(past):
        raise ValueError(
            f"a row has one coefficient for each past step, got {len(row.coefficients)} for {len(past)} at step "
            f"{step}; put zeros where a past step is unused."
        )
    if not all(map(math.isfinite, (*row.coefficients, row.offset, row.latents))):
        numbers = f"{row.coefficients} + {row.offset}" + (f" + {row.latents} of the latents" if row.latents else "")
        raise ValueError(f"the numbers of a row are finite, got {numbers} at step {step}.")


def _gain(row: PlannedRow) -> float:
    return math.fsum(map(abs, row.coefficients))


def _formula(row: PlannedRow) -> str:
    terms = [f"{c:+.4g} h{k}" for k, c in zip(row.past, row.coefficients, strict=True) if c][::-1]
    hidden = [f"and {len(terms) - SHOWN_TERMS} more"] if len(terms) > SHOWN_TERMS else []
    offset = [f"{row.offset:+.4g}"] if row.offset else []
    latents = [f"{row.latents:+.4g} x"] if row.latents else []
    return " ".join([*terms[:SHOWN_TERMS], *hidden, *offset, *latents]) or "0"
