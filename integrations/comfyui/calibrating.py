"""Calibrate a model within ComfyUI: its sampling in the form of a pipeline that `lesa.calibrate` can run.

The whole calibration is one sampling of ComfyUI's, by a sampler of its own: the model is loaded and its conditions are
prepared once, as for any other. Within it a run is a loop of evaluations, each followed by a step of the real sampler
as numbers, which were read off it before. Several runs, of several prompts and seeds, walk side by side.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import lesa
from lesa.learn.calibrate import split, usual_budget
from lesa.learn.expected import Runs, most_runs
from lesa.predictors.solved import Solved
from lesa.rows.levels import Levels

from . import sampling
from .sampling import KEY, Course

TOLERANCE = 1e-4
UNUSED = 1e-6
"""Coefficients below this share of the largest are rounding: samplers compute in float32."""
MANY = 4096
"""Of how many numbers the size of a sampler's noise is measured."""


# --- a sampler as numbers


class Numbers(NamedTuple):
    """What a sampler makes of features: x_s = decay_s x_0 + sum_j response_sj f_j + noise_s e, float64.

    Features are derivatives or, where noise is added, data predictions; e is of size 1.
    """

    decay: Tensor
    """(S + 1,)"""
    response: Tensor
    """(S + 1, S)"""
    noise: Tensor
    """(S + 1,)"""


def numbers_of(sampler: Any, guider: Any, sigmas: Tensor, course: Course, ndim: int) -> Numbers:
    """Read a sampler's numbers off a run on impulses, one for the first latents and one for each feature.

    Raises: ValueError if it does not make weighted sums of them.
    """
    steps, size = len(course.sigmas), max(*course.sigmas, 1.0)
    mixed = torch.randn(steps, generator=torch.Generator().manual_seed(0))
    given = torch.cat([torch.zeros(1, steps), torch.eye(steps), mixed[None]])
    start = torch.zeros(steps + 2)
    start[0] = start[-1] = 1.0
    latents = _walked(sampler, guider, sigmas, course, size * start, size * given, ndim) / size
    noise = torch.zeros(steps + 1, dtype=torch.float64)
    if course.noise:  # the same draws, of the same seed
        latents = latents - _walked(sampler, guider, sigmas, course, 0 * start, 0 * given, ndim) / size
        many = torch.zeros(MANY)
        noise = _walked(sampler, guider, sigmas, course, many, many[:, None].expand(-1, steps), ndim).std(1)
    found = Numbers(latents[:, 0] / latents[0, 0], latents[:, 1:-1], noise)
    expected = found.decay * latents[0, -1] + found.response @ mixed.double()
    terms = found.decay.abs() * latents[0, -1].abs() + found.response.abs() @ mixed.double().abs()
    if not ((expected - latents[:, -1]).abs() <= TOLERANCE * terms.clamp_min(1e-6)).all():
        raise ValueError(
            "rows are solved for samplers that make weighted sums of what the model gives, and "
            f"{sampling.name_of(sampler)} does not; calibrate another sampler, or forecast without training."
        )
    return found


def _walked(
    sampler: Any, guider: Any, sigmas: Tensor, course: Course, start: Tensor, features: Tensor, ndim: int
) -> Tensor:
    """Return the latents at each evaluation and the last ones, (S + 1, runs), of runs of one number each: where they
    start, (runs,), and which features they are told, (runs, S)."""
    shape = (-1,) + (1,) * (ndim - 1)

    def answer(step: int, x: Tensor, level: Tensor) -> Tensor:
        feature = features[:, step].reshape(shape).to(x)
        return feature if course.noise else x - level * feature

    told = sampling.probe(sampler, guider, sigmas, start.to(sigmas.device).reshape(shape), answer)
    return torch.stack([x.flatten().double().cpu() for x in told.latents])


def nothing(_step: int, x: Tensor, _level: Tensor) -> Tensor:
    """Answer that data are zeros."""
    return torch.zeros_like(x)


class Drawn:
    """What noise made of the latents by each step, drawn as it is asked for: of a copy, whose numbers are read."""

    def __init__(self, sizes: Sequence[float]):
        self._sizes, self._newest = sizes, (0, torch.zeros(()))

    def at(self, step: int, like: Tensor) -> Tensor:
        if step != self._newest[0]:
            self._newest = step, self._sizes[step] * torch.randn_like(like)
        return self._newest[1].to(like)


class Added:
    """What the sampler's own noise made of the latents by each step, of runs side by side: (S + 1, 1, ...) each."""

    def __init__(self, runs: Sequence[Tensor], sizes: Sequence[float]):
        self._runs, self._sizes = runs, sizes

    def at(self, step: int, like: Tensor) -> Tensor:
        return torch.cat([run[step] for run in self._runs]).to(like)

    def __deepcopy__(self, _memo: dict) -> Drawn:
        return Drawn(self._sizes)


class Steps:
    """A sampler as numbers, in the form of a scheduler of diffusers.

    Where it adds noise, `added` is what that made of the latents of the runs at hand; what is left of them are weighted
    sums, and the `levels` say that outputs are data predictions.
    """

    begin_index = 0
    config = {"prediction_type": "flow_prediction"}  # its times are those that it says  # noqa: RUF012

    def __init__(self, times: Sequence[float], numbers: Numbers, noise: bool = False):
        self.sigmas = torch.tensor(times, dtype=torch.float64)
        steps = len(times) - 1
        self.timesteps = torch.arange(steps, 0, -1)
        self.num_inference_steps: int | None = None
        before = numbers.decay[:-1]
        ratio = torch.where(before.abs() > UNUSED, numbers.decay[1:] / before, 0.0)
        own = numbers.response[1:] - ratio[:, None] * numbers.response[:-1]
        own[own.abs() < UNUSED * own.abs().max()] = 0
        self._ratio, self._own = ratio.tolist(), own
        used = [own[:, k].nonzero().flatten().tolist() for k in range(steps)]
        self._last = [max(places, default=-1) for places in used]
        self._held: dict[int, Tensor] = {}
        self.step_index: int | None = None
        self.added: Added | Drawn | None = None
        output = torch.ones(steps, dtype=torch.float64)
        self.levels = Levels(1 - self.sigmas, self.sigmas, 0 * output, output) if noise else None

    def set_timesteps(self, num_inference_steps: int) -> None:
        self.num_inference_steps, self.step_index, self._held = num_inference_steps, None, {}

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """Return the next latents, given a feature."""
        step = self.step_index or 0
        self._held[step] = model_output
        if self.added is not None:
            sample = sample - self.added.at(step, sample)
        moved = self._ratio[step] * sample
        for k, output in self._held.items():
            if self._own[step, k]:
                moved = moved + float(self._own[step, k]) * output
        if self.added is not None:
            moved = moved + self.added.at(step + 1, sample)
        self._held = {k: output for k, output in self._held.items() if self._last[k] > step}
        self.step_index = step + 1
        return (moved,)


# --- ComfyUI's sampling as a pipeline


class _Heard(Exception):
    """Ends an evaluation as soon as the model has said what it makes of the conditions: guidance comes later."""

    def __init__(self, predictions: list[Tensor]):
        super().__init__("predictions")
        self.predictions = predictions


class _Model(sampling.Denoiser):
    """The denoiser: the features of all conditions, one condition after the other, of all runs in a batch."""

    rig: Rig

    def __init__(self, rig: Rig, patcher: Any):
        super().__init__(patcher)
        object.__setattr__(self, "rig", rig)  # no part of it

    def forward(self, x: Tensor, sigma: float, guidance: Tensor | None = None) -> Tensor:
        found: list[Tensor] = []
        for members in self.rig.groups():
            features = self.rig.features(members, x[members], sigma)
            found = found or [torch.empty_like(x) for _ in features]
            for of_condition, some in zip(found, features, strict=True):
                of_condition[members] = some
        return torch.cat(found)

    def cache_context(self, name: str) -> Any:
        """Name the stream of the calls within: what conditions they are of."""
        return nullcontext()


_Model.__name__ = sampling.Denoiser.__name__  # it is told by its weights alone


class Rig:
    """One sampling of a guider, whose runs can be repeated: with other seeds, of other prompts, accelerated or not."""

    def __init__(
        self,
        guider: Any,
        conds: Sequence[dict],
        sampler: Any,
        sigmas: Tensor,
        options: dict,
        latent: Tensor,
        vae: Any = None,
        at_once: int = 1,
    ):
        course = sampling.course_of(sampler, guider, sigmas, latent.ndim)
        check(course, sampler)
        numbers = numbers_of(sampler, guider, sigmas, course, latent.ndim)
        flow = sampling.is_flow(guider)
        self._times = [sampling.time_of(sigma, flow) for sigma in (*course.sigmas, course.last)]
        self._guider, self._conds, self._sampler, self._sigmas = guider, conds, sampler, sigmas
        self._course, self._options, self._latent, self._vae, self._at_once = course, options, latent, vae, at_once
        self._prompts: list[int] = []
        self._noise_sizes, self._added = numbers.noise.tolist(), dict[int, Tensor]()
        self._stream = ""
        self._embedded: Tensor | None = None
        kind: Any = type(sampling.name_of(sampler), (Steps,), {})
        self.scheduler = kind(self._times, numbers, course.noise)
        self.transformer = _Model(self, guider.model_patcher)
        self.components = {"transformer": self.transformer, "scheduler": self.scheduler}
        self.device = latent.device
        self.config = SimpleNamespace(_name_or_path=type(guider.inner_model.diffusion_model).__name__)
        self.evaluations = 0
        self.on_evaluation: Callable[[int], object] = lambda _evaluations: None

    def __call__(
        self, prompt: Any, generator: Any = None, output_type: str = "pil", sampling_of: str = ""
    ) -> SimpleNamespace:
        """Make runs: prompts begin with their number, and generators have their seeds."""
        import comfy.sample

        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        self._prompts = [int(text.split()[0]) for text in texts]
        seeds = [one.initial_seed() for one in generators]
        noise = torch.cat([comfy.sample.prepare_noise(self._latent.cpu(), seed) for seed in seeds]).to(self._latent)
        x = self._guider.inner_model.model_sampling.noise_scaling(
            self._sigmas[0], noise, self._latent.expand_as(noise), self._sampler.max_denoise(self._guider, self._sigmas)
        )
        self._hear_conditions()
        if self._course.noise:
            self.scheduler.added = Added([self._added_by(seed) for seed in seeds], self._noise_sizes)
        self.scheduler.set_timesteps(len(self._course.sigmas))
        for time, sigma in zip(self.scheduler.timesteps, self._course.sigmas, strict=True):
            with self.transformer.cache_context(self._stream):
                outputs = self.transformer(x, sigma, guidance=self._embedded)
            (x,) = self.scheduler.step(self._guided(outputs, x, sigma), time, x)
        images = [] if output_type == "latent" or self._vae is None else self._decoded(x)
        return SimpleNamespace(images=images, latents=x)

    @property
    def steps(self) -> int:
        return len(self._course.sigmas)

    def groups(self) -> Iterator[list[int]]:
        """Yield which runs go through the model together: some of one prompt."""
        for prompt in dict.fromkeys(self._prompts):
            members = [k for k, one in enumerate(self._prompts) if one == prompt]
            for start in range(0, len(members), self._at_once):
                yield members[start : start + self._at_once]

    def _added_by(self, seed: int) -> Tensor:
        """Return what noise makes of the latents of a sampling with this seed, by each step: its run on zeros.

        (S + 1, 1, ...), in the CPU's memory.
        """
        if seed not in self._added:
            zeros = torch.zeros_like(self._latent)
            told = sampling.probe(self._sampler, self._guider, self._sigmas, zeros, nothing, seed=seed)
            self._added[seed] = torch.stack([x.cpu() for x in told.latents])
        return self._added[seed]

    def features(self, members: list[int], x: Tensor, sigma: float) -> list[Tensor]:
        """Return the features of each condition, of runs of one prompt."""
        import comfy.model_management

        comfy.model_management.throw_exception_if_processing_interrupted()
        self.evaluations += len(members)

        def hear(executor: Any, *args: Any) -> Any:
            raise _Heard(executor(*args))

        try:
            self._evaluate(members, x, sigma, hear)
        except _Heard as heard:
            self.on_evaluation(self.evaluations)
            places = [k for k, cond in enumerate(self._asked(members)) if cond]
            return [self._feature(heard.predictions[k], x, sigma) for k in places]
        raise ValueError("lesa calibrates guiders that ask for the predictions of conditions; take a CFG guider.")

    def _feature(self, prediction: Tensor, x: Tensor, sigma: float) -> Tensor:
        """Return what rows combine: the derivative, or the data prediction where noise is added."""
        return prediction if self._course.noise else (x - prediction) / sigma

    def _prediction(self, feature: Tensor, x: Tensor, sigma: float) -> Tensor:
        return feature if self._course.noise else x - sigma * feature

    def _asked(self, members: list[int]) -> list[Any]:
        return self._told[self._prompts[members[0]]]

    def _guided(self, outputs: Tensor, x: Tensor, sigma: float) -> Tensor:
        """Return what the guider makes of the features, as a feature."""
        found, of_conditions = torch.empty_like(x), outputs.split(len(x))
        for k in range(len(x)):
            mine = x[k : k + 1]

            def tell(_executor: Any, _model: Any, conds: Any, here: Tensor, *_: Any, k: int = k) -> Any:
                told = iter(of_conditions)
                return [
                    self._prediction(next(told)[k : k + 1], here, sigma) if cond else torch.zeros_like(here)
                    for cond in conds
                ]

            found[k : k + 1] = self._feature(self._evaluate([k], mine, sigma, tell), mine, sigma)
        return found

    def _hear_conditions(self) -> None:
        """Find out which conditions the guider asks for, and what the stream of their predictions is known by."""
        told: dict[int, list[Any]] = {}
        for prompt in dict.fromkeys(self._prompts):
            member = self._prompts.index(prompt)

            def ask(_executor: Any, _model: Any, conds: Any, *_: Any, prompt: int = prompt) -> Any:
                told[prompt] = conds
                raise _Heard([])

            with suppress(_Heard):
                self._evaluate([member], self._latent, self._course.sigmas[0], ask)
        self._told = told
        conds = told[self._prompts[0]]
        sampling.check_conditions(conds, self._options)
        self._stream = sampling.stream_of(conds, self._course.sigmas)
        if sampling.CHANGING in self._stream:
            raise ValueError(
                "rows are solved for runs whose conditions act from their first step to their last, got some that "
                "begin or end within; calibrate without them, or forecast without training."
            )
        embedded = sampling.embedded_guidance(conds)
        self._embedded = torch.tensor(embedded) if embedded else None

    def _evaluate(self, members: list[int], x: Tensor, sigma: float, stand_in: Any) -> Tensor:
        """Let the guider evaluate latents of one prompt, with something in the place of the model's call."""
        import comfy.model_patcher
        from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

        options = comfy.model_patcher.create_model_options_clone(self._options)
        calls = 0

        def first(executor: Any, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            return stand_in(executor, *args) if calls == 1 else executor(*args)

        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, first, options, True)
        self._guider.conds = self._conds[self._prompts[members[0]]]
        return self._guider(x, x.new_full((len(x),), sigma), model_options=options, seed=0)

    def _decoded(self, x: Tensor) -> list[Any]:
        import comfy.model_management

        latents = self._guider.inner_model.process_latent_out(x.float())
        found = [self._vae.decode(one[None]) for one in latents]
        comfy.model_management.load_models_gpu([self._guider.model_patcher])  # the decoder may have taken its place
        found = [one.reshape(-1, *one.shape[-3:]) for one in found]
        return [one[0].cpu().numpy() if len(one) == 1 else one.cpu().numpy() for one in found]


def check(course: Course, sampler: Any) -> None:
    """Raise ValueError if rows are not solved for such a sampler."""
    name = sampling.name_of(sampler)
    if course.guidance_parts:
        raise ValueError(
            f"rows are solved for samplers that go by what guidance makes of the conditions, and {name} looks at these "
            "apart, too; calibrate another, or use LESA Accelerate without training."
        )


# --- a calibration as a sampler


class Calibrating:
    """A sampler of ComfyUI that makes no picture: within its one sampling a calibration is made."""

    def __init__(
        self,
        sampler: Any,
        prompts: int,
        runs: int,
        budgets: Sequence[int],
        vae: Any,
        at_once: int,
        what: str,
        seeds: int = 0,
        search: int = 60,
        on_point: Any = None,
    ):
        self._sampler, self._prompts, self._runs, self._budgets = sampler, prompts, runs, tuple(budgets)
        self._vae, self._at_once, self._what, self._seeds, self._search = vae, at_once, what, seeds, search
        self._on_point = on_point
        self.predictor: Solved | None = None

    @property
    def checked_prompt(self) -> int:
        """The prompt of the first run that is checked on, whose seed is `VALIDATION_SEED`."""
        held = self._runs // 3 if self._runs > 3 else self._runs
        return (self._runs - held) % self._prompts

    def sample(
        self,
        guider: Any,
        sigmas: Tensor,
        extra_args: dict,
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Any = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Calibrate; returns the latents as they came."""
        if denoise_mask is not None:
            raise ValueError(
                "a calibration is made without a noise mask; give it a latent without, such as an empty one."
            )
        latent = (torch.zeros_like(noise) if latent_image is None else latent_image)[:1]
        mine = guider.conds
        conds = [self._prepared(guider, k, latent) for k in range(self._prompts)]
        calls = [f"{k % self._prompts} {self._what}" for k in range(self._runs)]
        options = lesa.CalibrateOptions(
            seed=self._seeds,
            most=self._search,
            batch_size=max(self._runs, 1),
            pictures=self._vae is not None,
            progress=False,
        )
        given = extra_args["model_options"]
        rig = Rig(guider, conds, self._sampler, sigmas, given, latent, self._vae, self._at_once)
        rig.on_evaluation = progress_of(calls, rig.steps, self._budgets, options)
        try:
            self.predictor = lesa.calibrate(
                rig,
                calls,
                options=options,
                budgets=self._budgets or None,
                on_point=self._on_point,
                sampling_of=f"{self._what} {sampling.name_of(self._sampler)} {sigmas.tolist()}",
            )
        finally:
            guider.conds = mine
        rig.on_evaluation(sys.maxsize)  # less than the most was needed
        return noise

    def max_denoise(self, guider: Any, sigmas: Tensor) -> bool:
        return self._sampler.max_denoise(guider, sigmas)

    def _prepared(self, guider: Any, prompt: int, latent: Tensor) -> dict:
        """Prepare the conditions of one prompt, as a sampling of it alone would."""
        from comfy.samplers import process_conds

        given = {"positive": guider.original_conds[positive(prompt)], "negative": guider.original_conds["negative"]}
        copied = {name: [dict(part) for part in some] for name, some in given.items()}
        return process_conds(guider.inner_model, latent, copied, latent.device, latent, None, 0)


def progress_of(
    calls: Sequence[str], steps: int, budgets: Sequence[int], options: lesa.CalibrateOptions
) -> Callable[[int], object]:
    """Return what takes the number of evaluations so far, and shows it beside the most that a calibration needs."""
    from comfy.utils import ProgressBar

    solved_on, checked_on = (len(some) for some, _ in split(calls, options))
    runs = Runs(steps, streams=1, solved_on=solved_on, checked=checked_on, together=True)
    return ProgressBar(sum(most_runs(runs, budgets or (usual_budget(steps),), options).values())).update_absolute


def positive(prompt: int) -> str:
    """Return the name under which a guider has a prompt."""
    return "positive" if prompt == 0 else f"positive {prompt + 1}"


def digest_of(conditions: Any) -> str:
    """Tell conditions, or latents, from others by the numbers in their tensors."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            total.update(value.detach().float().cpu().contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for name in sorted(value, key=str):
                total.update(str(name).encode())
                add(value[name])
        elif isinstance(value, (list, tuple)):
            for one in value:
                add(one)
        else:
            total.update(str(value).encode() if isinstance(value, (bool, int, float, str)) else b"")

    add(conditions)
    return total.hexdigest()[:16]
