"""Plots and short reports of many methods: what a reader must tell apart has a name and a style of its own."""

import itertools
import re
from pathlib import Path

import pytest
from test_report import FEWER, LESA, PAIRS, comparison, many  # noqa: F401

from lesa.bench import brief, page, plots, records, report
from lesa.bench.lines import Record
from lesa.bench.records import REFERENCE, Comparison, Result

SIGNATURES = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


@pytest.fixture
def crowd(comparison) -> Comparison:  # noqa: F811
    """44 methods, one of which is measured at two numbers of full steps."""
    key = FEWER[0], "10 steps"
    comparison.records[key] = [Record(*key, *pair, 28.0, 0.9, True, tuple(range(10))) for pair in PAIRS]
    return many(comparison)


def named(path: Path) -> str:
    """Return what is written in an SVG: its texts are in comments beside the glyphs."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", path.read_text()))


def test_few_curves_are_named_at_their_ends_and_the_others_grey(crowd, tmp_path):
    results = crowd.results()
    plots.psnr_over(results, tmp_path / "plot.svg")
    texts = named(tmp_path / "plot.svg")
    shown = plots.highlighted([one for one in results if one.method != REFERENCE[0]])
    assert len(shown) == plots.SHOWN and {LESA[0], FEWER[0]} <= set(shown)
    drawn = plots.curves([one for one in results if one.method != REFERENCE[0]])
    assert {name for name in drawn if re.search(rf"^{re.escape(name)}$", texts, re.MULTILINE)} == set(shown)
    assert f"{len(drawn) - len(shown)} others" in texts


def test_what_is_the_best_somewhere_is_named(crowd):
    results = [one for one in crowd.results() if one.method != REFERENCE[0]]
    best = {one.method for one in brief.best_of_each(results)}
    assert best <= set(plots.highlighted(results)) and any("number 39" in name for name in best)


def test_no_two_styles_are_the_same():
    styles = plots.styles_of([f"curve {k}" for k in range(plots.SHOWN)])
    for part in ("color", "marker"):
        assert len({style[part] for style in styles.values()}) == plots.SHOWN
    assert len({style["linestyle"] for style in styles.values()}) == len(plots.LINES)


@pytest.mark.parametrize("places", [[], [0.5], [0.1, 0.1, 0.1], [0.97, 0.98, 0.99, 1.0], [0.0, 0.5, 0.51, 0.9]])
def test_names_do_not_cover_each_other(places):
    found = plots.spread(places, 0.05)
    assert all(b - a >= 0.05 - 1e-9 for a, b in itertools.pairwise(found))
    assert all(place <= 1 for place in found)
    assert found == pytest.approx(places) or min(b - a for a, b in itertools.pairwise(places)) < 0.05


def test_names_stay_about_where_their_curves_end():
    assert plots.spread([0.1, 0.5, 0.5, 0.5, 0.9], 0.05) == pytest.approx([0.1, 0.45, 0.5, 0.55, 0.9])
    assert plots.spread([0.5, 0.52, 0.9], 0.05) == pytest.approx([0.485, 0.535, 0.9])
    assert plots.spread([0.99, 1.0], 0.05) == pytest.approx([0.95, 1.0])


def test_a_method_on_two_kinds_of_schedule_has_a_curve_of_each():
    results = [
        Result(*("default", schedule), 4, 5, 40, 40, 40, 1, None) for schedule in ("its own", "every:3", "every:5")
    ]
    assert list(plots.curves(results)) == ["default, its own schedule", "default, evenly spaced"]


def test_names_beside_a_plot_are_on_it(crowd, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: saved.append(figure))
    plots.psnr_over(crowd.results(), tmp_path / "x.png")
    (figure,) = saved
    figure.draw_without_rendering()
    names = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    assert len(names) == plots.SHOWN and all(box.x1 <= figure.bbox.x1 for box in names)


def test_steps_are_counted_in_whole_numbers(crowd, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: saved.append(figure))
    plots.error_per_step(with_errors(crowd), tmp_path / "x.png")
    (figure,) = saved
    assert all(tick == int(tick) for axes in figure.axes for tick in axes.get_xticks())


def with_errors(crowd: Comparison) -> Comparison:
    for key, kept in crowd.records.items():
        kept[:] = [Record(*key, *one.pair, one.psnr, 0.9, True, one.full, {}, (0.1,) * 50) for one in kept]
    return crowd


def test_the_legend_of_errors_covers_no_curve(crowd, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: saved.append(figure))
    plots.error_per_step(with_errors(crowd), tmp_path / "x.png")
    (figure,) = saved
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not any(axes.get_legend() for axes in figure.axes)
    assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes)
    shown = [line for axes in figure.axes for line in axes.get_lines() if line.get_color() != plots.GREY]
    assert len({line.get_linestyle() for line in shown}) > 1 and len(legend.get_texts()) <= plots.SHOWN + 1


@pytest.mark.parametrize("suffix", SIGNATURES)
def test_plots_are_what_their_names_end_with(crowd, tmp_path, suffix):
    files = plots.draw_all(with_errors(crowd), tmp_path, suffix)
    assert {path.suffix for path in files} == {f".{suffix}"}
    assert all(path.read_bytes().startswith(SIGNATURES[suffix]) and path.name in records.WRITTEN for path in files)


def test_a_report_of_many_methods_is_short_and_the_file_is_whole(crowd):
    text, whole = brief.of(crowd, "LESA"), report.summary(crowd, "LESA")
    names = re.findall(r"^\| (.*?) +\|", text, re.MULTILINE)[2:]
    assert len(names) < brief.MANY < whole.count("| another project's cache")
    assert {REFERENCE[0], LESA[0], FEWER[0]} <= set(names)
    assert re.search(r"number 39 .*\| +best \|", text) and "number 38" not in text
    assert "at:0" not in text and "planned" in text


def test_ours_that_is_not_the_best_stands_beside_what_is(crowd):
    crowd.records[LESA] = [Record(*LESA, *pair, 99.0, 0.9, True, tuple(range(10))) for pair in PAIRS]
    text = brief.of(crowd, "LESA")
    assert re.search(r"\| LESA .*\| +best \|", text) and re.search(r"Taylor-1 .*\| +best other \|", text)


def test_the_short_text_is_shown_unless_the_whole_is_asked_for():
    written = page.Page("whole", [], "short")
    assert written.shown(False) == "short" and written.shown(True) == "whole" == page.Page("whole", []).shown(False)
