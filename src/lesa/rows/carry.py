"""What a sampler carries of errors from step to step: a few numbers, however long the run."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

TOLERANCE = 1e-6
"""Below this share of the largest, a singular value of numbers read in float32 is rounding."""


class Carry:
    """The drift that errors of the velocity leave in a run, from one step to any later one, by a state of few numbers.

    With the `response` R of a sampler, (S + 1, S), errors e of the velocity leave the drift d_s = sum_k R_sk e_k before
    step s. What errors before step f do to all that comes later is a matrix of low rank: 1 for Euler and DDIM, whose
    state is the drift itself; 2 for DPM++ 2M, which remembers an output. Its columns span the states z_f, and

        z_end = T z_f + sum_{f <= s < end} M_s e_s,    d_f = D z_f.
    """

    def __init__(self, response: Tensor):
        self._response = response.double()
        self._bases = [self._basis(step) for step in range(len(response))]
        self.between = lru_cache(maxsize=None)(self._between)

    def _basis(self, step: int) -> Tensor:
        """Return what later drifts, those before steps `step` to S, are of a state before `step`: (S + 1 - step, r)."""
        vectors, sizes, _ = torch.linalg.svd(self._response[step:, :step], full_matrices=False)
        return vectors[:, sizes > TOLERANCE * sizes[:1]]

    def _between(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Return T and M of the way from a step to a later one, float32: (r_end, r_begin) and (r_end, end - begin)."""
        inverse = self._bases[end].T  # its columns are orthonormal
        carried = inverse @ self._bases[begin][end - begin :]
        return carried.float(), (inverse @ self._response[end:, begin:end]).float()

    def drift_of(self, step: int) -> Tensor:
        """Return D, by which the state before a step is the drift before it: (r,) float32."""
        return self._bases[step][0].float()
