"""Rows that were solved for, in closed form, rather than trained: free numbers, one row for all streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lesa.predictors.base import Predictor
from lesa.predictors.curve import Curve
from lesa.predictors.origin import Origin, configuration
from lesa.rows.basis import Basis
from lesa.rows.forecasters import Forecaster
from lesa.rows.gaps import TINY, Full, Gaps, ends_of, is_corrected
from lesa.rows.grid import matches, times_in_order
from lesa.rows.levels import DATA
from lesa.rows.row import Row
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

STREAMS = ("all",)
BASIS = ("gram", "answers", "products", "drifts")
"""What is kept of a basis; the rest a predictor knows."""


class Solved(Predictor):
    """Free rows over the outputs of all full steps so far, the same in every stream.

    `coefficients` is (S, J) for J full steps, float64: the rows of skipped steps, oldest full step first, 0 for what
    is not held. A new predictor is reuse. Its grid is whatever a sampler walks, times that repeat included; runs begin
    at the first of the steps `begins`, and histories anew at the others.

    The steps of one gap may share their row: all that a gap does to the latents at its end is one number for each held
    output, so J (J + 1) / 2 numbers are a run (`gaps`). With `latents`, (S,), a part of the latents that the run began
    with is added at the sampler: one number more for each gap. The row of a full step, 0 where there is none, corrects
    it: after skipped steps, where the next one is full too, the sampler is handed that combination. `of` is what is
    combined: outputs, or the data predictions that follow from them at the sampler.

    With a `basis` it keeps what its rows were solved on, and may be `carried` to other grids.
    """

    method = "solved"
    remembers_forecasts = False
    curve: Curve | None = None
    """What the calibration that made it found, for all numbers of full steps; known to the process that made it."""

    def __init__(self, origin: Origin, latents: bool = False, of: str = "output", basis: bool = False) -> None:
        if of not in ("output", DATA):
            raise ValueError(f"rows are of the output or of the data, got of={of!r}; name one of these.")
        nn.Module.__init__(self)  # a predictor's own wants times that fall, and this one runs on any
        self.origin, self.of = origin, of
        self.grid = times_in_order(origin.grid)
        self.schedule = Schedule.parse(origin.schedule)
        self.begins = tuple(origin.training.get("begins", (0,)))
        self.full = self.full_of(self.schedule, len(self.grid) - 1)
        self.memory = len(self.full)
        steps = len(self.grid) - 1
        self.coefficients = nn.Parameter(torch.zeros(steps, self.memory, dtype=torch.float64))
        self.latents = nn.Parameter(torch.zeros(steps, dtype=torch.float64)) if latents else None
        self.set_gaps(torch.eye(self.memory, self.memory + 1, dtype=torch.float64))
        self.has_basis = basis
        for name, shape in _shapes(steps, self.memory).items() if basis else ():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64))

    @property
    def gaps(self) -> Tensor:
        """Return the row of the first step that is skipped after each full step, (J, J + 1): over the outputs of full
        steps, and the first latents. Where none is, it is what corrects the full step, or reuse."""
        rows = torch.eye(self.memory, self.memory + 1, dtype=torch.float64)
        for j, step in enumerate(self._first_of_gaps()):
            if step not in self.full or self.coefficients[step].any():
                rows[j, :-1] = self.coefficients.detach()[step]
                rows[j, -1] = 0.0 if self.latents is None else self.latents.detach()[step]
        return rows

    def _first_of_gaps(self) -> list[int]:
        """Return the first step that the row of each gap is for; the full step itself where none is skipped."""
        ends = ends_of(self.full, len(self.grid) - 1)
        return [step if end == step + 1 else step + 1 for step, end in zip(self.full, ends, strict=True)]

    @torch.no_grad()
    def set_gaps(self, rows: Tensor) -> None:
        """Give all steps that are skipped after the j-th full step row j of `rows`, (J, J + 1), lower triangular over
        the outputs of full steps; the last column is of the first latents. Where none is skipped, it corrects the full
        step, if it is one to be corrected and the row is not its own output alone.

        They are rounded to what files of predictors keep, float32, so that a predictor saved is the one measured.
        """
        rows, reuse = rows.float().double(), torch.eye(self.memory, self.memory + 1, dtype=torch.float64)
        ends = ends_of(self.full, len(self.grid) - 1)
        for j, (full, end) in enumerate(zip(self.full, ends, strict=True)):
            if end > full + 1:
                steps = slice(full + 1, end)
            elif self.latents is not None and is_corrected(self.full, j, end):
                steps = slice(full, end)
            else:
                continue
            row = rows[j] * (rows[j] != reuse[j]).any() if end == full + 1 else rows[j]
            self.coefficients[steps] = row[:-1]
            if self.latents is not None:
                self.latents[steps] = row[-1]

    # --- other grids

    @property
    def basis(self) -> Basis | None:
        """Return what its rows were solved on; None if that was not kept."""
        if not self.has_basis:
            return None
        kept = {name: self.get_buffer(name) for name in BASIS}
        return Basis(self.grid, self.grid[list(self.full)], latents=self.latents is not None, **kept)

    def keep_basis(self, basis: Basis, response: Tensor) -> None:
        """Keep what its rows were solved on in runs of a sampler with this response, (S + 1, S).

        `further` is by how much more rows that were refined since then move the latents at the end of each gap.
        """
        solved, moves = basis.solve(response, self.full).rows, _moves(response, self.full, basis.latents)
        kept = {name: getattr(basis, name) for name in BASIS}
        for name, numbers in {**kept, "further": (self.gaps - solved) * moves[:, None]}.items():
            self.get_buffer(name).copy_(numbers)

    def basis_at(
        self,
        times: Sequence[float] | Tensor,
        known: Tensor | None = None,
        embed: Callable[[Tensor], Tensor] | None = None,
    ) -> Basis:
        """Return what its rows were solved on, for another grid, as `Basis.at` does.

        `embed` says what the denoiser makes of times, (n,) to (n, numbers), where that is known
        (`lesa.host.embedding`): what outputs are between those recorded goes with it.

        Raises: ValueError, with the reason, if there is nothing, or it does not say what runs there are made of.
        """
        if self.basis is None:
            raise ValueError("of these rows nothing was kept to carry them to other times by; calibrate there.")
        there = times_in_order(times)
        embedded = None if embed is None else embed(torch.cat([self.grid[:-1], there[:-1]]))
        return self.basis.at(there, known, embedded)

    def carried(
        self, times: Sequence[float] | Tensor, response: Tensor, embed: Callable[[Tensor], Tensor] | None = None
    ) -> Solved:
        """Return a predictor for another grid, whose sampler has this response: full steps and rows by algebra alone.

        `embed` is as in `basis_at`. Its origin's training says from how many steps it was carried, and the drift in dB
        that algebra has it end with.

        Raises: ValueError, with the reason, if its rows cannot be carried there.
        """
        if matches(times_in_order(times), self.grid):
            return self
        basis = self.basis_at(times, embed=embed)
        full = basis.search(response)
        rows, moves = basis.solve(response, full).rows, _moves(response, full, basis.latents)
        rows = rows + torch.where(moves.abs() > TINY, 1 / moves, 0.0)[:, None] * self.get_buffer("further")
        drift = 10 * math.log10(max(basis.left(response, full, rows), TINY))
        training = {**self.origin.training, "carried_from": len(self.grid) - 1, "drift": drift}
        grid, schedule = tuple(basis.times.tolist()), str(Schedule.at(full))
        made = Solved(replace(self.origin, grid=grid, schedule=schedule, training=training), basis.latents)
        made.set_gaps(rows)
        return made

    def options(self) -> dict[str, Any]:
        said = {"latents": self.latents is not None, "basis": self.has_basis}
        of = {} if self.of == "output" else {"of": self.of}
        return {name: True for name, so in said.items() if so} | of

    def numbers(self, stream: str) -> list[nn.Parameter]:
        return [self.coefficients, *([] if self.latents is None else [self.latents])]

    def for_stream(self, name: str) -> Forecaster:
        """Return the forecaster of any stream: this one."""
        return self

    def rows_of(self, grid: Tensor, pasts: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        """Return the rows of several steps.

        Raises: ValueError if the predictor is bound to another grid or schedule.
        """
        self.check_grid(grid)
        for step, past in pasts.items():
            self.check_past(step, past)
        return self.stream_rows(STREAMS[0], grid, pasts)

    def stream_rows(self, stream: str, grid: Tensor, pasts: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        table, places = self.coefficients, {step: k for k, step in enumerate(self.full)}
        latents = [0.0] * len(table) if self.latents is None else self.latents.tolist()
        return {
            step: Row(table[step, [places[k] for k in past]], table.new_zeros(()), latents[step])
            for step, past in pasts.items()
        }

    def correction(self, grid: Tensor, step: int, past: Sequence[int]) -> Row | None:
        """Return the row of a full step, None if it has none, or the step or its past is not one of its own.

        Raises: ValueError if the predictor is bound to another grid, or has a row where no full step is corrected.
        """
        self.check_grid(grid)
        if step not in self.full or not self.coefficients[step].any():
            return None
        j, ends = self.full.index(step), ends_of(self.full, len(self.grid) - 1)
        if self.latents is None or not is_corrected(self.full, j, ends[j]):
            raise ValueError(
                f"full steps after skipped ones are corrected, where the next is full too, got a row for step {step} "
                f"on {self.schedule!r}; calibrate again."
            )
        if [*self.past(step), step][-self.memory :] != list(past):
            return None
        return self.stream_rows(STREAMS[0], grid, {step: past})[step]

    def wants(self, grid: Tensor, step: int) -> int:
        """Return how many past features the schedule leaves in the history."""
        return len(self.past(step))

    def schedule_for(self, grid: Sequence[float] | Tensor, budget: int | None = None, start: int = 0) -> Schedule:
        """Return its schedule.

        Raises: ValueError if it has not so many full steps, or the predictor is not for this grid.
        """
        self.check_grid(times_in_order(grid))
        self.check_start(start)
        if budget not in (None, len(self.full)):
            raise ValueError(
                f"these rows were solved for {len(self.full)} full steps, got a budget of {budget}; take others."
            )
        return self.schedule

    def check_model(self, transformer: nn.Module, tap: Tap) -> None:
        """Raise ValueError unless the predictor fits this denoiser: the origin's, or another of the same pipeline."""
        others = self.origin.training.get("denoisers", [])
        if not tap.modules:
            if [type(transformer).__name__, configuration(transformer)] in others:
                return
            tap = self.origin.tap  # at the output nothing depends on the names of blocks
        super().check_model(transformer, tap)

    def __repr__(self) -> str:
        return f"Solved({self.origin.model!r}, schedule={self.origin.schedule!r})"


def _shapes(steps: int, count: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what is kept of a basis."""
    vectors = steps + 1 + count
    return {
        "gram": (vectors, vectors),
        "answers": (count,),
        "products": (count, vectors),
        "drifts": (count, count),
        "further": (count, count + 1),
    }


def _moves(response: Tensor, full: Full, latents: bool) -> Tensor:
    """Return by how much an output of all steps that each gap's row is for moves the latents at its end, (J,)."""
    gaps = Gaps(response, full, latents=latents)
    return torch.tensor([gaps.moves(j) for j in range(len(full))], dtype=torch.float64)
