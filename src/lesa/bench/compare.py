"""Compare ways to run a pipeline on the same prompts and seeds: line them up, plan, measure, keep the records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lesa.bench import benchmark, bound, methods, peers, recogniser, records, samplers
from lesa.bench.lines import Pair
from lesa.bench.methods import Method
from lesa.bench.named import BUDGETS, SCHEDULES
from lesa.bench.planned import keep_planned, planned
from lesa.bench.records import Comparison, Log
from lesa.bench.scores import Score
from lesa.host import needs
from lesa.host.conditions import adds_noise
from lesa.host.intercept import unmarked
from lesa.host.pipelines import arguments_of, source_of, steps_of
from lesa.host.tap import OUTPUT
from lesa.learn import said
from lesa.learn.call_files import prompts_of, read_prompts
from lesa.learn.calls import Call
from lesa.learn.plan import FEW_STEPS, finder, planner_of, shipped_prompts
from lesa.learn.planning import Planner
from lesa.learn.ranks import ALONE, Ranks
from lesa.learn.trajectory import Store
from lesa.predictors import ContinuousLESA, Predictor
from lesa.predictors.base import CONFIG_FILE
from lesa.predictors.fingerprint import pipeline_fingerprint
from lesa.predictors.shipped import SHIPPED_FOLDER
from lesa.rows.forecasters import Forecaster
from lesa.rows.grid import validate
from lesa.rows.schedule import Schedule

CHOSEN_ON = 8
"""On how many training prompts the times of better samplers are chosen."""


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, on what and how.

    `methods` alone, if there are any (of `lesa.bench.methods`); else those without training and the `predictors` (by
    default those shipped with the model) on each of the `schedules` and on those planned for the `budgets`, numbers of
    full steps; `usual` are the budgets of long runs if none are named. `calibrated` are predictors of calibrations, on
    the schedules that they were solved for, measured beside them. It is planned on the runs of `data`, or on new
    ones of prompts that the model comes with. `peers` adds other projects' caches by their names (or 'all'), `fine` a
    run of so many steps that PSNR is measured against too, `bound` the bound of each schedule. `only` keeps the methods
    of these names; `rows` are compared in place of the usual ones without training, by their names in tables.

    Pictures are drawn `batch_size` at a time; the first `timed` are timed at batch 1. `scores` are measured besides
    PSNR and SSIM, and `lacking` says of others why not (see `lesa.bench.scores.load`). `anew` removes the folder's
    records first, of the same setting. A `demo` leaves out reuse, rivals and variants; its records are no benchmark's.

    Raises: ValueError if a number is out of range.
    """

    methods: Sequence[Method] = ()
    schedules: Sequence[Schedule] | None = None
    budgets: Sequence[int] | None = None
    usual: Sequence[int] = BUDGETS
    predictors: Sequence[Predictor] | None = None
    calibrated: Sequence[Predictor] = ()
    data: Store | None = None
    peers: Sequence[str] = ()
    fine: int | None = None
    bound: bool = True
    only: Sequence[str] | None = None
    rows: Mapping[str, Forecaster] | None = None
    batch_size: int = 16
    timed: int = 10
    scores: Mapping[str, Score] = field(default_factory=dict)
    lacking: Mapping[str, str] = field(default_factory=dict)
    anew: bool = False
    demo: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.timed < 0 or (self.fine is not None and self.fine < 1):
            raise ValueError(
                f"batch_size= and fine= are at least 1 and timed= 0, got {self.batch_size}, {self.fine} and "
                f"{self.timed}; raise them."
            )


@said.once()
def compare(
    pipe: Any,
    prompts: Sequence[Call],
    folder: str | Path | None = None,
    options: CompareOptions = CompareOptions(),
    *,
    seeds: Sequence[int] | None = None,
    at: Ranks = ALONE,
) -> Comparison:
    """Run methods on the same prompts, the k-th with seed k, and measure them against the run with every step full.

    With a `folder` its records are kept there, and what they hold is not measured again. Several processes (`at`) share
    the pictures.

        comparison = lesa.compare(pipe, prompts, "out", lesa.CompareOptions(budgets=[8]))
        print(lesa.bench.report.summary(comparison))

    Raises: ValueError as `lesa.bench.benchmark.compare` and `lesa.bench.records.writing` do; ImportError without
        scikit-image (the extra `bench`).
    """
    needs.check("a comparison", "comparison")
    texts = prompts_of(prompts)
    seeds = range(len(texts)) if seeds is None else seeds
    setting = setting_of(pipe, benchmark.pair_up(texts, seeds), options)
    if folder is not None and options.anew and at.leads:
        records.clear(folder, setting)
    at.wait()
    with records.writing(folder, setting, at.rank) if folder else nullcontext(Log(setting=setting)) as log:
        facts: dict[str, Any] = dict(batch_size=options.batch_size, scores=options.scores)
        facts["recognise"] = recogniser.recogniser(source_of(pipe).model)
        why = recogniser.left_out(source_of(pipe).model)
        lacking = {**options.lacking, **({recogniser.PROMPTED: why} if why else {})}
        fine = methods.more_steps(options.fine) if options.fine else None
        more = dict(timed=options.timed, lacking=lacking, fine=fine, log=log, at=at)
        benchmark.compare(pipe, line_up(pipe, options, folder, at), texts, seeds, **more, **facts)
        if options.bound and at.leads and bound.fits(pipe):
            bound.add_bounds(log, pipe, texts, seeds, _schedules(pipe, options), **facts)
        return log.comparison


def setting_of(pipe: Any, pairs: Sequence[Pair], options: CompareOptions) -> dict[str, Any]:
    """Return what all records of a run have in common: enough to draw their pictures again.

    A demo begins its records anew each time, and so it says that they are a demo's: it never removes a benchmark's.
    """
    source = source_of(pipe)
    return {
        "model": source.model,
        "lora": source.lora,
        "scheduler": source.scheduler,
        "pipeline": type(pipe).__name__,
        "weights": pipeline_fingerprint(pipe),
        "call": {**arguments_of(pipe), "num_inference_steps": _steps(pipe)},
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "device": source.device,
        "batch_size": options.batch_size,
        "pairs": pairs,
        **({"command": "demo"} if options.demo else {}),
    }


def line_up(pipe: Any, options: CompareOptions, folder: str | Path | None = None, at: Ranks = ALONE) -> list[Method]:
    """Line up the methods asked for; of several processes the first plans, and the others read what it planned."""
    if options.methods:
        return list(options.methods)
    predictors = shipped(pipe, not options.demo) if options.predictors is None else options.predictors
    predictors = [*predictors, *options.calibrated]
    more: Any = dict(reuse=not options.demo, rivals=not options.demo, rows=options.rows, usual=_usual(pipe))
    lined_up = methods.line_up(_steps(pipe), _schedules(pipe, options), predictors, **more)
    if _budgets(pipe, options):
        if not at.leads:
            at.wait()
        known = {method.key for method in lined_up}
        lined_up += [one for one in _planned(pipe, options, predictors, folder) if one.key not in known]
        if at.leads:
            at.wait()
    lined_up += _left_out(pipe, options, lined_up)
    if options.peers:
        lined_up += peers.line_up(_peers(options), _steps(pipe), _prompt(pipe))
    return _only(lined_up, options.only)


def _usual(pipe: Any) -> str:
    """Return the tap of rows without training: the output where the sampler adds noise.

    The data prediction, which does not jump with the noise, is forecast there alone.
    """
    scheduler, x = unmarked(pipe.scheduler), torch.zeros(1, 1, 2, 2)
    shifted = {"mu": 1.0} if getattr(scheduler, "config", {}).get("use_dynamic_shifting") else {}  # whatever the size
    with suppress(ValueError):  # of schedulers that want to know more before they set their times
        scheduler.set_timesteps(_steps(pipe), **shifted)
        if adds_noise(scheduler, x, scheduler.timesteps[0], x):
            return OUTPUT
    return methods.FEATURE


def _peers(options: CompareOptions) -> list[str]:
    return list(peers.FAMILIES) if list(options.peers) == ["all"] else list(options.peers)


def _prompt(pipe: Any) -> str:
    """Return a training prompt, for peers that calibrate themselves."""
    return read_prompts(Path(source_of(pipe).model) / "prompts" / "train.txt")[0]


def _left_out(pipe: Any, options: CompareOptions, lined_up: Sequence[Method]) -> list[Method]:
    """Line up predictors that were named and are on none of the schedules so far: on their own, with rows without
    training.

    Raises: ValueError if one is for runs of another length.
    """
    there, known = {method.recipe.get("predictor") for method in lined_up}, {method.key for method in lined_up}
    found: list[Method] = []
    for one in (*(options.predictors or ()), *options.calibrated):
        if one.digest() in there or isinstance(one, ContinuousLESA):
            continue
        if len(one.grid) - 1 != _steps(pipe):
            raise ValueError(
                f"a predictor is compared in runs as it was trained for, of {len(one.grid) - 1} steps, got runs of "
                f"{_steps(pipe)} for {one!r}; name those steps (num_inference_steps), or leave it out."
            )
        more: Any = dict(reuse=not options.demo, rivals=not options.demo, rows=options.rows, usual=_usual(pipe))
        found += methods.line_up(_steps(pipe), [one.schedule], [one], **more)
    return [method for method in {method.key: method for method in found}.values() if method.key not in known]


def shipped(pipe: Any, variants: bool = True) -> list[Predictor]:
    """Load the predictors shipped with a model; with the `variants` in their folders, or not."""
    places = [f"{SHIPPED_FOLDER}/*/{CONFIG_FILE}"] + [f"{SHIPPED_FOLDER}/*/*/{CONFIG_FILE}"] * variants
    found = [path.parent for place in places for path in source_of(pipe).home.glob(place)]
    return [Predictor.from_pretrained(path) for path in sorted(found) if path.name != "rounds"]


def verify(
    pipe: Any,
    forecaster: Forecaster,
    schedules: Sequence[Schedule],
    prompts: Sequence[Call],
    place: str = methods.FEATURE,
) -> Comparison:
    """Draw prompts on planned schedules, and with as few steps: recorded runs do not drift, these do.

    Raises: as `compare` does.
    """
    lined_up = [methods.forecast(repr(forecaster), forecaster, schedule, place) for schedule in schedules]
    lined_up += [methods.fewer_steps(len(schedule.full_steps(_steps(pipe)))) for schedule in schedules]
    return compare(pipe, prompts, None, CompareOptions(lined_up, timed=0, bound=False))


def _planned(
    pipe: Any, options: CompareOptions, predictors: Sequence[Predictor], folder: str | Path | None
) -> list[Method]:
    grid, plan = _planning(pipe, options.data, folder)
    more: Any = dict(reuse=not options.demo, rivals=not options.demo, rows=options.rows, usual=_usual(pipe))
    lined_up = methods.line_up_planned(_budgets(pipe, options), grid, plan, predictors, **more, only=options.only)
    wanted = options.only is None or not set(options.only).isdisjoint(samplers.KINDS)
    if wanted and not options.demo and options.rows is None and samplers.fits(pipe):

        def at_output(forecaster: Forecaster, budget: int) -> Schedule:
            return plan(forecaster, budget, OUTPUT)

        lined_up += samplers.line_up(pipe, grid, _budgets(pipe, options), at_output, _training_pairs(pipe))
    if options.peers:
        which = _peers(options), _steps(pipe), _prompt(pipe), _budgets(pipe, options)
        lined_up += peers.line_up_planned(*which, plan, options.only)
    return lined_up


def _training_pairs(pipe: Any) -> list[Pair]:
    """Return some prompts that are none of those measured, none if the model comes without."""
    with suppress(FileNotFoundError):
        return [Pair(prompt, seed) for seed, prompt in enumerate(shipped_prompts(pipe)[:CHOSEN_ON])]
    return []


def _planning(
    pipe: Any, data: Store | None, folder: str | Path | None
) -> tuple[Tensor, Callable[[Forecaster, int, str], Schedule]]:
    """Return the grid, and the call that plans a forecaster's schedule at a tap; a folder keeps what was planned."""
    known = planned(folder) if folder else {}

    @cache
    def planner(place: str) -> Planner:  # it records runs, once
        return planner_of(pipe, data, place)

    def plan(forecaster: Forecaster, budget: int, place: str) -> Schedule:
        name = f"{forecaster!r} {budget} {place}"
        if name not in known:
            there = planner(place)
            find = finder(there, refine=there.guided)  # under guidance algebra alone errs; all are run later anyway
            known[name] = str(find(forecaster, budget))
            if folder:
                keep_planned(folder, known)
        return Schedule.parse(known[name])

    if "grid" not in known:
        known["grid"] = planner(methods.FEATURE).grid.tolist()
    return validate(known["grid"]), plan


def _only(lined_up: Sequence[Method], names: Sequence[str] | None) -> list[Method]:
    """Keep the methods of these names.

    Raises: ValueError if there is none of one.
    """
    known = dict.fromkeys(method.name for method in lined_up)
    if unknown := set(names or ()) - set(known):
        raise ValueError(f"the methods are {', '.join(known)}, got {unknown}.")
    return [method for method in lined_up if not names or method.name in names]


def _schedules(pipe: Any, options: CompareOptions) -> list[Schedule]:
    few = FEW_STEPS.get(_steps(pipe))
    usual = [Schedule.parse(text) for text in ([few] if few else SCHEDULES)]
    return usual if options.schedules is None else list(options.schedules)


def _budgets(pipe: Any, options: CompareOptions) -> list[int]:
    steps = _steps(pipe)
    usual = [steps // 2] if steps in FEW_STEPS else options.usual
    return list(usual if options.budgets is None else options.budgets)


def _steps(pipe: Any) -> int:
    steps = steps_of(pipe)
    if steps is None:
        raise ValueError(f"a {type(pipe).__name__} says how many steps it runs, got none; set num_inference_steps.")
    return steps
