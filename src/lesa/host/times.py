"""The times that a scheduler of diffusers will walk, once they are set."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lesa.host.intercept import unmarked
from lesa.rows import levels
from lesa.rows.grid import times_in_order

KEPT = 64
ROUNDING = 1e-6
"""What a last time that a sampler's own arithmetic should have brought to 0 may be: of sigmas of 500, 2e-8 is left."""
_known: dict[tuple, Tensor] = {}


def times_of(scheduler: Any) -> Tensor:
    """Return the grid that a scheduler will walk, float64 (S + 1,), one time for each tick and the last.

    Under flow matching they are its sigmas. Elsewhere they are read off a copy's steps (`lesa.rows.levels`); where
    those do not tell, they fall evenly from 1 to 0, in the order of the steps, which is all that they then say.
    """
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and _is_flow(scheduler):
        times = torch.as_tensor(sigmas).detach().double().cpu()
        if len(times) == len(scheduler.timesteps) + 1 and times.min() >= 0 and times.max() <= 1:
            return 1 - times if times[-1] > times[0] else times
    key = type(scheduler), str(getattr(scheduler, "config", "")), tuple(_numbers(scheduler.timesteps))
    if key not in _known:
        if len(_known) >= KEPT:
            _known.clear()
        _known[key] = _read(scheduler)
    return _known[key]


def _is_flow(scheduler: Any) -> bool:
    config = getattr(scheduler, "config", {})
    kind = config.get("prediction_type", "flow_prediction" if config.get("use_flow_sigmas") else None)
    return kind == "flow_prediction" or type(scheduler).__name__.startswith("FlowMatch")


def _read(scheduler: Any) -> Tensor:
    """Probe a copy on zeros, from its first step on."""
    other = unmarked(scheduler)
    for name in ("_step_index", "_begin_index"):
        if hasattr(other, name):
            setattr(other, name, None)
    zeros = torch.zeros(1, 1, 2, 2)
    try:
        times = times_in_order(levels.of(other, zeros, scheduler.timesteps[0], zeros).times.clamp(0, 1))
        return torch.cat([times[:-1], torch.where(times[-1:] < ROUNDING, 0.0, times[-1:])])
    except (ValueError, TypeError, AttributeError):
        return torch.linspace(1, 0, len(scheduler.timesteps) + 1, dtype=torch.float64)


def _numbers(times: Any) -> list[float]:
    return torch.as_tensor(times).flatten().tolist()
