"""The command `lesa`: thin glue; whatever is heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

EMBEDDED = "models/emoji-flux"
PLACES = ("feature", "norm", "projection", "output")
VALIDATION_SEED, TRAINING_SEED = 1_000_000, 2_000_000  # the first ones; held-out pairs count from 0, so none coincide
LEARNED = "learned"
USER_ERRORS = (ValueError, LookupError, OSError, RuntimeError, ImportError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors that a user can cause end as one line, and 2."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        options.command(options)
    except KeyboardInterrupt:
        print("lesa: stopped", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if options.traceback or isinstance(error, (KeyError, IndexError)):
            raise
        print(f"lesa: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


# --- commands


def _demo(options: argparse.Namespace) -> None:
    _compare(options, reuse=False)


def _bench(options: argparse.Namespace) -> None:
    _compare(options, reuse=True)


def _compare(options: argparse.Namespace, reuse: bool) -> None:
    from lesa import benchmark, report

    out = _folder(options.out)
    source = options.prompts or Path(options.model) / "prompts" / "heldout.txt"
    prompts = _prompts(source, options.pairs)
    seeds = range(len(prompts))
    pipe, predictors = _pipeline(options), _predictors(options.model, options.predictors, variants=reuse)
    methods = benchmark.line_up(options.steps, options.schedules, predictors, reuse=reuse)
    if options.budgets:
        planner = _planner(options, pipe)
        planned = benchmark.line_up_planned(
            options.budgets, planner.grid, _finder(planner), predictors, reuse=reuse, only=options.only
        )
        methods += [method for method in planned if method not in methods]
    if options.only:
        if unknown := set(options.only) - {method.name for method in methods}:
            raise ValueError(f"the methods are {', '.join(dict.fromkeys(m.name for m in methods))}, got {unknown}.")
        methods = [method for method in methods if method.name in options.only]
    facts = dict(batch_size=options.batch_size, recognise=benchmark.recogniser(options.model))
    comparison = benchmark.compare(pipe, methods, prompts, seeds, timed=options.timed, **facts)
    if options.bound:
        benchmark.add_bounds(comparison, pipe, prompts, seeds, options.schedules, **facts)
    report.write_results(out / "results.json", comparison, model=str(options.model))
    report.sheet(comparison).save(out / "pictures.png")
    print(f"\n{len(prompts)} prompts of {source}, {options.steps} steps\n\n{report.table(comparison.results())}\n")
    if options.differences:
        print(f"{report.differences(comparison, options.differences)}\n")
    print(f"{out / 'results.json'}\n{out / 'pictures.png'}")


def _generate(options: argparse.Namespace) -> None:
    import torch
    from PIL import Image

    from lesa.runtime import accelerate

    if Path(options.out).suffix.lower() not in Image.registered_extensions():
        raise ValueError(f"--out names a picture file such as picture.png, got {options.out!r}.")
    _folder(Path(options.out).parent)
    pipe = _pipeline(options)
    seeded = dict(generator=torch.Generator().manual_seed(options.seed))
    if options.full:
        pipe(options.prompt, **seeded).images[0].save(options.out)
    else:
        with accelerate(pipe, _forecaster(options), schedule=options.schedule) as run:
            pipe(options.prompt, **seeded).images[0].save(options.out)
        print(run.summary())
    print(options.out)


def _plan(options: argparse.Namespace) -> None:
    from time import monotonic

    from lesa.trajectory import Store

    pipe, began = _pipeline(options), monotonic()
    planner = _planner(options, pipe, Store.open(options.data) if options.data else None)
    forecaster, planned = _forecaster(options), []
    for budget in options.budgets:
        schedule = _finder(planner, options.refine)(forecaster, budget)
        real = f", {planner.real(forecaster, schedule):.1f} dB in real runs" if planner.guided else ""
        drift = planner.drift(forecaster, schedule.full_steps(options.steps))
        print(f"{schedule}  {schedule.draw(options.steps)}  drift {drift:.1f} dB{real}", flush=True)
        planned.append(schedule)
    print(f"planned in {monotonic() - began:.1f} s, the runs included", file=sys.stderr)
    if options.verify or options.plot:
        _verify(options, pipe, forecaster, planned)


def _verify(options: argparse.Namespace, pipe: Any, forecaster: Any, planned: Sequence[Any]) -> None:
    """Draw held-out prompts on planned schedules: recorded runs do not drift, these do."""
    from lesa import benchmark, report

    prompts = _prompts(options.prompts or Path(options.model) / "prompts" / "heldout.txt", options.verify or 16)
    methods = [benchmark.forecast(repr(forecaster), forecaster, schedule) for schedule in planned]
    methods += [benchmark.fewer_steps(budget) for budget in options.budgets]
    comparison = benchmark.compare(pipe, methods, prompts, range(len(prompts)), timed=0)
    print(f"\n{len(prompts)} held-out prompts\n\n{report.table(comparison.results())}")
    if options.plot:
        report.budget_curve(comparison.results(), options.plot)
        print(f"\n{options.plot}")


def _planner(options: argparse.Namespace, pipe: Any, store: Any = None) -> Any:
    """Make a planner of recorded runs: those of a store, or some of the prompts that the model was trained on."""
    from lesa.collect import record
    from lesa.planning import PLANNED_ON, Planner
    from lesa.tap import tap_of
    from lesa.trajectory import draw_tokens

    tap = tap_of(pipe.transformer, getattr(options, "tap", "feature"))
    if store is not None:
        tap = _recorded(store, tap) if hasattr(options, "tap") else tap._replace(module=store.collection.tap)
        first = [store.load(k) for k in range(min(PLANNED_ON, len(store)))]
        return Planner.of(pipe, first, tap, **store.collection.call)
    prompts = _prompts(Path(options.model) / "prompts" / "train.txt", PLANNED_ON)
    seeds = range(TRAINING_SEED, TRAINING_SEED + len(prompts))
    return Planner.of(pipe, record(pipe, prompts, seeds, draw_tokens), tap)


def _finder(planner: Any, refine: bool | None = None) -> Callable[[Any, int], Any]:
    """Return what finds a schedule for a forecaster and a budget: real runs choose it where there is guidance."""
    refine = planner.guided if refine is None else refine
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
    from lesa import plan
    from lesa.predictor import Predictor

    predictor = Predictor.from_pretrained(options.predictor)
    stream = options.stream or predictor.origin.streams[0]
    print(plan.compile(predictor.for_stream(stream), predictor.grid, predictor.schedule))


def _collect(options: argparse.Namespace) -> None:
    from lesa.collect import collect
    from lesa.tap import tap_of

    prompts = _prompts(options.prompts, options.limit)
    pairs = [(prompt, seed) for k, prompt in enumerate(prompts) for seed in options.seeds or [TRAINING_SEED + k]]
    pipe = _pipeline(options)
    store = collect(
        pipe,
        [prompt for prompt, _ in pairs],
        [seed for _, seed in pairs],
        options.out,
        model=options.model,
        tokens=options.tokens,
        batch_size=options.batch_size,
        tap=tap_of(pipe.transformer, options.tap),
        num_inference_steps=options.steps,
        **options.call,
    )
    print(f"{len(store)} runs in {options.out}, digest {store.digest()}")


def _train(options: argparse.Namespace) -> None:
    from lesa import report, tap, training
    from lesa.collect import fingerprint, record
    from lesa.runtime import accelerate
    from lesa.trajectory import Store, Trajectory

    _check_training(options)
    stores, pipe = [Store.open(folder) for folder in options.data], _pipeline(options)
    for store, folder in zip(stores, options.data, strict=True):
        if fingerprint(pipe) != store.collection.weights:
            raise ValueError(f"{folder} was collected from other weights than those of {options.model}; collect anew.")
        if not len(store):
            raise ValueError(f"training needs recorded runs, and {folder} holds none; run lesa collect.")
    out, prompts = _folder(options.out), _prompts(options.validation_prompts, options.validation)
    seeds = range(VALIDATION_SEED, VALIDATION_SEED + len(prompts))
    where = tap.tap_of(pipe.transformer, options.tap)
    pipe.transformer.requires_grad_(False)  # the head is differentiated, and nothing of it is trained

    def runs(like: Trajectory, prompts: Sequence[str], seeds: Sequence[int]) -> list[Trajectory]:
        recorded: list[Trajectory] = []
        for k in range(0, len(prompts), options.batch_size):
            part = slice(k, k + options.batch_size)
            recorded += record(pipe, prompts[part], seeds[part], like.tokens, where, **calls[tuple(like.grid.tolist())])
        return recorded

    def record_runs(predictor: Any, lesson: Any) -> tuple[list[Trajectory], list[Trajectory]]:
        first = lesson.reference[0]
        with accelerate(pipe, predictor, schedule=lesson.schedule):
            trained = runs(first, [run.prompt for run in lesson.reference], [run.seed for run in lesson.reference])
            return trained, runs(first, prompts, seeds)

    calls, lessons = {}, []
    for store in stores:
        reference = list(store)
        calls[tuple(reference[0].grid.tolist())] = store.collection.call
        validation = runs(reference[0], prompts, seeds)
        for schedule in _schedules_to_learn(options, pipe, store):
            lessons.append(training.Lesson(reference, validation, schedule))
    predictor = _untrained(options, pipe, stores, lessons)
    if options.loss == "steps":
        training.least_squares(predictor, lessons[0].reference)
        predictor.save_pretrained(out)
        return print(out)
    recipe = training.Config.paper() if options.paper else training.Config(loss=options.loss)
    config = replace(recipe, rounds=options.rounds, updates=tuple(options.updates), seed=options.seed)
    head = tap.head(pipe.transformer, where)
    if options.stages:
        predictor = _staged(predictor, options.stages, lessons[0], head)
    result = training.train(predictor, lessons, head, record_runs, config, out / "rounds")
    result.predictor.save_pretrained(out)
    earlier = result.ground_truth
    earlier.origin = replace(earlier.origin, training={**earlier.origin.training, "phase": "ground-truth"})
    earlier.save_pretrained(out / "ground-truth")
    report.training_curve(result.curve, out / "training.png")
    print("\n".join(f"round {k}: drift {score:.2f} dB" for k, score in enumerate(result.scores)))
    print(out)


def _check_training(options: argparse.Namespace) -> None:
    if options.paper:
        options.method, options.history, options.loss = "lesa", "all", "features"
    if options.stages and options.method != "lesa":
        raise ValueError("--stages are those of LESA: they need --method lesa.")
    if options.loss == "steps" and options.method != "l2p":
        raise ValueError("--loss steps fits each step alone, which free rows can: it needs --method l2p.")
    if len(options.data) * len(options.budgets or [0]) > 1 and options.method != "lesa-continuous":
        raise ValueError(
            f"--method {options.method} learns one grid and one schedule, got {len(options.data)} collections and "
            f"{len(options.budgets or [0])} budgets; name one of each, or take --method lesa-continuous."
        )


def _schedules_to_learn(options: argparse.Namespace, pipe: Any, store: Any) -> list[Any]:
    """Return the schedule named, or one planned for each budget."""
    if not options.budgets:
        return [options.schedule]
    planner, forecaster = _planner(options, pipe, store), _forecaster(options)
    found = [_finder(planner)(forecaster, budget) for budget in options.budgets]
    print("\n".join(f"planned: {schedule}  {schedule.draw(planner.steps)}" for schedule in found), flush=True)
    return found


def _staged(predictor: Any, stages: Any, lesson: Any, head: Any) -> Any:
    """Make a LESA anew with other stages: with these bounds, with so many learned ones, or with as many as pay."""
    from lesa.planning import PLANNED_ON, Planner
    from lesa.predictor import LESA
    from lesa.stages import choose, learn

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


def _calibrate(options: argparse.Namespace) -> None:
    """Collect, plan and train, with few runs and few updates; the round is chosen on the same prompts, other seeds."""
    runs = Path(options.out) / "runs"
    at = "feature" if options.tap == "output" else options.tap
    few = argparse.Namespace(**{**vars(options), "out": runs, "seeds": None, "tokens": None, "tap": at})
    _collect(few)
    chosen = dict(method="l2p", history="full", loss="latents", paper=False, rounds=1, updates=(100, 100), seed=0)
    data = dict(data=[runs], budgets=[options.budget], predictor=None, stages=None)
    chosen |= dict(validation_prompts=options.prompts, validation=options.limit)
    _train(argparse.Namespace(**{**vars(few), **chosen, **data, "out": options.out, "tap": options.tap}))


def _untrained(options: argparse.Namespace, pipe: Any, stores: Sequence[Any], lessons: Sequence[Any]) -> Any:
    import diffusers
    import torch

    from lesa.predictor import L2P, LESA, ContinuousLESA, Origin, configuration
    from lesa.tap import tap_of

    settings = {name: getattr(options, name) for name in ("loss", "rounds", "updates", "seed", "history", "paper")}
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
    if options.paper:
        return LESA.paper(origin)
    if options.method == "lesa-continuous":
        schedules: dict[tuple[float, ...], list[str]] = {}
        for lesson in lessons:
            schedules.setdefault(tuple(lesson.reference[0].grid.tolist()), []).append(str(lesson.schedule))
        return ContinuousLESA(origin, schedules=list(schedules.items()))
    kind = LESA if options.method == "lesa" else L2P
    return kind(origin, remembers_forecasts=options.history == "all")


# --- what commands share


def _pipeline(options: argparse.Namespace) -> Any:
    """Load the model with the call arguments given; sets `options.steps` to the steps of its runs."""
    import torch
    from transformers.utils import logging

    from lesa.pipelines import CALL_FILE, load, with_call

    if options.dtype and not isinstance(getattr(torch, options.dtype, None), torch.dtype):
        raise ValueError(f"a dtype is one of torch's, such as bfloat16, got {options.dtype!r}.")
    logging.disable_progress_bar()  # of the weights of each component; that of the components stays
    own = Path(options.model) / CALL_FILE
    steps = json.loads(own.read_text()).get("num_inference_steps", 50) if own.exists() else 50
    options.steps = options.steps or options.call.pop("num_inference_steps", None) or steps
    pipe = load(options.model, **({"torch_dtype": getattr(torch, options.dtype)} if options.dtype else {}))
    try:
        pipe.to(options.device)
    except AssertionError as error:  # what torch raises for a device that it was not built for
        raise ValueError(f"the device {options.device!r} cannot be used here: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return with_call(pipe, {**options.call, "num_inference_steps": options.steps})


def _predictors(model: str, named: Sequence[str] | None, variants: bool) -> list[Any]:
    """Load the predictors named, or else those shipped with the model; with the `variants` in their folders, or not."""
    from lesa.predictor import CONFIG_FILE, SHIPPED_FOLDER, Predictor

    places = [f"{SHIPPED_FOLDER}/*/{CONFIG_FILE}"] + [f"{SHIPPED_FOLDER}/*/*/{CONFIG_FILE}"] * variants
    found = [path.parent for place in places for path in Path(model).glob(place)]
    shipped = sorted(path for path in found if path.name != "rounds")
    folders = shipped if named is None else named
    if not folders:
        print(f"no predictor lies in {Path(model) / SHIPPED_FOLDER}: rows without training only", file=sys.stderr)
    return [Predictor.from_pretrained(folder) for folder in folders]


def _forecaster(options: argparse.Namespace) -> Any:
    """Return what is named: a predictor, or 'reuse', 'taylor:2' or 'lagrange:1'; None is the predictor shipped."""
    from lesa.forecasters import Lagrange, Reuse, Taylor
    from lesa.predictor import Predictor

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
    from lesa.collect import read_prompts

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
    plan.add_argument(
        "--refine",
        action=argparse.BooleanOptionalAction,
        help="choose by real runs among plans of more and more caution; default: where there is guidance",
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
    demo.set_defaults(bound=False, differences=None, predictors=None, only=None)
    bench = _command(
        commands, "bench", _bench, "compare the methods on many pairs, with paired differences and the bound"
    )
    bench.add_argument("--predictors", nargs="+", metavar="FOLDER", help="default: those shipped with the model")
    bench.add_argument(
        "--differences", metavar="METHOD", default="LESA", help="the one to compare with the rest (LESA)"
    )
    bench.add_argument("--only", nargs="+", metavar="METHOD", help="the methods of these names alone")
    bench.add_argument("--no-bound", dest="bound", action="store_false", help="leave out the bound, which records runs")
    sizes = ((demo, 32, 4, "6", "out/demo"), (bench, 200, 10, "10,8,6,5,4", "out/bench"))
    for command, pairs, timed, budgets, out in sizes:
        command.add_argument("--prompts", metavar="FILE", help="one a line; default: the model's held-out prompts")
        command.add_argument(
            "--pairs", type=_count, default=pairs, help=f"how many prompts, the k-th with seed k ({pairs})"
        )
        command.add_argument("--timed", type=int, default=timed, help=f"how many of them are timed ({timed})")
        command.add_argument("--schedules", type=_schedules, default="paper:7,paper:10", help="paper:7,paper:10")
        command.add_argument("--budgets", type=_counts, default=budgets, help=f"full steps to plan for ({budgets})")
        command.add_argument("--batch-size", type=_count, default=16)
        command.add_argument("--out", default=out, metavar="FOLDER", help=f"for results.json and pictures.png ({out})")


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

    train = _command(commands, "train", _train, "train a predictor on collected runs; resumable")
    train.add_argument(
        "--data", nargs="+", required=True, metavar="FOLDER", help="what lesa collect wrote; several: lesa-continuous"
    )
    train.add_argument("--validation-prompts", required=True, metavar="FILE", help="one a line; they choose the round")
    train.add_argument("--validation", type=_count, default=32, help="how many of them (32)")
    train.add_argument("--schedule", type=_schedule, default="paper:7", help="which steps are full (paper:7)")
    train.add_argument(
        "--budgets", type=_counts, metavar="N", help="plan the schedule, of N full steps; N,M: lesa-continuous"
    )
    train.add_argument("--forecaster", default="lagrange:2", help="what is planned with (lagrange:2)")
    train.add_argument("--tap", choices=PLACES, default="feature", help="what is forecast (feature)")
    train.add_argument("--method", choices=("lesa", "lesa-continuous", "l2p"), default="lesa")
    train.add_argument("--history", choices=("full", "all"), default="full", help="of full steps, or of forecasts too")
    train.add_argument("--loss", choices=("latents", "features", "steps"), default="latents")
    train.add_argument(
        "--paper",
        action="store_true",
        help="the paper's predictor, loss and learning rate, whatever the three above say",
    )
    train.add_argument(
        "--stages",
        type=_stages,
        help="of LESA: how many, with bounds learned from the runs, 'learned' for their number too, or the bounds, "
        "as falling times (0.9,0.5)",
    )
    train.add_argument("--rounds", type=int, default=4, help="of the closed-loop phase (4)")
    train.add_argument("--updates", type=int, nargs=2, default=(200, 200), help="in each phase or round (200 200)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--batch-size", type=_count, default=16)
    train.add_argument("--out", required=True, metavar="FOLDER")
    train.set_defaults(predictor=None)


def _command(commands: Any, name: str, run: Any, words: str, model: str | None = None) -> argparse.ArgumentParser:
    """Add a command that runs a model."""
    parser = commands.add_parser(name, help=words, description=words)
    if model is None:
        parser.add_argument("model", metavar="MODEL", help="folder or hub name of a diffusers pipeline")
    else:
        parser.add_argument("--model", default=model, help=f"folder of a diffusers pipeline ({model})")
    parser.add_argument("--steps", type=_count, help="default: the model's own, or 50")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", help="e.g. bfloat16; default: that of diffusers")
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
    from lesa.schedule import Schedule

    return Schedule.parse(text)


@_told
def _schedules(text: str) -> list[Any]:
    return [_schedule(part) for part in re.split(r",(?=[a-z])", text) if part]


@_told
def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"a whole number, at least 1, is needed, got {text!r}")
    return int(text)


@_told
def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",") if part]


@_told
def _stages(text: str) -> Any:
    if text == LEARNED or text.isdigit():
        return text if text == LEARNED else _count(text)
    return tuple(float(bound) for bound in text.split(","))


@_told
def _seeds(text: str) -> list[int]:
    first, colon, end = text.partition(":")
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
