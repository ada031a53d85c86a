"""Count what a calibration of real models takes: transformer runs, bytes on disk, memory of the host.

    python benchmarks/calibration_cost.py
    python benchmarks/calibration_cost.py --measure

Nothing is fetched and no real model runs: their configurations are made on the `meta` device, where their own pipelines
say which latents they have. What a calibration runs is counted by the limits that its code keeps, so most counts are
what it takes at most: `lesa.calibrate` ends a search, rounds and refinement where nothing is gained. Memory and bytes
are those of the very objects that it keeps, of these sizes.

`--measure` calibrates a FLUX of real width, one double and two single blocks, with random weights in bfloat16 at
256 pixels, and prints what was counted, how much the process grew and what lies on disk, beside the limits.
"""

from __future__ import annotations

import argparse
import inspect
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lesa
from lesa.bench.cost import Memory
from lesa.bench.models import MODELS, build
from lesa.bench.report import markdown
from lesa.host.tap import OUTPUT, tap_of
from lesa.learn.calibrate import CalibrateOptions, split
from lesa.learn.counted import ELEMENTS, Recording
from lesa.learn.expected import KINDS, ROUNDS, Runs, directions, most_runs
from lesa.predictors import Origin, configuration
from lesa.predictors.shelf import Shelf
from lesa.predictors.solved import STREAMS, Solved

CALLS, BUDGETS, ONE = 12, (10, 8, 6, 4), 10
"""How many calls are given, the budgets of the curve, and the one that is calibrated alone."""
HEADS = ("model", "full steps", *KINDS, "all", "S + rounds, of one prompt and stream")
SPACE = ("model", "full steps", "kept, MB", "at the peak, MB", "of it pictures, MB", "on disk, MB")


# --- memory and disk


@dataclass(frozen=True)
class Space:
    """Bytes: what a calibration keeps in memory, what it holds at its peak, how much of that are pictures; on disk."""

    kept: int
    peak: int
    pictures: int
    disk: int


def space(runs: Runs, budgets: Sequence[int], numbers: int, picture: tuple[int, ...], origin: Origin) -> Space:
    """Measure what is kept of runs whose latents have so many numbers, on objects of that size.

    Beside all that is kept the peak has the most of three moments: one call's equations in double precision; what is
    held while rows are refined, parts of the last latents of one run for each direction; the pictures of runs, of the
    newest of them before they are 8-bit. Pictures that come as PIL's are 8-bit at once, and clips are floats.
    """
    budget, eight_bit = max(budgets), torch.Size(picture).numel()
    sampled = recorded(numbers, 1, 1)[0]
    whole, partly = (sum(recorded(numbers, runs.steps, kept)) for kept in (runs.steps, budget))
    last = sum(recorded(numbers, runs.steps, 0))
    pictures = (runs.solved_on + runs.checked + 1) * eight_bit
    kept = runs.solved_on * whole + runs.checked * last + pictures + runs.steps**2 * 8
    columns = 2 * (2 * runs.steps + 3 * budget) * sampled // 2  # a velocity is half of a tick; doubles are twice that
    sample = recorded(min(numbers, ELEMENTS), 1, 0)[1]
    moved = runs.solved_on * (directions(budget) * sample + 4 * partly) + 6 * directions(budget) * sample
    drawn = runs.checked * (eight_bit + last) + eight_bit * (4 if len(picture) > 3 else 1)
    live = 3 * runs.solved_on * partly
    peak = kept + max(columns + live, moved, drawn)
    return Space(kept, peak, pictures + (drawn if peak == kept + drawn else 0), on_disk(origin, budgets, picture))


def recorded(numbers: int, steps: int, kept: int) -> tuple[int, int]:
    """Return the bytes that a run's recording holds of its steps to keep, and of its last latents."""
    one, x = Recording(None, 1, range(kept)), torch.zeros(1, numbers)  # type: ignore[arg-type]
    for _ in range(min(steps, kept)):
        one.add(x, x)
    one.end(x)
    tensors = [*one.velocities.values(), *one._latents.values()]
    return sum(x.nbytes for x in tensors), one.final.nbytes


def on_disk(origin: Origin, budgets: Sequence[int], picture: tuple[int, ...]) -> int:
    """Return the bytes of predictors, twice as they go from the journal to the shelf, and of the worst pictures, two
    for each budget, as if they could not be compressed."""
    found = 0
    for budget in budgets:
        steps = len(origin.grid) - 1
        schedule = str(lesa.Schedule.at([k * steps // budget for k in range(budget)]))
        facts = {**vars(origin), "schedule": schedule}
        with tempfile.TemporaryDirectory() as folder:
            Solved(Origin(**facts)).save_pretrained(folder)
            found += 2 * size_of(Path(folder))
    return found + 2 * len(budgets) * torch.Size(picture[-3:]).numel()


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# --- the real models


@dataclass(frozen=True)
class Real:
    """A real model: what its pipeline says of its latents, the picture it draws, and how it is run."""

    name: str
    runs: Runs
    numbers: int
    picture: tuple[int, ...]
    transformer: Any

    @property
    def origin(self) -> Origin:
        kind, tap = type(self.transformer).__name__, tap_of(self.transformer, OUTPUT)
        grid = tuple(1 - k / self.runs.steps for k in range(self.runs.steps + 1))
        return Origin(self.name, kind, configuration(self.transformer), tap, grid, "at:0", STREAMS)


def reals() -> list[Real]:
    """Return FLUX.1-dev, Qwen-Image with guidance, and Wan 2.2 A14B, guided, at 81 frames of 480 x 832."""
    import diffusers

    found = []
    for model, kind in zip(MODELS[:2], (diffusers.FluxPipeline, diffusers.QwenImagePipeline), strict=True):
        pipe, (height, width) = bare(kind, transformer=build(model)), model.size[:2]
        given = (1, pipe.transformer.config.in_channels // 4, height, width, torch.bfloat16, "meta", None)
        latents = pipe.prepare_latents(*given)
        numbers = (latents[0] if isinstance(latents, tuple) else latents).numel()
        runs = Runs(model.steps, model.streams)
        name = f"{model.name.rpartition('/')[2]}, {height} px"
        found.append(Real(name, runs, numbers, (height, width, 3), pipe.transformer))
    return [*found, wan()]


def wan(steps: int = 40, shift: float = 3.0, boundary: float = 0.875) -> Real:
    """Return Wan 2.2 A14B as its page on the hub runs it: two denoisers, the first one until noise is at the boundary.

    The transformers are of the class's own default sizes.
    """
    import diffusers

    with torch.device("meta"):
        transformer = diffusers.WanTransformer3DModel()
    pipe = bare(diffusers.WanPipeline, transformer=transformer, transformer_2=transformer, boundary_ratio=boundary)
    latents = pipe.prepare_latents(1, transformer.config.in_channels, 480, 832, 81, torch.float32, "meta")
    facts = dict(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler = diffusers.UniPCMultistepScheduler(**facts)
    scheduler.set_timesteps(steps)
    second = int((scheduler.timesteps >= boundary * scheduler.config.num_train_timesteps).sum())
    runs = Runs(steps, 2, (0, second))
    return Real("Wan 2.2 A14B, 81 frames of 480 x 832", runs, latents.numel(), (81, 480, 832, 3), transformer)


def bare(kind: Any, **parts: Any) -> Any:
    """Make a pipeline of these parts alone."""
    known = inspect.signature(kind.__init__).parameters
    needed = [name for name, one in known.items() if one.default is one.empty and name != "self"]
    return kind(**(dict.fromkeys(needed) | parts))


def tables() -> str:
    """Return what the real models take, as two tables."""
    counts, sizes = [], []
    for real in reals():
        for budgets in ((ONE,), BUDGETS):
            name = ", ".join(map(str, budgets))
            found = most_runs(real.runs, budgets)
            greedy = real.runs.steps + (1 + ROUNDS) * sum(budgets)
            cells = [f"{count:,}" for count in (*found.values(), sum(found.values()))]
            counts.append((real.name, name, *cells, f"{greedy}"))
            room = space(real.runs, budgets, real.numbers, real.picture, real.origin)
            sizes.append((real.name, name, *(f"{x / 1e6:.1f}" for x in vars(room).values())))
    return f"{markdown(HEADS, counts, text=2)}\n\n{markdown(SPACE, sizes, text=2)}"


# --- a real width, measured


def wide(layers: int = 1, single_layers: int = 2) -> Any:
    """Make a FluxPipeline of real width with random weights in bfloat16, which takes embeddings alone."""
    import diffusers

    torch.manual_seed(0)
    config = dict(MODELS[0].config, num_layers=layers, num_single_layers=single_layers)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        transformer = diffusers.FluxTransformer2DModel.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(dict(MODELS[0].scheduler))
    pipe = bare(diffusers.FluxPipeline, transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def embedded(config: Mapping[str, Any], seed: int, tokens: int = 64) -> dict[str, Any]:
    """Return a call with random embeddings of a prompt."""
    drawn = torch.Generator().manual_seed(seed)
    text = torch.randn(1, tokens, config["joint_attention_dim"], generator=drawn).bfloat16()
    pooled = torch.randn(1, config["pooled_projection_dim"], generator=drawn).bfloat16()
    return dict(prompt_embeds=text, pooled_prompt_embeds=pooled)


def measure(budget: int = 3, steps: int = 6, calls: int = 3, pixels: int = 256, most: int = 2, refine: int = 1) -> str:
    """Calibrate a FLUX of real width, and return what that took beside the limits."""
    began, pipe = time.perf_counter(), wide()
    options = CalibrateOptions(checked=1, most=most, refine=refine, pictures=False, progress=False)
    given = [embedded(pipe.transformer.config, seed) for seed in range(calls)]
    made, memory = time.perf_counter() - began, Memory(torch.device("cpu"))
    undo = pipe.transformer.register_forward_hook(memory.look).remove
    with tempfile.TemporaryDirectory() as folder:
        call = dict(height=pixels, width=pixels, num_inference_steps=steps)
        predictor = lesa.calibrate(pipe, given, None, options, budget=budget, shelf=Shelf(folder), **call)
        disk = size_of(Path(folder))
    undo()
    (point,), (solved_on, checked_on) = predictor.curve.points, split(given, options)
    limits = most_runs(Runs(steps, 1, (0,), len(solved_on[0]), len(checked_on[0])), (budget,), options)
    rows = [("counted", *(str(point.transformer_runs[kind]) for kind in KINDS))]
    rows.append(("at most", *(str(limits[kind]) for kind in KINDS)))
    numbers = json.dumps(dict(calls=calls, steps=steps, budget=budget, pixels=pixels, most=most, refine=refine))
    growth = "unknown without psutil" if memory.growth is None else f"{memory.growth / 1e6:.0f} MB"
    seconds = time.perf_counter() - began
    weights = sum(x.nbytes for x in pipe.transformer.parameters())
    table = markdown(("transformer runs", *KINDS), rows, text=1)
    return (
        f"{numbers}\n\n{table}\n\nweights {weights / 1e6:.0f} MB; beside them the process grew by {growth}, "
        f"activations included; {disk / 1e3:.1f} kB on disk; {seconds:.0f} s, {made:.0f} of them to make the model"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="calibrate a FLUX of real width and few layers")
    given = parser.parse_args()
    print(measure() if given.measure else tables())


if __name__ == "__main__":
    main()
