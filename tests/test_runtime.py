import copy
import gc
import inspect
import pickle
import threading
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxImg2ImgPipeline, FluxPipeline, UniPCMultistepScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from tiny import build_transformer
from torch import Tensor, nn

from lesa.host.intercept import intercept
from lesa.host.pipelines import with_call
from lesa.host.runtime import StreamSummary, Summary, disable, enable
from lesa.host.runtime import accelerate as accelerate_at_output
from lesa.host.tap import tap_of
from lesa.predictors import LESA, Origin, configuration
from lesa.rows.detour import Detour
from lesa.rows.forecasters import Forecaster, Lagrange, LinearRows, Reuse, Taylor
from lesa.rows.plan import Plan
from lesa.rows.plan import compile as compile_plan
from lesa.rows.row import Row
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

PROMPT, OTHER = "small red apple on white, left", "large green fish on grey, right"
STEPS = 8
EVERY = Schedule.every(3)  # full at 0, 3, 6
GUIDED = dict(negative_prompt="fish", true_cfg_scale=3.0)
FEATURE_BYTES = 16 * 24 * 4  # 16 image tokens, 24 channels, float32; fewer elements than the scratch may have


def accelerate(pipe, *arguments, tap="feature", **options):
    """Accelerate at the feature tap, where the blocks show what ran."""
    return accelerate_at_output(pipe, *arguments, tap=tap, **options)


class MeanOfTwo(Forecaster):
    """A stand-in for a learned forecaster: its history holds its own forecasts."""

    memory, remembers_forecasts = 2, True

    def __repr__(self):
        return "MeanOfTwo()"

    def row(self, grid, step, past):
        coefficients = torch.full((len(past),), 1.0 / len(past), dtype=torch.float64)
        return Row(coefficients, torch.tensor(0.25, dtype=torch.float64))


FORECASTERS = [Reuse(), Taylor(1), Taylor(2), Lagrange(2), MeanOfTwo()]


def draw(pipe, prompt=PROMPT, seed=0, **changes) -> Tensor:
    """The latents of a call, one per picture."""
    call = dict(height=32, width=32, num_inference_steps=STEPS, max_sequence_length=16, output_type="latent")
    return pipe(prompt, **{**call, "generator": torch.Generator().manual_seed(seed), **changes}).images


def repaint(pipe, strength=0.5, **changes) -> Tensor:
    image = torch.linspace(0, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    return draw(pipe, image=image, strength=strength, **changes)


def state(transformer: nn.Module) -> dict:
    """Everything that an acceleration could leave behind."""
    return {
        name: (type(part), sorted(part.__dict__), {k: list(v) for k, v in part.__dict__.items() if "_hooks" in k})
        for name, part in transformer.named_modules()
    }


@contextmanager
def kept_as_it_was(transformer: nn.Module):
    before, weights = state(transformer), {k: t.clone() for k, t in transformer.state_dict().items()}
    yield
    assert state(transformer) == before
    assert transformer.state_dict().keys() == weights.keys()
    assert all(torch.equal(t, weights[k]) for k, t in transformer.state_dict().items())


@pytest.fixture(scope="module")
def reference(tiny_flux) -> Tensor:
    return draw(tiny_flux)


@pytest.fixture
def pipe(tiny_flux, reference):
    """The tiny pipeline, which must be left as it was."""
    with kept_as_it_was(tiny_flux.transformer):
        yield tiny_flux
    assert torch.equal(draw(tiny_flux), reference)


def another(pipe, kind=FluxPipeline, **parts):
    """A pipeline of other parts, with a scheduler of its own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    made = kind(**{k: v for k, v in pipe.components.items() if v is not None} | {"scheduler": scheduler} | parts)
    made.set_progress_bar_config(disable=True)
    return made


def all_blocks(transformer: nn.Module) -> list[nn.Module]:
    return [*transformer.transformer_blocks, *transformer.single_transformer_blocks]


@contextmanager
def counted(transformer: nn.Module, poisoned=()):
    """Count the blocks that run in each call of the transformer; in the poisoned calls they give NaN."""
    counts: list[int] = []

    def count(_block, _args, output):
        counts[-1] += 1
        if len(counts) - 1 in poisoned:
            return tuple(torch.full_like(part, torch.nan) for part in output)
        return None

    hooks = [transformer.register_forward_pre_hook(lambda *_: counts.append(0))]
    hooks += [block.register_forward_hook(count) for block in all_blocks(transformer)]
    yield counts
    for hook in hooks:
        hook.remove()


@contextmanager
def recorded(transformer: nn.Module):
    """Record, in each call of the transformer, the feature that reaches the final norm."""
    features: list[Tensor] = []
    hook = transformer.norm_out.register_forward_pre_hook(lambda _, args: features.append(args[0].double()))
    yield features
    hook.remove()


def at_step(step: int, act):
    """A callback that acts once, after a step."""

    def callback(pipe, now, _time, tensors):
        if now == step:
            act(pipe)
        return tensors

    return callback


# --- what a skipped step does


def test_no_block_runs_on_a_skipped_step(pipe):
    with accelerate(pipe, Taylor(1), schedule=EVERY):
        expected = draw(pipe)
        with counted(pipe.transformer, poisoned=(1, 2, 4, 5, 7)) as counts:
            assert torch.equal(draw(pipe), expected)
    assert counts == [4, 0, 0, 4, 0, 0, 4, 0]
    assert expected.isfinite().all()


def test_poisoned_blocks_would_show(pipe):
    with counted(pipe.transformer, poisoned=(1,)):
        assert draw(pipe).isnan().all()


def test_everything_else_of_the_forward_runs_on_every_step(pipe):
    counts = dict.fromkeys(
        ["x_embedder", "time_text_embed", "context_embedder", "pos_embed", "norm_out", "proj_out"], 0
    )

    def counting(name):
        def count(*_):
            counts[name] += 1

        return count

    hooks = [getattr(pipe.transformer, name).register_forward_hook(counting(name)) for name in counts]
    with accelerate(pipe, Reuse(), schedule=EVERY):
        draw(pipe)
    assert set(counts.values()) == {STEPS}
    for hook in hooks:
        hook.remove()


def test_a_transformer_that_others_watch_is_accelerated_again_after_a_run_was_closed(pipe):
    """The mark of an instance stays while anybody watches it; the run on it does not."""
    undo = intercept(pipe.transformer, "__call__", lambda go_on, _transformer, *args, **kwargs: go_on(*args, **kwargs))
    try:
        for _ in range(2):
            with accelerate(pipe, Reuse(), schedule=EVERY):
                pass
    finally:
        undo()


@pytest.mark.parametrize("forecaster", FORECASTERS, ids=repr)
def test_with_every_step_full_nothing_changes(pipe, reference, forecaster):
    with accelerate(pipe, forecaster, schedule=Schedule.every(1)) as run:
        assert torch.equal(draw(pipe), reference)
    assert run.summary()["cond"].bytes_held == 0


@pytest.mark.parametrize("forecaster", FORECASTERS, ids=repr)
def test_a_run_is_what_its_plan_says(pipe, reference, forecaster):
    with accelerate(pipe, forecaster, schedule=EVERY) as run:
        with recorded(pipe.transformer) as features:
            assert not torch.allclose(draw(pipe), reference, atol=1e-4)
        plan = run.plan()
    assert plan.full == (0, 3, 6)
    assert_unrolled(plan, features)


def assert_unrolled(plan, features: list[Tensor]) -> None:
    """Each feature is the plan's combination of the full steps' features."""
    stacked, unrolled = torch.stack(features), plan.unroll()
    forecast = torch.einsum("sk,k...->s...", unrolled[:, :-1], stacked) + unrolled[:, -1].view(-1, 1, 1, 1)
    torch.testing.assert_close(stacked, forecast, rtol=0, atol=1e-5 * float(plan.noise_gain().max()))


def test_a_frozen_plan_runs_as_its_forecaster(pipe):
    with accelerate(pipe, MeanOfTwo(), schedule=EVERY) as run:
        expected = draw(pipe)
    frozen = run.plan().freeze()
    assert isinstance(frozen, LinearRows)
    with accelerate(pipe, frozen, schedule=EVERY):
        assert torch.equal(draw(pipe), expected)


def test_forecasts_are_stored_in_bfloat16_and_summed_in_float32():
    transformer = build_transformer().to(torch.bfloat16)
    with accelerate(transformer, Taylor(2), schedule=Schedule.every(5, warmup=3), grid=GRID) as run:
        with recorded(transformer) as features:
            walk(transformer, run, dtype=torch.bfloat16)
        row = run.plan().rows[6]
        exact = sum(c * features[k] for k, c in zip(row.past, row.coefficients, strict=True))
    assert sum(map(abs, row.coefficients)) > 30
    assert ((features[6] - exact).abs() <= exact.abs() * 2.0**-8 * 1.01 + 1e-5).all(), "rounded once"
    assert run.summary()["cond"].bytes_held == 3 * FEATURE_BYTES // 2 + FEATURE_BYTES


# --- at the output


def test_at_the_output_a_skipped_step_runs_no_part_of_the_transformer(pipe):
    parts = [part for part in pipe.transformer.modules() if part is not pipe.transformer]
    calls: list[set] = []
    hooks = [pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(set()))]
    hooks += [part.register_forward_pre_hook(lambda part, _: calls[-1].add(part)) for part in parts]
    with accelerate(pipe, Taylor(1), schedule=EVERY, tap="output") as run:
        assert draw(pipe).isfinite().all()
    assert [bool(called) for called in calls] == [True] * 3  # nor are its hooks called on the others
    assert (run.summary()["cond"].full_steps, run.summary()["cond"].skipped_steps) == (3, 5)
    for hook in hooks:
        hook.remove()


@contextmanager
def returned(transformer: nn.Module):
    """Record what each call of the transformer returns."""
    outputs: list[Tensor] = []

    def record(go_on, _transformer, *args, **kwargs):
        output = go_on(*args, **kwargs)
        outputs.append(output[0].clone())
        return output

    undo = intercept(transformer, "__call__", record)
    yield outputs
    undo()


@pytest.mark.parametrize("forecaster", FORECASTERS, ids=repr)
def test_at_the_output_a_run_is_what_its_plan_says(pipe, reference, forecaster):
    with accelerate(pipe, forecaster, schedule=EVERY, tap="output") as run, returned(pipe.transformer) as outputs:
        assert not torch.allclose(draw(pipe), reference, atol=1e-4)
    assert run.plan().full == (0, 3, 6)
    assert_unrolled(run.plan(), [output.double() for output in outputs])


def test_reuse_at_the_output_returns_the_last_output(pipe):
    with accelerate(pipe, Reuse(), schedule=EVERY, tap="output"), returned(pipe.transformer) as outputs:
        draw(pipe)
    for step in (1, 2, 4, 5, 7):
        assert torch.equal(outputs[step], outputs[step - step % 3])
    assert not torch.equal(outputs[3], outputs[0])


def test_where_the_rest_of_the_forward_is_affine_both_taps_agree():
    """An affine map, that is, and rows that sum to one."""
    transformer = Still()
    ends = {}
    for tap in (Tap(("blocks",), "norm_out"), Tap(("blocks",), None)):
        with accelerate(transformer, Taylor(2), schedule=Schedule.every(3, warmup=3), grid=GRID, tap=tap) as run:
            x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 3, 4)
            for step in range(STEPS):
                run.at(step)
                x = x + float(GRID[step + 1] - GRID[step]) * transformer(x)
        ends[tap] = x
    feature, output = ends.values()
    torch.testing.assert_close(feature, output, rtol=0, atol=1e-9)
    assert not torch.allclose(feature, torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(1, 3, 4))


class Still(nn.Module):
    """What follows its block is affine."""

    def __init__(self):
        super().__init__()
        self.blocks, self.norm_out = nn.ModuleList([nn.Tanh()]), nn.Linear(4, 4).double().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.norm_out(x)


def test_at_the_output_guided_streams_never_mix(pipe):
    with accelerate(pipe, MeanOfTwo(), schedule=EVERY, tap="output") as run, returned(pipe.transformer) as outputs:
        draw(pipe, **GUIDED)
    for name, felt in (("cond", outputs[0::2]), ("uncond", outputs[1::2])):
        assert_unrolled(run.plan(name), [output.double() for output in felt])


@pytest.mark.parametrize("name", ["several images", "wide", "guided batch"])
def test_at_the_output_calls_of_all_kinds_are_unchanged_with_every_step_full(pipe, name):
    expected = drawn_as(pipe, name)
    with accelerate(pipe, Taylor(1), schedule=Schedule.every(1), tap="output"):
        assert torch.equal(drawn_as(pipe, name), expected)


@pytest.mark.parametrize("return_dict", [False, True])
def test_at_the_output_a_skipped_step_answers_as_a_full_one(return_dict):
    transformer, kinds = build_transformer(), set()
    with accelerate(transformer, Reuse(), schedule=EVERY, grid=GRID, tap="output") as run:
        for step in range(3):
            run.at(step)
            output = transformer(torch.zeros(1, 16, 16), **step_inputs(0.5) | {"return_dict": return_dict})
            kinds.add(type(output))
            assert output[0].shape == (1, 16, 16)
    assert kinds == {Transformer2DModelOutput if return_dict else tuple}


def test_at_the_output_a_failure_leaves_the_transformer_as_it_was(pipe):
    for step, failure in ((0, ValueError("fails")), (4, KeyboardInterrupt())):

        def fail(_pipe, failure=failure):
            raise failure

        with pytest.raises(type(failure)), accelerate(pipe, Taylor(1), schedule=EVERY, tap="output"):
            draw(pipe, callback_on_step_end=at_step(step, fail))

    def fail_in_a_block(*_):
        raise ZeroDivisionError

    hook = pipe.transformer.single_transformer_blocks[1].register_forward_hook(fail_in_a_block)
    with accelerate(pipe, Taylor(1), schedule=EVERY, tap="output"):
        with pytest.raises(ZeroDivisionError):
            draw(pipe)
        hook.remove()
        first = draw(pipe)
        assert torch.equal(draw(pipe), first)


@pytest.mark.parametrize("tap", ["feature", "output"])
def test_a_shape_that_changes_during_a_run_starts_with_a_full_step(tap):
    transformer = build_transformer()
    with accelerate(transformer, Taylor(1), schedule=EVERY, grid=GRID, tap=tap) as run:
        full = []
        for step, tokens in enumerate((16, 16, 12, 12, 12, 16)):
            call_at(transformer, run, step, tokens=tokens)
            full.append(run.summary()["cond"].full_steps)
        plan = run.plan()
    assert full == [1, 1, 2, 3, 3, 4]  # 0, 2 (changed), 3, 5 (changed again)
    assert plan.start == 5 and plan.full == (5, 6)


# --- histories


STORED = ["model", "int8", "fp8", "cpu", "int8-cpu", "fp8-cpu"]


class Sparse(Forecaster):
    """Its rows use two of five past features, the newest and one that changes from step to step."""

    memory = 5

    def __repr__(self):
        return "Sparse()"

    def __init__(self, remembers_forecasts: bool):
        self.remembers_forecasts = remembers_forecasts

    def row(self, grid, step, past):
        coefficients = torch.zeros(len(past), dtype=torch.float64)
        coefficients[-1] += 1.5
        coefficients[(3 * step) % len(past)] -= 0.5
        return Row(coefficients, torch.tensor(0.0, dtype=torch.float64))


@pytest.mark.parametrize("tap", ["feature", "output"])
@pytest.mark.parametrize("forecaster", [*FORECASTERS, Sparse(True), Sparse(False)], ids=lambda one: type(one).__name__)
def test_what_is_let_go_changes_no_forecast(pipe, forecaster, tap, monkeypatch):
    schedule = Schedule.at([0, 1, 2, 4, 6])
    with accelerate(pipe, forecaster, schedule=schedule, tap=tap, history="cpu") as run:
        expected, held = draw(pipe), run.summary()["cond"].bytes_held
    everything = {step: tuple(range(step + 1)) for step in range(STEPS)}
    monkeypatch.setattr(Plan, "live", lambda *_: everything)
    with accelerate(pipe, forecaster, schedule=schedule, tap=tap) as run:
        assert torch.equal(draw(pipe), expected)
        assert run.summary()["cond"].bytes_held > held


@pytest.mark.parametrize("history", STORED)
def test_bytes_held_are_those_of_the_features_in_use(pipe, history):
    with accelerate(pipe, Sparse(False), schedule=Schedule.at([0, 1, 2, 4, 6]), history=history) as run:
        draw(pipe)
        live = run.plan().live(history.startswith(("int8", "fp8")))
    most = max(map(len, live.values()))
    older = FEATURE_BYTES // 4 + 16 * 4 if history.startswith(("int8", "fp8")) else FEATURE_BYTES
    assert 2 <= most < 5
    assert run.summary()["cond"].bytes_held == FEATURE_BYTES + (most - 1) * older + FEATURE_BYTES


@pytest.mark.parametrize("tap", ["feature", "output"])
@pytest.mark.parametrize("forecaster", [Taylor(2), MeanOfTwo(), Sparse(True)], ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("history", STORED)
def test_each_history_draws_nearly_the_same(pipe, forecaster, tap, history):
    schedule = Schedule.at([0, 1, 2, 4, 6])
    with accelerate(pipe, forecaster, schedule=schedule, tap=tap):
        expected = draw(pipe)
    with accelerate(pipe, forecaster, schedule=schedule, tap=tap, history=history):
        drawn = draw(pipe)
        assert torch.equal(draw(pipe), drawn)
    error = float((drawn - expected).norm() / expected.norm())
    assert error == 0.0 if history in ("model", "cpu") else 0 < error < 0.02


@pytest.mark.parametrize("call", [{}, GUIDED], ids=["one stream", "two streams"])
@pytest.mark.parametrize("history", ["model", "int8"])
@pytest.mark.parametrize("forecaster", [Reuse(), Taylor(2), Lagrange(3)], ids=repr)
def test_an_unusual_run_takes_its_detour_and_draws_what_that_schedule_draws(pipe, forecaster, history, call):
    longer, options = Schedule.at([0, 2, 4, 5]), dict(schedule=Schedule.at([0, 2, 5]), history=history)
    with accelerate(pipe, forecaster, schedule=longer, history=history):
        wanted = draw(pipe, **call)
    with accelerate(pipe, forecaster, **options):
        usual = draw(pipe, **call)
    with accelerate(pipe, forecaster, **options, detours={2: Detour(-1.0, longer)}) as run:
        found, again = draw(pipe, **call), draw(pipe, **call)
        done = run.summary()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0 if history == "model" else 2e-2)
    torch.testing.assert_close(again, found, rtol=0, atol=0)
    assert not torch.equal(found, usual)
    assert {s.detours for s in done.values()} == {2} and {s.full_steps for s in done.values()} == {8}
    with accelerate(pipe, forecaster, **options, detours={2: Detour(1e9, longer)}) as run:
        assert torch.equal(draw(pipe, **call), usual)
        assert all(s.detours == 0 and s.full_steps == 3 for s in run.summary().values())


def test_the_limit_of_a_detour_is_the_relative_error_of_the_whole_feature(pipe):
    felt = {}

    def keep(_norm, args):
        felt[len(felt)] = args[0]

    norm = pipe.transformer.norm_out.register_forward_pre_hook(keep)
    with accelerate(pipe, Taylor(1), schedule=Schedule.at([0, 1, 4])):
        draw(pipe)
    norm.remove()
    forecast = felt[1] + 3 * (felt[1] - felt[0])
    error = float((forecast - felt[4]).norm() / felt[4].norm())
    longer = Schedule.at([0, 1, 4, 6])
    for limit, taken in ((error * 1.001, 0), (error * 0.999, 1)):
        detours = {4: Detour(limit, longer)}
        with accelerate(pipe, Taylor(1), schedule=Schedule.at([0, 1, 4]), detours=detours) as run:
            draw(pipe)
        assert run.summary()["cond"].detours == taken


def test_the_first_detour_counts(pipe):
    detours = {2: Detour(-1.0, Schedule.at([0, 2, 3, 5])), 5: Detour(-1.0, Schedule.at([0, 2, 5, 6]))}
    with accelerate(pipe, Reuse(), schedule=Schedule.at([0, 2, 5]), detours=detours) as run:
        draw(pipe)
        assert run.plan().full == (0, 2, 3, 5) and run.summary()["cond"].detours == 1


def test_an_unknown_history_is_refused(pipe):
    with pytest.raises(ValueError, match=r"stored as one of model, int8, .* got 'int3'"):
        accelerate(pipe, Taylor(1), schedule=EVERY, history="int3")


# --- on and off


def test_enable_and_disable_are_plain_calls(pipe, reference):
    run = enable(pipe, Taylor(1), schedule=EVERY, tap="feature")
    with counted(pipe.transformer) as counts:
        draw(pipe)
        draw(pipe)
    assert counts == [4, 0, 0, 4, 0, 0, 4, 0] * 2
    disable(pipe)
    assert torch.equal(draw(pipe), reference)
    disable(pipe)
    assert run.summary()["cond"].runs == 2


FAILURES = [ValueError("a test fails here"), KeyboardInterrupt()]


@pytest.mark.parametrize("failure", FAILURES, ids=["exception", "interruption"])
@pytest.mark.parametrize(
    ("name", "call"),
    [("single_transformer_blocks.1", 1), ("time_text_embed", 1), ("time_text_embed", 5), ("norm_out", 2)],
    ids=["in a block", "before the blocks", "in a skipped step", "after the tap"],
)
def test_a_failure_in_the_transformer_leaves_it_as_it_was(pipe, name, call, failure):
    module, calls = pipe.transformer.get_submodule(name), []

    def fail(*_):
        calls.append(name)
        if len(calls) > call:
            raise failure

    hook = module.register_forward_hook(fail)
    with pytest.raises(type(failure)), accelerate(pipe, Taylor(1), schedule=EVERY):
        draw(pipe)
    hook.remove()


@pytest.mark.parametrize("failure", FAILURES, ids=["exception", "interruption"])
def test_a_failure_in_a_callback_leaves_it_as_it_was(pipe, failure):
    def fail(_pipe):
        raise failure

    with pytest.raises(type(failure)), accelerate(pipe, Taylor(1), schedule=EVERY):
        draw(pipe, callback_on_step_end=at_step(4, fail))


@pytest.mark.parametrize("failure", FAILURES, ids=["exception", "interruption"])
def test_an_accelerated_pipeline_runs_on_after_a_failure(pipe, failure):
    def fail(_pipe):
        raise failure

    with accelerate(pipe, Taylor(1), schedule=EVERY):
        expected = draw(pipe)
        for step in (0, 4, 7):
            with pytest.raises(type(failure)):
                draw(pipe, callback_on_step_end=at_step(step, fail))
            assert torch.equal(draw(pipe), expected)


def test_a_transformer_is_accelerated_once(pipe):
    with accelerate(pipe, Taylor(1), schedule=EVERY):
        with pytest.raises(ValueError, match=r"call lesa\.disable first"):
            accelerate(pipe.transformer, Taylor(1), schedule=EVERY, grid=GRID)
        with counted(pipe.transformer) as counts:
            draw(pipe)
        assert counts == [4, 0, 0, 4, 0, 0, 4, 0]


def test_an_ended_acceleration_does_not_end_the_next(pipe):
    with accelerate(pipe, Taylor(1), schedule=EVERY):
        disable(pipe)
        enable(pipe, Reuse(), schedule=EVERY, tap="feature")
    with counted(pipe.transformer) as counts:
        draw(pipe)
    assert counts == [4, 0, 0, 4, 0, 0, 4, 0]
    disable(pipe)


def held_by(run) -> list:
    """The histories that are held, each by a weak reference."""
    held = [
        histories for stream_run in run._executor._stream_runs.values() for _, histories in stream_run.parts.values()
    ]
    return [weakref.ref(history) for histories in held for history in histories]


@pytest.mark.parametrize("call", [{}, GUIDED], ids=["one stream", "two streams"])
def test_histories_are_freed_when_the_run_ends(pipe, call):
    seen = []
    with accelerate(pipe, Taylor(1), schedule=EVERY) as run:
        draw(pipe, **call, callback_on_step_end=at_step(4, lambda _: seen.extend(held_by(run))))
        assert len(seen) == 1 + bool(call) and not any(history() for history in seen)
        assert held_by(run) == []
        assert all(done.bytes_held > 0 for done in run.summary().values())


def test_histories_are_freed_when_a_run_is_stopped(pipe):
    def stop(_pipe):
        seen.extend(held_by(run))
        raise ZeroDivisionError

    seen = []
    with accelerate(pipe, Taylor(1), schedule=EVERY) as run:
        with pytest.raises(ZeroDivisionError):
            draw(pipe, callback_on_step_end=at_step(4, stop))
        assert len(seen) == 1 and held_by(run) == []


def test_histories_of_a_stream_that_is_gone_are_freed_with_the_next_run():
    transformer = build_transformer()
    with accelerate(transformer, Taylor(1), schedule=EVERY, grid=GRID) as run:
        for step in range(5):
            call_at(transformer, run, step, "cond")
            call_at(transformer, run, step, "uncond")
        assert len(held_by(run)) == 2
        call_at(transformer, run, 0, "cond")
        assert len(held_by(run)) == 1


def test_histories_are_freed_on_leaving():
    transformer = build_transformer()
    with accelerate(transformer, Taylor(1), schedule=EVERY, grid=GRID) as run:
        call_at(transformer, run, 0)
        (held,) = held_by(run)
        assert held() is not None
    assert held() is None
    assert run.summary()["cond"].bytes_held > 0


def test_an_acceleration_that_has_ended_does_not_begin_again(pipe):
    transformer = build_transformer()
    for accelerated, options in ((pipe, {}), (transformer, dict(grid=GRID))):
        with accelerate(accelerated, Taylor(1), schedule=EVERY, **options) as run:
            pass
        with pytest.raises(RuntimeError, match=r"call lesa\.accelerate anew"):
            run.__enter__()
        with pytest.raises(RuntimeError, match=r"call lesa\.accelerate anew"):
            run.at(0)
        run.close()
        assert run.summary() == {}


def test_a_forgotten_acceleration_keeps_no_model_alive(pipe):
    mine = another(pipe, transformer=build_transformer())
    enable(mine, Taylor(1), schedule=EVERY)
    draw(mine)
    kept = weakref.ref(mine.transformer)
    del mine
    gc.collect()
    assert kept() is None


# --- calls of all kinds


CALLS = {
    "one": dict(),
    "batch": dict(prompt=[PROMPT, OTHER]),
    "several images": dict(num_images_per_prompt=3),
    "generators": dict(prompt=[PROMPT, OTHER], generators=(3, 4)),
    "wide": dict(width=64),
    "few steps": dict(num_inference_steps=5),
    "guided": GUIDED,
    "guided batch": dict(prompt=[PROMPT, OTHER], negative_prompt=["fish", "pear"], true_cfg_scale=2.0),
}


def drawn_as(pipe, name: str) -> Tensor:
    call = dict(CALLS[name])
    if seeds := call.pop("generators", None):
        call["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    return draw(pipe, **call)


@pytest.mark.parametrize("name", CALLS)
def test_calls_of_all_kinds_are_unchanged_with_every_step_full(pipe, name):
    expected = drawn_as(pipe, name)
    with accelerate(pipe, Taylor(1), schedule=Schedule.every(1)):
        assert torch.equal(drawn_as(pipe, name), expected)


def test_calls_of_all_kinds_follow_each_other(pipe):
    alone = {}
    for name in CALLS:
        with accelerate(pipe, Taylor(2), schedule=EVERY):
            alone[name] = drawn_as(pipe, name)
    with accelerate(pipe, Taylor(2), schedule=EVERY) as run:
        for name in [*CALLS, *reversed(CALLS)]:
            assert torch.equal(drawn_as(pipe, name), alone[name]), name
    summary = run.summary()
    assert summary["cond"].runs == 2 * len(CALLS) and summary["uncond"].runs == 4


def test_pictures_of_a_batch_are_forecast_each_from_its_own_past(pipe):
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    with accelerate(pipe, Taylor(1), schedule=EVERY):
        together = draw(pipe, [PROMPT, OTHER], generator=seeds)
        apart = torch.cat([draw(pipe, PROMPT, seed=3), draw(pipe, OTHER, seed=4)])
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-4)


def test_callbacks_see_every_step_and_may_change_the_latents(pipe):
    seen = []

    def halve_at_the_end(_pipe, step, _time, tensors):
        seen.append(step)
        return {"latents": tensors["latents"] / 2} if step == STEPS - 1 else tensors

    with accelerate(pipe, Taylor(1), schedule=EVERY):
        expected = draw(pipe) / 2
        assert torch.equal(draw(pipe, callback_on_step_end=halve_at_the_end), expected)
    assert seen == list(range(STEPS))


def test_an_interrupted_call_stops_and_the_next_is_right(pipe):
    with accelerate(pipe, Taylor(1), schedule=EVERY):
        expected = draw(pipe)
        with counted(pipe.transformer) as counts:
            draw(pipe, callback_on_step_end=at_step(4, lambda pipe: setattr(pipe, "_interrupt", True)))
            assert counts == [4, 0, 0, 4, 0]
            assert torch.equal(draw(pipe), expected)


def test_guided_streams_never_mix(pipe):
    with accelerate(pipe, MeanOfTwo(), schedule=EVERY) as run, recorded(pipe.transformer) as features:
        draw(pipe, **GUIDED)
    cond, uncond = features[0::2], features[1::2]
    assert len(cond) == len(uncond) == STEPS and not torch.allclose(cond[0], uncond[0], atol=1e-3)
    assert_unrolled(run.plan("cond"), cond)
    assert_unrolled(run.plan("uncond"), uncond)


def test_each_stream_has_its_own_forecaster(pipe):
    class Streamed(Reuse):
        def for_stream(self, name):
            return {"cond": Reuse(), "uncond": Taylor(1)}[name]

    with accelerate(pipe, Streamed(), schedule=EVERY) as run:
        draw(pipe, **GUIDED)
    assert [run.plan(name).memory for name in ("cond", "uncond")] == [1, 2]


def test_unipc_is_walked_on_its_own_grid(pipe, reference):
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True,
        prediction_type="flow_prediction",
        use_dynamic_shifting=True,
        time_shift_type="exponential",
    )
    mine = another(pipe, scheduler=scheduler)
    expected = draw(mine)
    with accelerate(mine, Taylor(1), schedule=Schedule.every(1)):
        assert torch.equal(draw(mine), expected)
    with accelerate(mine, Taylor(1), schedule=EVERY) as run, counted(mine.transformer) as counts:
        assert not torch.equal(draw(mine), expected)
    assert counts == [4, 0, 0, 4, 0, 0, 4, 0]
    torch.testing.assert_close(run.plan().grid.float(), scheduler.sigmas.cpu().float())


def test_image_to_image_starts_in_mid_grid(pipe):
    mine = FluxImg2ImgPipeline.from_pipe(pipe)
    expected = repaint(mine)
    with accelerate(mine, Taylor(1), schedule=Schedule.every(1)):
        assert torch.equal(repaint(mine), expected)
    with accelerate(mine, Taylor(1), schedule=EVERY) as run, counted(mine.transformer) as counts:
        repaint(mine)
        repaint(mine, strength=0.75)
        draw(pipe)  # another pipeline with this transformer and scheduler
    assert counts == [*[4, 0, 0, 4], *[4, 0, 0, 4, 0, 0], *[4, 0, 0, 4, 0, 0, 4, 0]]
    assert run.summary()["cond"].full_steps == 7


def test_a_call_without_a_name_is_of_the_first_stream(pipe):
    with accelerate(pipe, Taylor(1), schedule=EVERY) as run:
        draw(pipe, **GUIDED)  # its last call is named "uncond"
        repaint(FluxImg2ImgPipeline.from_pipe(pipe))
    assert {name: done.runs for name, done in run.summary().items()} == {"cond": 2, "uncond": 1}


# --- stopped runs


def probe(pipe, time: float = 0.5) -> Tensor:
    """What the transformer answers to a call that belongs to no run."""
    with torch.no_grad():
        return pipe.transformer(torch.full((1, 16, 16), 0.3), **step_inputs(time))[0]


def drawn_by_hand(pipe):
    """A loop of one's own over the pipeline's scheduler; a generator of the latents."""
    x = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(STEPS, mu=0.8)
    for time in pipe.scheduler.timesteps:
        with torch.no_grad():
            velocity = pipe.transformer(x, **step_inputs(float(time) / 1000))[0]
        x = pipe.scheduler.step(velocity, time, x, return_dict=False)[0]
        yield x


def one_step_on(pipe, x, time) -> Tensor:
    with torch.no_grad():
        velocity = pipe.transformer(x, **step_inputs(float(time) / 1000))[0]
    return pipe.scheduler.step(velocity, time, x, return_dict=False)[0]


def drawn_step_by_step(pipe):
    """Such a loop with a function for each step."""
    x = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0))
    pipe.scheduler.set_timesteps(STEPS, mu=0.8)
    for time in pipe.scheduler.timesteps:
        x = one_step_on(pipe, x, time)
        yield x


def stop_the_pipeline(pipe, step, failure):
    def fail(_pipe):
        raise failure

    with pytest.raises(type(failure)):
        draw(pipe, callback_on_step_end=at_step(step, fail))


STOPS = {
    "exception": lambda pipe, step: stop_the_pipeline(pipe, step, ZeroDivisionError()),
    "interruption": lambda pipe, step: stop_the_pipeline(pipe, step, KeyboardInterrupt()),
    "interrupt": lambda pipe, step: draw(
        pipe, callback_on_step_end=at_step(step, lambda p: setattr(p, "_interrupt", True))
    ),
    "another class": lambda pipe, step: stop_the_pipeline(another(pipe, scheduler=pipe.scheduler), step, KeyError()),
    "loop": lambda pipe, step: [x for x, _ in zip(drawn_by_hand(pipe), range(step + 1), strict=False)],
    "steps": lambda pipe, step: [x for x, _ in zip(drawn_step_by_step(pipe), range(step + 1), strict=False)],
}
NEXT = {
    "probe": probe,
    "pipeline": lambda pipe: draw(another(pipe)),
    "pipeline of one step": lambda pipe: draw(another(pipe), num_inference_steps=1),
    "image to image of one step": lambda pipe: repaint(another(pipe, FluxImg2ImgPipeline), strength=1 / STEPS),
    "loop": lambda pipe: list(drawn_by_hand(another(pipe))),
    "steps": lambda pipe: list(drawn_step_by_step(another(pipe))),
}


@pytest.mark.parametrize("tap", ["feature", "output"])
@pytest.mark.parametrize("who", NEXT)
@pytest.mark.parametrize("stop", STOPS)
def test_a_stopped_run_answers_no_other_caller(pipe, stop, who, tap):
    in_full = NEXT[who](pipe)
    with accelerate(pipe, Taylor(1), schedule=EVERY, tap=tap) as run:
        expected = draw(pipe)
        for step in (0, 3):  # the next ones are skipped
            STOPS[stop](pipe, step)
            done = run.summary()["cond"].skipped_steps
            for _ in range(2):
                torch.testing.assert_close(NEXT[who](pipe), in_full, rtol=0, atol=0)
            assert run.summary()["cond"].skipped_steps == done
            assert torch.equal(draw(pipe), expected)


def test_a_generator_that_waits_answers_no_other_caller_and_goes_on(pipe):
    in_full = probe(pipe)
    with accelerate(pipe, Taylor(1), schedule=EVERY) as run:
        expected = list(drawn_by_hand(pipe))[-1]
        drawn = []
        for x in drawn_by_hand(pipe):
            assert torch.equal(probe(pipe), in_full)
            drawn.append(x)
        assert torch.equal(drawn[-1], expected)
    assert run.summary()["cond"].full_steps == 3 + 3


@pytest.mark.parametrize("intruder", ["probe", "pipeline of one step", "image to image of one step"])
def test_who_calls_during_a_run_is_answered_in_full_and_does_not_disturb_it(pipe, intruder):
    in_full = NEXT[intruder](pipe)

    def intrude(_pipe, _step, _time, tensors):
        assert torch.equal(NEXT[intruder](pipe), in_full)
        return tensors

    with accelerate(pipe, Taylor(1), schedule=EVERY) as run:
        expected = draw(pipe)
        assert torch.equal(draw(pipe, callback_on_step_end=intrude), expected)
    assert "calls of a denoiser were of no run, and ran in full" in str(run.summary())


@pytest.mark.parametrize("loop", [drawn_by_hand, drawn_step_by_step], ids=["at once", "a function for each step"])
def test_a_loop_over_the_pipelines_scheduler_is_accelerated(pipe, loop):
    with accelerate(pipe, Taylor(1), schedule=EVERY), counted(pipe.transformer) as counts:
        first, second = list(loop(pipe)), list(loop(pipe))
    assert counts == [4, 0, 0, 4, 0, 0, 4, 0] * 2
    assert torch.equal(first[-1], second[-1])


def test_a_call_that_fails_before_its_run_begins_ends_no_other(pipe):
    def fail(_pipe):
        with pytest.raises(ValueError, match=r"divisible|prompt"):
            pipe(None)

    with accelerate(pipe, Taylor(1), schedule=EVERY):
        expected = draw(pipe)
        assert torch.equal(draw(pipe, callback_on_step_end=at_step(4, fail)), expected)


def test_what_a_loop_held_is_let_go_with_its_last_step(pipe):
    class Large:
        pass

    def loop():
        large = Large()
        seen.append(weakref.ref(large))
        list(drawn_by_hand(pipe))

    seen = []
    with accelerate(pipe, Taylor(1), schedule=EVERY) as run:
        loop()
        assert seen[0]() is None and held_by(run) == []


def test_an_accelerated_pipeline_is_of_its_class_and_then_as_it_was(pipe):
    kind, signature = type(pipe), inspect.signature(pipe.__call__)
    with accelerate(pipe, Taylor(1), schedule=EVERY):
        assert isinstance(pipe, kind) and type(pipe).__name__ == kind.__name__
        assert inspect.signature(pipe.__call__) == signature
    assert type(pipe) is kind


def test_a_pipeline_that_got_a_class_of_its_own_since_keeps_it(pipe):
    mine = another(pipe)
    expected = draw(mine, num_inference_steps=4)
    with accelerate(mine, Taylor(1), schedule=Schedule.every(2)) as run:
        accelerated = draw(mine, num_inference_steps=4)
        with_call(mine, {"num_inference_steps": 4})
        assert torch.equal(draw_as_set(mine), accelerated)
        assert held_by(run) == []
    assert torch.equal(draw_as_set(mine), expected)


def draw_as_set(pipe) -> Tensor:
    call = dict(height=32, width=32, max_sequence_length=16, output_type="latent")
    return pipe(PROMPT, **call, generator=torch.Generator().manual_seed(0)).images


# --- dtypes


def autocast():
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("history", STORED)
@pytest.mark.parametrize("tap", ["feature", "output"])
def test_under_autocast_latents_may_change_their_dtype(pipe, tap, history):
    """They are float32 in the first step, and bfloat16 as the outputs are in the others."""
    with autocast(), accelerate(pipe, Taylor(1), schedule=EVERY, tap=tap, history=history) as run:
        with returned(pipe.transformer) as outputs:
            drawn = draw(pipe)
        assert torch.equal(draw(pipe), drawn)
    assert drawn.isfinite().all()
    assert {output.dtype for output in outputs} == {torch.bfloat16}
    assert run.summary()["cond"].skipped_steps == 10


class Cast(nn.Module):
    """Its blocks and its output have a dtype that is not that of what goes in, nor always the same."""

    def __init__(self, *dtypes):
        super().__init__()
        self.blocks, self.norm_out, self.dtypes = nn.ModuleList([nn.Tanh()]), nn.Identity(), dtypes
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        x = x.double()
        for block in self.blocks:
            x = block(x).to(self.dtypes[self.calls % len(self.dtypes)])
            self.calls += 1
        return self.norm_out(x)


@pytest.mark.parametrize("history", STORED)
@pytest.mark.parametrize("module", ["norm_out", None])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float64),
    ],
    ids=str,
)
def test_a_forecast_has_the_dtype_of_the_newest_full_step(dtypes, module, history):
    transformer = Cast(*dtypes)
    options = dict(schedule=Schedule.at([0, 3]), grid=GRID, tap=Tap(("blocks",), module), history=history)
    x = torch.linspace(-1, 1, 12).reshape(1, 3, 4)
    with accelerate(transformer, Taylor(1), **options) as run:
        answers = []
        for step in range(6):
            run.at(step)
            answers.append(transformer(x * (1 + step)))
    assert [answer.dtype for answer in answers] == [dtypes[0]] * 3 + [dtypes[1]] * 3
    line = answers[3].double() + (answers[3].double() - answers[0].double()) / 3
    torch.testing.assert_close(answers[4].double(), line, rtol=0, atol=2e-2)


class Loud(nn.Module):
    """Its feature grows by a fixed number a step, up to the largest that float16 holds."""

    def __init__(self, growth: float):
        super().__init__()
        self.blocks, self.norm_out, self.growth, self.calls = nn.ModuleList([nn.Identity()]), nn.Identity(), growth, 0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) + self.calls * self.growth
            self.calls += 1
        return self.norm_out(x)


@pytest.mark.parametrize("history", STORED)
@pytest.mark.parametrize("module", ["norm_out", None])
@pytest.mark.parametrize("sign", [1, -1])
def test_forecasts_beyond_the_range_of_float16_are_clamped_and_counted(module, history, sign):
    transformer, x = Loud(sign * 30_000.0), torch.full((1, 3, 4), sign * 30_000.0, dtype=torch.float16)
    options = dict(schedule=Schedule.at([0, 1]), grid=GRID, tap=Tap(("blocks",), module), history=history)
    with accelerate(transformer, Taylor(1), **options) as run:
        for step in range(4):
            run.at(step)
            answer = transformer(x)
            assert answer.dtype == torch.float16
            assert float(answer[0, 0, 0]) == sign * min(30_000 * (1 + step), 65_504)
        assert run.summary()["cond"].clamped == 2
        assert "2 forecasts were beyond the range of their dtype and clamped to it" in str(run.summary())
        assert run.summary()["cond"].clamped == 2


def test_forecasts_within_the_range_are_not_counted(pipe):
    with accelerate(pipe, Taylor(1), schedule=EVERY) as run:
        draw(pipe)
    assert run.summary()["cond"].clamped == 0 and "range" not in str(run.summary())


# --- side by side


def test_two_pipelines_of_a_class_do_not_disturb_each_other(pipe, reference):
    other = another(pipe, transformer=build_transformer(seed=1))
    untouched = draw(other)
    with accelerate(pipe, Taylor(1), schedule=EVERY):
        expected = draw(pipe)
        assert torch.equal(draw(other), untouched)
        with accelerate(other, Reuse(), schedule=Schedule.every(2)):
            alone, inside = draw(other), []
            meanwhile = at_step(4, lambda _: inside.append(draw(other)))
            assert torch.equal(draw(pipe, callback_on_step_end=meanwhile), expected)
            assert torch.equal(inside[0], alone)
        assert torch.equal(draw(other), untouched)


def test_a_pipeline_that_shares_the_transformer_alone_runs_in_full(pipe, reference):
    other = another(pipe)
    with accelerate(pipe, Taylor(1), schedule=EVERY):
        expected = draw(pipe)
        for _ in range(2):
            assert torch.equal(draw(other), reference)
            assert torch.equal(draw(pipe), expected)


def test_a_stopped_run_answers_nobody(pipe, reference):
    other, small = another(pipe), another(pipe, FluxImg2ImgPipeline)
    one_step = repaint(small, strength=0.2)

    def stop(_pipe):
        raise ZeroDivisionError

    with accelerate(pipe, Taylor(1), schedule=EVERY):
        for step in (0, 1, 4):
            with pytest.raises(ZeroDivisionError):
                draw(pipe, callback_on_step_end=at_step(step, stop))
            assert torch.equal(draw(other), reference)
            assert torch.equal(repaint(small, strength=0.2), one_step)


def test_two_threads_run_their_own_pipelines(pipe):
    own = {name: copy.deepcopy(getattr(pipe, name)) for name in ("tokenizer", "tokenizer_2")}  # they keep settings
    other = another(pipe, transformer=build_transformer(seed=1), **own)
    turns, drawn = threading.Barrier(2, timeout=60), {}

    def take_turns(_pipe, _step, _time, tensors):
        turns.wait()
        return tensors

    def work(mine, name):
        drawn[name] = draw(mine, callback_on_step_end=take_turns)

    with accelerate(pipe, Taylor(1), schedule=EVERY), accelerate(other, Taylor(2), schedule=Schedule.every(2)):
        expected = {"pipe": draw(pipe), "other": draw(other)}
        threads = [threading.Thread(target=work, args=pair) for pair in ((pipe, "pipe"), (other, "other"))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(drawn["pipe"], expected["pipe"]) and torch.equal(drawn["other"], expected["other"])


def in_another_thread(work) -> list:
    """Do some work in another thread; returns what it raised."""
    raised = []

    def guarded():
        try:
            work()
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=guarded)
    thread.start()
    thread.join()
    return raised


def test_a_second_thread_may_use_an_accelerated_pipeline_later(pipe):
    with accelerate(pipe, Taylor(1), schedule=EVERY):
        expected, drawn = draw(pipe), []
        assert in_another_thread(lambda: drawn.append(draw(pipe))) == []
        assert torch.equal(drawn[0], expected)


def test_a_second_pipeline_runs_in_full_during_a_run(pipe):
    other, raised, steps = another(pipe), [], []
    intrude = at_step(
        2,
        lambda _: raised.extend(
            in_another_thread(lambda: draw(other, callback_on_step_end=lambda *_: steps.append(1) or {}))
        ),
    )
    with accelerate(pipe, Taylor(1), schedule=EVERY):
        expected = draw(pipe)
        assert torch.equal(draw(pipe, callback_on_step_end=intrude), expected)
    assert raised == [] and len(steps) == STEPS  # its transformer alone is shared: it runs in full, between two steps


def test_an_accelerated_pipeline_is_in_one_call_at_a_time(pipe):
    raised = []
    with accelerate(pipe, Taylor(1), schedule=EVERY):
        expected, drawn = draw(pipe), []
        intrude = at_step(2, lambda _: raised.extend(in_another_thread(lambda: drawn.append(draw(pipe)))))
        assert torch.equal(draw(pipe, callback_on_step_end=intrude), expected)
    assert len(raised) == 1 and "one call at a time" in raised[0] and drawn == []


# --- loops of one's own


GRID = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)


def step_inputs(time: float, tokens: int = 16, dtype=torch.float32) -> dict:
    made = torch.Generator().manual_seed(7)
    return dict(
        encoder_hidden_states=torch.randn(1, 5, 32, generator=made).to(dtype),
        pooled_projections=torch.randn(1, 32, generator=made).to(dtype),
        timestep=torch.tensor([time], dtype=dtype),
        img_ids=torch.zeros(tokens, 3),
        txt_ids=torch.zeros(5, 3),
        return_dict=False,
    )


@torch.no_grad()
def walk(transformer: nn.Module, run=None, start: int = 0, streams=("cond",), dtype=torch.float32) -> Tensor:
    """An Euler loop that adds the streams up."""
    x = torch.randn(1, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    for step in range(start, STEPS):
        velocity = torch.zeros_like(x)
        for stream in streams:
            if run is not None:
                run.at(step, stream)
            velocity += transformer(x, **step_inputs(float(GRID[step]), dtype=dtype))[0]
        x = x + (GRID[step + 1] - GRID[step]).to(dtype) * velocity
    return x


def test_a_loop_says_which_step_it_is_at():
    transformer = build_transformer()
    expected = walk(transformer)
    with kept_as_it_was(transformer):
        with accelerate(transformer, Taylor(1), schedule=Schedule.every(1), grid=GRID) as run:
            assert torch.equal(walk(transformer, run), expected)
        with accelerate(transformer, Taylor(1), schedule=EVERY, grid=GRID.tolist()) as run:
            with counted(transformer) as counts:
                first, second = walk(transformer, run), walk(transformer, run)
                walk(transformer, run, start=5)
            assert torch.equal(first, second) and not torch.equal(first, expected)
    assert counts == [4, 0, 0, 4, 0, 0, 4, 0] * 2 + [4, 0, 0]
    assert run.summary()["cond"].runs == 3


def test_a_loop_names_its_streams():
    transformer = build_transformer()
    with accelerate(transformer, Taylor(1), schedule=EVERY, grid=GRID) as run, counted(transformer) as counts:
        walk(transformer, run, streams=("cond", "uncond"))
    assert counts == [4, 4, 0, 0, 0, 0, 4, 4, 0, 0, 0, 0, 4, 4, 0, 0]
    assert {name: done.full_steps for name, done in run.summary().items()} == {"cond": 3, "uncond": 3}


def call_at(transformer: nn.Module, run, step: int, stream: str = "cond", tokens: int = 16) -> None:
    run.at(step, stream)
    transformer(torch.zeros(1, tokens, 16), **step_inputs(0.5, tokens))


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([0, 1, 1], "called twice at step 1 of stream 'cond'"),
        ([0, 1, 3], "must go on at step 2, got step 3"),
        ([0, 8], "steps 0 to 7, got step 8"),
        ([-1], "steps 0 to 7, got step -1"),
    ],
)
def test_a_loop_that_loses_its_way_is_told(steps, message):
    transformer = build_transformer()
    with (
        accelerate(transformer, Taylor(1), schedule=EVERY, grid=GRID) as run,
        pytest.raises((RuntimeError, ValueError), match=message),
    ):
        for step in steps:
            call_at(transformer, run, step)


@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_loop_that_failed_may_begin_again(step):
    transformer = build_transformer()
    with accelerate(transformer, Taylor(1), schedule=EVERY, grid=GRID) as run:
        expected = walk(transformer, run, streams=("cond", "uncond"))
        for now in range(step):
            call_at(transformer, run, now)
        with pytest.raises(RuntimeError):
            run.at(step)
            transformer(torch.zeros(1, 16, 3), **step_inputs(0.5))
        assert torch.equal(walk(transformer, run, streams=("cond", "uncond")), expected)


def test_a_loop_must_say_where_it_is():
    transformer = build_transformer()
    with accelerate(transformer, Taylor(1), schedule=EVERY, grid=GRID), pytest.raises(RuntimeError, match=r"run\.at"):
        walk(transformer)


def test_only_loops_say_where_they_are(pipe):
    with accelerate(pipe, Taylor(1), schedule=EVERY) as run, pytest.raises(RuntimeError, match="without a pipeline"):
        run.at(0)


# --- clear errors, before the first step is done


def test_calls_without_names_are_told_apart_by_what_they_bring(pipe):
    mine = FluxImg2ImgPipeline.from_pipe(pipe)
    expected = repaint(mine, **GUIDED)
    with accelerate(mine, Taylor(1), schedule=Schedule.every(1)) as run:
        assert torch.equal(repaint(mine, **GUIDED), expected)
    assert run.streams == ("cond", "call 2")
    with accelerate(mine, Taylor(1), schedule=EVERY) as run:
        repaint(mine, **GUIDED)
    assert [(done.full_steps, done.skipped_steps) for done in run.summary().values()] == [(2, 2)] * 2
    assert run.plan("call 2").full == (4, 7)


@pytest.mark.parametrize(
    ("forecaster", "schedule", "strict", "message"),
    [
        (Taylor(1), Schedule.at([1, 4]), False, "the first step of a run is full"),
        (Taylor(1), Schedule.at([0, 9]), False, "full steps of a run of 8 steps are below 8"),
        (Taylor(1), EVERY, True, r"step 1 is skipped but Taylor\(order=1\) wants 2 past features"),
        (compile_plan(Taylor(1), GRID, EVERY).freeze(), EVERY, False, "bound to their grid of 8 steps, got another"),
    ],
)
def test_a_plan_that_does_not_fit_stops_the_call_before_its_first_step(pipe, forecaster, schedule, strict, message):
    with counted(pipe.transformer) as counts, accelerate(pipe, forecaster, schedule=schedule, strict=strict):
        with pytest.raises(ValueError, match=message):
            draw(pipe)
        assert sum(counts) == 0


def test_what_is_missing_is_asked_for(pipe):
    with pytest.raises(LookupError, match="no predictor is shipped for"):
        accelerate(pipe, schedule=EVERY)
    with pytest.raises(ValueError, match=r"pass a schedule, e\.g\. schedule="):
        accelerate(pipe, Taylor(1))
    with pytest.raises(ValueError, match="grid="):
        accelerate(pipe.transformer, Taylor(1), schedule=EVERY)
    with pytest.raises(ValueError, match="grid="):
        accelerate(pipe, Taylor(1), schedule=EVERY, grid=GRID)
    with pytest.raises(ValueError, match="got a str"):
        accelerate("a pipeline", Taylor(1), schedule=EVERY)


def test_a_forecaster_may_bring_its_schedule(pipe):
    forecaster = Taylor(1)
    forecaster.schedule = EVERY
    with accelerate(pipe, forecaster) as run:
        draw(pipe)
    assert run.plan().full == (0, 3, 6)


@pytest.mark.parametrize("place", ["feature", "output"])
def test_a_predictor_runs_at_its_own_tap_and_on_its_own_model_alone(place):
    transformer = build_transformer()
    origin = Origin(
        model="tiny",
        transformer="FluxTransformer2DModel",
        config=configuration(transformer),
        tap=tap_of(transformer, place),
        grid=tuple(GRID.tolist()),
        schedule="every:3",
    )
    predictor = LESA(origin, memories=(2, 2, 2), hidden=(4,))
    with accelerate(transformer, predictor, grid=GRID, tap=None) as run, recorded(transformer) as features:
        assert walk(transformer, run).isfinite().all()
    assert run.plan().full == (0, 3, 6)
    assert len(features) == (8 if place == "feature" else 3)
    with pytest.raises(ValueError, match="accelerate with the predictor's tap"):
        accelerate(transformer, predictor, grid=GRID, tap="output" if place == "feature" else "feature")
    with pytest.raises(ValueError, match="num_layers=1 instead of 2"):
        accelerate(build_transformer(num_layers=1), predictor, grid=GRID, tap=None)


def test_an_unknown_transformer_asks_for_its_tap(pipe):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.last = nn.ModuleList([nn.Linear(4, 4)]), nn.LayerNorm(4)

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return self.last(x)

    with pytest.raises(ValueError, match=r"got a Own; take tap='output', or pass tap=lesa\.Tap\("):
        accelerate(SimpleNamespace(transformer=Own(), scheduler=pipe.scheduler), Taylor(1), schedule=EVERY)
    own = Own()
    with accelerate(own, Reuse(), schedule=EVERY, grid=GRID, tap=Tap(("layers",), "last")) as run:
        for step in range(2):
            run.at(step)
            own(torch.ones(1, 3, 4))
    assert run.summary()["cond"].skipped_steps == 1


# --- what a run tells


def test_a_summary_counts_what_was_done(pipe):
    with accelerate(pipe, Taylor(1), schedule=EVERY) as run:
        assert str(run.summary()) == "no run yet" and run.summary() == {}
        with pytest.raises(LookupError, match="not of 'cond'"):
            run.plan()
        draw(pipe)
        early = run.summary()
        draw(pipe, **GUIDED)
    cond, uncond = run.summary()["cond"], run.summary()["uncond"]
    assert (cond.runs, cond.full_steps, cond.skipped_steps, cond.short_rows) == (2, 6, 10, 4)
    assert (uncond.runs, uncond.full_steps, uncond.skipped_steps, uncond.short_rows) == (1, 3, 5, 2)
    assert cond.step_ratio == 16 / 6
    assert cond.bytes_held == 2 * FEATURE_BYTES + FEATURE_BYTES
    assert 0 < uncond.forecast_seconds < cond.forecast_seconds + uncond.forecast_seconds < 60
    assert early["cond"].runs == 1, "a summary does not change afterwards"


def test_bytes_follow_the_size_of_the_pictures(pipe):
    with accelerate(pipe, Taylor(2), schedule=EVERY) as run:
        draw(pipe, num_images_per_prompt=2, width=64)
        assert run.summary()["cond"].bytes_held == (3 + 1) * 4 * FEATURE_BYTES
        draw(pipe)
        assert run.summary()["cond"].bytes_held == (3 + 1) * FEATURE_BYTES


def test_a_summary_reads_as_a_table():
    done = StreamSummary(2, 20, 80, bytes_held=12_582_912, forecast_seconds=0.25)
    short = StreamSummary(1, 10, 40, short_rows=3, bytes_held=999, forecast_seconds=0.125)
    assert str(Summary(cond=done, uncond=short)) == (
        "stream      runs    full  skipped  step ratio       held  in forecasts\n"
        "cond           2      20       80        5.00   12.58 MB       0.250 s\n"
        "uncond         1      10       40        5.00      999 B       0.125 s\n"
        "           3 forecasts had fewer past features than they are made for"
    )


# --- torch.compile


class CountingBackend:
    """Compiles nothing, and counts the graphs that it is handed."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1
        return graph.forward


def test_regional_compilation_stays_whole():
    counts, results = [], []
    for schedule in (None, Schedule.every(1), EVERY):
        torch._dynamo.reset()
        transformer = build_transformer()
        transformer.compile_repeated_blocks(backend=(backend := CountingBackend()), fullgraph=True)
        if schedule is None:
            results.append(walk(transformer))
        else:
            with accelerate(transformer, Taylor(1), schedule=schedule, grid=GRID) as run:
                results.append(walk(transformer, run))
            walk(transformer)
        counts.append(backend.graphs)
    assert counts[0] > 0 and counts == [counts[0]] * 3
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_transformer_compiled_as_a_whole_is_refused(pipe):
    compiled = torch.compile(build_transformer(), backend="eager")
    with pytest.raises(ValueError, match="compile_repeated_blocks"):
        accelerate(SimpleNamespace(transformer=compiled, scheduler=pipe.scheduler), Taylor(1), schedule=EVERY)
    with pytest.raises(ValueError, match="compile_repeated_blocks"):
        accelerate(compiled, Taylor(1), schedule=EVERY, grid=GRID)


def test_a_transformer_compiled_as_a_whole_later_is_refused_at_its_first_step():
    torch._dynamo.reset()
    transformer = build_transformer()
    with accelerate(transformer, Taylor(1), schedule=EVERY, grid=GRID) as run:
        expected = walk(transformer, run)
        run.at(0)
        with pytest.raises(ValueError, match="compile_repeated_blocks"):
            call_at(torch.compile(transformer, backend="eager"), run, 0)
        assert torch.equal(walk(transformer, run), expected)


@pytest.mark.parametrize("how", ["compiled before", "compiled within", "in place before", "in place within"])
def test_at_the_output_a_transformer_may_be_compiled_as_a_whole(pipe, how):
    torch._dynamo.reset()
    mine = another(pipe, transformer=build_transformer())
    with accelerate_at_output(mine, Taylor(1), schedule=EVERY):
        expected = draw(mine)

    def compiling():
        if "in place" in how:
            mine.transformer.compile(backend="eager")
        else:
            mine.transformer = torch.compile(mine.transformer, backend="eager")

    if "before" in how:
        compiling()
    with accelerate_at_output(mine, Taylor(1), schedule=EVERY) as run:
        if "within" in how:
            compiling()
        assert torch.equal(draw(mine), expected)
    assert (run.summary()["cond"].full_steps, run.summary()["cond"].skipped_steps) == (3, 5)


def test_copies_and_pickles_of_an_accelerated_pipeline_are_plain(pipe, reference):
    with accelerate(pipe, Taylor(1), schedule=EVERY) as run:
        expected = draw(pipe)
        copied, pickled = copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe.transformer))
        for other in (copied, another(pipe, transformer=pickled)):
            assert torch.equal(draw(other), reference)
            assert type(other.transformer.transformer_blocks) is nn.ModuleList
        assert torch.equal(draw(pipe), expected)
        assert run.summary()["cond"].runs == 2


def test_calls_of_no_run_are_told(tiny_flux, call):
    """A denoiser that a pipeline calls before its loop, as where another scheduler steps a loop of its own."""
    pipe = type(tiny_flux)(**tiny_flux.components)

    seen = {}
    with pytest.MonkeyPatch.context() as patch:
        kind, forward = type(pipe.transformer), type(pipe.transformer).forward
        patch.setattr(kind, "forward", lambda self, **kwargs: seen.update(kwargs) or forward(self, **kwargs))
        pipe("x", **call)
    prepare = pipe.prepare_latents

    def prepared(*args, **kwargs):
        pipe.transformer(**seen)
        return prepare(*args, **kwargs)

    pipe.prepare_latents = prepared
    with accelerate(pipe, Reuse(), schedule=Schedule.every(2)) as run:
        pipe("x", **call)
    assert run.summary().passed_by == 1 and "1 calls of a denoiser were of no run" in str(run.summary())
    assert run.summary()["cond"].full_steps == 4
