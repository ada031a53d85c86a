"""Measure what skipped steps cost, and how much of the step ratio a pipeline gets as speedup.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --taps output --size 256

Runs a FluxPipeline with random weights (FLUX.1's proportions: heads of 128 channels, two single blocks for each double
one, text embeddings of 4096 channels; about 200 M parameters, 1024 image and 512 text tokens, batch 1) with every step
full and accelerated by an untrained LESA predictor, which costs what a trained one does, at each tap. They take turns;
figures are medians. What stands in the way of the sampler is in the step as well: the rest of a skipped step less that
of a step of the pipeline alone. Prompt embeddings are given and the autoencoder is small: the whole call is the
denoising loop and the decoding.
"""

import argparse
import time
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

import lesa
from lesa.host.intercept import intercept
from lesa.host.tap import PLACES, tap_of
from lesa.predictors import Origin, configuration
from lesa.rows.grid import from_scheduler

HEAD_CHANNELS, TEXT_CHANNELS, POOLED_CHANNELS = 128, 4096, 768
PARTS = ("x_embedder", "time_text_embed", "context_embedder", "pos_embed", "norm_out", "proj_out")


def build(heads: int, layers: int, dtype: torch.dtype) -> FluxPipeline:
    """A FluxPipeline with random weights and without text encoders."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=layers,
        num_single_layers=2 * layers,
        attention_head_dim=HEAD_CHANNELS,
        num_attention_heads=heads,
        joint_attention_dim=TEXT_CHANNELS,
        pooled_projection_dim=POOLED_CHANNELS,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        norm_num_groups=8,
        shift_factor=0.1159,
        scaling_factor=0.3611,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    pipe = FluxPipeline(scheduler, vae.eval(), None, None, None, None, transformer.eval()).to(dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def untrained(pipe: FluxPipeline, tokens: int, steps: int, schedule: str, tap: str) -> lesa.LESA:
    """A LESA predictor for the grid that the pipeline will walk: K = 4, 8, 8, its history holds its own forecasts."""
    shift = calculate_shift(tokens, base_shift=0.5, max_shift=1.15)
    pipe.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift)
    transformer = pipe.transformer
    origin = Origin(
        model="random weights",
        transformer=type(transformer).__name__,
        config=configuration(transformer),
        tap=tap_of(transformer, tap),
        grid=tuple(from_scheduler(pipe.scheduler).tolist()),
        schedule=schedule,
    )
    predictor = lesa.LESA(origin, remembers_forecasts=True)
    for expert in predictor.stage_experts("cond"):
        torch.nn.init.normal_(expert.weight, std=0.1)  # a weight of zero would spare reading its feature
    return predictor


class Timing(NamedTuple):
    """Seconds of one call: of the transformer at each step, of its parts and of the rest of it, of loop and whole.

    The parts' are by step; a step in which a part is not called has none. The rest of a step is what comes after the
    transformer: guidance, the sampler, what stands in their way.
    """

    steps: list[float]
    parts: dict[str, dict[int, float]]
    rests: list[float]
    loop: float
    call: float


def stopwatch(module: torch.nn.Module, note: Callable[[float, float], None]) -> Callable[[], None]:
    """Note when each call of a module begins and ends, with all that was put around it before this."""

    def timed(go_on: Callable, _module: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        output = go_on(*args, **kwargs)
        note(began, time.perf_counter())
        return output

    return intercept(module, "__call__", timed)


def measure(pipe: FluxPipeline, call: dict[str, Any], predictor: lesa.Predictor | None) -> Timing:
    """Time one call of the pipeline, accelerated if there is a predictor."""
    steps: list[tuple[float, float]] = []
    parts: dict[str, dict[int, float]] = {name: {} for name in PARTS}
    ends: list[float] = []

    def at_step_end(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        ends.append(time.perf_counter())
        return tensors

    def noting(laps: dict[int, float]) -> Callable[[float, float], None]:
        return lambda began, ended: laps.__setitem__(len(steps), ended - began)

    with ExitStack() as stack:
        if predictor is not None:
            stack.enter_context(lesa.accelerate(pipe, predictor))
        stack.callback(stopwatch(pipe.transformer, lambda *lap: steps.append(lap)))
        for name, laps in parts.items():
            stack.callback(stopwatch(getattr(pipe.transformer, name), noting(laps)))
        began = time.perf_counter()
        pipe(**call, callback_on_step_end=at_step_end, generator=torch.Generator().manual_seed(0))
        whole = time.perf_counter() - began
    rests = [end - ended for end, (_, ended) in zip(ends, steps, strict=True)]
    return Timing([b - a for a, b in steps], parts, rests, ends[-1] - steps[0][0], whole)


def prompt(pipe: FluxPipeline, text_tokens: int) -> dict[str, torch.Tensor]:
    """Random prompt embeddings."""
    made = torch.Generator().manual_seed(0)
    dtype = pipe.transformer.dtype
    return dict(
        prompt_embeds=torch.randn(1, text_tokens, TEXT_CHANNELS, generator=made).to(dtype),
        pooled_prompt_embeds=torch.randn(1, POOLED_CHANNELS, generator=made).to(dtype),
    )


def report(schedule: lesa.Schedule, plain: list[Timing], fast: list[Timing], out_of: int) -> None:
    """Print what the runs of one dtype at one tap say."""
    full = set(schedule.full_steps(out_of))
    skipped = [step for step in range(out_of) if step not in full]
    full_step = median(lap for timing in plain for lap in timing.steps)
    ratio = out_of / len(full)
    inside = {"the call": median(timing.steps[step] for timing in fast for step in skipped)}
    for name in PARTS:
        laps = [timing.parts[name][step] for timing in fast for step in skipped if step in timing.parts[name]]
        if laps:
            inside[name] = median(laps)
    rests = median(lap for timing in plain for lap in timing.rests[1:])
    seam = median(timing.rests[step] for timing in fast for step in skipped) - rests
    skipped_step = inside.pop("the call") + max(seam, 0.0)
    inside |= {"sampler seam": seam, "forecast and rest": skipped_step - max(seam, 0.0) - sum(inside.values())}
    print(f"  full step     {1e3 * full_step:9.1f} ms")
    print(f"  skipped step  {1e3 * skipped_step:9.3f} ms   {skipped_step / full_step:.3%} of a full step")
    for name, seconds in inside.items():
        print(f"    {name:<18} {1e3 * seconds:9.3f} ms   {seconds / full_step:.3%}")
    for what in ("loop", "call"):
        before, after = (median(getattr(timing, what) for timing in timings) for timings in (plain, fast))
        share = f", {before / after / ratio:.3f} of the step ratio {ratio:.2f}"
        print(f"  {what:<10} {before:8.2f} s   {after:8.2f} s   speedup {before / after:.2f}{share}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=8, help="the width in heads of 128 channels")
    parser.add_argument("--layers", type=int, default=3, help="double blocks; there are twice as many single ones")
    parser.add_argument("--size", type=int, default=512, help="pixels of a side; 512 are 1024 image tokens")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--schedule", default="paper:7")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--taps", nargs="+", default=["feature", "output"], choices=PLACES)
    options = parser.parse_args()

    tokens = (options.size // 16) ** 2
    for dtype in options.dtypes:
        pipe = build(options.heads, options.layers, getattr(torch, dtype))
        predictors = {tap: untrained(pipe, tokens, options.steps, options.schedule, tap) for tap in options.taps}
        call = dict(height=options.size, width=options.size, **prompt(pipe, options.text_tokens))
        pipe(**call, num_inference_steps=1)  # warm-up
        call["num_inference_steps"] = options.steps
        timings: dict[str | None, list[Timing]] = {tap: [] for tap in (None, *options.taps)}
        for _ in range(options.repeats):
            for tap, some in timings.items():
                some.append(measure(pipe, call, predictors.get(tap)))
        millions = sum(p.numel() for p in pipe.transformer.parameters()) / 1e6
        print(
            f"{dtype}: {millions:.0f} M parameters with random weights, {tokens} image and {options.text_tokens} text "
            f"tokens, batch 1; {options.steps} steps, {options.schedule}; {torch.get_num_threads()} threads; medians "
            f"of {options.repeats} runs each, every step full and accelerated"
        )
        for tap, predictor in predictors.items():
            print(f" {tap} tap")
            report(predictor.schedule, timings[None], timings[tap], options.steps)


if __name__ == "__main__":
    main()
