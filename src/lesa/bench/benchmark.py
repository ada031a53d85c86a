"""Run methods against the reference run: pictures in batches, time and cost at batch 1."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lesa.bench.cost import Memory, OnStepEnd, Watch, flops, machine, telling
from lesa.bench.lines import DIFFERING, DRIFT, FLOAT_PSNR, Cost, Failure, Key, Line, Pair, Record, Start, Time
from lesa.bench.methods import REFERENCE, Method
from lesa.bench.recogniser import Recogniser
from lesa.bench.records import Comparison, Log
from lesa.bench.scores import SOUND_SCORES, Score
from lesa.bench.sounds import sound_picture
from lesa.host import needs
from lesa.host.pipelines import for_each, pictures_of, rate_of
from lesa.host.runtime import Run
from lesa.learn import metrics, ranks
from lesa.learn.progress import Bar
from lesa.learn.ranks import Ranks

PAIRS_A_TURN = 2
MOTION = "motion"
"""The score of clips besides those that are asked for: `metrics.motion_psnr`, in dB."""


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
    with Bar(total=len(pairs) * len(methods), desc="pictures", unit="picture", disable=not at.leads) as bar:
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
            if drawn.rate is not None:
                log.keep_sound(method.key, number, drawn.decoded[number - first], drawn.rate)
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
    """What a method gave of some pairs: RGB pictures (H, W, 3), and what was seen of its steps (see `Watch`).

    The decoded pictures are floats from 0 to 1, where the pipeline hands them out, or uint8. FLOPs are those of a pair,
    and latents (pairs, ...) the last ones. Sound is decoded as clips (channels, samples) of a `rate` in samples a
    second, and its pictures are those of its spectra.
    """

    decoded: list[np.ndarray]
    latents: Tensor
    full: list[tuple[int, ...]]
    features: list[Tensor | None]
    times: list[float]
    flops: list[float]
    rate: int | None = None

    @property
    def pictures(self) -> list[np.ndarray]:
        """The pictures as uint8."""
        if self.rate is not None:
            return [sound_picture(clip, self.rate) for clip in self.decoded]
        return [rounded(one) for one in self.decoded]


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
        drawn = decoded(pipe, pairs, watch.on_step_end, **method.call)
        times = torch.as_tensor(pipe.scheduler.timesteps).tolist()
    full = () if method.partial else tuple(watch.full)
    flops = [watch.flops / len(pairs)] * len(pairs)
    assert watch.latents is not None
    return Drawn(drawn, watch.latents.cpu(), [full] * len(pairs), watch.features, times, flops, rate_of(pipe))


def _together(drawn: Sequence[Drawn]) -> Drawn:
    """Put calls of one pair each together, as if they were one call."""
    shown, full, flops = ([getattr(one, name)[0] for one in drawn] for name in ("decoded", "full", "flops"))
    features: list[Tensor | None] = []
    for of_step in zip(*(one.features for one in drawn), strict=True):
        passed = [feature for feature in of_step if feature is not None]
        features.append(torch.stack(passed, dim=1).flatten(0, 1) if len(passed) == len(drawn) else None)
    latents = torch.cat([one.latents for one in drawn])
    return Drawn(shown, latents, full, features, drawn[0].times, flops, drawn[0].rate)


def decoded(pipe: Any, pairs: Sequence[Pair], on_step_end: OnStepEnd, **call: Any) -> list[np.ndarray]:
    """Draw pairs in one call of the pipeline with these arguments: RGB pictures (H, W, 3) or clips (frames, H, W, 3).

    They are floats from 0 to 1, as they were decoded, or uint8 if the pipeline hands out no other; of sound, clips
    (channels, samples) in [-1, 1].
    """
    call |= telling(pipe, on_step_end)
    generators = [torch.Generator().manual_seed(pair.seed) for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    drawn = pictures_of(pipe(prompt=prompts, generator=generators, output_type="np", **for_each(prompts, call)))
    return [np.stack([_pixels(frame) for frame in one]) if isinstance(one, list) else _pixels(one) for one in drawn]


def _pixels(image: Any) -> np.ndarray:
    return image if isinstance(image, np.ndarray) else np.asarray(image.convert("RGB"))


def rounded(picture: np.ndarray) -> np.ndarray:
    """Round a picture or clip of floats from 0 to 1 to uint8, as diffusers does for PIL."""
    return picture if picture.dtype == np.uint8 else (picture * 255).round().astype(np.uint8)


def score(
    key: Key,
    pairs: Sequence[Pair],
    drawn: Drawn,
    reference: Drawn,
    recognise: Recogniser | None = None,
    scores: Mapping[str, Score] | None = None,
) -> list[Record]:
    """Measure what a method drew against what the reference run did."""
    prompts, ours, theirs = [pair.prompt for pair in pairs], drawn.pictures, reference.pictures
    prompted = recognise(prompts, ours if drawn.rate is None else drawn.decoded) if recognise else [None] * len(pairs)
    others = {name: of(prompts, ours, theirs) for name, of in (scores or {}).items()}
    both = list(zip(drawn.decoded, reference.decoded, strict=True))
    if drawn.rate is not None:
        others |= {name: [of(*clips, drawn.rate) for clips in both] for name, of in SOUND_SCORES.items()}
    elif all(one.dtype != np.uint8 for clips in both for one in clips):
        others[FLOAT_PSNR] = [metrics.float_psnr(*pictures) for pictures in both]
    others[DRIFT] = [metrics.drift(*latents) for latents in zip(drawn.latents, reference.latents, strict=True)]
    others[DIFFERING] = [metrics.differing(*both) for both in zip(ours, theirs, strict=True)]
    if ours[0].ndim == 4:
        others[MOTION] = [metrics.motion_psnr(*clips) for clips in zip(ours, theirs, strict=True)]
    return [
        Record(
            *key,
            *pair,
            metrics.psnr(ours[k], theirs[k]),
            metrics.ssim(ours[k], theirs[k]),
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
    for method in Bar(lacking, desc="costs", unit="method"):
        _attempt(log, method, lambda method: [_cost(pipe, method, pair)])


def _cost(pipe: Any, method: Method, pair: Pair) -> Cost:
    memory, watch = Memory(pipe.transformer.device), Watch(pipe)

    def on_step_end(*state: Any) -> dict[str, Any]:
        memory.look()
        return watch.on_step_end(*state)

    def call() -> None:
        decoded(pipe, [pair], on_step_end, **method.call)

    with method.switch(pipe) as run, watch.counting():
        counted, ours = flops(pipe, call), run if isinstance(run, Run) else None
        return Cost(
            *method.key,
            tuple(watch.full),
            flops=counted,
            bytes_held=ours.summary().bytes_held if ours else None,
            resident_growth=memory.growth,
            cuda_peak=memory.cuda_peak(),
            plans={name: json.loads(ours.plan(name).to_json()) for name in ours.summary()} if ours else {},
        )


def time_methods(pipe: Any, methods: Sequence[Method], pairs: Sequence[Pair], log: Log) -> None:
    """Time every method on the same pairs at batch 1, unless the log holds its times.

    Methods take turns of `PAIRS_A_TURN` pairs, so that a machine that drifts hits all alike, and on one thread of a
    CPU: two that wait for each other on busy cores take many times as long as one. Each turn begins with a
    run that does not count: after it caches are warm and the plan is compiled, which happens once per grid. That run
    tells which steps are full, and so how long a skipped one takes in the next run, of the same pair.
    """
    with one_thread(pipe), Bar(total=len(pairs) * len(methods), desc="timing", unit="run") as bar:
        for turn in batches(pairs, PAIRS_A_TURN):
            for method in methods:
                if not log.comparison.timed(method.key, turn):
                    _attempt(log, method, lambda method, turn=turn: _turn(pipe, method, turn))
                bar.update(len(turn))


@contextmanager
def one_thread(pipe: Any) -> Iterator[None]:
    """Let a pipeline on the CPU run on one thread meanwhile; one on a GPU runs as ever."""
    threads = torch.get_num_threads()
    if pipe.transformer.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
        decoded(pipe, [pair], watch.on_step_end, **method.call)
        return watch.seconds, time.perf_counter() - began
