"""Pipelines in every form that weights come in: full runs are what they were to the bit, skipped ones are sane.

Quantised ones need torchao, optimum-quanto or gguf, each of which is passed over where it is not installed.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from tiny import build_transformer
from torch import nn

import lesa
from lesa.host.pipelines import with_call
from lesa.predictors.fingerprint import fingerprint, pipeline_fingerprint, stamp
from lesa.predictors.shelf import Shelf

STEPS = 4
SQUARE = dict(height=32, width=32, num_inference_steps=STEPS, output_type="latent")
CALLS: dict[str, dict[str, Any]] = {
    "flux": {**SQUARE, "max_sequence_length": 16},
    "qwen": {**SQUARE, "negative_prompt": "fish", "true_cfg_scale": 2.0},
    "hunyuan": {**SQUARE, "width": 48, "num_frames": 5},
}
PROMPT = "small red apple on white, left"
SCHEDULE = lesa.Schedule.at([0, 2])
FP8 = dict(storage_dtype=torch.float8_e4m3fn)


class Form(NamedTuple):
    """A form of a denoiser's weights: what makes it of a pipeline, what a call runs under, and the package it needs."""

    make: Callable[[Any], Any]
    under: Callable[[], Any] = nullcontext
    needs: str | None = None


def to(dtype: torch.dtype, pipe: Any) -> None:
    pipe.to(dtype)


def cast_layers(dtype: torch.dtype, pipe: Any) -> None:
    pipe.to(dtype)
    pipe.transformer.enable_layerwise_casting(**FP8, compute_dtype=dtype)


def torchao(config: str, pipe: Any) -> None:
    from torchao import quantization

    quantization.quantize_(pipe.transformer, getattr(quantization, config)())


def quanto(weights: str, activations: str | None, frozen: bool, pipe: Any) -> None:
    from optimum import quanto

    quanto.quantize(pipe.transformer, weights=weights, activations=activations)
    if frozen:
        quanto.freeze(pipe.transformer)


def gguf(pipe: Any) -> None:
    """Quantise the blocks' linear layers as a GGUF file holds them, 32 numbers with a scale each."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType, quants

    for block in (*pipe.transformer.transformer_blocks, *getattr(pipe.transformer, "single_transformer_blocks", [])):
        for owner in list(block.modules()):
            for name, layer in list(owner.named_children()):
                if isinstance(layer, nn.Linear) and layer.in_features % 32 == 0:
                    codes = quants.quantize(layer.weight.detach().numpy(), GGMLQuantizationType.Q8_0)
                    made = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, torch.float32)
                    weight = torch.from_numpy(codes.copy())
                    made.weight = GGUFParameter(weight, quant_type=GGMLQuantizationType.Q8_0)
                    made.bias = layer.bias
                    setattr(owner, name, made)
    assert any(isinstance(one, GGUFLinear) for one in pipe.transformer.modules())


FORMS: dict[str, Form] = {
    "bfloat16": Form(partial(to, torch.bfloat16)),
    "float16": Form(partial(to, torch.float16)),
    "autocast": Form(lambda _pipe: None, lambda: torch.autocast("cpu", torch.bfloat16)),
    "float8 layers, bfloat16": Form(partial(cast_layers, torch.bfloat16)),
    "float8 layers, float32": Form(partial(cast_layers, torch.float32)),
    "torchao int8": Form(partial(torchao, "Int8WeightOnlyConfig"), needs="torchao"),
    "torchao int8, activations too": Form(partial(torchao, "Int8DynamicActivationInt8WeightConfig"), needs="torchao"),
    "torchao float8": Form(partial(torchao, "Float8WeightOnlyConfig"), needs="torchao"),
    "quanto int8": Form(partial(quanto, "qint8", None, True), needs="optimum.quanto"),
    "quanto int8, not frozen": Form(partial(quanto, "qint8", None, False), needs="optimum.quanto"),
    "quanto int4, not frozen": Form(partial(quanto, "qint4", None, False), needs="optimum.quanto"),
    "quanto float8": Form(partial(quanto, "qfloat8", None, True), needs="optimum.quanto"),
    "GGUF": Form(gguf, needs="gguf"),
}


RUN = [form for form in FORMS if "int4" not in form]
"""Those that are run: the first call of quanto's int4 compiles C++ for minutes."""


def formed(form: str, pipe: Any) -> Any:
    """Return a copy of a pipeline in a form; skips the test where its package is not installed."""
    if FORMS[form].needs:
        pytest.importorskip(FORMS[form].needs)
    pipe = copy.deepcopy(pipe)
    pipe.set_progress_bar_config(disable=True)
    FORMS[form].make(pipe)
    return pipe


def draw(pipe: Any, call: dict[str, Any], form: str | None = None, seed: int = 0) -> torch.Tensor:
    with FORMS[form].under() if form else nullcontext(), torch.no_grad():
        found = pipe(PROMPT, generator=torch.Generator().manual_seed(seed), **call)
    return found.frames if hasattr(found, "frames") else found.images


@pytest.fixture
def system(request, tiny_flux, tiny_qwen, tiny_hunyuan):
    return {"flux": tiny_flux, "qwen": tiny_qwen, "hunyuan": tiny_hunyuan}[request.param], CALLS[request.param]


BROAD = pytest.mark.broad
IN_SHORT = [(form, "flux") for form in RUN] + [("bfloat16", "qwen"), ("bfloat16", "hunyuan")]
"""What is tried in `make test`, of all forms of all systems."""
FORMS_OF = [pytest.param(*one, marks=[] if one in IN_SHORT else BROAD) for one in product(RUN, CALLS)]


@pytest.mark.parametrize(("form", "system"), FORMS_OF, indirect=["system"])
def test_in_every_form_full_runs_are_the_same_and_skipped_ones_are_near(form, system):
    pipe, call = formed(form, system[0]), system[1]
    plain = draw(pipe, call, form)
    for tap in ("output", "feature"):
        with lesa.accelerate(pipe, lesa.Taylor(1), schedule=lesa.Schedule.every(1), tap=tap) as run:
            assert torch.equal(draw(pipe, call, form), plain)
        assert {one.full_steps for one in run.summary().values()} == {STEPS}
        with lesa.accelerate(pipe, lesa.Taylor(1), schedule=SCHEDULE, tap=tap) as run:
            skipped = draw(pipe, call, form)
        assert {one.full_steps for one in run.summary().values()} == {2}
        off = (skipped - plain).float().norm() / plain.float().norm()
        assert skipped.dtype == plain.dtype and 0 < off < 0.2, f"{tap}: {off}"
    assert torch.equal(draw(pipe, call, form), plain)


# --- compiled


def regional(pipe: Any) -> None:
    pipe.transformer.compile_repeated_blocks(backend="eager")


def whole(pipe: Any) -> None:
    pipe.transformer.compile(backend="eager")


def wrapped(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


COMPILED = [(regional, "before", "float32"), (whole, "after", "float32")]
MORE = [(compiled, when, "float32") for compiled in (regional, whole, wrapped) for when in ("before", "after")]
for narrow in ("bfloat16", "float8 layers, bfloat16", "torchao int8", "quanto int8"):
    MORE += [(regional, "before", narrow), (whole, "after", narrow)]
COMPILED += [pytest.param(*one, marks=BROAD) for one in MORE if one not in COMPILED]


@pytest.mark.parametrize(("compiled", "when", "form"), COMPILED)
def test_compiled_before_or_after_it_is_the_same(compiled, when, form, tiny_flux):
    torch.compiler.reset()
    pipe = formed(form, tiny_flux) if form in FORMS else copy.deepcopy(tiny_flux)
    plain, name = draw(pipe, CALLS["flux"]), fingerprint({"": pipe.transformer})
    if when == "before":
        compiled(pipe)
    with lesa.accelerate(pipe, lesa.Taylor(1), schedule=lesa.Schedule.every(1)):
        if when == "after":
            compiled(pipe)
        assert torch.equal(draw(pipe, CALLS["flux"]), plain)
    with lesa.accelerate(pipe, lesa.Taylor(1), schedule=SCHEDULE) as run:
        skipped = draw(pipe, CALLS["flux"])
    assert run.summary()["cond"].full_steps == 2 and skipped.isfinite().all() and not torch.equal(skipped, plain)
    assert torch.equal(draw(pipe, CALLS["flux"]), plain)
    assert fingerprint({"": pipe.transformer}) == name


# --- names of weights


class Bare:
    """As much of a pipeline as a form needs."""

    def __init__(self, seed: int = 0):
        self.transformer = build_transformer(seed)
        self.components = {"transformer": self.transformer}

    def to(self, dtype: torch.dtype) -> None:
        self.transformer.to(dtype)


def names(forms: list[str]) -> dict[str, list[str]]:
    """Return the names that the weights of a tiny transformer have in these forms."""
    found = {}
    for form in forms:
        FORMS[form].make(pipe := Bare())
        found[form] = [fingerprint(pipe.components), pipeline_fingerprint(pipe)]
    return found


def there(form: str) -> bool:
    try:
        __import__(FORMS[form].needs or "torch")
    except ImportError:
        return False
    return True


@pytest.fixture(scope="module")
def elsewhere() -> dict[str, list[str]]:
    """The names in a process of its own."""
    here = str(Path(__file__).parent)
    words = f"import sys, json; sys.path.insert(0, {here!r}); import test_types as t; "
    words += "print(json.dumps(t.names([form for form in t.NAMED if t.there(form)])))"
    said = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    return json.loads(said.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def here() -> dict[str, list[str]]:
    return names([form for form in NAMED if there(form)])


NAMED = [form for form in FORMS if form != "autocast"]


@pytest.mark.parametrize("form", NAMED)
def test_weights_in_every_form_have_a_name_of_their_own_in_every_process(form, here, elsewhere):
    FORMS[form].needs and pytest.importorskip(FORMS[form].needs)
    assert here[form] == elsewhere[form]
    assert [one for one, found in here.items() if found[0] == here[form][0]] == [form]
    FORMS[form].make(other := Bare(seed=1))
    assert fingerprint(other.components) != here[form][0] and pipeline_fingerprint(other) != here[form][1]
    assert here[form][0] != fingerprint(Bare().components)


@pytest.mark.parametrize("form", NAMED)
def test_a_cheap_look_tells_that_weights_took_another_form(form):
    FORMS[form].needs and pytest.importorskip(FORMS[form].needs)
    pipe = Bare()
    before = stamp(pipe.components)
    FORMS[form].make(pipe)
    assert stamp(pipe.components) not in (before, None) and stamp(pipe.components) == stamp(pipe.components)


@pytest.mark.parametrize("form", [form for form in RUN if "float16" not in form])
def test_a_pipeline_in_every_form_is_calibrated_and_found_again(form, tiny_flux):
    pipe = formed(form, tiny_flux)
    with_call(pipe, {**CALLS["flux"], "output_type": "pil"})
    options = lesa.CalibrateOptions(refine=1, most=2, rivals=False, pictures=False, progress=False)
    with FORMS[form].under():
        predictor = lesa.calibrate(pipe, [PROMPT], None, options, budget=2)
        (kept,) = Shelf().all()
        assert kept.fingerprint == fingerprint({"transformer": pipe.transformer})
        again = formed(form, tiny_flux)
        with lesa.accelerate(again) as run:
            skipped = draw(again, CALLS["flux"])
        assert run.summary()["cond"].full_steps == 2 and str(run.summary()).count(kept.name) == 1
        assert skipped.isfinite().all() and len(predictor.full) == 2
