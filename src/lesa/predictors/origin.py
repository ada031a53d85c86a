"""What a predictor was trained for and on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lesa.rows.tap import Tap


@dataclass(frozen=True)
class Origin:
    """What a predictor was trained for and on: it fits nothing else.

    `model` names the pipeline, `transformer` is the class of its transformer and `config` that class's configuration;
    `grid` is the S + 1 times, `schedule` reads as `Schedule.parse` takes it, `data` is the digest of the recorded runs.
    """

    model: str
    transformer: str
    config: dict[str, Any]
    tap: Tap
    grid: tuple[float, ...]
    schedule: str
    streams: tuple[str, ...] = ("cond",)
    data: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> Origin:
        """Read what `dataclasses.asdict` gave after a round trip through JSON."""
        blocks, module = entries["tap"]
        as_tuples = {name: tuple(entries[name]) for name in ("grid", "streams")}
        return cls(**{**entries, **as_tuples, "tap": Tap(tuple(blocks), module)})


def configuration(transformer: nn.Module) -> dict[str, Any]:
    """Return what a diffusers transformer was built with, without the entries that diffusers keeps for itself."""
    entries = {k: v for k, v in dict(getattr(transformer, "config", {})).items() if not k.startswith("_")}
    return json.loads(json.dumps(entries, default=str))
