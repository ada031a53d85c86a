"""What rows do at the sampler, after guidance: a part of the run's first latents, and corrections of full steps."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from lesa.host.summary import SamplerSummary
from lesa.rows.plan import Plan, PlannedRow
from lesa.rows.row import History, Storage, within


class AtSampler:
    """Holds of a run what acts at its sampler: the latents that it began with, and outputs that are combined again.

    Outputs are what the sampler is handed: of derivatives or data, whatever rows combine. Sums are made in float32 at
    least, and rounded once.
    """

    def __init__(self, storage: Storage, done: SamplerSummary | None = None):
        self._storage, self._done = storage, done or SamplerSummary()
        self._first: Tensor | None = None
        self._outputs: History | None = None
        self._live: dict[int, tuple[int, ...]] = {}
        self._plan: Plan | None = None
        self._among: dict[int, Hashable] = {}
        self._wanted: frozenset[int] | None = None  # full steps that the run's first plan corrects

    @property
    def nbytes(self) -> int:
        """Bytes held of the latents' and the outputs' device memory."""
        return sum(held.nbytes for held in (self._first, self._outputs) if held is not None)

    @property
    def began(self) -> bool:
        """Tell whether something acts in this run."""
        return self._first is not None

    def begin(self, latents: Tensor) -> None:
        """Take the latents that the run begins with."""
        self._first = latents.detach().clone()

    def handed(
        self, plan: Plan, step: int, output: Tensor, latents: Tensor, part: int = 0, among: Hashable = None
    ) -> Tensor:
        """Return what the sampler is handed at a step instead of this output; the same tensor where nothing acts.

        `part` is the output's place among those of the step, and `among` tells which streams it was made of. Where
        others were there before, as before guidance began or ended, nothing is corrected: outputs jump there, and that
        is no miss of a forecast.

        Raises: RuntimeError if there are several outputs a step, or latents or outputs have not kept their shape.
        """
        correction, row = plan.corrections.get(step), plan.rows.get(step)
        if correction is not None and any(self._among.get(k) != among for k in correction.past[:-1]):
            correction = None
        self._count(plan, step, correction is not None, part)
        handed = output if correction is None else self._corrected(correction, output, part)
        if (more := correction or row) is not None and more.latents:
            handed, first = _wide(handed), self._latents_like(latents, part)
            handed = torch.add(handed, first.to(handed), alpha=more.latents)
        if row is None and part == 0:
            self.keep(plan, step, output, among)
        self._done.bytes_held = self.nbytes
        return handed if handed is output else self.narrow(handed, output)

    def _count(self, plan: Plan, step: int, corrected: bool, part: int) -> None:
        if self._wanted is None:
            self._wanted = frozenset(plan.corrections)
        self._done.corrected += corrected and part == 0
        self._done.uncorrected += step in self._wanted and not corrected and part == 0

    def narrow(self, sums: Tensor, like: Tensor) -> Tensor:
        """Return sums in the dtype of another tensor, clamped to its range and counted where they are beyond it."""
        sums, beyond = within(sums, like.dtype)
        self._done.clamped = self._done.clamped + beyond  # of a GPU's: nobody waits for it here
        return sums.to(like.dtype)

    def keep(self, plan: Plan, step: int, output: Tensor, among: Hashable = None) -> None:
        """Keep what a full step gave, if it is combined later, and of which streams."""
        self._among[step] = among
        if self._plan is not plan:
            self._plan, self._live = plan, plan.live(self._storage.of_differences, corrections=True)
        live = self._live[step]
        if self._outputs is None and live:
            self._outputs = self._storage.history(max(map(len, self._live.values())), like=output)
        if self._outputs is None:
            return
        self._outputs.keep(live)
        if step in live:
            self._check_shape(output)
            self._outputs.append(step, output)

    def _corrected(self, row: PlannedRow, output: Tensor, part: int) -> Tensor:
        """Combine the output of a full step with those before it, in float32 at least."""
        (*past, _), (*coefficients, own) = row.past, row.coefficients
        if part == 0 and not any(coefficients):
            return _wide(output) * own + row.offset if row.offset else _wide(output) * own
        self._check_shape(output, part)
        assert self._outputs is not None, "what a correction combines is kept"
        output = _wide(output)
        return self._outputs.forecast(past, coefficients, row.offset, output.dtype).add_(output, alpha=own)

    def _check_shape(self, output: Tensor, part: int = 0) -> None:
        if part or self._outputs is None or not self._outputs.fits(output):
            raise RuntimeError(
                f"full steps are corrected where a step has one output, which keeps its shape, got "
                f"{tuple(output.shape)} as number {part + 1} of a step; calibrate for these calls."
            )

    def _latents_like(self, latents: Tensor, part: int) -> Tensor:
        if part or self._first is None or self._first.shape != latents.shape:
            first = None if self._first is None else tuple(self._first.shape)
            raise RuntimeError(
                f"rows that add a part of the run's first latents are for one set of latents that keeps its shape, got "
                f"{tuple(latents.shape)} as set {part + 1} of a step after {first}; calibrate for these calls."
            )
        return self._first


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
