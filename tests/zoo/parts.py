"""Build tiny modules, conditions and whole pipelines from classes of diffusers, all with seeded random weights."""

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKL, AutoencoderKLQwenImage, AutoencoderKLWan
from packaging.version import Version
from PIL import Image
from torch import Tensor, nn

PINNED = re.search(r"^diffusers==([\d.]+)", (Path(__file__).parents[2] / "constraints.txt").read_text(), re.M)
assert PINNED
OLDER = Version(diffusers.__version__) < Version(PINNED[1])
"""Whether this diffusers is older than what the zoo is written for: its classes may take other arguments."""
WIDTH = 32  # of the tokens of nearly every model: 2 heads of 16; its text embeddings are as wide
TOKENS = 6  # of a prompt
STEPS = 6

# Sizes by name of parameter, for whichever of them a class has. The rest are a class's own defaults or overrides.
SIZES: dict[str, Any] = dict(
    attention_head_dim=16,
    axes_dims_rope=(4, 4, 8),
    cap_feat_dim=WIDTH,
    caption_channels=WIDTH,
    caption_projection_dim=WIDTH,
    cross_attention_dim=WIDTH,
    cross_attention_head_dim=16,
    ffn_dim=WIDTH,
    freq_dim=16,
    head_dim=16,
    hidden_size=WIDTH,
    intermediate_size=WIDTH,
    joint_attention_dim=WIDTH,
    num_attention_heads=2,
    num_cross_attention_heads=2,
    num_hidden_layers=2,
    num_key_value_heads=2,
    num_layers=2,
    num_refiner_layers=1,
    num_single_layers=2,
    pooled_projection_dim=WIDTH,
    rope_axes_dim=(4, 4, 8),
    rope_max_seq_len=32,
    text_dim=WIDTH,
    text_embed_dim=WIDTH,
    time_embed_dim=16,
)


def redraw(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew, in place: none is left zero or unset, as some classes leave theirs."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if not parameter.numel():
            continue
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            values /= (parameter.numel() / parameter.shape[0]) ** 0.5
        else:
            values = values / 10 + float(name.endswith("weight"))
        parameter.data.copy_(values)
    return module.eval().requires_grad_(False)


def tiny(cls: Callable[..., nn.Module], seed: int = 0, **overrides: Any) -> Any:
    """Build a module of `cls` as small as `SIZES` and the overrides say, with seeded random weights."""
    known = inspect.signature(cls.__init__).parameters
    return redraw(cls(**{name: size for name, size in SIZES.items() if name in known} | overrides), seed)


def kl(channels: int = 4, blocks: int = 1, **overrides: Any) -> AutoencoderKL:
    """Build an image VAE that shrinks each side by 2 ** (blocks - 1)."""
    sizes = dict(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=8,
        shift_factor=0.1,
        scaling_factor=1.5,
    )
    return tiny(AutoencoderKL, **{**sizes, **overrides})


def qwen_vae(**overrides: Any) -> AutoencoderKLQwenImage:
    """Build a VAE of 4 channels that shrinks each side by 4 and time by 2."""
    sizes = dict(base_dim=4, z_dim=4, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True])
    return tiny(AutoencoderKLQwenImage, latents_mean=[0.1] * 4, latents_std=[2.0] * 4, **sizes, **overrides)


def wan_vae(channels: int = 4, **overrides: Any) -> AutoencoderKLWan:
    """Build a video VAE that shrinks each side by 8 and time by 4."""
    sizes = dict(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True])
    means = dict(z_dim=channels, latents_mean=[0.1] * channels, latents_std=[2.0] * channels)
    return tiny(AutoencoderKLWan, **{**sizes, **means, **overrides})


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Draw standard normal numbers that depend on the seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(side: int = 16, seed: int = 0) -> Image.Image:
    """Draw a square RGB picture of noise."""
    values = torch.randint(0, 256, (side, side, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(values.numpy())


def mask(side: int = 16) -> Image.Image:
    """Draw a square mask: the left half is kept (black), the right half is painted anew (white)."""
    values = torch.zeros(side, side, dtype=torch.uint8)
    values[:, side // 2 :] = 255
    return Image.fromarray(values.numpy())


def clip(frames: int, side: int = 16) -> list[Image.Image]:
    """Draw a video of noise as a list of pictures."""
    return [picture(side, seed) for seed in range(frames)]


def conditions(cls: type, masks: torch.dtype = torch.long) -> dict[str, Tensor]:
    """Draw the embeddings and make the masks that a call of `cls` takes, the negative ones too."""
    names = inspect.signature(cls.__call__).parameters  # type: ignore[attr-defined]
    return {name: value for name in names if (value := condition(name, masks)) is not None}


def condition(name: str, masks: torch.dtype) -> Tensor | None:
    """Make what the call argument `name` holds if it is an embedding or a mask of a prompt, else give None."""
    seed, kind = int(name.startswith("negative_")), name.removeprefix("negative_")
    if kind in ("prompt_embeds", "prompt_embeds_2"):
        return noise(1, TOKENS, WIDTH, seed=seed)
    if kind == "pooled_prompt_embeds":
        return noise(1, WIDTH, seed=seed)
    if "mask" in kind and ("prompt" in kind or kind in ("attention_mask", "encoder_attention_mask")):
        return torch.ones(1, TOKENS, dtype=masks)
    return None


@dataclass(frozen=True)
class Specimen:
    """One tiny pipeline and the arguments of its call."""

    pipe: Any
    arguments: Mapping[str, Any]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext  # what holds during a call

    def call(self, seed: int = 0) -> Any:
        """Run the pipeline with noise from the seed."""
        with torch.no_grad(), torch.random.fork_rng(devices=[]), self.around():
            torch.manual_seed(seed)  # for those that draw from the global generator all the same
            return self.pipe(**self.arguments, generator=torch.Generator().manual_seed(seed))


def specimen(
    cls: type,
    components: Mapping[str, Any],
    drop: Iterable[str] = (),
    masks: torch.dtype = torch.long,
    **arguments: Any,
) -> Specimen:
    """Build a pipeline of `cls`: components not given are None, conditions not given are drawn.

    `drop` names call arguments that are drawn by default and must not be given; `masks` is the type of the masks.
    """
    needed = [
        name for name, parameter in inspect.signature(cls).parameters.items() if parameter.default is parameter.empty
    ]
    pipe = cls(**{**dict.fromkeys(needed), **components})
    pipe.set_progress_bar_config(disable=True)
    known = inspect.signature(cls.__call__).parameters  # type: ignore[attr-defined]
    defaults: dict[str, Any] = {**conditions(cls, masks), "num_inference_steps": STEPS, "output_type": "latent"}
    if "negative_prompt_embeds" in known:
        defaults["negative_prompt"] = None  # some have "" by default and refuse both
        defaults["prompt"] = None  # some demand it
    defaults = {name: value for name, value in defaults.items() if name in known and name not in drop}
    return Specimen(pipe, {**defaults, **arguments})


def stub(subject: Specimen, **results: Any) -> Specimen:
    """Let methods of the pipeline, such as `encode_prompt`, give copies of what is stated here."""
    for name, result in results.items():
        setattr(subject.pipe, name, lambda *args, _result=result, **kwargs: copy.deepcopy(_result))
    return subject


ZOO: dict[str, Callable[[], Specimen]] = {}


def entry(build: Callable[[], Specimen]) -> Callable[[], Specimen]:
    """Register a builder of a specimen under its function's name; where this diffusers is without it, it is skipped."""

    @wraps(build)
    def built() -> Specimen:
        try:
            return build()
        except (AttributeError, ImportError, TypeError, RuntimeError) as error:
            if not (why := lacks(error)):
                raise
            import pytest

            pytest.skip(f"diffusers {diffusers.__version__} {why}: {error}")

    ZOO[build.__name__] = built
    return build


def lacks(error: Exception) -> str:
    """Return what this diffusers lacks if that is why a specimen cannot be built, else nothing.

    Of the diffusers that the zoo is written for, or a newer one, nothing but a whole class may be missing.
    """
    of_import = isinstance(error, ImportError) and (error.name or "").startswith("diffusers")
    if of_import or getattr(error, "obj", None) is diffusers:
        return "is without it"
    if not OLDER:
        return ""
    if isinstance(error, TypeError) and re.search(r"__init__\(\) (got an unexpected|missing \d+ required)", str(error)):
        return "has another class of this name"
    missing = error.__cause__.name if isinstance(error.__cause__, ModuleNotFoundError) else None
    return f"needs {missing} for it" if missing and not find_spec(missing.partition(".")[0]) else ""
