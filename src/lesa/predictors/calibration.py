"""One calibration: predictors of several budgets for the same weights and facts, and what was checked of them."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist, fmean, stdev
from typing import Any, NamedTuple

from lesa.predictors.base import Predictor
from lesa.predictors.disk import DAMAGED, SIGNATURE, signed, unsigned, write_atomically
from lesa.predictors.facts import Facts

FORMAT = "lesa-calibration-1"
CALIBRATION_FILE = "calibration.json"
UNITS = {"psnr": " dB", "ssim": "", "drift": " dB", "lpips": ""}
LOWER = ("drift", "lpips")
"""The measures that are better the lower they are."""


SURE = 0.9
"""The confidence of a bound: of the mean over other calls, not of each of them."""


class Score(NamedTuple):
    """A mean over checked calls, the worst of them, and the bound that the mean over other calls like them keeps with
    90 % confidence; None of what is not known, as the bound of one call."""

    mean: float
    worst: float | None = None
    bound: float | None = None

    @classmethod
    def of(cls, measure: str, values: Sequence[float], each: int = 1) -> Score:
        """Return the score of calls that gave so many values `each`, one call after the other.

        What one call draws is alike, so the bound is of the means of calls. Where these are not finite there is none.
        """
        sign = -1 if measure in LOWER else 1
        mean, worst = fmean(values), sign * min(sign * value for value in values)
        calls = [fmean(values[first : first + each]) for first in range(0, len(values), each)]
        if len(calls) < 2 or not math.isfinite(mean):
            return cls(mean, worst)
        return cls(mean, worst, mean - sign * student(len(calls) - 1) * stdev(calls) / math.sqrt(len(calls)))

    @property
    def promised(self) -> float:
        """What is promised of other calls: the bound or, where it is not known, the mean."""
        return self.mean if self.bound is None else self.bound

    def told(self, measure: str, form: str) -> str:
        """Say it in words, numbers in such a format; the bound is of the mean of others, with `SURE` as confidence."""
        most = "at most" if measure in LOWER else "at least"
        beside = [f"others' mean {most} {self.bound:{form}} at {SURE:.0%}"] if self.bound is not None else []
        beside += [f"worst {self.worst:{form}}"] if self.worst is not None else []
        return f"{self.mean:{form}}{UNITS[measure]}" + (f" ({', '.join(beside)})" if beside else "")


def student(freedom: int) -> float:
    """Return the quantile of Student's t of `SURE`, for so many degrees of freedom, by its expansion about the normal
    distribution's: to 0.4 % from two degrees on, 4 % too little at one. Source: Abramowitz and Stegun, Handbook of
    Mathematical Functions, 26.7.5.
    """
    z = NormalDist().inv_cdf(SURE)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**k for k, term in enumerate(terms))


class Quality(NamedTuple):
    """What runs are to keep: a measure, as the mean over calls, at least (or at most) so high."""

    measure: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Quality:
        """Read 'psnr:40', 'ssim:0.97', 'lpips:0.1' or 'drift:-45'.

        Raises: ValueError if the text is none of these.
        """
        measure, _, limit = text.partition(":")
        try:
            if measure in UNITS and math.isfinite(number := float(limit)):
                return cls(measure, number)
        except ValueError:
            pass
        raise ValueError(f"quality reads psnr:40, ssim:0.97, lpips:0.1 or drift:-45, got {text!r}; write one of these.")

    def is_kept_by(self, value: float) -> bool:
        return value <= self.limit if self.measure in LOWER else value >= self.limit

    def __str__(self) -> str:
        return f"{self.measure}:{self.limit:g}"


@dataclass(frozen=True)
class Calibration:
    """Predictors for the same weights and facts, one for each budget of full steps.

    `table` is what was measured: `chosen` is the budget that is taken where none is named (the largest, if it is
    missing), and `checked` has for each budget (as JSON has keys, a text) the measures 'psnr', 'ssim', 'lpips' and
    'drift', whichever are known, each as a `Score` of the prompts that nothing was solved on. More may stand in it.
    `digests` are those of the predictors: no other one is loaded in their place.
    """

    folder: Path
    fingerprint: str
    facts: Facts
    budgets: tuple[int, ...]
    table: dict[str, Any]
    versions: dict[str, str]
    when: str
    digests: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.budgets or min(self.budgets) < 1:
            raise ValueError(f"a calibration has predictors for one budget or more, got {list(self.budgets)}; add one.")
        if self.chosen not in self.budgets:
            raise ValueError(
                f"the table chooses one of the budgets {list(self.budgets)}, got {self.chosen}; correct its 'chosen'."
            )

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def steps(self) -> int:
        """How many steps a run walks."""
        return self.facts.steps - self.facts.start

    @property
    def chosen(self) -> int:
        """The budget that is taken where none is named."""
        return int(self.table.get("chosen", max(self.budgets)))

    @property
    def took(self) -> str:
        """Say how many transformer runs it took, of one picture and stream; nothing where that is not known."""
        runs = [dict(point["transformer_runs"]) for point in self.table.get("curve", {}).get("points", [])]
        if not runs:
            return ""
        reference = max(one.pop("reference", 0) for one in runs)  # all budgets share them
        return f"{reference + sum(sum(one.values()) for one in runs):,} transformer runs"

    def name_for(self, predictors: Mapping[int, Predictor]) -> str:
        """Return the name of its folder: the model's, the steps, the size of latents, and a few digits of its own."""
        model = next(iter(predictors.values())).origin.model
        words = re.sub(r"[^A-Za-z0-9]+", "-", re.split(r"[/\\]", model.rstrip("/\\"))[-1]).strip("-").lower()
        told = json.dumps([self.fingerprint, self.facts.to_dict()], sort_keys=True)
        digits = hashlib.sha256(told.encode()).hexdigest()[:6]
        size = "x".join(map(str, self.facts.shape))
        return "-".join(part for part in (words[:40], f"{self.facts.steps}-steps", size, digits) if part)

    def predictor(self, budget: int) -> Predictor:
        """Load the predictor of a budget.

        Raises: ValueError or FileNotFoundError if its files are not as they were saved.
        """
        folder = folder_of(self.folder, budget)
        found = Predictor.from_pretrained(folder)
        if self.digests and found.digest() != self.digests.get(budget):
            raise ValueError(f"{folder} holds another predictor than the one calibrated; calibrate anew.")
        return found

    def predictors(self) -> list[Predictor]:
        """Load the predictors of all budgets, the one of the most full steps first.

        Raises: as `predictor` does.
        """
        return [self.predictor(budget) for budget in sorted(self.budgets, reverse=True)]

    def budget_for(self, budget: int | None = None, quality: str | None = None) -> int:
        """Return the budget to run with: the one named, the smallest that keeps a quality, or the one chosen.

        Raises: ValueError if it has no predictor for this budget, or none of them keeps the quality.
        """
        if budget is not None:
            if budget in self.budgets:
                return int(budget)  # 8.0 is 8, and names no folder
            known = ", ".join(map(str, self.budgets))
            raise ValueError(
                f"{self.name} was calibrated for the budgets {known}, got {budget}; take one of these, or calibrate "
                f"it: lesa.calibrate(pipe, prompts, budget={budget})."
            )
        return self.chosen if quality is None else self._that_keeps(Quality.parse(quality))

    def _that_keeps(self, quality: Quality) -> int:
        promised = {
            budget: known[quality.measure].promised
            for budget in self.budgets
            if quality.measure in (known := self.checked(budget))
        }
        if not promised:
            known = sorted({measure for budget in self.budgets for measure in self.checked(budget)})
            raise ValueError(
                f"of {self.name} {' and '.join(known) or 'nothing'} was checked, got quality {str(quality)!r}; name "
                "one that was, or a budget."
            )
        kept = [budget for budget, value in promised.items() if quality.is_kept_by(value)]
        if not kept:
            best = (min if quality.measure in LOWER else max)(promised.items(), key=lambda one: one[1])
            raise ValueError(
                f"{self.name} promises {quality.measure} {best[1]:g} at best, with {best[0]} full steps, got quality "
                f"{str(quality)!r}; ask for less, or calibrate more full steps, or on more prompts: "
                f"lesa.calibrate(pipe, prompts, target={str(quality)!r})."
            )
        return min(kept)

    def checked(self, budget: int) -> dict[str, Score]:
        """Return what is known of a budget, by measure."""
        known = self.table.get("checked", {})
        row = known.get(str(budget), known.get(budget, {}))
        return {
            measure: Score(float(row[measure]["mean"]), row[measure].get("worst"), row[measure].get("bound"))
            for measure in UNITS
            if measure in row
        }

    def promise(self, budget: int) -> str:
        """Say what was measured of a budget, on prompts that nothing was solved on."""
        said = [f"{measure} {score.told(measure, '.4g')}" for measure, score in self.checked(budget).items()]
        steps = f"{budget} full of {self.steps} steps"
        return f"{steps}: {', '.join(said) or 'nothing was checked'}"

    def write(self, folder: Path) -> None:
        """Write all but the predictors into a folder."""
        entries = dict(
            format=FORMAT,
            fingerprint=self.fingerprint,
            facts=self.facts.to_dict(),
            budgets=self.budgets,
            table=self.table,
            promise={str(budget): self.promise(budget) for budget in self.budgets},
            versions=self.versions,
            when=self.when,
            digests={str(budget): digest for budget, digest in self.digests.items()},
        )
        write_atomically(folder / CALIBRATION_FILE, (json.dumps(signed(entries), indent=1) + "\n").encode())

    @classmethod
    def read(cls, folder: str | Path) -> Calibration:
        """Read the calibration in a folder; its predictors are loaded when they are asked for.

        Raises: ValueError or OSError if there is no whole one.
        """
        folder = Path(folder)
        try:
            entries = json.loads((folder / CALIBRATION_FILE).read_bytes())
            before = not {"digests", SIGNATURE} & entries.keys()  # written when there were no digests yet
            found = cls._from(folder, entries if before else unsigned(entries))
        except DAMAGED as error:
            raise ValueError(f"{folder / CALIBRATION_FILE} is damaged: {type(error).__name__}: {error}") from error
        if missing := [name for budget in found.budgets if not (name := folder_of(folder, budget)).is_dir()]:
            raise ValueError(f"{missing[0]} is missing")
        return found

    @classmethod
    def _from(cls, folder: Path, entries: Any) -> Calibration:
        """Make the calibration of a folder of its entries.

        Raises: one of `DAMAGED` if these are none.
        """
        if entries["format"] != FORMAT:
            raise ValueError(f"its format is {entries['format']!r}, not {FORMAT!r}")
        budgets = tuple(map(int, entries["budgets"]))
        digests = {int(budget): str(digest) for budget, digest in entries.get("digests", {}).items()}
        versions = {str(name): str(version) for name, version in entries["versions"].items()}
        facts, weights, when = Facts.from_dict(entries["facts"]), str(entries["fingerprint"]), str(entries["when"])
        found = cls(folder, weights, facts, budgets, dict(entries["table"]), versions, when, digests)
        for budget in budgets:
            found.promise(budget)
        return found


def folder_of(calibration: Path, budget: int) -> Path:
    """Return the folder of the predictor of a budget."""
    return calibration / f"{budget}-full"
