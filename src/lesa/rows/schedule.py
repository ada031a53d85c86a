"""Which steps of a run are full."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral

GRAMMAR = "'paper:7', 'paper:7:3', 'every:5', 'every:5:3', 'at:0,3,9' or 'ratio:5'"
DEFAULT_WARMUP = {"paper": 3, "every": 1}
MOST_STEPS = 2000
"""A run of more steps is a mistake, or meant to take all time and memory: much here grows with the square of it, and
models of diffusion are trained with 1000."""


@dataclass(frozen=True, repr=False)
class Schedule:
    """A rule that says which steps of a run are full; made by `paper`, `every`, `at`, `ratio` or `parse`.

    Example:
        >>> Schedule.every(5).full_steps(12)
        (0, 5, 10)
        >>> print(Schedule.paper(5).draw(20))
        ####...#....#....#..
    """

    rule: str
    numbers: tuple[float, ...]

    @classmethod
    def paper(cls, interval: int, warmup: int = 3) -> Schedule:
        """Use LESA's rule: `warmup` full steps and one more, `interval - 2` skipped, then every `interval`-th full.

        Raises: ValueError if `interval` or `warmup` is less than 1.
        """
        return cls("paper", (_at_least_one("interval", interval), _at_least_one("warmup", warmup)))

    @classmethod
    def every(cls, interval: int, warmup: int = 1) -> Schedule:
        """Use `warmup` full steps, and then every `interval`-th.

        Raises: ValueError if `interval` or `warmup` is less than 1.
        """
        return cls("every", (_at_least_one("interval", interval), _at_least_one("warmup", warmup)))

    @classmethod
    def at(cls, steps: Sequence[int]) -> Schedule:
        """Name the full steps.

        Raises: ValueError if `steps` is empty, negative or not increasing.
        """
        full = list(steps)
        whole = all(isinstance(step, Integral) for step in full)
        if not full or not whole or full[0] < 0 or full != sorted(set(full)):
            raise ValueError(f"full steps are whole numbers from 0 on, increasing, got {full}; sort and repair them.")
        return cls("at", tuple(int(step) for step in full))

    @classmethod
    def ratio(cls, ratio: float) -> Schedule:
        """Use round(S / ratio) full steps of S, the first one full, evenly spread.

        Raises: ValueError if `ratio` is less than 1.
        """
        if not 1 <= ratio < float("inf"):
            raise ValueError(f"a step ratio is at least 1, got {ratio}; 5 makes one step in five full.")
        return cls("ratio", (float(ratio),))

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """Read a schedule as `str` writes it, for example 'paper:7', 'every:5:3', 'at:0,3,9' or 'ratio:5'.

        Raises: ValueError if `text` is none of these.
        """
        rule, _, rest = text.strip().partition(":")
        try:
            if rule == "ratio":
                return cls.ratio(float(rest))
            if rule == "at":
                return cls.at([int(step) for step in rest.split(",")])
            if rule in DEFAULT_WARMUP:
                interval, *warmup = (int(number) for number in rest.split(":"))
                return (cls.paper if rule == "paper" else cls.every)(interval, *warmup)
        except (ValueError, TypeError) as error:
            raise ValueError(f"a schedule reads {GRAMMAR}, got {text!r}: {error}") from error
        raise ValueError(f"a schedule reads {GRAMMAR}, got {text!r}; write one of these.")

    def full_steps(self, steps: int, start: int = 0) -> tuple[int, ...]:
        """Return the full steps of a run of `steps` steps that begins at step `start` (0 but for image to image).

        The rules count from `start`; named full steps (`at`) are absolute, and those before `start` do not matter.

        Raises: ValueError if `start` is no step of the run, or named full steps miss `start` or go past the run's end,
            or the run has more than `MOST_STEPS` steps.
        """
        check_steps(steps)
        if not 0 <= start < steps:
            raise ValueError(f"a run of {steps} steps begins at one of them, got start {start}; lower start.")
        if self.rule == "at":
            return self._named_steps(steps, start)
        length = steps - start
        return tuple(start + step for step in sorted(self._rule_steps(length)))

    def _named_steps(self, steps: int, start: int) -> tuple[int, ...]:
        named = tuple(int(step) for step in self.numbers)
        if named[-1] >= steps:
            raise ValueError(f"the full steps of a run of {steps} steps are below {steps}, got {named[-1]}; drop it.")
        if start not in named:
            raise ValueError(
                f"the first step of a run is full (there is nothing to forecast from), got a run that begins at step "
                f"{start} and full steps {list(named)}; add {start} to them."
            )
        return tuple(step for step in named if step >= start)

    def _rule_steps(self, length: int) -> set[int]:
        """Return the full steps below `length`; no number of the rule makes more of them."""
        if self.rule == "ratio":
            count = max(1, round(length / self.numbers[0]))
            return {k * length // count for k in range(count)}
        interval, warmup = (int(number) for number in self.numbers)
        if self.rule == "every":
            return {*range(min(warmup, length)), *range(warmup - 1, length, interval)}
        return {*range(min(warmup + 1, length)), *range(warmup + interval - 1, length, interval)}

    def draw(self, steps: int, start: int = 0) -> str:
        """Draw a run, one character a step: '#' full, '.' skipped, '-' before `start`.

        Raises: ValueError as `full_steps` does.
        """
        return draw(self.full_steps(steps, start), steps, start)

    def __str__(self) -> str:
        if self.rule == "at":
            return "at:" + ",".join(str(step) for step in self.numbers)
        shown = self.numbers[:1] if self.numbers[-1] == DEFAULT_WARMUP.get(self.rule) else self.numbers
        return ":".join([self.rule, *(repr(number).removesuffix(".0") for number in shown)])

    def __repr__(self) -> str:
        return f"Schedule.parse({str(self)!r})"


def draw(full: Collection[int], steps: int, start: int = 0) -> str:
    """Draw a run with these full steps, one character a step: '#' full, '.' skipped, '-' before `start`."""
    return "".join("-" if step < start else "#" if step in full else "." for step in range(steps))


def check_steps(steps: int) -> None:
    """Raise ValueError if a run has more than `MOST_STEPS` steps."""
    if steps > MOST_STEPS:
        raise ValueError(f"a run has at most {MOST_STEPS} steps, got {steps}; take fewer.")


def _at_least_one(name: str, number: int) -> int:
    if not isinstance(number, Integral) or number < 1:
        raise ValueError(f"{name} is a whole number of steps, at least 1, got {number}; raise it.")
    return int(number)
