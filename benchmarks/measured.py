"""What `benchmarks/all.py` measured, as CSV: a line for each method, schedule and model."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import fmean

from lesa.bench.lines import DIFFERING, DRIFT, FLOAT_PSNR, Key
from lesa.bench.methods import CALIBRATED
from lesa.bench.records import REFERENCE, Comparison, paired
from lesa.bench.samplers import KINDS as SAMPLERS
from lesa.learn.metrics import Interval, interval

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results"
ABOVE, LEVEL, BELOW = "above", "level", "below"
FEWER, PAPER, PLANNED, TRAINED = "fewer steps", "paper", "at:", ("LESA", "L2P")
"""A method, a kind of methods, and what a schedule and the name of methods begin with that are of another kind."""
CLOSE = 1e-3
"""By how much of the reference run's FLOPs two methods may differ and still take as many: what a head takes more."""


@dataclass(frozen=True)
class Line:
    """A method on a schedule, of a model: all in dB but the shares.

    `flops` is the share of the reference run's, `less_drift` by how much the calibrated rows that take no more FLOPs
    end nearer to the reference run, pair by pair, `more_psnr` by how much their float PSNR is higher, and `calibrated`
    whether they are above, level with or below the method by drift, as the interval is above 0, holds it or is below.
    """

    model: str
    call: str
    method: str
    schedule: str
    steps: int
    full_steps: float
    flops: float
    pairs: int
    seeds: str
    psnr: float
    psnr_low: float
    psnr_high: float
    float_psnr: float
    float_psnr_low: float
    float_psnr_high: float
    drift: float
    drift_low: float
    drift_high: float
    ssim: float
    values_differ: float
    as_prompted: float | None
    less_drift: float | None
    less_drift_low: float | None
    less_drift_high: float | None
    more_psnr: float | None
    more_psnr_low: float | None
    more_psnr_high: float | None
    calibrated: str
    date: str
    cpu: str
    torch: str
    diffusers: str
    commit: str

    @property
    def budget(self) -> int:
        return round(self.full_steps)

    @property
    def kind(self) -> str:
        """Which kind of methods it is of; 'sampler', 'trained' and 'untrained' are on planned schedules or times."""
        if self.method in (FEWER, CALIBRATED):
            return self.method
        if not self.schedule.startswith(PLANNED):
            return PAPER
        trained = self.method.startswith(TRAINED)
        return "sampler" if self.method in SAMPLERS else "trained" if trained else "untrained"


def lines(model: str, comparison: Comparison, commit: str) -> list[Line]:
    """Sum up every method but the reference run."""
    machine, setting = comparison.starts[-1].machine, comparison.setting
    steps = int(setting["call"]["num_inference_steps"])
    seeds = [pair[1] for pair in setting["pairs"]]
    call = ", ".join(f"{name}={value!r}" for name, value in sorted(setting["call"].items()))
    about = dict(date=machine["date"][:10], cpu=machine["cpu"], torch=machine["torch"], diffusers=machine["diffusers"])
    found = []
    for result in comparison.results():
        key = result.method, result.schedule
        if key == REFERENCE:
            continue
        records = comparison.records[key]
        drifts = interval([one.scores[DRIFT] for one in records])
        floats = result.float_psnr or Interval(float("nan"), float("nan"), float("nan"))
        gained = gains(comparison, key)
        verdict = verdict_of(gained[0]) if gained else ""
        numbers = [x for one in (gained or ()) for x in one] or [None] * 6
        found.append(
            Line(
                model,
                call,
                *key,
                steps,
                result.full_steps,
                comparison.shares[key],
                result.pairs,
                f"{seeds[0]} to {seeds[-1]}",
                *(result.psnr, result.psnr_low, result.psnr_high),
                *floats,
                *drifts,
                result.ssim,
                fmean(one.scores[DIFFERING] for one in records),
                result.prompted,
                *numbers,
                verdict,
                **about,
                commit=commit,
            )
        )
    return found


def gains(comparison: Comparison, key: Key) -> tuple[Interval, Interval] | None:
    """Return by how much the calibrated rows are above a method that takes as many FLOPs or more, in drift and in float
    PSNR; None of themselves, and where there are none of so few."""
    shares = comparison.shares
    ours = [one for one in shares if one[0] == CALIBRATED and shares[one] <= shares[key] + CLOSE]
    if key[0] == CALIBRATED or not ours:
        return None
    records, best = comparison.records, max(ours, key=lambda one: shares[one])
    less_drift = paired(records[key], records[best], DRIFT)
    return less_drift, paired(records[best], records[key], FLOAT_PSNR)


def verdict_of(gained: Interval) -> str:
    """Say where an interval lies."""
    return ABOVE if gained.low > 0 else BELOW if gained.high < 0 else LEVEL


def commit(folder: Path) -> str:
    """Return the commits that a folder was measured at, and write this one down there."""
    said = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    now = subprocess.run(said, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    file = folder / "commits"
    known = file.read_text().split() if file.exists() else []
    known += [now] if now not in known else []
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(known) + "\n")
    return " ".join(known)


def write(path: Path, found: Sequence[Line]) -> Path:
    """Write lines, numbers with four digits behind the point."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [one.name for one in fields(Line)], lineterminator="\n")
        writer.writeheader()
        for one in found:
            writer.writerow({name: _text(value) for name, value in asdict(one).items()})
    return path


def _text(value: object) -> object:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None else value


def read(folder: Path = FOLDER) -> list[Line]:
    """Read all lines of a folder's CSV files."""
    found = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(newline="") as file:
            found += [Line(**_read(row)) for row in csv.DictReader(file)]
    return found


def _read(row: dict[str, str]) -> dict:
    kinds = {one.name: str(one.type) for one in fields(Line)}
    to = {"str": str, "int": int, "float": float, "float | None": lambda text: float(text) if text else None}
    return {name: to[kinds[name]](value) for name, value in row.items()}
