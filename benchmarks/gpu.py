"""Measure FLUX.1-dev, Qwen-Image and HunyuanVideo on a GPU: steps, loops, memory, compiled, offloaded, beside peers.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --tiny

Their transformers at their real configurations with random weights, which cost what trained ones do: nothing is
fetched. The forecaster is an untrained LESA with rows of up to eight terms, on the paper's schedule with 10 full steps
of 50. Rows come in the order of their weight; what a budget of time does not hold is left out, and a row without
figures says why. `--tiny` does the same with small models on the CPU: a test of this script, not of a machine.
"""

import argparse
import gc
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpu_loops import Loop, Moved, chosen, flux_call, materialise, peak, pipeline_of, reset_peak, timing, untrained
from gpu_table import ALL_FULL, OUTPUT, NoTime, Report, Row

import lesa
from lesa.bench import cost, peers
from lesa.bench.models import Model
from lesa.host.offload import place
from lesa.host.runtime import Run

BUDGET = 510
"""Seconds; with what Python needs to start, less than nine minutes."""
SCHEDULE = lesa.Schedule.paper(7)
TAPS = ("norm", OUTPUT)
LAPS, PLAIN_LAPS = 14, 4
"""Steps that are timed one by one: five full and nine skipped; full ones without the library. The first of a run is
left out, as it warms up."""
RATE, BUILD, COPY = 350e12, 10.0, 7.0
"""Guesses: FLOPs a second, until a model's own steps tell; seconds to make a model, and for group offloading to bring
FLUX's weights over and back."""
PEERS = (
    ("TaylorSeer, order 1 (diffusers)", "interval 7"),
    ("TaylorSeer, MLPs too, order 2 (diffusers)", "interval 7"),
    ("TaylorSeer lite, order 1 (diffusers)", "interval 7"),
    ("DBCache (cache-dit)", "mask ultra"),
)
"""Settings of `lesa.bench.peers` that do not look at features: those of random weights would tell nothing."""
EXTRAS = ("accelerate", "torchao", "cache-dit")


@dataclass
class Session:
    """What all measurements share: the report, the device, the end of the time, and what is known of full steps."""

    report: Report
    device: torch.device
    end: float
    full: dict[str, float] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds to the end."""
        return max(0.0, self.end - time.perf_counter())

    def need(self, seconds: float) -> None:
        """Raise NoTime unless so many seconds are left."""
        if seconds > self.left:
            raise NoTime(f"no time: it takes about {seconds:.0f} s, and {self.left:.0f} s were left")

    def full_step(self, model: Model) -> float:
        """Return how long a full step takes, as measured or as guessed."""
        return self.full.get(model.name, (model.published or 0.0) * 1e12 / model.steps / RATE)


@dataclass(frozen=True)
class Case:
    """A way to run a model: what is done to its transformer, and what of it is measured.

    `prepare` returns the call that ends a run, if there is one; `setup` guesses the seconds beside those of the steps,
    `copies` those that a full step takes besides. Without `loops`, single steps alone are measured.
    """

    model: Model
    how: str
    prepare: Callable[[Loop], Callable[[], None] | None] = lambda _: None
    setup: float = 5.0
    copies: float = 0.0
    laps: int = LAPS
    plain_laps: int = PLAIN_LAPS
    loops: bool = True
    moves: bool = False

    def rows(self) -> list[Row]:
        """Return empty rows: of runs with every step full, and accelerated at each tap."""
        places = (ALL_FULL, *TAPS) if self.plain_laps else TAPS
        return [Row(self.model.name, self.how, place) for place in places]

    def measure(self, session: Session, rows: Sequence[Row]) -> None:
        """Fill the rows."""
        session.need(BUILD)
        loop = Loop(self.model, materialise(self.model, session.device), session.device)
        bench = Bench(session, self, loop, self.prepare(loop) or (lambda: None))
        tapped = [row for row in rows if row.tap != ALL_FULL and bench.accepts(row)]
        if not tapped:
            for row in rows:
                row.note = "nothing accelerated to set beside it" if row.tap == ALL_FULL else row.note
            return
        steps = self.plain_laps + len(tapped) * len(full_steps(self.laps))
        session.need(self.setup + steps * (session.full_step(self.model) + self.copies))
        open_rows = [row for row in rows if row.tap == ALL_FULL or row in tapped]
        for part in [bench.single_steps] + [bench.moved] * self.moves + [bench.loop_of] * self.loops:
            for row in open_rows:
                if part == bench.single_steps or row.full_step is not None:
                    with session.report.attempt(row):
                        part(row)


def full_steps(steps: int) -> list[int]:
    """Return which of the first steps of a run are full."""
    return [step for step in SCHEDULE.full_steps(50) if step < steps]


class Bench:
    """A loop that is ready, and what is measured of it; `rest` ends each run."""

    def __init__(self, session: Session, case: Case, loop: Loop, rest: Callable[[], None]):
        self.session, self.case, self.loop, self.rest = session, case, loop, rest
        self.full = session.full_step(case.model)
        self.all_full: float | None = None
        self._predictors: dict[str, lesa.LESA] = {}

    def accelerate(self, row: Row) -> Run:
        """Turn the row's acceleration on."""
        if row.tap not in self._predictors:
            self._predictors[row.tap] = untrained(self.loop, row.tap, str(SCHEDULE))
        return lesa.accelerate(self.loop.transformer, self._predictors[row.tap], grid=self.loop.grid)

    def accepts(self, row: Row) -> bool:
        """Tell whether the transformer, as it is now, can be accelerated; if not, the row says why."""
        try:
            self.accelerate(row).close()
        except Exception as error:
            row.give_up(error)
            return False
        return True

    def single_steps(self, row: Row) -> None:
        """Time steps one by one."""
        device, laps = self.session.device, []
        count = self.case.plain_laps if row.tap == ALL_FULL else len(full_steps(self.case.laps))
        self.session.need(count * (self.full + self.case.copies))
        reset_peak(device)
        if row.tap == ALL_FULL:
            latents = self.loop.walk(steps=self.case.plain_laps, lap=lambda _: timing(device, laps))
            self.full = row.full_step = median(laps[1:])
            self.session.full.setdefault(self.case.model.name, self.full)
        else:
            with self.accelerate(row) as run:
                latents = self.loop.walk(run, self.case.laps, lambda _: timing(device, laps))
                row.history = sum(stream.bytes_held for stream in run.summary().values())
            full = full_steps(self.case.laps)
            row.full_step = median(laps[step] for step in full[1:])
            row.skipped_step = median(lap for step, lap in enumerate(laps) if step not in full)
            row.step_ratio = self.case.model.steps / len(SCHEDULE.full_steps(self.case.model.steps))
        row.peak = peak(device)
        self.rest()
        if not latents.isfinite().all():
            raise ArithmeticError("the latents are not finite")
        row.note = "" if self.case.loops else "single steps alone are measured"

    def moved(self, row: Row) -> None:
        """Count what goes to and from the GPU in the first step, in a later full and a skipped one, and at the end."""
        if row.tap == ALL_FULL:
            return
        self.session.need(2 * (self.full + self.case.copies))
        counters, schedule = [Moved() for _ in range(4)], lesa.Schedule.at([0, 1])
        transformer, grid = self.loop.transformer, self.loop.grid
        with lesa.accelerate(transformer, lesa.Reuse(), schedule=schedule, grid=grid, tap=row.tap) as run:
            self.loop.walk(run, 3, counters.__getitem__)
        with counters[3]:
            self.rest()
        row.moved = [counter.total for counter in counters]

    def loop_of(self, row: Row) -> None:
        """Time a whole loop, after a step that compiles its plan."""
        steps, laps = self.case.model.steps, []
        if row.tap == ALL_FULL:
            self.session.need(steps * self.full)
            with timing(self.session.device, laps):
                self.loop.walk()
            self.all_full = laps[0]
        else:
            self.session.need((len(SCHEDULE.full_steps(steps)) + 1) * self.full)
            with self.accelerate(row) as run:
                self.loop.walk(run, 1)
                self.rest()
                with timing(self.session.device, laps):
                    self.loop.walk(run)
            row.loop = laps[0]
        row.all_full = self.all_full
        self.rest()


# --- what is done to a transformer


def float8(loop: Loop) -> None:
    """Hold the weights of all linear layers in float8, and leave how later rows are compiled as it is."""
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(loop.transformer, Float8WeightOnlyConfig(set_inductor_config=False))


def compiler(loop: Loop) -> dict[str, Any]:
    """Return torch.compile's own settings on a GPU; on the CPU what needs no C++ compiler."""
    return {} if loop.device.type == "cuda" else dict(backend="eager")


def compile_blocks(loop: Loop) -> None:
    """Compile the repeated blocks."""
    transformer: Any = loop.transformer
    transformer.compile_repeated_blocks(fullgraph=True, **compiler(loop))


def compile_whole(loop: Loop) -> None:
    """Compile the transformer as a whole."""
    loop.transformer.compile(**compiler(loop))


def offload(way: str, loop: Loop) -> Callable[[], None]:
    """Offload in one of the ways of `lesa.host.offload`; a pipeline ends its runs with the call that is returned."""
    pipe = pipeline_of(loop)
    place(pipe, str(loop.device), way)
    return pipe.maybe_free_model_hooks


# --- other projects' caches


@dataclass(frozen=True)
class Peers:
    """Other projects' caches, in FLUX's pipeline without text encoders and decoder."""

    model: Model

    def rows(self) -> list[Row]:
        """Return an empty row for each."""
        return [Row(self.model.name, ", ".join(key), "-") for key in PEERS]

    def measure(self, session: Session, rows: Sequence[Row]) -> None:
        """Fill the rows."""
        step = session.full_step(self.model)
        session.need(BUILD + 2 * self.model.steps * step)
        loop = Loop(self.model, materialise(self.model, session.device), session.device)
        pipe, call = pipeline_of(loop), flux_call(loop)
        flops = (cost.flops(pipe, lambda: pipe(**{**call, "num_inference_steps": 2})) or 0) / 2 * self.model.steps
        all_full = seconds_of(pipe, call)
        methods = {method.key: method for method in peers.line_up(["taylorseer", "dbcache"], self.model.steps, "")}
        for row, key in zip(rows, PEERS, strict=True):
            with session.report.attempt(row):
                session.need(2 * self.model.steps * step)
                with methods[key].switch(pipe):
                    reset_peak(session.device)
                    counted = cost.flops(pipe, lambda: pipe(**call))
                    row.loop, row.all_full, row.peak = seconds_of(pipe, call), all_full, peak(session.device)
                row.step_ratio = flops / counted if counted else None
                row.note = "step ratio: of FLOPs"


def seconds_of(pipe: Any, call: Mapping[str, Any]) -> float:
    """Time the denoising loop of a call."""
    watch = cost.Watch(pipe)
    with watch.timing():
        pipe(**call, callback_on_step_end=watch.on_step_end)
    return watch.seconds


# --- all of it


def line_up(models: Sequence[Model]) -> list[Case | Peers]:
    """Return what is measured, the most important first."""
    flux, qwen, video = models
    blocks = partial(Case, how="repeated blocks compiled", prepare=compile_blocks)
    return [
        Case(flux, "bfloat16", setup=20),
        Case(qwen, "bfloat16"),
        Case(video, "bfloat16"),
        Case(flux, "float8 weights (torchao)", float8, setup=15),
        blocks(flux, setup=70),
        Case(flux, "model offloading", partial(offload, "model"), setup=60, moves=True),
        Peers(flux),
        Case(flux, "transformer compiled as a whole", compile_whole, setup=150),
        Case(
            flux,
            "group offloading",
            partial(offload, "group"),
            setup=60,
            copies=COPY,
            laps=6,
            plain_laps=0,
            loops=False,
            moves=True,
        ),
        blocks(qwen, setup=60, loops=False),
        blocks(video, setup=60, loops=False),
    ]


@contextmanager
def ending(seconds: float) -> Iterator[None]:
    """Raise NoTime inside when so many seconds are over, whatever is done then; not if none are left."""

    def end(*_: object) -> None:
        raise NoTime("stopped as the time was over")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)  # zero sets none
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def run(cases: Sequence[Case | Peers], rows: Sequence[Sequence[Row]], session: Session) -> None:
    """Measure one case after the other; of each, nothing is left when the next begins."""
    for case, mine in zip(cases, rows, strict=True):
        print(f"{mine[0].model}, {mine[0].how}: {session.left:.0f} s left", file=sys.stderr)
        with session.report.attempt(*mine), ending(session.left):
            case.measure(session, mine)
        gc.collect()
        if session.device.type == "cuda":
            torch.cuda.empty_cache()
        torch.compiler.reset()


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine, with the versions of what need not be installed."""
    facts = cost.machine()
    if device.type == "cuda":
        facts["memory"] = f"{torch.cuda.get_device_properties(device).total_memory / 1e9:.0f} GB"
    for package in EXTRAS:
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    return facts


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    parser.add_argument("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"at most ({BUDGET})")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="the folder of report.json and report.md")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        parser.error("a GPU is needed, and torch sees none; --tiny runs small models on the CPU.")
    end = time.perf_counter() + options.budget
    device = torch.device("cpu" if options.tiny else "cuda")
    cases = line_up(chosen(options.tiny))
    rows = [case.rows() for case in cases]
    report = Report(options.out, machine(device), [row for mine in rows for row in mine], judged=not options.tiny)
    run(cases, rows, Session(report, device, end))
    print(report.markdown())


if __name__ == "__main__":
    main()
