"""Write docs/resources.md: what models and their calibrations take, in memory, disk and FLOPs.

    python benchmarks/resources.py

Nothing is fetched and no model runs: denoisers are made on the `meta` device, of the sizes that their classes in
diffusers have by default, or of those named here where the classes' are another model's. FLOPs are those of products of
matrices, convolutions and attention in one call; a calibration's share is counted by `benchmarks/calibration_cost.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import calibration_cost as cost
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lesa.bench import flops
from lesa.bench.models import MODELS, Model, build
from lesa.host.structure import leaves

PAGE = Path(__file__).parents[1] / "docs" / "resources.md"
BUDGET, TERMS = 10, 8
"""Full steps of the accelerated run and of the calibration; past outputs that the largest rows combine."""
SDXL = dict(
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(320, 640, 1280),
    attention_head_dim=(5, 10, 20),
    cross_attention_dim=2048,
    transformer_layers_per_block=(1, 2, 10),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
WORDS = """# Memory, disk, FLOPs

`python benchmarks/resources.py` wrote this page; no weights are needed for it, and none were here. A run is one of the
pipeline's call as named; *calls a step* are those of the denoiser for one picture or clip, those that go in one batch
counted one by one.

| model | call | parameters | bfloat16 | calls a step | steps | FLOPs of a call | of a run | with {budget} full steps |
| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{models}

A skipped step runs nothing of the denoiser, so a run with {budget} full steps costs their share of one with all of
them; text encoders and the VAE, once a run, come on top of both. A dash: the class looks at numbers while it runs, so
its FLOPs cannot be counted without them. FLUX.1, Qwen-Image and HunyuanVideo are held against published figures on [a
page of their own](flops.md).

## What a history holds

What the denoiser returns, of all calls of a step, and {terms} of them, as many as the paper's largest rows combine.
Rows without training hold one to four, and a calibrated predictor as many as it has full steps. `history="int8"` keeps
the older ones in a byte an element.

| model | outputs of a step, bfloat16 | {terms} of them | share of the denoiser |
| --- | ---: | ---: | ---: |
{histories}

## What a calibration takes

Of 8 prompts and 4 to check, for {budget} full steps, at most: in calls of the denoiser for one picture and stream, in
MB of the host's memory and on disk. [What the parts are, and how to take fewer](calibrate.md#what-it-takes).

| model | calls of the denoiser | as many as runs in full | kept, MB | at the peak, MB | on disk, MB |
| --- | ---: | ---: | ---: | ---: | ---: |
{calibrations}

## Beside the denoiser

What a model takes as a whole, its text encoders and disk, stands on the pages of [FLUX.1](flux.md#what-it-takes),
[Qwen-Image](qwen-image.md#what-it-takes) and [HunyuanVideo](hunyuanvideo.md#what-it-takes). `--offload
model|sequential|group` of the commands, and diffusers' own offloading in a program, leave less of the weights on the
GPU at once.
"""


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


@dataclass(frozen=True)
class Listed:
    """A model as its line says it: class of denoiser, what one call of it takes, and how its pipeline is called.

    `drawn` is the shape of a picture or clip. Without `counted` the class asks for numbers while it runs, so that its
    FLOPs cannot be counted so.
    """

    name: str
    call: str
    denoiser: str
    inputs: Mapping[str, Any]
    drawn: tuple[int, ...]
    steps: int
    calls: int = 1
    config: Mapping[str, Any] = field(default_factory=dict)
    begins: tuple[int, ...] = (0,)
    output: tuple[int, ...] | None = None
    build: Callable[[], Any] | None = None

    def module(self) -> Any:
        import diffusers

        if self.build:
            return self.build()
        with torch.device("meta"):
            return getattr(diffusers, self.denoiser)(**self.config).eval()


def measured(listed: Listed, module: Any) -> tuple[int | None, int]:
    """Return the FLOPs of one call, if they can be counted, and how many elements it gives."""
    if listed.output:
        return None, torch.Size(listed.output).numel()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        given = module(**listed.inputs, return_dict=False)
    return counter.get_total_flops(), sum(x.numel() for _, x in leaves(given))


def of_the_paper(model: Model) -> Listed:
    """Describe a model of the paper as lesa knows it."""
    size = model.size
    transformer = build(model)
    inputs = flops.INPUTS[model.transformer](transformer.config, model)
    shape = f"{size.height} x {size.width}" + (f" x {size.frames}" if size.frames > 1 else "")
    drawn = (size.frames, size.height, size.width, 3) if size.frames > 1 else (size.height, size.width, 3)
    name = model.name.rpartition("/")[2]
    return Listed(name, shape, model.transformer, inputs, drawn, model.steps, model.streams, build=lambda: build(model))


def listed() -> list[Listed]:
    """Return the models of the page, each called at its class's own defaults where no size is named."""
    wan = cost.wan()
    text, film = (1, 512, 4096), (81, 480, 832, 3)
    return [
        *map(of_the_paper, MODELS[:3]),
        Listed(
            "Wan 2.2 A14B, each of two", "480 x 832 x 81, guided", "WanTransformer3DModel",
            dict(hidden_states=meta(1, 16, 21, 60, 104), timestep=meta(1), encoder_hidden_states=meta(*text)),
            film, wan.runs.steps, 2, begins=wan.runs.begins,
        ),
        Listed(
            "Z-Image", "1024 x 1024, 128 text tokens, guided", "ZImageTransformer2DModel",
            dict(x=[meta(16, 1, 128, 128)], t=meta(1), cap_feats=[meta(128, 2560)]), (1024, 1024, 3), 50, 2,
        ),
        Listed(
            "FLUX.2-dev", "1024 x 1024", "Flux2Transformer2DModel",
            dict(
                hidden_states=meta(1, 4096, 128), encoder_hidden_states=meta(1, 512, 15360), timestep=meta(1),
                img_ids=meta(1, 4096, 4), txt_ids=meta(1, 512, 4), guidance=meta(1),
            ),
            (1024, 1024, 3), 50,
        ),
        Listed(
            "LTX-2", "512 x 768 x 121, with sound, guided in three ways", "LTX2VideoTransformer3DModel",
            dict(
                hidden_states=meta(1, 6144, 128), audio_hidden_states=meta(1, 126, 128), timestep=meta(1, 1),
                encoder_hidden_states=meta(1, 1024, 3840), audio_encoder_hidden_states=meta(1, 1024, 3840),
                num_frames=16, height=16, width=24, audio_num_frames=126,
            ),
            (121, 512, 768, 3), 30, 4,
        ),
        Listed(
            "HunyuanVideo-1.5", "480 x 848 x 121, guided", "HunyuanVideo15Transformer3DModel",
            {}, (121, 480, 848, 3), 50, 2, output=(1, 32, 31, 30, 53),
        ),
        Listed(
            "Stable Diffusion XL", "1024 x 1024, guided", "UNet2DConditionModel",
            dict(
                sample=meta(1, 4, 128, 128), timestep=meta(1), encoder_hidden_states=meta(1, 77, 2048),
                added_cond_kwargs=dict(text_embeds=meta(1, 1280), time_ids=meta(1, 6)),
            ),
            (1024, 1024, 3), 50, 2, config=SDXL,
        ),
    ]  # fmt: skip


def amount(number: float | None, unit: str = "") -> str:
    if number is None:
        return "-"
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.2f} {letter}{unit}"
    return f"{number:.0f} {unit}"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def lines(one: Listed) -> tuple[str, str, str]:
    """Return a model's lines of the three tables."""
    module = one.module()
    parameters = sum(p.numel() for p in module.parameters())
    count, given = measured(one, module)
    whole, few = (count and one.calls * count * steps for steps in (one.steps, BUDGET))
    size = [amount(parameters).replace("G", "B"), amount(2 * parameters, "B"), str(one.calls), str(one.steps)]
    held = 2 * given * one.calls
    share = f"{TERMS * held / parameters / 2:.3%}"
    return (
        line([one.name, one.call, *size, *map(amount, (count, whole, few))]),
        line([one.name, amount(held, "B"), amount(TERMS * held, "B"), share]),
        calibration(one, module, given),
    )


def calibration(one: Listed, module: Any, given: int) -> str:
    runs = cost.Runs(one.steps, one.calls, one.begins)
    calls = sum(cost.most_runs(runs, (BUDGET,)).values())
    real = cost.Real(one.name, runs, given, one.drawn, module)
    room = cost.space(runs, (BUDGET,), given, one.drawn, real.origin)
    sizes = [f"{x / 1e6:.1f}" for x in (room.kept, room.peak, room.disk)]
    return line([one.name, f"{calls:,}", f"{calls / one.calls / one.steps:.0f}", *sizes])


def page() -> str:
    """Return the page."""
    models, histories, calibrations = map("\n".join, zip(*map(lines, listed()), strict=True))
    tables = {"models": models, "histories": histories, "calibrations": calibrations}
    return WORDS.format(budget=BUDGET, terms=TERMS, **tables)


if __name__ == "__main__":
    PAGE.write_text(page())
