"""What a run must be like for forecasts to be right in it: judged at its first step, before anything is skipped.

Two facts pass at a scheduler's first `step`: whether it adds noise, as a step of zeros shows, and what guidance makes
of the streams' outputs. The grid is the plan's affair, which is compiled before.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lesa.host.intercept import unmarked
from lesa.predictors import Origin, Predictor
from lesa.rows.forecasters import Forecaster
from lesa.rows.guidance import UNEXPLAINED, Guidance
from lesa.rows.levels import DATA
from lesa.rows.plan import Plan

if TYPE_CHECKING:
    from lesa.host.facts import Heard

NOISE = 1e-4
"""What a step makes of zeros, if it is more than this, is noise that it adds."""
OTHER_SCALE, SEEN = 0.05, 0.01
"""By what share a guidance scale may be another than the one trained for, and what share of the velocity shows it."""
HINTS = ("stochastic", "ancestral", "sde", "lcm", "ddpm", "churn")
"""What a class or setting is called that adds noise: the last resort, where no step can be tried."""


def adds_noise(scheduler: Any, *args: Any, **kwargs: Any) -> bool:
    """Tell whether a scheduler adds noise at this step, whose arguments are given, or at a later one of the run.

    A copy walks from here to the run's end on zeros: steps are affine in outputs and latents, so what is not zero then
    is noise, whether it is drawn at each step or was before the run. The scheduler, the generator and torch's own stay
    as they are. Where a copy cannot walk, the names of class and settings are all there is, and a warning says so.
    """
    try:
        return any(float(moved.abs().max()) > NOISE for moved in _walk_on_zeros(scheduler, *args, **kwargs))
    except Exception as error:  # of anyone's class
        hinted = _is_called_noisy(scheduler, kwargs)
        warnings.warn(
            f"a step of a copy tells whether a scheduler adds noise, but that of {type(scheduler).__name__} failed "
            f"({error}); by its names this one {'does' if hinted else 'does not'}.",
            stacklevel=2,
        )
        return hinted


def _walk_on_zeros(scheduler: Any, *args: Any, **kwargs: Any) -> Iterator[Tensor]:
    """Yield what a copy's steps make of zeros, from the step whose arguments are given to the last one."""
    walker, step = copy.deepcopy(scheduler), type(scheduler).step
    walker.__dict__.pop("step", None)
    bound = inspect.signature(step).bind(walker, *args, **kwargs)
    given = bound.arguments
    output, latents = (torch.zeros_like(given[name]) for name in ("model_output", "sample"))
    if given.get("generator") is not None:
        given["generator"] = torch.Generator(latents.device).manual_seed(0)
    for time in _times_from(scheduler, given["timestep"]):
        given |= {"model_output": output, "timestep": time, "sample": latents}
        with _random_numbers_kept(latents):
            moved = step(*bound.args, **bound.kwargs)
        yield moved[0] if isinstance(moved, tuple) else moved.prev_sample


def _times_from(scheduler: Any, time: Any) -> list[Any]:
    """Return a scheduler's time steps from this one on; this one alone if it is none of them."""
    times = list(scheduler.timesteps)
    return next((times[k:] for k, other in enumerate(times) if bool((other == time).all())), [time])


@contextmanager
def _random_numbers_kept(like: Tensor) -> Iterator[None]:
    """Leave torch's random numbers as they are, on the CPU and on the device of a tensor."""
    kind = like.device.type
    if kind == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        with torch.random.fork_rng(devices=[like.device.index or 0], device_type=kind):
            yield


def _is_called_noisy(scheduler: Any, options: Mapping[str, Any]) -> bool:
    settings = {**dict(getattr(scheduler, "config", {})), **options}
    names = [type(scheduler).__name__, *(value for value in settings.values() if isinstance(value, str))]
    names += [name for name, value in settings.items() if value is True]
    return bool(settings.get("eta")) or any(hint in name.lower() for hint in HINTS for name in names)


def noise_error(scheduler: Any, what: str) -> ValueError:
    """Make the error of a scheduler that adds noise; `what` begins it, such as 'runs are recorded with'."""
    return ValueError(
        f"{what} samplers that add no noise, got a {type(scheduler).__name__} that does as it steps. Outputs jump with "
        "the noise, and rows over them end far off. Calibrate for it (lesa.calibrate), or accelerate with an untrained "
        "forecaster such as lesa.Reuse(), at the output, without detours and with of='auto': these forecast the data "
        "prediction there, which does not jump. "
        "Or take the sampler without noise (stochastic_sampling=False, eta=0, an algorithm_type without 'sde')."
    )


class Noise:
    """Looks once for each kind of run whether noise is added in it: by class, settings, grid and options of `step`."""

    def __init__(self) -> None:
        self._found: dict[str, bool] = {}

    def is_added(self, scheduler: Any, args: tuple, kwargs: dict) -> bool:
        """Tell whether a run adds noise, given a call of its scheduler's `step`."""
        key = settings_of(scheduler, args, kwargs)
        if key not in self._found:
            self._found[key] = adds_noise(unmarked(scheduler), *args, **kwargs)
        return self._found[key]


def settings_of(scheduler: Any, args: tuple, kwargs: dict) -> str:
    """Return what the numbers of a run's steps depend on, given a call of its scheduler's `step`."""
    given = dict(inspect.signature(type(scheduler).step).bind(scheduler, *args, **kwargs).arguments)
    given.pop(next(iter(given)))
    tensors = {k: x is given.get("model_output") for k, x in given.items() if isinstance(x, Tensor)}
    options = {k: x for k, x in given.items() if isinstance(x, (bool, int, float, str))}
    timestep = torch.as_tensor(given.get("timestep", 0)).flatten()[0].item()
    return repr(
        (
            type(scheduler),
            dict(getattr(scheduler, "config", {})),
            [torch.as_tensor(getattr(scheduler, name, ())).tolist() for name in ("timesteps", "sigmas")],
            getattr(scheduler, "begin_index", None),
            timestep,
            tensors,
            options,
        )
    )


class Judge:
    """Judges the runs of an accelerated pipeline, each at its first step, where no step is skipped yet."""

    def __init__(self, forecaster: Forecaster, noise: Noise):
        self._forecaster, self._noise = forecaster, noise
        self._origin = forecaster.origin if isinstance(forecaster, Predictor) else None
        self._of_data = isinstance(forecaster, Predictor) and forecaster.of == DATA

    def judge(self, plans: Sequence[Plan], heard: Heard, scheduler: Any, args: tuple, kwargs: dict) -> None:
        """Raise ValueError if outputs are not right on these plans, given a scheduler's first `step` and what was heard
        before it."""
        jumps = not self._of_data and (self._origin is not None or not all(map(_reuses, plans)))
        if jumps and self._noise.is_added(scheduler, args, kwargs):
            raise noise_error(scheduler, f"{self._forecaster!r} is for")
        if self._origin is not None:
            check_embedded(self._origin, heard.embedded)
            check_guidance(self._origin, heard.outputs, args[0] if args else kwargs["model_output"])


def _reuses(plan: Plan) -> bool:
    """Tell whether a plan's forecasts are the newest feature as it is, and its full steps are as they are."""
    return not plan.corrections and all(
        row.coefficients[-1] == 1 and not any((*row.coefficients[:-1], row.offset, row.latents))
        for row in plan.rows.values()
    )


def check_embedded(origin: Origin, given: Tensor | None) -> None:
    """Raise ValueError if a transformer is given another number as guidance than in the runs trained on.

    Some pipelines hand on a thousand times the number of their call.
    """
    trained = origin.training.get("embedded_guidance")
    if trained is None or given is None:
        return
    scales = {round(float(x), 4) for x in given.flatten().float()}
    if not any(all(abs(x / unit - trained) <= OTHER_SCALE * abs(trained) for x in scales) for unit in (1, 1000)):
        raise ValueError(
            f"this predictor was trained with guidance_scale={trained:.3g}, got a run whose transformer is "
            f"given {', '.join(map(str, sorted(scales)))}; call the pipeline so, or train one on runs with yours."
        )


def check_guidance(origin: Origin, outputs: Mapping[str, Tensor], velocity: Tensor) -> None:
    """Raise ValueError if the streams' outputs of a step make this velocity by other guidance than a predictor's.

    A predictor that does not say its own fits any, and a difference too small to be seen is none.
    """
    said = origin.training.get("guidance")
    if said is None:
        return
    trained = Guidance(origin.streams, said["scale"], said["rescaled"])
    begin = f"this predictor was trained under guidance of {_words(trained)}, of {' and '.join(origin.streams)}, got"
    advice = "call the pipeline as those runs, or train a predictor on runs with the guidance that you use."
    if missing := [name for name in origin.streams if name not in outputs]:
        raise ValueError(f"{begin} a run without {' and '.join(missing)}; {advice}")
    cut = [outputs[name][:, : velocity.shape[1]] for name in origin.streams]  # some have more tokens than are moved
    if any(output.shape != velocity.shape for output in cut):
        shapes = f"{tuple(cut[0].shape)} and {tuple(velocity.shape)}"
        warnings.warn(f"guidance is known where outputs and velocity are alike, got {shapes}: unchecked.", stacklevel=2)
        return
    stacked, velocity = torch.stack(cut, dim=1).float(), velocity.float()
    if float((trained.velocity(stacked) - velocity).norm() / velocity.norm()) <= SEEN:
        return
    found, unexplained = Guidance.between(origin.streams, stacked, velocity)
    if unexplained > UNEXPLAINED:
        raise ValueError(f"{begin} a run of which such guidance leaves {unexplained:.0%} unexplained; {advice}")
    if not alike(found, trained):
        raise ValueError(f"{begin} {_words(found)}; {advice}")


def alike(one: Guidance, other: Guidance) -> bool:
    return one.rescaled == other.rescaled and abs(one.scale - other.scale) <= OTHER_SCALE * abs(other.scale)


def _words(guidance: Guidance) -> str:
    return f"{guidance.scale:.3g}{' with the norms of cond' if guidance.rescaled else ''}"
