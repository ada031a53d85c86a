"""Plots of what was measured. All of them need matplotlib (the extra `bench`)."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from lesa.bench.lines import FLOAT_PSNR, Key, Record
from lesa.bench.named import OURS
from lesa.bench.records import REFERENCE, Comparison, Result
from lesa.host import needs
from lesa.learn.metrics import Interval
from lesa.learn.training import Curve
from lesa.rows.plan import Plan

STRONGEST = 2.0
"""The coefficient at which the colours of rows end."""
PANELS_A_LINE, MOST_PANELS = 4, 12
KINDS = {"at": "planned", "paper": "the paper's schedules", "every": "evenly spaced", "its": "its own schedule"}
"""What schedules are called that begin with these words."""
SHOWN = 7
"""How many curves have a colour and a name; the others are grey."""
FEWER = "fewer steps"
GREY = "0.8"
LINES, MARKERS = ("-", "--", "-.", ":"), "osD^vPX"
APART = 0.052
"""Of the height of axes: the least distance of names at the ends of curves."""
LEFT, AXES, LETTER = 0.76, 5.9, 0.068
"""Inches: what is left of axes that have names beside them, their width, and that of a letter of these names."""


def _figure(width: float, height: float, **more: Any) -> Any:
    needs.check("a plot", "plots")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), **more)


def _save(figure: Any, path: str | Path) -> None:
    """Save a figure as what its name says: PNG, PDF, SVG."""
    figure.savefig(path, dpi=120)


def psnr_over(results: Sequence[Result], path: str | Path, over: str = "full_steps") -> None:
    """Plot float PSNR, with its 95 % interval, over a number of each result, a curve for a method and kind of schedule.

    Where it was not measured for all of them, it is PSNR, which ends at its cap. `over` is 'full_steps', 'step_ratio'
    or 'speedup'; results without that number have no point. Curves that are `highlighted` are named at their ends, and
    the others grey. The file is what its name ends with: PNG, PDF or SVG.
    """
    shown = [result for result in results if result.method != REFERENCE[0] and getattr(result, over) is not None]
    by, score = scores_of(shown)
    drawn, ends = curves(shown), list[tuple[float, float, str, str]]()
    styles = styles_of(highlighted(shown))
    beside = max(map(len, styles), default=0) * LETTER + 0.5
    width = LEFT + AXES + beside
    figure = _figure(width, 5.5)
    place = (LEFT / width, 0.1, AXES / width, 0.86)
    axes = figure.add_axes(place, xlabel=over.replace("_", " "), ylabel=f"{by}, dB [95 %]")
    for name, line in sorted(drawn.items(), key=lambda one: one[0] in styles):
        line = sorted(line, key=lambda r: getattr(r, over))
        at = [getattr(r, over) for r in line]
        mean, low, high = zip(*(score[r.method, r.schedule] for r in line), strict=True)
        if (style := styles.get(name)) is None:
            axes.plot(at, mean, color=GREY, linewidth=0.8, marker=".", markersize=3, zorder=1)
            continue
        axes.fill_between(at, low, high, color=style["color"], alpha=0.12, linewidth=0)
        axes.plot(at, mean, markersize=5, zorder=3, **style)
        ends.append((at[-1], mean[-1], name, style["color"]))
    axes.grid(alpha=0.3)
    axes.margins(x=0.03)
    _name_ends(axes, ends)
    if others := len(drawn) - len(ends):
        axes.plot([], [], color=GREY, marker=".", label=f"{others} others")
        figure.legend(loc=((LEFT + AXES) / width + 0.01, 0.03), fontsize=8, frameon=False)
    _save(figure, path)


def _name_ends(axes: Any, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write names right of the axes, as high as the curves end, but none over another."""
    (bottom, top), lines = axes.get_ylim(), sorted(ends, key=lambda end: end[1])
    wanted = [(y - bottom) / (top - bottom) for _, y, _, _ in lines]
    for (x, y, name, colour), place in zip(lines, spread(wanted, APART), strict=True):
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=colour,
            fontsize=8,
            va="center",
            annotation_clip=False,
            arrowprops=dict(arrowstyle="-", color=colour, linewidth=0.6, alpha=0.6, relpos=(0, 0.5), shrinkB=4),
        )


def spread(places: Sequence[float], apart: float) -> list[float]:
    """Move rising places until each is so far above the one before, by as little as can be, the highest at most to 1.

    Least squares under that order, by pooling those that are too near: each pool keeps its mean.
    """
    pools: list[tuple[float, int]] = []  # the place of a pool's first, were it alone at 0, and its size
    for k, place in enumerate(places):
        pools.append((place - k * apart, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (above, more), (below, some) = pools.pop(), pools.pop()
            pools.append(((below * some + above * more) / (some + more), some + more))
    firsts = [place for place, count in pools for _ in range(count)]
    most = 1 - (len(places) - 1) * apart
    return [min(first, most) + k * apart for k, first in enumerate(firsts)]


def highlighted(results: Sequence[Result], ours: str = OURS) -> list[str]:
    """Choose the curves that a reader is to tell from each other, by their names, at most `SHOWN` of them.

    Ours, the same sampler with fewer steps, and of the others those that are the best at some number of full steps;
    then those with the most points, and the highest.
    """
    score, drawn = scores_of(results)[1], curves(results)

    def worth(line: Sequence[Result]) -> float:
        return sum(score[one.method, one.schedule].mean for one in line) / len(line)

    def best_somewhere(line: Sequence[Result]) -> bool:
        return any(score[one.method, one.schedule].mean >= most[round(one.full_steps)] for one in line)

    rest = {name: line for name, line in drawn.items() if not name.startswith((ours, FEWER))}
    most: dict[int, float] = {}
    for one in (one for line in rest.values() for one in line):
        most[round(one.full_steps)] = max(
            score[one.method, one.schedule].mean, most.get(round(one.full_steps), -math.inf)
        )
    mine = [name for name in drawn if name.startswith(ours)]
    mine = sorted(mine, key=lambda name: (-len(drawn[name]), -worth(drawn[name])))[: SHOWN // 2]
    fewer = [name for name in drawn if name.startswith(FEWER)][:1]
    others = sorted(rest, key=lambda name: (not best_somewhere(rest[name]), -len(rest[name]), -worth(rest[name])))
    return [*mine, *fewer, *others][:SHOWN]


def styles_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Give each curve a colour, a line and a marker of its own; LESA's are bold."""
    return {
        name: dict(
            color=f"C{k}",
            linestyle=LINES[k % len(LINES)],
            marker=MARKERS[k],
            linewidth=2.5 if name.startswith(OURS) else 1.4,
        )
        for k, name in enumerate(names)
    }


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
    figure = _figure(8, 5, layout="constrained")
    axes = figure.add_subplot(xlabel="updates", ylabel="validation loss")
    before = 0
    for number, ((phase, round_), entries) in enumerate(groupby(curve.entries, key=itemgetter("phase", "round"))):
        points = [(before + entry["update"], entry["validation_loss"]) for entry in entries]
        style = dict(linestyle=LINES[number % len(LINES)], marker=".")
        axes.plot(*zip(*points, strict=True), **style, label=f"{phase} {round_ or ''}".strip())
        before = points[-1][0]
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    _save(figure, path)


def error_per_step(comparison: Comparison, path: str | Path) -> None:
    """Plot the mean relative error of the feature at each step, a panel for each number of full steps.

    Curves have the styles of `psnr_over`, and one legend under the panels; the others are grey.
    """
    errors = {key: mean_error(records) for key, records in comparison.records.items() if key != REFERENCE}
    errors = {key: error for key, error in errors.items() if len(error)}
    results = [one for one in comparison.results() if (one.method, one.schedule) != REFERENCE]
    named = {(one.method, one.schedule): name for name, line in curves(results).items() for one in line}
    styles = styles_of(highlighted(results))
    full = {key: round(comparison.full_steps[key]) for key in errors}
    budgets = sorted(set(full.values()), reverse=True)
    figure, panels = _panels(len(budgets), width=6.0, height=3.5, columns=2)
    for budget, axes in zip(budgets, panels, strict=True):
        for key in sorted((key for key in errors if full[key] == budget), key=lambda key: named[key] in styles):
            style = styles.get(named[key]) or dict(color=GREY, linewidth=0.7, zorder=1)
            axes.plot(errors[key], markersize=2.5, **style, label=named[key])
        axes.set(title=f"{budget} full steps", xlabel="step", ylabel="relative error of the feature", yscale="log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    _legend_below(figure, panels, styles)
    _save(figure, path)


def _legend_below(figure: Any, panels: Sequence[Any], styles: Mapping[str, Any]) -> None:
    """Name the curves that have a style, and the grey ones by their number, under all panels."""
    known: dict[str, Any] = {}
    for axes in panels:
        known |= {name: handle for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = {name: known[name] for name in styles if name in known}
    grey = [name for name in known if name not in styles]
    if grey:
        shown[f"{len(grey)} others"] = known[grey[0]]
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(3, len(panels) * 2), fontsize=8)


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
    """Draw rows as heat maps: step s is made of the past steps at its left, and where it is corrected of itself, too.

    Of many methods it is some: the highlighted ones, those with the most full steps first.
    """
    maps: dict[tuple[Key, str], np.ndarray] = {
        (key, stream): coefficients(Plan.from_json(json.dumps(plan)))
        for key, cost in comparison.costs.items()
        for stream, plan in cost.plans.items()
    }
    streams, all_of_them = {stream for _, stream in maps}, len(maps)
    maps = {one: maps[one] for one in _first_of(maps, comparison)}
    figure, panels = _panels(len(maps), width=3.2, height=3.4, columns=PANELS_A_LINE)
    columns = max(1, min(PANELS_A_LINE, len(maps)))
    image = None
    for number, (((key, stream), matrix), axes) in enumerate(zip(maps.items(), panels, strict=True)):
        image = axes.imshow(matrix, cmap="RdBu_r", vmin=-STRONGEST, vmax=STRONGEST)
        words = [key[0] + (f", {stream}" if len(streams) > 1 else ""), f"on {key[1]}"]
        axes.set_title("\n".join(line for text in words for line in textwrap.wrap(text, 38)), fontsize=7)
        axes.set_ylabel("step that is forecast, or corrected" if number % columns == 0 else "", fontsize=8)
        axes.set_xlabel("past step" if number >= len(maps) - columns else "", fontsize=8)
        axes.tick_params(labelsize=7)
        for axis in (axes.xaxis, axes.yaxis):
            axis.get_major_locator().set_params(integer=True)
    if image is not None:
        figure.colorbar(image, ax=panels, shrink=0.6, label="coefficient")
    if len(maps) < all_of_them:
        figure.suptitle(f"{len(maps)} of {all_of_them} plans", fontsize=9)
    _save(figure, path)


def _first_of(maps: Mapping[tuple[Key, str], Any], comparison: Comparison) -> list[tuple[Key, str]]:
    """Return the plans that are drawn: all, or of many those of highlighted methods before others."""
    if len(maps) <= MOST_PANELS:
        return list(maps)
    keys = {key for key, _ in maps}
    results = {(one.method, one.schedule): one for one in comparison.results() if (one.method, one.schedule) in keys}
    named = {(one.method, one.schedule): name for name, line in curves(list(results.values())).items() for one in line}
    order = highlighted(list(results.values()))
    known = [one for one in maps if one[0] in results and named[one[0]] in order]
    return sorted(known, key=lambda one: (-round(results[one[0]].full_steps), order.index(named[one[0]])))[:MOST_PANELS]


def coefficients(plan: Plan) -> np.ndarray:
    """Return a plan's coefficients, (S, S): row s, column k is the weight of step k in the forecast for step s.

    A full step has nothing in its row, unless it is corrected: then the weights of full steps up to itself.
    """
    matrix = np.full((plan.steps, plan.steps), np.nan)
    for step, row in (plan.rows | plan.corrections).items():
        matrix[step, list(row.past)] = row.coefficients
    return matrix


def _panels(count: int, width: float, height: float, columns: int) -> tuple[Any, list[Any]]:
    """Make a figure of so many panels; none is left empty."""
    columns = max(1, min(columns, count))
    lines = max(1, math.ceil(count / columns))
    figure = _figure(width * columns + 1, height * lines + 0.9, layout="constrained")
    return figure, [figure.add_subplot(lines, columns, k + 1) for k in range(count)]


def draw_all(comparison: Comparison, folder: Path, suffix: str = "png") -> list[Path]:
    """Draw every plot that the records are enough for, as files of a `suffix`: png, pdf or svg; returns the files."""
    results = comparison.results()
    plots: dict[str, Callable[[Path], None]] = {"psnr-over-ratio": lambda path: psnr_over(results, path, "step_ratio")}
    if comparison.times:
        plots["psnr-over-speedup"] = lambda path: psnr_over(results, path, "speedup")
    if any(len(mean_error(records)) for key, records in comparison.records.items() if key != REFERENCE):
        plots["error-per-step"] = lambda path: error_per_step(comparison, path)
    if any(cost.plans for cost in comparison.costs.values()):
        plots["rows"] = lambda path: rows(comparison, path)
    files = {folder / f"{name}.{suffix}": plot for name, plot in plots.items()}
    for path, plot in files.items():
        plot(path)
    return list(files)
