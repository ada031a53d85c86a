"""What a line of records can be: a start, and what one picture, time or cost was measured to be."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lesa.predictors.disk import DAMAGED

DRIFT = "drift"
"""The score of last latents, `metrics.drift`, in dB: it goes on where PSNR ends, at its cap."""
FLOAT_PSNR = "float PSNR"
"""The score of decoded pictures before they are rounded to 8 bits, `metrics.float_psnr`, in dB."""
DIFFERING = "values differ"
"""The score of pictures, `metrics.differing`: the share of 8-bit values unlike the reference run's, 0 if identical."""
TRAINING = ("seconds", "bytes")
"""What a trained method's recipe says its training took: seconds of `lesa train`, with those of the predictor that it
began with, and bytes of the runs that it read."""
Key = tuple[str, str]
"""What tells a method from others: its name and its schedule."""


class Pair(NamedTuple):
    """A prompt and the seed of its noise."""

    prompt: str
    seed: int


@dataclass(frozen=True)
class Start:
    """A process went to work: where, with which methods (as `Method.entry` gives them), and which scores it lacks."""

    machine: Mapping[str, Any]
    methods: tuple[Mapping[str, Any], ...]
    lacking: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """What one picture of a method is worth, measured against the reference run's.

    `prompted`: does it still show what the prompt names (None: not asked). `full` are the full steps of the run;
    `scores` its drift and what else was asked for, by its name in tables; `feature_error` the relative error of what
    passed the tap at each step, None where nothing passed, and empty if the run is on another grid than the reference
    run; `share` the transformer's FLOPs in proportion to the reference run's. A run that may skip parts of a step has
    no full steps.
    """

    method: str
    schedule: str
    prompt: str
    seed: int
    psnr: float
    ssim: float
    prompted: bool | None = None
    full: tuple[int, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    feature_error: tuple[float | None, ...] = ()
    share: float | None = None

    @property
    def pair(self) -> Pair:
        return Pair(self.prompt, self.seed)


@dataclass(frozen=True)
class Time:
    """Seconds of one run at batch 1: of its denoising loop, of the whole call, and of a skipped step if it was told."""

    method: str
    schedule: str
    prompt: str
    seed: int
    loop: float
    call: float
    skipped: float | None = None

    @property
    def pair(self) -> Pair:
        return Pair(self.prompt, self.seed)


@dataclass(frozen=True)
class Cost:
    """What a run of a method takes at batch 1, besides time; None where it could not be told.

    `flops` are the transformer's, counted; `bytes_held` are those of the history, `resident_growth` of the process,
    `cuda_peak` of the GPU. `plans` are the rows of each stream, where the method has rows.
    """

    method: str
    schedule: str
    full: tuple[int, ...]
    flops: int | None = None
    bytes_held: int | None = None
    resident_growth: int | None = None
    cuda_peak: int | None = None
    plans: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A method that may fail did, with this error."""

    method: str
    schedule: str
    error: str


Line = Start | Record | Time | Cost | Failure
KINDS: dict[str, type[Line]] = {"start": Start, "picture": Record, "time": Time, "cost": Cost, "failure": Failure}
NAMES = {kind: name for name, kind in KINDS.items()}


def to_text(line: Line) -> str:
    """Write a line as JSON."""
    return json.dumps({"kind": NAMES[type(line)], **vars(line)}, ensure_ascii=False)


def from_text(text: str) -> Line:
    """Read what `to_text` wrote.

    Raises: ValueError if it is something else.
    """
    try:
        entries = json.loads(text)
        entries.pop("batch", None)  # the seal of those that end with it
        kind: Any = KINDS[entries.pop("kind")]
        line = kind(**{name: tuple(x) if isinstance(x, list) else x for name, x in entries.items()})
        _check(line)
        return line
    except DAMAGED as error:
        raise ValueError(f"it is no record ({error!r})") from error


_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("method", "schedule", "prompt", "error"), (str,)),
    **dict.fromkeys(("psnr", "ssim", "loop", "call"), _NUMBER),
    **dict.fromkeys(("skipped", "share"), (*_NUMBER, type(None))),
    **dict.fromkeys(("flops", "bytes_held", "resident_growth", "cuda_peak"), (*_NUMBER, type(None))),
    **dict.fromkeys(("scores", "plans", "machine", "lacking"), (dict,)),
    **dict.fromkeys(("full", "feature_error", "methods"), (tuple,)),
    "seed": (int,),
    "prompted": (bool, type(None)),
}
"""The types of the fields of lines."""


def _check(line: Line) -> None:
    """Raise ValueError unless the fields are of their types."""
    for name, value in vars(line).items():
        if type(value) not in _TYPES[name]:
            raise ValueError(f"its {name} is a {' or '.join(one.__name__ for one in _TYPES[name])}, got {value!r:.60}")
    parts = {"full": (int,), "feature_error": (*_NUMBER, type(None)), "methods": (dict,)}
    for name, kinds in parts.items():
        if any(type(part) not in kinds for part in getattr(line, name, ())):
            raise ValueError(f"its {name} are made of {' or '.join(one.__name__ for one in kinds)}")
    if any(type(score) not in _NUMBER for score in getattr(line, "scores", {}).values()):
        raise ValueError("its scores are numbers")
    if any(type(one.get(name)) is not str for one in getattr(line, "methods", ()) for name in ("name", "schedule")):
        raise ValueError("its methods have a name and a schedule")
