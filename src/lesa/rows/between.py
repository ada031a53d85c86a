"""What outputs are at times between those recorded, as far as what was recorded says it.

A denoiser is told the time by waves, the fastest of which turns over within a step: its outputs have a smooth part in
t, and a rough one. The smooth part is interpolated, by a polynomial through the recorded times next to another. Of the
rough part t alone says nothing but the size, which is what interpolation misses of each recorded output left out.

What the denoiser makes of times, its embedding, does say more. Then outputs are a Gaussian process over the times whose
covariance is a smooth one in log t, as much of the embeddings' inner products, and as much that is new at every time as
makes the recorded outputs the likeliest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

POINTS = 4
"""Through how many recorded times next to it a polynomial gives the outputs at another time."""
LEAST = 1e-3
"""Times below it are as one, in log t."""
LENGTHS = (0.5, 1.0, 2.0, 4.0)
"""Over what distances in log t outputs may be alike, of which the likeliest counts."""
ROUGH = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
"""What share of the smooth part the part that goes with embeddings may have."""
NEW = (1e-7, 1e-6, 1e-5, 1e-4, 1e-3)
"""What share of the smooth part may be new at every time."""


class Between(NamedTuple):
    """Outputs at S' other times: weighted sums of the S recorded ones, and what is not of these.

    Inner products of the others are ways G ways^T + rest, of those recorded being G.
    """

    ways: Tensor
    """(S', S)"""
    rest: Tensor
    """(S', S')"""


def between(gram: Tensor, known: Tensor, times: Tensor, embedded: Tensor | None = None) -> Between:
    """Return what outputs at other times are, (S',), given inner products of those at the known ones, (S, S).

    `embedded` is what the denoiser makes of the known times and of the others, (S + S', numbers). Where recorded
    outputs do not go with it, it is left out.
    """
    found = None if embedded is None else _process(gram, known, times, embedded)
    return found or _smooth(gram, known, times)


def _smooth(gram: Tensor, known: Tensor, times: Tensor) -> Between:
    ways, rough = interpolation(known, times), _rough(gram, known)
    return Between(ways, torch.diag(linear(times, known, rough)) - (ways * rough) @ ways.T)


def _rough(gram: Tensor, known: Tensor) -> Tensor:
    """Return the mean square of the part of each recorded output that is like none of the others, (S,)."""
    ways, every = torch.zeros_like(gram), torch.arange(len(known))
    for step in every if len(known) > 1 else ():
        others = every[every != step]
        ways[step, others] = interpolation(known[others], known[step : step + 1])[0]
    missed = torch.eye(len(known), dtype=gram.dtype) - ways
    return ((missed @ gram) * missed).sum(1).clamp_min(0) / missed.square().sum(1)


def _process(gram: Tensor, known: Tensor, times: Tensor, embedded: Tensor) -> Between | None:
    """Return what the likeliest Gaussian process says; None where embeddings have no part in it."""
    steps, likeliest, found = len(known), -math.inf, None
    for rough, covariance in _covariances(torch.cat([known, times]), embedded):
        factor, failed = torch.linalg.cholesky_ex(covariance[:steps, :steps])
        size = float(torch.cholesky_solve(gram, factor).trace()) / steps
        if failed or not 0 < size < math.inf:
            continue
        likelihood = -steps / 2 * math.log(size) - float(factor.diagonal().log().sum())
        if likelihood > likeliest:
            likeliest, found = likelihood, (rough, covariance, factor, size)
    if found is None or not found[0]:
        return None
    _, covariance, factor, size = found
    ways = torch.cholesky_solve(covariance[:steps, steps:], factor).T
    return Between(ways, size * (covariance[steps:, steps:] - ways @ covariance[:steps, steps:]))


def _covariances(times: Tensor, embedded: Tensor) -> Iterator[tuple[float, Tensor]]:
    """Yield what may be the covariances of outputs, with the share of the embeddings' part."""
    where = times.clamp_min(LEAST).log()
    apart, same = (where[:, None] - where).square(), (times[:, None] == times).to(times.dtype)
    part = embedded - embedded.mean(0)
    alike = part @ part.T / part.square().sum(1).mean().clamp_min(torch.finfo(part.dtype).tiny)
    for length, rough, new in product(LENGTHS, ROUGH, NEW):
        yield rough, (-apart / (2 * length**2)).exp() + rough * alike + new * same


def interpolation(known: Tensor, times: Tensor) -> Tensor:
    """Return the weights of what is known at falling times for other times, (other, known): a polynomial each, through
    the nearest `POINTS` of them."""
    weights = known.new_zeros(len(times), len(known))
    for row, time in zip(weights, times, strict=True):
        near = (known - time).abs().argsort(stable=True)[:POINTS].sort().values
        for k in near:
            others = known[near[near != k]]
            row[k] = ((time - others) / (known[k] - others)).prod()
    return weights


def linear(times: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Return values at other times, linear between those known, and beyond them those at the ends."""
    order = known.argsort(stable=True)
    return torch.from_numpy(np.interp(times.numpy(), known[order].numpy(), values[order].numpy()))
