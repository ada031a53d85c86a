"""Tables, sheets and files from measurements made by hand."""

import numpy as np
import pytest
from PIL import Image

from lesa import plots, report
from lesa.records import REFERENCE, Comparison, Pair, Record, Time
from lesa.training import Curve

PAIRS = [Pair("small red apple on blue, left", 0), Pair("large fish on grey, right", 1)]
WIDTH = 64
TAYLOR, LESA, FEWER = ("Taylor-1 (our tap)", "paper:7"), ("LESA", "paper:7"), ("fewer steps", "8 steps")
COLOURS = {REFERENCE: (0, 90, 0), TAYLOR: (90, 90, 0), LESA: (0, 90, 90), FEWER: (0, 0, 90)}  # no text has these


def picture(colour: tuple[int, int, int], width: int = WIDTH) -> np.ndarray:
    return np.full((width, width, 3), colour, dtype=np.uint8)


def places(sheet: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    return np.argwhere((sheet == colour).all(axis=2))


@pytest.fixture
def comparison() -> Comparison:
    made = Comparison()
    psnrs = {REFERENCE: (60.0, 60.0), TAYLOR: (30.0, 40.0), LESA: (31.5, 41.5), FEWER: (20.0, 24.0)}
    full_steps = {REFERENCE: 50, TAYLOR: 10, LESA: 10, FEWER: 8}
    for key, values in psnrs.items():
        made.records[key] = [
            Record(*key, *pair, psnr, 0.9, psnr != 20.0, tuple(range(full_steps[key])))
            for pair, psnr in zip(PAIRS, values, strict=True)
        ]
        made.pictures[key] = [picture(COLOURS[key])] * 2
    made.add(Time(*REFERENCE, *PAIRS[0], 5.0, 6.0))
    made.add(Time(*LESA, *PAIRS[0], 1.25, 2.0))
    return made


def cells(table: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in rows}


def test_the_table_has_a_line_per_method(comparison):
    lines = cells(report.table(comparison.results()))
    assert lines["all full"] == ["every:1", "50", "1.00", "1.00x", "1.00x", "identical", "0.900", "100.0%"]
    assert lines["LESA"] == ["paper:7", "10", "5.00", "4.00x", "3.00x", "36.50 [31.50, 41.50]", "0.900", "100.0%"]
    assert lines["fewer steps"] == ["8 steps", "8", "6.25", "-", "-", "22.00 [20.00, 24.00]", "0.900", "50.0%"]


def test_the_table_is_aligned(comparison):
    lines = report.table(comparison.results()).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({tuple(k for k, c in enumerate(line) if c == "|") for line in lines}) == 1


def test_differences_are_to_methods_of_as_many_full_steps(comparison):
    lines = cells(report.differences(comparison, "LESA"))
    assert lines["LESA - Taylor-1 (our tap)"] == ["paper:7 - paper:7", "10", "+1.50 [+1.50, +1.50]"]
    assert len(lines) == 3  # the head, the rule, and that one


def test_the_sheet_shows_every_picture_in_its_place(comparison):
    sheet = np.asarray(report.sheet(comparison))
    spans = {key: places(sheet, colour) for key, colour in COLOURS.items()}
    assert {len(span) for span in spans.values()} == {2 * report.SIDE**2}  # two pictures each, no text over them
    lefts = [spans[key][:, 1].min() for key in (REFERENCE, TAYLOR, LESA, FEWER)]
    assert lefts[0] >= report.MARGIN
    steps = np.diff(lefts)
    assert steps[1] == report.SIDE + report.GAP < steps[0] == steps[2]  # as many full steps: side by side
    assert len({span[:, 0].min() for span in spans.values()}) == 1


def test_a_wrong_picture_is_marked(comparison):
    sheet = np.asarray(report.sheet(comparison))
    marked, first = places(sheet, report.WRONG), places(sheet, COLOURS[FEWER])[0]
    caption = slice(first[0] + report.SIDE, first[0] + report.SIDE + report.CAPTION)
    inside = np.isin(marked[:, 0], range(caption.start, caption.stop)) & (marked[:, 1] >= first[1])
    assert len(marked) and inside.all()


@pytest.mark.parametrize(("width", "shown"), [(32, 128), (64, 128), (100, 100), (512, 128)])
def test_pictures_of_any_size_fit_the_sheet(comparison, width, shown):
    comparison.pictures = {REFERENCE: [picture((0, 90, 0), width)]}
    assert len(places(np.asarray(report.sheet(comparison)), (0, 90, 0))) == shown**2


def test_small_pictures_keep_their_pixels(comparison):
    checkers = picture((0, 90, 0))
    checkers[::2, ::2] = (90, 0, 90)
    comparison.pictures = {REFERENCE: [checkers]}
    assert len(places(np.asarray(report.sheet(comparison)), (90, 0, 90))) == report.SIDE**2 / 4


def test_the_training_curve_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    curve = Curve()
    for round_, phase in enumerate(["ground-truth", "closed-loop", "closed-loop"]):
        for update in (0, 10, 20):
            curve.add(phase, round_, update, -1.0 - round_ - update / 10)
    plots.training_curve(curve, tmp_path / "curve.png")
    drawn = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB"))
    assert drawn.shape[0] > 300 and {tuple(c) for c in drawn.reshape(-1, 3)} >= {(31, 119, 180), (44, 160, 44)}
