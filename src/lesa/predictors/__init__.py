"""The forecasters that are learned: their kinds, what they were trained for, how they are saved and found."""

from lesa.predictors.base import Predictor
from lesa.predictors.continuous import ContinuousLESA
from lesa.predictors.l2p import L2P
from lesa.predictors.lesa import LESA, Expert
from lesa.predictors.origin import Origin, configuration
from lesa.predictors.shipped import shipped_for
from lesa.predictors.solved import Solved

__all__ = ["L2P", "LESA", "ContinuousLESA", "Expert", "Origin", "Predictor", "Solved", "configuration", "shipped_for"]
