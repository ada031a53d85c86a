"""One forecast as numbers, the features it combines, and the one line that touches them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Elements combined at a time: the scratch stays in a core's cache, and is large enough to fill a GPU. Unless features
# are small, it is a fraction of one.
FRACTION, LEAST = 8, 1 << 14
CPU_SCRATCH, GPU_SCRATCH = 1 << 18, 1 << 21


class Row(NamedTuple):
    """One forecast, h = sum_k coefficients[k] h_{past[k]} + offset.

    `coefficients` has one number per past step, oldest first, zero where unused; `offset` is a scalar added to every
    element of the feature. Both are float64. `latents` times the latents that a run began with is added at the sampler,
    to what guidance made of the forecasts.
    """

    coefficients: Tensor
    offset: Tensor
    latents: float = 0.0


class Term(NamedTuple):
    """What one stored tensor adds to a forecast: coefficient times values, times each token's scale if it has one."""

    values: Tensor
    coefficient: float
    scale: Tensor | None = None


def combine(terms: Sequence[Term], offset: float, forecast: Tensor, scratch: Tensor) -> Tensor | int:
    """Write the sum of the terms + offset to `forecast`, (tokens, channels) as all values are; scales are (tokens, 1).

    Accumulates in the dtype of `scratch`, whatever that of the values is (`sum |c|` reaches the hundreds), in pieces of
    its tokens, and reads each term once. Values on another device are brought over piece by piece.

    Sums beyond the range of the forecast's dtype are clamped to it, as infinities would soon be NaN; those that come of
    infinite values stay infinite. Returns 1 if there were such sums, else 0: a number on the forecast's device where
    the range is so narrow that it has to be looked at.
    """
    clamped: Tensor | int = 0
    for start in range(0, len(forecast), len(scratch)):
        piece = slice(start, start + len(scratch))
        total = scratch[: len(forecast[piece])].fill_(offset)
        for values, coefficient, scale in terms:
            part = values[piece].to(total.device, non_blocking=True)
            if scale is None:
                total.add_(part, alpha=coefficient)
            else:
                total.addcmul_(part.to(total.dtype), scale[piece].to(total.device), value=coefficient)
        total, beyond = within(total, forecast.dtype)
        clamped = clamped | beyond
        forecast[piece] = total
    return clamped


def within(sums: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | int]:
    """Return sums clamped to the range of a dtype, which they keep their own before, and whether some were beyond it.

    Infinite ones stay infinite. The second is 1 or 0, a number on their device where the range is so narrow that it has
    to be looked at.
    """
    most = torch.finfo(dtype).max
    if most >= torch.finfo(sums.dtype).max / 2:  # bfloat16 has the range of float32
        return sums, 0
    beyond = (sums.abs() > most) & sums.isfinite()
    return torch.where(beyond, sums.clamp(-most, most), sums), beyond.any()


class Storage(NamedTuple):
    """How a history is stored: in which dtype (None: the features' own), and whether on the CPU."""

    dtype: torch.dtype | None = None
    on_cpu: bool = False

    @property
    def of_differences(self) -> bool:
        """Tell whether all but the newest feature are stored as differences, each to the next newer one."""
        return self.dtype is not None

    def history(self, slots: int, like: Tensor) -> History:
        """Make a history of at most `slots` features like this one."""
        return (Differences if self.of_differences else History)(slots, like, self)

    @classmethod
    def parse(cls, name: str) -> Storage:
        """Read 'model', 'int8', 'fp8', 'cpu', 'int8-cpu' or 'fp8-cpu'.

        Raises: ValueError if it is none of these.
        """
        if name not in STORAGES:
            raise ValueError(f"a history is stored as one of {', '.join(STORAGES)}, got {name!r}; name one of these.")
        return STORAGES[name]


STORAGES = {
    "model": Storage(),
    "int8": Storage(torch.int8),
    "fp8": Storage(torch.float8_e4m3fn),
    "cpu": Storage(on_cpu=True),
    "int8-cpu": Storage(torch.int8, on_cpu=True),
    "fp8-cpu": Storage(torch.float8_e4m3fn, on_cpu=True),
}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


class History:
    """The past features that later forecasts use: at most `slots` of one shape, in storage made once.

    The storage has the dtype of the first one, and is made wider if one comes that this cannot hold (under autocast,
    dtypes change between steps). `clamped` is 1 if the newest forecast was beyond the range of its dtype, else 0.
    """

    def __init__(self, slots: int, like: Tensor, storage: Storage = STORAGES["model"]):
        self.slots, self.storage = slots, storage
        self._shape, self._dtype, self._device = like.shape, like.dtype, like.device
        self.clamped: Tensor | int = 0
        self._slot_of: dict[int, int] = {}  # by step, oldest first
        self._wide = torch.promote_types(like.dtype, torch.float32)
        self._channels = like.shape[-1]
        self._tokens = like.numel() // self._channels
        most = CPU_SCRATCH if like.device.type == "cpu" else GPU_SCRATCH
        elements = min(like.numel(), most, max(LEAST, like.numel() // FRACTION))
        with torch.inference_mode(False):  # or later runs outside that mode could not write
            shape = (max(1, elements // self._channels), self._channels)
            self._scratch = torch.empty(shape, dtype=self._wide, device=like.device)
            self._allocate()

    def _allocate(self) -> None:
        self._features = self._empty(self.slots, self._channels, self._dtype)

    def _empty(self, slots: int, channels: int, dtype: torch.dtype) -> Tensor:
        """Make storage; on the CPU it is pinned where a GPU reads it."""
        away = self.storage.on_cpu and self._device.type == "cuda"
        place = torch.device("cpu") if self.storage.on_cpu else self._device
        return torch.empty((slots, self._tokens, channels), dtype=dtype, device=place, pin_memory=away)

    @property
    def steps(self) -> list[int]:
        """The steps whose features are held, oldest first."""
        return list(self._slot_of)

    @property
    def nbytes(self) -> int:
        """Bytes held of the features' device memory, the scratch included."""
        return sum(tensor.nbytes for tensor in self._tensors() if tensor.device == self._device)

    def _tensors(self) -> list[Tensor]:
        return [self._features, self._scratch]

    def fits(self, feature: Tensor) -> bool:
        """Tell whether a feature has the shape and device of those held; its dtype may be another."""
        return (self._shape, self._device) == (feature.shape, feature.device)

    def keep(self, steps: Collection[int]) -> None:
        """Forget all steps but these."""
        self._slot_of = {step: slot for step, slot in self._slot_of.items() if step in steps}

    def append(self, step: int, feature: Tensor) -> None:
        """Copy a feature in.

        Raises: IndexError if all slots are taken.
        """
        with torch.no_grad():
            self._widen(torch.promote_types(self._dtype, feature.dtype))
            self._slot_of[step] = self._store(feature.reshape(self._tokens, self._channels))

    def _widen(self, dtype: torch.dtype) -> None:
        """Store the features as they are in a wider dtype."""
        if dtype == self._dtype:
            return
        with torch.inference_mode(False):
            narrow, self._dtype = self._features, dtype
            self._features = self._empty(len(narrow), self._channels, dtype).copy_(narrow)
            self._scratch = self._scratch.to(torch.promote_types(self._scratch.dtype, dtype))

    def _store(self, feature: Tensor) -> int:
        """Copy a feature to a free slot and return that."""
        slot = self._free(self.slots)
        self._features[slot].copy_(feature, non_blocking=True)
        return slot

    def _free(self, slots: int) -> int:
        return sorted(set(range(slots)).difference(self._slot_of.values()))[0]

    @torch.no_grad()
    def forecast(
        self, past: Sequence[int], coefficients: Sequence[float], offset: float, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Combine the features of past steps into a new one; where a coefficient is zero, none need be held.

        It has the dtype of the storage if none is given.

        Raises: ValueError if there is not one coefficient for each past step; KeyError if one that counts is not held.
        """
        counting = {step: c for step, c in zip(past, coefficients, strict=True) if c != 0.0}
        if missing := sorted(counting.keys() - self._slot_of.keys()):
            raise KeyError(f"the steps {missing} count and are not held, but {self.steps}; keep them.")
        forecast = torch.empty(self._shape, dtype=dtype or self._dtype, device=self._device)
        flat = forecast.view(self._tokens, self._channels)
        self.clamped = combine(self._terms(counting), offset, flat, self._scratch)
        return forecast

    def _terms(self, coefficients: dict[int, float]) -> list[Term]:
        return [Term(self._features[self._slot_of[step]], c) for step, c in coefficients.items()]


class Differences(History):
    """A history of the newest feature as it is, and of each older one as its difference to the next newer, quantised.

    Neighbours differ by a fraction of their size, and so does the rounding error. A difference d = h_next - h is stored
    as codes and one scale a token, d = scale codes, the largest code at the token's largest element. It is quantised
    once, from two features that are exact, when the newer one comes. A forecast never restores the older features:

        sum_k c_k h_k = (sum_k c_k) h_newest - sum_j (sum_{k <= j} c_k) d_j
    """

    _NEWEST = -1  # its slot

    def _allocate(self) -> None:
        older = max(self.slots - 1, 0)
        assert self.storage.dtype is not None
        self._features = self._empty(min(self.slots, 1), self._channels, self._dtype)
        self._codes = self._empty(older, self._channels, self.storage.dtype)
        self._scales = self._empty(older, 1, self._wide)

    def _tensors(self) -> list[Tensor]:
        return [*super()._tensors(), self._codes, self._scales]

    def keep(self, steps: Collection[int]) -> None:
        """Forget the steps before these; one in between is part of what older ones are made of, and stays."""
        oldest = min(steps, default=None)
        super().keep([step for step in self._slot_of if oldest is not None and step >= oldest])

    def _store(self, feature: Tensor) -> int:
        if self._slot_of:
            newest = self.steps[-1]
            self._slot_of[newest] = self._quantise(feature)
        self._features[0].copy_(feature, non_blocking=True)
        return self._NEWEST

    def _quantise(self, newer: Tensor) -> int:
        """Store the difference of a feature to the newest one held; returns its slot."""
        slot = self._free(self.slots - 1)
        older, codes, scales = self._features[0], self._codes[slot], self._scales[slot]
        for start in range(0, self._tokens, len(self._scratch)):
            piece = slice(start, start + len(self._scratch))
            difference = self._scratch[: len(older[piece])].copy_(newer[piece])
            difference.sub_(older[piece].to(difference.device, non_blocking=True))
            scale = difference.abs().amax(-1, keepdim=True) / LARGEST[codes.dtype]
            difference.div_(scale.clamp_min(torch.finfo(scale.dtype).tiny))
            codes[piece] = difference if codes.is_floating_point() else difference.round_()
            scales[piece] = scale
        return slot

    def _terms(self, coefficients: dict[int, float]) -> list[Term]:
        terms, total = [], 0.0
        for step, slot in self._slot_of.items():
            total += coefficients.get(step, 0.0)
            if slot == self._NEWEST:
                terms.append(Term(self._features[0], total))
            else:
                terms.append(Term(self._codes[slot], -total, self._scales[slot]))
        return [term for term in terms if term.coefficient]
