"""The registry of the zoo: builders of tiny pipelines by name.

`ZOO[name]()` builds a `Specimen`, whose `call(seed)` runs it. Each file below registers those of its kind.
"""

from importlib import import_module

from zoo.parts import ZOO, Specimen

__all__ = ["ZOO", "Specimen"]

for kind in ("flux", "qwen", "image", "unet", "wan", "ltx", "hunyuan", "video", "audio", "modular", "odd"):
    import_module(f"zoo.{kind}")
