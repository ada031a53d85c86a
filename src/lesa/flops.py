"""Count the FLOPs of a model's steps and runs from its configuration: no weights, and nothing is computed.

A multiply and an add are two. What is counted is what `torch.utils.flop_counter` counts of the transformer (products of
matrices, convolutions, attention) on the `meta` device; of a row, whose sum it does not see, 2 K for K past features of
each element. Text encoders and the VAE, which a run needs once, are left out, as in the papers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lesa.pipelines import CALL_FILE
from lesa.schedule import Schedule
from lesa.tap import NORM, Tap, attach

PLACES = {"norm": NORM, "output": None}
"""Where a skipped step takes its forecast: before the final norm, or in place of what the transformer returns."""
ROW_TERMS = 8
"""The past features of the paper's largest rows."""
QWEN_TEXT = 23
"""The text tokens of Qwen-Image's published figure."""
TERA = 1e12


class Size(NamedTuple):
    """What one call of a transformer works on: pixels, and the tokens of its text."""

    height: int
    width: int
    text_tokens: int
    frames: int = 1


class Published(NamedTuple):
    """A line of a paper's table: the schedule that has its number of full steps, and the ratio that it states."""

    method: str
    schedule: Schedule
    ratio: float | None = None
    steps: int | None = None
    """Where the method takes other steps than the model's usual ones."""


@dataclass(frozen=True)
class Model:
    """A transformer as its configuration describes it, and how it is run.

    `config` are the arguments of the diffusers class `transformer`; `scale` is how many pixels and frames make one
    latent; `published` is the paper's figure for a run with every step full, in TFLOPs.
    """

    name: str
    transformer: str
    config: Mapping[str, Any]
    size: Size
    steps: int = 50
    streams: int = 1
    scale: tuple[int, int] = (8, 4)
    published: float | None = None
    runs: Sequence[Published] = field(default=())


class Cost(NamedTuple):
    """FLOPs of one call of a transformer: in full, skipped (its row not counted), and of the row of `ROW_TERMS` terms."""

    full: int
    skipped: int
    row: int

    def run(self, schedule: Schedule, steps: int, streams: int = 1) -> int:
        """Return the FLOPs of a whole run."""
        full = len(schedule.full_steps(steps))
        return streams * (full * self.full + (steps - full) * (self.skipped + self.row))


def count(model: Model, place: str = "norm") -> Cost:
    """Count what a model's steps cost with its tap at the final norm or at the output.

    The steps go through the tap as they do in a run. The blocks of a list are alike, so one of each is run and counted
    as often as there are blocks.

    Raises: ValueError if the class of the transformer is not one whose inputs are known here, or its blocks differ.
    """
    transformer = _build(model)
    inputs = INPUTS[model.transformer](transformer.config, model)
    names = tuple(name for name, child in transformer.named_children() if isinstance(child, nn.ModuleList))
    listener = _Listener()
    with _one_block_each(transformer, names) as repeats:
        detach = attach(transformer, Tap(names, PLACES[place]), listener)
        with torch.no_grad():
            full = _counted(transformer, inputs, repeats)
            listener.full = False
            skipped = _counted(transformer, inputs, {})
        detach()
    return Cost(full, skipped, 2 * ROW_TERMS * listener.elements)


class _Listener:
    """Says which calls are full, and passes features on."""

    full, elements = True, 0

    def begin(self) -> bool:
        return self.full

    def exchange(self, feature: Tensor) -> Tensor:
        self.elements = feature.numel()
        return feature


def _build(model: Model) -> Any:
    import diffusers

    if model.transformer not in INPUTS:
        raise ValueError(
            f"FLOPs are counted of {', '.join(INPUTS)}, got a {model.transformer}; what its calls take is not known."
        )
    with torch.device("meta"):
        return getattr(diffusers, model.transformer).from_config(dict(model.config)).eval()


@contextmanager
def _one_block_each(transformer: nn.Module, names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Leave one block in each list; yields by its name how many more there were, all alike."""
    lists = {name: cast("nn.ModuleList", getattr(transformer, name)) for name in names}
    for name, blocks in lists.items():
        if len({str([(k, p.shape) for k, p in block.named_parameters()]) for block in blocks}) != 1:
            raise ValueError(f"the blocks of a list are counted as one, got different ones in {name!r}.")
        setattr(transformer, name, blocks[:1])
    try:
        yield {f"{type(transformer).__name__}.{name}.0": len(blocks) - 1 for name, blocks in lists.items()}
    finally:
        for name, blocks in lists.items():
            setattr(transformer, name, blocks)


def _counted(transformer: nn.Module, inputs: dict[str, Any], repeats: Mapping[str, int]) -> int:
    """Count one call, and the modules named as often again as they say."""
    with FlopCounterMode(display=False) as counter:
        transformer(**inputs, return_dict=False)
    counts = counter.get_flop_counts()
    return counter.get_total_flops() + sum(more * sum(counts[name].values()) for name, more in repeats.items())


# --- what the classes' calls take


def _flux_inputs(config: Any, model: Model) -> dict[str, Any]:
    tokens, text = _patches(model, 2), model.size.text_tokens
    guidance = {"guidance": _meta(1)} if config.guidance_embeds else {}
    return dict(
        hidden_states=_meta(1, tokens, config.in_channels),
        encoder_hidden_states=_meta(1, text, config.joint_attention_dim),
        pooled_projections=_meta(1, config.pooled_projection_dim),
        timestep=_meta(1),
        img_ids=_meta(tokens, 3),
        txt_ids=_meta(text, 3),
        **guidance,
    )


def _qwen_inputs(config: Any, model: Model) -> dict[str, Any]:
    side = 2 * model.scale[0]
    return dict(
        hidden_states=_meta(1, _patches(model, 2), config.in_channels),
        encoder_hidden_states=_meta(1, model.size.text_tokens, config.joint_attention_dim),
        timestep=_meta(1),
        img_shapes=[[(1, model.size.height // side, model.size.width // side)]],
    )


def _hunyuan_video_inputs(config: Any, model: Model) -> dict[str, Any]:
    (pixels, frames), size = model.scale, model.size
    latents = ((size.frames - 1) // frames + 1, size.height // pixels, size.width // pixels)
    guidance = {"guidance": _meta(1)} if config.guidance_embeds else {}
    return dict(
        hidden_states=_meta(1, config.in_channels, *latents),
        timestep=_meta(1),
        encoder_hidden_states=_meta(1, size.text_tokens, config.text_embed_dim),
        encoder_attention_mask=torch.ones(1, size.text_tokens, device="meta"),
        pooled_projections=_meta(1, config.pooled_projection_dim),
        **guidance,
    )


INPUTS: dict[str, Callable[[Any, Model], dict[str, Any]]] = {
    "FluxTransformer2DModel": _flux_inputs,
    "QwenImageTransformer2DModel": _qwen_inputs,
    "HunyuanVideoTransformer3DModel": _hunyuan_video_inputs,
}


def _patches(model: Model, side: int) -> int:
    pixels = side * model.scale[0]
    return (model.size.height // pixels) * (model.size.width // pixels)


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


# --- the real models: the arguments are those in transformer/config.json of the hub repositories of these names

_FLUX = dict(
    patch_size=1,
    in_channels=64,
    num_layers=19,
    num_single_layers=38,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=4096,
    pooled_projection_dim=768,
    axes_dims_rope=(16, 56, 56),
)
_QWEN = dict(
    patch_size=2,
    in_channels=64,
    out_channels=16,
    num_layers=60,
    attention_head_dim=128,
    num_attention_heads=24,
    joint_attention_dim=3584,
    guidance_embeds=False,
    axes_dims_rope=(16, 56, 56),
)
_HUNYUAN_VIDEO = dict(
    in_channels=16,
    out_channels=16,
    num_attention_heads=24,
    attention_head_dim=128,
    num_layers=20,
    num_single_layers=40,
    num_refiner_layers=2,
    mlp_ratio=4.0,
    patch_size=2,
    patch_size_t=1,
    qk_norm="rms_norm",
    guidance_embeds=True,
    text_embed_dim=4096,
    pooled_projection_dim=768,
    rope_theta=256.0,
    rope_axes_dim=(16, 56, 56),
)


def _published(method: str, schedule: str, ratio: float | None = None, steps: int | None = None) -> Published:
    return Published(method, Schedule.parse(schedule), ratio, steps)


# LESA's lines: arXiv 2602.20497, with the methods that it compares; L2P's: arXiv 2604.26365. What these papers do not
# say of another method's schedule is one with the number of full steps that its ratio tells.
MODELS = (
    Model(
        "black-forest-labs/FLUX.1-dev",
        "FluxTransformer2DModel",
        dict(_FLUX, guidance_embeds=True),
        Size(1024, 1024, 512),
        published=3719.50,
        runs=(
            _published("all full", "every:1", 1.00),
            _published("LESA N=5", "paper:5", 3.85),
            _published("TeaCache l=1.0", "ratio:4.54", 4.54),
            _published("L2P N=5", "ratio:4.55", 4.55),
            _published("TaylorSeer N=6 O=2", "every:6:3", 4.99),
            _published("LESA N=7", "paper:7", 5.00),
            _published("L2P N=7", "ratio:5.56", 5.56),
            _published("TaylorSeer N=9 O=2", "every:9:3", 6.24),
            _published("LESA N=10", "paper:10", 6.25),
            _published("L2P N=10", "ratio:7.14", 7.14),
        ),
    ),
    Model(
        "Qwen/Qwen-Image",
        "QwenImageTransformer2DModel",
        _QWEN,
        Size(1328, 1328, QWEN_TEXT),
        streams=2,
        published=12917.56,
        runs=(
            _published("all full", "every:1", 1.00),
            _published("10 steps in place of 50", "every:1", 5.00, steps=10),
            _published("TaylorSeer N=6 O=2", "every:6:3", 5.00),
            _published("LESA N=7", "paper:7", 5.00),
            _published("L2P N=7", "ratio:5.59", 5.59),
            _published("TaylorSeer N=8 O=2", "every:8:3", 6.24),
            _published("LESA N=10", "paper:10", 6.25),
        ),
    ),
    Model(
        "hunyuanvideo-community/HunyuanVideo",
        "HunyuanVideoTransformer3DModel",
        _HUNYUAN_VIDEO,
        Size(480, 640, 256, frames=65),
        published=29773.0,
        runs=(
            _published("all full", "every:1", 1.00),
            _published("TeaCache l=0.4", "ratio:4.55", 4.55),
            _published("TaylorSeer N=5 O=1", "every:5", 5.00),
            _published("LESA N=7", "paper:7", 5.00),
            _published("LESA N=8", "paper:8", 5.56),
        ),
    ),
    Model(
        "black-forest-labs/FLUX.1-schnell",
        "FluxTransformer2DModel",
        dict(_FLUX, guidance_embeds=False),
        Size(1024, 1024, 256),
        steps=4,
        runs=(_published("all full", "every:1"), _published("LESA", "at:0,2")),
    ),
    Model(
        "lightx2v/Qwen-Image-Lightning",
        "QwenImageTransformer2DModel",
        _QWEN,
        Size(1328, 1328, QWEN_TEXT),
        steps=8,
        runs=(_published("all full", "every:1"), _published("LESA, L2P", "at:0,1,3,5", 2.00)),
    ),
)


def read(
    source: str, call: Mapping[str, Any] | None = None, streams: int | None = None, text_tokens: int | None = None
) -> Model:
    """Describe the pipeline in a folder or hub repository, of which only configurations are read.

    The `call`'s arguments go before those of its `call.json`; what neither has is the pipeline's own default. Without
    `streams` there are two if the call has a negative prompt; without `text_tokens` as many as prompts are padded to,
    or, in Qwen-Image, which does not pad them, 23, those of the published figure.

    Raises: OSError if there is no such pipeline; ValueError if its transformer's class is not known here.
    """
    import diffusers

    kind = diffusers.DiffusionPipeline.load_config(source).get("transformer", (None, None))[1]
    if kind not in INPUTS:
        raise ValueError(f"FLOPs are counted of pipelines on {', '.join(INPUTS)}, got {kind}; name one of those.")
    load_config = getattr(diffusers, kind).load_config
    own = Path(source) / CALL_FILE
    call = {**(json.loads(own.read_text()) if own.exists() else {}), **(call or {})}
    scale = _scale(load_config(source, subfolder="vae"))
    usual = 128 * scale[0]
    height, width, frames, padded = (720, 1280, 129, 256) if "Video" in kind else (usual, usual, 1, 512)
    text = QWEN_TEXT if "Qwen" in kind else call.get("max_sequence_length", padded)
    size = Size(
        call.get("height") or height,
        call.get("width") or width,
        text_tokens or text,
        call.get("num_frames", frames),
    )
    guided = 2 if call.get("negative_prompt") is not None and call.get("true_cfg_scale", 4.0) > 1 else 1
    steps = call.get("num_inference_steps", 50)
    config = load_config(source, subfolder="transformer")
    return Model(source, kind, config, size, steps, streams or guided, scale)


def _scale(vae: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many pixels and frames make one latent, as the pipelines read it from their VAE."""
    if "temperal_downsample" in vae:
        return 2 ** len(vae["temperal_downsample"]), 1
    if "spatial_compression_ratio" in vae:
        return vae["spatial_compression_ratio"], vae["temporal_compression_ratio"]
    return 2 ** (len(vae["block_out_channels"]) - 1), 1


# --- tables


def steps_table(models: Sequence[Model], costs: Mapping[str, Mapping[str, Cost]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table: what the steps of each model cost, and its whole run beside the published one."""
    head = ["model", "size", "text tokens", "streams", "full step", "skipped, at the norm", "its row"]
    head += ["skipped, at the output", "its row", "steps", "whole run", "published", "difference"]
    rows = []
    for model in models:
        size, (norm, output) = model.size, (costs[model.name][place] for place in PLACES)
        whole = norm.run(Schedule.every(1), model.steps, model.streams)
        shape = f"{size.height}x{size.width}" + (f"x{size.frames}" if size.frames > 1 else "")
        cells = [model.name, shape, str(size.text_tokens), str(model.streams)]
        cells += map(_words, (norm.full, norm.skipped, norm.row, output.skipped, output.row))
        cells += [str(model.steps), _words(whole)]
        if model.published is None:
            cells += ["-", "-"]
        else:
            cells += [_words(model.published * TERA), f"{whole / TERA / model.published - 1:+.3%}"]
        rows.append(cells)
    return head, rows


def runs_table(models: Sequence[Model], costs: Mapping[str, Mapping[str, Cost]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table: what runs cost, and how often they go into the model's run with all steps full."""
    head = ["model", "method", "schedule", "steps", "full steps", "published ratio", "step ratio"]
    head += ["FLOPs at the norm", "ratio", "FLOPs at the output", "ratio"]
    rows = []
    for model in models:
        for method, schedule, ratio, own_steps in model.runs:
            steps = own_steps or model.steps
            full = len(schedule.full_steps(steps))
            cells = [model.name, method, str(schedule), str(steps), str(full)]
            cells += ["-" if ratio is None else f"{ratio:.2f}", f"{model.steps / full:.2f}"]
            for cost in (costs[model.name][place] for place in PLACES):
                flops = cost.run(schedule, steps, model.streams)
                cells += [_words(flops), f"{cost.run(Schedule.every(1), model.steps, model.streams) / flops:.3f}"]
            rows.append(cells)
    return head, rows


def _words(flops: float) -> str:
    for unit, letter in ((TERA, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if flops >= unit:
            return f"{flops / unit:.2f} {letter}"
    return f"{flops:.0f}"
