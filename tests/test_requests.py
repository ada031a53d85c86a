"""What a server sees: runs that a predictor does not fit, one of another kind after the other on one acceleration."""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from zoo.parts import Specimen
from zoo.pipelines import ZOO

import lesa
from lesa.host.facts import listen
from lesa.predictors import LESA, Origin, Predictor, Solved, configuration
from lesa.rows.default import Default
from lesa.rows.named import named
from lesa.rows.tap import Tap

STEPS = 10
REQUESTS = {
    "a warm-up of one step": dict(num_inference_steps=1),
    "another number of steps": dict(num_inference_steps=9),
    "another size": dict(height=24, width=24),
    "no guidance": dict(true_cfg_scale=1.0),
}
WORDS = {
    "a warm-up of one step": "trained for 10 steps .*, got 1 step ",
    "another number of steps": "got 9 steps",
    "another size": "got 10 steps .* and the image size",
    "no guidance": "got a run without uncond",
}


def asked(subject: Specimen, **call) -> Specimen:
    return replace(subject, arguments={**subject.arguments, **call})


@pytest.fixture(scope="module")
def text() -> Specimen:
    return asked(ZOO["flux_guided"](), num_inference_steps=STEPS)


@pytest.fixture(scope="module")
def image() -> Specimen:
    return asked(ZOO["flux_img2img_guided"](), num_inference_steps=STEPS)


def origin(subject: Specimen) -> Origin:
    with listen(subject.pipe) as facts:
        subject.call()
    module, training = subject.pipe.transformer, dict(guidance=dict(scale=3.0, rescaled=False))
    kind = type(module).__name__
    return Origin(
        "tiny", kind, configuration(module), Tap(), facts[0].times, "at:0,2,5,8", facts[0].streams, training=training
    )


@pytest.fixture(scope="module", params=["solved", "trained"])
def predictor(request, text) -> Predictor:
    if request.param == "trained":
        return LESA(origin(text))
    made = Solved(origin(text))
    made.set_gaps(torch.eye(4, 5).double() * 0.9)
    return made


@pytest.mark.parametrize("request_", REQUESTS)
def test_a_run_that_a_named_predictor_does_not_fit_is_refused_with_what_its_holder_can_do(text, predictor, request_):
    with lesa.accelerate(text.pipe, predictor) as run:
        with pytest.raises(ValueError, match=f"{WORDS[request_]}.*fallback='full'.*fallback='default'"):
            asked(text, **REQUESTS[request_]).call()
        text.call()
    assert run.summary()["cond"].skipped_steps == 6 and run.summary().fallbacks == 0


def test_an_image_to_image_run_is_refused_in_words_of_predictors(image, predictor):
    with (
        lesa.accelerate(image.pipe, predictor),
        pytest.raises(
            ValueError, match=r"runs from step 0 on.*begins at step 2 \(image to image.*fallback='full'"
        ) as caught,
    ):
        image.call()
    assert "add 2" not in str(caught.value)


@pytest.mark.parametrize("fallback", ["full", "default", Default()], ids=repr)
def test_a_fallback_runs_what_does_not_fit_and_is_counted(text, image, predictor, fallback):
    with lesa.accelerate(text.pipe, predictor) as alone:
        wanted = text.call().images
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with lesa.accelerate(text.pipe, predictor, fallback=fallback) as run:
            for call in REQUESTS.values():
                found = asked(text, **call).call().images
                plain = instead(asked(text, **call), fallback)
                assert torch.equal(found, plain)
            assert torch.equal(text.call().images, wanted)
    summary = run.summary()
    assert summary.fallbacks == len(REQUESTS) and "4 runs fitted no predictor, and fell back" in str(summary)
    assert summary["uncond"].skipped_steps >= alone.summary()["uncond"].skipped_steps
    with lesa.accelerate(image.pipe, predictor, fallback=fallback) as run:
        found = image.call().images
    assert run.summary().fallbacks == 1 and torch.equal(found, instead(image, fallback))


def instead(subject: Specimen, fallback: object) -> torch.Tensor:
    """Draw on parts of a pipeline's own what a fallback makes: every step full, or rows without training."""
    parts = dict(subject.pipe.components)
    for name in ("transformer", "scheduler"):
        parts[name] = copy.deepcopy(parts[name])
    other = replace(subject, pipe=type(subject.pipe)(**parts))
    other.pipe.set_progress_bar_config(disable=True)
    if fallback == "full":
        return other.call().images
    with lesa.accelerate(other.pipe, Default()):
        return other.call().images


@pytest.mark.parametrize("what", [lesa.Taylor(1), lesa.Default()], ids=repr)
def test_a_forecaster_without_training_may_have_a_fallback_too(image, what):
    schedule = lesa.Schedule.at([0, 3]) if isinstance(what, lesa.Taylor) else None
    with lesa.accelerate(image.pipe, what, schedule=schedule, fallback="full") as run:
        image.call()
    assert run.summary().fallbacks == (schedule is not None)  # the default has a schedule for any start


def test_a_budget_beyond_a_warm_up_is_refused_or_falls_back(text):
    """Where nothing was made for the weights, too."""
    warm_up = asked(text, num_inference_steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with (
            lesa.accelerate(text.pipe, budget=4),
            pytest.raises(ValueError, match=r"a budget of 4.*'full'"),
        ):
            warm_up.call()
        with lesa.accelerate(text.pipe, budget=4, fallback="full") as run:
            warm_up.call()
            text.call()
    assert run.summary().fallbacks == 1 and run.summary()["cond"].full_steps == 1 + 4


@pytest.mark.parametrize("what", ["", "taylor", "reuse:2", "default:1", "lagrange:x", "nothing"])
def test_rows_have_names(what):
    assert isinstance(named("default"), lesa.Default) and named("taylor:2").order == 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"default, reuse, taylor:1"):
        named(what)
