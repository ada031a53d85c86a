"""The comparison of methods, its stopwatch with a clock of ours, and the bound by hand."""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lesa.bench import benchmark, compare, cost, records, report
from lesa.bench.bound import add_bounds, bound_error, decode
from lesa.bench.cost import Watch
from lesa.bench.lines import Pair, Record, Time
from lesa.bench.methods import (
    BOUND,
    REFERENCE,
    RIVALS,
    Method,
    fewer_steps,
    forecast,
    label,
    line_up,
    line_up_planned,
    rebuild,
)
from lesa.bench.records import Comparison, Log, Result
from lesa.host.pipelines import with_call
from lesa.learn import metrics
from lesa.learn.collect import record
from lesa.learn.metrics import float_psnr, psnr, relative_error
from lesa.predictors import L2P, LESA, Origin, Predictor
from lesa.predictors.solved import Solved
from lesa.rows import plan
from lesa.rows.forecasters import Reuse, Taylor
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

PROMPTS = ["small red apple on white, left", "large blue fish on grey, right", "large green pear on white, left"]
SEEDS = [0, 1, 5]
STEPS = 8
EVERY_OTHER = Schedule.every(2)
REUSE = forecast("reuse", Reuse(), EVERY_OTHER)
FEWER = fewer_steps(4)


@pytest.fixture(scope="module")
def pipe(tiny_flux) -> Any:
    mine = copy.copy(tiny_flux)
    return with_call(mine, dict(height=32, width=32, num_inference_steps=STEPS, max_sequence_length=16))


@pytest.fixture(scope="module")
def comparison(pipe) -> Comparison:
    def recognise(prompts, pictures):
        return ["red" in prompt for prompt in prompts]

    unchanged = forecast("nothing skipped", Taylor(1), Schedule.every(1))
    methods = [FEWER, REUSE, unchanged]
    return benchmark.compare(pipe, methods, PROMPTS, SEEDS, batch_size=2, timed=3, shown=2, recognise=recognise)


@pytest.mark.parametrize("where", ["in the method", "in the pipeline's call"])
def test_a_negative_prompt_goes_with_every_prompt_of_a_batch(tiny_qwen, where):
    call, guided = dict(height=32, width=32, num_inference_steps=2), dict(negative_prompt="fish", true_cfg_scale=3.0)
    in_method = where == "in the method"
    mine = with_call(copy.copy(tiny_qwen), call if in_method else {**call, **guided})
    method, pairs = Method("guided", "every:1", call=guided if in_method else {}), [Pair("pear", 0), Pair("grey", 1)]
    together, _ = benchmark.draw(mine, method, pairs)
    alone = [benchmark.draw(mine, method, [pair])[0][0] for pair in pairs]
    plain, _ = benchmark.draw(mine, Method("plain", "every:1", call=dict(true_cfg_scale=1.0)), pairs)
    for a, b, other in zip(together, alone, plain, strict=True):
        assert np.abs(a.astype(int) - b).max() <= 1
        assert not np.array_equal(a, other)


def result_of(comparison: Comparison, method: str) -> Result:
    return next(result for result in comparison.results() if result.method == method)


def test_full_steps_are_counted_and_ratios_follow(comparison):
    counted = {result.method: (result.full_steps, result.step_ratio) for result in comparison.results()}
    assert counted == {"all full": (8, 1.0), "fewer steps": (4, 2.0), "reuse": (4, 2.0), "nothing skipped": (8, 1.0)}


def test_what_equals_the_reference_counts_as_identical(comparison):
    for name in ("all full", "nothing skipped"):
        assert (result_of(comparison, name).psnr, result_of(comparison, name).ssim) == (60.0, 1.0)
    assert result_of(comparison, "reuse").psnr < 60.0


def test_every_method_runs_the_same_pairs(comparison):
    expected = list(zip(PROMPTS, SEEDS, strict=True))
    for of_method in comparison.records.values():
        assert [(one.prompt, one.seed) for one in of_method] == expected


def test_a_batched_record_is_what_the_pair_gives_alone(pipe, comparison):
    pair = Pair(PROMPTS[2], SEEDS[2])
    (reference,), _ = benchmark.draw(pipe, REFERENCE, [pair])
    (picture,), _ = benchmark.draw(pipe, REUSE, [pair])
    assert comparison.records[REUSE.key][2].psnr == pytest.approx(psnr(picture, reference), abs=0.01)
    plain = pipe(PROMPTS[2], generator=torch.Generator().manual_seed(SEEDS[2])).images[0]
    assert np.array_equal(reference, np.asarray(plain))


def test_drift_is_that_of_the_last_latents(pipe, comparison):
    call = dict(output_type="latent", return_dict=False)

    def latents(method: Method) -> torch.Tensor:
        with method.switch(pipe):
            return pipe(PROMPTS[2], generator=torch.Generator().manual_seed(SEEDS[2]), **call)[0]

    expected = metrics.drift(latents(REUSE), latents(REFERENCE))
    assert comparison.records[REUSE.key][2].scores["drift"] == pytest.approx(expected, abs=0.01)
    assert result_of(comparison, "nothing skipped").scores["drift"] == -metrics.MOST_DRIFT


def test_only_the_first_pictures_are_kept(comparison):
    assert {len(pictures) for pictures in comparison.pictures.values()} == {2}
    assert comparison.pictures[REFERENCE.key][0].shape == (32, 32, 3)


def test_recognised_pictures_are_a_share_of_all(comparison):
    assert result_of(comparison, "reuse").prompted == pytest.approx(1 / 3)


def test_the_pipeline_is_left_as_it_was(pipe, comparison):
    transformer = pipe.transformer
    assert not transformer._forward_pre_hooks and not transformer._forward_hooks
    assert not transformer.single_transformer_blocks[-1]._forward_pre_hooks


def test_results_can_be_written_as_json(comparison):
    assert json.loads(json.dumps([vars(result) for result in comparison.results()]))[0]["method"] == "all full"


def timed(reference: list[float], ours: list[float]) -> Comparison:
    made = Comparison()
    for key, full, seconds in ((REFERENCE.key, 10, reference), (("ours", "every:2"), 4, ours)):
        made.add(Record(*key, "a prompt", 0, 30.0, 0.9, full=tuple(range(full))))
        for seed, loop in enumerate(seconds):
            made.add(Time(*key, "a prompt", seed, loop, loop + 1, skipped=None if seed else 0.5))
    return made


def test_speedups_are_of_the_least_times():
    """Whatever else a machine does makes a run longer: medians on busy cores said that 6 full of 50 were slower."""
    made = timed(reference=[8.0, 8.1, 9.0], ours=[99.0, 2.0, 47.0, 2.1, 48.0])
    assert made.timings["ours", "every:2"] == (2.0, 3.0, 0.5, True)
    result = made.results()[1]
    assert (result.seconds, result.speedup, result.call_seconds, result.call_speedup) == (2.0, 4.0, 3.0, 3.0)
    assert result.step_ratio == 2.5 and result.prompted is None and result.steady


@pytest.mark.parametrize(
    ("reference", "ours"), [([8.0, 8.1], [2.0, 47.0, 48.0]), ([8.0, 47.0], [2.0, 2.1]), ([8.0], [2.0, 2.3])]
)
def test_times_that_do_not_agree_are_no_speedup(reference, ours):
    made = timed(reference, ours)
    result = made.results()[1]
    assert not result.steady and result.speedup is result.seconds is result.call_speedup is None
    text = report.summary(made)
    line = next(line for line in text.splitlines() if line.startswith("| ours"))
    assert [cell.strip() for cell in line.split("|")][5:7] == ["unsteady", "unsteady"]
    assert "- unsteady: the two fastest runs of the method, or of the reference run, are more than 10% apart" in text
    assert "unsteady" not in report.summary(timed([8.0], [2.0]))  # one run has none to agree with


def test_differences_are_paired():
    def of(name, values):
        return [Record(name, "s", "a prompt", seed, value, 1.0) for seed, value in enumerate(values)]

    both = {("a", "s"): of("a", [31.0, 41.0]), ("b", "s"): of("b", [30.0, 40.0])}
    made = Comparison(records=both)
    assert made.difference(("a", "s"), ("b", "s")) == pytest.approx((1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("methods", "prompts", "seeds", "words"),
    [
        ([], [], [], "each prompt"),
        ([], PROMPTS, [0], "each prompt"),
        ([], PROMPTS[:1] * 2, [3, 3], "drawn once"),
        ([REUSE, REUSE], PROMPTS, SEEDS, "differ"),
    ],
)
def test_comparisons_that_cannot_be_are_refused(pipe, methods, prompts, seeds, words):
    with pytest.raises(ValueError, match=words):
        benchmark.compare(pipe, methods, prompts, seeds)


def test_a_comparison_goes_on_where_it_was_killed(pipe, comparison, tmp_path, monkeypatch):
    methods, setting = [FEWER, REUSE], {"pairs": [list(pair) for pair in zip(PROMPTS, SEEDS, strict=True)]}
    options = dict(batch_size=2, timed=0, shown=3)
    drawn: list[str] = []
    observe = benchmark.observe

    def killed(pipe, method, pairs):
        if len(drawn) == 4:
            raise KeyboardInterrupt
        drawn.append(method.name)
        return observe(pipe, method, pairs)

    monkeypatch.setattr(benchmark, "observe", killed)
    with pytest.raises(KeyboardInterrupt), records.writing(tmp_path, setting) as log:
        benchmark.compare(pipe, methods, PROMPTS, SEEDS, log=log, **options)
    assert drawn == ["all full", "fewer steps", "reuse", "all full"]
    drawn.append("killed")
    with records.writing(tmp_path, setting) as log:
        made = benchmark.compare(pipe, methods, PROMPTS, SEEDS, log=log, **options)
    assert drawn[5:] == ["all full", "fewer steps", "reuse"]  # the second batch, and of it the lost reference
    for method in methods:
        ours = [record.psnr for record in made.records[method.key]]
        assert ours == [record.psnr for record in comparison.records[method.key]]
        assert len(made.pictures[method.key]) == 3
    assert len(made.starts) == 2


def test_a_method_is_not_measured_under_the_name_of_another(pipe, comparison):
    log = Log()
    log.comparison = copy.deepcopy(comparison)
    other = forecast("reuse", Taylor(1), EVERY_OTHER)
    with pytest.raises(ValueError, match=r"reuse on every:2 was measured as .*Reuse\(\).*, got .*Taylor"):
        benchmark.compare(pipe, [other], PROMPTS, SEEDS, log=log)


def test_only_what_may_fail_does_not_stop_the_others(pipe):
    def fails(_pipe):
        raise ImportError("no such\npeer")

    peer = Method("a peer", "its own", switch=fails, optional=True)
    made = benchmark.compare(pipe, [peer, REUSE], PROMPTS[:1], SEEDS[:1], timed=0)
    assert made.failures == {peer.key: "ImportError: no such peer"}
    assert REUSE.key in made.records and peer.key not in made.records
    with pytest.raises(ImportError, match="no such"):
        benchmark.compare(pipe, [Method("ours", "s", switch=fails)], PROMPTS[:1], SEEDS[:1], timed=0)


def test_errors_of_the_feature_are_those_of_recorded_runs(pipe, comparison):
    [exact] = record(pipe, PROMPTS[:1], SEEDS[:1], torch.arange)
    with forecast("", Reuse(), EVERY_OTHER).switch(pipe):
        [reused] = record(pipe, PROMPTS[:1], SEEDS[:1], torch.arange)
    pairs = zip(reused.features["cond"], exact.features["cond"], strict=True)
    expected = [relative_error(*pair) for pair in pairs]
    assert expected[0] == 0 < min(expected[1:])
    assert comparison.records[REUSE.key][0].feature_error == pytest.approx(expected, rel=1e-3)
    assert comparison.records[REFERENCE.key][0].feature_error == (0.0,) * STEPS
    assert comparison.records[FEWER.key][0].feature_error == ()  # another grid


def test_cost_is_measured_of_each_method(comparison):
    costs = {key[0]: cost for key, cost in comparison.costs.items()}
    assert costs["reuse"].full == (0, 2, 4, 6) and costs["all full"].full == tuple(range(STEPS))
    full = costs["all full"].flops
    assert full == costs["nothing skipped"].flops == pytest.approx(2 * costs["fewer steps"].flops)
    assert full / 2 < costs["reuse"].flops < 0.6 * full  # a skipped step still embeds and projects
    assert costs["reuse"].bytes_held == 2 * 16 * 24 * 4  # the feature and a scratch for the forecast
    assert costs["all full"].bytes_held is None
    assert costs["reuse"].cuda_peak is None
    assert list(costs["reuse"].plans["cond"]["rows"]) == ["1", "3", "5", "7"] and not costs["fewer steps"].plans


def test_a_method_is_made_again_of_what_records_say(pipe, comparison):
    for method in (REFERENCE, FEWER, REUSE):
        made = rebuild(comparison.entry(method.key))
        assert (made.key, made.call, made.entry()) == (method.key, method.call, method.entry())
    predictor = trained(L2P, "every:2", {})
    ours = forecast("L2P", predictor, EVERY_OTHER)
    assert rebuild(ours.entry(), [trained(L2P, "every:3", {}), predictor]).entry() == ours.entry()
    with pytest.raises(LookupError, match="which is not at hand"):
        rebuild(ours.entry(), [trained(L2P, "every:3", {})])


def test_a_record_can_be_reproduced(pipe, comparison):
    setting = {"pairs": list(zip(PROMPTS, SEEDS, strict=True)), "batch_size": 2}
    then = comparison.records[REUSE.key][1]
    again = benchmark.reproduce(pipe, rebuild(comparison.entry(REUSE.key)), then, setting)
    assert again == replace(then, prompted=None)
    with pytest.raises(ValueError, match="one of the run's pairs"):
        benchmark.reproduce(pipe, REUSE, replace(then, seed=77), setting)


def trained(kind, schedule: str, training: dict, **options) -> Predictor:
    grid = tuple(torch.linspace(1, 0, STEPS + 1).tolist())
    origin = Origin("tiny", "FluxTransformer2DModel", {}, Tap(("blocks",), "norm"), grid, schedule, training=training)
    return kind(origin, **options)


@pytest.mark.parametrize(
    ("kind", "training", "options", "name"),
    [
        (LESA, {"loss": "latents"}, {}, "LESA"),
        (LESA, {"phase": "ground-truth"}, {"remembers_forecasts": True}, "LESA (with forecasts, phase 1)"),
        (LESA, {"loss": "features"}, {}, "LESA (feature loss)"),
        (L2P, {"loss": "steps"}, {}, "L2P (per step)"),
    ],
)
def test_predictors_are_named_by_what_sets_them_apart(kind, training, options, name):
    assert label(trained(kind, "paper:4", training, **options)) == name


def test_the_line_up_has_every_method_on_every_schedule_and_fewer_steps_once():
    schedules = [Schedule.paper(4), Schedule.at([0, 2, 4, 6, 7])]
    predictors = [trained(L2P, "paper:4", {}), trained(L2P, "every:3", {})]
    methods = [method.key for method in line_up(STEPS, schedules, predictors, reuse=True)]
    names = ["reuse", "Taylor-1 (our tap)", "Taylor-2 (our tap)"]
    ours = [*((name, "paper:4") for name in names), ("L2P", "paper:4"), *((name, "at:0,2,4,6,7") for name in names)]
    assert methods == [("fewer steps", "5 steps"), *ours]
    with_rivals = [method.key for method in line_up(STEPS, schedules[:1], rivals=True)]
    assert with_rivals[3:] == [(name, "paper:4") for name in RIVALS]


def test_only_what_is_named_is_planned_for():
    planned = []

    def plan(forecaster, budget, place):
        assert place == "feature"
        planned.append((repr(forecaster), budget))
        return Schedule.at(range(budget))

    grid = torch.linspace(1, 0, STEPS + 1)
    everything = line_up_planned([2, 3], grid, plan)
    assert len(everything) == len(planned) + 2 == 14 + 2 * len(RIVALS)
    assert {repr(one) for one in RIVALS.values()} < {name for name, _ in planned}
    assert len(line_up_planned([2, 3], grid, plan, rivals=False)) == 14
    del planned[:]
    few = line_up_planned([2, 3], grid, plan, only=["Taylor-2 (our tap)"])
    assert planned == [("Taylor(order=2)", 2), ("Taylor(order=2)", 3)]
    assert [method.name for method in few] == ["fewer steps", "Taylor-2 (our tap)"] * 2


def test_what_needs_no_training_is_measured_wherever_a_predictor_taps():
    ours = trained(L2P, "at:0,2,5", {})
    ours.origin = replace(ours.origin, tap=Tap(("blocks",), None))
    grid, places = ours.grid, []

    def plan(_forecaster, budget, place):
        places.append(place)
        return Schedule.at(range(budget))

    lined_up = line_up_planned([3, 2], grid, plan, [ours])
    names = [method.name for method in lined_up]
    assert names.count("Lagrange-3 (output tap)") == names.count("reuse (output tap)") == 1  # at 3 full steps alone
    each = 6 + len(RIVALS)
    assert names.count("Lagrange-3") == 2
    assert places == ["feature"] * each + ["output"] * each + ["feature"] * each
    on_schedule = line_up(STEPS, [ours.schedule, EVERY_OTHER], [ours])
    assert [method.name for method in on_schedule].count("Taylor-2 (output tap)") == 1
    assert {"FoCa (output tap)", "Spectrum (output tap)"} < set(names)
    for method in (one for one in [*lined_up, *on_schedule] if "forecaster" in one.recipe):
        assert rebuild(method.entry()).entry() == method.entry()
        assert method.recipe.get("tap") == ("output" if "output" in method.name else None)


# --- time, on a clock that only the hooks below move


class Clock:
    now = 0.0

    def advance(self, seconds: float) -> Any:
        def hook(*_):
            self.now += seconds

        return hook


@pytest.fixture
def clock(pipe, monkeypatch) -> Iterator[Clock]:
    """A step of the transformer takes 3 s, encoding 100 s, decoding 1000 s; the rest takes no time."""
    clock = Clock()
    for room in (benchmark, cost):
        monkeypatch.setattr(room, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    decoder = pipe.vae.decoder.register_forward_hook(clock.advance(1000.0))
    hooks = [
        pipe.transformer.register_forward_hook(clock.advance(3.0)),
        pipe.text_encoder_2.register_forward_hook(clock.advance(100.0)),
        decoder,
    ]
    yield clock
    for hook in hooks:
        hook.remove()


def test_the_loop_is_timed_without_encoding_and_decoding(pipe, clock):
    benchmark.time_methods(pipe, [REFERENCE, FEWER, REUSE], [Pair(PROMPTS[0], 0)], log := Log())
    times = log.comparison.timings
    assert times[REFERENCE.key] == (24.0, 1124.0, None, True)
    assert times[FEWER.key] == (12.0, 1112.0, None, True)
    assert times[REUSE.key] == (24.0, 1124.0, 3.0, True)  # this clock moves on skipped steps as on full ones


def test_methods_take_turns_and_each_turn_warms_up(pipe, monkeypatch):
    calls: list[tuple[str, int]] = []
    inside: list[str] = []

    def method(name):
        @contextmanager
        def switch(_pipe):
            inside.append(name)
            yield
            inside.pop()

        return Method(name, "s", switch=switch)

    def timed(_pipe, _method, pair, _watch):
        calls.append((inside[-1], pair.seed))
        return 1.0, 2.0

    monkeypatch.setattr(benchmark, "_time", timed)
    pairs = [Pair("p", seed) for seed in range(3)]
    benchmark.time_methods(pipe, [method("a"), method("b")], pairs, Log())
    assert calls == [("a", 0), ("a", 0), ("a", 1), ("b", 0), ("b", 0), ("b", 1), ("a", 2), ("a", 2), ("b", 2), ("b", 2)]


def test_a_warm_up_is_not_among_the_times(pipe, monkeypatch):
    seconds = iter([0.1, 1.0, 3.0, 0.1, 2.0])
    monkeypatch.setattr(benchmark, "_time", lambda *_: (next(seconds), 0.0))
    benchmark.time_methods(pipe, [REFERENCE], [Pair("p", seed) for seed in range(3)], log := Log())
    assert [time.loop for time in log.comparison.times[REFERENCE.key]] == [1.0, 3.0, 2.0]


def test_times_are_of_one_thread(pipe, monkeypatch):
    """Two threads that wait for each other on busy cores take many times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        monkeypatch.setattr(benchmark, "_time", lambda *_: (float(torch.get_num_threads()), 0.0))
        benchmark.time_methods(pipe, [REFERENCE], [Pair("p", 0)], log := Log())
        assert log.comparison.timings[REFERENCE.key].loop == 1.0 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_calibrated_rows_are_methods_beside_the_predictors(pipe):
    solved, ours = trained(Solved, "at:0,3,6", {}), trained(LESA, "at:0,3,6", {})
    options = dict(schedules=[Schedule.every(2)], budgets=[], rows={})
    lined_up = compare.line_up(pipe, compare.CompareOptions(predictors=[ours], calibrated=[solved], **options))
    kept = [method for method in lined_up if method.name == "calibrated"]
    assert [method.schedule for method in kept] == ["at:0,3,6"] and kept[0].recipe == {"predictor": solved.digest()}
    assert "LESA" in {method.name for method in lined_up}
    for one in (True, False):
        shown = compare.CompareOptions(predictors=[], calibrated=[solved] if one else [], **options)
        assert ("calibrated" in {method.name for method in compare.line_up(pipe, shown)}) is one


def test_a_step_is_full_if_a_block_ran_in_any_of_its_streams(pipe):
    watch = Watch(pipe)
    with watch.counting():
        pipe(PROMPTS[0], negative_prompt="fish", true_cfg_scale=2.0, callback_on_step_end=watch.on_step_end)
    assert watch.full_steps == STEPS


def test_a_pipeline_of_before_callbacks_on_step_end_is_watched(pipe):
    """Its `callback` is told of the same steps."""

    class Before(type(pipe)):
        def __call__(self, prompt, callback, **call):
            def tell(_pipe, step, time, tensors):
                callback(step, time, tensors["latents"])
                return tensors

            return super().__call__(prompt, callback_on_step_end=tell, **call)

    before = Before(**pipe.components)
    pairs = [Pair(PROMPTS[0], 0)]
    told, known = benchmark.observe(before, REUSE, pairs), benchmark.observe(pipe, REUSE, pairs)
    assert told.full == known.full and torch.equal(told.latents, known.latents)


@pytest.mark.parametrize("place", ["feature", "output"])
def test_what_skipped_steps_take_is_counted_at_each_tap(pipe, clock, place):
    """The plan of a run is made in its first step, before any forward."""

    class Slow(Reuse):
        def row(self, *about):
            clock.now += 0.5
            return super().row(*about)

    with forecast("slow", Slow(), EVERY_OTHER, place).switch(pipe):
        counted, timed = Watch(pipe), Watch(pipe)
        with counted.counting(), counted.counting_flops(), timed.timing():
            pipe(
                PROMPTS[0], callback_on_step_end=lambda *state: counted.on_step_end(*state) | timed.on_step_end(*state)
            )
    assert counted.full == [0, 2, 4, 6] and counted.flops > 0
    steps = timed.step_seconds()
    assert steps[0] == 3.0 + 4 * 0.5
    assert steps[1:] == [0.0 if step % 2 and place == "output" else 3.0 for step in range(1, STEPS)]
    assert timed.seconds == sum(steps)


def test_the_machine_is_described():
    described = cost.machine()
    assert described["torch"] == torch.__version__ and described["cores"] >= 1 and described["cpu"]
    assert described["date"].startswith("20")


# --- the bound


def test_the_bound_is_what_lies_outside_the_full_outputs():
    grid = torch.tensor([1.0, 0.6, 0.5, 0.0])
    outputs = torch.tensor([[1.0, 0.0], [2.0, 4.0], [5.0, 6.0]]).view(1, 3, 1, 2)
    # skipped: -0.1 (2, 4) - 0.5 (5, 6) = (-2.7, -3.4), of which (1, 0) gives the first number
    error = bound_error(outputs, grid, [0])
    torch.testing.assert_close(error, torch.tensor([[[0.0, 3.4]]], dtype=torch.float64), atol=1e-6, rtol=0)


def test_the_bound_is_zero_where_skipped_outputs_are_shared_mixtures_of_full_ones():
    random = torch.Generator().manual_seed(0)
    full = torch.randn(3, 2, 5, 4, generator=random, dtype=torch.float64)
    outputs = torch.stack([full[:, 0], 0.3 * full[:, 0] + 2 * full[:, 1], full[:, 1], -full[:, 0]], dim=1)
    error = bound_error(outputs, torch.tensor([1.0, 0.8, 0.4, 0.3, 0.0]), [0, 2])
    assert error.abs().max() < 1e-12 and error.shape == (3, 5, 4)


@pytest.mark.parametrize("forecaster", [Reuse(), Taylor(1), Taylor(2)])
def test_no_plan_on_recorded_outputs_beats_the_bound(forecaster):
    grid = torch.linspace(1, 0, 13, dtype=torch.float64)
    random = torch.Generator().manual_seed(1)
    outputs = torch.randn(4, 12, 6, 3, generator=random, dtype=torch.float64).cumsum(1)
    made = plan.compile(forecaster, grid, Schedule.paper(4))
    forecasts = torch.einsum("sk,pknc->psnc", made.unroll()[:, :-1], outputs)
    error = torch.einsum("s,psnc->pnc", grid.diff(), forecasts - outputs)
    assert bound_error(outputs, grid, made.full).norm() < error.norm()


def test_final_latents_decode_to_the_picture_of_their_run(pipe):
    pairs = benchmark.pair_up(PROMPTS[:2], SEEDS[:2])
    pictures, _ = benchmark.draw(pipe, REFERENCE, pairs)
    latents = torch.stack([run.latents[-1] for run in record(pipe, PROMPTS[:2], SEEDS[:2], torch.arange)])
    for decoded, picture in zip(decode(pipe, pairs, latents), pictures, strict=True):
        assert decoded.dtype == np.float32 and np.array_equal(benchmark.rounded(decoded), picture)


def test_pictures_are_those_that_the_pipeline_draws_and_their_floats_are_measured(pipe):
    """8-bit pictures are to the bit what they were when the pipeline rounded them."""
    pairs = benchmark.pair_up(PROMPTS[:2], SEEDS[:2])
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[:2]]
    theirs = pipe(PROMPTS[:2], generator=generators, output_type="pil").images
    reference, drawn = (benchmark.observe(pipe, method, pairs) for method in (REFERENCE, REUSE))
    for ours, image in zip(reference.pictures, theirs, strict=True):
        assert np.array_equal(ours, np.asarray(image))
    scored = benchmark.score(REUSE.key, pairs, drawn, reference)
    assert [one.scores["float PSNR"] for one in scored] == [
        float_psnr(*both) for both in zip(drawn.decoded, reference.decoded, strict=True)
    ]
    as_integers = drawn._replace(decoded=drawn.pictures)
    assert "float PSNR" not in benchmark.score(REUSE.key, pairs, as_integers, reference)[0].scores


def test_bounds_join_a_comparison(pipe, comparison):
    log = Log()
    log.comparison = mine = copy.deepcopy(comparison)
    schedules = [EVERY_OTHER, Schedule.every(1)]
    add_bounds(log, pipe, PROMPTS, SEEDS, schedules, batch_size=2)
    some, none = [result for result in mine.results() if result.method == BOUND]
    assert (some.full_steps, none.full_steps) == (4, 8)
    assert none.scores["drift"] < some.scores["drift"] < result_of(mine, "reuse").scores["drift"]
    assert result_of(mine, "reuse").psnr < some.psnr < none.psnr == 60.0
    assert [(one.prompt, one.seed) for one in mine.records[BOUND, "every:2"]] == list(zip(PROMPTS, SEEDS, strict=True))


@pytest.mark.parametrize(("noise", "taps"), [(False, {None}), (True, {"output"})])
def test_rows_under_a_sampler_that_adds_noise_are_at_the_output(pipe, noise, taps):
    """The data prediction is forecast there alone."""
    other = copy.copy(pipe)
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, stochastic_sampling=noise)
    options = compare.CompareOptions(schedules=[Schedule.every(2)], budgets=[], predictors=[])
    rows = [method.recipe for method in compare.line_up(other, options) if "forecaster" in method.recipe]
    assert rows and {recipe.get("tap") for recipe in rows} == taps
