"""Where a denoiser's feature is, as names."""

from __future__ import annotations

from typing import NamedTuple

OUTPUT = "output"
PLACES = ("feature", "norm", "projection", OUTPUT)
"""What places of a tap are called: 'feature' is the class's usual one."""


class Tap(NamedTuple):
    """Name a denoiser's lists of blocks to bypass, and the module, or modules, whose first input is the feature.

    Names may be dotted. Without a module the feature is what the denoiser returns, and nothing of it runs on a
    skipped step.
    """

    blocks: tuple[str, ...] = ()
    module: str | tuple[str, ...] | None = None

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules that features enter; none at the output."""
        return (self.module,) if isinstance(self.module, str) else self.module or ()
