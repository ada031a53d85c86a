"""Make Diffusion Transformers several times faster by learning to forecast them.

with lesa.accelerate(pipe, predictor) as run:
    image = pipe("small red apple on blue, left").images[0]
print(run.summary())
"""

from lesa.forecasters import Forecaster, Lagrange, LinearRows, Reuse, Taylor
from lesa.pipelines import load
from lesa.plan import Plan
from lesa.predictor import L2P, LESA, Predictor
from lesa.row import Row
from lesa.runtime import accelerate, disable, enable
from lesa.schedule import Schedule
from lesa.tap import Tap

__version__ = "0.1.0"

__all__ = [
    "L2P",
    "LESA",
    "Forecaster",
    "Lagrange",
    "LinearRows",
    "Plan",
    "Predictor",
    "Reuse",
    "Row",
    "Schedule",
    "Tap",
    "Taylor",
    "accelerate",
    "disable",
    "enable",
    "load",
]
