"""A work that was killed goes on to what it would have left: a few moments of the campaign's."""

import multiprocessing

import pytest

from faults.kills import NOT_FORKED, WORKS, accelerable, killed

FEW = {"collect": 4, "train": 3, "bench": 3, "calibrate": 3, "collect, two processes": 2, "bench, two processes": 1}


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="a warm process must be forked")
@pytest.mark.parametrize("name", WORKS)
def test_a_killed_work_goes_on_to_the_same(name, tiny_flux, tmp_path):
    if name in NOT_FORKED:
        pytest.skip("a torch built for CUDA does not train in a process forked from one that trained")
    assert killed(name, accelerable(tiny_flux), tmp_path, FEW[name]) == []
