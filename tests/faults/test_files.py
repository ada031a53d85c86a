"""Files that are damaged are refused in one line that names them, or read as they were: a sample of the campaign."""

import pytest

from faults.judge import FINE, HARMLESS, Case
from faults.subjects import SUBJECTS

SAMPLE = 14


@pytest.mark.parametrize("name", SUBJECTS)
def test_damaged_files_are_refused_or_harmless(name, tmp_path):
    case = Case(name, tmp_path)
    found = [(fault, *case.try_out(fault)) for fault in case.faults(SAMPLE)]
    assert [one for one in found if one[1] not in FINE] == []
    assert {verdict for _, verdict, _ in found} != {HARMLESS}  # the damage does something
