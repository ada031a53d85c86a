"""Run methods against the reference run: pictures in batches, time at batch 1."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lesa import metrics
from lesa.clips import NAMES, Reel
from lesa.collect import record
from lesa.emoji import Atlas
from lesa.forecasters import Forecaster, Lagrange, Reuse, Taylor
from lesa.metrics import Interval
from lesa.pipelines import pictures_of
from lesa.predictor import LESA, ContinuousLESA, Predictor
from lesa.runtime import accelerate
from lesa.schedule import Schedule
from lesa.tap import from_tokens, place_of, tap_of

PAIRS_A_TURN = 2
Key = tuple[str, str]
Recogniser = Callable[[Sequence[str], Sequence[np.ndarray]], list[bool]]


@dataclass(frozen=True)
class Method:
    """One way to run a pipeline.

    `name` and `schedule` name it in tables, `call` holds the arguments of the pipeline's call that it changes, and
    `switch` turns it on for a pipeline and off again. What makes a picture in fewer full steps can be one.
    """

    name: str
    schedule: str
    call: Mapping[str, Any] = field(default_factory=dict)
    switch: Callable[[Any], AbstractContextManager[Any]] = nullcontext

    @property
    def key(self) -> Key:
        """What tells it from other methods."""
        return self.name, self.schedule


REFERENCE = Method("all full", "every:1")
"""The run that all others are measured against."""


BOUND = "bound (output tap)"
"""No method: `bound_error` as pictures. Forecasts of what enters the final norm can be above it."""


def fewer_steps(steps: int) -> Method:
    """The same sampler with fewer steps, all of them full."""
    return Method("fewer steps", f"{steps} steps", call={"num_inference_steps": steps})


def forecast(name: str, forecaster: Forecaster, schedule: Schedule) -> Method:
    """The pipeline accelerated by a forecaster on a schedule."""
    return Method(name, str(schedule), switch=lambda pipe: accelerate(pipe, forecaster, schedule=schedule))


def label(predictor: Predictor) -> str:
    """Name a predictor in tables: its method, and in brackets what sets it apart from the usual one of its kind."""
    training = predictor.origin.training
    place = place_of(predictor.origin.transformer, predictor.origin.tap)
    apart = [] if place == "feature" else [f"{place} tap"]
    apart += ["with forecasts"] if isinstance(predictor, LESA) and predictor.remembers_forecasts else []
    apart += ["phase 1"] if training.get("phase") == "ground-truth" else []
    apart += {"features": ["feature loss"], "steps": ["per step"]}.get(training.get("loss", "latents"), [])
    return predictor.method.upper() + (f" ({', '.join(apart)})" if apart else "")


def untrained(reuse: bool, lagrange: bool = False) -> dict[str, Forecaster]:
    """Return the forecasters that need no training, by their names in tables."""
    plain: dict[str, Forecaster] = {"reuse": Reuse()} if reuse else {}
    plain |= {f"Taylor-{order} (our tap)": Taylor(order) for order in (1, 2)}
    return plain | ({f"Lagrange-{degree}": Lagrange(degree) for degree in (1, 2, 3)} if lagrange else {})


def line_up_planned(
    budgets: Sequence[int],
    grid: Tensor,
    plan: Callable[[Forecaster, int], Schedule],
    predictors: Sequence[Predictor] = (),
    *,
    reuse: bool = True,
) -> list[Method]:
    """Line up every method on the schedule that is planned for it, budget by budget.

    `plan` finds the schedule of a forecaster that needs no training; a predictor has its own.
    """

    def fits(predictor: Predictor, budget: int) -> bool:
        bound = not isinstance(predictor, ContinuousLESA)
        if bound and (predictor.schedule.rule != "at" or len(predictor.grid) != len(grid)):
            return False
        return predictor.is_for(budget=budget)

    methods: list[Method] = []
    for budget in budgets:
        methods.append(fewer_steps(budget))
        plain = untrained(reuse, lagrange=True).items()
        methods += [forecast(name, forecaster, plan(forecaster, budget)) for name, forecaster in plain]
        chosen = [one for one in predictors if fits(one, budget)]
        methods += [forecast(label(one), one, one.schedule_for(grid, budget)) for one in chosen]
    return methods


def line_up(
    steps: int, schedules: Sequence[Schedule], predictors: Sequence[Predictor] = (), *, reuse: bool = False
) -> list[Method]:
    """Line up the methods for runs of `steps` steps, schedule by schedule: those without training, then predictors.

    Predictors for other schedules, or for runs of other lengths, are left out.
    """

    def fits(predictor: Predictor, schedule: Schedule) -> bool:
        bound = not isinstance(predictor, ContinuousLESA)
        return bound and predictor.schedule == schedule and len(predictor.grid) - 1 == steps

    plain = untrained(reuse)
    methods: list[Method] = []
    for schedule in schedules:
        fewer = fewer_steps(len(schedule.full_steps(steps)))
        methods += [] if fewer in methods else [fewer]
        methods += [forecast(name, forecaster, schedule) for name, forecaster in plain.items()]
        methods += [forecast(label(one), one, schedule) for one in predictors if fits(one, schedule)]
    return methods


def recogniser(model: str | Path) -> Recogniser | None:
    """Return the call that tells prompted pictures from others, for the embedded models that come with their emoji."""
    if (Path(model) / NAMES).exists():
        return Reel(model).is_prompted
    return Atlas(model).is_prompted if (Path(model) / "emoji.json").exists() else None


class Pair(NamedTuple):
    """A prompt and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Record:
    """What one picture or clip of a method is worth.

    `prompted`: does it still show what the prompt names (None: not asked). `motion`: `metrics.motion_psnr` of a clip.
    """

    method: str
    schedule: str
    prompt: str
    seed: int
    psnr: float
    ssim: float
    prompted: bool | None = None
    motion: float | None = None


class Timing(NamedTuple):
    """Median seconds in the denoising loop and in the whole call."""

    loop: float
    call: float


@dataclass(frozen=True)
class Result:
    """One line of a table: a method over all pairs. Seconds and speedup are those of the denoising loop at batch 1."""

    method: str
    schedule: str
    full_steps: int
    step_ratio: float
    psnr: float
    psnr_low: float
    psnr_high: float
    ssim: float
    prompted: float | None
    motion: float | None = None
    seconds: float | None = None
    speedup: float | None = None
    call_seconds: float | None = None
    call_speedup: float | None = None


@dataclass
class Comparison:
    """Everything that was measured: records of every pair, full steps, times, and the pictures of the first pairs."""

    records: dict[Key, list[Record]] = field(default_factory=dict)
    full_steps: dict[Key, int] = field(default_factory=dict)
    timings: dict[Key, Timing] = field(default_factory=dict)
    pictures: dict[Key, list[np.ndarray]] = field(default_factory=dict)

    def results(self) -> list[Result]:
        """Sum up every method, in the order in which they ran."""
        return [self._result(key) for key in self.records]

    def difference(self, key: Key, other: Key) -> Interval:
        """Return by how many dB the PSNR of one method is above another's, pair by pair."""
        ours, theirs = ([record.psnr for record in self.records[k]] for k in (key, other))
        return metrics.paired_interval(ours, theirs)

    def _result(self, key: Key) -> Result:
        records, full_steps = self.records[key], self.full_steps[key]
        prompted = [record.prompted for record in records if record.prompted is not None]
        motion = [record.motion for record in records if record.motion is not None]
        result = Result(
            *key,
            full_steps,
            self.full_steps[REFERENCE.key] / full_steps,
            *metrics.interval([record.psnr for record in records]),
            fmean(record.ssim for record in records),
            fmean(prompted) if prompted else None,
            fmean(motion) if motion else None,
        )
        if key not in self.timings:
            return result
        ours, reference = self.timings[key], self.timings[REFERENCE.key]
        return replace(
            result,
            seconds=ours.loop,
            speedup=reference.loop / ours.loop,
            call_seconds=ours.call,
            call_speedup=reference.call / ours.call,
        )


def compare(
    pipe: Any,
    methods: Sequence[Method],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 16,
    timed: int = 6,
    shown: int = 8,
    recognise: Recogniser | None = None,
) -> Comparison:
    """Run every method on the same prompts, each with the seed beside it, against the reference run.

    Pictures are drawn `batch_size` at a time. The first `timed` pairs are run once more at batch 1 for the times, and
    the pictures of the first `shown` are kept. `recognise` tells which pictures show what their prompts name.

    Raises: ValueError if there are no prompts, not one seed for each, or two methods of one name and schedule.
    """
    pairs = pair_up(prompts, seeds)
    methods = [REFERENCE, *methods]
    keys = [method.key for method in methods]
    if len(set(keys)) < len(keys):
        raise ValueError(f"methods differ in name or schedule, and none is the reference run, got {keys[1:]}.")
    comparison = Comparison(records={key: [] for key in keys}, pictures={key: [] for key in keys})
    with tqdm(total=len(pairs) * len(methods), desc="pictures", unit="picture") as bar:
        for batch in batches(pairs, batch_size):
            reference: list[np.ndarray] = []
            for method in methods:
                pictures, comparison.full_steps[method.key] = draw(pipe, method, batch)
                reference = reference or pictures
                comparison.records[method.key] += score(method.key, batch, pictures, reference, recognise)
                kept = comparison.pictures[method.key]
                kept += pictures[: shown - len(kept)]
                bar.update(len(batch))
    comparison.timings = time_methods(pipe, methods, pairs[:timed])
    return comparison


def pair_up(prompts: Sequence[str], seeds: Sequence[int]) -> list[Pair]:
    """Join prompts with their seeds.

    Raises: ValueError if there are none, or not one seed for each prompt.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"each prompt needs one seed, got {len(prompts)} prompts and {len(seeds)} seeds; give both.")
    return [Pair(*pair) for pair in zip(prompts, seeds, strict=True)]


def batches(pairs: Sequence[Pair], size: int) -> list[Sequence[Pair]]:
    """Cut pairs into batches of `size`, the last one shorter if need be."""
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


def draw(pipe: Any, method: Method, pairs: Sequence[Pair]) -> tuple[list[np.ndarray], int]:
    """Draw pairs in one call: uint8 RGB pictures (H, W, 3) or clips (frames, H, W, 3), and how many steps were full."""
    watch = Watch(pipe)
    with method.switch(pipe), watch.counting():
        pictures = _pictures(pipe, pairs, **method.call, callback_on_step_end=watch.on_step_end)
    return pictures, watch.full_steps


def _pictures(pipe: Any, pairs: Sequence[Pair], **call: Any) -> list[np.ndarray]:
    generators = [torch.Generator().manual_seed(pair.seed) for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    drawn = pictures_of(pipe(prompt=prompts, generator=generators, output_type="pil", **call))
    return [np.stack([_pixels(frame) for frame in one]) if isinstance(one, list) else _pixels(one) for one in drawn]


def _pixels(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def score(
    key: Key,
    pairs: Sequence[Pair],
    pictures: Sequence[np.ndarray],
    references: Sequence[np.ndarray],
    recognise: Recogniser | None,
) -> list[Record]:
    """Measure pictures against those of the reference run."""
    prompted = recognise([pair.prompt for pair in pairs], pictures) if recognise else [None] * len(pairs)
    return [
        Record(
            *key,
            *pair,
            psnr=metrics.psnr(picture, reference),
            ssim=metrics.ssim(picture, reference),
            prompted=shows,
            motion=metrics.motion_psnr(picture, reference) if picture.ndim == 4 else None,
        )
        for pair, picture, reference, shows in zip(pairs, pictures, references, prompted, strict=True)
    ]


# --- time


class Watch:
    """Times the denoising loop of one call of a pipeline, or counts its full steps, by public hooks alone.

    The loop begins when the transformer is first called and ends with the last step's `callback_on_step_end`, which
    comes right after the scheduler's step: text encoders and decoder are outside, and nothing of the pipeline is
    patched. Work queued on a GPU is waited for at both ends. A step is full if the last block ran in it, in whatever
    stream; counting hooks a block, so it is left to calls that are not timed.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._began: float | None = None
        self._ran = False
        self.seconds = 0.0
        self.full_steps = 0

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Set `seconds` by the call made inside."""
        hook = self._pipe.transformer.register_forward_pre_hook(self._begin)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Set `full_steps` by the call made inside."""
        transformer = self._pipe.transformer
        last_block = getattr(transformer, tap_of(transformer).blocks[-1])[-1]
        hook = last_block.register_forward_pre_hook(self._see_block)
        try:
            yield
        finally:
            hook.remove()

    def on_step_end(self, pipe: Any, step: int, _timestep: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's `callback_on_step_end`; changes nothing."""
        self.full_steps += self._ran
        self._ran = False
        if step == pipe.num_timesteps - 1:
            _wait_for(pipe.transformer)
            self.seconds = time.perf_counter() - (self._began or 0.0)
        return {}

    def _begin(self, transformer: torch.nn.Module, _inputs: Any) -> None:
        if self._began is None:
            _wait_for(transformer)
            self._began = time.perf_counter()

    def _see_block(self, _block: torch.nn.Module, _inputs: Any) -> None:
        self._ran = True


def time_methods(pipe: Any, methods: Sequence[Method], pairs: Sequence[Pair]) -> dict[Key, Timing]:
    """Time every method on the same pairs at batch 1; none if there are no pairs.

    Methods take turns of `PAIRS_A_TURN` pairs, so that a machine that drifts hits all alike. Each turn begins with a
    run that does not count: after it caches are warm and the plan is compiled, which happens once per grid.
    """
    seconds: dict[Key, list[Timing]] = {method.key: [] for method in methods}
    with tqdm(total=len(pairs) * len(methods), desc="timing", unit="run") as bar:
        for turn in batches(pairs, PAIRS_A_TURN):
            for method in methods:
                with method.switch(pipe):
                    seconds[method.key] += [_time(pipe, method, pair) for pair in [turn[0], *turn]][1:]
                bar.update(len(turn))
    return {key: Timing(*map(median, zip(*runs, strict=True))) for key, runs in seconds.items() if runs}


def _time(pipe: Any, method: Method, pair: Pair) -> Timing:
    watch = Watch(pipe)
    with watch.timing():
        began = time.perf_counter()
        _pictures(pipe, [pair], **method.call, callback_on_step_end=watch.on_step_end)
        return Timing(watch.seconds, time.perf_counter() - began)


def _wait_for(module: torch.nn.Module) -> None:
    if next(module.parameters()).is_cuda:
        torch.cuda.synchronize()


def machine() -> dict[str, Any]:
    """Describe what the times were measured on, and when."""
    import diffusers

    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


# --- the bound


def bound_error(outputs: Tensor, grid: Tensor, full: Sequence[int]) -> Tensor:
    """Return what the best weights of the full steps' outputs miss of the final latents, (P, n, C).

    The last latents of run p are x_0 + sum_s dt_s v_s with dt_s = t_{s+1} - t_s. The sum's skipped part is replaced by
    sum over full f of a_f v_f, with weights a that all runs share, found by least squares on these very runs: one
    number per full step. On these outputs, (P, S, n, C), no plan of this schedule that taps the output comes nearer (in
    the sum of squares); in a real run the full steps' outputs drift too.
    """
    skipped = [step for step in range(len(grid) - 1) if step not in set(full)]
    dt = grid.diff()[skipped].to(outputs.device, torch.float64)
    missing = torch.einsum("s,psnc->pnc", dt, outputs[:, skipped].double())
    basis = outputs[:, list(full)].double().movedim(1, -1)
    weights = torch.linalg.lstsq(basis.flatten(0, -2), missing.flatten().unsqueeze(1)).solution
    return (basis @ weights).squeeze(-1) - missing


def add_bounds(
    comparison: Comparison,
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    schedules: Sequence[Schedule],
    *,
    batch_size: int = 16,
    recognise: Recogniser | None = None,
) -> None:
    """Record the pairs' reference runs at every token and add the bound of each schedule, as pictures, to a comparison.

    The velocities are taken from the latents, so that guidance is in them.

    Raises: ValueError as `pair_up` and `lesa.collect.record` do.
    """
    cut = batches(pair_up(prompts, seeds), batch_size)
    kept = []
    for batch in tqdm(cut, desc="runs for the bound", unit="batch"):
        runs = record(pipe, [pair.prompt for pair in batch], [pair.seed for pair in batch], torch.arange)
        kept += [run.latents.float() for run in runs]
    grid, latents = runs[0].grid, torch.stack(kept)
    velocities = latents.diff(dim=1) / grid.diff().float()[:, None, None]
    for schedule in schedules:
        key, full = (BOUND, str(schedule)), schedule.full_steps(len(grid) - 1)
        ends = latents[:, -1] + bound_error(velocities, grid, full).float()
        comparison.full_steps[key], comparison.records[key] = len(full), []
        for batch, end, exact in zip(cut, ends.split(batch_size), latents[:, -1].split(batch_size), strict=True):
            pictures, references = decode(pipe, batch, end), decode(pipe, batch, exact)
            comparison.records[key] += score(key, batch, pictures, references, recognise)


def decode(pipe: Any, pairs: Sequence[Pair], latents: Tensor) -> list[np.ndarray]:
    """Decode final latents as the pipeline does: they are put in the place of its own after the last of two steps.

    A scheduler that stretches its grid to a last time, as Qwen-Image's, divides zero by zero in a run of one step.
    """
    latents = latents.to(pipe.device, pipe.transformer.dtype)

    def put(pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": from_tokens(pipe.transformer, latents, tensors["latents"])}

    return _pictures(pipe, pairs, num_inference_steps=2, callback_on_step_end=put)
