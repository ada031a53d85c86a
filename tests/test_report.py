"""Tables, sheets and files from measurements made by hand."""

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from lesa.bench import plots, report, sheet
from lesa.bench.lines import DIFFERING, Cost, Failure, Pair, Record, Start, Time
from lesa.bench.records import REFERENCE, Comparison
from lesa.learn.training import Curve
from lesa.rows.forecasters import PlannedRow
from lesa.rows.plan import Plan

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
    assert lines["all full"] == ["every:1", "50", "1.00", "1.00x", "1.00x", "identical", "-", "0.900", "100.0%"]
    assert lines["LESA"] == ["paper:7", "10", "5.00", "4.00x", "3.00x", "36.50 [31.50, 41.50]", "-", "0.900", "100.0%"]
    assert lines["fewer steps"] == ["8 steps", "8", "6.25", "-", "-", "22.00 [20.00, 24.00]", "-", "0.900", "50.0%"]


def with_floats(comparison: Comparison, more: dict) -> None:
    """Give records float PSNR: their PSNR and so many dB."""
    for key, above in more.items():
        comparison.records[key] = [
            replace(one, scores={**one.scores, "float PSNR": one.psnr + above}) for one in comparison.records[key]
        ]


def test_float_psnr_has_a_column_beside_psnr_and_old_records_leave_it_empty(comparison):
    with_floats(comparison, {REFERENCE: 90.0, LESA: 20.0})
    lines = cells(report.table(comparison.results()))
    assert lines["method"][5:8] == ["PSNR, dB [95 %]", "float PSNR, dB [95 %]", "SSIM"]
    assert [lines[name][6] for name in ("all full", "LESA", "fewer steps")] == [
        "identical",
        "56.50 [51.50, 61.50]",
        "-",
    ]
    assert "float PSNR" not in lines["method"][8:]


def test_plots_are_of_float_psnr_where_all_have_it(comparison):
    without_reference = [one for one in comparison.results() if one.method != REFERENCE[0]]
    assert plots.scores_of(without_reference)[0] == "PSNR"
    with_floats(comparison, {TAYLOR: 1.0, LESA: 20.0, FEWER: 0.0})
    name, scores = plots.scores_of([one for one in comparison.results() if one.method != REFERENCE[0]])
    assert name == "float PSNR" and scores[LESA].mean == 56.5


def test_the_cap_of_psnr_is_no_identity(comparison):
    """Pictures may differ in many values and still have the most that PSNR goes to."""
    same, close, old = ("same", "at:0,3"), ("close", "at:0,3"), ("old", "at:0,3")
    for key, shares in {same: (0.0, 0.0), close: (0.0, 0.04)}.items():
        scores = [{DIFFERING: share} for share in shares]
        records = zip(comparison.records[LESA], scores, strict=True)
        comparison.records[key] = [replace(one, method=key[0], psnr=60.0, scores=of) for one, of in records]
    comparison.records[old] = [replace(one, method="old", psnr=60.0) for one in comparison.records[LESA]]
    text = report.summary(comparison)
    lines = cells(text.partition("\n\n")[0])
    assert [lines[name][5] for name in ("all full", "same", "close", "old")] == [
        "identical",
        "identical",
        *[">= 60"] * 2,
    ]
    assert lines["method"][8] == DIFFERING and [lines[n][8] for n in ("close", "old")] == ["0.020", "-"]
    note = (
        "- of 4 pictures at 60 dB, the most that PSNR goes to here, 3 are identical to the reference run's, the others"
    )
    assert f"{note} differ in up to 4.0% of their values" in text


def test_nearly_all_at_the_cap_are_not_all(comparison):
    first, second = comparison.records[LESA]
    many = [replace(first, seed=k, psnr=60.0) for k in range(99)]
    comparison.records[LESA] = [*many, replace(second, psnr=59.0)]
    assert cells(report.table(comparison.results()))["LESA"][5].startswith("59.99 [")


def test_the_table_is_aligned(comparison):
    lines = report.table(comparison.results()).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert len({tuple(k for k, c in enumerate(line) if c == "|") for line in lines}) == 1


def test_differences_are_to_methods_of_as_many_full_steps(comparison):
    planned = [replace(record, method="Lagrange-1", schedule="at:0,3") for record in comparison.records[LESA]]
    comparison.records["Lagrange-1", "at:0,3"] = planned  # not to be set beside the paper's schedule
    lines = cells(report.differences(comparison, "LESA"))
    assert lines["LESA - Taylor-1 (our tap)"] == ["paper:7 - paper:7", "10", "+1.50 [+1.50, +1.50]", "-", "-"]
    assert len(lines) == 3  # the head, the rule, and that one


def test_differences_of_drift_stand_beside_those_of_psnr(comparison):
    for key, drift in {TAYLOR: -40.0, LESA: -43.0}.items():
        comparison.records[key] = [replace(one, scores={"drift": drift}) for one in comparison.records[key]]
    lines = cells(report.differences(comparison, "LESA"))
    assert lines["LESA - Taylor-1 (our tap)"][2:] == ["+1.50 [+1.50, +1.50]", "-", "+3.00 [+3.00, +3.00]"]
    with_floats(comparison, {TAYLOR: 0.0, LESA: 2.0})
    lines = cells(report.differences(comparison, "LESA"))
    assert lines["LESA - Taylor-1 (our tap)"][3] == "+3.50 [+3.50, +3.50]"


def test_others_are_set_beside_the_best_of_ours_that_costs_no_more(comparison):
    shares = {REFERENCE: 1.0, TAYLOR: 0.25, LESA: 0.2, FEWER: 0.16}
    dearer, worse, better = ("LESA", "paper:5"), ("LESA (phase 1)", "paper:7"), ("DBCache", "threshold 0.1")
    comparison.records[dearer] = [replace(one, schedule="paper:5", psnr=50.0) for one in comparison.records[LESA]]
    comparison.records[worse] = [replace(one, method=worse[0], psnr=30.0) for one in comparison.records[LESA]]
    comparison.records[better] = [replace(one, method="DBCache", psnr=45.0) for one in comparison.records[LESA]]
    for key, share in {**shares, dearer: 0.26, worse: 0.2, better: 0.2}.items():
        comparison.records[key] = [replace(one, share=share) for one in comparison.records[key]]
    lines = cells(report.at_equal_cost(comparison, "LESA"))
    assert lines["Taylor-1 (our tap)"][1:] == ["4.00", "35.00", *LESA, "5.00", "+1.50 [+1.50, +1.50]", "-", "above"]
    assert lines["DBCache"][1:] == ["5.00", "45.00", *LESA, "5.00", "-8.50 [-13.50, -3.50]", "-", "below"]
    assert lines["fewer steps"][1:] == ["6.25", "22.00", "-", "-", "-", "-", "-", "-"]
    assert "all full" not in lines and "LESA" not in lines and worse[0] not in lines
    with_floats(comparison, {key: 0.0 for key in comparison.records} | {worse: 20.0})
    lines = cells(report.at_equal_cost(comparison, "LESA"))  # at the cap of PSNR another may be the best
    assert lines["DBCache"][3:] == [*worse, "5.00", "-15.00 [-15.00, -15.00]", "+5.00 [+5.00, +5.00]", "above"]


def test_methods_that_failed_alike_are_listed_together(comparison):
    comparison.add(Failure("DBCache", "threshold 0.1", "ImportError: no cache_dit"))
    comparison.add(Failure("DBCache", "threshold 0.2", "ImportError: no cache_dit"))
    listed = "- DBCache on threshold 0.1, DBCache on threshold 0.2 failed: ImportError: no cache_dit"
    assert listed in report.summary(comparison)


def test_the_sheet_shows_every_picture_in_its_place(comparison):
    drawn = np.asarray(sheet.sheet(comparison))
    spans = {key: places(drawn, colour) for key, colour in COLOURS.items()}
    assert {len(span) for span in spans.values()} == {2 * sheet.SIDE**2}  # two pictures each, no text over them
    lefts = [spans[key][:, 1].min() for key in (REFERENCE, TAYLOR, LESA, FEWER)]
    assert lefts[0] >= sheet.MARGIN
    steps = np.diff(lefts)
    assert steps[1] == 2 * sheet.SIDE + 2 + sheet.GAP  # beside it the difference; as many full steps: side by side
    assert steps[0] == sheet.SIDE + sheet.GAP + sheet.GROUP_GAP and steps[2] == steps[1] + sheet.GROUP_GAP
    assert len({span[:, 0].min() for span in spans.values()}) == 1


def test_differences_stand_beside_pictures(comparison):
    """Here they have a colour of their own: 8 times one of 5."""
    comparison.pictures[LESA] = [picture((0, 95, 0))] * 2
    drawn = np.asarray(sheet.sheet(comparison))
    pictures, differences = places(drawn, (0, 95, 0)), places(drawn, (0, 40, 0))
    assert len(differences) == len(pictures) == 2 * sheet.SIDE**2
    assert (differences.min(0) - pictures.min(0)).tolist() == [0, sheet.SIDE + 2]


def many(comparison: Comparison, count: int = 40) -> Comparison:
    """Add methods with 10 and 8 full steps, and with long names."""
    for k in range(count):
        name, full = f"another project's cache with a name that is long, number {k}", (10, 8)[k % 2]
        key = name, "at:" + ",".join(map(str, range(full)))
        comparison.records[key] = [Record(*key, *pair, 25.0 + k / 8, 0.9, True, tuple(range(full))) for pair in PAIRS]
        comparison.pictures[key] = [picture((k, k, 250))] * 2
    return comparison


def test_a_sheet_of_many_methods_is_bounded_and_shows_the_best_ours_and_fewer_steps(comparison):
    few, drawn = sheet.sheet(comparison), np.asarray(sheet.sheet(many(comparison)))
    columns = sheet.MARGIN + sheet.SIDE + (2 * sheet.SIDE + 2) * sheet.ACROSS
    assert few.width < drawn.shape[1] <= columns + (sheet.GAP + sheet.GROUP_GAP) * (sheet.ACROSS + 2)
    assert all(len(places(drawn, COLOURS[key])) for key in (REFERENCE, LESA, FEWER))
    assert len(places(drawn, (39, 39, 250))) and not len(places(drawn, (0, 0, 250)))  # the best, and the worst


def test_a_heading_is_not_cut(comparison):
    name = "another project's cache with a name that is long " * 3
    result = replace(comparison.results()[1], method=name.strip(), schedule="at:" + ",".join(map(str, range(40))))
    lines = sheet._heading(result)
    assert name.strip().replace(" ", "") in "".join(lines).replace(" ", "") and result.schedule in "".join(lines)
    assert all(len(line) <= sheet.LETTERS[False] for line in lines)


def test_a_wrong_picture_is_marked(comparison):
    drawn = np.asarray(sheet.sheet(comparison))
    marked, first = places(drawn, sheet.WRONG), places(drawn, COLOURS[FEWER])[0]
    caption = slice(first[0] + sheet.SIDE, first[0] + sheet.SIDE + sheet.CAPTION)
    inside = np.isin(marked[:, 0], range(caption.start, caption.stop)) & (marked[:, 1] >= first[1])
    assert len(marked) and inside.all()


@pytest.mark.parametrize(("width", "shown"), [(32, 128), (64, 128), (100, 100), (512, 128)])
def test_pictures_of_any_size_fit_the_sheet(comparison, width, shown):
    comparison.pictures = {REFERENCE: [picture((0, 90, 0), width)]}
    assert len(places(np.asarray(sheet.sheet(comparison)), (0, 90, 0))) == shown**2


def test_small_pictures_keep_their_pixels(comparison):
    checkers = picture((0, 90, 0))
    checkers[::2, ::2] = (90, 0, 90)
    comparison.pictures = {REFERENCE: [checkers]}
    assert len(places(np.asarray(sheet.sheet(comparison)), (90, 0, 90))) == sheet.SIDE**2 / 4


def test_scores_that_could_not_be_had_have_a_column_that_says_so(comparison):
    comparison.add(Start({"cpu": "a", "cores": 2, "date": "2026-11-25T", "threads": 1}, (), {"LPIPS": "no weights"}))
    comparison.records[LESA] = [replace(record, scores={"MS-SSIM": 0.75}) for record in comparison.records[LESA]]
    text = report.summary(comparison)
    lines = cells(text.partition("\n\n")[0])
    assert lines["method"][-3:] == ["MS-SSIM", "LPIPS", "as prompted"]
    assert lines["LESA"][-3:] == ["0.750", "n/a", "100.0%"] and lines["all full"][-3:] == ["-", "n/a", "100.0%"]
    assert "- LPIPS could not be had: no weights" in text and "measured on 2026-11-25 on a, 2 cores" in text


def test_a_method_that_failed_is_listed_with_its_error(comparison):
    comparison.add(Failure("a peer", "its own", "ImportError: no such package"))
    assert "- a peer on its own failed: ImportError: no such package" in report.summary(comparison)


def test_costs_are_laid_out(comparison):
    comparison.add(Cost(*REFERENCE, tuple(range(50)), 20_000_000_000, None, 3_000_000, None))
    comparison.add(Cost(*LESA, tuple(range(10)), 4_000_000_000, 442_368, 0, 7_000_000))
    comparison.add(Time(*LESA, *PAIRS[1], 1.25, 2.0, 0.0015))
    entries = [{"name": key[0], "schedule": key[1], "recipe": {}} for key in (REFERENCE, LESA)]
    entries[1]["recipe"] = {"predictor": "its digest", "seconds": 61.7, "bytes": 21_040_000}
    comparison.add(Start({}, tuple(entries)))
    lines = cells(report.cost_table(comparison))
    assert lines["all full"] == ["every:1", "20.00", "1.00", "-", "-", "3.00", "-", "-", "-"]
    assert lines["LESA"] == ["paper:7", "4.00", "5.00", "1.500", "0.44", "0.00", "7.00", "62", "21.0"]


def test_runs_differ_where_the_whole_interval_is_beyond_the_tolerance(comparison):
    after = copy.deepcopy(comparison)
    shift = {LESA: (0.5, 0.5), TAYLOR: (0.5, -0.5), FEWER: (0.02, 0.02)}
    for key, shifts in shift.items():
        pairs = zip(after.records[key], shifts, strict=True)
        after.records[key] = [replace(record, psnr=record.psnr + more) for record, more in pairs]
    found = {change.key: change for change in report.changes(comparison, after)}
    assert {key for key, change in found.items() if change.beyond(0.01)} == {LESA, FEWER}
    assert {key for key, change in found.items() if change.beyond(0.1)} == {LESA}
    assert found[LESA].difference.mean == pytest.approx(0.5) and found[LESA].pairs == 2
    after.records = {("another", "s"): after.records[LESA]}
    with pytest.raises(ValueError, match="methods and pairs that both have"):
        report.changes(comparison, after)


# --- plots


MADE = {1: PlannedRow((0,), (1.0,), 0.0), 3: PlannedRow((2,), (0.5,), 0.0)}
PLAN = Plan((1.0, 0.8, 0.5, 0.2, 0.0), full=(0, 2), start=0, memory=1, remembers_forecasts=False, rows=MADE)


def colours(path) -> set[tuple[int, ...]]:
    drawn = np.asarray(Image.open(path).convert("RGB"))
    assert drawn.shape[0] > 200
    return {tuple(colour) for colour in drawn.reshape(-1, 3).tolist()}


def test_every_plot_that_the_records_are_enough_for_is_drawn(comparison, tmp_path):
    pytest.importorskip("matplotlib")
    few = ["psnr-over-ratio.png", "psnr-over-speedup.png"]
    assert [path.name for path in plots.draw_all(comparison, tmp_path)] == few
    records = comparison.records[LESA]
    comparison.records[LESA] = [replace(record, feature_error=(0.0, 0.5, None, 0.1)) for record in records]
    comparison.add(Cost(*LESA, (0, 2), plans={"cond": json.loads(PLAN.to_json())}))
    drawn = {path.name: colours(path) for path in plots.draw_all(comparison, tmp_path)}
    first, second, third = (31, 119, 180), (255, 127, 14), (44, 160, 44)
    assert drawn["psnr-over-ratio.png"] >= {first, second, third}  # three methods
    assert first in drawn["psnr-over-speedup.png"] and second not in drawn["psnr-over-speedup.png"]  # one is timed
    assert first in drawn["error-per-step.png"]
    assert len(drawn["rows.png"]) > 50


def test_a_method_has_a_curve_for_each_kind_of_schedule(comparison):
    lesa, fewer = (next(one for one in comparison.results() if one.method == key[0]) for key in (LESA, FEWER))
    cache = [replace(fewer, method="DBCache", schedule=s) for s in ("threshold 0.1", "mask fast", "threshold 0.25, 3")]
    curves = plots.curves([lesa, fewer, replace(lesa, schedule="at:0,3"), replace(fewer, schedule="6 steps"), *cache])
    lengths = {"LESA, the paper's schedules": 1, "LESA, planned": 1, "fewer steps": 2}
    assert {name: len(line) for name, line in curves.items()} == lengths | {"DBCache, threshold": 2, "DBCache, mask": 1}


def test_rows_are_drawn_where_they_are():
    matrix = plots.coefficients(PLAN)
    assert matrix[1, 0] == 1.0 and matrix[3, 2] == 0.5 and np.isnan(matrix).sum() == 14


def test_errors_are_averaged_over_records(comparison):
    one, other = comparison.records[LESA]
    given = [replace(one, feature_error=(0.0, 0.2, None)), replace(other, feature_error=(0.0, 0.4, 0.1))]
    errors = plots.mean_error(given)
    assert np.isnan(errors[[0, 2]]).all() and errors[1] == pytest.approx(0.3)
    assert len(plots.mean_error([one, other])) == 0


def test_the_training_curve_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    curve = Curve()
    for round_, phase in enumerate(["ground-truth", "closed-loop", "closed-loop"]):
        for update in (0, 10, 20):
            curve.add(phase, round_, update, -1.0 - round_ - update / 10)
    plots.training_curve(curve, tmp_path / "curve.png")
    drawn = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB"))
    assert drawn.shape[0] > 300 and {tuple(c) for c in drawn.reshape(-1, 3)} >= {(31, 119, 180), (44, 160, 44)}
