"""L2P: free linear rows (arXiv 2604.26365)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lesa.predictors.base import Predictor
from lesa.predictors.origin import Origin
from lesa.rows.row import Row


class L2P(Predictor):
    """Free linear rows, one number for each past feature of each skipped step (L2P, arXiv 2604.26365).

    They start at the straight line through the newest two full steps, or at reuse if it `remembers_forecasts` or
    without `slope`.

    Raises: ValueError if `memory` is less than 1.
    """

    method = "l2p"

    def __init__(self, origin: Origin, *, memory: int = 4, remembers_forecasts: bool = False, slope: bool = True):
        super().__init__(origin)
        if memory < 1:
            raise ValueError(f"a row combines at least 1 past feature, got memory {memory}; raise it.")
        self.memory, self.remembers_forecasts = memory, remembers_forecasts
        shape = len(self.grid) - 1, memory
        self.coefficients = nn.ParameterDict({s: nn.Parameter(torch.empty(shape)) for s in origin.streams})
        if not self.only_shapes:
            self._start(slope and memory > 1 and not remembers_forecasts)

    @torch.no_grad()
    def _start(self, slope: bool) -> None:
        for start in self.parameters():
            start.zero_()
            start[:, -1] = 1.0
            if slope:
                start[:, -2:] += self.slopes()[:, None] * torch.tensor([-1.0, 1.0])

    def options(self) -> dict[str, Any]:
        return dict(memory=self.memory, remembers_forecasts=self.remembers_forecasts)

    def numbers(self, stream: str) -> list[nn.Parameter]:
        return [self.coefficients[stream]]

    def wants(self, grid: Tensor, step: int) -> int:
        """Return how many past features the schedule leaves in the history."""
        return len(self.past(step))

    def stream_rows(self, stream: str, grid: Tensor, pasts: Mapping[int, Sequence[int]]) -> dict[int, Row]:
        table = self.coefficients[stream]
        return {step: Row(table[step, self.memory - len(past) :], table.new_zeros(())) for step, past in pasts.items()}

    def __repr__(self) -> str:
        return f"L2P({self.origin.model!r}, schedule={self.origin.schedule!r})"
