"""ComfyUI's sampling, as lesa sees it: evaluations of the model, each at a noise level, in the order of a sampler.

What the sampler calls is the denoiser: it gives a data prediction D for each condition (cond and uncond; whether they
went through the model in one batch, or apart, or area by area is settled below), guidance makes one of them, and the
sampler moves on. Steps are these evaluations, of which a sampler may make two or three a step of its own, and forecast
is the derivative d = (x - D) / sigma that samplers follow, or D where noise is added. All of it hangs on one wrapper of
a clone of the model; whatever belongs to one sampling lives in the options of that sampling alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lesa.host.facts import mixture
from lesa.host.outside import Asked, OutsideRun, choose
from lesa.host.summary import Summary
from lesa.predictors.facts import Facts
from lesa.predictors.fingerprint import fingerprint
from lesa.rows.schedule import MOST_STEPS

KEY = "lesa"
SAME = 1e-4
"""By what share the noise level of an evaluation may be another than the one expected."""
NOISE = 1e-4
"""What a sampler makes of zeros, if it is more than this, is noise that it adds."""
OLDEST = "0.3.52"
NAMES = ("cond", "uncond")
SPECIAL = ("control", "area", "mask", "hooks", "gligen")
CHANGING = "some in a part of the run"


# --- a sampler, by what it does


class Course(NamedTuple):
    """What a sampler will do: the noise level of each evaluation, the one that it ends at, and whether it adds noise.

    `guidance_parts` tells that it looks at the parts of guidance as well (CFG++). `latents` are what it called the
    model with, one for each evaluation, and at last what it returned.
    """

    sigmas: tuple[float, ...]
    last: float
    noise: bool
    guidance_parts: bool
    latents: tuple[Tensor, ...]


Answer = Callable[[int, Tensor, Tensor], Tensor]
"""(number of an evaluation, latents, their noise level as `as_column` gives it) -> the data prediction there"""


class _OtherCourse(Exception):
    """Ends a run on numbers that evaluates the model elsewhere than the one before."""


class _Probe:
    """Stands for the guider in a sampler's own run on numbers: its answers are given beforehand."""

    def __init__(self, guider: Any, answer: Answer, expected: Sequence[float] | None):
        self._guider, self._answer, self._expected = guider, answer, expected
        self.sigmas: list[float] = []
        self.latents: list[Tensor] = []
        self.guidance_parts = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._guider, name)

    def __call__(self, x: Tensor, sigma: Tensor, model_options: Any = None, seed: Any = None) -> Tensor:
        step, level = len(self.sigmas), as_column(sigma, x)
        self.sigmas.append(float(sigma.flatten()[0]))
        if step >= MOST_STEPS or (
            self._expected is not None and self.sigmas[-1:] != [*self._expected[step : step + 1]]
        ):
            raise _OtherCourse
        self.latents.append(x.detach().clone())
        denoised = self._answer(step, x, level).to(x)
        for function in (model_options or {}).get("sampler_post_cfg_function", ()):
            self.guidance_parts = True
            parts = dict.fromkeys(("denoised", "cond_denoised", "uncond_denoised"), denoised)
            denoised = function(parts | {"input": x, "sigma": sigma, "model_options": model_options})
        return denoised


def probe(
    sampler: Any,
    guider: Any,
    sigmas: Tensor,
    start: Tensor,
    answer: Answer,
    expected: Sequence[float] | None = None,
    seed: int = 0,
) -> Course:
    """Run a sampler on latents of any size, with the answer to each evaluation given; what noise it adds depends on the
    seed, and random numbers stay as they are."""
    stand_in = _Probe(guider, answer, expected)
    devices = [start.device.index or 0] if start.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        options = {"model_options": {"transformer_options": {"sample_sigmas": sigmas}}, "seed": seed}
        end = sampler.sample(stand_in, sigmas, options, None, start.clone(), torch.zeros_like(start), None, True)
    noise = float(end.abs().max()) > NOISE
    latents = *stand_in.latents, end
    return Course(tuple(stand_in.sigmas), float(sigmas[-1]), noise, stand_in.guidance_parts, latents)


def still(_step: int, x: Tensor, _level: Tensor) -> Tensor:
    """Answer that all is data already: a sampler moves nothing, but for the noise that it adds."""
    return x


def course_of(sampler: Any, guider: Any, sigmas: Tensor, ndim: int) -> Course:
    """Find out what a sampler will do, by a run on zeros: what is not zero then is noise that it adds.

    Raises: ValueError if it goes by what the model says, as adaptive ones do.
    """
    start = torch.zeros((1,) * ndim, device=sigmas.device)
    random = torch.Generator().manual_seed(0)
    try:
        course = probe(sampler, guider, sigmas, start, still)
        probe(
            sampler,
            guider,
            sigmas,
            start + 1,
            lambda _step, x, level: x - level * torch.randn(x.shape, generator=random).to(x),
            course.sigmas,
        )
    except _OtherCourse:
        raise ValueError(
            f"lesa needs to know a sampler's steps before it begins, but {name_of(sampler)} chooses them as it goes; "
            "take another sampler, or leave LESA Accelerate out."
        ) from None
    return course


def name_of(sampler: Any) -> str:
    """Return the name of a sampler, with the settings that were given to it."""
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    given = getattr(sampler, "extra_options", {}) | getattr(sampler, "inpaint_options", {})
    plain = {key: value for key, value in given.items() if isinstance(value, (bool, int, float, str))}
    return name + (f"({', '.join(f'{key}={plain[key]}' for key in sorted(plain))})" if plain else "")


def time_of(sigma: float, flow: bool) -> float:
    """Return the time in [0, 1] of a noise level."""
    return sigma if flow else sigma / (1 + sigma)


def is_flow(guider: Any) -> bool:
    """Tell whether noise levels are those of flow matching, the share of noise, or noise over data."""
    from comfy.model_sampling import CONST

    return isinstance(guider.model_patcher.get_model_object("model_sampling"), CONST)


def as_column(sigma: Tensor, x: Tensor) -> Tensor:
    """Return noise levels, one for each picture of a batch, in a form that multiplies its latents."""
    return sigma.reshape(-1, *(1,) * (x.ndim - 1)).to(x)


# --- conditions


def is_active(part: dict, sigma: float) -> bool:
    """Tell whether a part of a condition acts at a noise level (Conditioning Set Timestep Range)."""
    return _within(sigma, part.get("timestep_start"), part.get("timestep_end"))


def _within(sigma: float, start: Any, end: Any) -> bool:
    """Compare noise levels as ComfyUI does, in float32."""
    first, last = (None if x is None else float(torch.as_tensor(x, dtype=torch.float32)) for x in (start, end))
    return not ((first is not None and sigma > first) or (last is not None and sigma < last))


def controls_of(part: dict, sigma: float) -> Iterator[bool]:
    """Yield of each ControlNet of a part of a condition whether it acts at a noise level."""
    control = part.get("control")
    while control is not None:
        yield _within(sigma, *(getattr(control, "timestep_range", None) or (None, None)))
        control = getattr(control, "previous_controlnet", None)


def kind_of(conds: Sequence[Any], sigma: float) -> tuple:
    """Say which parts of which conditions act at a noise level: while that stays as it is, outputs are forecast."""
    return tuple(
        cond and tuple((k, *controls_of(part, sigma)) for k, part in enumerate(cond) if is_active(part, sigma))
        for cond in conds
    )


def check_conditions(conds: Sequence[Any], model_options: dict) -> None:
    """Raise ValueError if outputs belong to other frames, or other weights, from step to step."""
    if model_options.get("context_handler") is not None:
        raise ValueError(
            "context windows give the model other frames from step to step, which are not forecast from each other; "
            "leave LESA Accelerate, or the context windows, out."
        )
    for part in (part for cond in conds if cond for part in cond):
        for hook in getattr(part.get("hooks"), "hooks", ()):
            if len(getattr(getattr(hook, "hook_keyframe", None), "keyframes", ())) > 1:
                raise ValueError(
                    "a hook whose keyframes change the model's weights from step to step is not forecast across; leave "
                    "LESA Accelerate out, or give the hook one keyframe."
                )


def stream_of(conds: Sequence[Any], sigmas: Sequence[float]) -> str:
    """Name what a call predicts: its conditions, and what a calibration has to know of them."""
    found = []
    for k, cond in enumerate(conds):
        if not cond:
            continue
        marks = [f"of {len(cond)} parts"] if len(cond) > 1 else []
        marks += [f"with {word}" for word in SPECIAL if any(word in part for part in cond)]
        found.append(" ".join([_name(k), *marks]))
    changing = len({kind_of(conds, sigma) for sigma in sigmas}) > 1
    return " and ".join(found) + (f", {CHANGING}" if changing else "")


def _name(k: int) -> str:
    return NAMES[k] if k < len(NAMES) else f"condition {k + 1}"


def embedded_guidance(conds: Sequence[Any]) -> tuple[float, ...]:
    """Return the numbers that the model is given as guidance (Flux Guidance)."""
    found = [part.get("model_conds", {}).get("guidance") for cond in conds if cond for part in cond]
    values = [x.cond for x in found if isinstance(getattr(x, "cond", None), Tensor)]
    return tuple(sorted({round(float(value), 4) for x in values for value in x.flatten().float()}))


# --- one sampling


class Sampling:
    """One sampling of an accelerated model, from its sampler's first evaluation to its last.

    `weights_of` gives the fingerprint of the model as it is loaded now.
    """

    def __init__(self, course: Course, flow: bool, sampler: str, asked: Asked, weights_of: Callable[[], str]):
        self.course, self.sampler = course, sampler
        times = [time_of(sigma, flow) for sigma in (*course.sigmas, course.last)]
        self.run = OutsideRun(times, data=course.noise)
        self.step, self.seconds, self.full_seconds = -1, 0.0, list[float]()
        self._asked, self._weights_of = asked, weights_of
        self._first: tuple[Sequence[Any], list[Tensor]] | None = None

    def evaluate(self, executor: Any, x: Tensor, sigma: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Stand in the way of an evaluation: what a guider makes of the conditions' predictions."""
        self.step += 1
        self._check(float(sigma.flatten()[0]))
        self.run.at(self.step)
        denoised = executor(x, sigma, *args, **kwargs)
        if self.step == 0:
            self._decide(x, sigma, denoised)
        feature = self._feature(denoised, x, sigma)
        handed = self.run.handed(feature, x)
        return denoised if handed is feature else self._prediction(handed, x, sigma)

    def _check(self, sigma: float) -> None:
        expected = self.course.sigmas[self.step] if self.step < len(self.course.sigmas) else None
        if expected is None or abs(sigma - expected) > SAME * max(expected, SAME):
            raise RuntimeError(
                f"{self.sampler} was to evaluate the model at sigma {expected} as number {self.step + 1}, and does so "
                f"at {sigma:.6g}: its steps are not known before; take another sampler, or leave LESA Accelerate out."
            )

    def predict(
        self, executor: Any, model: Any, conds: Sequence[Any], x: Tensor, sigma: Tensor, model_options: dict
    ) -> list[Tensor]:
        """Stand in the way of the model's call: the predictions of all conditions, of which some may be None."""
        if self.step < 0:  # of somebody who asks before the sampler does
            return executor(model, conds, x, sigma, model_options)
        if self.step == 0:
            check_conditions(conds, model_options)
        acting = kind_of(conds, float(sigma.flatten()[0]))
        places = [k for k, parts in enumerate(acting) if parts]
        if self.run.wants([_name(k) for k in places], (acting, tuple(x.shape))):
            with self._timed(x):
                predictions = executor(model, conds, x, sigma, model_options)
            outputs = [self._feature(predictions[k], x, sigma) for k in places]
            self.run.keep(outputs)
            self._first = self._first or (conds, outputs)
            return predictions
        forecasts = dict(zip(places, self.run.forecast(), strict=True))
        return [
            self._prediction(forecasts[k], x, sigma) if k in forecasts else torch.zeros_like(x)
            for k in range(len(conds))
        ]

    def _feature(self, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        """Return what is forecast: the derivative, or the data prediction where noise is added."""
        return prediction if self.course.noise else (x - prediction) / as_column(sigma, x)

    def _prediction(self, feature: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
        return feature if self.course.noise else x - as_column(sigma, x) * feature

    def _decide(self, x: Tensor, sigma: Tensor, denoised: Tensor) -> None:
        """Choose what this run is forecast with, before anything is skipped."""
        if self._first is None:
            raise ValueError(
                "lesa forecasts what the conditions of a guider give, but this one asks for none; take another guider, "
                "or leave LESA Accelerate out."
            )
        conds, outputs = self._first
        facts = Facts(
            times=self.run.times,
            start=0,
            shape=tuple(x.shape[1:]),
            sampler=self.sampler,
            noise=self.course.noise,
            streams=(stream_of(conds, self.course.sigmas),),
            guidance=mixture(outputs, self._feature(denoised, x, sigma)),
            embedded=embedded_guidance(conds),
        )
        self.run.follow(choose(facts, self._weights_of(), self._asked))

    @contextmanager
    def _timed(self, x: Tensor) -> Iterator[None]:
        began = time.perf_counter()
        yield
        synchronize(x)
        self.full_seconds.append(time.perf_counter() - began)

    def end(self, seconds: float) -> None:
        """Say what the sampling took, and let go of all but its numbers: a report may be asked for much later."""
        self.seconds, self._first, self._weights_of, self._latents = seconds, None, str, torch.empty(0)
        self.run.free()

    @property
    def speedup(self) -> float:
        """How much longer the run would have taken with every step full, as its own full steps took."""
        full = sum(self.full_seconds)
        each = full / max(len(self.full_seconds), 1)
        others = max(self.seconds - full, 0.0)
        return (each * self.steps + others) / max(self.seconds, 1e-9)

    @property
    def steps(self) -> int:
        return len(self.course.sigmas)

    def summary(self) -> Summary:
        return self.run.summary()


def synchronize(x: Tensor) -> None:
    """Wait until a device has done what it was asked for."""
    if x.device.type != "cpu" and (wait := getattr(getattr(torch, x.device.type, None), "synchronize", None)):
        wait()


# --- a model


class Accelerated:
    """What is asked for of an accelerated model, and its samplings so far: the wrapper that its clone carries."""

    def __init__(self, asked: Asked):
        self.asked, self.newest, self.samplings = asked, None, 0
        self.newest: Sampling | None = None

    def __call__(self, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, *rest: Any, **kwargs: Any) -> Any:
        """Stand in the way of one sampling of a sampler."""
        from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

        sampler, noise = executor.class_obj, rest[1] if len(rest) > 1 else kwargs["noise"]
        course = course_of(sampler, guider, sigmas, noise.ndim)
        if not course.sigmas:  # nothing is sampled
            return executor(guider, sigmas, extra_args, *rest, **kwargs)
        sampling = Sampling(
            course, is_flow(guider), name_of(sampler), self.asked, lambda: weights_of(guider.model_patcher)
        )
        # The guider's options are a copy for this sampling, and the extra ones one for this sampler.
        add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, sampling.evaluate, guider.model_options, True)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, sampling.predict, extra_args["model_options"], True)
        began = time.perf_counter()
        try:
            result = executor(guider, sigmas, extra_args, *rest, **kwargs)
        finally:
            guider.model_options["transformer_options"]["wrappers"][WrappersMP.PREDICT_NOISE].pop(KEY)
        synchronize(result)
        sampling.end(time.perf_counter() - began)
        self.newest, self.samplings = sampling, self.samplings + 1
        return result


def accelerated(patcher: Any, asked: Asked) -> Any:
    """Return a clone of a model that is accelerated.

    Raises: ValueError if the model is accelerated already; RuntimeError if this ComfyUI is too old.
    """
    from comfy.patcher_extension import WrappersMP

    if not hasattr(WrappersMP, "PREDICT_NOISE"):
        raise RuntimeError(f"lesa needs ComfyUI {OLDEST} or newer, got one whose guiders cannot be wrapped; update it.")
    if of(patcher) is not None:
        raise ValueError("a model is accelerated once, but this one is already; use one LESA Accelerate for a model.")
    clone = patcher.clone()
    clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, Accelerated(asked))
    return clone


def of(patcher: Any) -> Accelerated | None:
    """Return how a model is accelerated, if it is."""
    from comfy.patcher_extension import WrappersMP

    found = patcher.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY)
    return found[0] if found else None


# --- weights


class Denoiser(torch.nn.Module):
    """Holds the weights of a model as they act: those that were loaded, and what is added to them, LoRAs and others."""

    def __init__(self, patcher: Any):
        super().__init__()
        for name, x in weights_in(patcher):
            self._buffers[name] = x

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def weights_of(patcher: Any) -> str:
    """Return the fingerprint of a model: of its weights, of what is added to these, and the names of its patches."""
    return fingerprint({"transformer": Denoiser(patcher)})


def weights_in(patcher: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield a model's weights, whether patches are in them now or not; then what is added to them, with how much."""
    kept = {name: getattr(one, "weight", one) for name, one in patcher.backup.items()}
    named = [*patcher.model.named_parameters(), *patcher.model.named_buffers()]
    for name, x in named:
        if name.startswith("diffusion_model."):
            yield name, kept.get(name, x)
    for name, patches in patcher.patches.items():
        for number, patch in enumerate(patches):
            yield from _added(f"{name} added {number}", patch)
    if (wrapper := patcher.model_options.get("model_function_wrapper")) is not None:
        yield f"within {_name_of(wrapper)}", torch.zeros(())
    for where in ("patches", "patches_replace"):
        for kind, some in patcher.model_options.get("transformer_options", {}).get(where, {}).items():
            for place, patch in some.items() if isinstance(some, dict) else enumerate(some):
                yield f"{where} {kind} {place} {_name_of(patch)}", torch.zeros(())


def _name_of(patch: Any) -> str:
    return getattr(patch, "__qualname__", type(patch).__name__)


def _added(name: str, patch: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a patch of a weight, named by the numbers that go with them."""
    if isinstance(patch, Tensor):
        yield name, patch
    elif isinstance(patch, (list, tuple)):
        plain = [x for x in patch if isinstance(x, (bool, int, float, str))]
        yield f"{name} by {plain}", torch.zeros(())
        for k, part in enumerate(patch):
            yield from _added(f"{name}.{k}", part)
    elif isinstance(weights := getattr(patch, "weights", None), (list, tuple)):
        yield from _added(f"{name} {type(patch).__name__}", weights)
