"""One forecast as numbers, the features it combines, and the one line that touches them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Elements combined at a time: the scratch stays in a core's cache, and is large enough to fill a GPU.
CPU_SCRATCH, GPU_SCRATCH = 1 << 18, 1 << 23


class Row(NamedTuple):
    """One forecast, h = sum_k coefficients[k] h_{past[k]} + offset.

    `coefficients` has one number per past step, oldest first, zero where unused; `offset` is a scalar added to every
    element of the feature. Both are float64.
    """

    coefficients: Tensor
    offset: Tensor


def combine(features: Sequence[Tensor], coefficients: Sequence[float], offset: float, scratch: Tensor) -> Tensor:
    """Return sum_k coefficients[k] features[k] + offset as a new tensor of the features' shape and dtype.

    Accumulates in the dtype of `scratch`, whatever that of the features is (`sum |c|` reaches the hundreds), in pieces
    of its size, and reads each feature whose coefficient is not zero once. All are contiguous and of one shape.

    Raises: ValueError if there is not one coefficient for each feature.
    """
    used = [(f.view(-1), c) for f, c in zip(features, coefficients, strict=True) if c != 0.0]
    forecast = torch.empty_like(features[0])
    flat = forecast.view(-1)
    for start in range(0, flat.numel(), scratch.numel()):
        piece = slice(start, start + scratch.numel())
        total = scratch[: flat[piece].numel()].fill_(offset)
        for feature, coefficient in used:
            total.add_(feature[piece], alpha=coefficient)
        flat[piece] = total
    return forecast


class History:
    """The past features that a forecast may use: a preallocated ring of `memory` features of one shape and dtype."""

    def __init__(self, memory: int, like: Tensor):
        wide = torch.promote_types(like.dtype, torch.float32)
        scratch = min(like.numel(), CPU_SCRATCH if like.device.type == "cpu" else GPU_SCRATCH)
        with torch.inference_mode(False):  # or later runs outside that mode could not write
            self._ring = torch.empty((memory, *like.shape), dtype=like.dtype, device=like.device)
            self._scratch = torch.empty(scratch, dtype=wide, device=like.device)
        self._appended = 0
        self.steps: list[int] = []

    def fits(self, memory: int, like: Tensor) -> bool:
        """Tell whether this is the storage of `memory` features like this one."""
        ring = self._ring
        return (ring.shape, ring.dtype, ring.device) == ((memory, *like.shape), like.dtype, like.device)

    def clear(self) -> None:
        """Forget all steps; the storage stays."""
        self._appended = 0
        self.steps = []

    @torch.no_grad()
    def append(self, step: int, feature: Tensor) -> None:
        """Copy a feature in, over the oldest one when the ring is full."""
        memory = len(self._ring)
        self._ring[self._appended % memory].copy_(feature)
        self._appended += 1
        self.steps = [*self.steps, step][-memory:]

    def features(self) -> list[Tensor]:
        """Return the held features, oldest first, as views."""
        memory = len(self._ring)
        return [self._ring[k % memory] for k in range(self._appended - len(self.steps), self._appended)]

    @torch.no_grad()
    def forecast(self, coefficients: Sequence[float], offset: float) -> Tensor:
        """Combine the held features (one coefficient each, oldest first) into a new feature.

        Raises: ValueError if there is not one coefficient for each held feature.
        """
        return combine(self.features(), coefficients, offset, self._scratch)

    @property
    def nbytes(self) -> int:
        """Bytes of device memory held, the scratch included."""
        return self._ring.nbytes + self._scratch.nbytes
