"""What was done, per stream, as numbers and as a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class StreamSummary:
    """What one stream did in all runs so far.

    Steps are counted over all runs; `short_rows` are the forecasts that had fewer past features than they are made for;
    `clamped` those that went beyond the largest number of their dtype; `detours` the runs that left their schedule
    because they were unusual; `bytes_held` is the history's memory on the denoiser's device; `forecast_seconds` is host
    time (a GPU may still be at work after it).
    """

    runs: int = 0
    full_steps: int = 0
    skipped_steps: int = 0
    short_rows: int = 0
    clamped: int | Tensor = 0
    detours: int = 0
    bytes_held: int = 0
    forecast_seconds: float = 0.0

    @property
    def step_ratio(self) -> float:
        """Steps for each full step."""
        return (self.full_steps + self.skipped_steps) / max(self.full_steps, 1)


@dataclass
class SamplerSummary:
    """What was done at the sampler, after guidance, in all runs so far.

    `corrected` counts full steps that were corrected, which the denoiser's streams count as full; `uncorrected` those
    that were not, as other streams ran before (guidance was turned off); `clamped` the outputs that would have been
    beyond the largest number of their dtype; `bytes_held` is the memory of a run's first latents, and of full steps'
    outputs that correct others, where rows combine them.
    """

    corrected: int = 0
    uncorrected: int = 0
    clamped: int | Tensor = 0
    bytes_held: int = 0


class Summary(dict[str, StreamSummary]):
    """Stream name to `StreamSummary`; prints as a table.

    `data` is what was done for the data prediction, where that was forecast, and `reason` why it was. `passed_by`
    counts calls of a denoiser within a call of the pipeline that were of no run, as of a loop that another scheduler
    steps: they ran in full. `at_sampler` is what rows did there, and `bytes_at_sampler` the memory held for it;
    `bytes_held` is all of the memory held.

    Where forecasts were made with what was found for each run, `chosen` says what that was, and in how many runs.
    `promise` is what was measured of those that were calibrated, and `fallbacks` counts the runs that none fitted.
    """

    data: StreamSummary | None = None
    reason: str = ""
    passed_by: int = 0
    promise: str = ""
    fallbacks: int = 0

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.chosen: dict[str, int] = {}
        self.at_sampler = SamplerSummary()

    @property
    def bytes_at_sampler(self) -> int:
        """Bytes that a run held of its first latents, and of full steps' outputs that correct others."""
        return self.at_sampler.bytes_held

    @property
    def bytes_held(self) -> int:
        """Bytes that a run held on the denoiser's device: of streams, of the data prediction, and at the sampler."""
        streams = [*self.values(), *([self.data] if self.data else [])]
        return sum(one.bytes_held for one in streams) + self.bytes_at_sampler

    def __str__(self) -> str:
        if not self:
            return "no run yet"
        lines = ["stream      runs    full  skipped  step ratio       held  in forecasts"]
        rows = [*self.items(), *([("data", self.data)] if self.data else [])]
        for name, s in rows:
            lines.append(
                f"{name:<10} {s.runs:>5} {s.full_steps:>7} {s.skipped_steps:>8} {s.step_ratio:>11.2f} "
                f"{_bytes(s.bytes_held):>10} {s.forecast_seconds:>11.3f} s"
            )
            if s.short_rows:
                lines.append(f"{'':<10} {s.short_rows} forecasts had fewer past features than they are made for")
            if s.clamped:
                lines.append(f"{'':<10} {s.clamped} forecasts were beyond the range of their dtype and clamped to it")
            if s.detours:
                lines.append(f"{'':<10} {s.detours} runs were unusual and took a detour")
        if self.bytes_at_sampler:
            lines.append(f"{'sampler':<46} {_bytes(self.bytes_at_sampler):>10}")
        if self.at_sampler.corrected:
            lines.append(f"{'':<10} {_many(self.at_sampler.corrected, 'full step')} corrected")
        if self.at_sampler.uncorrected:
            words = "not corrected, as other streams ran than before"
            lines.append(f"{'':<10} {_many(self.at_sampler.uncorrected, 'full step')} {words}")
        if self.at_sampler.clamped:
            words = "beyond the range of the dtype and clamped to it"
            lines.append(f"{'':<10} {_many(int(self.at_sampler.clamped), 'output')} {words}")
        if self.data:
            lines.append(f"forecast: the data prediction, {self.reason}")
        lines += [f"{label}, in {runs} run{'s' * (runs != 1)}" for label, runs in self.chosen.items()]
        if self.promise:
            lines.append(f"promised, on prompts checked: {self.promise}")
        if self.fallbacks:
            some = "1 run fitted" if self.fallbacks == 1 else f"{self.fallbacks} runs fitted"
            lines.append(f"{some} no predictor, and fell back")
        if self.passed_by:
            lines.append(f"{self.passed_by} calls of a denoiser were of no run, and ran in full")
        return "\n".join(lines)


def _many(count: int, one: str) -> str:
    return f"1 {one} was" if count == 1 else f"{count} {one}s were"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"
