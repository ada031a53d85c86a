"""A training is set against what it began with, and against rows that need none."""

import pytest

from lesa.learn.outcome import shortfalls
from lesa.rows.forecasters import Lagrange, Reuse, Taylor

TRAINED, START = Taylor(1), Reuse()


@pytest.mark.parametrize(
    ("trained", "start", "rows", "words"),
    [
        (-40.0, -30.0, -39.0, []),
        (
            -38.87,
            -38.87,
            -30.0,
            ["its runs have a drift of -38.87 dB, those of what it began with -38.87"],
        ),
        (-38.9, -38.87, -30.0, ["gained nothing"]),
        (-40.0, -30.0, -46.0, ["drift of -40.00 dB, those of Lagrange(degree=2) -46.00; use lesa.Lagrange(degree=2)"]),
        (-20.0, -30.0, -46.0, ["gained nothing", "worse than rows without training"]),
        (float("nan"), -30.0, -46.0, ["gained nothing", "worse than rows without training"]),
    ],
)
def test_what_a_training_was_not_good_for(trained, start, rows, words):
    drifts = {repr(TRAINED): trained, repr(START): start, repr(Lagrange(2)): rows}
    found = shortfalls(TRAINED, START, lambda one: drifts.get(repr(one), 0.0))
    assert len(found) == len(words) and all(some in line for some, line in zip(words, found, strict=True))
