"""Tie a run to the call that makes it: who calls a denoiser next, after a run was stopped, is not its next step.

A sampler tells at which step it is, not who asks. A run that was stopped (an exception, an interruption, a generator
that is not asked again) leaves it in mid-run, and a probe or another pipeline that shares the denoiser then looks like
the run's next step. The pipeline's own call ends its run by itself (`lesa.host.clock`); a `Caller` covers what
has no such call: pipelines that share denoiser and scheduler (`from_pipe`), loops and generators of one's own, probes
within a callback. What a scheduler was told (`set_timesteps`, `step`) proves less: it may have been told so before the
run was stopped.

What is left: in a loop that is written out in a function, another call from that very function, after a `break`, looks
like the next step.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import CodeType, FrameType


class Caller:
    """Where denoisers are called from in a run.

    The calls of later steps come from the innermost call of a function that the first step's came from as well and that
    goes on (the pipeline's `__call__`, the function with the loop, the generator), by way of the same functions as in
    the first step. In the first step there are no forecasts yet, and each call is admitted.
    """

    def __init__(self, first: int, last: int):
        self._first, self._last = first, last
        self._held: list[list[FrameType]] = []  # the first step's stacks; then the loop: its id is no other's
        self._loop: int | None = None
        self._ways: set[tuple[CodeType, ...]] = set()

    def admits(self, step: int) -> bool:
        """Tell whether the call at `step` that is being made belongs to the run."""
        here = _stack(self._loop)
        if step == self._first:
            if step < self._last:
                self._held.append(here)
            return True
        if self._loop is None and not self._find_loop(here):
            return False
        admitted = _way(here, self._loop) in self._ways
        if admitted and step == self._last:
            self._held = []  # no later call can be taken for one of this run, and the loop's variables are let go
        return admitted

    def _find_loop(self, here: list[FrameType]) -> bool:
        """Find what goes on since the first step, if this call comes from there by a known way."""
        loop = next((frame for frame in here if frame in self._held[0]), None)
        ways = {way for stack in self._held if (way := _way(stack, id(loop))) is not None}
        if loop is None or _way(here, id(loop)) not in ways:
            return False
        self._loop, self._ways, self._held = id(loop), ways, [[loop]]
        return True


def _stack(loop: int | None = None) -> list[FrameType]:
    """Return the calls of functions that the present one is made from, innermost first, without torch's and ours.

    Where the loop is known, those within it, and it, are all.
    """
    frame, found = sys._getframe(1), []
    while frame is not None:
        if id(frame) == loop:
            return [*found, frame]
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "lesa"):
            found.append(frame)
        frame = frame.f_back
    return found


def _way(stack: Sequence[FrameType], loop: int | None) -> tuple[CodeType, ...] | None:
    """Return the functions between the loop and the transformer; None if the stack does not come from the loop."""
    where = next((k for k, frame in enumerate(stack) if id(frame) == loop), None)
    return None if where is None else tuple(frame.f_code for frame in stack[:where])
