"""What a calibration keeps for each number of full steps: what was tried, and what that gave on checked calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from lesa.predictors.calibration import UNITS, Quality, Score

MEASURES = ("psnr", "ssim", "lpips", "drift")
"""What a call's run is measured by against its reference run."""
SOLVED = "solved"


@dataclass(frozen=True)
class Tried:
    """What some rows on a schedule gave on the checked calls, a number for each call; none of what was not measured."""

    rows: str
    schedule: str
    drift: tuple[float, ...]
    psnr: tuple[float, ...] = ()
    ssim: tuple[float, ...] = ()
    lpips: tuple[float, ...] = ()

    def score(self, measure: str) -> Score | None:
        values = getattr(self, measure, ())
        each, odd = divmod(len(values), len(self.drift))  # a call may draw several pictures
        return Score.of(measure, values, 1 if odd else each) if values else None

    def keeps(self, quality: Quality) -> bool:
        """Tell whether what is promised of the mean over other calls keeps a quality.

        Raises: ValueError if the checked calls were not measured so.
        """
        self._measured(quality)
        score = self.score(quality.measure)
        return score is not None and quality.is_kept_by(score.promised)

    def share_missing(self, quality: Quality) -> float:
        """Return the share of the checked calls that do not keep a quality, from 0 to 1.

        Raises: ValueError if they were not measured so.
        """
        values = self._measured(quality)
        return sum(not quality.is_kept_by(value) for value in values) / len(values)

    def _measured(self, quality: Quality) -> tuple[float, ...]:
        check_measured(quality, [name for name in MEASURES if self.score(name)])
        return getattr(self, quality.measure)


def check_measured(quality: Quality, known: Sequence[str]) -> None:
    """Raise ValueError unless checked calls are measured, by what is known, as a quality is."""
    if quality.measure not in known:
        measures = " and ".join(known)
        raise ValueError(f"checked calls are measured by {measures}, got the target {quality}; take one of these.")


@dataclass(frozen=True)
class Point:
    """What was found for one number of full steps: what was tried on the checked calls, and which of it is kept.

    `solved_on` is the drift in dB, a mean over the calls that rows were solved on; `transformer_runs` by what they were
    for, of one picture and stream. `left_out` says what was not tried, and why.
    """

    full_steps: int
    solved_on: float
    tried: tuple[Tried, ...]
    transformer_runs: Mapping[str, int]
    seconds: float
    left_out: str = ""

    @property
    def kept(self) -> Tried:
        """What ended nearest to the reference runs on the mean; of equals the first."""
        return min(self.tried, key=lambda one: fmean(one.drift))

    @property
    def is_solved(self) -> bool:
        return self.kept.rows == SOLVED

    @property
    def promise(self) -> str:
        """Say in words what was seen on the checked calls, and what they promise of the mean of others."""
        calls = len(self.kept.drift)
        found = [(name, self.kept.score(name)) for name in MEASURES]
        parts = [f"{_NAMES[name]} {one.told(name, _form(name))}" for name, one in found if one]
        return f"{', '.join(parts)} on {calls} checked call{'s' * (calls > 1)}"


_NAMES = {"psnr": "PSNR", "ssim": "SSIM", "lpips": "LPIPS", "drift": "drift"}


def _form(measure: str) -> str:
    return ".2f" if UNITS[measure] else ".4f"


@dataclass(frozen=True)
class Curve:
    """The points of a calibration, with the most full steps first, of runs of so many steps.

    `left_out` says by what checked calls were not measured, and why.
    """

    steps: int
    points: tuple[Point, ...]
    left_out: str = ""

    def at(self, budget: int) -> Point:
        """Return the point of so many full steps.

        Raises: LookupError if there is none.
        """
        for point in self.points:
            if point.full_steps == budget:
                return point
        known = ", ".join(str(point.full_steps) for point in self.points)
        raise LookupError(f"this calibration is of {known} full steps, got {budget}; take one of these or calibrate.")

    def least(self, target: Quality) -> Point:
        """Return the point of the fewest full steps that keeps a target.

        Raises: LookupError if none does.
        """
        kept = [point for point in self.points if point.kept.keeps(target)]
        if not kept:
            best = ", ".join(f"{point.full_steps}: {point.promise}" for point in self.points)
            raise LookupError(
                f"no budget that was calibrated keeps {target} ({best}); ask for less, or calibrate more "
                "full steps, or on more calls."
            )
        return min(kept, key=lambda point: point.full_steps)

    def to_table(self) -> dict[str, Any]:
        """Return the curve as the table of a `Calibration`: what was checked of each budget, and all that was found."""
        checked = {
            str(point.full_steps): {name: score._asdict() for name in MEASURES if (score := point.kept.score(name))}
            for point in self.points
        }
        return {"checked": checked, "curve": asdict(self)}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Curve:
        """Read what `dataclasses.asdict` gave after a round trip through JSON."""
        return cls(entries["steps"], tuple(map(point_from, entries["points"])), entries.get("left_out", ""))

    def table(self) -> str:
        """Return the curve as a table in Markdown, and under it what was left out."""
        measured = [name for name in MEASURES if any(point.kept.score(name) for point in self.points)]
        heads = ["full steps", "step ratio", "kept", "schedule", "drift solved on, dB"]
        heads += [f"{_NAMES[name]}{UNITS[name] and ', dB'} (worst)" for name in measured]
        heads += ["best of the rest", "its drift, dB"]
        rows = [self._cells(point, measured) for point in self.points]
        lines = ["| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows)]
        return "\n".join([*lines, *(["", self.left_out] if self.left_out else [])])

    def _cells(self, point: Point, measured: Sequence[str]) -> list[str]:
        kept = point.kept
        cells = [str(point.full_steps), f"{self.steps / point.full_steps:.2f}", kept.rows, kept.schedule]
        cells.append(f"{point.solved_on:.2f}")
        for name in measured:
            score, form = kept.score(name), _form(name)
            cells.append(f"{score.mean:{form}} ({score.worst:{form}})" if score else "")
        others = [one for one in point.tried if one is not kept]
        rest = min(others, key=lambda one: fmean(one.drift), default=None)
        cells += [f"{rest.rows}, {rest.schedule}", f"{fmean(rest.drift):.2f}"] if rest else ["", ""]
        return cells


def point_from(entries: Mapping[str, Any]) -> Point:
    """Read what `dataclasses.asdict` gave of a point after a round trip through JSON."""
    tried = [
        Tried(one["rows"], one["schedule"], **{name: tuple(one.get(name, ())) for name in MEASURES})
        for one in entries["tried"]
    ]
    return Point(**{**entries, "tried": tuple(tried)})
