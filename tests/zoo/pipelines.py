"""The registry of the zoo: builders of tiny pipelines by name."""

from zoo import audio, flux, image, modular, odd, unet, video
from zoo.parts import ZOO, Specimen

__all__ = ["ZOO", "Specimen", "audio", "flux", "image", "modular", "odd", "unet", "video"]
