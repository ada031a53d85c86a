"""Examine what is installed, and what will work with a pipeline: a call of it goes up to its first step, where all is
known that forecasts depend on, and is ended there."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from lesa.host import needs
from lesa.host.choice import Chosen, FirstStep, Terms
from lesa.host.clock import PipelineClock
from lesa.host.denoiser import compiled_from, denoisers_of
from lesa.host.executor import Executor
from lesa.host.facts import Facts
from lesa.host.found import Found, NoneFits
from lesa.host.intercept import unmarked
from lesa.host.runtime import Run, check_free
from lesa.host.tap import tap_of
from lesa.predictors import Predictor
from lesa.predictors.calibration import Calibration
from lesa.predictors.shelf import Shelf
from lesa.rows import sampler as samplers
from lesa.rows.row import Storage

Mark = Literal["yes", "no", ""]
PACKAGES = ("lesa-cache", "torch", "diffusers", "transformers", "huggingface_hub", "safetensors", "numpy")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: what about, whether it works ('' where there is nothing to work), and in words."""

    topic: str
    mark: Mark
    words: str

    def __str__(self) -> str:
        return f"{self.topic:<12} {self.mark:<3}  {self.words}"


@dataclass(frozen=True)
class Examination:
    """What was found of a pipeline; prints as a table.

    `accelerates` tells whether a call like the one that was tried runs with `lesa.accelerate(pipe)` as it is; `facts`
    are those of that call, None where it did not come to its first step.
    """

    findings: tuple[Finding, ...]
    accelerates: bool
    facts: Facts | None = None

    def __str__(self) -> str:
        return "\n".join(map(str, self.findings))


def installed() -> list[Finding]:
    """Return what is here without any pipeline: versions, device, extras, and where calibrations are kept."""
    found = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    return [
        Finding("versions", "", f"{found}, Python {platform.python_version()}"),
        Finding("device", "", _device()),
        *(_extra(name, lacking) for name, lacking in needs.extras().items()),
        _shelf(),
    ]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _device() -> str:
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
        return f"cuda: {', '.join(names)}; commands take the CPU unless --device cuda says otherwise"
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        return f"{kind}; commands take the CPU unless --device {kind} says otherwise"
    return f"the CPU with {torch.get_num_threads()} threads, no accelerator"


def _extra(name: str, lacking: str) -> Finding:
    return Finding(f"extra {name}", "no" if lacking else "yes", f"needs {lacking}" if lacking else "all there")


def _shelf() -> Finding:
    """Say where calibrations are kept, how many, and whether more can be."""
    shelf = Shelf()
    there = next(place for place in (shelf.folder, *shelf.folder.absolute().parents) if place.exists())
    may = os.access(there, os.W_OK | os.X_OK) and there.is_dir()
    with warnings.catch_warnings(record=True) as damaged:
        warnings.simplefilter("always")
        kept = len(shelf.all()) if may else 0
    words = f"{shelf.folder}, {kept} calibration{'s' * (kept != 1)}"
    words += f", {len(damaged)} cannot be read ({damaged[0].message})" if damaged else ""
    return Finding("shelf", "yes" if may else "no", words if may else f"{there} cannot be written to; set LESA_HOME.")


def examine(pipe: Any, *args: Any, **call: Any) -> Examination:
    """Call a pipeline with these arguments up to its first step, and say what will work with it and what will not.

    One run of its denoisers is all that it takes, whatever they are trained for. The pipeline stays as it was.

        print(lesa.examine(pipe, "a red apple"))

    Calibrations and predictors are named, each with the reason why it fits such a call or not.
    """
    findings = [Finding("pipeline", "", f"a {type(pipe).__name__} of {_where(pipe)}")]
    try:
        names = denoisers_of(pipe)
        check_free(pipe, names)
        look = _Look(pipe, names, Terms())
        run = Run(pipe, names, Executor(PipelineClock(pipe), look, Storage.parse("model"), {}), lambda *_: None, False)
    except ValueError as error:
        return Examination((*findings, Finding("denoisers", "no", str(error))), False)
    findings += _denoisers(pipe, names)
    stopped = "its loop steps no scheduler that lesa listens to; accelerate its denoiser in a loop of your own (grid=)"
    with run, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pipe(*args, **call)
        except _Seen:
            return Examination((*findings, *look.findings), look.accelerates, look.facts)
        except Exception as error:  # of anyone's pipeline
            stopped = f"the call fails before its first step is done: {type(error).__name__}: {error}"
    return Examination((*findings, Finding("call", "no", stopped)), False)


def _where(pipe: Any) -> str:
    named = str(getattr(pipe, "name_or_path", None) or "no file")
    return str(Path(named)) if Path(named).exists() else named


def _denoisers(pipe: Any, names: Sequence[str]) -> Iterator[Finding]:
    """Say of each denoiser what it is, and where it can be tapped besides its output, which always works."""
    for name in names:
        module = getattr(pipe, name)
        inner = compiled_from(module)
        parameters = sum(one.numel() for one in inner.parameters())
        dtype = str(next((one.dtype for one in inner.parameters()), "no dtype")).removeprefix("torch.")
        compiled = ", compiled" if inner is not module else ""
        yield Finding(name, "", f"a {type(inner).__name__}, {parameters / 1e6:.4g} M parameters of {dtype}{compiled}")
        yield Finding("tap", "yes", "output: nothing of it runs on a skipped step")
        try:
            tap = tap_of(inner, "feature")
            words = " and ".join(tap.modules) or "the output"
            inside = bool(compiled and tap.modules)
            yield Finding("tap", "no" if inside else "yes", f"feature: what enters {words}, as in the paper")
        except ValueError as error:
            yield Finding("tap", "no", f"feature: {error}")


class _Seen(Exception):
    """Ends the call of a pipeline where all is known of it."""


class _Look(Found):
    """Chooses as `lesa.accelerate` does, writes down what and why, and ends the call."""

    findings: tuple[Finding, ...] = ()
    accelerates = False
    facts: Facts | None = None

    def decide(self, first: FirstStep) -> Chosen:
        """Write down what is known at a run's first step.

        Raises: _Seen, in any case.
        """
        self.facts = first.facts
        self.findings = (*_of_run(first.facts), _numbers(first), *self._choices(first))
        raise _Seen

    def _choices(self, first: FirstStep) -> Iterator[Finding]:
        """Say what is taken, and of each calibration and predictor that is not why."""
        calibrations = {one.name: partial(self._of_calibration, one, first) for one in self._calibrations}
        yield from _judged(calibrations, "calibration ")
        yield from _judged({repr(one): partial(self._at_this_tap, one, first) for one in self._predictors()})
        try:
            chosen = super().decide(first)
            plan = chosen.plan(first.facts.streams[0], first.start, first.start, first.times)
            of_data = bool(plan.rows) and chosen.data is not None and chosen.data.wanted(*first.step)
            first.judge(chosen)
        except NoneFits as error:  # the lines before say why
            yield Finding("accelerate", "no", f"nothing that is there fits such a call. {error.advice}")
            return
        except ValueError as error:
            yield Finding("accelerate", "no", str(error))
            return
        self.accelerates = True
        words = f"takes {chosen.label}, {len(plan.full)} full of {len(first.times) - 1 - first.start} steps"
        yield Finding("accelerate", "yes", words + ", forecasting the data prediction" * of_data)

    def _of_calibration(self, one: Calibration, first: FirstStep, reasons: list[tuple[int, str]]) -> Chosen | None:
        """Choose a calibration if it fits, or its rows can be carried to these times; else add the reason why not."""
        choose = self._carried if self._is_elsewhere(one, first) else self._calibrated
        return choose(one, first, reasons)

    def _at_this_tap(self, one: Predictor, first: FirstStep, reasons: list[tuple[int, str]]) -> Chosen | None:
        """Choose a predictor if it fits and is at the tap of what is taken; else add the reason why not."""
        if one.origin.tap != self._tap and self._may(one, first.times):
            reasons.append(
                (1, "at another tap than what is taken; name it to run it: lesa.accelerate(pipe, predictor)")
            )
            return None
        return self._trained(one, first, reasons)


def _judged(known: Mapping[str, Callable[[list[tuple[int, str]]], Chosen | None]], kind: str = "") -> Iterator[Finding]:
    """Say of all of a kind that is there whether it fits; what does not for the same reason in one line."""
    reasons: dict[str, list[str]] = {}
    for name, choose in known.items():
        why: list[tuple[int, str]] = []
        if choose(why) is not None:
            yield Finding("there", "yes", f"{kind}{name} fits")
        else:
            reasons.setdefault("; ".join(reason for _, reason in why), []).append(name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        named = "" if names[0] in reason else f"{names[0]}{more}: "
        yield Finding("there", "no", f"{kind}{named}{reason}")


def _of_run(facts: Facts) -> Iterator[Finding]:
    """Say what the run is like."""
    begins = f" from step {facts.start} on" if facts.start else ""
    noise = " and noise" if facts.noise else ""
    words = f"{facts.steps} steps{begins}, latents {facts.shape}, a {facts.sampler}{noise}"
    yield Finding("run", "", words)
    guidance = [str(facts.guidance)] * (facts.guidance is not None) + [f"{x:g} as an input" for x in facts.embedded]
    yield Finding("streams", "", f"{', '.join(facts.streams)}; guidance {', '.join(guidance) or 'none'}")


def _numbers(first: FirstStep) -> Finding:
    """Say whether the sampler is known as numbers, which calibrating, planning and training need."""
    (scheduler, args, kwargs), topic = first.step, "sampler"
    try:
        scheduler = unmarked(scheduler)
        found = samplers.of(scheduler, **samplers.bind(scheduler, *args, **kwargs))
    except ValueError as error:
        return Finding(topic, "no", f"not known as numbers, so no calibrating, planning and training: {error}")
    if found.injects_noise:
        words = "it adds noise: rows of its data predictions are calibrated, but not planned or trained"
        return Finding(topic, "yes", words)
    return Finding(topic, "yes", "known as numbers: calibrate, plan and train work")
