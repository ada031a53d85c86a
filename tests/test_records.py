"""Lines that are written come back; a folder survives kills, and refuses what does not belong to it."""

import json
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock

from lesa.bench import records
from lesa.bench.lines import Cost, Failure, Pair, Record, Start, Time
from lesa.bench.planned import keep_planned
from lesa.bench.records import REFERENCE, Comparison

PAIRS = [Pair("a red apple", 0), Pair("ein grüner Apfel", 1), Pair("a blue fish", 2)]
SETTING = {"model": "tiny", "weights": "abc", "call": {"height": 32}, "batch_size": 2, "pairs": PAIRS}
OURS, THEIRS = ("LESA", "at:0,3"), ("reuse", "every:2")


def entry(key: records.Key) -> dict:
    return {"name": key[0], "schedule": key[1], "call": {}, "recipe": {}}


def picture(key: records.Key, pair: Pair, psnr: float = 30.0) -> Record:
    return Record(*key, *pair, psnr, 0.9, None, (0, 2), {"MS-SSIM": 0.8}, (0.0, None, 0.25))


START = Start({"cpu": "fast"}, (entry(REFERENCE), entry(OURS), entry(THEIRS)), {"LPIPS": "no weights"})
LINES = [
    START,
    picture(OURS, PAIRS[1]),
    Time(*OURS, *PAIRS[0], 1.5, 2.5, 0.001),
    Cost(*OURS, (0, 2), 12, 34, 0, None, {"cond": {"rows": {"1": [0.5]}}}),
    Failure(*THEIRS, "ImportError: no such peer"),
]


def write(folder: Path, *lines: records.Line, shard: int = 0) -> Path:
    with records.writing(folder, SETTING, shard) as log:
        log.add(*lines)
        assert log.path is not None
        return log.path


@pytest.mark.parametrize("line", LINES, ids=lambda line: type(line).__name__)
def test_a_line_is_read_as_it_was_written(line):
    assert records.from_text(records.to_text(line)) == line


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"kind": "dream"}', '{"kind": "picture", "method": "LESA"}'])
def test_other_lines_are_refused(text):
    with pytest.raises(ValueError, match="no record"):
        records.from_text(text)


def test_what_was_written_is_loaded(tmp_path):
    write(tmp_path, *LINES)
    loaded = records.load(tmp_path)
    assert loaded.setting["pairs"] == [list(pair) for pair in PAIRS] and loaded.setting["weights"] == "abc"
    assert loaded.starts == [START]
    assert loaded.records == {OURS: [LINES[1]]} and loaded.times == {OURS: [LINES[2]]}
    assert loaded.costs == {OURS: LINES[3]} and loaded.failures == {THEIRS: "ImportError: no such peer"}


def test_methods_come_in_the_order_of_the_line_up_and_records_in_that_of_the_pairs(tmp_path):
    write(tmp_path, START, *(picture(key, pair) for key in (THEIRS, OURS) for pair in PAIRS[::-1]))
    loaded = records.load(tmp_path)
    assert list(loaded.records) == [OURS, THEIRS]
    assert [record.pair for record in loaded.records[OURS]] == PAIRS


def test_a_torn_last_line_is_passed_over_and_then_removed(tmp_path):
    path = write(tmp_path, START, picture(OURS, PAIRS[0]))
    whole, torn = path.read_bytes(), records.to_text(picture(OURS, PAIRS[1])).encode()
    for cut in (1, len(torn) // 2, len(torn)):
        path.write_bytes(whole + torn[:cut])
        assert records.load(tmp_path).records == {OURS: [picture(OURS, PAIRS[0])]}
        with records.writing(tmp_path, SETTING) as log:
            assert path.read_bytes() == whole
            assert log.comparison.holds(OURS, PAIRS[:1]) and not log.comparison.holds(OURS, PAIRS[:2])


def changed(lines: list[bytes], number: int, change: str) -> list[bytes]:
    if change == "lost":
        return lines[:number] + lines[number + 1 :]
    if change == "doubled":
        return lines[: number + 1] + lines[number:]
    if change == "swapped":
        return [*lines[:number], lines[number + 1], lines[number], *lines[number + 2 :]]
    return [*lines[:number], lines[number].replace(b"0.9", b"0.8").replace(b'"fast"', b'"slow"'), *lines[number + 1 :]]


@pytest.mark.parametrize("change", ["lost", "doubled", "swapped", "changed"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_lines_that_are_lost_doubled_swapped_or_changed_are_noticed(tmp_path, change, number):
    path = write(tmp_path, START)
    for pair in PAIRS:
        write(tmp_path, picture(OURS, pair))  # a batch each
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(changed(lines, number, change)))
    with pytest.raises(ValueError, match=r"records.jsonl, lines \d+ to \d+ or before: lines were lost, doubled or"):
        records.load(tmp_path)


def test_a_changed_setting_is_noticed(tmp_path):
    path = write(tmp_path, START)
    path.write_text(path.read_text().replace('"height": 32', '"height": 64'))
    with pytest.raises(ValueError, match="lines were lost, doubled or changed"):
        records.load(tmp_path)


def test_a_torn_batch_is_passed_over_and_measured_again(tmp_path):
    path = write(tmp_path, START)
    whole = path.read_bytes()
    write(tmp_path, *(picture(OURS, pair) for pair in PAIRS))
    batch = path.read_bytes()[len(whole) :]
    for lines in (1, 2):
        path.write_bytes(whole + b"".join(batch.splitlines(keepends=True)[:lines]))
        assert not records.load(tmp_path).records
        assert write(tmp_path, *(picture(OURS, pair) for pair in PAIRS)).read_bytes() == whole + batch


def test_files_of_before_go_on_without_seals(tmp_path):
    path = write(tmp_path)
    path.write_text(path.read_text().replace(records.FORMAT, records.UNSEALED) + records.to_text(LINES[1]) + "\n")
    write(tmp_path, picture(OURS, PAIRS[2]))
    assert '"batch": [' not in path.read_text()
    assert [one.pair for one in records.load(tmp_path).records[OURS]] == PAIRS[1:]


@pytest.mark.parametrize(
    "changes",
    [dict(psnr="30"), dict(seed=None), dict(full=[0, "x"]), dict(scores={"CLIP": "1"}), dict(scores=[]), dict(kind=[])],
)
def test_the_fields_of_a_line_are_of_their_types(changes):
    with pytest.raises(ValueError, match="no record"):
        records.from_text(json.dumps({**json.loads(records.to_text(LINES[1])), **changes}))


def test_planned_schedules_that_were_changed_are_refused(tmp_path):
    keep_planned(tmp_path, {"grid": [1.0, 0.0], "Reuse() 2 feature": "at:0,3"})
    assert records.planned(tmp_path) == {"grid": [1.0, 0.0], "Reuse() 2 feature": "at:0,3"}
    (tmp_path / records.PLANNED).write_text((tmp_path / records.PLANNED).read_text().replace("at:0,3", "at:0,2"))
    with pytest.raises(ValueError, match="not as they were kept"):
        records.planned(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"GIF89a" + data]
)
def test_a_damaged_picture_is_named(tmp_path, damage):
    measured(tmp_path)
    path = records.picture_path(tmp_path, OURS, 1)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"00001.png is no whole picture"):
        records.load(tmp_path)


def test_a_torn_first_line_is_begun_anew(tmp_path):
    path = write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    with pytest.raises(FileNotFoundError, match="run lesa bench"):
        records.load(tmp_path)
    assert write(tmp_path).read_bytes() == whole


def test_a_damaged_line_is_named(tmp_path):
    path = write(tmp_path, *LINES)
    lines = path.read_text().splitlines()
    lines[2] = lines[2][:40]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"records.jsonl, line 3: it is no record"):
        records.load(tmp_path)


@pytest.mark.parametrize("name", ["model", "weights", "call", "batch_size", "pairs"])
def test_another_setting_is_refused_with_what_differs(tmp_path, name):
    before = write(tmp_path, *LINES).read_bytes()
    other = {**SETTING, name: "another"}
    with pytest.raises(ValueError, match=f"another {name}: .* there, 'another' here"), records.writing(tmp_path, other):
        pass
    with pytest.raises(ValueError, match=f"another {name}"), records.writing(tmp_path, other, shard=1):
        pass
    assert [path.read_bytes() for path in tmp_path.glob("records*")] == [before]


def test_a_file_that_is_none_of_ours_is_left_alone(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"song": "other"}\n')
    with pytest.raises(ValueError, match="does not begin as records do"), records.writing(tmp_path, SETTING):
        pass
    assert (tmp_path / "records.jsonl").read_text() == '{"song": "other"}\n'


def test_two_processes_do_not_write_one_file(tmp_path):
    with FileLock(tmp_path / ".lock-0"):
        with pytest.raises(RuntimeError, match="another process measures"), records.writing(tmp_path, SETTING):
            pass
        write(tmp_path, START, shard=1)


def test_files_of_several_processes_are_one_run(tmp_path):
    write(tmp_path, START, picture(OURS, PAIRS[1], 31.0), shard=1)
    write(tmp_path, START, picture(OURS, PAIRS[0]), picture(OURS, PAIRS[1], 99.0))
    loaded = records.load(tmp_path)
    assert [record.pair for record in loaded.records[OURS]] == PAIRS[:2]  # what was measured twice counts once
    assert len(list(tmp_path.glob("records*.jsonl"))) == 2


def test_pictures_are_kept_beside_the_records(tmp_path):
    drawn = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    with records.writing(tmp_path, SETTING) as log:
        for number in (1, 0):
            log.keep(OURS, number, drawn[number])
        log.add(START, *(picture(OURS, pair) for pair in PAIRS))
    assert np.array_equal(records.load(tmp_path).pictures[OURS], drawn)


BLANK = np.zeros((8, 8, 3), dtype=np.uint8)
PLANNED = json.dumps({"grid": [1.0, 0.0], "Reuse() 2 feature": "at:0,3"})


def contents(folder: Path) -> dict[str, bytes]:
    """The files of a folder, but for its locks."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def put(folder: Path, *names: str, text: str = "another's") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def measured(folder: Path) -> None:
    """Measure with two processes, and keep pictures: one of a record, and one whose record a kill prevented."""
    for shard, key in ((1, OURS), (0, THEIRS)):
        write(folder, *LINES, shard=shard)
        with records.writing(folder, SETTING, shard) as log:
            log.keep(key, 1, BLANK)
    put(folder, records.PLANNED, text=PLANNED)


def test_what_the_records_name_is_removed_and_nothing_else(tmp_path):
    measured(tmp_path)
    beside = Path(records.picture_path(tmp_path, OURS, 0).parent.relative_to(tmp_path))
    others = "notes.txt", "pictures/holiday.jpg", "pictures/album/00001.png", str(beside / "00007.png")
    put(tmp_path, *others)
    records.clear(tmp_path, SETTING)
    assert contents(tmp_path).keys() == {"records.jsonl", *others}
    assert records.load(tmp_path) == Comparison(records.load(tmp_path).setting)
    measured(tmp_path)
    assert len(contents(tmp_path)) == len(others) + 5


def test_an_emptied_folder_holds_no_folders_of_pictures(tmp_path):
    measured(tmp_path)
    records.clear(tmp_path, SETTING)
    assert contents(tmp_path).keys() == {"records.jsonl"} and not (tmp_path / "pictures").exists()


@pytest.mark.parametrize("name", ["model", "call", "pairs"])
def test_records_of_another_setting_are_not_removed(tmp_path, name):
    measured(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"another {name}: .*; measure into another folder"):
        records.clear(tmp_path, {**SETTING, name: "another"})
    assert contents(tmp_path) == before


def test_records_that_a_process_writes_are_not_removed(tmp_path):
    measured(tmp_path)
    before = contents(tmp_path)
    with FileLock(tmp_path / ".lock-1"), pytest.raises(RuntimeError, match="another process measures"):
        records.clear(tmp_path, SETTING)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["another's", "another's\n", '{"grid": 3}', "[]", '{"plans": "mine"}'])
def test_schedules_that_nobody_planned_are_left_alone(tmp_path, text):
    write(tmp_path, *LINES)
    put(tmp_path, records.PLANNED, text=text)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="holds no planned schedules"):
        records.clear(tmp_path, SETTING)
    with pytest.raises(ValueError, match="holds no planned schedules"), records.writing(tmp_path, SETTING):
        pass
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["report.md", "pictures.png", "rows.png", "planned.json", "pictures/mine/00000.png"])
def test_a_new_run_writes_over_nothing(tmp_path, name):
    put(tmp_path, name)
    records.clear(tmp_path, SETTING)
    with pytest.raises(ValueError, match=f"{name}; name another folder"), records.writing(tmp_path, SETTING):
        pass
    assert contents(tmp_path) == {name: b"another's"}


@pytest.mark.parametrize("text", ["another's", '{"song": "without an end"}', '{"kind": "walk"'])
def test_a_file_without_a_line_is_no_torn_one_of_ours(tmp_path, text):
    put(tmp_path, "records.jsonl", text=text)
    for shard in (0, 1):
        with pytest.raises(ValueError, match="does not begin"), records.writing(tmp_path, SETTING, shard):
            pass
    with pytest.raises(ValueError, match="does not begin"):
        records.clear(tmp_path, SETTING)
    assert contents(tmp_path) == {"records.jsonl": text.encode()}


def test_the_end_of_anothers_file_is_not_taken_for_a_torn_line(tmp_path):
    put(tmp_path, "records.jsonl", text='{"song": 1}\n{"song": 2}')
    with pytest.raises(ValueError, match="does not begin"), records.writing(tmp_path, SETTING):
        pass
    assert contents(tmp_path) == {"records.jsonl": b'{"song": 1}\n{"song": 2}'}


def test_pictures_that_no_record_names_are_not_shown(tmp_path):
    measured(tmp_path)
    put(tmp_path, str(records.picture_path(Path(), OURS, 0).with_name("holiday.png")))
    assert [len(kept) for kept in records.load(tmp_path).pictures.values()] == [1]


def test_a_line_is_found_with_what_made_it(tmp_path):
    path = write(tmp_path, *LINES)
    record, made, setting = records.at_line(path, 3)
    assert record == LINES[1] and made == entry(OURS) and setting["model"] == "tiny"
    for number in (1, 2, 4, 99):
        with pytest.raises(ValueError, match=rf"line {number} of .* holds no picture's record"):
            records.at_line(path, number)


def test_without_a_line_it_is_that_of_the_last_picture(tmp_path):
    path = write(tmp_path, *LINES)
    assert records.at_line(path) == records.at_line(path, 3)
    with pytest.raises(ValueError, match=r"records.jsonl \(it has 2 lines\) holds no picture's record"):
        records.at_line(write(tmp_path / "few", LINES[0]))
    with pytest.raises(FileNotFoundError, match=r"other.jsonl is no file here; name the records"):
        records.at_line(tmp_path / "other.jsonl")


def test_differences_are_over_the_pairs_that_both_have():
    made = Comparison()
    for key, psnrs in ((OURS, [31.0, 41.0, 99.0]), (THEIRS, [30.0, 40.0])):
        for pair, psnr in zip(PAIRS, psnrs, strict=False):
            made.add(picture(key, pair, psnr))
    assert made.difference(OURS, THEIRS) == pytest.approx((1.0, 1.0, 1.0))
    with pytest.raises(LookupError, match="PSNR, SSIM, MS-SSIM, got 'beauty'"):
        records.paired(made.records[OURS], made.records[THEIRS], "beauty")


def test_results_are_means_over_the_records():
    made = Comparison()
    made.add(Record(*REFERENCE, *PAIRS[0], 60.0, 1.0, full=(0, 1, 2, 3)))
    made.add(Record(*OURS, *PAIRS[0], 30.0, 0.8, True, (0,), {"MS-SSIM": 0.5, "CLIP": 20.0}))
    made.add(Record(*OURS, *PAIRS[1], 32.0, 0.6, False, (0, 2, 3), {"MS-SSIM": 0.7}))
    result = made.results()[1]
    assert (result.psnr, result.full_steps, result.step_ratio, result.pairs) == (31.0, 2.0, 2.0, 2)
    assert (result.ssim, result.prompted) == pytest.approx((0.7, 0.5))
    assert result.scores == pytest.approx({"MS-SSIM": 0.6})  # a score that some lack has no mean


def test_settings_are_plain_json(tmp_path):
    path = write(tmp_path)
    first = json.loads(path.read_text().splitlines()[0])
    assert first["kind"] == "run" and first["format"] == records.FORMAT and first["call"] == {"height": 32}
