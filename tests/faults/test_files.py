"""Files that are damaged are refused in one line that names them, or read as they were: a sample of the campaign."""

import shutil
from pathlib import Path

import pytest

from faults import judge
from faults.judge import FINE, HARMLESS, Case
from faults.subjects import SUBJECTS

SAMPLE = 14


@pytest.mark.parametrize("name", SUBJECTS)
def test_damaged_files_are_refused_or_harmless(name, tmp_path):
    case = Case(name, tmp_path)
    found = [(fault, *case.try_out(fault)) for fault in case.faults(SAMPLE)]
    assert [one for one in found if one[1] not in FINE] == []
    assert {verdict for _, verdict, _ in found} != {HARMLESS}  # the damage does something


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only /proc says which folder is open")
def test_what_is_removed_is_told_by_where_it_is(tmp_path, monkeypatch):
    """`shutil.rmtree` opens a folder and names what is in it: that is inside where the folder is, and only there."""
    for name in ("inside", "beside"):
        (tmp_path / name / "kept" / "round").mkdir(parents=True)
        (tmp_path / name / "kept" / "round" / "file").touch()
    monkeypatch.setattr(judge, "AROUND", [])
    monkeypatch.chdir("/")
    with judge.watched(tmp_path / "inside") as outside:
        shutil.rmtree(tmp_path / "inside" / "kept")
    assert outside == []
    monkeypatch.chdir(tmp_path / "inside")
    with judge.watched(tmp_path / "inside") as outside:
        shutil.rmtree(tmp_path / "beside" / "kept")
    assert f"os.remove {tmp_path / 'beside' / 'kept' / 'round' / 'file'}" in outside
    (tmp_path / "beside" / "file").touch()
    with judge.watched(tmp_path / "inside") as outside:
        open(tmp_path / "beside" / "file").close()
    assert outside == [f"open {tmp_path / 'beside' / 'file'}"]
