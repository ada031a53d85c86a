"""Sort what `make bench` measured by what is like and what is not: planned for or not, trained or not.

    python benchmarks/like_for_like.py

Reads docs/bench.md, what `lesa report --differences calibrated` printed. Every other method stands beside the best
calibrated rows that take no more FLOPs: these are above, level or below by the interval of float PSNR pair by pair, and
have so many dB less drift than the nearest of its kind. Beside it stands how many of the same lines reuse at the output
passes by drift, on the schedules planned for it, with no more FLOPs either: what planning alone does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from lesa.bench.report import markdown

PAGE = Path(__file__).parents[1] / "docs" / "bench.md"
EQUAL = 0.005
"""By how much the printed FLOP ratios of two methods may differ and still be the same."""
KINDS = (
    (ROWS := "without training, planned"),
    (TRAINED := "trained, planned"),
    (SAMPLERS := "samplers at planned times"),
    (PEERS := "other projects' caches on plans"),
    (PAPER := "without training, the paper's schedules"),
    (PAPER_TRAINED := "trained, the paper's schedules"),
    (FEWER := "samplers with fewer steps"),
    (CACHES := "other projects' caches, settings of their own"),
    (MORE := "a run of 500 steps"),
)
OURS = " at no more FLOPs"
"""What the head of the column ends with that names ours."""
HEADS = (
    "beside calibrated rows",
    "lines",
    "above",
    "level",
    "below",
    "less drift at least, dB",
    "planned reuse passes",
)
Row = Mapping[str, str]


class Compared(NamedTuple):
    """A method beside ours that takes no more FLOPs: its kind, the verdict, drifts in dB, and its FLOP ratio."""

    kind: str
    verdict: str
    drift: float
    ours: float
    ratio: float


def tables(text: str) -> Iterator[list[Row]]:
    """Yield the tables of a page, each as its rows by column."""
    lines = text.splitlines()
    for k, line in enumerate(lines[:-1]):
        if line.startswith("|") and lines[k + 1].startswith("| ---"):
            rows = lines[k + 2 :]
            end = next((j for j, one in enumerate(rows) if not one.startswith("|")), len(rows))
            yield [dict(zip(_cells(line), _cells(one), strict=True)) for one in rows[:end]]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def kind_of(method: str, schedule: str) -> str:
    trained = method.startswith(("LESA", "L2P"))
    if method.startswith(("fewer steps", "more steps")):
        return FEWER if method.startswith("fewer") else MORE
    if "at planned times" in method:
        return SAMPLERS
    if "@plan" in method:
        return PEERS
    if schedule.startswith("paper"):
        return PAPER_TRAINED if trained else PAPER
    if schedule.startswith("at:"):
        return TRAINED if trained else ROWS
    return CACHES


def compared(results: Sequence[Row], at_equal_cost: Sequence[Row]) -> list[Compared]:
    """Return every line of the table of equal FLOPs, its last column the verdict, with the drifts of the results."""
    (ours,) = [head for head in at_equal_cost[0] if head.endswith(OURS)]
    drifts = {(one["method"], one["schedule"]): float(one["drift"]) for one in results}
    return [
        Compared(
            kind_of(one["method"], one["schedule"]),
            one[""],
            drifts[one["method"], one["schedule"]],
            drifts[one[ours], one["its schedule"]],
            float(one["FLOP ratio"]),
        )
        for one in at_equal_cost
    ]


def planned_reuse(results: Sequence[Row]) -> list[tuple[float, float]]:
    """Return step ratio and drift of reuse at the output, on the schedules planned for it."""
    ours = [one for one in results if one["method"] == "reuse (output tap)" and one["schedule"].startswith("at:")]
    return [(float(one["step ratio"]), float(one["drift"])) for one in ours]


def passes(reuse: Sequence[tuple[float, float]], one: Compared) -> bool:
    return min((drift for ratio, drift in reuse if ratio >= one.ratio - EQUAL), default=one.drift) < one.drift


def table(text: str) -> str:
    """Return the table of a page of `lesa report`."""
    results, _, _, at_equal_cost = tables(text)
    lines, reuse, rows = compared(results, at_equal_cost), planned_reuse(results), []
    for kind in KINDS:
        some = [one for one in lines if one.kind == kind]
        counts = [sum(one.verdict == word for one in some) for word in ("above", "level", "below")]
        least = f"{min(one.drift - one.ours for one in some):.1f}" if some else ""
        rows.append([kind, str(len(some)), *map(str, counts), least, str(sum(passes(reuse, one) for one in some))])
    return markdown(HEADS, rows, text=1)


if __name__ == "__main__":
    print(table(PAGE.read_text()))
