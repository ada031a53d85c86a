"""What a run is known by: predictors calibrated on some runs fit others whose facts are the same."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lesa.rows.grid import TOLERANCE, matches

OTHER_SCALE = 0.05
"""By what share guidance may be another than the one known."""
VISIBLE = 1e-3
"""What share of the velocity other guidance must make, for the difference to count: streams may agree."""
UNEXPLAINED = 0.1
"""The share of a velocity that guidance may leave unexplained; with more it is of a kind of its own."""
OTHER_SIZE = 2.0
"""By what factor latents may have more or fewer elements."""


@dataclass(frozen=True)
class Mixture:
    """Guidance as measured at one step: the velocity is the streams' outputs times `weights`, but for a share
    `unexplained` of it.

    If it is `rescaled`, each token has the norm that it has in the stream of the largest weight. `apart` is how far
    streams are from each other, as a share of the velocity: where it is 0, any weights of the same sum are as good.
    """

    weights: tuple[float, ...]
    unexplained: float
    apart: float
    rescaled: bool = False

    @property
    def is_known(self) -> bool:
        return self.unexplained <= UNEXPLAINED

    def is_like(self, other: Mixture) -> bool:
        """Tell whether this is the other's guidance, as far as can be seen."""
        if len(self.weights) != len(other.weights) or self.is_known != other.is_known:
            return False
        if not self.is_known:  # such as an embedding's, or one that changes from step to step: nothing to compare
            return True
        change = max(abs(a - b) for a, b in zip(self.weights, other.weights, strict=True))
        visible = max(change * min(self.apart, other.apart), 0.0) > VISIBLE
        if visible and self.rescaled != other.rescaled:
            return False
        return not visible or change <= OTHER_SCALE * max(map(abs, other.weights))

    def __str__(self) -> str:
        if not self.is_known:
            return f"a kind of its own ({self.unexplained:.0%} unexplained)"
        return " : ".join(f"{weight:.3g}" for weight in self.weights) + (" with rescaled norms" * self.rescaled)


@dataclass(frozen=True)
class Facts:
    """What a run is known by at its sampler's first step.

    `times` are the S + 1 of its grid and `start` is its first step there; `shape` is that of one picture's latents,
    `sampler` the scheduler's class, `noise` whether it adds any. `streams` names the denoisers' calls of a step.
    `guidance` is what the velocity is made of: those calls' outputs or, of one call on a batch as many times larger
    than the latents, the outputs' parts; None where there is one alone, or the outputs are of another form than the
    velocity. `embedded` holds the numbers that denoisers are given as guidance.
    """

    times: tuple[float, ...]
    start: int
    shape: tuple[int, ...]
    sampler: str
    noise: bool
    streams: tuple[str, ...]
    guidance: Mixture | None = None
    embedded: tuple[float, ...] = ()

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    def to_dict(self) -> dict[str, Any]:
        """Return the facts as JSON can hold them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Facts:
        """Read what `to_dict` gave after a round trip through JSON.

        Raises: ValueError, TypeError, ArithmeticError or LookupError if these are no facts.
        """
        found = {**entries, **{name: tuple(entries[name]) for name in ("times", "shape", "streams", "embedded")}}
        if (guidance := entries["guidance"]) is not None:
            found["guidance"] = Mixture(**{**guidance, "weights": tuple(guidance["weights"])})
        facts = cls(**found)
        facts._check()
        return facts

    def _check(self) -> None:
        """Raise ValueError or TypeError if a field holds what it cannot."""
        mixed = (*self.guidance.weights, self.guidance.unexplained, self.guidance.apart) if self.guidance else ()
        if len(self.times) < 2 or not all(map(math.isfinite, (*self.times, *self.embedded, *mixed))):
            raise ValueError("times and guidance are finite numbers, and there are times")
        if any(type(one) is not int for one in (self.start, *self.shape)) or not 0 <= self.start < self.steps:
            raise ValueError("the first step and the shape are whole numbers")
        if any(not isinstance(one, str) for one in (self.sampler, *self.streams)):
            raise ValueError("the sampler and the streams are names")

    def differences(self, other: Facts) -> list[str]:
        """Say in words by what these facts are not the other's, which are those known; empty if they fit."""
        found = [*self._times(other)]
        if self.sampler != other.sampler:
            found.append(f"a {self.sampler} instead of a {other.sampler}")
        if self.noise != other.noise:
            found.append("a sampler that adds noise" if self.noise else "a sampler that adds no noise")
        return [*found, *self._sizes(other), *self._guidance(other)]

    def _times(self, other: Facts) -> list[str]:
        found = []
        if self.steps != other.steps:
            found.append(f"{self.steps} steps instead of {other.steps}")
        elif not matches(torch.tensor(self.times).double(), torch.tensor(other.times).double()):
            k = max(range(len(self.times)), key=lambda k: abs(self.times[k] - other.times[k]))
            found.append(
                f"other times (another shift, size or sigmas: {self.times[k]:.4f} instead of {other.times[k]:.4f} at "
                f"step {k})"
            )
        if self.start != other.start and not found:
            found.append(f"a run that begins at step {self.start} instead of {other.start} (another strength)")
        return found

    def _sizes(self, other: Facts) -> list[str]:
        if len(self.shape) != len(other.shape):
            return [f"latents of {len(self.shape)} dimensions instead of {len(other.shape)}"]
        ratio = math.prod(self.shape) / max(math.prod(other.shape), 1)
        if 1 / OTHER_SIZE <= ratio <= OTHER_SIZE:
            return []
        return [f"latents of {ratio:.3g} times the size, {self.shape} instead of {other.shape}"]

    def _guidance(self, other: Facts) -> list[str]:
        found = []
        if self.streams != other.streams:
            found.append(f"the streams {' and '.join(self.streams)} instead of {' and '.join(other.streams)}")
        elif (self.guidance is None) != (other.guidance is None) or (
            self.guidance is not None and other.guidance is not None and not self.guidance.is_like(other.guidance)
        ):
            found.append(f"guidance of {self.guidance or 'one stream'} instead of {other.guidance or 'one stream'}")
        if not _same_numbers(self.embedded, other.embedded):
            found.append(f"guidance {_numbers(self.embedded)} instead of {_numbers(other.embedded)} as an input")
        return found


def _same_numbers(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return len(one) == len(other) and all(
        abs(a - b) <= max(OTHER_SCALE * abs(b), TOLERANCE) for a, b in zip(one, other, strict=True)
    )


def _numbers(some: tuple[float, ...]) -> str:
    return " and ".join(f"{x:g}" for x in some) or "none"
