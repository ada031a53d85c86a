"""Run methods against the reference run: pictures in batches, time and cost at batch 1."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lesa.bench import records as kept
from lesa.bench.cost import Memory, Watch, flops, machine
from lesa.bench.recogniser import Recogniser
from lesa.bench.records import DRIFT, TRAINING, Comparison, Cost, Failure, Key, Line, Log, Pair, Record, Start, Time
from lesa.bench.scores import Score
from lesa.host import needs
from lesa.host.head import from_tokens
from lesa.host.pipelines import for_each, pictures_of
from lesa.host.runtime import Run, accelerate
from lesa.host.tap import place_of
from lesa.learn import metrics, ranks
from lesa.learn.collect import record
from lesa.learn.ranks import Ranks
from lesa.predictors import LESA, ContinuousLESA, Predictor
from lesa.rows.forecasters import Forecaster, Lagrange, Reuse, Taylor
from lesa.rows.schedule import Schedule

PAIRS_A_TURN = 2
FEATURE = "feature"
"""The usual tap of a class of transformers (see `lesa.accelerate`)."""
MOTION = "motion"
"""The score of clips besides those that are asked for: `metrics.motion_psnr`, in dB."""


@dataclass(frozen=True)
class Method:
    """One way to run a pipeline.

    `name` and `schedule` name it in tables, `call` holds the arguments of the pipeline's call that it changes, and
    `switch` turns it on for a pipeline and off again. What makes a picture in fewer full steps can be one. `recipe` is
    what it is made of, as JSON: records keep it, `rebuild` reads it. If it is `optional`, it may fail: its error is
    listed, and the others go on. If it is `partial`, it may skip parts of a step, and its full steps are a share of
    FLOPs; if it goes `alone`, what it does depends on the whole batch, and each pair is drawn in a call of its own.
    """

    name: str
    schedule: str
    call: Mapping[str, Any] = field(default_factory=dict)
    switch: Callable[[Any], AbstractContextManager[Any]] = nullcontext
    recipe: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False
    partial: bool = False
    alone: bool = False

    @property
    def key(self) -> Key:
        """What tells it from other methods."""
        return self.name, self.schedule

    def entry(self) -> dict[str, Any]:
        """Return what records say of it."""
        entry = {"name": self.name, "schedule": self.schedule, "call": dict(self.call), "recipe": dict(self.recipe)}
        return json.loads(json.dumps(entry))


REFERENCE = Method(*kept.REFERENCE)
"""The run that all others are measured against."""


BOUND = "bound (output tap)"
"""No method: `bound_error` as pictures. Forecasts of what enters the final norm can be above it."""


def fewer_steps(steps: int) -> Method:
    """The same sampler with fewer steps, all of them full."""
    return Method("fewer steps", f"{steps} steps", call={"num_inference_steps": steps}, recipe={"steps": steps})


def forecast(name: str, forecaster: Forecaster, schedule: Schedule, place: str = FEATURE) -> Method:
    """The pipeline accelerated by a forecaster on a schedule; a predictor taps where it was trained, others here."""
    recipe: dict[str, Any] = {"forecaster": repr(forecaster), **({"tap": place} if place != FEATURE else {})}
    tap = None if isinstance(forecaster, Predictor) else place
    if isinstance(forecaster, Predictor):
        took = {name: forecaster.origin.training[name] for name in TRAINING if name in forecaster.origin.training}
        recipe = {"predictor": forecaster.digest(), **took}
    return Method(
        name,
        str(schedule),
        switch=lambda pipe: accelerate(pipe, forecaster, schedule=schedule, tap=tap),
        recipe=recipe,
    )


def rebuild(entry: Mapping[str, Any], predictors: Sequence[Predictor] = ()) -> Method:
    """Make a method again from what records say of it; a trained one from the predictors given.

    Raises: LookupError if it is made of something else, or of a predictor that is not given.
    """
    recipe, schedule = entry["recipe"], entry["schedule"]
    if (entry["name"], schedule) == REFERENCE.key:
        return REFERENCE
    if "steps" in recipe:
        return replace(fewer_steps(recipe["steps"]), name=entry["name"])
    plain = {repr(one): one for one in untrained(reuse=True, lagrange=True).values()}
    forecaster: Any = plain.get(recipe.get("forecaster"))
    if "predictor" in recipe:
        forecaster = next((one for one in predictors if one.digest() == recipe["predictor"]), None)
    if forecaster is None:
        raise LookupError(f"{entry['name']} is made of {recipe}, which is not at hand; name the predictor's folder.")
    return forecast(entry["name"], forecaster, Schedule.parse(schedule), recipe.get("tap", FEATURE))


def label(predictor: Predictor) -> str:
    """Name a predictor in tables: its method, and in brackets what sets it apart from the usual one of its kind."""
    training, place = predictor.origin.training, _place(predictor)
    apart = [] if place == FEATURE else [f"{place} tap"]
    apart += ["with forecasts"] if isinstance(predictor, LESA) and predictor.remembers_forecasts else []
    apart += ["phase 1"] if training.get("phase") == "ground-truth" else []
    apart += {"features": ["feature loss"], "steps": ["per step"]}.get(training.get("loss", "latents"), [])
    return predictor.method.upper() + (f" ({', '.join(apart)})" if apart else "")


def _place(predictor: Predictor) -> str:
    return place_of(predictor.origin.transformer, predictor.origin.tap)


def untrained(reuse: bool, lagrange: bool = False, place: str = FEATURE) -> dict[str, Forecaster]:
    """Return the forecasters that need no training, by their names in tables, for a tap."""
    plain: dict[str, Forecaster] = {"reuse": Reuse()} if reuse else {}
    plain |= {f"Taylor-{order} (our tap)": Taylor(order) for order in (1, 2)}
    plain |= {f"Lagrange-{degree}": Lagrange(degree) for degree in (1, 2, 3)} if lagrange else {}
    if place == FEATURE:
        return plain
    return {f"{name.removesuffix(' (our tap)')} ({place} tap)": forecaster for name, forecaster in plain.items()}


def line_up_planned(
    budgets: Sequence[int],
    grid: Tensor,
    plan: Callable[[Forecaster, int, str], Schedule],
    predictors: Sequence[Predictor] = (),
    *,
    reuse: bool = True,
    only: Collection[str] | None = None,
) -> list[Method]:
    """Line up every method on the schedule that is planned for it, budget by budget, or those of these names only.

    `plan` finds the schedule of a forecaster that needs no training, at a tap; a predictor has its own. At each tap of
    a predictor there are methods without training too.
    """

    def fits(predictor: Predictor, budget: int) -> bool:
        bound = not isinstance(predictor, ContinuousLESA)
        if bound and (predictor.schedule.rule != "at" or len(predictor.grid) != len(grid)):
            return False
        return predictor.is_for(budget=budget)

    methods: list[Method] = []
    for budget in budgets:
        methods.append(fewer_steps(budget))
        chosen = [one for one in predictors if fits(one, budget)]
        for place in _places(chosen):
            plain = untrained(reuse, lagrange=True, place=place)
            plain = {name: one for name, one in plain.items() if only is None or name in only}
            methods += [forecast(name, one, plan(one, budget, place), place) for name, one in plain.items()]
        methods += [forecast(label(one), one, one.schedule_for(grid, budget)) for one in chosen]
    return methods


def line_up(
    steps: int, schedules: Sequence[Schedule], predictors: Sequence[Predictor] = (), *, reuse: bool = False
) -> list[Method]:
    """Line up the methods for runs of `steps` steps, schedule by schedule: those without training, then predictors.

    Predictors for other schedules, or for runs of other lengths, are left out. At each tap of a predictor there are
    methods without training too.
    """

    def fits(predictor: Predictor, schedule: Schedule) -> bool:
        bound = not isinstance(predictor, ContinuousLESA)
        return bound and predictor.schedule == schedule and len(predictor.grid) - 1 == steps

    methods: list[Method] = []
    for schedule in schedules:
        fewer = fewer_steps(len(schedule.full_steps(steps)))
        methods += [] if fewer in methods else [fewer]
        chosen = [one for one in predictors if fits(one, schedule)]
        for place in _places(chosen):
            plain = untrained(reuse, place=place)
            methods += [forecast(name, forecaster, schedule, place) for name, forecaster in plain.items()]
        methods += [forecast(label(one), one, schedule) for one in chosen]
    return methods


def _places(predictors: Sequence[Predictor]) -> list[str]:
    """Return the taps of some predictors, the usual one before them."""
    return list(dict.fromkeys([FEATURE, *map(_place, predictors)]))


def more_steps(steps: int) -> Method:
    """The same sampler with more steps: how much of a method's error is the reference run's own."""
    return replace(fewer_steps(steps), name="more steps")


def compare(
    pipe: Any,
    methods: Sequence[Method],
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 16,
    timed: int = 6,
    shown: int = 8,
    recognise: Recogniser | None = None,
    scores: Mapping[str, Score] | None = None,
    lacking: Mapping[str, str] | None = None,
    fine: Method | None = None,
    log: Log | None = None,
    at: Ranks = ranks.ALONE,
) -> Comparison:
    """Run every method on the same prompts, each with the seed beside it, against the reference run.

    Pictures are drawn `batch_size` at a time. The first `timed` pairs are run once more at batch 1 for the times, and
    the pictures of the first `shown` are kept. `recognise` tells which pictures show what their prompts name; `scores`
    are those to be measured, by their names in tables, and `lacking` those that cannot be; PSNR is measured against
    `fine`, a run of more steps, too. What a `log` holds is not measured again. Several processes (`at`) share the
    batches; the first of them measures time and cost, alone.

    Raises: ValueError if there are no prompts, not one seed for each, a pair twice, two methods of one name and
        schedule, or a method that the log knows by another recipe; ImportError without scikit-image (the extra
        `bench`).
    """
    needs.check("a comparison", "comparison")
    pairs, methods = pair_up(prompts, seeds), [REFERENCE, *([fine] if fine else []), *methods]
    log = log or Log(setting={"pairs": pairs})
    _begin(log, methods, lacking or {})
    with tqdm(total=len(pairs) * len(methods), desc="pictures", unit="picture", disable=not at.leads) as bar:
        for number, batch in at.share(list(enumerate(batches(pairs, batch_size)))):
            done = partial(bar.update, len(batch) * at.count)
            _draw_all(pipe, methods, batch, log, recognise, scores or {}, fine, shown, number * batch_size, done)
    at.wait()
    log.refresh()
    if at.leads and timed:
        running = [method for method in methods if method.key in log.comparison.records and method is not fine]
        measure_costs(pipe, running, pairs[0], log)
        time_methods(pipe, running, pairs[:timed], log)
        log.refresh()
    return log.comparison


def _begin(log: Log, methods: Sequence[Method], lacking: Mapping[str, str]) -> None:
    """Start measuring methods: each is one of a kind, and the one that the log knows by its name."""
    keys = [method.key for method in methods]
    if len(set(keys)) < len(keys):
        raise ValueError(f"methods differ in name or schedule, and none is the reference run, got {keys[1:]}.")
    for method in methods:
        if method.key not in log.comparison.records:
            continue
        there, here = log.comparison.entry(method.key), method.entry()
        if there != here:
            raise ValueError(
                f"{method.name} on {method.schedule} was measured as {there}, got {here}; measure into another folder."
            )
    log.add(Start(machine(), tuple(method.entry() for method in methods), lacking))


def _draw_all(
    pipe: Any,
    methods: Sequence[Method],
    batch: Sequence[Pair],
    log: Log,
    recognise: Recogniser | None,
    scores: Mapping[str, Score],
    fine: Method | None,
    shown: int,
    first: int,
    done: Callable[[], Any],
) -> None:
    """Draw one batch, whose first pair has the number `first`, by each method that lacks a record of it.

    `done` is told of each method that has one.
    """
    lacking = [method for method in methods if not log.comparison.holds(method.key, batch)]
    for _ in range(len(methods) - len(lacking)):
        done()
    if not lacking:
        return
    reference = observe(pipe, REFERENCE, batch)
    known = {REFERENCE.key: reference}
    if fine:
        exact = known[fine.key] = observe(pipe, fine, batch)
        scores = {**scores, f"PSNR to {fine.schedule}": lambda _, pictures, __: _psnrs(pictures, exact.pictures)}

    def measure(method: Method) -> list[Record]:
        drawn = known.get(method.key) or observe(pipe, method, batch)
        for number, picture in enumerate(drawn.pictures[: max(0, shown - first)], start=first):
            log.keep(method.key, number, picture)
        scored = score(method.key, batch, drawn, reference, recognise, scores)
        return [one for one in scored if not log.comparison.holds(method.key, [one.pair])]  # a kill may tear a batch

    for method in lacking:
        _attempt(log, method, measure)
        done()


def _psnrs(pictures: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> list[float]:
    return [metrics.psnr(*pair) for pair in zip(pictures, references, strict=True)]


def _attempt(log: Log, method: Method, measure: Callable[[Method], Sequence[Line]]) -> None:
    """Measure a method; of one that may fail, list the error and go on."""
    try:
        lines = measure(method)
    except Exception as error:
        if not method.optional:
            raise
        lines = [Failure(*method.key, " ".join(f"{type(error).__name__}: {error}".split()))]
    log.add(*lines)


def pair_up(prompts: Sequence[str], seeds: Sequence[int]) -> list[Pair]:
    """Join prompts with their seeds.

    Raises: ValueError if there are none, not one seed for each prompt, or a pair twice.
    """
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"each prompt needs one seed, got {len(prompts)} prompts and {len(seeds)} seeds; give both.")
    pairs = [Pair(*pair) for pair in zip(prompts, seeds, strict=True)]
    if twice := sorted({pair for pair in pairs if pairs.count(pair) > 1}):
        raise ValueError(f"each pair of a prompt and a seed is drawn once, got {twice[0]} again; leave it out.")
    return pairs


def batches(pairs: Sequence[Pair], size: int) -> list[Sequence[Pair]]:
    """Cut pairs into batches of `size`, the last one shorter if need be."""
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]


class Drawn(NamedTuple):
    """What a method gave of some pairs: uint8 RGB pictures (H, W, 3), and what was seen of its steps (see `Watch`).

    FLOPs are those of a pair, and latents (pairs, ...) the last ones.
    """

    pictures: list[np.ndarray]
    latents: Tensor
    full: list[tuple[int, ...]]
    features: list[Tensor | None]
    times: list[float]
    flops: list[float]


def draw(pipe: Any, method: Method, pairs: Sequence[Pair]) -> tuple[list[np.ndarray], int]:
    """Draw pairs in one call: uint8 RGB pictures (H, W, 3) or clips (frames, H, W, 3), and how many steps were full."""
    drawn = observe(pipe, method, pairs)
    return drawn.pictures, len(drawn.full[0])


def observe(pipe: Any, method: Method, pairs: Sequence[Pair]) -> Drawn:
    """Draw pairs in one call if the method can, and see which of its steps were full and what passed the tap."""
    if method.alone and len(pairs) > 1:
        return _together([observe(pipe, method, [pair]) for pair in pairs])
    watch = Watch(pipe)
    with method.switch(pipe), watch.counting(), watch.counting_flops(), watch.recording():
        pictures = _pictures(pipe, pairs, **method.call, callback_on_step_end=watch.on_step_end)
        times = torch.as_tensor(pipe.scheduler.timesteps).tolist()
    full = () if method.partial else tuple(watch.full)
    flops = [watch.flops / len(pairs)] * len(pairs)
    assert watch.latents is not None
    return Drawn(pictures, watch.latents.cpu(), [full] * len(pairs), watch.features, times, flops)


def _together(drawn: Sequence[Drawn]) -> Drawn:
    """Put calls of one pair each together, as if they were one call."""
    pictures, full, flops = ([getattr(one, name)[0] for one in drawn] for name in ("pictures", "full", "flops"))
    features: list[Tensor | None] = []
    for of_step in zip(*(one.features for one in drawn), strict=True):
        passed = [feature for feature in of_step if feature is not None]
        features.append(torch.stack(passed, dim=1).flatten(0, 1) if len(passed) == len(drawn) else None)
    latents = torch.cat([one.latents for one in drawn])
    return Drawn(pictures, latents, full, features, drawn[0].times, flops)


def _pictures(pipe: Any, pairs: Sequence[Pair], **call: Any) -> list[np.ndarray]:
    generators = [torch.Generator().manual_seed(pair.seed) for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    drawn = pictures_of(pipe(prompt=prompts, generator=generators, output_type="pil", **for_each(prompts, call)))
    return [np.stack([_pixels(frame) for frame in one]) if isinstance(one, list) else _pixels(one) for one in drawn]


def _pixels(image: Any) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def score(
    key: Key,
    pairs: Sequence[Pair],
    drawn: Drawn,
    reference: Drawn,
    recognise: Recogniser | None = None,
    scores: Mapping[str, Score] | None = None,
) -> list[Record]:
    """Measure what a method drew against what the reference run did."""
    prompts = [pair.prompt for pair in pairs]
    prompted = recognise(prompts, drawn.pictures) if recognise else [None] * len(pairs)
    others = {name: of(prompts, drawn.pictures, reference.pictures) for name, of in (scores or {}).items()}
    others[DRIFT] = [metrics.drift(*latents) for latents in zip(drawn.latents, reference.latents, strict=True)]
    others[kept.DIFFERING] = [metrics.differing(*both) for both in zip(drawn.pictures, reference.pictures, strict=True)]
    if drawn.pictures[0].ndim == 4:
        others[MOTION] = [metrics.motion_psnr(*clips) for clips in zip(drawn.pictures, reference.pictures, strict=True)]
    return [
        Record(
            *key,
            *pair,
            metrics.psnr(drawn.pictures[k], reference.pictures[k]),
            metrics.ssim(drawn.pictures[k], reference.pictures[k]),
            prompted[k],
            drawn.full[k],
            {name: values[k] for name, values in others.items()},
            feature_errors(drawn, reference, k, len(pairs)),
            drawn.flops[k] / reference.flops[k] if drawn.flops else None,
        )
        for k, pair in enumerate(pairs)
    ]


def feature_errors(drawn: Drawn, reference: Drawn, k: int, pairs: int) -> tuple[float | None, ...]:
    """Return the relative error of the k-th pair's feature at each step, over all streams; four digits of it.

    None where nothing passed the tap, and nothing at all if the runs went through different times.
    """
    if drawn.times != reference.times:
        return ()
    errors: list[float | None] = []
    for ours, exact in zip(drawn.features, reference.features, strict=True):
        if ours is None or exact is None or ours.shape != exact.shape:
            errors.append(None)
            continue
        error = metrics.relative_error(*(one.unflatten(0, (-1, pairs))[:, k] for one in (ours, exact)))
        errors.append(float(f"{error:.4g}") if math.isfinite(error) else None)
    return tuple(errors)


def reproduce(
    pipe: Any,
    method: Method,
    record: Record,
    setting: Mapping[str, Any],
    recognise: Recogniser | None = None,
    scores: Mapping[str, Score] | None = None,
) -> Record:
    """Measure a record again: its batch is drawn as it was then, by the reference run and by the method.

    Raises: ValueError if the setting does not name its pair.
    """
    cut = batches([Pair(*pair) for pair in setting["pairs"]], setting["batch_size"])
    batch = next((batch for batch in cut if record.pair in batch), None)
    if batch is None:
        raise ValueError(f"a record is of one of the run's pairs, got {record.pair}; take a line of this run.")
    drawn, reference = observe(pipe, method, batch), observe(pipe, REFERENCE, batch)
    again = score(method.key, batch, drawn, reference, recognise, scores)
    return again[list(batch).index(record.pair)]


# --- time and cost


def measure_costs(pipe: Any, methods: Sequence[Method], pair: Pair, log: Log) -> None:
    """Run every method once at batch 1 to see memory and count FLOPs, unless the log holds its cost."""
    lacking = [method for method in methods if method.key not in log.comparison.costs]
    for method in tqdm(lacking, desc="costs", unit="method"):
        _attempt(log, method, lambda method: [_cost(pipe, method, pair)])


def _cost(pipe: Any, method: Method, pair: Pair) -> Cost:
    memory, watch = Memory(pipe.transformer.device), Watch(pipe)

    def on_step_end(*state: Any) -> dict[str, Any]:
        memory.look()
        return watch.on_step_end(*state)

    def call() -> None:
        _pictures(pipe, [pair], **method.call, callback_on_step_end=on_step_end)

    with method.switch(pipe) as run, watch.counting():
        counted, ours = flops(pipe, call), run if isinstance(run, Run) else None
        return Cost(
            *method.key,
            tuple(watch.full),
            flops=counted,
            bytes_held=sum(stream.bytes_held for stream in ours.summary().values()) if ours else None,
            resident_growth=memory.growth,
            cuda_peak=memory.cuda_peak(),
            plans={name: json.loads(ours.plan(name).to_json()) for name in ours.summary()} if ours else {},
        )


def time_methods(pipe: Any, methods: Sequence[Method], pairs: Sequence[Pair], log: Log) -> None:
    """Time every method on the same pairs at batch 1, unless the log holds its times.

    Methods take turns of `PAIRS_A_TURN` pairs, so that a machine that drifts hits all alike. Each turn begins with a
    run that does not count: after it caches are warm and the plan is compiled, which happens once per grid. That run
    tells which steps are full, and so how long a skipped one takes in the next run, of the same pair.
    """
    with tqdm(total=len(pairs) * len(methods), desc="timing", unit="run") as bar:
        for turn in batches(pairs, PAIRS_A_TURN):
            for method in methods:
                if not log.comparison.timed(method.key, turn):
                    _attempt(log, method, lambda method, turn=turn: _turn(pipe, method, turn))
                bar.update(len(turn))


def _turn(pipe: Any, method: Method, pairs: Sequence[Pair]) -> list[Time]:
    with method.switch(pipe):
        warm = Watch(pipe)
        with warm.counting():
            _time(pipe, method, pairs[0], warm)
        times = []
        for pair in pairs:
            watch = Watch(pipe)
            loop, call = _time(pipe, method, pair, watch)
            steps = [s for k, s in enumerate(watch.step_seconds()) if k not in warm.full]
            skipped = float(np.mean(steps)) if steps and pair is pairs[0] else None
            times.append(Time(*method.key, *pair, loop, call, skipped))
        return times


def _time(pipe: Any, method: Method, pair: Pair, watch: Watch) -> tuple[float, float]:
    with watch.timing():
        began = time.perf_counter()
        _pictures(pipe, [pair], **method.call, callback_on_step_end=watch.on_step_end)
        return watch.seconds, time.perf_counter() - began


# --- the bound


def bound_error(outputs: Tensor, grid: Tensor, full: Sequence[int]) -> Tensor:
    """Return what the best weights of the full steps' outputs miss of the final latents, (P, n, C).

    The last latents of run p are x_0 + sum_s dt_s v_s with dt_s = t_{s+1} - t_s. The sum's skipped part is replaced by
    sum over full f of a_f v_f, with weights a that all runs share, found by least squares on these very runs: one
    number per full step. On these outputs, (P, S, n, C), no plan of this schedule that taps the output comes nearer (in
    the sum of squares); in a real run the full steps' outputs drift too.
    """
    skipped = [step for step in range(len(grid) - 1) if step not in set(full)]
    dt = grid.diff()[skipped].to(outputs.device, torch.float64)
    missing = torch.einsum("s,psnc->pnc", dt, outputs[:, skipped].double())
    basis = outputs[:, list(full)].double().movedim(1, -1)
    weights = torch.linalg.lstsq(basis.flatten(0, -2), missing.flatten().unsqueeze(1)).solution
    return (basis @ weights).squeeze(-1) - missing


def add_bounds(
    log: Log,
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    schedules: Sequence[Schedule],
    *,
    batch_size: int = 16,
    recognise: Recogniser | None = None,
    scores: Mapping[str, Score] | None = None,
) -> None:
    """Record the pairs' reference runs at every token and add the bound of each schedule, as pictures, to a log.

    The velocities are taken from the latents, so that guidance is in them. A bound that the log holds is left as it is.

    Raises: ValueError as `pair_up` and `lesa.learn.collect.record` do.
    """
    pairs = pair_up(prompts, seeds)
    lacking = [one for one in schedules if not log.comparison.holds((BOUND, str(one)), pairs)]
    if not lacking:
        return
    cut, kept_latents = batches(pairs, batch_size), []
    for batch in tqdm(cut, desc="runs for the bound", unit="batch"):
        runs = record(pipe, [pair.prompt for pair in batch], [pair.seed for pair in batch], torch.arange)
        kept_latents += [run.latents.float() for run in runs]  # without the features, which are far larger
        grid = runs[0].grid
    latents = torch.stack(kept_latents)
    velocities = latents.diff(dim=1) / grid.diff().float()[:, None, None]
    for schedule in lacking:
        full = schedule.full_steps(len(grid) - 1)
        ends = latents[:, -1] + bound_error(velocities, grid, full).float()
        for batch, end, exact in zip(cut, ends.split(batch_size), latents[:, -1].split(batch_size), strict=True):
            drawn, reference = (Drawn(decode(pipe, batch, x), x, [full] * len(batch), [], [], []) for x in (end, exact))
            log.add(*score((BOUND, str(schedule)), batch, drawn, reference, recognise, scores))
    log.refresh()


def decode(pipe: Any, pairs: Sequence[Pair], latents: Tensor) -> list[np.ndarray]:
    """Decode final latents as the pipeline does: they are put in the place of its own after the last of two steps.

    A scheduler that stretches its grid to a last time, as Qwen-Image's, divides zero by zero in a run of one step.
    """
    latents = latents.to(pipe.device, pipe.transformer.dtype)

    def put(pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"latents": from_tokens(pipe.transformer, latents, tensors["latents"])}

    return _pictures(pipe, pairs, num_inference_steps=2, callback_on_step_end=put)
