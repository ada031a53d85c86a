"""Calls of several kinds are told from each other at their first steps, before any is run to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lesa.host.clock import Moment
from lesa.learn.calls import Call, arguments, seeded
from lesa.learn.counted import Recorder, Recording


class _Seen(Exception):
    """Ends the call of a pipeline where its grid is known."""


def check_one_grid(pipe: Any, calls: Sequence[Call], common: Mapping[str, Any]) -> None:
    """Refuse calls whose runs walk different grids. `common` are the arguments that all calls share.

    Calls differ in kind by their numbers, and by the sizes of their pictures and tensors. Of each kind one goes up to
    its first step; where all are of one kind none does.

    Raises: ValueError that names two kinds.
    """
    kinds: dict[str, Call] = {}
    for one in calls:
        kinds.setdefault(kind_of(one), one)
    if len(kinds) == 1:
        return
    found = [(kind, moment) for kind, one in kinds.items() if (moment := _first_moment(pipe, one, common))]
    for other, moment in found[1:]:
        kind, first = found[0]
        if first.start != moment.start or not torch.equal(first.times, moment.times):
            raise ValueError(
                f"a calibration is for runs on one grid, got calls {kind} (from step {first.start} of "
                f"{len(first.times) - 1}) and {other} (from step {moment.start} of {len(moment.times) - 1}), at other "
                "times; calibrate each kind by itself. (Some schedulers set times by the picture's size.)"
            )


def kind_of(call: Call) -> str:
    """Return in words all of a call that its grid may depend on: 'with height=512, image of 640 x 480'."""
    if isinstance(call, str):
        return "of prompts alone"
    parts = [words for name, value in sorted(call.items()) if (words := _words(name, value))]
    return f"with {', '.join(parts)}" if parts else "of prompts alone"


def _words(name: str, value: Any) -> str:
    if isinstance(value, (bool, int, float)):
        return f"{name}={value}"
    if isinstance(value, (list, tuple)):
        return ", ".join(words for one in value if (words := _words(name, one)))
    size = getattr(value, "shape", None) or getattr(value, "size", None)
    return f"{name} of {' x '.join(map(str, size))}" if isinstance(size, tuple) else ""


def _first_moment(pipe: Any, call: Call, common: Mapping[str, Any]) -> Moment | None:
    """Run a call up to its first step; None if it comes to none, which its reference run will tell."""
    recorder, seen = Recorder(pipe, 1, ()), list[Moment]()

    def end(recording: Recording) -> None:
        seen.append(recording.moment)
        raise _Seen

    recorder.on_record = end
    undo = recorder.attach()
    try:
        with torch.no_grad(), seeded(0):
            pipe(**arguments(pipe, call, 0, common))
    except _Seen:
        pass
    finally:
        undo()
    return seen[0] if seen else None
