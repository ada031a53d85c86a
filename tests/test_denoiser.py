"""What a denoiser may be, at its output and at the feature tap of each class, and whatever else acts on it."""

import copy
import pickle
from contextlib import contextmanager
from functools import cache

import accelerate as offloading
import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel, TaylorSeerCacheConfig
from diffusers.hooks.group_offloading import ModuleGroup
from test_tap import state
from tiny import build_transformer
from torch import Tensor, nn
from zoo.oracle import tensors
from zoo.pipelines import ZOO
from zoo.transformers import MODELS, model_call

from lesa.host.denoiser import attach, check_tap
from lesa.host.offload import groups_layers
from lesa.host.runtime import accelerate
from lesa.host.tap import FINAL, TAPS, tap_of
from lesa.rows.forecasters import Reuse, Taylor
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

STEPS = 8
EVERY = Schedule.every(3)
GRID = torch.linspace(1, 0, STEPS + 1, dtype=torch.float64)
CALL = dict(height=32, width=32, num_inference_steps=STEPS, max_sequence_length=16, output_type="latent")


def draw(pipe, **changes) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe("small red apple on white, left", generator=generator, **{**CALL, **changes}).images


def blocks_of(module: nn.Module, tap: Tap) -> list[nn.Module]:
    return [block for name in tap.blocks for block in module.get_submodule(name)]


@contextmanager
def counted(modules):
    """Count the calls of modules."""
    calls: list[nn.Module] = []
    hooks = [module.register_forward_pre_hook(lambda module, _: calls.append(module)) for module in modules]
    yield calls
    for hook in hooks:
        hook.remove()


# --- the feature taps of all classes


class Replay:
    """A passage that keeps what enters, and puts it back on skipped steps."""

    def __init__(self):
        self.full, self.features = True, {}

    def begin(self, _args, _kwargs):
        return self

    def keep(self, feature, part=0):
        self.features[part] = feature.clone()

    def returned(self, _output):
        pass

    def fits(self, feature, part=0):
        return feature.shape == self.features[part].shape

    def forecast(self, part=0):
        return self.features[part]


@pytest.mark.parametrize("kind", FINAL)
def test_the_feature_tap_of_each_class_is_right_and_shuts_all_blocks(kind):
    module, args, kwargs = model_call(kind)
    before = state(module)
    for tap in {FINAL[kind], TAPS[kind]}:
        check_tap(module, tap, args, kwargs)
    detach = attach(module, FINAL[kind], (passage := Replay()).begin)
    with counted(blocks_of(module, FINAL[kind])) as calls, torch.no_grad():
        module(*args, **kwargs)
        assert calls
        calls.clear()
        passage.full = False
        module(*args, **kwargs)
    assert not calls
    detach()
    assert state(module) == before


WRONG = {
    "one of two modules": ("LTX2VideoTransformer3DModel", "norm_out"),
    "the other one": ("LTX2VideoTransformer3DModel", "audio_norm_out"),
    "before the blocks": ("FluxTransformer2DModel", "x_embedder"),
    "of something else": ("FluxTransformer2DModel", "time_text_embed"),
    "not called": ("ZImageTransformer2DModel", "layers.0.attention_norm1"),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_tap_is_found(how):
    kind, name = WRONG[how]
    module, args, kwargs = model_call(kind)
    before, random = state(module), torch.random.get_rng_state()
    with pytest.raises(ValueError, match="name all modules that features enter behind all of its blocks"):
        check_tap(module, FINAL[kind]._replace(module=name), args, kwargs)
    assert state(module) == before and torch.equal(random, torch.random.get_rng_state())


def test_a_run_may_verify_its_tap(tiny_flux):
    right = tap_of(tiny_flux.transformer)
    with counted([tiny_flux.transformer.norm_out]) as calls:
        with accelerate(tiny_flux, Taylor(1), schedule=EVERY, tap=right):
            expected = draw(tiny_flux)
        assert len(calls) == STEPS
        with accelerate(tiny_flux, Taylor(1), schedule=EVERY, tap=right, verify_tap=True) as run:
            assert torch.equal(draw(tiny_flux), expected)
            assert len(calls) == 2 * STEPS + 1
            draw(tiny_flux)
        assert len(calls) == 3 * STEPS + 1 and run.summary()["cond"].full_steps == 6
    wrong = right._replace(module="x_embedder")
    with (
        accelerate(tiny_flux, Taylor(1), schedule=EVERY, tap=wrong, verify_tap=True),
        pytest.raises(ValueError, match=r"a FluxTransformer2DModel with .*'x_embedder'.* did not"),
    ):
        draw(tiny_flux)
    with accelerate(tiny_flux, Taylor(1), schedule=EVERY, verify_tap=True):  # the output is always right
        draw(tiny_flux)


@cache
def plain(kind: str) -> list[Tensor]:
    return [x.clone() for x in tensors(ZOO[MODELS[kind]]().call())]


FULL = {"QwenImage21Transformer2DModel": (1, 3)}  # its first step prefills tokens, and features change their length


@pytest.mark.parametrize("kind", FINAL)
def test_the_pipeline_of_each_class_runs_at_its_feature_tap(kind):
    specimen = ZOO[MODELS[kind]]()
    parts = [part for part in vars(specimen.pipe).values() if type(part).__name__ == kind]
    with accelerate(specimen.pipe, Taylor(1), schedule=Schedule.every(1), tap=FINAL[kind], check=False):
        ours = [x.clone() for x in tensors(specimen.call())]
    assert all(torch.equal(a, b) for a, b in zip(ours, plain(kind), strict=True))
    called: list[bool] = []  # per call of a denoiser that came to its end: whether blocks ran
    with counted([block for part in parts for block in blocks_of(part, FINAL[kind])]) as calls:
        hooks = [part.register_forward_pre_hook(lambda *_: calls.clear()) for part in parts]
        hooks += [part.register_forward_hook(lambda *_: called.append(bool(calls))) for part in parts]
        with accelerate(specimen.pipe, Taylor(1), schedule=EVERY, tap=FINAL[kind], check=False) as run:
            ours = tensors(specimen.call())
        for hook in hooks:
            hook.remove()
    done = run.summary().values()
    assert called.count(True) >= sum(stream.full_steps for stream in done) > 0  # more where a call fills a cache
    assert called.count(False) == sum(stream.skipped_steps for stream in done) > 0
    assert all(x.double().isfinite().all() for x in ours)
    assert kind not in FULL or run.plan().full == FULL[kind]


# --- features of other shapes


class Prefilling(nn.Module):
    """Two parts of a feature; the second has more tokens in the first call than later."""

    def __init__(self, by_blocks: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity()])
        self.norm, self.other_norm = nn.Identity(), nn.Identity()
        self.calls, self.by_blocks = 0, by_blocks

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, self.calls = self.calls == 0, self.calls + 1
        y = torch.cat([x, x]) if first and not self.by_blocks else x
        for block in self.blocks:
            x, y = block(x), torch.cat([y, y]) if self.by_blocks else block(y)
        return self.norm(x), self.other_norm(y)


BOTH = Tap(("blocks",), ("norm", "other_norm"))


def walk(module: nn.Module, run) -> list[Tensor]:
    outputs = []
    for step in range(STEPS):
        run.at(step)
        outputs.append(module(torch.full((2, 3), float(step))))
    return outputs


def test_a_feature_of_another_shape_begins_anew_with_a_full_step():
    module = Prefilling()
    with accelerate(module, Taylor(1), schedule=EVERY, grid=GRID, tap=BOTH) as run:
        outputs = walk(module, run)
    assert run.plan().full == (1, 3, 6)
    assert (run.summary()["cond"].full_steps, run.summary()["cond"].skipped_steps) == (4, 4)
    for step, (x, y) in enumerate(outputs[1:], 1):
        assert len(y) == 2 and torch.equal(x, y)
        assert step not in (1, 3, 6) or x.eq(step).all()
    assert outputs[4][0].allclose(torch.tensor(4.0)), "from steps 1 and 3, of both parts"


def test_blocks_that_change_a_features_shape_are_no_blocks_to_shut():
    module = Prefilling(by_blocks=True)
    with (
        accelerate(module, Taylor(1), schedule=EVERY, grid=GRID, tap=BOTH) as run,
        pytest.raises(RuntimeError, match=r"has the shape that it has after them, got \(2, 3\) and \(4, 3\)"),
    ):
        walk(module, run)


# --- others that act on the blocks


class Indexing(Prefilling):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for k in range(len(self.blocks)):
            x = self.blocks[k](x)
        return self.norm(x), self.other_norm(x)


class OtherCache(nn.Module):
    """Takes the place of a list of blocks, and runs them itself."""

    def __init__(self, blocks: nn.ModuleList):
        super().__init__()
        self.blocks = [*blocks]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("how", ["by index", "by another cache"])
def test_blocks_that_run_on_a_skipped_step_are_an_error(how):
    module = Indexing() if how == "by index" else Prefilling()
    module.calls = 1
    with accelerate(module, Reuse(), schedule=EVERY, grid=GRID, tap=BOTH) as run:
        if how == "by another cache":
            module.blocks = nn.ModuleList([OtherCache(module.blocks)])
        with pytest.raises(RuntimeError, match=r"no block runs on a skipped step, got a call of a Identity"):
            walk(module, run)
    assert module(torch.ones(1, 3))[0].eq(1).all()


CACHES = {
    "first block": FirstBlockCacheConfig(threshold=1e6),
    "TaylorSeer": TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
}


@pytest.mark.parametrize("tap", ["feature", "output"])
@pytest.mark.parametrize("when", ["before", "within"])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_diffusers_acts_in_full_steps_only(tiny_flux, name, when, tap):
    """It counts the full steps, and may skip parts of these."""
    pipe = copy.deepcopy(tiny_flux)
    transformer = pipe.transformer
    with accelerate(pipe, Reuse(), schedule=EVERY, tap=tap):
        without = draw(pipe)
    inner = [block.attn.to_q for block in blocks_of(transformer, tap_of(transformer))]
    if when == "before":
        transformer.enable_cache(CACHES[name])
    with counted(inner) as calls, accelerate(pipe, Reuse(), schedule=EVERY, tap=tap) as run:
        if when == "within":
            transformer.enable_cache(CACHES[name])
        latents = draw(pipe)
        assert 4 <= len(calls) < 3 * 4, "the other cache skips, too"
    assert (run.summary()["cond"].full_steps, run.summary()["cond"].skipped_steps) == (3, 5)
    assert latents.isfinite().all() and not torch.equal(latents, without)
    transformer.disable_cache()
    with accelerate(pipe, Reuse(), schedule=EVERY, tap=tap):
        assert torch.equal(draw(pipe), without)


# --- types and gradients


def inputs(**changes) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(0)
    whole = dict(
        hidden_states=torch.randn(1, 16, 16, generator=made),
        encoder_hidden_states=torch.randn(1, 8, 32, generator=made),
        pooled_projections=torch.randn(1, 32, generator=made),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(16, 3),
        txt_ids=torch.zeros(8, 3),
    )
    return whole | changes


@pytest.mark.parametrize("tap", ["feature", "output"])
def test_a_skipped_step_that_is_differentiated_is_an_error(tap):
    transformer, x = build_transformer(), inputs()["hidden_states"].requires_grad_()
    with accelerate(transformer, Reuse(), schedule=EVERY, grid=GRID, tap=tap) as run:
        run.at(0)
        transformer(**inputs(hidden_states=x))[0].sum().backward()
        assert x.grad is not None and x.grad.abs().max() > 0
        run.at(1)
        with pytest.raises(RuntimeError, match=r"a skipped step has no gradient.* torch\.no_grad\(\)"):
            transformer(**inputs(hidden_states=x))
        for step in (0, 1):
            run.at(step)
            with torch.no_grad():
                transformer(**inputs(hidden_states=x))
        run.at(2)
        transformer(**inputs())


@pytest.mark.parametrize("tap", ["feature", "output"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", ["autocast", "weights", "layerwise"])
def test_narrow_types_are_as_a_full_step_has_them(how, dtype, tap):
    transformer = build_transformer()
    cast = torch.float32 if how == "autocast" else dtype
    transformer.to(cast)
    if how == "layerwise":
        transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype)
    given = {name: x.to(cast) for name, x in inputs().items()}
    outputs = []
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=how == "autocast"):
        expected = transformer(**given)[0]
        with accelerate(transformer, Reuse(), schedule=EVERY, grid=GRID, tap=tap) as run:
            for step in range(2):
                run.at(step)
                outputs.append(transformer(**given)[0])
    assert all(torch.equal(output, expected) and output.dtype == expected.dtype for output in outputs)
    assert run.summary()["cond"].skipped_steps == 1


# --- copies, and parts that are changed


@pytest.mark.parametrize("tap", ["feature", "output"])
def test_copies_pickles_and_saved_denoisers_are_plain(tiny_flux, tmp_path, tap):
    transformer = tiny_flux.transformer
    expected = transformer(**inputs())[0]
    with accelerate(tiny_flux, Reuse(), schedule=EVERY, tap=tap):
        latents = draw(tiny_flux)
        transformer.save_pretrained(tmp_path)
        others = [
            copy.deepcopy(transformer),
            pickle.loads(pickle.dumps(transformer)),
            FluxTransformer2DModel.from_pretrained(tmp_path),
        ]
        assert tiny_flux.to(torch.float64).to(torch.float32) is tiny_flux
        assert torch.equal(draw(tiny_flux), latents)
    for other in others:
        assert state(other).keys() == state(transformer).keys()
        assert torch.equal(other(**inputs())[0], expected)


@pytest.mark.parametrize("tap", ["feature", "output"])
@pytest.mark.parametrize("part", ["transformer", "scheduler"])
def test_a_part_that_is_changed_between_calls_is_followed(tiny_flux, part, tap):
    pipe = copy.copy(tiny_flux)
    old = getattr(pipe, part)
    new = build_transformer(seed=3) if part == "transformer" else type(old).from_config(old.config, base_shift=1.5)
    before = state(pipe.transformer), vars(old).keys()
    setattr(pipe, part, new)
    with accelerate(pipe, Taylor(1), schedule=EVERY, tap=tap):
        expected = draw(pipe)
    setattr(pipe, part, old)
    with accelerate(pipe, Taylor(1), schedule=EVERY, tap=tap) as run:
        other = draw(pipe)
        setattr(pipe, part, new)
        assert torch.equal(draw(pipe), expected) and not torch.equal(other, expected)
        assert (run.summary()["cond"].full_steps, run.summary()["cond"].skipped_steps) == (6, 10)
    assert (state(tiny_flux.transformer), vars(old).keys()) == before


@pytest.mark.parametrize("how", ["in place", "as a module"])
def test_at_a_feature_tap_a_pipeline_compiled_later_is_refused_at_its_next_call(tiny_flux, how):
    torch._dynamo.reset()
    pipe = copy.copy(tiny_flux)
    pipe.transformer = transformer = build_transformer()
    with accelerate(pipe, Taylor(1), schedule=EVERY, tap="feature"):
        expected = draw(pipe)
        if how == "in place":
            transformer.compile(backend="eager")
        else:
            pipe.transformer = torch.compile(transformer, backend="eager")
        with pytest.raises(ValueError, match="compile_repeated_blocks"):
            draw(pipe)
        pipe.transformer, transformer._compiled_call_impl = transformer, None
        assert torch.equal(draw(pipe), expected)


# --- weights that are elsewhere


def by_groups(pipe) -> None:
    if not groups_layers():
        pytest.skip("an older diffusers groups layers for an accelerator alone")
    pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def by_layers(pipe) -> None:
    weights = {name: nn.Parameter(x.clone()) for name, x in pipe.transformer.state_dict().items()}
    offloading.cpu_offload(pipe.transformer, torch.device("cpu"), state_dict=weights)


def whole(pipe) -> None:
    pipe.transformer, _hook = offloading.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))


MOVES = {by_groups: (ModuleGroup, "onload_"), by_layers: (AlignDevicesHook, "pre_forward")}
MOVES[whole] = (offloading.hooks.CpuOffload, "pre_forward")


@pytest.mark.parametrize("tap", ["feature", "output"])
@pytest.mark.parametrize("way", MOVES)
def test_at_the_output_no_weight_is_moved_on_a_skipped_step(tiny_flux, way, tap, monkeypatch):
    with accelerate(tiny_flux, Reuse(), schedule=EVERY, tap=tap):
        expected = draw(tiny_flux)
    pipe = copy.copy(tiny_flux)
    pipe.transformer = copy.deepcopy(tiny_flux.transformer)
    way(pipe)
    kind, name = MOVES[way]
    original, moves = getattr(kind, name), []
    monkeypatch.setattr(kind, name, lambda *args, **kwargs: moves.append(1) or original(*args, **kwargs))
    before, hooks = state(pipe.transformer), draw(pipe)
    all_full, moves[:] = len(moves), []
    with accelerate(pipe, Reuse(), schedule=EVERY, tap=tap):
        assert torch.equal(draw(pipe), expected)
    if tap == "output":
        assert len(moves) * STEPS == all_full * 3 > 0
    else:
        assert 0 < len(moves) <= all_full
    assert state(pipe.transformer) == before and torch.equal(draw(pipe), hooks)
