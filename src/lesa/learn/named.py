"""What can be trained, and how, by name."""

from __future__ import annotations

LEARNED = "learned"
CONTINUOUS = "lesa-continuous"
METHODS, HISTORIES, LOSSES = ("lesa", CONTINUOUS, "l2p"), ("full", "all"), ("latents", "features", "steps")
SQUARES, GRADIENT = FITS = ("least-squares", "gradient")
