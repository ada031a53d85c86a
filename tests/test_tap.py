import threading
from contextlib import contextmanager

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from tiny import build_qwen_transformer, build_transformer
from torch import Tensor, nn

from lesa.host.denoiser import attach
from lesa.host.head import head
from lesa.host.runtime import accelerate
from lesa.host.streams import hear
from lesa.host.tap import place_of, tap_of
from lesa.rows.forecasters import Reuse
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

TAP = Tap(("blocks",), "norm_out")
OUTPUT = Tap()
PARTS = ("embed", "blocks.0", "blocks.1", "blocks.2", "norm_out")


class Double(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0
        self.failure: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.failure is not None:
            raise self.failure
        return 2 * x


class Shift(nn.Module):
    def forward(self, feature: Tensor, shift: float) -> Tensor:
        return feature + shift


class Toy(nn.Module):
    """In a full step x gives the feature 8 (x + 1) and the output 8 (x + 1) + 100."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Identity()
        self.blocks = nn.ModuleList(Double() for _ in range(3))
        self.norm_out = Shift()

    def forward(self, x: Tensor, by_name: bool = False) -> Tensor:
        x = self.embed(x) + 1
        for block in self.blocks:
            x = block(x)
        return self.norm_out(feature=x, shift=100.0) if by_name else self.norm_out(x, 100.0)

    @contextmanager
    def cache_context(self, name: str, **about):
        self.said = (name, about)
        yield


class Ear:
    """A passage of every call: it says whether the blocks run, keeps the feature that passes and gives a forecast."""

    def __init__(self, full: bool, replacement: float = 7.0):
        self.full, self.replacement = full, replacement
        self.heard: list[float] = []

    def begin(self, _args: tuple, _kwargs: dict) -> "Ear":
        return self

    def keep(self, feature: Tensor, part: int = 0) -> None:
        self.heard.append(float(feature))

    def returned(self, output: Tensor) -> None:
        self.output = float(output)

    def fits(self, _feature: Tensor, _part: int = 0) -> bool:
        return True

    def forecast(self, _part: int = 0) -> Tensor:
        return torch.tensor(self.replacement)


def state(module: nn.Module) -> dict:
    """Everything that an attachment could leave behind."""
    return {
        name: (type(part), sorted(part.__dict__), {k: list(v) for k, v in part.__dict__.items() if "_hooks" in k})
        for name, part in module.named_modules()
    }


@pytest.fixture
def toy():
    """A toy that must be left as it was, and its classes too."""
    toy, members = Toy(), [set(vars(kind)) for kind in (Toy, Double, Shift)]
    before = state(toy)
    yield toy
    assert state(toy) == before
    assert [set(vars(kind)) for kind in (Toy, Double, Shift)] == members
    assert len(list(toy.blocks)) == 3


def calls(toy: Toy) -> list[int]:
    return [toy.blocks[k].calls for k in range(3)]


@pytest.mark.parametrize("by_name", [False, True])
def test_on_a_full_step_the_blocks_run_and_the_feature_is_seen(toy, by_name):
    detach = attach(toy, TAP, (ear := Ear(full=True)).begin)
    assert toy(torch.tensor(4.0), by_name=by_name) == 140.0
    assert ear.heard == [40.0] and ear.output == 140.0 and calls(toy) == [1, 1, 1]
    detach()


@pytest.mark.parametrize("by_name", [False, True])
def test_on_a_skipped_step_no_block_runs_and_the_forecast_passes(toy, by_name):
    detach = attach(toy, TAP, (ear := Ear(full=False)).begin)
    assert toy(torch.tensor(4.0), by_name=by_name) == 107.0
    assert ear.heard == [] and calls(toy) == [0, 0, 0]
    detach()


def test_a_detached_toy_runs_as_ever(toy):
    attach(toy, TAP, (ear := Ear(full=False)).begin)()
    assert toy(torch.tensor(4.0)) == 140.0
    assert ear.heard == []


def test_a_bypassed_list_is_whole_outside_of_the_forward(toy):
    detach = attach(toy, TAP, Ear(full=False).begin)
    toy(torch.tensor(4.0))
    assert len(toy.blocks) == len(list(toy.blocks)) == 3
    assert isinstance(toy.blocks, nn.ModuleList) and toy.blocks[1] is list(toy.blocks)[1]
    detach()


def test_a_bypassed_list_is_whole_for_other_threads(toy):
    seen = []

    def look_from_another_thread(*_):
        assert list(toy.blocks) == []
        thread = threading.Thread(target=lambda: seen.extend(toy.blocks))
        thread.start()
        thread.join()

    detach = attach(toy, TAP, Ear(full=False).begin)
    hook = toy.embed.register_forward_hook(look_from_another_thread)
    toy(torch.tensor(4.0))
    assert len(seen) == 3
    hook.remove()
    detach()


# --- at the output


ANSWERS = {
    "tensor": (lambda y: y, lambda answer: answer),
    "tuple": (lambda y: (y,), lambda answer: answer[0] if type(answer) is tuple else None),
    "class": (
        lambda y: Transformer2DModelOutput(sample=y),
        lambda answer: answer.sample if type(answer) is Transformer2DModelOutput else None,
    ),
    "several": (
        lambda y: {"video": [y, y + 1], "cache": "kept"},
        lambda answer: answer["video"][0] if answer["video"][1].equal(answer["video"][0] + 1) else None,
    ),
}
FOUR, FIVE = torch.full((2,), 4.0), torch.full((2,), 5.0)


@contextmanager
def forwarding(forward):
    """Let the toy's class have another forward."""
    original, Toy.forward = Toy.forward, forward
    yield
    Toy.forward = original


@contextmanager
def forwards_counted(toy: Toy):
    counts = dict.fromkeys(PARTS, 0)

    def counting(name):
        def count(*_):
            counts[name] += 1

        return count

    hooks = [toy.get_submodule(name).register_forward_pre_hook(counting(name)) for name in PARTS]
    yield counts
    for hook in hooks:
        hook.remove()


@contextmanager
def reusing(toy: Toy, tap: Tap):
    """Step 0 is full, the next three repeat it; yields the call at a step."""
    grid, schedule = torch.linspace(1, 0, 5, dtype=torch.float64), Schedule.every(4)
    with accelerate(toy, Reuse(), grid=grid, schedule=schedule, tap=tap) as run:

        def call(step: int, *args, **kwargs):
            run.at(step)
            return toy(*args, **kwargs)

        yield call


@pytest.mark.parametrize("kind", ANSWERS)
def test_at_the_output_a_skipped_step_runs_nothing_and_answers_as_a_full_one(toy, kind):
    answer, opened = ANSWERS[kind]
    original = Toy.forward
    with forwarding(lambda self, x: answer(original(self, x))), forwards_counted(toy) as counts:
        with reusing(toy, OUTPUT) as call:
            assert opened(call(0, FOUR)).equal(FOUR * 35)
            assert set(counts.values()) == {1}
            assert opened(call(1, FIVE)).equal(FOUR * 35)
            assert set(counts.values()) == {1}
        assert opened(toy(FIVE)).equal(FIVE * 8 + 108)
        assert set(counts.values()) == {2}


def test_at_the_output_each_kind_of_call_has_its_own_answer(toy):
    def forward(self, x, return_dict=True):
        return Transformer2DModelOutput(sample=x) if return_dict else (x,)

    with forwarding(forward), reusing(toy, OUTPUT) as call:
        assert type(call(0, FOUR)) is type(call(1, FOUR)) is Transformer2DModelOutput
        other = call(2, FIVE, return_dict=False)
        assert type(other) is tuple and other[0].equal(FIVE), "a full step of its own"
        assert call(3, FOUR, return_dict=False)[0].equal(FIVE)


@pytest.mark.parametrize("tap", [TAP, OUTPUT])
def test_on_a_skipped_step_what_passes_has_the_dtype_of_a_full_one(toy, tap):
    """Here the blocks change it, and the inputs' is another later."""
    hook = toy.blocks[2].register_forward_hook(lambda _module, _args, output: output.to(torch.bfloat16))
    with reusing(toy, tap) as call:
        dtypes = [call(step, FOUR.to(x)).dtype for step, x in enumerate((torch.float32, torch.float64))]
    assert dtypes == [torch.bfloat16] * 2
    hook.remove()


def test_at_the_output_other_hooks_see_full_steps(toy):
    seen = []
    detach = attach(toy, OUTPUT, (ear := Ear(full=True)).begin)
    hooks = [
        toy.register_forward_pre_hook(lambda *_: seen.append("before")),
        toy.register_forward_hook(lambda _, _args, output: seen.append(float(output))),
    ]
    assert toy(torch.tensor(4.0)) == 140.0
    ear.full = False
    assert toy(torch.tensor(4.0)) == 7.0
    assert seen == ["before", 140.0]
    for hook in hooks:
        hook.remove()
    detach()


def test_a_call_that_is_of_no_run_passes_by(toy):
    for tap in (TAP, OUTPUT):
        detach = attach(toy, tap, lambda _args, _kwargs: None)
        assert toy(torch.tensor(4.0)) == 140.0
        detach()


@pytest.mark.parametrize("failure", [ValueError("a block fails"), KeyboardInterrupt()])
def test_at_the_output_a_failure_in_a_block_leaves_the_toy_as_it_was(toy, failure):
    detach = attach(toy, OUTPUT, Ear(full=True).begin)
    toy.blocks[1].failure = failure
    with pytest.raises(type(failure)):
        toy(torch.tensor(4.0))
    toy.blocks[1].failure = None
    assert toy(torch.tensor(4.0)) == 140.0
    detach()


class Offload(ModelHook):
    """What accelerate calls from the forward that it puts in place of a module's own."""

    calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


def test_at_the_output_an_offloaded_toy_stays_offloaded(toy):
    add_hook_to_module(toy, offload := Offload())
    theirs = toy.forward
    detach = attach(toy, OUTPUT, (ear := Ear(full=True)).begin)
    assert toy(torch.tensor(4.0)) == 140.0 and offload.calls == 1
    ear.full = False
    assert toy(torch.tensor(4.0)) == 7.0 and offload.calls == 1, "nothing needs to be moved"
    detach()
    assert toy.forward is theirs
    assert toy(torch.tensor(4.0)) == 140.0 and offload.calls == 2
    remove_hook_from_module(toy)
    del toy.forward  # which accelerate leaves


@pytest.mark.parametrize("first", ["offload", "tap"])
def test_at_the_output_a_toy_may_be_offloaded_later(toy, first):
    """And its offloading or its tap may end first."""
    detach = attach(toy, OUTPUT, (ear := Ear(full=True)).begin)
    add_hook_to_module(toy, offload := Offload())
    assert toy(torch.tensor(4.0)) == 140.0 and offload.calls == 1
    ear.full = False
    assert toy(torch.tensor(4.0)) == 7.0
    if first == "offload":
        remove_hook_from_module(toy)
        assert toy(torch.tensor(4.0)) == 7.0
        detach()
    else:
        detach()
        assert toy(torch.tensor(4.0)) == 140.0 and offload.calls == 2
        remove_hook_from_module(toy)
    assert toy(torch.tensor(4.0)) == 140.0 and ear.heard == [140.0]
    del toy.forward


@pytest.mark.parametrize("tap", [TAP, OUTPUT])
def test_a_forward_that_is_replaced_meanwhile_is_the_toys(toy, tap):
    """As diffusers' offloading does at the end of each call of a pipeline."""
    before = toy.forward
    detach = attach(toy, tap, (ear := Ear(full=True)).begin)
    for _ in range(2):
        toy.forward = lambda x: before(x + 1)
        assert toy(torch.tensor(3.0)) == 140.0
    assert ear.heard == ([40.0] if tap == TAP else [140.0]) * 2
    ear.full = False
    assert toy(torch.tensor(3.0)) == (107.0 if tap == TAP else 7.0)
    detach()
    assert toy(torch.tensor(3.0)) == 140.0
    del toy.forward


@pytest.mark.parametrize("tap", [TAP, OUTPUT])
def test_a_forward_called_past_the_module_is_the_transformers_own(toy, tap):
    detach = attach(toy, tap, (ear := Ear(full=False)).begin)
    assert toy.forward(torch.tensor(4.0)) == 140.0 and ear.heard == []
    detach()


def test_a_forward_of_the_instances_own_stays(toy):
    own = toy.forward = lambda x: x + 1
    attach(toy, OUTPUT, Ear(full=True).begin)()
    assert toy.forward is own
    del toy.forward


# --- what may go wrong


@pytest.mark.parametrize("failure", [ValueError("a block fails"), KeyboardInterrupt()])
def test_a_toy_is_as_it_was_after_a_failure_in_a_block(toy, failure):
    detach = attach(toy, TAP, Ear(full=True).begin)
    toy.blocks[1].failure = failure
    with pytest.raises(type(failure)):
        toy(torch.tensor(4.0))
    toy.blocks[1].failure = None
    assert toy(torch.tensor(4.0)) == 140.0
    detach()


def test_a_skipped_step_that_fails_before_the_tap_leaves_the_list_whole(toy):
    detach = attach(toy, TAP, Ear(full=False).begin)
    with pytest.raises(TypeError):
        toy("no number")
    assert len(list(toy.blocks)) == 3
    detach()


@pytest.mark.parametrize("failing", ["begin", "forecast"])
def test_a_failing_listener_fails_the_call_and_leaves_the_list_whole(toy, failing):
    def fail(*_):
        raise ValueError("not now")

    setattr(ear := Ear(full=False), failing, fail)
    detach = attach(toy, TAP, ear.begin)
    with pytest.raises(ValueError, match="not now"):
        toy(torch.tensor(4.0))
    assert len(list(toy.blocks)) == 3
    detach()


def test_others_hooks_stay(toy):
    detach = attach(toy, TAP, Ear(full=True).begin)
    mine = toy.norm_out.register_forward_pre_hook(lambda *_: None)
    detach()
    assert list(toy.norm_out._forward_pre_hooks) == [mine.id]
    mine.remove()


def test_a_call_of_the_tapped_module_alone_does_not_pass_the_tap(toy):
    detach = attach(toy, TAP, (ear := Ear(full=False, replacement=7.0)).begin)
    assert toy.norm_out(torch.tensor(1.0), 100.0) == 101.0
    assert ear.heard == []
    detach()


@pytest.mark.parametrize("full", [False, True])
def test_a_forward_that_passes_the_tap_by_is_an_error(toy, full):
    toy.elsewhere = Shift()
    detach = attach(toy, Tap(("blocks",), "elsewhere"), Ear(full=full).begin)
    with pytest.raises(RuntimeError, match="no feature entered its 'elsewhere'; correct the tap"):
        toy(torch.tensor(4.0))
    detach()
    del toy.elsewhere


@pytest.mark.parametrize(
    "tap", [Tap(("norm_out",), "norm_out"), Tap(("bricks",), "norm_out"), Tap(("blocks",), "nrom")]
)
def test_a_tap_must_name_what_the_transformer_has(toy, tap):
    with pytest.raises(ValueError, match="correct the tap"):
        attach(toy, tap, Ear(full=True).begin)


def test_taps_are_found_by_class_and_parent_class():
    class Finetuned(type(build_transformer())):
        pass

    transformer = build_transformer()
    tap = tap_of(transformer)
    assert tap == (("transformer_blocks", "single_transformer_blocks"), "norm_out")
    transformer.__class__ = Finetuned
    assert tap_of(transformer) == tap


def test_the_output_tap_has_the_same_blocks_and_no_module():
    transformer = build_transformer()
    assert tap_of(transformer, "output") == tap_of(transformer)._replace(module=None)
    with pytest.raises(ValueError, match="one of feature, norm, projection, output, got 'input'"):
        tap_of(transformer, "input")


def test_each_class_has_its_usual_tap_and_all_have_the_others():
    modules = {"norm": "norm_out", "projection": "proj_out", "output": None}
    for transformer, usual in ((build_transformer(), "norm"), (build_qwen_transformer(), "projection")):
        kind, usual_tap = type(transformer).__name__, tap_of(transformer)
        assert usual_tap == tap_of(transformer, usual)
        assert {place: tap_of(transformer, place).module for place in modules} == modules
        names = {place: place_of(kind, tap_of(transformer, place)) for place in modules}
        assert names == {**{place: place for place in modules}, usual: "feature"}
    assert place_of("Toy", TAP) == "feature" and place_of("Toy", OUTPUT) == "output"


def test_after_the_output_nothing_is_left_to_do():
    transformer, outputs = build_transformer(), torch.randn(2, 9, 16)
    assert head(transformer, tap_of(transformer, "output"))(outputs, torch.empty(2, 0)) is outputs


def test_an_unknown_class_asks_for_a_tap(toy):
    with pytest.raises(ValueError, match=r"got a Toy; .*pass tap=lesa\.Tap\("):
        tap_of(toy)
    assert tap_of(toy, "output") == Tap(), "which every module has"


def test_a_transformer_compiled_as_a_whole_is_refused_but_at_its_output():
    (in_place := Toy()).compile(backend="eager")
    for compiled in (torch.compile(Toy(), backend="eager"), in_place):
        with pytest.raises(ValueError, match="compile_repeated_blocks"):
            attach(compiled, TAP, Ear(full=True).begin)
        attach(compiled, Tap(), (ear := Ear(full=False)).begin)
        assert compiled(torch.tensor(4.0)) == ear.replacement


def test_streams_are_heard_where_they_are_named(toy):
    said = []

    @contextmanager
    def within(name):
        said.append(name)
        yield
        said.append(f"{name} ends")

    undo = hear(toy, within)
    with toy.cache_context("cond"):
        said.append("...")
    with pytest.raises(KeyboardInterrupt), toy.cache_context("uncond", step_index=3):
        raise KeyboardInterrupt
    assert said == ["cond", "...", "cond ends", "uncond"]
    assert toy.said == ("uncond", {"step_index": 3}), "the transformer hears it too"
    undo()
    del toy.said
    hear(nn.Identity(), within)()  # names no streams: nothing to hear


def test_hearing_streams_twice_unwinds_in_order(toy):
    said = []

    @contextmanager
    def first(name):
        said.append(f"first {name}")
        yield

    @contextmanager
    def second(name):
        said.append(f"second {name}")
        yield

    undo_first, undo_second = hear(toy, first), hear(toy, second)
    with toy.cache_context("cond"):
        pass
    undo_second()
    with toy.cache_context("uncond"):
        pass
    assert said == ["second cond", "first cond", "first uncond"]
    undo_first()
    del toy.said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_gives_the_transformers_output_from_any_tokens(dtype):
    transformer = build_transformer().to(dtype)
    tap, passed = tap_of(transformer), {}
    transformer.norm_out.register_forward_pre_hook(lambda _, args: passed.update(feature=args[0], conditioning=args[1]))
    inputs = dict(
        hidden_states=torch.randn(2, 9, 16, dtype=dtype),
        encoder_hidden_states=torch.randn(2, 5, 32, dtype=dtype),
        pooled_projections=torch.randn(2, 32, dtype=dtype),
        timestep=torch.tensor([0.7, 0.3], dtype=dtype),
        img_ids=torch.zeros(9, 3),
        txt_ids=torch.zeros(5, 3),
    )
    output = transformer(**inputs, return_dict=False)[0]
    some = torch.tensor([7, 0, 3])
    outputs = head(transformer, tap)
    feature, conditioning = passed["feature"], passed["conditioning"]
    tolerance = dict(rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-2)
    torch.testing.assert_close(outputs(feature, conditioning), output, rtol=0, atol=0)
    torch.testing.assert_close(outputs(feature.float()[:, some], conditioning), output[:, some], **tolerance)
    torch.testing.assert_close(outputs(feature[1, some], conditioning[1]), output[1, some], **tolerance)
    stacked = outputs(feature.expand(4, 3, -1, -1, -1), conditioning.expand(4, 3, -1, -1))
    torch.testing.assert_close(stacked, output.expand(4, 3, -1, -1, -1), **tolerance)


def test_the_head_refuses_what_does_not_pair_up():
    outputs = head(transformer := build_transformer(), tap_of(transformer))
    with pytest.raises(ValueError, match=r"\(2, 9, 24\) and \(24,\)"):
        outputs(torch.zeros(2, 9, 24), torch.zeros(24))
    with pytest.raises(ValueError, match="write the call"):
        head(transformer, Tap(("transformer_blocks",), "final_layer"))
