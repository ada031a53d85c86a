"""Write what records say: tables and plots beside them, and what changed from one run to another."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from lesa.bench import brief, plots, records, report, sheet
from lesa.bench.named import OURS
from lesa.host import needs
from lesa.host.pipelines import save_picture


class Page(NamedTuple):
    """A report's text, the same in short where it is of many methods, and the files that were written."""

    text: str
    files: list[Path]
    short: str = ""

    def shown(self, whole: bool) -> str:
        """Return what is to be read at once: the short text where there is one, unless the `whole` is asked for."""
        return self.text if whole or not self.short else self.short


class Verdict(NamedTuple):
    """What changed from one run to another, in words, and whether any of it is beyond noise and tolerance."""

    text: str
    differs: bool


def write(folder: str | Path, differences: str | None = OURS, suffix: str = "png") -> Page:
    """Make tables and plots of the records in a folder, and of nothing else, beside them; plots as files of a `suffix`.

    Raises: LookupError if no method has the name whose `differences` are asked for; ImportError without matplotlib.
    """
    needs.check("a report", "plots")
    folder, comparison = Path(folder), records.load(folder)
    named = differences in {method for method, _ in comparison.records} or differences != OURS
    text = report.summary(comparison, differences if named else None)
    (folder / records.REPORT).write_text(text, encoding="utf-8")
    files = [folder / records.REPORT, *plots.draw_all(comparison, folder, suffix)]
    if comparison.pictures:
        files.append(folder / records.SHEET)
        sheet.sheet(comparison, ours=differences or OURS).save(files[-1])
    if moving := sheet.sheets(comparison, differences or OURS):
        files.append(folder / records.MOVING)
        save_picture(moving, files[-1])
    many = len(comparison.results()) > brief.MANY
    return Page(text, files, brief.of(comparison, differences or OURS) if many else "")


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
