"""Make Diffusion Transformers several times faster by learning to forecast them.

with lesa.accelerate(pipe, predictor) as run:
    image = pipe("small red apple on blue, left").images[0]
print(run.summary())
"""

from lesa.bench.compare import CompareOptions, compare
from lesa.host.pipelines import load
from lesa.host.runtime import accelerate, disable, enable
from lesa.learn.calibrate import CalibrateOptions, calibrate
from lesa.learn.collecting import CollectOptions, collect
from lesa.learn.options import TrainOptions
from lesa.learn.plan import PlanOptions, plan
from lesa.learn.train import train
from lesa.predictors import L2P, LESA, Predictor
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
    "load",
    "plan",
    "train",
]
