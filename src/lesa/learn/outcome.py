"""What a training came to: set against what it began with, and against rows that need none."""

from __future__ import annotations

from collections.abc import Callable

from lesa.rows.forecasters import Forecaster, Lagrange

GAINED_NOTHING = 3
"""The exit code of a training that was of no use."""
JUDGED_ON = 8
"""How many validation prompts are run once more to judge it, for each lesson."""
LEAST_GAIN = 0.1
"""Fewer dB of drift are no gain."""
UNTRAINED = (Lagrange(1), Lagrange(2), Lagrange(3))


def shortfalls(trained: Forecaster, start: Forecaster, drift_of: Callable[[Forecaster], float]) -> list[str]:
    """Say of what use a training was not: a line if its runs end no nearer to their reference runs than those of what
    it began with, and one if they end further away than those of Lagrange rows; `drift_of` gives their drift in dB."""
    found, drift = [], drift_of(trained)
    before = drift_of(start)
    if not drift <= before - LEAST_GAIN:
        found.append(
            f"the training gained nothing: its runs have a drift of {drift:.2f} dB, those of what it began with "
            f"{before:.2f}; give it more runs, rounds or updates, another loss or schedule."
        )
    least, best = min(((drift_of(rows), rows) for rows in UNTRAINED), key=lambda one: one[0])
    if not drift <= least:
        found.append(
            f"the predictor is worse than rows without training: on its own schedule its runs have a drift of "
            f"{drift:.2f} dB, those of {best!r} {least:.2f}; use lesa.{best!r} there, or train another."
        )
    return found
