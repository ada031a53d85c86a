"""ComfyUI as it is installed where COMFYUI_PATH says, and tiny models of its own classes."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
VARIABLE = "COMFYUI_PATH"


def why_not() -> str:
    """Return why ComfyUI cannot be used here; nothing if it can."""
    path = os.environ.get(VARIABLE)
    if not path:
        return f"{VARIABLE} does not say where ComfyUI is"
    if not (Path(path) / "comfy" / "samplers.py").is_file():
        return f"{VARIABLE} is {path}, where ComfyUI is not"
    missing = [name for name in ("torchsde", "einops", "aiohttp", "av") if importlib.util.find_spec(name) is None]
    return f"ComfyUI needs {', '.join(missing)}, which this Python does not have" if missing else ""


def load() -> None:
    """Make ComfyUI's modules importable, on the CPU."""
    path = os.environ[VARIABLE]
    if path not in sys.path:
        sys.path.insert(0, path)
    from comfy.cli_args import args

    args.cpu = True


def nodes() -> ModuleType:
    """Return the custom nodes, loaded as ComfyUI loads them."""
    name = "lesa_comfyui"
    if name not in sys.modules:
        folder = ROOT / "integrations" / "comfyui"
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


def patcher_of(base: Any) -> Any:
    """Return what ComfyUI's loaders give of a model."""
    import comfy.model_patcher

    base.eval().requires_grad_(False)
    return comfy.model_patcher.ModelPatcher(base, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))


def flux(pipe: Any) -> Any:
    """Return the transformer of a small `FluxPipeline` as ComfyUI's own FLUX, with the pipeline's latent format."""
    import comfy.latent_formats
    import comfy.model_base
    import comfy.supported_models
    import comfy.utils

    c = pipe.transformer.config
    hidden = c.num_attention_heads * c.attention_head_dim
    unet = dict(
        image_model="flux",
        in_channels=c.in_channels // 4,
        out_channels=c.in_channels // 4,
        patch_size=2,
        vec_in_dim=c.pooled_projection_dim,
        context_in_dim=c.joint_attention_dim,
        hidden_size=hidden,
        mlp_ratio=4.0,
        num_heads=c.num_attention_heads,
        depth=c.num_layers,
        depth_single_blocks=c.num_single_layers,
        axes_dim=list(c.axes_dims_rope),
        theta=10000,
        qkv_bias=True,
        guidance_embed=c.guidance_embeds,
    )
    latents = comfy.latent_formats.LatentFormat()
    latents.latent_channels = c.in_channels // 4
    config = comfy.supported_models.Flux({**unet, "dtype": torch.float32})
    config.latent_format = latents
    base = comfy.model_base.Flux(config, device=torch.device("cpu"))
    base.diffusion_model.load_state_dict(converted(pipe.transformer.state_dict(), unet))
    return patcher_of(base)


def converted(weights: dict[str, Tensor], unet: dict) -> dict[str, Tensor]:
    """Return weights of diffusers' FLUX under the names that ComfyUI's has."""
    import comfy.utils

    found: dict[str, Tensor] = {}
    for name, place in comfy.utils.flux_to_diffusers(unet).items():
        if name not in weights:
            continue
        x, place = weights[name], (place, None) if isinstance(place, str) else place
        if len(place) > 2:
            x = place[2](x)
        if place[1] is None:
            found[place[0]] = x
            continue
        dim, start, size = place[1]
        parts = found.setdefault(place[0], torch.zeros(0))
        shape = list(x.shape)
        shape[dim] = max(start + size, parts.shape[dim] if parts.numel() else 0)
        whole = torch.zeros(shape)
        if parts.numel():
            whole.narrow(dim, 0, parts.shape[dim]).copy_(parts)
        whole.narrow(dim, start, size).copy_(x)
        found[place[0]] = whole
    return found


def encoded(pipe: Any, prompt: str) -> list:
    """Return a prompt as a CONDITIONING of ComfyUI, made by the pipeline's own encoders."""
    length = 12
    with torch.no_grad():
        text, pooled, _ = pipe.encode_prompt(prompt, prompt, max_sequence_length=length)
    return [[text, {"pooled_output": pooled}]]


class Decoder:
    """The pipeline's decoder, with a VAE's `decode`."""

    def __init__(self, pipe: Any):
        self._vae = pipe.vae

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        c = self._vae.config
        drawn = self._vae.decode(latents / c.scaling_factor + c.shift_factor).sample
        return (drawn / 2 + 0.5).clamp(0, 1).movedim(1, -1)


def filled(base: Any, seed: int = 0) -> Any:
    """Fill a model's weights with small random numbers: ComfyUI makes them without any."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in base.diffusion_model.named_parameters():
            near = 1.0 if "norm" in name and name.endswith(("weight", "scale")) else 0.0
            x.copy_(near + torch.randn(x.shape, generator=random) * (0.5 / max(x.shape[-1], 1) ** 0.5))
    return base


def _latents(channels: int, dimensions: int = 2) -> Any:
    import comfy.latent_formats

    found = comfy.latent_formats.LatentFormat()
    found.latent_channels, found.latent_dimensions = channels, dimensions
    return found


def tiny_flux(seed: int = 0, guidance: bool = False) -> Any:
    """Return ComfyUI's FLUX, of one double and one single block."""
    import comfy.model_base
    import comfy.supported_models

    config = comfy.supported_models.Flux(
        dict(
            image_model="flux",
            in_channels=4,
            out_channels=4,
            patch_size=2,
            vec_in_dim=8,
            context_in_dim=16,
            hidden_size=32,
            mlp_ratio=2.0,
            num_heads=2,
            depth=1,
            depth_single_blocks=1,
            axes_dim=[4, 6, 6],
            theta=10000,
            qkv_bias=True,
            guidance_embed=guidance,
            dtype=torch.float32,
        )
    )
    config.latent_format = _latents(4)
    return patcher_of(filled(comfy.model_base.Flux(config, device=torch.device("cpu")), seed))


def tiny_wan(seed: int = 0) -> Any:
    """Return ComfyUI's Wan 2.1 for text to video, of two blocks."""
    import comfy.model_base
    import comfy.supported_models

    config = comfy.supported_models.WAN21_T2V(
        dict(
            image_model="wan2.1",
            model_type="t2v",
            patch_size=(1, 2, 2),
            text_len=8,
            in_dim=4,
            dim=24,
            ffn_dim=32,
            freq_dim=16,
            text_dim=16,
            out_dim=4,
            num_heads=2,
            num_layers=2,
            window_size=(-1, -1),
            qk_norm=True,
            cross_attn_norm=True,
            eps=1e-6,
            dtype=torch.float32,
        )
    )
    config.latent_format = _latents(4, 3)
    return patcher_of(filled(comfy.model_base.WAN21(config, device=torch.device("cpu")), seed))


def tiny_qwen(seed: int = 0) -> Any:
    """Return ComfyUI's Qwen-Image, of two blocks."""
    import comfy.model_base
    import comfy.supported_models

    config = comfy.supported_models.QwenImage(
        dict(
            image_model="qwen_image",
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
            dtype=torch.float32,
        )
    )
    config.latent_format = _latents(4, 3)
    return patcher_of(filled(comfy.model_base.QwenImage(config, device=torch.device("cpu")), seed))


def tiny_unet(seed: int = 0, v_prediction: bool = False) -> Any:
    """Return ComfyUI's U-Net of Stable Diffusion 1, of two levels."""
    import comfy.model_base
    import comfy.supported_models

    config = comfy.supported_models.SD15(
        dict(
            image_size=8,
            in_channels=4,
            out_channels=4,
            model_channels=32,
            num_res_blocks=[1, 1],
            channel_mult=[1, 2],
            transformer_depth=[1, 1],
            transformer_depth_output=[1, 1, 1, 1],
            transformer_depth_middle=1,
            context_dim=16,
            use_spatial_transformer=True,
            num_heads=2,
            use_linear_in_transformer=False,
            legacy=False,
            dtype=torch.float32,
        )
    )
    config.latent_format = _latents(4)
    kind = comfy.model_base.ModelType.V_PREDICTION if v_prediction else comfy.model_base.ModelType.EPS
    return patcher_of(filled(comfy.model_base.BaseModel(config, kind, device=torch.device("cpu")), seed))


def conditioning(seed: int, width: int = 16) -> list:
    """Return a random CONDITIONING."""
    random = torch.Generator().manual_seed(seed)
    text = torch.randn(1, 6, width, generator=random)
    return [[text, {"pooled_output": torch.randn(1, 8, generator=random)}]]
