"""The numbers that training fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from lesa.predictors import LESA, Predictor
from lesa.rows.row import Row

if TYPE_CHECKING:
    from lesa.learn.training import Problem


class Unknowns:
    """The numbers that are fitted: a predictor's parameters, with LESA's alphas in the KANs' place if they are free."""

    def __init__(self, predictor: Predictor, free_alphas: bool):
        self.predictor, self.streams = predictor, predictor.origin.streams
        self.alphas: dict[str, Tensor] = {}
        if free_alphas and isinstance(predictor, LESA):
            self.alphas = {s: predictor.alphas(s).detach().requires_grad_() for s in self.streams}
        self.parameters: list[Tensor] = [p for stream in self.streams for p in self._of(stream)]

    def _of(self, stream: str) -> list[Tensor]:
        if stream not in self.alphas or not isinstance(self.predictor, LESA):
            return list(self.predictor.numbers(stream))
        experts = self.predictor.stage_experts(stream)
        return [self.alphas[stream], *(p for expert in experts for p in (expert.weight, expert.bias))]

    def rows(self, problem: Problem) -> dict[str, dict[int, Row]]:
        given = {stream: {"alphas": alphas} for stream, alphas in self.alphas.items()}
        rows_of, grid, pasts = self.predictor.stream_rows, problem.grid, problem.pasts
        return {stream: rows_of(stream, grid, pasts, **given.get(stream, {})) for stream in self.streams}

    def values(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def settle(self, values: Sequence[Tensor]) -> None:
        """Set the predictor to these values."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)
        for stream, alphas in self.alphas.items():
            cast(LESA, self.predictor).absorb(alphas, stream)
