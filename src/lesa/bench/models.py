"""The models of the paper as facts: configuration, size of a call, grid, published figures; and those of any pipeline.

Nothing here needs weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lesa.host.pipelines import call_of, check_call
from lesa.rows import grid as grids
from lesa.rows.schedule import Schedule, check_steps

MOST_LAYERS = 1000
"""Of a transformer; those of the paper have 57 and 60, and a configuration can claim any number."""
QWEN_TEXT = 23
"""The text tokens of Qwen-Image's published FLOPs."""


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

    `config` are the arguments of the diffusers class `transformer`, and `scheduler` those of
    FlowMatchEulerDiscreteScheduler; `scale` is how many pixels and frames make one latent; `published` is the paper's
    figure for a run with every step full, in TFLOPs.
    """

    name: str
    transformer: str
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    size: Size
    steps: int = 50
    streams: int = 1
    scale: tuple[int, int] = (8, 4)
    published: float | None = None
    runs: Sequence[Published] = field(default=())

    @property
    def patches(self) -> int:
        """The tokens of one frame: patches of 2 x 2 latents."""
        side = 2 * self.scale[0]
        return (self.size.height // side) * (self.size.width // side)


def build(model: Model) -> Any:
    """Make a model's transformer on the `meta` device, where it has shapes and no numbers.

    Raises: ValueError if its configuration names more than `MOST_LAYERS` layers.
    """
    layers = {name: n for name, n in model.config.items() if name.endswith("layers") and isinstance(n, int)}
    if sum(layers.values()) > MOST_LAYERS:
        raise ValueError(f"a transformer has at most {MOST_LAYERS} layers, got {layers}; repair its configuration.")
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, model.transformer).from_config(dict(model.config)).eval()


def scheduler_of(model: Model, steps: int | None = None, device: str | torch.device = "cpu") -> Any:
    """Return the model's scheduler with its time steps set as its pipeline sets them, by default its own number."""
    steps = steps or model.steps
    check_steps(steps)
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(dict(model.scheduler))
    facts = scheduler.config
    rise = (facts.max_shift - facts.base_shift) / (facts.max_image_seq_len - facts.base_image_seq_len)
    shift = facts.base_shift + rise * (model.patches - facts.base_image_seq_len)  # 'mu'; the class may leave it
    sigmas = np.linspace(1.0, 1 / steps, steps).tolist()
    scheduler.set_timesteps(sigmas=sigmas, mu=shift if facts.use_dynamic_shifting else None, device=device)
    return scheduler


def grid_of(model: Model, steps: int | None = None) -> Tensor:
    """Return the grid that the model's pipeline walks in so many steps, by default its own number, at its size."""
    return grids.from_scheduler(scheduler_of(model, steps))


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

    parts: Any = diffusers.DiffusionPipeline.load_config(source)
    kind = parts.get("transformer", (None, None))[1]
    known = dict.fromkeys(model.transformer for model in MODELS)
    if kind not in known:
        raise ValueError(f"a pipeline is described here if it is on {', '.join(known)}, got {kind}; name one of those.")
    load_config = getattr(diffusers, kind).load_config
    call = {**call_of(source), **(call or {})}
    check_call(call)
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
    config, scheduler = load_config(source, subfolder="transformer"), _scheduler_config(source)
    return Model(source, kind, config, scheduler, size, steps, streams or guided, scale)


def _scheduler_config(source: str) -> dict[str, Any]:
    from diffusers import FlowMatchEulerDiscreteScheduler

    config: Any = FlowMatchEulerDiscreteScheduler.load_config(source, subfolder="scheduler")
    return dict(config)


def _scale(vae: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many pixels and frames make one latent, as the pipelines read it from their VAE."""
    if "temperal_downsample" in vae:
        return 2 ** len(vae["temperal_downsample"]), 1
    if "spatial_compression_ratio" in vae:
        return vae["spatial_compression_ratio"], vae["temporal_compression_ratio"]
    return 2 ** (len(vae["block_out_channels"]) - 1), 1


# --- the real models: the arguments are those in transformer/config.json and scheduler/scheduler_config.json of the hub
# repositories of these names; Lightning, which is a LoRA, says those of its scheduler on its page

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

_BY_TOKENS = dict(
    use_dynamic_shifting=True, base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15
)
_QWEN_SHIFT = dict(_BY_TOKENS, max_image_seq_len=8192, max_shift=0.9, shift_terminal=0.02)
_LIGHTNING_SHIFT = dict(_QWEN_SHIFT, base_shift=math.log(3), max_shift=math.log(3), shift_terminal=None)


def _published(method: str, schedule: str, ratio: float | None = None, steps: int | None = None) -> Published:
    return Published(method, Schedule.parse(schedule), ratio, steps)


# LESA's lines: arXiv 2602.20497, with the methods that it compares; L2P's: arXiv 2604.26365. What these papers do not
# say of another method's schedule is one with the number of full steps that its ratio tells.
MODELS = (
    Model(
        "black-forest-labs/FLUX.1-dev",
        "FluxTransformer2DModel",
        dict(_FLUX, guidance_embeds=True),
        dict(_BY_TOKENS, shift=3.0),
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
        _QWEN_SHIFT,
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
        dict(shift=7.0),
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
        dict(shift=1.0),
        Size(1024, 1024, 256),
        steps=4,
        runs=(_published("all full", "every:1"), _published("LESA", "at:0,2")),
    ),
    Model(
        "lightx2v/Qwen-Image-Lightning",
        "QwenImageTransformer2DModel",
        _QWEN,
        _LIGHTNING_SHIFT,
        Size(1328, 1328, QWEN_TEXT),
        steps=8,
        runs=(_published("all full", "every:1"), _published("LESA, L2P", "at:0,1,3,5", 2.00)),
    ),
)
