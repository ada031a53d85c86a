"""Forecast the data prediction at the sampler seam: what outputs say of the data, not the outputs themselves.

Where a sampler adds noise, each output jumps with the noise of its latents, and only what it says of the data is
smooth. So rows combine the data predictions of full steps, x_0 = a_s x_s + b_s v_s with latents x_s and the output v_s
that the sampler is handed, and on a skipped step the sampler is handed v_s = (x_0 - a_s x_s) / b_s: a row over outputs
and latents, past and present. The denoisers repeat their newest outputs there, of which nothing is used. Guidance that
begins or ends between full steps counts from the next full step on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from lesa.host.conditions import Noise, settings_of
from lesa.host.intercept import unmarked
from lesa.rows import levels
from lesa.rows.levels import DATA, Levels
from lesa.rows.schedule import Schedule

CHOICES = ("auto", "output", DATA)
KEPT = 64
_known: dict[tuple[type, str], Levels] = {}
"""The levels of kinds of runs: to read them takes a run of the sampler, which noise from a tree makes slow."""


class Known(NamedTuple):
    """The data prediction at one step, x_0 = of_latents x_s + of_output v_s."""

    of_latents: float
    of_output: float

    @classmethod
    def at(cls, levels: Levels, tick: int) -> Known:
        """Return what is known at a tick, counted from the levels' first; `UNKNOWN` beyond them."""
        if not 0 <= tick < len(levels.of_output):
            return UNKNOWN
        return cls(float(levels.of_latents[tick]), float(levels.of_output[tick]))

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.of_latents) and math.isfinite(self.of_output)

    @property
    def turns_back(self) -> bool:
        """Tell whether the output follows from the data prediction."""
        return self.is_finite and self.of_output != 0

    def data(self, latents: Tensor, output: Tensor) -> Tensor:
        """Return the data prediction, in float32 at least."""
        wide = torch.promote_types(torch.promote_types(latents.dtype, output.dtype), torch.float32)
        return self.of_latents * latents.to(wide) + self.of_output * output.to(wide)

    def output(self, latents: Tensor, data: Tensor) -> Tensor:
        """Return the output that predicts this data, in its dtype."""
        return (data - self.of_latents * latents.to(data.dtype)) / self.of_output


UNKNOWN = Known(math.nan, math.nan)


StreamRun = TypeVar("StreamRun")


class DataRun(Generic[StreamRun]):
    """What one run's calls of `step` say of the data: a part for each such call within a tick, known by its place.

    `first` holds the data predictions of the first tick; after it there are the run's `schedule`, and `stream_run`,
    which holds the later ones.
    """

    def __init__(self) -> None:
        self._parts: list[tuple[int, Levels]] = []  # its first tick, its levels from there
        self.first: list[Tensor] = []
        self.schedule: Schedule | None = None
        self.stream_run: StreamRun | None = None

    def __len__(self) -> int:
        return len(self._parts)

    def add(self, tick: int, known: Levels) -> None:
        """Take the levels of one more part, whose first call is at this tick."""
        self._parts.append((tick, known))

    def known(self, part: int, tick: int) -> Known:
        first, found = self._parts[part]
        return Known.at(found, tick - first)

    def must_run(self, ticks: int) -> list[int]:
        """Return the ticks, of so many, at which outputs do not follow from the data: they are full."""
        return [k for k in range(ticks) if not all(self.known(p, k).turns_back for p in range(len(self)))]

    def begin(self, ticks: int) -> int:
        """Return the tick from which on data predictions are held: after the last without one that others follow."""
        skippable = sorted(set(range(ticks)) - set(self.must_run(ticks)))
        without = [
            k
            for k in range(skippable[-1] if skippable else 0)
            if not all(self.known(p, k).is_finite for p in range(len(self)))
        ]
        return without[-1] + 1 if without else 0


class DataPrediction:
    """Says of each run whether the data prediction is forecast, and reads what it is made of off the sampler.

    `of` is 'data', or 'auto': where the sampler adds noise.
    """

    def __init__(self, of: str, noise: Noise, asked: str = "as asked for"):
        self.of, self._noise, self._asked = of, noise, asked

    def wanted(self, scheduler: Any, args: tuple, kwargs: dict) -> bool:
        """Tell whether it is forecast in a run whose first `step` has these arguments."""
        return self.of == DATA or self._noise.is_added(scheduler, args, kwargs)

    @property
    def reason(self) -> str:
        return self._asked if self.of == DATA else "as the sampler adds noise"

    def levels(self, scheduler: Any, args: tuple, kwargs: dict) -> Levels:
        """Return the levels of a run from this call of `step` on; looked at once in this process for each kind of run.

        Raises: ValueError if the sampler does not say them.
        """
        if isinstance(stated := getattr(scheduler, "levels", None), Levels):
            return stated
        key = type(scheduler), settings_of(scheduler, args, kwargs)
        if (found := _known.get(key)) is None:
            if len(_known) >= KEPT:
                _known.clear()
            try:
                found = _known[key] = levels.of(unmarked(scheduler), *args, **kwargs)
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(self._unknown(scheduler, error)) from error
        return found

    def _unknown(self, scheduler: Any, error: Exception) -> str:
        advice = "pass of='output', which forecasts what the denoiser returns"
        if self.of != DATA:
            advice += " (under noise by lesa.Reuse() alone), or take a sampler that adds no noise"
        return (
            f"the data prediction is forecast, {self.reason}, where the sampler says what outputs say of the data, got "
            f"a {type(scheduler).__name__}, and {str(error).rstrip('.')}; {advice}."
        )


def check(of: str, *, trained: bool, alone: bool, at_output: bool, detours: Mapping | None) -> bool:
    """Tell whether a run may forecast the data prediction.

    Raises: ValueError if `of` is not one of `CHOICES`, or asks for it where it cannot be.
    """
    if of not in CHOICES:
        raise ValueError(f"what is forecast is one of {', '.join(CHOICES)}, got of={of!r}; name one of these.")
    hindrances = {
        "the rows of a trained predictor, which are for what denoisers return": trained,
        "a module alone, which has no sampler": alone,
        "a feature tap": not at_output,
        "detours": bool(detours),
    }
    found = [words for words, is_so in hindrances.items() if is_so]
    if of == DATA and found:
        raise ValueError(
            "of='data' is for an untrained forecaster at a pipeline's sampler, without a feature tap or detours, got "
            f"{' and '.join(found)}; leave it out, or take e.g. lesa.Reuse() on the whole pipeline."
        )
    return of != "output" and not found
