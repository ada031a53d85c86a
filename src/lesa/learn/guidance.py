"""What recorded runs say of their guidance."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from lesa.host.conditions import alike
from lesa.learn.sampling import sampler_of
from lesa.learn.trajectory import Trajectory
from lesa.predictors import configuration
from lesa.rows.guidance import Guidance


def facts(pipe: Any, runs: Sequence[Sequence[Trajectory]], call: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `Origin.training` says of the guidance of recorded runs, those of each collection.

    Of two streams it is measured; that which the transformer takes as a number is in the `call`, or its default. Where
    collections differ nothing is said.

    Raises: ValueError as `Guidance.of` and `sampler_of` do.
    """
    found: dict[str, Any] = {}
    streams = runs[0][0].streams
    if len(streams) > 1:
        samplers = [None if some[0].refusal else sampler_of(some) for some in runs]
        measured = [Guidance.of(some, streams, sampler) for some, sampler in zip(runs, samplers, strict=True)]
        if all(alike(one, measured[0]) for one in measured):
            found["guidance"] = dict(scale=round(measured[0].scale, 4), rescaled=measured[0].rescaled)
    if configuration(pipe.transformer).get("guidance_embeds"):
        usual = inspect.signature(type(pipe).__call__).parameters.get("guidance_scale")
        found["embedded_guidance"] = call.get("guidance_scale", usual and usual.default)
    return found
