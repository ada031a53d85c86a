"""The registry of the zoo: builders of tiny pipelines by name."""

from zoo import flux, image
from zoo.parts import ZOO, Specimen

__all__ = ["ZOO", "Specimen", "flux", "image"]
