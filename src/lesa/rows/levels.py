"""The noise levels of a run, and the data that its outputs predict, for any sampler.

At step s the latents are x_s = signal[s] x_0 + noise[s] n, with data x_0 and unit noise n, and the time is
t = noise / (signal + noise): sigma under flow matching, sigma / (1 + sigma) elsewhere. Its scheduler states where a run
begins. Where it goes from there, the sampler's own numbers say, for a denoiser that knows the data: times that repeat
(Heun), lie in between (KDPM2) or end above 0 (DEIS) come out as they are. What an output means (noise, velocity, data)
is declared by the scheduler; a reading under which such a run leaves the noise levels that there are is rejected.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from math import hypot, nan
from typing import Any

import torch
from torch import Tensor

from lesa.rows import sampler
from lesa.rows.impulses import Call
from lesa.rows.sampler import Sampler

TOLERANCE = 0.02
"""How far the levels of a run may be from signal + noise = 1, signal^2 + noise^2 = 1 or signal = 1 (LCM's are)."""

DATA = "data"
"""The name of what outputs say of the data: of its rows, and of their plan in a run."""

VELOCITIES = ("flow_prediction", "towards data")
"""What the output of a flow-matching model may be: noise - data, or data - noise where the scheduler's sigmas rise."""


@dataclass(frozen=True, eq=False)
class Levels:
    """Hold the noise levels of a run of S steps and its data prediction, x_0 = of_latents x_s + of_output v_s."""

    signal: Tensor
    """(S + 1,): part of the data in the latents."""
    noise: Tensor
    """(S + 1,): part of unit noise in the latents."""
    of_latents: Tensor
    """(S,): coefficient of the latents x_s in the data prediction."""
    of_output: Tensor
    """(S,): coefficient of the output v_s in the data prediction."""

    @property
    def times(self) -> Tensor:
        """Return the grid, shape (S + 1,): 1 is pure noise, 0 is data; times may repeat, and the last be above 0."""
        return self.noise / (self.signal + self.noise)


def of(scheduler: Any, *args: Any, **kwargs: Any) -> Levels:
    """Return the levels of the run whose first call of `scheduler.step` has these arguments; clipping is left out.

    A scheduler that knows its `levels` says them itself.

    Raises: ValueError if no reading of the scheduler's settings gives levels that fall, or if `sampler.of` raises.
    """
    if isinstance(known := getattr(scheduler, "levels", None), Levels):
        return known
    scheduler = _unclipped(scheduler)
    first = sampler.bind(scheduler, *args, **kwargs)
    numbers = sampler.of(scheduler, *args, **kwargs)
    if _setting(scheduler, "prediction_type") == "trigflow":
        # Noise is as large as the data there, and that is the unit of both.
        numbers = replace(numbers, noise=numbers.noise / _setting(scheduler, "sigma_data"))
    walks = [_walk(numbers, *case) for case in product(_starts(scheduler, first), _readings(scheduler, first))]
    # Sigmas that rise from a little noise look like sigmas that fall, but then the end is further from the data.
    if found := sorted(filter(_is_denoising, walks), key=lambda levels: float(levels.times[-1].abs())):
        return found[0]
    raise _unknown(scheduler)


def of_data(numbers: Sampler, levels: Levels) -> Sampler:
    """Return a sampler's numbers as sums of latents and data predictions, in the place of outputs.

    With x_0 = a_s x_s + b_s v_s the output is v_s = (x_0 - a_s x_s) / b_s.

    Raises: ValueError if there is a step whose output does not follow from the data.
    """
    a, b = levels.of_latents, levels.of_output
    if len(b) != len(numbers) or not (a.isfinite() & b.isfinite() & (b != 0)).all():
        raise ValueError(
            "rows over data predictions need steps whose outputs follow from these, all of them; use a sampler whose "
            "times lie between noise and data."
        )
    return replace(numbers, latents=numbers.latents - numbers.outputs * (a / b), outputs=numbers.outputs / b)


def _is_denoising(levels: Levels) -> bool:
    """Tell whether levels are those of a flow, of a preserved or of an exploding variance, and fall."""
    signal, noise, times = levels.signal, levels.noise, levels.times
    kinds = torch.stack([signal + noise - 1, signal**2 + noise**2 - 1, signal - 1])
    within = times.min() >= -TOLERANCE and times.max() <= 1 + TOLERANCE and times[-1] < times[0]
    return bool(within and kinds.abs().amax(1).min() <= TOLERANCE)


def _unknown(scheduler: Any) -> ValueError:
    return ValueError(
        "noise levels are known where a scheduler states the first one and a denoiser that knows the data falls from "
        f"it, which under this {type(scheduler).__name__} (prediction_type="
        f"{_setting(scheduler, 'prediction_type')!r}) it does not; use forecasters that need the order of the steps "
        "alone, or another sampler."
    )


def _setting(scheduler: Any, name: str) -> Any:
    return getattr(scheduler, "config", {}).get(name)


def _unclipped(scheduler: Any) -> Any:
    """Return a copy of a scheduler that does not clip: data that is known is within the range anyway."""
    scheduler = copy.deepcopy(scheduler)
    if settings := [name for name in sampler.NOT_AFFINE if _setting(scheduler, name)]:
        scheduler.register_to_config(**dict.fromkeys(settings, False))
    return scheduler


def _starts(scheduler: Any, first: Call) -> tuple[tuple[float, float], ...]:
    """Return (signal, noise) at a run's first step: as its scheduler states it, then swapped, for sigmas that rise."""
    stated = _stated(copy.deepcopy(scheduler), first["timestep"])
    return stated, (stated[1], stated[0])


def _stated(scheduler: Any, time: Any) -> tuple[float, float]:
    """Return (signal, noise) by a flow's sigma, or else by what a scheduler makes of data and of noise of size 1.

    Raises: ValueError if the scheduler has neither.
    """
    kind, start = _setting(scheduler, "prediction_type"), sampler.start_of(scheduler, time)
    time = scheduler.timesteps[start : start + 1].cpu()
    if kind == "trigflow":
        return float(time.double().cos()), float(time.double().sin())
    if kind in (None, "flow_prediction") and hasattr(scheduler, "sigmas"):
        return 1 - float(scheduler.sigmas[start]), float(scheduler.sigmas[start])
    if not hasattr(scheduler, "add_noise"):
        raise _unknown(scheduler)
    if hasattr(scheduler, "set_begin_index"):
        # Where times repeat, the index tells which one is meant; a step index would go before it.
        scheduler._step_index = None
        scheduler.set_begin_index(start)
    one = torch.ones(1, dtype=torch.float64)
    return float(scheduler.add_noise(one, 0 * one, time)), float(scheduler.add_noise(0 * one, one, time))


Reading = Callable[[float, float], tuple[float, float]]
"""The data prediction's coefficients of latents and output, from the latents' signal and noise."""

READINGS: dict[str, Reading] = {
    "epsilon": lambda signal, noise: (1 / signal, -noise / signal),
    "sample": lambda signal, noise: (0.0, 1.0),
    "v_prediction": lambda signal, noise: (signal / (signal**2 + noise**2), -noise / hypot(signal, noise)),
    "flow_prediction": lambda signal, noise: (1 / (signal + noise), -noise / (signal + noise)),
    "towards data": lambda signal, noise: (1 / (signal + noise), noise / (signal + noise)),
}
READINGS["trigflow"] = READINGS["v_prediction"]


def _readings(scheduler: Any, first: Call) -> list[Reading]:
    """Return what the output may mean: what is declared, or a velocity where nothing is."""
    declared = _setting(scheduler, "prediction_type")
    if first.get("pred_original_sample") is not None:
        return [READINGS["sample"]]
    if declared != "trigflow" and (data := _setting(scheduler, "sigma_data")):
        sign = -1 if declared == "v_prediction" else 1
        return [lambda signal, noise: (data**2 / (noise**2 + data**2), sign * noise * data / hypot(noise, data))]
    if declared in (None, "flow_prediction"):
        return [READINGS[velocity] for velocity in VELOCITIES]
    return [READINGS[declared]] if declared in READINGS else []


def _walk(numbers: Sampler, start: tuple[float, float], reading: Reading) -> Levels:
    """Return the levels of a run whose denoiser knows the data: it gives what brings the data prediction there.

    Latents and outputs are rows over (data, the first noise, the draws), whose numbers the sampler's sums combine.
    """
    steps, draws = numbers.noise.shape
    latents, outputs = (torch.zeros(steps + 1, 2 + draws, dtype=torch.float64) for _ in range(2))
    latents[0, :2] = torch.tensor(start)
    data = torch.eye(2 + draws, dtype=torch.float64)[0]
    levels, prediction = [start], []
    for s in range(steps):
        try:
            of_latents, of_output = reading(*levels[s])
        except ZeroDivisionError:
            of_latents, of_output = nan, nan
        prediction.append((of_latents, of_output))
        outputs[s] = (data - of_latents * latents[s]) / of_output
        latents[s + 1] = numbers.latents[s] @ latents[:steps] + numbers.outputs[s] @ outputs[:steps]
        latents[s + 1, 2:] += numbers.noise[s]
        levels.append((float(latents[s + 1, 0]), float(latents[s + 1, 1:].norm())))
    signal, noise = torch.tensor(levels, dtype=torch.float64).T
    return Levels(signal, noise, *torch.tensor(prediction, dtype=torch.float64).T)
