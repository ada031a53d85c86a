"""The command `lesa`: thin glue; whatever is heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

EMBEDDED = "models/emoji-flux"
PLACES = ("feature", "norm", "projection", "output")
VALIDATION_SEED, TRAINING_SEED = 1_000_000, 2_000_000  # the first ones; held-out pairs count from 0, so none coincide
MOST_SEEDS = 1_000_000
OFFLOADS = ("none", "model", "sequential", "group")
LEARNED = "learned"
CONVERTED = {
    "flux": "black-forest-labs/FLUX.1-dev",
    "flux-schnell": "black-forest-labs/FLUX.1-schnell",
    "qwen": "Qwen/Qwen-Image",
    "qwen-lightning": "lightx2v/Qwen-Image-Lightning",
    "hunyuanvideo": "hunyuanvideo-community/HunyuanVideo",
}
DIFFERENCES = "LESA"
SCORES = "MS-SSIM"
CURVE = "training.png"
FEW_STEPS = {4: "at:0,2", 8: "at:0,1,3,5"}  # of FLUX.1-schnell and Qwen-Image-Lightning: the schedules at 2x
USER_ERRORS = (ValueError, LookupError, OSError, RuntimeError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors that a user can cause end as one line, and 2. Two commands answer a question by 0 or 1, and
    3 is a training that was of no use."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return options.command(options) or 0
    except KeyboardInterrupt:
        print("lesa: stopped", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if options.traceback or isinstance(error, (KeyError, IndexError)):
            raise
        print(f"lesa: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


# --- commands


def _demo(options: argparse.Namespace) -> None:
    _compare(options, reuse=False)


def _bench(options: argparse.Namespace) -> None:
    _compare(options, reuse=True)


def _compare(options: argparse.Namespace, reuse: bool) -> None:
    from lesa.bench import benchmark, recogniser, records, scores
    from lesa.host import needs
    from lesa.learn import ranks

    needs.check(f"lesa {'bench' if reuse else 'demo'}", "comparison", "plots")
    source = options.prompts or Path(options.model) / "prompts" / "heldout.txt"
    prompts = _prompts(source, options.pairs)
    seeds = range(len(prompts))
    with ranks.together() as at:
        found, without = scores.load(options.scores)
        if why := recogniser.left_out(options.model):
            without[recogniser.PROMPTED] = why
        for name, why in without.items() if at.leads else ():
            print(f"lesa: {name} will not be measured: {why}", file=sys.stderr)
        _as_collected(options)
        out, pipe = _folder(options.out), _pipeline(options)
        _set_schedules(options)
        predictors = _predictors(options.lora or options.model, options.predictors, variants=reuse)
        setting = _setting(options, pipe, benchmark.pair_up(prompts, seeds), demo=not reuse)
        if options.anew and at.leads:
            records.clear(out, setting)
        at.wait()
        with records.writing(out, setting, at.rank) as log:
            methods = _line_up(options, pipe, predictors, reuse, at)
            facts = dict(batch_size=options.batch_size, recognise=recogniser.recogniser(options.model), scores=found)
            fine = benchmark.more_steps(options.fine) if options.fine else None
            benchmark.compare(
                pipe, methods, prompts, seeds, timed=options.timed, lacking=without, fine=fine, log=log, at=at, **facts
            )
            if options.bound and at.leads:
                benchmark.add_bounds(log, pipe, prompts, seeds, options.schedules, **facts)
        if at.leads:
            print(f"\n{len(prompts)} prompts of {source}, {options.steps} steps\n")
            _write_report(out, options.differences)


def _setting(options: argparse.Namespace, pipe: Any, pairs: Sequence[Any], demo: bool) -> dict[str, Any]:
    """Return what all records of a run have in common: enough to draw their pictures again.

    A demo begins its records anew each time, and so it says that they are a demo's: it never removes a benchmark's.
    """
    from lesa.host.pipelines import call_of
    from lesa.learn.collect import fingerprint

    call = call_of(options.model, options.lora)
    return {
        "model": str(options.model),
        "lora": options.lora,
        "scheduler": options.scheduler,
        "pipeline": type(pipe).__name__,
        "weights": fingerprint(pipe),
        "call": {**call, **options.call, "num_inference_steps": options.steps},
        "dtype": str(pipe.transformer.dtype).removeprefix("torch."),
        "device": options.device,
        "batch_size": options.batch_size,
        "pairs": pairs,
        **({"command": "demo"} if demo else {}),
    }


def _line_up(options: argparse.Namespace, pipe: Any, predictors: Sequence[Any], reuse: bool, at: Any) -> list[Any]:
    """Line up the methods asked for; of several processes the first plans, and the others read what it planned."""
    from lesa.bench import benchmark

    methods = benchmark.line_up(options.steps, options.schedules, predictors, reuse=reuse)
    if options.budgets:
        if not at.leads:
            at.wait()
        grid, plan = _planned(options, pipe)
        planned = benchmark.line_up_planned(options.budgets, grid, plan, predictors, reuse=reuse, only=options.only)
        known = {method.key for method in methods}
        methods += [method for method in planned if method.key not in known]
        if at.leads:
            at.wait()
    if options.peers:
        methods += _peers(options)
    if options.only:
        if unknown := set(options.only) - {method.name for method in methods}:
            raise ValueError(f"the methods are {', '.join(dict.fromkeys(m.name for m in methods))}, got {unknown}.")
        methods = [method for method in methods if method.name in options.only]
    return methods


def _peers(options: argparse.Namespace) -> list[Any]:
    from lesa.bench import peers

    names = list(peers.FAMILIES) if options.peers == ["all"] else options.peers
    prompt = _prompts(Path(options.model) / "prompts" / "train.txt", 1)[0]
    return peers.line_up(names, options.steps, prompt)


def _planned(options: argparse.Namespace, pipe: Any) -> tuple[Any, Callable[[Any, int, str], Any]]:
    """Return the grid, and the call that plans a forecaster's schedule at a tap; what was planned is kept in a file."""
    from lesa.bench import records
    from lesa.predictors.disk import write_atomically
    from lesa.rows.grid import validate
    from lesa.rows.schedule import Schedule

    path, known = Path(options.out) / records.PLANNED, records.planned(options.out)
    planner = cache(lambda place: _planner(options, pipe, _opened(options.data), place))  # it records runs, once

    def plan(forecaster: Any, budget: int, place: str) -> Any:
        name = f"{forecaster!r} {budget} {place}"
        if name not in known:
            known[name] = str(_finder(planner(place))(forecaster, budget))
            write_atomically(path, json.dumps(known, indent=1).encode())
        return Schedule.parse(known[name])

    if "grid" not in known:
        known["grid"] = planner("feature").grid.tolist()
    return validate(known["grid"]), plan


def _report(options: argparse.Namespace) -> None:
    from lesa.host import needs

    needs.check("lesa report", "plots")
    _write_report(Path(options.run), options.differences)


def _write_report(folder: Path, differences: str | None) -> None:
    """Make tables and plots of the records in a folder, and of nothing else."""
    from lesa.bench import plots, records, report
    from lesa.host.pipelines import save_picture

    comparison = records.load(folder)
    named = differences in {method for method, _ in comparison.records} or differences != DIFFERENCES
    text = report.summary(comparison, differences if named else None)
    print(text)
    (folder / records.REPORT).write_text(text, encoding="utf-8")
    drawn = plots.draw_all(comparison, folder)
    if comparison.pictures:
        drawn.append(folder / records.SHEET)
        report.sheet(comparison).save(drawn[-1])
    if moving := report.sheets(comparison):
        drawn.append(folder / records.MOVING)
        save_picture(moving, drawn[-1])
    print("\n".join(map(str, [folder / records.REPORT, *drawn])))


def _changes(options: argparse.Namespace) -> int:
    from lesa.bench import records, report

    before, after = records.load(options.first), records.load(options.second)
    found = report.changes(before, after, options.score)
    print(report.changes_table(found, options.score, options.tolerance))
    if differing := report.other_settings(before, after):
        print(f"\nthe settings differ in: {', '.join(differing)}")
    return int(any(change.beyond(options.tolerance) for change in found))


def _reproduce(options: argparse.Namespace) -> int:
    from lesa.bench import benchmark, peers, recogniser, records, scores
    from lesa.host import needs
    from lesa.learn.collect import fingerprint

    needs.check("lesa reproduce", "comparison")
    if options.steps:
        raise ValueError("a record says how many steps its run has; leave --steps out.")
    then, entry, setting = records.at_line(options.records, options.line)
    options.model = options.model or setting["model"]
    options.call, options.dtype = {**setting["call"], **options.call}, options.dtype or setting["dtype"]
    options.device, options.lora = options.device or setting["device"], options.lora or setting.get("lora")
    options.scheduler = options.scheduler or setting.get("scheduler")
    pipe = _pipeline(options)
    if fingerprint(pipe) != setting["weights"]:
        raise ValueError(f"the record is of other weights than those of {options.model}; name its --model.")
    if "peer" in entry["recipe"]:
        method = peers.rebuild(entry)
    else:
        predictors = _predictors(options.lora or options.model, options.predictors, variants=True)
        method = benchmark.rebuild(entry, predictors)
    found, _ = scores.load([name for name in then.scores if name in scores.SCORES])
    now = benchmark.reproduce(pipe, method, then, setting, recogniser.recogniser(options.model), found)
    print(f"{then.method} on {then.schedule}, {then.prompt!r}, seed {then.seed}")
    print(f"PSNR {then.psnr:.4f} dB then, {now.psnr:.4f} dB now; SSIM {then.ssim:.6f} then, {now.ssim:.6f} now")
    return int(abs(now.psnr - then.psnr) > options.tolerance)


def _set_schedules(options: argparse.Namespace) -> None:
    """Set what is compared by default: the paper's schedules and planned ones; of few steps, those with half full."""
    few = FEW_STEPS.get(options.steps)
    if options.schedules is None:
        options.schedules = _schedules(few or "paper:7,paper:10")
    if options.budgets is None:
        options.budgets = [options.steps // 2] if few else _counts(options.usual_budgets)


def _generate(options: argparse.Namespace) -> None:
    import torch
    from PIL import Image

    from lesa.host import needs
    from lesa.host.pipelines import is_mp4, pictures_of, save_picture
    from lesa.host.runtime import accelerate

    if Path(options.out).suffix.lower() not in {*Image.registered_extensions(), ".mp4"}:
        raise ValueError(f"--out names a picture file such as picture.png, or clip.gif, got {options.out!r}.")
    if is_mp4(options.out):
        needs.check("an MP4", "mp4")
    _folder(Path(options.out).parent)
    pipe = _pipeline(options)
    seeded = dict(generator=torch.Generator().manual_seed(options.seed))
    if options.full:
        drawn = pictures_of(pipe(options.prompt, **seeded))
    else:
        with accelerate(pipe, _forecaster(options), schedule=options.schedule) as run:
            drawn = pictures_of(pipe(options.prompt, **seeded))
        print(run.summary())
    save_picture(drawn[0], options.out)
    print(options.out)


def _plan(options: argparse.Namespace) -> None:
    from time import monotonic

    from lesa.host import needs

    if options.plot:
        needs.check("lesa plan --plot", "comparison", "plots")
    if options.verify:
        needs.check("lesa plan --verify", "comparison")
    store = _as_collected(options)
    pipe, began = _pipeline(options), monotonic()
    forecaster, planned = _forecaster(options), []
    place = options.tap or _place(pipe, forecaster, store)
    planner = _planner(options, pipe, store, place)
    for budget in options.budgets:
        schedule = _finder(planner, options.refine)(forecaster, budget)
        promised = planner.drift(forecaster, schedule.full_steps(options.steps))
        real = planner.real(forecaster, schedule)
        drifts = f"drift {promised:.1f} dB, {real:.1f} dB in real runs"
        print(f"{schedule}  {schedule.draw(options.steps)}  {drifts}", flush=True)
        planned.append(schedule)
    print(f"planned in {monotonic() - began:.1f} s{', the runs included' if store is None else ''}", file=sys.stderr)
    if options.verify or options.plot:
        _verify(options, pipe, forecaster, planned, place)


def _place(pipe: Any, forecaster: Any, store: Any) -> str:
    """Name the tap of forecasts that nobody named: a predictor's own, that of recorded runs, or the model's usual."""
    from lesa.host.tap import place_of, tap_of
    from lesa.predictors import Predictor

    tap = tap_of(pipe.transformer)
    if isinstance(forecaster, Predictor):
        tap = forecaster.origin.tap
    elif store is not None:
        tap = tap._replace(module=store.collection.tap)
    return place_of(type(pipe.transformer).__name__, tap)


def _verify(options: argparse.Namespace, pipe: Any, forecaster: Any, planned: Sequence[Any], place: str) -> None:
    """Draw held-out prompts on planned schedules: recorded runs do not drift, these do."""
    from lesa.bench import benchmark, plots, report

    prompts = _prompts(options.prompts or Path(options.model) / "prompts" / "heldout.txt", options.verify or 16)
    methods = [benchmark.forecast(repr(forecaster), forecaster, schedule, place) for schedule in planned]
    methods += [benchmark.fewer_steps(budget) for budget in options.budgets]
    comparison = benchmark.compare(pipe, methods, prompts, range(len(prompts)), timed=0)
    print(f"\n{len(prompts)} held-out prompts\n\n{report.table(comparison.results())}")
    if options.plot:
        plots.psnr_over(comparison.results(), options.plot)
        print(f"\n{options.plot}")


def _planner(options: argparse.Namespace, pipe: Any, store: Any, place: str) -> Any:
    """Make a planner at a tap: of a store's runs, or of new ones of some prompts that the model was trained on."""
    from lesa.host.tap import tap_of
    from lesa.learn.collect import record
    from lesa.learn.planning import PLANNED_ON, Planner
    from lesa.learn.trajectory import draw_tokens

    tap = tap_of(pipe.transformer, place)
    if store is not None:
        tap = _recorded(store, tap)
        first = [store.load(k) for k in range(min(PLANNED_ON, len(store)))]
        return Planner.of(pipe, first, tap, **store.collection.call)
    file = Path(options.model) / "prompts" / "train.txt"
    if not file.exists():
        raise FileNotFoundError(
            f"planning needs recorded runs, and {options.model} comes without prompts to record some (no {file}); run "
            "lesa collect and name its folder as --data, or leave out what is planned for (bench --budgets '')."
        )
    prompts = _prompts(file, PLANNED_ON)
    seeds = range(TRAINING_SEED, TRAINING_SEED + len(prompts))
    return Planner.of(pipe, record(pipe, prompts, seeds, draw_tokens, tap), tap)


def _opened(folder: str | None) -> Any:
    from lesa.learn.trajectory import Store

    return Store.open(folder) if folder else None


def _as_collected(options: argparse.Namespace) -> Any:
    """Open the store that is planned on, if one is named, and let the model run as it did when that was collected.

    Raises: ValueError if other steps or arguments are asked for.
    """
    store = _opened(options.data)
    if store is None:
        return None
    there = {**store.collection.call, "num_inference_steps": len(store.collection.grid) - 1}
    here = {**options.call, **({"num_inference_steps": options.steps} if options.steps else {})}
    if other := [f"{name}={here[name]}" for name in here if there.get(name, here[name]) != here[name]]:
        known = ", ".join(f"{name}={value}" for name, value in there.items())
        raise ValueError(
            f"plans are for runs like those of --data, {options.data} ({known}), got {', '.join(other)}; leave that "
            "out, or collect such runs."
        )
    options.call = {**there, **here}
    options.steps = options.call.pop("num_inference_steps")
    return store


def _finder(planner: Any, refine: bool = True) -> Callable[[Any, int], Any]:
    """Return what finds a schedule for a forecaster and a budget: real runs choose it, or recorded runs alone."""
    return planner.plan if refine else planner.search


def _recorded(store: Any, tap: Any) -> Any:
    """Return a tap that a collection's features are of; outputs are part of every collection."""
    if tap.module not in (None, store.collection.tap):
        raise ValueError(
            f"{store.folder} was collected at the tap {store.collection.tap!r}, got {tap.module!r}; collect with the "
            "--tap that is wanted."
        )
    return tap


def _rows(options: argparse.Namespace) -> None:
    from lesa.predictors import Predictor
    from lesa.rows import plan

    predictor = Predictor.from_pretrained(options.predictor)
    stream = options.stream or predictor.origin.streams[0]
    print(plan.compile(predictor.for_stream(stream), predictor.grid, predictor.schedule))


def _collect(options: argparse.Namespace) -> None:
    from lesa.host.tap import tap_of
    from lesa.learn import ranks
    from lesa.learn.collect import collect

    prompts = _prompts(options.prompts, options.limit)
    pairs = [(prompt, seed) for k, prompt in enumerate(prompts) for seed in options.seeds or [TRAINING_SEED + k]]
    with ranks.together() as at:
        pipe = _pipeline(options)
        store = collect(
            pipe,
            [prompt for prompt, _ in pairs],
            [seed for _, seed in pairs],
            options.out,
            model=f"{options.model} with {options.lora}" if options.lora else options.model,
            tokens=options.tokens,
            batch_size=options.batch_size,
            tap=tap_of(pipe.transformer, options.tap),
            at=at,
            num_inference_steps=options.steps,
            **options.call,
        )
        if at.leads:
            print(f"{len(store)} runs in {options.out}, digest {store.digest()}")


def _train(options: argparse.Namespace) -> int:
    from time import monotonic

    from lesa.bench import plots
    from lesa.host import needs, tap
    from lesa.host.head import head
    from lesa.host.runtime import accelerate
    from lesa.learn import outcome, training
    from lesa.learn.collect import fingerprint, kept_paths, record_kept
    from lesa.learn.trajectory import Store, Trajectory
    from lesa.predictors import disk

    _check_training(options)
    _check_place(options.out)
    if without := needs.lacking("plots"):
        print(f"no plot of the training will be drawn: it needs {without}", file=sys.stderr)
    began, used = monotonic(), {}
    stores, pipe = [Store.open(folder) for folder in options.data], _pipeline(options)
    for store, folder in zip(stores, options.data, strict=True):
        if fingerprint(pipe) != store.collection.weights:
            raise ValueError(f"{folder} was collected from other weights than those of {options.model}; collect anew.")
        if not len(store):
            raise ValueError(f"training needs recorded runs, and {folder} holds none; run lesa collect.")
    out, prompts = _folder(options.out), _prompts(options.validation_prompts, options.validation)
    seeds = range(VALIDATION_SEED, VALIDATION_SEED + len(prompts))
    where, kept = tap.tap_of(pipe.transformer, options.tap), out / "rounds" / "recorded"
    if start := _start(options):
        start.check_model(pipe.transformer, where)
    resumed = kept.parent.exists()
    pipe.transformer.requires_grad_(False)  # the head is differentiated, and nothing of it is trained

    def runs(like: Trajectory, prompts: Sequence[str], seeds: Sequence[int], name: str) -> list[Trajectory]:
        facts = dict(batch_size=options.batch_size, **calls[tuple(like.grid.tolist())])
        used[kept / name] = seeds
        return record_kept(pipe, prompts, seeds, like.tokens, where, kept / name, **facts)

    def record_runs(predictor: Any, lesson: Any) -> tuple[list[Trajectory], list[Trajectory]]:
        first, name = lesson.reference[0], _digest(predictor, lesson)
        with accelerate(pipe, predictor, schedule=lesson.schedule):
            trained = [run.prompt for run in lesson.reference], [run.seed for run in lesson.reference]
            return runs(first, *trained, f"trained-{name}"), runs(first, prompts, seeds, f"validated-{name}")

    calls, lessons = {}, []
    for store in stores:
        reference = list(store)
        calls[tuple(reference[0].grid.tolist())] = store.collection.call
        validation = runs(reference[0], prompts, seeds, f"reference-{store.digest()}")
        for schedule in _schedules_to_learn(options, pipe, store):
            lessons.append(training.Lesson(reference, validation, schedule))
    predictor = _untrained(options, pipe, stores, lessons, start)

    def took() -> dict[str, Any]:
        before = start.origin.training.get("seconds") if start else 0.0
        if resumed or before is None:  # nobody knows how long the rest took
            return {}
        return {"seconds": round(before + monotonic() - began, 1)}

    def forget() -> None:
        disk.remove([path for folder in used for path in kept_paths(folder, used[folder])], kept.parent)

    def save(predictor: Any, folder: Path, **more: Any) -> None:
        more["bytes"] = sum(path.stat().st_size for store in stores for path in store.paths)
        predictor.origin = replace(predictor.origin, training={**predictor.origin.training, **more})
        predictor.save_pretrained(folder)

    def drift_of(forecaster: Any) -> float:
        few, total = slice(outcome.JUDGED_ON), 0.0
        for number, lesson in enumerate(lessons):
            name = f"judged-{number}-{next(judged)}"
            with accelerate(pipe, forecaster, schedule=lesson.schedule, tap=where):
                found = runs(lesson.reference[0], prompts[few], seeds[few], name)
            total += training.drift(found, lesson.validation[few]) / len(lessons)
        return total

    def judge(trained: Any, start: Any) -> int:
        found = outcome.shortfalls(trained, start, drift_of)
        forget()
        print("".join(f"lesa: {line}\n" for line in found), end="", file=sys.stderr)
        print(out)
        return outcome.GAINED_NOTHING if found else 0

    judged = count()
    if options.loss == "steps":
        begun = deepcopy(predictor)
        training.least_squares(predictor, lessons[0].reference)
        save(predictor, out, **took())
        return judge(predictor, begun)
    recipe = training.Config.paper() if options.paper else training.Config(loss=options.loss)
    chosen = dict(rounds=options.rounds, updates=tuple(options.updates), seed=options.seed, floor=options.floor)
    config = replace(recipe, **chosen)
    outputs_of = head(pipe.transformer, where)
    if options.stages:
        predictor = _staged(predictor, options.stages, lessons[0], outputs_of)
    result = training.train(predictor, lessons, outputs_of, record_runs, config, out / "rounds")
    save(result.predictor, out, drift=round(min(result.scores), 2), **took())
    save(result.ground_truth, out / "ground-truth", drift=round(result.scores[0], 2), phase="ground-truth")
    if not without:
        plots.training_curve(result.curve, out / CURVE)
    print("\n".join(f"round {k}: drift {score:.2f} dB" for k, score in enumerate(result.scores)))
    print(f"trained in {monotonic() - began:.1f} s", file=sys.stderr)
    return judge(result.predictor, predictor)


def _check_place(out: str) -> None:
    """Check before the work that a training, or a predictor, written there would take the place of nothing else."""
    from lesa.learn import training
    from lesa.predictors.base import check_place

    rounds = Path(out) / "rounds"
    begun = training.begun(rounds) is not None or (rounds / "recorded").exists()
    check_place(out, begun, also=[CURVE])
    check_place(Path(out) / "ground-truth", begun)


def _digest(predictor: Any, lesson: Any) -> str:
    """Name the runs of a predictor on a lesson: by its numbers, the grid and the schedule."""
    total = hashlib.sha256(f"{lesson.reference[0].grid.tolist()} {lesson.schedule}".encode())
    for name, tensor in sorted(predictor.state_dict().items()):
        total.update(name.encode() + tensor.numpy().tobytes())
    return total.hexdigest()[:16]


def _check_training(options: argparse.Namespace) -> None:
    if options.paper:
        if options.memories:
            raise ValueError("--paper takes the paper's 4, 8 and 8 past features; pass it without --memories.")
        options.method, options.history, options.loss = "lesa", "all", "features"
    if options.predictor:
        _begin_with(options)
    options.tap = options.tap or "feature"
    for name in ("stages", "memories"):
        if getattr(options, name) and options.method != "lesa":
            raise ValueError(f"--{name} are those of LESA: they need --method lesa.")
    if options.stages and options.memories:
        raise ValueError("--memories are for the stages of the default bounds; pass them without --stages.")
    if options.loss == "steps" and options.method != "l2p":
        raise ValueError("--loss steps fits each step alone, which free rows can: it needs --method l2p.")
    if len(options.data) * len(options.budgets or [0]) > 1 and options.method != "lesa-continuous":
        raise ValueError(
            f"--method {options.method} learns one grid and one schedule, got {len(options.data)} collections and "
            f"{len(options.budgets or [0])} budgets; name one of each, or take --method lesa-continuous."
        )


def _begin_with(options: argparse.Namespace) -> None:
    """Take the method and the history of the predictor that training begins with."""
    from lesa.host.tap import place_of

    start = _start(options)
    options.method, options.history = start.method, "all" if start.remembers_forecasts else "full"
    if options.stages or options.memories or options.loss == "steps":
        raise ValueError(
            "training begins with --predictor as it is; pass it without --stages, --memories, --loss steps."
        )
    if options.paper and start.method != "lesa":
        raise ValueError(f"--paper trains the KANs of a LESA, got a {start.method} as --predictor; leave --paper out.")
    place = place_of(start.origin.transformer, start.origin.tap)
    if options.tap not in (None, place):
        raise ValueError(f"this predictor is for --tap {place}, got {options.tap}; pass that, or leave it out.")
    options.tap = place
    if start.method == "lesa-continuous":
        if not options.budgets and not options.schedule:
            raise ValueError(
                "a lesa-continuous is trained for any schedule; name --budgets to plan for it, or --schedule."
            )
    else:
        if options.budgets or options.schedule not in (None, start.schedule):
            raise ValueError(
                f"a {start.method} keeps to its schedule, {start.schedule}; pass --predictor without --budgets and "
                "--schedule."
            )
        options.schedule = start.schedule


def _schedules_to_learn(options: argparse.Namespace, pipe: Any, store: Any) -> list[Any]:
    """Return the schedule named, or one planned for each budget."""
    if not options.budgets:
        few = FEW_STEPS.get(len(store.collection.grid) - 1)
        return [options.schedule or _schedule(few or "paper:7")]
    planner, forecaster = _planner(options, pipe, store, options.tap), _forecaster(options)
    found = [_finder(planner)(forecaster, budget) for budget in options.budgets]
    print("\n".join(f"planned: {schedule}  {schedule.draw(planner.steps)}" for schedule in found), flush=True)
    return found


def _staged(predictor: Any, stages: Any, lesson: Any, head: Any) -> Any:
    """Make a LESA anew with other stages: with these bounds, with so many learned ones, or with as many as pay."""
    from lesa.learn.planning import PLANNED_ON, Planner
    from lesa.learn.stages import choose, learn
    from lesa.predictors import LESA

    def planner(runs: Sequence[Any]) -> Any:
        return Planner(runs[:PLANNED_ON], head, tap=predictor.origin.tap)

    skipped = [step for step in range(len(predictor.grid) - 1) if step not in predictor.full]
    pasts = {step: predictor.past(step) for step in skipped}
    if stages == LEARNED:
        stages = choose(planner(lesson.reference), planner(lesson.validation), pasts)
    elif isinstance(stages, int):
        stages = learn(planner(lesson.reference), pasts, stages)
    print(f"{len(stages) + 1} stages, bounds {', '.join(f'{bound:.3f}' for bound in stages) or 'none'}")
    memories = [predictor.memory] * (len(stages) + 1)
    return LESA(predictor.origin, **{**predictor.options(), "bounds": stages, "memories": memories})


def _calibrate(options: argparse.Namespace) -> int:
    """Collect, plan and train, with few runs and few updates; the round is chosen on the same prompts, other seeds."""
    from time import monotonic

    began = monotonic()
    _check_place(options.out)
    runs = Path(options.out) / "runs"
    at = "feature" if options.tap == "output" else options.tap
    few = argparse.Namespace(**{**vars(options), "out": runs, "seeds": None, "tokens": None, "tap": at})
    _collect(few)
    chosen = dict(method="l2p", history="full", loss="latents", paper=False)
    chosen |= dict(rounds=1, updates=(100, 100), floor=-120.0, seed=0)
    data = dict(data=[runs], budgets=[options.budget], predictor=None, stages=None, memories=None)
    chosen |= dict(validation_prompts=options.prompts, validation=options.limit)
    code = _train(argparse.Namespace(**{**vars(few), **chosen, **data, "out": options.out, "tap": options.tap}))
    print(f"calibrated in {monotonic() - began:.1f} s, the runs included", file=sys.stderr)
    return code


def _untrained(
    options: argparse.Namespace, pipe: Any, stores: Sequence[Any], lessons: Sequence[Any], start: Any = None
) -> Any:
    """Make what is trained: a new predictor, or one with the numbers of `start`."""
    import diffusers
    import torch

    from lesa.host.pipelines import call_of
    from lesa.host.tap import tap_of
    from lesa.learn.guidance import facts
    from lesa.predictors import L2P, LESA, ContinuousLESA, Origin, configuration

    names = ("loss", "rounds", "updates", "floor", "seed", "history", "paper")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"start": start.digest()} if start else {}
    collected = {id(lesson.reference): lesson.reference for lesson in lessons}
    call = {**call_of(options.model, options.lora), **options.call, **stores[0].collection.call}
    settings |= facts(pipe, list(collected.values()), call)
    origin = Origin(
        model=stores[0].collection.model,
        transformer=type(pipe.transformer).__name__,
        config=configuration(pipe.transformer),
        tap=_recorded(stores[0], tap_of(pipe.transformer, options.tap)),
        grid=tuple(lessons[0].reference[0].grid.tolist()),
        schedule=str(lessons[0].schedule),
        streams=lessons[0].reference[0].streams,
        data=" ".join(store.digest() for store in stores),
        training=settings,
        versions={"torch": torch.__version__, "diffusers": diffusers.__version__, "lesa": _version()},
    )
    if options.paper and start is None:
        return LESA.paper(origin)
    if options.method == "lesa-continuous":
        schedules: dict[tuple[float, ...], list[str]] = {}
        for lesson in lessons:
            schedules.setdefault(tuple(lesson.reference[0].grid.tolist()), []).append(str(lesson.schedule))
        chosen = {**(start.options() if start else {}), "schedules": list(schedules.items())}
        return _like(start, ContinuousLESA(origin, **chosen))
    if start:
        return _like(start, type(start)(origin, **start.options()))
    remembers_forecasts = options.history == "all"
    if options.method == "l2p":
        return L2P(origin, remembers_forecasts=remembers_forecasts)
    memories = {"memories": options.memories} if options.memories else {}
    return LESA(origin, remembers_forecasts=remembers_forecasts, **memories)


def _start(options: argparse.Namespace) -> Any:
    """Return the trained predictor that training begins with, if one was named."""
    from lesa.predictors import Predictor

    return Predictor.from_pretrained(options.predictor) if options.predictor else None


def _like(start: Any, predictor: Any) -> Any:
    """Give a predictor the numbers of another one of its kind, if there is one."""
    if start is None:
        return predictor
    there, here = start.origin, predictor.origin
    if there.streams != here.streams:
        raise ValueError(
            f"training begins with a predictor of the same streams, got {there.streams}, and {here.streams} in the "
            "recorded runs; name another as --predictor."
        )
    if predictor.method != "lesa-continuous":
        start.check_grid(predictor.grid)
    predictor.load_state_dict(start.state_dict())
    return predictor


def _flops(options: argparse.Namespace) -> None:
    from lesa.bench import flops, models, report

    chosen = models.MODELS
    if options.model:
        model = models.read(options.model, options.call, options.streams, options.text_tokens)
        runs = [models.Published("any row", schedule) for schedule in options.schedules]
        chosen = (replace(model, steps=options.steps or model.steps, runs=runs),)
    costs = {model.name: {place: flops.count(model, place) for place in flops.PLACES} for model in chosen}
    print(f"{report.markdown(*flops.steps_table(chosen, costs), text=1)}\n")
    print(f"{report.markdown(*flops.runs_table(chosen, costs), text=3)}\n")
    print(report.markdown(*flops.memory_table(chosen, costs), text=1))


def _convert(options: argparse.Namespace) -> None:
    import torch

    from lesa.bench import models
    from lesa.host.tap import tap_of
    from lesa.predictors import convert
    from lesa.predictors.base import check_place
    from lesa.rows.schedule import Schedule

    check_place(options.out)
    weights = convert.read(options.file)
    if options.pipeline:
        model = models.read(options.pipeline)
    else:
        model = next(known for known in models.MODELS if known.name == CONVERTED[options.model])
    predictor = convert.convert(
        weights,
        model,
        tap_of(models.build(model), options.tap),
        _grid(options.grid, model),
        options.schedule or Schedule.paper(options.interval),
        bounds=options.bounds,
        order=options.order,
        training={"file": Path(options.file).name},
        versions={"torch": torch.__version__, "lesa": _version()},
    )
    predictor.save_pretrained(_folder(options.out))
    memories = ", ".join(map(str, predictor.memories))
    print(f"{len(predictor.memories)} stages of {memories} past features, streams {', '.join(weights.streams)}")
    print(options.out)


def _grid(text: str, model: Any) -> Any:
    """Read a grid: a number of steps, times with commas between them, or a JSON file that has it."""
    from lesa.bench.models import grid_of

    if text.isdigit():
        return grid_of(model, _count(text))
    if not Path(text).is_file():
        try:
            return [float(time) for time in text.split(",")]
        except ValueError as error:
            raise ValueError(
                f"--grid is a number of steps, all times, or a JSON file of them, got {text!r}."
            ) from error
    entries = json.loads(Path(text).read_text())
    return entries["grid"] if isinstance(entries, dict) else entries


# --- what commands share


def _pipeline(options: argparse.Namespace) -> Any:
    """Load the model with the call arguments given; sets `options.steps` to the steps of its runs."""
    import torch
    from transformers.utils import logging

    from lesa.host import offload
    from lesa.host.pipelines import call_of, load, with_call
    from lesa.learn import ranks

    if options.dtype and not isinstance(getattr(torch, options.dtype, None), torch.dtype):
        raise ValueError(f"a dtype is one of torch's, such as bfloat16, got {options.dtype!r}.")
    offload.check(options.device, options.offload)
    logging.disable_progress_bar()  # of the weights of each component; that of the components stays
    steps = call_of(options.model, options.lora).get("num_inference_steps", 50)
    options.steps = options.steps or options.call.pop("num_inference_steps", None) or steps
    dtype = getattr(torch, options.dtype) if options.dtype else None
    loading = dict(torch_dtype=dtype, variant=options.variant, revision=options.revision)
    pipe = load(options.model, lora=options.lora, **{name: value for name, value in loading.items() if value})
    if options.scheduler:
        pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, **options.scheduler})
    if options.vae_tiling:
        pipe.vae.enable_tiling()
    try:
        offload.place(pipe, ranks.device(options.device), options.offload)
    except AssertionError as error:  # what torch raises for a device that it was not built for
        raise ValueError(f"the device {options.device!r} cannot be used here: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return with_call(pipe, {**options.call, "num_inference_steps": options.steps})


def _predictors(model: str, named: Sequence[str] | None, variants: bool) -> list[Any]:
    """Load the predictors named, or else those shipped with the model; with the `variants` in their folders, or not."""
    from lesa.predictors import Predictor
    from lesa.predictors.base import CONFIG_FILE
    from lesa.predictors.shelf import SHIPPED_FOLDER

    places = [f"{SHIPPED_FOLDER}/*/{CONFIG_FILE}"] + [f"{SHIPPED_FOLDER}/*/*/{CONFIG_FILE}"] * variants
    found = [path.parent for place in places for path in Path(model).glob(place)]
    shipped = sorted(path for path in found if path.name != "rounds")
    folders = shipped if named is None else named
    if not folders:
        print(f"no predictor lies in {Path(model) / SHIPPED_FOLDER}: rows without training only", file=sys.stderr)
    return [Predictor.from_pretrained(folder) for folder in folders]


def _forecaster(options: argparse.Namespace) -> Any:
    """Return what is named: a predictor, or 'reuse', 'taylor:2' or 'lagrange:1'; None is the predictor shipped."""
    from lesa.predictors import Predictor
    from lesa.rows.forecasters import Lagrange, Reuse, Taylor

    if options.predictor:
        return Predictor.from_pretrained(options.predictor)
    name, _, number = (options.forecaster or "").partition(":")
    if name == "reuse":
        return Reuse()
    if name in ("taylor", "lagrange") and number.isdigit():
        return {"taylor": Taylor, "lagrange": Lagrange}[name](int(number))
    if options.forecaster:
        raise ValueError(f"a forecaster is reuse, taylor:2, lagrange:1 or the like, got {options.forecaster!r}.")
    return None


def _prompts(path: str | Path, limit: int | None) -> list[str]:
    from lesa.learn.collect import read_prompts

    return read_prompts(path)[:limit]


def _folder(path: str | Path) -> Path:
    """Make a folder at once: a place that cannot be written to is better known before the work."""
    Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def _print_version(_options: argparse.Namespace) -> None:
    print(f"lesa {_version()}")


def _version() -> str:
    from importlib.metadata import version

    return version("lesa-cache")


# --- the parser


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lesa", description="Faster diffusers pipelines: the features of skipped steps are forecast.")
    parser.add_argument(
        "--version", action="store_const", const=_print_version, dest="command", help="print the version"
    )
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    parser.set_defaults(command=lambda _: parser.print_help())
    commands = parser.add_subparsers(metavar="COMMAND")
    _add_comparisons(commands)
    _add_training(commands)
    _add_flops(commands)
    _add_convert(commands)

    generate = _command(commands, "generate", _generate, "draw a picture, accelerated")
    generate.add_argument("prompt", metavar="PROMPT")
    generate.add_argument("--out", default="picture.png", metavar="FILE")
    generate.add_argument("--seed", type=int, default=0)
    how = generate.add_mutually_exclusive_group()
    how.add_argument("--predictor", metavar="FOLDER", help="default: the one shipped with the model")
    how.add_argument("--forecaster", help="one that needs no training: reuse, taylor:1, lagrange:2, ...")
    how.add_argument("--full", action="store_true", help="every step full, for comparison")
    generate.add_argument(
        "--schedule", type=_schedule, help="which steps are full, e.g. paper:7; default: the predictor's"
    )

    plan = _command(commands, "plan", _plan, "choose which steps are full, for a number of full steps")
    plan.add_argument("--data", metavar="FOLDER", help="what lesa collect wrote; default: runs of the model's prompts")
    plan.add_argument("--budgets", type=_counts, default="10,8,6", help="numbers of full steps (10,8,6)")
    plan.add_argument("--forecaster", default="lagrange:2", help="what to plan for: reuse, taylor:1, ... (lagrange:2)")
    plan.add_argument("--predictor", metavar="FOLDER", help="plan for a lesa-continuous instead")
    plan.add_argument("--tap", choices=PLACES, help="where forecasts are made; default: as --predictor or --data")
    plan.add_argument(
        "--refine",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="choose by real runs among plans of more and more caution (the default)",
    )
    plan.add_argument("--verify", type=_count, metavar="N", help="draw N held-out prompts on the schedules found")
    plan.add_argument("--prompts", metavar="FILE", help="to verify with; default: the model's held-out ones")
    plan.add_argument("--plot", metavar="FILE", help="draw the PSNR of --verify (16) over the number of full steps")

    rows = commands.add_parser("rows", help="print the rows of a predictor")
    rows.add_argument("predictor", metavar="PREDICTOR", help="its folder")
    rows.add_argument("--stream", help="cond or uncond; default: its first")
    rows.set_defaults(command=_rows)
    return parser


def _add_comparisons(commands: Any) -> None:
    demo = _command(commands, "demo", _demo, "compare the methods on a few held-out prompts and draw a sheet", EMBEDDED)
    demo.set_defaults(peers=[], fine=None, bound=False, differences=None, predictors=None, only=None, anew=True)
    bench = _command(
        commands, "bench", _bench, "compare the methods on many pairs, with paired differences and the bound"
    )
    bench.add_argument("--predictors", nargs="+", metavar="FOLDER", help="default: those shipped with the model")
    bench.add_argument(
        "--differences", metavar="METHOD", default=DIFFERENCES, help="the one to compare with the rest (LESA)"
    )
    bench.add_argument(
        "--peers", nargs="+", default=[], metavar="NAME", help="other projects' caches, and better samplers; or: all"
    )
    bench.add_argument("--fine", type=_count, metavar="STEPS", help="measure PSNR against a run of more steps, too")
    bench.add_argument("--only", nargs="+", metavar="METHOD", help="the methods of these names alone")
    bench.add_argument("--anew", action="store_true", help="remove the folder's records first, of the same setting")
    bench.add_argument("--no-bound", dest="bound", action="store_false", help="leave out the bound, which records runs")
    sizes = ((demo, 32, 4, "6", "out/demo"), (bench, 200, 10, "10,8,6,5,4", "out/bench"))
    for command, pairs, timed, budgets, out in sizes:
        command.add_argument("--prompts", metavar="FILE", help="one a line; default: the model's held-out prompts")
        command.add_argument(
            "--pairs", type=_count, default=pairs, help=f"how many prompts, the k-th with seed k ({pairs})"
        )
        command.add_argument("--timed", type=int, default=timed, help=f"how many of them are timed ({timed})")
        command.add_argument("--schedules", type=_schedules, help="paper:7,paper:10; of few steps, those at 2x")
        command.add_argument("--budgets", type=_counts, help=f"full steps to plan for ({budgets}; of few steps, half)")
        command.add_argument(
            "--data", metavar="FOLDER", help="to plan on, of lesa collect; default: runs of its prompts"
        )
        command.set_defaults(usual_budgets=budgets)
        command.add_argument("--batch-size", type=_count, default=16)
        command.add_argument(
            "--scores",
            type=_names,
            default=SCORES,
            help=f"besides PSNR and SSIM, some of MS-SSIM,LPIPS,CLIP,ImageReward ({SCORES})",
        )
        command.add_argument(
            "--out", default=out, metavar="FOLDER", help=f"for the records, the report and its plots ({out})"
        )

    report = commands.add_parser("report", help="make tables and plots of a run's records")
    report.add_argument("run", metavar="RUN", help="the folder of a lesa bench")
    report.add_argument("--differences", metavar="METHOD", default=DIFFERENCES, help="the one to compare with the rest")
    report.set_defaults(command=_report)

    changes = commands.add_parser("compare", help="do two runs differ beyond noise? 0 if not, 1 if they do")
    changes.add_argument("first", metavar="RUN", help="the folder of a lesa bench")
    changes.add_argument("second", metavar="RUN", help="another, whose scores are set against it")
    changes.add_argument("--score", default="PSNR", help="PSNR, SSIM or another that both have (PSNR)")
    changes.add_argument("--tolerance", type=float, default=0.01, help="differences up to this do not count (0.01)")
    changes.set_defaults(command=_changes)

    again = _command(commands, "reproduce", _reproduce, "measure a record again: 0 if it is the same, 1 if not", "")
    again.add_argument("records", metavar="FILE", help="the records.jsonl of a lesa bench")
    again.add_argument("line", metavar="LINE", type=_count, help="the record's line, from 1 on")
    again.add_argument("--predictors", nargs="+", metavar="FOLDER", help="default: those shipped with the model")
    again.add_argument("--tolerance", type=float, default=0.01, help="dB of PSNR that count as the same (0.01)")
    again.set_defaults(device=None)


def _add_training(commands: Any) -> None:
    collect = _command(commands, "collect", _collect, "record runs with every step full, to train on; resumable")
    collect.add_argument("--prompts", required=True, metavar="FILE", help="one a line")
    collect.add_argument("--limit", type=_count, help="take the first prompts only")
    collect.add_argument(
        "--seeds",
        type=_seeds,
        help="each prompt with each of 0,3,7 or 0:4; default: one for each prompt, none the same",
    )
    collect.add_argument("--tap", choices=PLACES[:-1], default="feature", help="where features are taken (feature)")
    collect.add_argument("--tokens", type=_count, help="tokens kept of each run; default: a hundredth, or up to 41")
    collect.add_argument("--batch-size", type=_count, default=16)
    collect.add_argument("--out", required=True, metavar="FOLDER")

    calibrate = _command(commands, "calibrate", _calibrate, "a planned schedule and rows from a few runs, in minutes")
    calibrate.add_argument("--prompts", required=True, metavar="FILE", help="one a line")
    calibrate.add_argument("--limit", type=_count, default=8, help="how many of them (8)")
    calibrate.add_argument("--budget", type=_count, default=8, help="full steps (8)")
    calibrate.add_argument("--forecaster", default="lagrange:2", help="what the schedule is planned with (lagrange:2)")
    calibrate.add_argument("--tap", choices=PLACES, default="feature", help="where forecasts are made")
    calibrate.add_argument("--batch-size", type=_count, default=8)
    calibrate.add_argument("--out", required=True, metavar="FOLDER")

    train = _command(commands, "train", _train, "train a predictor on collected runs; resumable; 3 if it was of no use")
    train.epilog = (
        "Exits with 3 where the training gained nothing over what it began with, or its runs end further from their "
        "reference runs than Lagrange rows on the same schedule; the predictor is saved all the same."
    )
    train.add_argument(
        "--data", nargs="+", required=True, metavar="FOLDER", help="what lesa collect wrote; several: lesa-continuous"
    )
    train.add_argument("--validation-prompts", required=True, metavar="FILE", help="one a line; they choose the round")
    train.add_argument("--validation", type=_count, default=32, help="how many of them (32)")
    train.add_argument(
        "--schedule", type=_schedule, help="which steps are full (paper:7; at:0,2 of 4, at:0,1,3,5 of 8)"
    )
    train.add_argument(
        "--budgets", type=_counts, metavar="N", help="plan the schedule, of N full steps; N,M: lesa-continuous"
    )
    train.add_argument("--forecaster", default="lagrange:2", help="what is planned with (lagrange:2)")
    train.add_argument("--tap", choices=PLACES, help="what is forecast (feature, or as --predictor)")
    train.add_argument("--method", choices=("lesa", "lesa-continuous", "l2p"), default="lesa")
    train.add_argument("--history", choices=("full", "all"), default="full", help="of full steps, or of forecasts too")
    train.add_argument("--memories", type=_counts, help="of LESA: how many past features each stage combines (4,8,8)")
    train.add_argument("--loss", choices=("latents", "features", "steps"), default="latents")
    train.add_argument(
        "--paper",
        action="store_true",
        help="the paper's predictor, loss and learning rate, whatever --method, --history and --loss say",
    )
    train.add_argument(
        "--stages",
        type=_stages,
        help="of LESA: how many, with bounds learned from the runs, 'learned' for their number too, or the bounds, "
        "as falling times (0.9,0.5)",
    )
    train.add_argument("--rounds", type=int, default=4, help="of the closed-loop phase (4)")
    train.add_argument("--updates", type=int, nargs=2, default=(200, 200), help="in each phase or round (200 200)")
    train.add_argument(
        "--floor",
        type=float,
        default=-120.0,
        metavar="DB",
        help="drifts far below this are not worth lowering: of several lessons, those above it count for more (-120)",
    )
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--batch-size", type=_count, default=16)
    train.add_argument("--out", required=True, metavar="FOLDER")
    train.add_argument(
        "--predictor",
        metavar="FOLDER",
        help="begin with this trained predictor, whatever --method and --history say; with --budgets a lesa-continuous "
        "is planned for, not a --forecaster",
    )


def _add_flops(commands: Any) -> None:
    words = "count the FLOPs of steps and runs from configurations alone, without weights"
    flops = commands.add_parser("flops", help=words, description=words)
    flops.add_argument(
        "--model", metavar="MODEL", help="folder or hub name of a pipeline; default: the real models, as published"
    )
    flops.add_argument("--steps", type=_count, help="default: the model's own, or 50")
    flops.add_argument("--call", type=_call, default={}, help="""arguments of its call, e.g. '{"height": 512}'""")
    flops.add_argument("--streams", type=_count, help="2 under guidance; default: as the call says")
    flops.add_argument("--text-tokens", type=_count, help="default: as many as prompts are padded to; Qwen-Image: 23")
    flops.add_argument(
        "--schedules", type=_schedules, default="every:1,paper:7,paper:10", help="of --model (every:1,paper:7,paper:10)"
    )
    flops.set_defaults(command=_flops)


def _add_convert(commands: Any) -> None:
    words = "make a predictor of ours of a checkpoint of the authors' released code"
    more = "Nothing in the file is executed. Its KANs may take all S + 1 times of the grid, or S, without the last one."
    convert = commands.add_parser("convert", help=words, description=f"{words}. {more}")
    convert.add_argument("file", metavar="FILE", help="the checkpoint, a .pt file")
    convert.add_argument("--model", choices=CONVERTED, required=True, help="which model it was trained for")
    convert.add_argument("--pipeline", metavar="MODEL", help="another pipeline's folder or hub name, of that class")
    convert.add_argument(
        "--grid",
        required=True,
        help="what it was trained on: steps of the model's own grid (50), all S + 1 times (1.0,0.98,...,0), or a JSON "
        "file that holds them, alone or under 'grid'",
    )
    which = convert.add_mutually_exclusive_group(required=True)
    which.add_argument("--interval", type=_count, help="of the paper's schedule, e.g. 7")
    which.add_argument("--schedule", type=_schedule, help="another schedule, e.g. at:0,2")
    convert.add_argument("--bounds", type=_bounds, help="falling times between stages; default: the paper's")
    convert.add_argument("--tap", choices=PLACES, default="feature", help="where it was trained; default: the paper's")
    convert.add_argument(
        "--order",
        choices=("newest", "oldest"),
        default="newest",
        help="the past feature that a stage's first weight belongs to (newest, as in the paper's equations)",
    )
    convert.add_argument("--out", required=True, metavar="FOLDER")
    convert.set_defaults(command=_convert)


def _command(commands: Any, name: str, run: Any, words: str, model: str | None = None) -> argparse.ArgumentParser:
    """Add a command that runs a model."""
    parser = commands.add_parser(name, help=words, description=words)
    if model is None:
        parser.add_argument("model", metavar="MODEL", help="folder or hub name of a diffusers pipeline")
    else:
        parser.add_argument("--model", default=model, help=f"folder of a diffusers pipeline ({model or 'the one run'})")
    parser.add_argument("--lora", metavar="LORA", help="folder, hub name or file of a LoRA, whose predictors are taken")
    parser.add_argument("--steps", type=_count, help="default: the model's own, or 50")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--offload", choices=OFFLOADS, default="none", help="keep weights in the CPU's memory (none)")
    parser.add_argument("--dtype", help="e.g. bfloat16; default: that of diffusers")
    parser.add_argument("--variant", help="of the weights' files, e.g. fp16")
    parser.add_argument("--revision", help="of the hub repository: a branch, tag or commit")
    parser.add_argument("--vae-tiling", action="store_true", help="decode large pictures and clips in pieces")
    parser.add_argument("--scheduler", type=_call, help="""other settings, e.g. '{"shift": 3.0}'""")
    parser.add_argument("--call", type=_call, default={}, help="""more arguments of its call, e.g. '{"height": 512}'""")
    parser.set_defaults(command=run)
    return parser


def _told(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """Let a reader's own words reach the user, where argparse would say 'invalid value' only."""

    def reader(text: str) -> Any:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return reader


@_told
def _schedule(text: str) -> Any:
    from lesa.rows.schedule import Schedule

    return Schedule.parse(text)


@_told
def _schedules(text: str) -> list[Any]:
    return [_schedule(part) for part in re.split(r",(?=[a-z])", text) if part]


@_told
def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"a whole number, at least 1, is needed, got {text!r}")
    return int(text)


def _names(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


@_told
def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",") if part]


@_told
def _stages(text: str) -> Any:
    if text == LEARNED or text.isdigit():
        return text if text == LEARNED else _count(text)
    return _bounds(text)


@_told
def _bounds(text: str) -> tuple[float, ...]:
    return tuple(float(bound) for bound in text.split(","))


@_told
def _seeds(text: str) -> list[int]:
    first, colon, end = text.partition(":")
    if colon and int(end) - int(first) > MOST_SEEDS:
        raise ValueError(f"at most {MOST_SEEDS} seeds are run, got {text!r}")
    seeds = list(range(int(first), int(end))) if colon else [int(seed) for seed in text.split(",")]
    if not seeds:
        raise ValueError(f"at least one seed is needed, got {text!r}")
    return seeds


@_told
def _call(text: str) -> dict[str, Any]:
    arguments = json.loads(text)
    if not isinstance(arguments, dict):
        raise ValueError(f"a JSON object of arguments is needed, got {text!r}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
