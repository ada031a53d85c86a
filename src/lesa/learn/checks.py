"""Checked calls: none that rows were solved on, whose runs say what is kept and what is promised."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from lesa.host import needs
from lesa.learn import metrics, perceptual
from lesa.learn.calls import Call
from lesa.learn.counted import Recording
from lesa.learn.references import References
from lesa.predictors.calibration import UNITS, Quality
from lesa.predictors.curve import Tried, check_measured
from lesa.rows.forecasters import Forecaster
from lesa.rows.schedule import Schedule

Metric = Callable[[np.ndarray, np.ndarray], float]
BEST = dict(psnr=metrics.MOST_PSNR, ssim=1.0, lpips=0.0, drift=-metrics.MOST_DRIFT)
"""What a run has that is its reference run."""


def check_possible(target: Quality) -> None:
    """Raise ValueError if no run can keep a target."""
    best = BEST[target.measure]
    if not target.is_kept_by(best):
        unit = UNITS[target.measure]
        raise ValueError(
            f"{target.measure} is {best:g}{unit} where nothing differs, got the target {target}; ask for less."
        )


class Checks:
    """Runs of some calls, each measured against its reference run: by the last latents and, with `pictures`, by what is
    drawn, where these are pictures or clips; by SSIM and LPIPS where their packages, and the weights of the latter, are
    on this machine, and all pictures are large enough: else `left_out` says why not. Of the rows that ended nearest
    since `forget`, the `worst` pair is kept: what was drawn, and the reference's.

    Raises: as `References` does.
    """

    def __init__(
        self,
        pipe: Any,
        calls: Sequence[Call],
        seeds: Sequence[int],
        call: Mapping[str, Any],
        *,
        pictures: bool,
        **how: Any,
    ):
        self._known = References(pipe, calls, seeds, call, pictures=pictures, **how)
        self._wanted = self._known.pictures or None
        self.worst: dict[Tried, tuple[np.ndarray, np.ndarray]] = {}
        self._metrics: dict[str, Metric] = {"psnr": metrics.psnr}
        self.left_out = " ".join(self._left_out(min(min(x.shape[-3:-1]) for x in self._wanted))) if self._wanted else ""

    def _left_out(self, side: int) -> Iterator[str]:
        """Measure by what can be had for pictures of so many pixels a side or more, and say what cannot and why."""
        others = {
            "ssim": ("SSIM", metrics.WINDOW, needs.lacking("comparison"), lambda: metrics.ssim),
            "lpips": ("LPIPS", perceptual.SIDE, perceptual.lacking(), perceptual.lpips),
        }
        for measure, (name, least, without, metric) in others.items():
            if side < least:
                yield f"{name} is left out: it needs pictures of {least} pixels a side or more, got {side}."
            elif without:
                yield f"{name} is left out: it needs {without}."
            else:
                self._metrics[measure] = metric()

    def check(self, target: Quality) -> None:
        """Raise ValueError, with the reason, if the calls are not measured by what a target is of."""
        try:
            check_measured(target, [*(self._metrics if self._wanted else ()), "drift"])
        except ValueError as error:
            raise ValueError(f"{error} {self.left_out}".strip()) from None

    def run(self, rows: str, forecaster: Forecaster, schedule: Schedule) -> Tried:
        """Run all calls with a forecaster, named `rows`, on a schedule, and say what that gave.

        Raises: as `lesa.accelerate` does.
        """
        measured = self._known.measure(forecaster, schedule)
        return self._tried(rows, str(schedule), measured.drifts, measured.pictures)

    def compare(self, rows: str, schedule: str, runs: Sequence[Recording], drawn: list[np.ndarray] | None) -> Tried:
        """Say what other runs of the same calls gave: where they ended, and what they drew."""
        return self._tried(rows, schedule, self._known.drifts(runs), drawn)

    def _tried(self, rows: str, schedule: str, drifts: Sequence[float], drawn: list[np.ndarray] | None) -> Tried:
        pairs = list(zip(drawn, self._wanted, strict=True)) if drawn and self._wanted else []
        found = {name: tuple(metric(*pair) for pair in pairs) for name, metric in self._metrics.items()}
        tried = Tried(rows, schedule, tuple(drifts), **found)
        least = min((fmean(one.drift) for one in self.worst), default=math.inf)
        if pairs and fmean(drifts) < least:
            self.worst = {tried: pairs[min(range(len(pairs)), key=lambda k: tried.psnr[k])]}
        return tried

    def forget(self) -> None:
        """Let go of the worst pictures: other rows are tried from here on."""
        self.worst = {}

    @property
    def transformer_runs(self) -> int:
        """Of one picture and stream, reference runs included."""
        return self._known.counts.total
