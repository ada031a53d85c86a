"""Make Diffusion Transformers several times faster by learning to forecast them.

with lesa.accelerate(pipe, predictor) as run:
    image = pipe("small red apple on blue, left").images[0]
print(run.summary())
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lesa.bench.compare import CompareOptions, compare
    from lesa.host.doctor import examine
    from lesa.host.pipelines import load
    from lesa.host.runtime import accelerate, disable, enable
    from lesa.learn.calibrate import CalibrateOptions, calibrate
    from lesa.learn.collecting import CollectOptions, collect
    from lesa.learn.options import TrainOptions
    from lesa.learn.plan import PlanOptions, plan
    from lesa.learn.train import train
    from lesa.predictors import L2P, LESA, Predictor
    from lesa.rows.default import Default
    from lesa.rows.forecasters import Forecaster, Lagrange, LinearRows, Reuse, Taylor
    from lesa.rows.plan import Plan
    from lesa.rows.row import Row
    from lesa.rows.schedule import Schedule
    from lesa.rows.tap import Tap

__version__ = "0.1.0"

__all__ = [
    "L2P",
    "LESA",
    "CalibrateOptions",
    "CollectOptions",
    "CompareOptions",
    "Default",
    "Forecaster",
    "Lagrange",
    "LinearRows",
    "Plan",
    "PlanOptions",
    "Predictor",
    "Reuse",
    "Row",
    "Schedule",
    "Tap",
    "Taylor",
    "TrainOptions",
    "accelerate",
    "calibrate",
    "collect",
    "compare",
    "disable",
    "enable",
    "examine",
    "load",
    "plan",
    "train",
]

_WHERE = {
    "bench.compare": ("CompareOptions", "compare"),
    "host.doctor": ("examine",),
    "host.pipelines": ("load",),
    "host.runtime": ("accelerate", "disable", "enable"),
    "learn.calibrate": ("CalibrateOptions", "calibrate"),
    "learn.collecting": ("CollectOptions", "collect"),
    "learn.options": ("TrainOptions",),
    "learn.plan": ("PlanOptions", "plan"),
    "learn.train": ("train",),
    "predictors": ("L2P", "LESA", "Predictor"),
    "rows.default": ("Default",),
    "rows.forecasters": ("Forecaster", "Lagrange", "LinearRows", "Reuse", "Taylor"),
    "rows.plan": ("Plan",),
    "rows.row": ("Row",),
    "rows.schedule": ("Schedule",),
    "rows.tap": ("Tap",),
}
"""Where the names are, which are imported as they are asked for: to import lesa costs no more than what is used."""
_FOLDERS = ("rows", "predictors", "host", "learn", "bench", "cli")


def __getattr__(name: str) -> Any:
    """Import what is asked for: a public name, or a folder."""
    if name in _FOLDERS:
        return import_module(f"lesa.{name}")
    for module, names in _WHERE.items():
        if name in names:
            globals()[name] = found = getattr(import_module(f"lesa.{module}"), name)
            return found
    raise AttributeError(f"module 'lesa' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List what can be asked for, too."""
    return sorted({*globals(), *__all__, *_FOLDERS})
