"""What rows do at the sampler, after guidance: a part of the run's first latents, and corrections of full steps."""

from __future__ import annotations

import torch
from torch import Tensor

from lesa.rows.plan import Plan, PlannedRow
from lesa.rows.row import History, Storage


class AtSampler:
    """Holds of a run what acts at its sampler: the latents that it began with, and outputs that are combined again.

    Outputs are what the sampler is handed: of derivatives or data, whatever rows combine.
    """

    def __init__(self, storage: Storage):
        self._storage = storage
        self._first: Tensor | None = None
        self._outputs: History | None = None
        self._live: dict[int, tuple[int, ...]] = {}
        self._plan: Plan | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held of the latents' and the outputs' device memory."""
        return sum(held.nbytes for held in (self._first, self._outputs) if held is not None)

    def begin(self, latents: Tensor) -> None:
        """Take the latents that the run begins with."""
        self._first = latents.detach().clone()

    def handed(self, plan: Plan, step: int, output: Tensor, latents: Tensor, part: int = 0) -> Tensor:
        """Return what the sampler is handed at a step instead of this output; the same tensor where nothing acts.

        `part` is the output's place among those of the step.

        Raises: RuntimeError if there are several outputs a step, or latents or outputs have not kept their shape.
        """
        correction, row = plan.corrections.get(step), plan.rows.get(step)
        handed = output if correction is None else self._corrected(correction, output, part)
        if (more := correction or row) is not None and more.latents:
            handed = torch.add(handed, self._latents_like(latents, part).to(handed), alpha=more.latents)
        if row is None and part == 0:
            self.keep(plan, step, output)
        return handed

    def keep(self, plan: Plan, step: int, output: Tensor) -> None:
        """Keep what a full step gave, if it is combined later."""
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
        """Combine the output of a full step with those before it."""
        (*past, _), (*coefficients, own) = row.past, row.coefficients
        if part == 0 and not any(coefficients):
            return output * own + row.offset if row.offset else output * own
        self._check_shape(output, part)
        assert self._outputs is not None, "what a correction combines is kept"
        wide = torch.promote_types(output.dtype, torch.float32)
        earlier = self._outputs.forecast(past, coefficients, row.offset, wide)
        return earlier.add_(output, alpha=own).to(output.dtype)

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
