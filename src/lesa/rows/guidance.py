"""How a pipeline makes one velocity of its streams' outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lesa.rows.sampler import Sampler

UNEXPLAINED = 0.1
"""The share of a run's way that its outputs may leave unexplained; the rounding of bfloat16 leaves some."""
MEASURED_ON = 4
ALL = "all"
"""The stream of what is the same in all of them: a row for it acts on the velocity, whatever guidance makes of them."""


class Guidance(NamedTuple):
    """Classifier-free guidance, v = uncond + scale (cond - uncond), or one stream alone.

    If it is `rescaled`, as in Qwen-Image, each token of v then gets the norm that it has in cond.
    """

    streams: tuple[str, ...] = ("cond",)
    scale: float = 1.0
    rescaled: bool = False

    @classmethod
    def of(cls, runs: Sequence[Any], streams: Sequence[str], sampler: Sampler | None = None) -> Guidance:
        """Measure how recorded runs combine these streams: by what way their outputs lead from noise to picture.

        The way is that of the runs' `sampler`, or else of Euler's on their grid.

        Raises: ValueError if they combine them in none of the ways that are known here.
        """
        if len(streams) == 1:
            return cls(tuple(streams))
        if sorted(streams) != ["cond", "uncond"]:
            raise ValueError(f"streams are cond and uncond, or one alone, got {', '.join(streams)}; record such runs.")
        runs = runs[:MEASURED_ON]
        outputs = torch.stack([torch.stack([run.outputs[name] for name in streams]) for run in runs]).float()
        durations, kept = runs[0].grid.diff().float(), 1.0
        if sampler is not None:
            durations, kept = sampler.response[-1].float(), float(sampler.decay[-1])
        way = torch.stack([run.latents[-1].float() - kept * run.latents[0].float() for run in runs])
        guidance, missing = _best(streams, outputs, durations, way)
        if not missing < UNEXPLAINED:
            raise ValueError(
                "the streams of a run make its velocity by classifier-free guidance, got runs of which it leaves "
                f"{missing:.0%} unexplained; record runs with the same guidance at all steps, or at the sampler, where "
                "no stream is told from another (seam=True)."
            )
        return guidance

    @classmethod
    def between(cls, streams: Sequence[str], outputs: Tensor, velocity: Tensor) -> tuple[Guidance, float]:
        """Measure how one step's outputs (P, streams, n, C) make its velocity (P, n, C); returns the guidance and the
        share that it leaves unexplained."""
        return _best(streams, outputs.unsqueeze(2), torch.ones(1, device=velocity.device), velocity)

    def velocity(self, outputs: Tensor) -> Tensor:
        """Combine outputs (P, streams, ..., C) to velocities (P, ..., C)."""
        if len(self.streams) == 1:
            return outputs[:, 0]
        cond, uncond = (outputs[:, self.streams.index(name)] for name in ("cond", "uncond"))
        velocity = uncond + self.scale * (cond - uncond)
        return (
            velocity * (cond.norm(dim=-1, keepdim=True) / velocity.norm(dim=-1, keepdim=True))
            if self.rescaled
            else velocity
        )

    @property
    def weights(self) -> Tensor:
        """How much of each stream is in the velocity, (streams,), of sum 1."""
        return torch.tensor([{"cond": self.scale, "uncond": 1 - self.scale}.get(name, 1.0) for name in self.streams])


def _best(streams: Sequence[str], outputs: Tensor, durations: Tensor, way: Tensor) -> tuple[Guidance, float]:
    found = [_fit(Guidance(tuple(streams), 1.0, rescaled), outputs, durations, way) for rescaled in (False, True)]
    return min(found, key=lambda one: one[1])


def _fit(guidance: Guidance, outputs: Tensor, durations: Tensor, way: Tensor) -> tuple[Guidance, float]:
    """Find the scale by Gauss-Newton steps; returns it with the share of the way that is left over."""

    def missing(scale: float) -> Tensor:
        velocity = guidance._replace(scale=scale).velocity(outputs)
        return torch.einsum("s,psnc->pnc", durations, velocity) - way

    scale, width = guidance.scale, 1e-2
    for _ in range(20):
        slope = (missing(scale + width) - missing(scale - width)) / (2 * width)
        size = float(slope.square().sum())
        if size == 0:  # the streams agree, and any scale is as good
            break
        scale -= float((slope * missing(scale)).sum()) / size
    return guidance._replace(scale=scale), float(missing(scale).norm() / way.norm())
