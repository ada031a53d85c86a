"""What calls leave behind: nothing."""

from random import Random

from faults.calls import alive, one
from faults.kills import accelerable


def test_calls_of_every_kind_leave_no_tensor(tiny_flux):
    """What a scheduler keeps of the newest call is as much after one call as after many."""
    pipe, random = accelerable(tiny_flux), Random(0)
    for number in range(5):
        one(pipe, random, number)
    before = alive()
    for number in range(25):
        one(pipe, random, number)
    assert alive() <= before + 5
