"""Rows without training by the names that commands and pages give them."""

from __future__ import annotations

from lesa.rows.default import Default
from lesa.rows.forecasters import Forecaster, Lagrange, Reuse, Taylor

NAMES = "default, reuse, taylor:1, lagrange:2 or the like"


def named(text: str) -> Forecaster:
    """Return the forecaster of a name: 'default', 'reuse', 'taylor:2', 'lagrange:1'.

    Raises: ValueError if it names none.
    """
    plain = {"default": Default, "reuse": Reuse}
    if text in plain:
        return plain[text]()
    name, _, number = text.partition(":")
    if name in ("taylor", "lagrange") and number.isdigit():
        return {"taylor": Taylor, "lagrange": Lagrange}[name](int(number))
    raise ValueError(f"a forecaster without training is {NAMES}, got {text!r}; write one of these.")
