"""Threads: as if alone, or refused before the first step."""

import pytest
import torch

import lesa
from faults.threads import KINDS, SCHEDULE, at_once, draw, of_its_own, sharing
from lesa.host.clock import PipelineClock


@pytest.mark.parametrize("kind", KINDS)
def test_threads_are_as_if_alone(kind, tiny_flux):
    for _ in range(3):
        assert KINDS[kind](tiny_flux) == []


def test_a_thread_that_comes_while_another_enters_is_refused(tiny_flux, monkeypatch):
    """Between the entrance and the first step of a call."""
    pipe, found = of_its_own(tiny_flux), []
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=SCHEDULE):
        alone, follow = draw(pipe, 0), PipelineClock._follow

        def enter(clock):
            if not found:
                found.append("second")
                found.extend(at_once(lambda: draw(pipe, 1)))
            follow(clock)

        monkeypatch.setattr(PipelineClock, "_follow", enter)
        assert torch.equal(draw(pipe, 0), alone)
    assert isinstance(found[1], RuntimeError) and "one call at a time" in str(found[1])


def test_one_set_of_weights_is_accelerated_once(tiny_flux):
    first, second = sharing(tiny_flux), sharing(tiny_flux)
    with (
        lesa.accelerate(first, lesa.Reuse(), schedule=SCHEDULE),
        pytest.raises(ValueError, match="accelerated once, but this one is already"),
    ):
        lesa.accelerate(second, lesa.Reuse(), schedule=SCHEDULE)
