"""What a pipeline drew, as arrays that pictures are measured by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor


def arrays(drawn: Sequence[Any]) -> list[np.ndarray] | None:
    """Return pictures or clips as uint8 RGB, (H, W, 3) or (frames, H, W, 3); None if what was drawn is neither.

    They are PIL pictures, lists of such frames, or arrays and tensors of numbers from 0 to 1.
    """
    found = [_array(one) for one in drawn]
    return [x for x in found if x is not None] if found and all(x is not None for x in found) else None


def _array(one: Any) -> np.ndarray | None:
    if hasattr(one, "convert"):
        return np.asarray(one.convert("RGB"))
    if isinstance(one, (list, tuple)) and len(one):
        frames = [_array(frame) for frame in one]
        return np.stack([x for x in frames if x is not None]) if all(x is not None for x in frames) else None
    if isinstance(one, Tensor):
        one = one.detach().float().cpu().numpy()
        one = np.moveaxis(one, -3, -1) if one.ndim in (3, 4) and one.shape[-3] == 3 else one
    if not isinstance(one, np.ndarray) or one.ndim not in (3, 4) or one.shape[-1] != 3:
        return None
    return one if one.dtype == np.uint8 else (one.clip(0, 1) * 255).round().astype(np.uint8)
