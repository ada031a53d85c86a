"""What rows are solved from: equations of real runs, and the rows that these give, by rounds or in one run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lesa.host.runtime import Run, denoisers_of
from lesa.host.tap import OUTPUT, tap_of
from lesa.learn.calls import Call
from lesa.learn.counted import Recording
from lesa.learn.metrics import psnr
from lesa.learn.references import BATCH, TINY, OnRun, References
from lesa.predictors import Origin, configuration
from lesa.predictors.solved import STREAMS, Solved
from lesa.rows.basis import Basis
from lesa.rows.gaps import Equations, Full, Gaps
from lesa.rows.levels import DATA
from lesa.rows.plan import PlannedRow
from lesa.rows.schedule import Schedule

if TYPE_CHECKING:
    from typing_extensions import Self

SETTLED = 0.01
"""Rounds end when new rows would move the latents by less than this share of what they are off."""
NOTHING = 0.05
"""Rounds end, too, where one is worse by less than this, in dB."""
LEAST_HOLD, HOLDS = 1e-4, 100.0
"""How near to the best rows new ones are held after a round that was worse, and by what factor more after the next."""


SHOWN = 0.75
"""What pictures count for between schedules, where there are any; the last latents count for the rest."""


class Found(NamedTuple):
    """Rows, the recordings of a real run with them, and how far its calls ended from their references, in dB; where it
    was drawn, by how many dB of PSNR its pictures are those of the references."""

    full: Full
    rows: Tensor
    recordings: list[Recording]
    drift: float
    psnr: float | None = None

    @property
    def score(self) -> float:
        """What is the less the nearer a run is, in dB: its drift, or where it was drawn its pictures, too.

        A last step that is full takes much off the drift that a decoder would not have shown. Of pictures that are
        alike to the cap of PSNR the drift alone tells which are nearer.
        """
        return self.drift if self.psnr is None else (1 - SHOWN) * self.drift - SHOWN * self.psnr


class Problem(References):
    """Calls of a pipeline that rows are solved on: their reference runs, and real runs with rows.

    Rows have a term in the latents that a run began with, if there are `latents` of one kind alone.

    Under a sampler that adds noise, rows combine the data predictions that follow from outputs, which do not jump with
    it; velocities and outputs are these then.

    Raises: ValueError as `References` does, or if the sampler is not affine, or if the runs are not on one grid, or do
        not walk it to its end.
    """

    def __init__(
        self,
        pipe: Any,
        calls: Sequence[Call],
        seeds: Sequence[int],
        call: Mapping[str, Any] | None = None,
        *,
        batch_size: int = BATCH,
        pictures: bool = False,
        on_run: OnRun | None = None,
    ):
        super().__init__(pipe, calls, seeds, call, batch_size=batch_size, pictures=pictures, on_run=on_run)
        self._check()
        self._reused: Found | None = None
        self.latents = self.reference[0].moment.parts == 1
        ticks = range(self.ticks)
        self.begins = tuple(self.reference[0].begins)
        grams = [self.weighed(run, self.columns(run, ticks)) for run in self.reference]
        self.gram = sum(grams[1:], grams[0])

    def _run_in_full(self) -> list[Recording]:
        return self._kept(*self.run(of="reference", keep=None))

    @property
    def ticks(self) -> int:
        """How many steps a run walks."""
        return self.steps - self.start

    @property
    def response(self) -> Tensor:
        assert self.numbers is not None
        return self.numbers.response

    def _check(self) -> None:
        assert self.numbers is not None
        first, walked = self.reference[0], {run.ticks for run in self.reference}
        unlike = {
            f"of {sorted(walked)} steps": walked != {self.ticks} or len(self.numbers) != self.ticks,
            "from different steps on": any(run.moment.start != self.start for run in self.reference),
            "at different times": any(not torch.equal(run.moment.times, self.times) for run in self.reference),
            "whose streams begin at different steps": any(run.begins != first.begins for run in self.reference),
        }
        if found := [words for words, is_so in unlike.items() if is_so]:
            raise ValueError(
                f"rows are solved for runs that walk one grid to its end, here of {self.steps} steps from step "
                f"{self.start} on, got runs {' and '.join(found)}; use calls with as many steps each, from the same "
                "on, or an untrained forecaster."
            )
        if not (self.weights > 0).all():
            raise ValueError(
                "rows are solved on reference runs that end in finite numbers, got some that overflow without any "
                f"step skipped; run this {type(self.pipe).__name__} in bfloat16 or float32."
            )

    def check_budget(self, budget: int) -> None:
        """Raise ValueError if there are fewer steps, or more that have to be full."""
        least, most = len(self.begins), self.ticks
        if not least <= budget <= most:
            raise ValueError(f"a budget is from {least} to {most} full steps, got {budget}; change it.")

    def check_full(self, full: Sequence[int]) -> None:
        """Raise ValueError unless all is full at which streams begin or end."""
        if missing := sorted(set(self.begins) - set(full)):
            steps, names = [self.start + k for k in missing], [self.start + k for k in full]
            raise ValueError(
                f"steps at which other streams run than before are full (there is nothing to forecast from), got the "
                f"full steps {names}; add {', '.join(map(str, steps))} to them."
            )

    def gaps(self, full: Full) -> Gaps:
        return Gaps(self.response, full, self.begins, self.latents)

    def run_rows(
        self,
        full: Full,
        rows: Tensor,
        *,
        of: str,
        on_record: Callable[[Run, Recording], None] | None = None,
        draw: bool = False,
    ) -> Found:
        """Run all calls with these rows, (J, J + 1), and `draw` where there are pictures."""
        draw = draw and bool(self.pictures)
        runs, drawn = self.run(self.predictor(full, rows), of=of, keep=full, on_record=on_record, draw=draw)
        pairs = zip(drawn, self.pictures, strict=True) if draw else ()
        return Found(full, rows, runs, fmean(self.drifts(runs)), fmean(psnr(*both) for both in pairs) if draw else None)

    def predictor(self, full: Full, rows: Tensor, basis: Basis | None = None, **training: Any) -> Solved:
        """Make a predictor of these rows, (J, J + 1), which remembers more facts about its `training`, and may be
        carried to other grids by a `basis`."""
        names = denoisers_of(self.pipe)
        first, *others = (getattr(self.pipe, name) for name in names)
        others = [[type(other).__name__, configuration(other)] for other in others]
        training = dict(calls=self.calls, transformer_runs=self.counts.total) | training
        training |= {"denoisers": others} if others else {}
        training |= {"begins": [self.start + k for k in self.begins]} if (self.start, *self.begins) != (0, 0) else {}
        name = str(getattr(getattr(self.pipe, "config", None), "_name_or_path", "") or type(self.pipe).__name__)
        schedule = str(Schedule.at([self.start + k for k in full]))
        versions = {package: version(package) for package in ("torch", "diffusers")}
        grid, kind, tap = tuple(self.times.tolist()), type(first).__name__, tap_of(first, OUTPUT)
        facts = name, kind, configuration(first), tap, grid, schedule, STREAMS
        origin = Origin(*facts, training=training, versions=versions)
        made = Solved(origin, self.latents, "output" if self.levels is None else DATA, basis is not None)
        made.set_gaps(rows)
        if basis is not None:
            made.keep_basis(basis, self.response)
        return made

    # --- least squares

    def weighed(self, run: Recording, columns: Tensor, others: Tensor | None = None) -> Tensor:
        """Return the sum over a recording's calls of inner products of columns with (other) columns."""
        products = (columns if others is None else others) @ columns.mT
        return (self.weights_of(run)[:, None, None] * products).sum(0)

    def weights_of(self, run: Recording) -> Tensor:
        """Return what a recording's calls count by, (calls,), so that the elements kept stand for all."""
        place = 0
        for one in self.reference:
            if (one.batch, one.number) == (run.batch, run.number):
                return self.weights[place : place + one.calls] * one.thinned
            place += one.calls
        raise AssertionError("each run has its reference run")

    def columns(self, run: Recording, full: Sequence[int]) -> Tensor:
        """Return what rows combine, outputs of full steps and the first latents, (calls, J + 1, elements)."""
        return torch.cat([run.outputs(full), run.latents([0])], 1)

    def equations(self, gaps: Gaps, found: Found | None = None) -> Equations:
        """Return what the outputs of these full steps say: of the reference runs, or of runs with rows.

        The latents at the end of each gap are taken from the run itself, and the rows' own algebra says how other rows
        would move them: where that is not exact (norms rescaled by guidance, latents rewritten), rounds still end where
        the real latents are nearest to the reference's.
        """
        gram: list[Tensor] = []
        target: list[Tensor] = []
        for number, wanted in enumerate(self.reference):
            run = found.recordings[number] if found else wanted
            columns = self.columns(run, gaps.full)
            if found is None:
                missing = self._missing(gaps, wanted)
            else:
                moved = torch.einsum("ek,pkn->pen", gaps.ways(found.rows), columns)
                missing = wanted.latents(gaps.ends) - run.latents(gaps.ends) + moved
            gram.append(self.weighed(wanted, columns))
            target.append(self.weighed(wanted, columns, missing))
        return Equations(sum(gram[1:], gram[0]), sum(target[1:], target[0]))

    def _missing(self, gaps: Gaps, wanted: Recording) -> Tensor:
        """Return what the reference's outputs move the latents by until the end of each gap."""
        return torch.einsum("es,psn->pen", self.response[gaps.ends], wanted.outputs(range(self.ticks)))

    # --- rounds

    @property
    def goes_together(self) -> bool:
        """Tell whether all calls go in one run of the pipeline."""
        return len(self._batches) == 1 and len(self.reference) == 1

    def lockstep(self, full: Full, of: str, draw: bool = False) -> Found:
        """Solve every gap as the one run of all calls comes to it.

        Where the rows' algebra is not exact, what it is off by at a full step is taken into the gap that begins there.
        """
        gaps, (wanted,) = self.gaps(full), self.reference
        ends, rows = wanted.latents(gaps.ends) - self._added(wanted, gaps.ends), gaps.reuse()
        noise, decay = wanted.latents([0]), self.numbers.decay if self.numbers is not None else torch.empty(0)
        held = torch.ones_like(rows).tril()  # a run holds what counts in the rows that it begins with
        held[:, -1] = float(self.latents)
        made: list[PlannedRow] = []

        def go_on(live: Run, run: Recording) -> None:
            if full[len(made) : len(made) + 1] == (run.ticks - 1,):
                made.append(solve_gap(len(made), run))
            for row in made:  # a run may be planned anew as its first step is done, or of data not before the second
                set_row(live, row)

        def solve_gap(j: int, run: Recording) -> PlannedRow:
            tick = full[j]
            columns = self._columns_so_far(run, full, j)
            gram = self.weighed(wanted, columns)
            missing = ends[:, j : j + 1] - decay[gaps.ends[j]] * noise
            if j:
                expected = decay[tick] * noise + torch.einsum("k,pkn->pn", gaps.way(rows, j - 1), columns)[:, None]
                kept = decay[gaps.ends[j]] / decay[tick] if abs(decay[tick]) > TINY else 1.0
                missing = missing - kept * (run.latents([tick]) - self._added(wanted, [tick]) - expected)
            target = self.weighed(wanted, columns, missing)[0]
            rows[j] = gaps.solve_row(rows, j, gram, target)
            coefficients = tuple(rows[j, gaps.lows[j] : j + 1].float().double().tolist())
            past = tuple(self.start + k for k in full[gaps.lows[j] : j + 1])
            return PlannedRow(past, coefficients, 0.0, float(rows[j, -1]))

        return self.run_rows(full, held, of=of, on_record=go_on, draw=draw)._replace(rows=rows)

    def _added(self, wanted: Recording, ticks: Sequence[int]) -> Tensor:
        """Return what the sampler's noise made of the latents at some ticks, (calls, ticks, elements): in all runs of a
        call the same."""
        if self.levels is None or self.numbers is None:
            return torch.zeros(())
        known = self.numbers.decay[ticks, None] * wanted.latents([0])
        outputs = torch.einsum("es,psn->pen", self.response[ticks], wanted.outputs(range(self.ticks)))
        return wanted.latents(ticks) - known - outputs

    def _columns_so_far(self, run: Recording, full: Full, j: int) -> Tensor:
        known = self.columns(run, full[: j + 1])
        columns = known.new_zeros(known.shape[0], len(full) + 1, known.shape[2])
        columns[:, : j + 1], columns[:, -1] = known[:, :-1], known[:, -1]
        return columns

    def rounds(self, full: Full, most: int, of: str = "rounds") -> tuple[Found, list[float]]:
        """Solve all gaps on what the best run gave and run again, until the rows settle.

        What cannot be solved in one run begins with reuse, and with what the reference runs say. Where new rows end
        farther off than the best, the next ones are held nearer to these: there is more that answers to rows than their
        algebra knows of. Returns the best run, and the drift of each round.
        """
        gaps, hold, drifts = self.gaps(full), 0.0, list[float]()
        if self.goes_together:
            best = self.lockstep(full, of)
            drifts.append(best.drift)
            equations = self.equations(gaps, best)
        else:
            best, equations = self.reuse(full, of), self.equations(gaps)
        while len(drifts) < max(most, 1):
            rows = gaps.solve_rows(equations, best.rows if hold else None, hold)
            if drifts and self._settled(gaps, equations, rows, best):
                break
            last = self.run_rows(full, rows, of=of)
            drifts.append(last.drift)
            if last.drift < best.drift:
                best = last
            elif self.goes_together or (len(drifts) > 1 and last.drift < best.drift + NOTHING):
                break
            else:
                hold = max(HOLDS * hold, LEAST_HOLD)
            equations = self.equations(gaps, best)
        return best, drifts

    def tried(self, full: Full, of: str, draw: bool = False) -> Found:
        """Return rows solved as one run of all calls comes to them, or else the better of two rounds, of which the
        first goes by what the reference runs say."""
        if self.goes_together:
            return self.lockstep(full, of, draw)
        gaps = self.gaps(full)
        one = self.run_rows(full, gaps.solve_rows(self.equations(gaps)), of=of, draw=draw)
        other = self.run_rows(full, gaps.solve_rows(self.equations(gaps, one)), of=of, draw=draw)
        return min(one, other, key=lambda found: found.score)

    def first(self, calls: int) -> Self:
        if self.levels is not None and calls < self.calls and max(len(some) for some, _ in self._batches) > 1:
            return self  # a smaller batch would draw other noise
        part = super().first(calls)
        if part is not self:
            part._reused = None
        return part

    def reuse(self, full: Full, of: str = "rounds") -> Found:
        """Run all calls with the newest output reused; the last such run is remembered."""
        if self._reused is None or self._reused.full != full:
            self._reused = self.run_rows(full, self.gaps(full).reuse(), of=of)
        return self._reused

    def _settled(self, gaps: Gaps, equations: Equations, rows: Tensor, last: Found) -> bool:
        """Tell whether new rows move the latents at any gap's end by little, over all calls."""
        moves = gaps.ways(rows) - gaps.ways(last.rows)
        moved = float(((moves @ equations.gram) * moves).sum(1).clamp_min(0).max().sqrt())
        return moved < SETTLED * float(self.errors(last.recordings).sum().sqrt())


def set_row(live: Run, row: PlannedRow) -> None:
    """Change the plans of a run that is going on: the row of the gap after these full steps, or what corrects the last
    of them."""
    for plan in live.plans:
        for rows in (plan.rows, plan.corrections):
            rows.update({step: row for step in rows if rows[step].past == row.past})
