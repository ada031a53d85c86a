"""Better samplers of the same velocities, at planned times: the strongest way to take fewer steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lesa.bench.benchmark import observe
from lesa.bench.lines import Pair
from lesa.bench.methods import REFERENCE, Method
from lesa.host.intercept import intercept
from lesa.learn import metrics
from lesa.rows.forecasters import Forecaster, Lagrange, Reuse
from lesa.rows.schedule import Schedule

KINDS: Mapping[str, str | None] = {
    "Euler at planned times (= reuse at the output)": None,
    "UniPC-2 at planned times": "UniPCMultistepScheduler",
    "DPM++ 2M at planned times": "DPMSolverMultistepScheduler",
}
"""diffusers' schedulers by names in tables; None is the pipeline's own, Euler's, of which reuse at the output is the
same run."""
CANDIDATES: Sequence[Forecaster] = (Reuse(), Lagrange(1), Lagrange(2), Lagrange(3))
"""A multistep sampler takes the best of the schedules planned for these, by real runs."""
ALMOST_NOISE = 1 - 1e-6
"""The first time of samplers that take the logarithm of what is not noise, as diffusers' own."""
OWN = "FlowMatchEulerDiscreteScheduler"
"""The sampler whose velocities the others take."""


def fits(pipe: Any) -> bool:
    """Tell whether a pipeline's velocities are such as these samplers take."""
    return type(pipe.scheduler).__name__ == OWN and not pipe.scheduler.config.get("stochastic_sampling")


def at_times(name: str, times: Sequence[float], schedule: Schedule) -> Method:
    """Sample at these times, the last of which is 0: those of a schedule's full steps on the grid of a full run.

    Raises: LookupError if there is no such sampler.
    """
    kind, count = KINDS[name], len(times) - 1

    @contextmanager
    def switch(pipe: Any) -> Iterator[None]:
        import diffusers

        own = pipe.scheduler
        flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
        with ExitStack() as undo:
            undo.callback(setattr, pipe, "scheduler", own)
            if kind is not None:
                pipe.scheduler = getattr(diffusers, kind).from_config(own.config, **flow)
            undo.callback(intercept(pipe.scheduler, "set_timesteps", _setting(times, kind is not None)))
            yield

    recipe = {"sampler": name, "times": list(times)}
    call = {"num_inference_steps": count}
    return Method(name, str(schedule), call=call, switch=switch, recipe=recipe, optional=kind is not None)


def _setting(times: Sequence[float], multistep: bool) -> Callable[..., None]:
    """Return what stands in for `set_timesteps`: it does its work, and then the times are these."""

    def set_timesteps(go_on: Callable, scheduler: Any, *args: Any, **kwargs: Any) -> None:
        if not scheduler.config.get("use_dynamic_shifting"):
            kwargs.pop("mu", None)  # the shift of times that are replaced, which some classes refuse then
        go_on(*args, **kwargs)
        sigmas = torch.tensor([min(time, ALMOST_NOISE) for time in times] if multistep else list(times))
        if len(scheduler.timesteps) != len(sigmas) - 1:
            raise ValueError(f"a run has {len(sigmas) - 1} steps, got {len(scheduler.timesteps)}; name as many.")
        device, scale = scheduler.timesteps.device, scheduler.config.num_train_timesteps
        scheduler.sigmas = sigmas.to(scheduler.sigmas.device)
        scheduler.timesteps = (sigmas[:-1] * scale).to(device)

    return set_timesteps


def rebuild(entry: Mapping[str, Any]) -> Method:
    """Make a method again from what records say of it.

    Raises: LookupError if there is no such sampler any more.
    """
    recipe = entry["recipe"]
    return at_times(recipe["sampler"], recipe["times"], Schedule.parse(entry["schedule"]))


def times_of(grid: Tensor, schedule: Schedule) -> list[float]:
    """Return the times of a schedule's full steps, and 0."""
    return [*grid[list(schedule.full_steps(len(grid) - 1))].tolist(), 0.0]


def line_up(
    pipe: Any, grid: Tensor, budgets: Sequence[int], plan: Callable[[Forecaster, int], Schedule], pairs: Sequence[Pair]
) -> list[Method]:
    """Line up each sampler at the times that are best for it, budget by budget.

    `plan` finds the schedule of a forecaster at the output. Euler's are those of reuse. Those of the others are chosen
    by runs of some `pairs`, which are none of those that are measured.
    """
    methods = []
    for budget in budgets:
        schedules = list(dict.fromkeys(plan(one, budget) for one in CANDIDATES))
        for name, kind in KINDS.items():
            tried = [at_times(name, times_of(grid, one), one) for one in (schedules if kind else schedules[:1])]
            methods.append(nearest(pipe, tried, pairs))
    return methods


def nearest(pipe: Any, tried: Sequence[Method], pairs: Sequence[Pair]) -> Method:
    """Return the method whose runs of these pairs end nearest to the reference runs'; without pairs the first."""
    if len(tried) == 1 or not pairs:
        return tried[0]
    exact = observe(pipe, REFERENCE, pairs).latents

    def drift(method: Method) -> float:
        try:
            ends = observe(pipe, method, pairs).latents
        except (ValueError, TypeError):  # a pipeline that takes no such sampler: it will say so where it is measured
            return math.inf
        return fmean(metrics.drift(*both) for both in zip(ends, exact, strict=True))

    return min(tried, key=drift)
