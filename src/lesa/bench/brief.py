"""What a report comes to, where it is of many methods: the best at each cost, ours, and fewer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lesa.bench import report
from lesa.bench.lines import DRIFT, Key
from lesa.bench.plots import KINDS, scores_of
from lesa.bench.records import REFERENCE, Comparison, Result

MANY = 12
"""Of no more results than this all are printed."""
FEWER = "fewer steps"
BEST, NEXT = "best", "best other"


def of(comparison: Comparison, ours: str) -> str:
    """Lay out in a short table what a comparison of many methods comes to; under it what it could not measure.

    Of each number of full steps these lines are left: the best method, and the best that is none of those whose names
    begin with `ours`; these; and the same sampler with fewer steps.
    """
    results = comparison.results()
    marks, worth = marks_of(results, ours), _worth(results)
    lines = [one for one in results if key_of(one) in (REFERENCE, *marks) or stays(one, ours)]
    lines.sort(key=lambda one: (-round(one.full_steps), key_of(one) != REFERENCE, -worth[key_of(one)]))
    parts = [_table(lines, marks), _equal_cost(comparison, ours), report.notes(comparison)]
    return "\n\n".join(part for part in parts if part) + "\n"


def marks_of(results: Sequence[Result], ours: str) -> dict[Key, str]:
    """Mark the best method of each number of full steps, and the best that is none of ours."""
    marks = {key_of(one): NEXT for one in best_of_each([one for one in results if not one.method.startswith(ours)])}
    return {**marks, **{key_of(one): BEST for one in best_of_each(results)}}


def key_of(one: Result) -> Key:
    """Return what tells a result from others."""
    return one.method, one.schedule


def best_of_each(results: Sequence[Result]) -> list[Result]:
    """Return the best method of each number of full steps, by float PSNR, or PSNR where that was not measured."""
    worth, best = _worth(results), dict[int, Result]()
    for one in results:
        held = best.get(budget := round(one.full_steps))
        if key_of(one) != REFERENCE and (held is None or worth[key_of(one)] > worth[key_of(held)]):
            best[budget] = one
    return list(best.values())


def _worth(results: Sequence[Result]) -> dict[Key, float]:
    return {key: score.mean for key, score in scores_of(results)[1].items()}


def stays(one: Result, ours: str) -> bool:
    """Tell whether a method is shown whatever it is worth: one of ours, or the same sampler with fewer steps."""
    return one.method.startswith(ours) or one.method == FEWER


def _table(lines: Sequence[Result], marks: Mapping[Key, str]) -> str:
    rows = []
    for one in lines:
        cells = dict(zip(report.HEAD, report.cells(one), strict=True))
        schedule, drift = KINDS["at"] if one.kind == "at" else one.schedule, one.scores.get(DRIFT)
        chosen = [cells[name] for name in ("full steps", "speedup", report.PSNR, report.FLOATS)]
        drifts = "-" if drift is None else f"{drift:.1f}"
        rows.append([one.method, schedule, *chosen, drifts, marks.get(key_of(one), "")])
    head = ("method", "schedule", "full steps", "speedup", report.PSNR, report.FLOATS, "drift, dB", "")
    return report.markdown(head, rows, text=2)


def _equal_cost(comparison: Comparison, ours: str) -> str:
    """Say of how many methods ours is above at no more FLOPs."""
    verdicts = [row[-1] for row in report.equal_cost_rows(comparison, ours) if row[-1] != "-"]
    if not verdicts:
        return ""
    above, level, below = (verdicts.count(word) for word in ("above", "level", "below"))
    words = f"is above {above}, level with {level} and below {below}"
    return f"of {len(verdicts)} other methods, {ours} at no more FLOPs {words}"
