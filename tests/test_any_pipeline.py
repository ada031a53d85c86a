"""Any pipeline of the zoo is accelerated at its output, as the tests' own oracle says."""

from functools import cache

import pytest
import torch
from zoo.oracle import Oracle, Run, extrapolate, tensors, watch
from zoo.pipelines import ZOO, Specimen

from lesa.host.intercept import mark_of
from lesa.host.runtime import accelerate, denoisers_of
from lesa.rows.forecasters import Taylor
from lesa.rows.schedule import Schedule

REFUSED = {"skyreels_forcing_asynchronous_guided": "frames at different noise levels"}


@cache
def built(name: str) -> Specimen:
    return ZOO[name]()


@cache
def plain(name: str) -> Run:
    return watch(built(name).pipe, built(name).call)


@pytest.fixture(params=[name for name in ZOO if name not in REFUSED])
def name(request) -> str:
    return request.param


def outputs(name: str) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors(built(name).call())]


MAGNIFIED = {"shap_e_clipped_guided": 1e-3}
"""Tolerances of what is rendered of latents in a way that magnifies how float32 rounds on some CPUs."""


def close(ours: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float) -> bool:
    return all(torch.allclose(a, b, rtol=tolerance, atol=tolerance) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_forecast_is_refused(name):
    accelerated = accelerate(built(name).pipe, Taylor(1), schedule=Schedule.every(3), check=False)
    with accelerated, pytest.raises(RuntimeError, match=REFUSED[name]):
        built(name).call()


def test_with_every_step_full_nothing_changes(name):
    pipe, expected = built(name).pipe, plain(name)
    with accelerate(pipe, Taylor(1), schedule=Schedule.every(1), check=False) as run:
        assert all(torch.equal(a, b) for a, b in zip(outputs(name), expected.output, strict=True))
    assert sum(done.full_steps for done in run.summary().values()) == sum(expected.streams)
    assert mark_of(pipe) is None and not any(mark_of(getattr(pipe, part)) for part in denoisers_of(pipe))


def test_a_run_is_what_the_oracle_says(name):
    run = plain(name)
    oracle = Oracle(run, range(0, run.ticks, 3), extrapolate)
    expected = watch(built(name).pipe, built(name).call, oracle)
    with accelerate(built(name).pipe, Taylor(1), schedule=Schedule.every(3), of="output", check=False) as accelerated:
        ours = outputs(name)
    skipped = sum(done.skipped_steps for done in accelerated.summary().values())
    assert skipped == expected.skipped > 0
    assert close(ours, expected.output, MAGNIFIED.get(name, 1e-5))
