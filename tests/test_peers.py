"""Other projects' caches and other samplers on a tiny pipeline: on, off without a trace, and listed where they fail."""

import copy
import sys
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from lesa.bench import benchmark, peers
from lesa.bench.cost import Watch
from lesa.bench.lines import Pair
from lesa.bench.methods import REFERENCE, fewer_steps, more_steps
from lesa.host.pipelines import with_call
from lesa.host.runtime import accelerate
from lesa.rows.rivals import Hermite
from lesa.rows.schedule import Schedule

PROMPT = "small red apple on white, left"
PAIRS = [Pair("large blue fish on grey, right", 3), Pair("large green pear on white, left", 4)]
STEPS = 8
PLAN = Schedule.at([0, 2, 5])
PACKAGES = {"dbcache": "cache_dit", "hicache": "hicache_pp"}


@pytest.fixture(scope="module")
def pipe(tiny_flux) -> Any:
    mine = copy.copy(tiny_flux)
    return with_call(mine, dict(height=32, width=32, num_inference_steps=STEPS, max_sequence_length=16))


@pytest.fixture(scope="module")
def reference(pipe) -> benchmark.Drawn:
    return benchmark.observe(pipe, REFERENCE, PAIRS)


def one_of_each() -> list[Any]:
    """The last, and so the boldest, setting of every kind; those of packages that are not installed are skipped."""
    chosen = []
    for family in peers.FAMILIES:
        package = PACKAGES.get(family)
        absent = pytest.mark.skipif(package is not None and find_spec(package) is None, reason=f"no {package}")
        methods = [*peers.line_up([family], STEPS, PROMPT), *on_plan(family)]
        kinds = {(method.name, method.alone): method for method in methods}
        chosen += [pytest.param(m, marks=absent, id=f"{m.name}, {m.schedule}") for m in kinds.values()]
    return chosen


def on_plan(*families: str) -> list[Any]:
    return peers.line_up_planned(families, STEPS, PROMPT, [len(PLAN.full_steps(STEPS))], lambda *_: PLAN)


def state(pipe: Any) -> list[dict[str, Any]]:
    modules = list(pipe.transformer.modules())
    return [dict(vars(place)) for place in (type(pipe), *modules)] + [
        dict(module.named_children()) for module in modules
    ]


@pytest.mark.parametrize("method", one_of_each())
def test_a_peer_changes_runs_and_leaves_no_trace(pipe, reference, method):
    before, scheduler = state(pipe), pipe.scheduler
    drawn = benchmark.observe(pipe, method, PAIRS)
    assert not np.array_equal(drawn.pictures, reference.pictures)
    assert drawn.flops[0] < reference.flops[0]
    assert pipe.scheduler is scheduler
    for now, then in zip(state(pipe), before, strict=True):
        assert list(now) == list(then)
        assert not [name for name in now if now[name] is not then[name]]
    again = benchmark.observe(pipe, REFERENCE, PAIRS)
    assert np.array_equal(again.pictures, reference.pictures)
    if not method.alone:  # then what it does to a pair does not depend on the others
        (first,), flops = (part := benchmark.observe(pipe, method, PAIRS[:1])).pictures, part.flops
        assert np.abs(drawn.pictures[0].astype(int) - first).max() <= 1 and flops == drawn.flops[:1]


def test_a_peer_that_is_not_installed_is_listed_with_its_error(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    methods = peers.line_up(["dbcache"], STEPS, PROMPT)[:1]
    compared = benchmark.compare(pipe, methods, [PROMPT], [0], timed=0)
    assert list(compared.records) == [REFERENCE.key]
    said = "ImportError: DBCache needs cache-dit (in a checkout of lesa: pip install '.[peers]')"
    assert compared.failures[methods[0].key] == said


def test_a_peer_that_breaks_off_leaves_no_trace(pipe, reference):
    (method, *_), before = peers.line_up(["taylorseer"], STEPS, PROMPT), state(pipe)
    with pytest.raises(KeyError), method.switch(pipe):
        raise KeyError
    assert [list(place) for place in state(pipe)] == [list(place) for place in before]


def test_families_have_names():
    with pytest.raises(ValueError, match="nothing"):
        peers.line_up(["taylorseer", "nothing"], STEPS, PROMPT)
    twice = peers.line_up(["pab", "pab"], STEPS, PROMPT)
    assert len(twice) == len({method.key for method in twice}) == len(peers.RANGES)


def test_every_peer_is_made_again_from_its_record():
    for method in [*peers.line_up(list(peers.FAMILIES), STEPS, PROMPT), *on_plan(*peers.FAMILIES)]:
        again = peers.rebuild(method.entry())
        assert (again.key, again.call, again.alone) == (method.key, method.call, method.alone)
        assert again.entry() == method.entry()
    with pytest.raises(LookupError, match="pab"):
        peers.rebuild({"name": "PAB", "schedule": "range 99", "recipe": method.recipe | {"peer": "pab"}})


@pytest.mark.parametrize("method", [m for m in one_of_each() if "@plan" in m.id])
def test_a_peer_on_a_plan_runs_its_last_block_at_the_full_steps_alone(pipe, method):
    calls: list[int] = []
    hook = pipe.transformer.single_transformer_blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    try:
        benchmark.observe(pipe, method, PAIRS[:1])
    finally:
        hook.remove()
    assert len(calls) == len(PLAN.full_steps(STEPS))


def test_hicache_on_a_plan_draws_what_its_rows_draw(pipe):
    pytest.importorskip("hicache_pp")
    (method,) = on_plan("hicache")
    drawn = benchmark.observe(pipe, method, PAIRS[:1])
    with accelerate(pipe, Hermite(1), schedule=PLAN, tap="output"):
        rows = benchmark.observe(pipe, REFERENCE, PAIRS[:1])
    assert np.abs(drawn.pictures[0].astype(int) - rows.pictures[0]).max() <= 1


def test_plans_are_asked_for_rows_like_the_peers_own():
    asked: list[tuple[str, int, str]] = []

    def plan(forecaster: Any, budget: int, tap: str) -> Schedule:
        asked.append((repr(forecaster), budget, tap))
        return PLAN

    lined_up = peers.line_up_planned(["dbcache", "hicache", "taylorseer"], STEPS, PROMPT, [3], plan)
    assert asked == [("Reuse()", 3, "feature"), ("Taylor(order=1)", 3, "feature"), (repr(Hermite(1)), 3, "output")]
    assert {method.schedule for method in lined_up} == {str(PLAN)} and all("@plan" in m.name for m in lined_up)
    only = peers.line_up_planned(["dbcache"], STEPS, PROMPT, [3], plan, only=[lined_up[1].name])
    assert [method.key for method in only] == [lined_up[1].key] and len(asked) == 4


def test_calibration_prints_nothing(pipe, capsys):
    (method, *_) = peers.line_up(["magcache"], STEPS, PROMPT)
    with method.switch(pipe):
        pass
    assert capsys.readouterr().out == ""


# --- what benchmarks do for such methods


def test_flops_are_those_of_the_transformer_with_attention(tiny_flux, pipe):
    watch, model = Watch(pipe), pipe.transformer
    with watch.counting_flops():
        pipe(PROMPT)
    tokens, text, width, heads = 16, 16, 24, 2
    attention = (
        2 * 2 * (tokens + text) ** 2 * width * (len(model.transformer_blocks) + len(model.single_transformer_blocks))
    )
    products = 0

    def see(module, inputs, _output):
        nonlocal products
        products += 2 * inputs[0].numel() * module.out_features

    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [module.register_forward_hook(see) for module in linear]
    pipe(PROMPT)
    for hook in hooks:
        hook.remove()
    assert heads and watch.flops == products + STEPS * attention


def test_parts_of_steps_count_as_full_steps_that_cost_the_same(pipe):
    (method, *_) = peers.line_up(["taylorseer"], STEPS, PROMPT)
    compared = benchmark.compare(pipe, [method], [PROMPT], [0], timed=0)
    result = compared.results()[1]
    share = compared.shares[method.key]
    assert 0.5 < share < 1 and result.full_steps == pytest.approx(share * STEPS)
    assert result.step_ratio == pytest.approx(1 / share)


def test_psnr_is_measured_against_more_steps_too(pipe):
    fine = more_steps(12)
    compared = benchmark.compare(pipe, [fewer_steps(4)], [PROMPT], [0], timed=0, fine=fine)
    against = {key: records[0].scores["PSNR to 12 steps"] for key, records in compared.records.items()}
    assert against[fine.key] == 60.0
    assert against[REFERENCE.key] == compared.records[fine.key][0].psnr


@pytest.mark.parametrize("family", ["unipc", "dpm++"])
def test_a_sampler_has_the_grid_of_the_pipelines_own(pipe, family):
    method = peers.line_up([family], STEPS, PROMPT)[-1]
    with method.switch(pipe):
        pipe(PROMPT, **method.call)
        theirs = pipe.scheduler.sigmas
        assert not isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler)
    pipe(PROMPT, **method.call)
    torch.testing.assert_close(theirs, pipe.scheduler.sigmas, atol=2e-3, rtol=0)
