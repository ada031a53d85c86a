"""Plots of what was measured. All of them need matplotlib (the extra `bench`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from lesa.bench.lines import FLOAT_PSNR, Key, Record
from lesa.bench.records import REFERENCE, Comparison, Result
from lesa.host import needs
from lesa.learn.metrics import Interval
from lesa.learn.training import Curve
from lesa.rows.plan import Plan

STRONGEST = 2.0
"""The coefficient at which the colours of rows end."""
PANELS_A_LINE = 6
BESIDE = 12
"""A legend of more curves than this stands beside the axes."""
KINDS = {"at": "planned", "paper": "the paper's schedules"}
"""What schedules are called that begin with these words."""
COLOURS, LINES, MARKERS = 10, ("-", "--", ":", "-."), "os^v"


@contextmanager
def _axes(path: str | Path, xlabel: str, ylabel: str, **more: Any) -> Iterator[Any]:
    """Give axes to draw curves in, and save them."""
    needs.check("a plot", "plots")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel, **more)
    yield axes
    axes.grid(alpha=0.3)
    handles, _ = axes.get_legend_handles_labels()
    if len(handles) > BESIDE:
        figure.set_size_inches(13, 8)
        figure.legend(loc="outside right upper", fontsize=8)
    elif handles:
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def psnr_over(results: Sequence[Result], path: str | Path, over: str = "full_steps") -> None:
    """Plot float PSNR, with its 95 % interval, over a number of each result, a curve for a method and kind of schedule.

    Where it was not measured for all of them, it is PSNR, which ends at its cap.
    `over` is 'full_steps', 'step_ratio' or 'speedup'; results without that number have no point. LESA's are bold.
    """
    shown = [result for result in results if result.method != REFERENCE[0] and getattr(result, over) is not None]
    by, score = scores_of(shown)
    with _axes(path, over.replace("_", " "), f"{by}, dB") as axes:
        for number, (name, line) in enumerate(curves(shown).items()):
            line = sorted(line, key=lambda r: getattr(r, over))
            at, round_ = [getattr(r, over) for r in line], number // COLOURS
            style = dict(color=f"C{number % COLOURS}", linestyle=LINES[round_ % len(LINES)], marker=MARKERS[round_ % 4])
            width = 2.5 if name.startswith("LESA") else 1.0
            mean, low, high = zip(*(score[r.method, r.schedule] for r in line), strict=True)
            axes.plot(at, mean, **style, linewidth=width, markersize=3 + width, label=name)
            axes.fill_between(at, low, high, color=style["color"], alpha=0.15)


def scores_of(results: Sequence[Result]) -> tuple[str, dict[Key, Interval]]:
    """Return what results are plotted by, and of each that: float PSNR, or PSNR if one of them has no other."""
    floats = {(one.method, one.schedule): one.float_psnr for one in results if one.float_psnr is not None}
    if len(floats) == len(results):
        return FLOAT_PSNR, floats
    return "PSNR", {(one.method, one.schedule): Interval(one.psnr, one.psnr_low, one.psnr_high) for one in results}


def curves(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Sort results into curves, by method, and by kind of schedule where a method has several."""
    found: dict[str, dict[str, list[Result]]] = {}
    for one in results:
        found.setdefault(one.method, {}).setdefault(KINDS.get(one.kind, one.kind), []).append(one)
    return {
        f"{method}, {kind}" if len(lines) > 1 else method: line
        for method, lines in found.items()
        for kind, line in lines.items()
    }


def training_curve(curve: Curve, path: str | Path) -> None:
    """Plot the validation loss over all updates of a training, in the order in which they were done."""
    with _axes(path, "updates", "validation loss") as axes:
        before = 0
        for (phase, round_), entries in groupby(curve.entries, key=itemgetter("phase", "round")):
            points = [(before + entry["update"], entry["validation_loss"]) for entry in entries]
            axes.plot(*zip(*points, strict=True), marker=".", label=f"{phase} {round_ or ''}".strip())
            before = points[-1][0]


def error_per_step(comparison: Comparison, path: str | Path) -> None:
    """Plot the mean relative error of the feature at each step, a panel for each number of full steps."""
    errors = {key: mean_error(records) for key, records in comparison.records.items() if key != REFERENCE}
    errors = {key: error for key, error in errors.items() if len(error)}
    full = {key: round(comparison.full_steps[key]) for key in errors}
    budgets = sorted(set(full.values()), reverse=True)
    figure, panels = _panels(len(budgets), width=6.0, height=3.5, columns=2)
    for budget, axes in zip(budgets, panels, strict=True):
        for key in (key for key in errors if full[key] == budget):
            axes.plot(errors[key], marker=".", markersize=3, linewidth=0.8, label=" ".join(key))
        axes.set(title=f"{budget} full steps", xlabel="step", ylabel="error of the feature", yscale="log")
        axes.legend(fontsize=6)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def mean_error(records: Sequence[Record]) -> np.ndarray:
    """Average the feature errors of records at each step: NaN where no feature passed, empty if there are none.

    An error of 0, that of a full step before any other was skipped, is NaN too: a logarithm has no place for it.
    """
    rows = [[math.nan if e is None else e for e in one.feature_error] for one in records if one.feature_error]
    if not rows:
        return np.empty(0)
    mean = np.asarray(rows).mean(axis=0)
    return np.where(mean > 0, mean, np.nan)


def rows(comparison: Comparison, path: str | Path) -> None:
    """Draw the rows of each method that has some as a heat map: step s is made of the past steps at its left."""
    maps: dict[tuple[Key, str], np.ndarray] = {
        (key, stream): coefficients(Plan.from_json(json.dumps(plan)))
        for key, cost in comparison.costs.items()
        for stream, plan in cost.plans.items()
    }
    streams = {stream for _, stream in maps}
    figure, panels = _panels(len(maps), width=2.4, height=2.6, columns=PANELS_A_LINE)
    image = None
    for ((key, stream), matrix), axes in zip(maps.items(), panels, strict=True):
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-STRONGEST, vmax=STRONGEST)
        name, schedule = key
        axes.set_title(f"{name}{f', {stream}' if len(streams) > 1 else ''}\n{schedule}", fontsize=6)
        axes.tick_params(labelsize=6)
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.6, label="coefficient")
    figure.savefig(path, dpi=120)


def coefficients(plan: Plan) -> np.ndarray:
    """Return a plan's coefficients, (S, S): row s, column k is the weight of step k in the forecast for step s.

    A full step has nothing in its row.
    """
    matrix = np.full((plan.steps, plan.steps), np.nan)
    for step, row in plan.rows.items():
        matrix[step, list(row.past)] = row.coefficients
    return matrix


def _panels(count: int, width: float, height: float, columns: int) -> tuple[Any, list[Any]]:
    """Make a figure of so many panels; none is left empty."""
    needs.check("a plot", "plots")
    from matplotlib.figure import Figure

    columns = max(1, min(columns, count))
    lines = max(1, math.ceil(count / columns))
    figure = Figure(figsize=(width * columns + 1, height * lines + 0.5), layout="constrained")
    return figure, [figure.add_subplot(lines, columns, k + 1) for k in range(count)]


def draw_all(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw every plot that the records are enough for; returns the files."""
    results = comparison.results()
    plots: dict[str, Callable[[Path], None]] = {
        "psnr-over-ratio.png": lambda path: psnr_over(results, path, "step_ratio")
    }
    if comparison.times:
        plots["psnr-over-speedup.png"] = lambda path: psnr_over(results, path, "speedup")
    if any(len(mean_error(records)) for key, records in comparison.records.items() if key != REFERENCE):
        plots["error-per-step.png"] = lambda path: error_per_step(comparison, path)
    if any(cost.plans for cost in comparison.costs.values()):
        plots["rows.png"] = lambda path: rows(comparison, path)
    for name, plot in plots.items():
        plot(folder / name)
    return [folder / name for name in plots]
