"""Calls of several kinds are told from each other at their first steps, before any is run to its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lesa.host.facts import listen
from lesa.learn.calls import Call, arguments, seeded
from lesa.predictors.facts import Facts


class _Seen(Exception):
    """Ends the call of a pipeline where its facts are known."""


def check_one_kind(pipe: Any, calls: Sequence[Call], common: Mapping[str, Any]) -> None:
    """Refuse calls whose runs a calibration of the first of them would not be found for: those of another grid, and
    those that differ otherwise, as in size or guidance. `common` are the arguments that all calls share.

    Calls differ in kind by their numbers, and by the sizes of their pictures and tensors. Of each kind one goes up to
    its first step; where all are of one kind none does.

    Raises: ValueError that names two kinds, and by what their runs differ.
    """
    kinds: dict[str, Call] = {}
    for one in calls:
        kinds.setdefault(kind_of(one), one)
    if len(kinds) == 1:
        return
    found = [(kind, facts) for kind, one in kinds.items() if (facts := _facts(pipe, one, common))]
    for other, facts in found[1:]:
        kind, first = found[0]
        if differences := facts.differences(first):
            raise ValueError(
                f"a calibration is for runs of one kind, got calls {kind} and calls {other}, whose runs differ "
                f"({'; '.join(differences)}); calibrate each kind by itself."
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


def _facts(pipe: Any, call: Call, common: Mapping[str, Any]) -> Facts | None:
    """Run a call up to its first step; None if it comes to none, which its reference run will tell."""

    def end(_facts: Facts) -> None:
        raise _Seen

    with listen(pipe, on_facts=end) as found:
        try:
            with torch.no_grad(), seeded(0):
                pipe(**arguments(pipe, call, 0, common))
        except _Seen:
            pass
    return found[0] if found else None
