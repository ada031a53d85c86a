"""Write what records say: tables and plots beside them, and what changed from one run to another."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lesa.bench import plots, records, report
from lesa.host import needs
from lesa.host.pipelines import save_picture

OURS = "LESA"
"""The method whose differences from the others are shown, if it is there."""


class Page(NamedTuple):
    """A report's text, and the files that were written."""

    text: str
    files: list[Path]


class Verdict(NamedTuple):
    """What changed from one run to another, in words, and whether any of it is beyond noise and tolerance."""

    text: str
    differs: bool


def write(folder: str | Path, differences: str | None = OURS) -> Page:
    """Make tables and plots of the records in a folder, and of nothing else, beside them.

    Raises: LookupError if no method has the name whose `differences` are asked for; ImportError without matplotlib.
    """
    needs.check("a report", "plots")
    folder, comparison = Path(folder), records.load(folder)
    named = differences in {method for method, _ in comparison.records} or differences != OURS
    text = report.summary(comparison, differences if named else None)
    (folder / records.REPORT).write_text(text, encoding="utf-8")
    files = [folder / records.REPORT, *plots.draw_all(comparison, folder)]
    if comparison.pictures:
        files.append(folder / records.SHEET)
        report.sheet(comparison).save(files[-1])
    if moving := report.sheets(comparison):
        files.append(folder / records.MOVING)
        save_picture(moving, files[-1])
    return Page(text, files)


def changes(first: str | Path, second: str | Path, score: str = "PSNR", tolerance: float = 0.01) -> Verdict:
    """Set the scores of a run against those of another; differences up to the tolerance do not count.

    Raises: FileNotFoundError if a folder holds no records; LookupError if they have no such score.
    """
    before, after = records.load(first), records.load(second)
    found = report.changes(before, after, score)
    text = report.changes_table(found, score, tolerance)
    if differing := report.other_settings(before, after):
        text += f"\n\nthe settings differ in: {', '.join(differing)}"
    return Verdict(text, any(change.beyond(tolerance) for change in found))
