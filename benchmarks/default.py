"""Measure the default, rows and full steps that come of a run's grid alone, against the same sampler with fewer steps.

    python benchmarks/default.py
    python benchmarks/default.py --part heldout --pairs 24
    python benchmarks/default.py --fields

Both run the transformer equally often, and both are set against the run with every step full: PSNR of the pictures in
dB, at most 60 a picture, and the drift of the last latents in dB, the lower the better. `gained` is what the default
has more of the one and less of the other. A run of few steps that the default leaves all full has none.
`--fields` does so without a model: Euler's method, on three shifts, on the exact velocity of mixtures of Gaussians in
64 dimensions, whose changes are early (`spread` 6 and 2), late (0.3) or hard to follow under guidance. How much the
velocity changes stands beside them: the sum of |ln| of the ratios of its sizes, over the thirds of the run.
"""

import argparse
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch import Tensor

import lesa
from lesa.bench.report import markdown
from lesa.host.pipelines import pictures_of
from lesa.learn.call_files import read_prompts
from lesa.learn.metrics import drift, psnr
from lesa.rows.default import Default
from lesa.rows.plan import Plan, compile

MODELS = Path("models")
SEEDS = {"validation": 10_000, "heldout": 0}
STEPS, FEW = (50, 28, 20, 8), (8,)
EULER = "Euler"
MULTISTEP = {
    "UniPC": (UniPCMultistepScheduler, {}),
    "DPM++ 2M": (DPMSolverMultistepScheduler, {}),
    "SDE-DPM++": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
}
HEADS = ("model", "sampler", "steps", "full", "default", "fewer steps", "gained", "drift", "fewer steps", "gained")


class Case(NamedTuple):
    """A model, its guidance and LoRA if it has them, a sampler and the numbers of steps."""

    model: str
    sampler: str = EULER
    steps: Sequence[int] = STEPS
    guidance: float | None = None
    lora: str | None = None

    @property
    def name(self) -> str:
        guided = f", guidance {self.guidance:g}" if self.guidance else ""
        return (f"{self.model}/{self.lora}" if self.lora else self.model) + guided

    @property
    def call(self) -> dict[str, Any]:
        return {"true_cfg_scale": self.guidance} if self.guidance else {}


CASES = [
    *(Case("emoji-flux", sampler) for sampler in (EULER, "UniPC", "DPM++ 2M", "stochastic Euler", "SDE-DPM++")),
    *(Case("emoji-qwen", guidance=scale) for scale in (3.0, 5.0)),
    Case("emoji-qwen", steps=FEW, lora="lightning"),
    Case("emoji-schnell", steps=FEW),
    Case("emoji-video"),
]


def pipe_of(case: Case) -> Any:
    """Load a case's pipeline, with its sampler on the model's own shift."""
    folder = MODELS / case.model
    pipe = lesa.load(folder, lora=folder / case.lora if case.lora else None)
    pipe.set_progress_bar_config(disable=True)
    config = pipe.scheduler.config
    if case.sampler == "stochastic Euler":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, stochastic_sampling=True)
    elif case.sampler in MULTISTEP:
        kind, settings = MULTISTEP[case.sampler]
        shifts = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len", "time_shift_type")
        flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction", use_dynamic_shifting=True)
        known = inspect.signature(kind.__init__).parameters
        settings = {**flow, **{name: config[name] for name in shifts}, **settings}
        pipe.scheduler = kind(**{name: value for name, value in settings.items() if name in known})
    return pipe


@dataclass(frozen=True)
class Drawn:
    """What runs of some prompts end in."""

    pictures: list[np.ndarray]
    latents: Tensor

    def against(self, reference: "Drawn") -> tuple[float, float]:
        """Return the mean PSNR and the mean drift against the reference runs."""
        quality = map(psnr, self.pictures, reference.pictures)
        return fmean(quality), fmean(map(drift, self.latents, reference.latents))


def draw(pipe: Any, prompts: Sequence[str], seed: int, steps: int, **call: Any) -> Drawn:
    """Draw prompts in one call; noise drawn from the global generator is the same in all calls."""
    last: list[Tensor] = []

    def keep(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last[:] = [tensors["latents"].float().clone()]
        return tensors

    torch.manual_seed(0)
    generators = [torch.Generator().manual_seed(seed + k) for k in range(len(prompts))]
    found = pipe(
        prompt=list(prompts), generator=generators, num_inference_steps=steps, callback_on_step_end=keep, **call
    )
    frames = [one if isinstance(one, list) else [one] for one in pictures_of(found)]
    return Drawn([np.stack([np.asarray(x.convert("RGB")) for x in one]) for one in frames], last[0])


def times_of(run: Callable[[int], Drawn], pipe: Any, steps: int) -> Tensor:
    """Return the grid of runs of so many steps, as an accelerated one meets it."""
    with lesa.accelerate(pipe, lesa.Reuse(), schedule=lesa.Schedule.every(steps)) as acceleration:
        run(steps)
    return acceleration.plan(acceleration.streams[0]).grid


def by_default(pipe: Any, run: Callable[[int], Drawn], steps: int) -> tuple[Drawn, int]:
    """Return what runs end in that take the default, and how many of their steps are full."""
    schedule = Default().schedule_for(times_of(run, pipe, steps))
    with lesa.accelerate(pipe, Default(), schedule=schedule) as acceleration:
        drawn = run(steps)
    return drawn, acceleration.summary()[acceleration.streams[0]].full_steps


def lines(case: Case, part: str, pairs: int) -> Iterator[list[str]]:
    """Yield the table's lines of a case."""
    pipe = pipe_of(case)
    prompts = read_prompts(MODELS / case.model / "prompts" / f"{part}.txt")[:pairs]
    run = partial(draw, pipe, prompts, SEEDS[part], **case.call)
    for steps in case.steps:
        reference = run(steps)
        drawn, full = by_default(pipe, run, steps)
        (ours, our_drift), (few, few_drift) = (one.against(reference) for one in (drawn, run(full)))
        numbers = f"{ours:.2f}", f"{few:.2f}", f"{ours - few:+.2f}"
        drifts = f"{our_drift:.1f}", f"{few_drift:.1f}", f"{few_drift - our_drift:+.1f}"
        yield [case.name, case.sampler, str(steps), str(full), *numbers, *drifts]


# --- fields without a model

Field = Callable[[Tensor, float], Tensor]
"""(latents, time) -> velocity"""
DIMENSIONS, KINDS, RUNS = 64, 16, 32
FIELD_HEADS = ("field", "shift", "changes", "steps", "full", "drift", "fewer steps", "gained")


def mixture(spread: float, width: float, fine: float = 0.0, kinds: int = KINDS) -> Field:
    """Return the velocity E[noise - data | x] of a mixture of Gaussians of this width, means this far apart.

    With `fine` each has eight parts, so far from its mean.
    """
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(kinds, DIMENSIONS, generator=generator, dtype=torch.float64) * spread
    if fine:
        apart = torch.randn(kinds, 8, DIMENSIONS, generator=generator, dtype=torch.float64)
        means = (means[:, None] + fine * apart).flatten(0, 1)

    def velocity(x: Tensor, time: float) -> Tensor:
        signal, variance = 1 - time, (1 - time) ** 2 * width**2 + time**2
        mean = torch.softmax(-torch.cdist(x, signal * means).square() / (2 * variance), 1) @ means
        data = mean + signal * width**2 / variance * (x - signal * mean)
        return (x - data) / time

    return velocity


def guided(scale: float, **settings: Any) -> Field:
    """Return the velocity of a mixture, guided towards another of a quarter of the kinds."""
    plain, wanted = mixture(**settings), mixture(**settings, kinds=KINDS // 4)
    return lambda x, time: plain(x, time) + scale * (wanted(x, time) - plain(x, time))


FIELDS = {
    "spread 6": mixture(6, 0.05),
    "spread 6, wide": mixture(6, 0.3),
    "spread 2": mixture(2, 0.05),
    "spread 1": mixture(1, 0.05),
    "spread 1, wide": mixture(1, 0.3),
    "spread 0.3": mixture(0.3, 0.1),
    "spread 6, guidance 3": guided(3, spread=6, width=0.1),
    "spread 1, wide, guidance 5": guided(5, spread=1, width=0.3),
    "spread 1, fine, guidance 3": guided(3, spread=1, width=0.1, fine=0.3),
}


def walk(field: Field, grid: Tensor, plan: Plan | None = None) -> tuple[Tensor, list[float]]:
    """Return the last latents of runs from fixed noise, and the sizes of their velocities."""
    latents = torch.randn(RUNS, DIMENSIONS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    history: dict[int, Tensor] = {}
    sizes = []
    for step, time in enumerate(grid.tolist()[:-1]):
        if plan is None or step in plan.full:
            velocity = history[step] = field(latents, time)
        else:
            row = plan.rows[step]
            velocity = torch.zeros_like(latents)
            for k, coefficient in zip(row.past, row.coefficients, strict=True):
                velocity = velocity + coefficient * history[k]
        sizes.append(float(velocity.norm()))
        latents = latents + (grid[step + 1] - grid[step]) * velocity
    return latents, sizes


def shifted(steps: int, shift: float) -> Tensor:
    even = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return shift * even / (1 + (shift - 1) * even)


def field_lines(name: str) -> Iterator[list[str]]:
    """Yield the table's lines of a field."""
    for shift in (1, 3, 7):
        for steps in STEPS:
            grid = shifted(steps, shift)
            reference, sizes = walk(FIELDS[name], grid)
            plan = compile(Default(), grid, Default().schedule_for(grid))
            runs = walk(FIELDS[name], grid, plan)[0], walk(FIELDS[name], shifted(len(plan.full), shift))[0]
            ours, few = (fmean(map(drift, latents, reference)) for latents in runs)
            changes = [abs(math.log(after / before)) for before, after in pairwise(sizes)]
            thirds = [sum(changes[k * len(changes) // 3 : (k + 1) * len(changes) // 3]) for k in range(3)]
            said = " ".join(f"{third:.2f}" for third in thirds)
            numbers = f"{ours:.1f}", f"{few:.1f}", f"{few - ours:+.1f}"
            yield [name, str(shift), said, str(steps), str(len(plan.full)), *numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=SEEDS, default="validation", help="whose prompts (validation)")
    parser.add_argument("--pairs", type=int, default=12, help="how many prompts (12)")
    parser.add_argument("--only", default="", help="models whose names hold this text")
    parser.add_argument("--fields", action="store_true", help="fields, without a model")
    options = parser.parse_args()
    if options.fields:
        table = [line for name in FIELDS for line in field_lines(name)]
        print(markdown(FIELD_HEADS, table, text=3))
        return
    table = []
    for case in CASES:
        for line in lines(case, options.part, options.pairs) if options.only in case.name else ():
            table.append(line)
            print(*line, sep="  ", flush=True)
    print(f"\n{options.pairs} prompts of {options.part}.txt\n")
    print(markdown(HEADS, table, text=2))


if __name__ == "__main__":
    main()
