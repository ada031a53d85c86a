"""Measure a record again: what a table rests on can be checked line by line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from lesa.bench import benchmark, compare, methods, peers, recogniser, records, samplers, scores
from lesa.bench.lines import Record
from lesa.host import needs
from lesa.host.loading import LoadOptions, loaded
from lesa.predictors import Predictor
from lesa.predictors.fingerprint import pipeline_fingerprint


class Again(NamedTuple):
    """A record as it was, and as it is now."""

    then: Record
    now: Record

    @property
    def off(self) -> float:
        """By how many dB their PSNR differ."""
        return abs(self.now.psnr - self.then.psnr)


def reproduce(
    file: str | Path, line: int | None, options: LoadOptions, predictors: Sequence[Predictor] | None = None
) -> Again:
    """Measure the record in a line of a file (None: its last picture's) again, on its model, loaded as it was then.

    What `options` name wins: another folder of the model, another device. A trained method is found among the
    `predictors`, by default those shipped with the model.

    Raises: ValueError if steps are asked for, or the model has other weights; LookupError if a predictor is not there.
    """
    needs.check("a comparison", "comparison")
    if options.steps:
        raise ValueError("a record says how many steps its run has; leave steps= out.")
    then, entry, setting = records.at_line(file, line)
    pipe = loaded(_as_then(options, setting))
    if pipeline_fingerprint(pipe) != setting["weights"]:
        model = options.model or setting["model"]
        raise ValueError(f"the record is of other weights than those of {model}; name its model=.")
    if "peer" in entry["recipe"]:
        method = peers.rebuild(entry)
    elif "sampler" in entry["recipe"]:
        method = samplers.rebuild(entry)
    else:
        method = methods.rebuild(entry, compare.shipped(pipe) if predictors is None else predictors)
    found, _ = scores.load([name for name in then.scores if name in scores.SCORES])
    recognise = recogniser.recogniser(options.model or setting["model"])
    return Again(then, benchmark.reproduce(pipe, method, then, setting, recognise, found))


def _as_then(options: LoadOptions, setting: dict[str, Any] | Any) -> LoadOptions:
    return replace(
        options,
        model=options.model or setting["model"],
        call={**setting["call"], **options.call},
        dtype=options.dtype or setting["dtype"],
        device=options.device or setting["device"],
        lora=options.lora or setting.get("lora"),
        scheduler=options.scheduler or setting.get("scheduler"),
    )
