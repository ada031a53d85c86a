"""ComfyUI as it is installed where COMFYUI_PATH says, and tiny models of its own classes."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
VARIABLE = "COMFYUI_PATH"
CPU = torch.device("cpu")


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
    return _custom_nodes("lesa_comfyui", ROOT / "integrations" / "comfyui")


def _custom_nodes(name: str, folder: Path) -> ModuleType:
    if name not in sys.modules:
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
    return comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)


def flux(pipe: Any) -> Any:
    """Return the transformer of a small `FluxPipeline` as ComfyUI's own FLUX, with the pipeline's latent format."""
    import comfy.model_base

    c = pipe.transformer.config
    hidden = c.num_attention_heads * c.attention_head_dim
    unet = flux_settings(
        in_channels=c.in_channels // 4,
        out_channels=c.in_channels // 4,
        vec_in_dim=c.pooled_projection_dim,
        context_in_dim=c.joint_attention_dim,
        hidden_size=hidden,
        mlp_ratio=4.0,
        num_heads=c.num_attention_heads,
        depth=c.num_layers,
        depth_single_blocks=c.num_single_layers,
        axes_dim=list(c.axes_dims_rope),
        guidance_embed=c.guidance_embeds,
    )
    config = _config("Flux", unet)
    config.latent_format = _latents(c.in_channels // 4)
    base = comfy.model_base.Flux(config, device=CPU)
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


def _config(kind: str, settings: dict, dimensions: int = 2, dtype: torch.dtype = torch.float32) -> Any:
    """Return ComfyUI's configuration of a kind of models, for latents of four channels.

    Of weights of another dtype than float32 the model computes in float32.
    """
    import comfy.supported_models

    config = getattr(comfy.supported_models, kind)({**settings, "dtype": dtype})
    config.latent_format = _latents(4, dimensions)
    config.set_inference_dtype(dtype, None if dtype == torch.float32 else torch.float32)
    return config


def flux_settings(**settings: Any) -> dict:
    """Return the configuration of a FLUX, of one double and one single block."""
    import comfy.ldm.flux.model

    tiny = dict(
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
        guidance_embed=False,
    )
    newer = "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__
    return {**tiny, **({"txt_ids_dims": []} if newer else {}), **settings}


def tiny_flux(seed: int = 0, guidance: bool = False, dtype: torch.dtype = torch.float32) -> Any:
    """Return ComfyUI's FLUX, of one double and one single block."""
    import comfy.model_base

    config = _config("Flux", flux_settings(guidance_embed=guidance), dtype=dtype)
    return patcher_of(filled(comfy.model_base.Flux(config, device=CPU), seed))


def tiny_fp8(seed: int = 0) -> Any:
    """Return ComfyUI's FLUX with weights of 8 bits, which are cast to float32 as they are used."""
    return tiny_flux(seed, dtype=torch.float8_e4m3fn)


def file_of_flux(folder: Path) -> Path:
    """Write the smallest FLUX that ComfyUI's loaders know by its weights: one head, 16 latent channels."""
    import comfy.model_base
    import comfy.model_detection
    from safetensors.torch import save_file

    named = dict(in_channels=16, out_channels=16, context_in_dim=64, hidden_size=128, mlp_ratio=4.0)
    settings = flux_settings(**named, num_heads=1, axes_dim=[16, 56, 56])
    base = filled(comfy.model_base.Flux(_config("Flux", settings), device=CPU))
    weights = base.diffusion_model.state_dict()
    if comfy.model_detection.detect_unet_config(weights, "")["hidden_size"] != settings["hidden_size"]:
        pytest.skip("this ComfyUI takes every FLUX for one of FLUX.1's size")
    save_file(weights, folder / "flux.safetensors")
    return folder / "flux.safetensors"


def loaded_fp8(folder: Path) -> Any:
    """Return what ComfyUI's loader gives of a FLUX in fp8."""
    import folder_paths
    from nodes import UNETLoader

    folder_paths.add_model_folder_path("diffusion_models", str(folder))
    return UNETLoader().load_unet(file_of_flux(folder).name, "fp8_e4m3fn")[0]


def loaded_gguf(folder: Path) -> Any:
    """Return what the loader of ComfyUI-GGUF gives of a FLUX in Q8_0."""
    place = Path(os.environ[VARIABLE]) / "custom_nodes" / "ComfyUI-GGUF"
    if not place.is_dir():
        pytest.skip("ComfyUI-GGUF is not among ComfyUI's custom nodes")
    gguf = pytest.importorskip("gguf", reason="ComfyUI-GGUF needs gguf, which this Python does not have")
    import folder_paths
    from safetensors.torch import load_file

    writer = gguf.GGUFWriter(folder / "flux.gguf", "flux")
    for name, x in load_file(file_of_flux(folder)).items():
        kind = gguf.GGMLQuantizationType.Q8_0 if x.ndim > 1 and x.shape[-1] % 32 == 0 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(x.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    folder_paths.add_model_folder_path("diffusion_models", str(folder))
    loader = _custom_nodes("comfyui_gguf", place).NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]
    return loader().load_unet("flux.gguf")[0]


def tiny_wan(seed: int = 0) -> Any:
    """Return ComfyUI's Wan 2.1 for text to video, of two blocks; of the classes of Wan 2.2, too."""
    import comfy.model_base

    settings = dict(
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
    )
    return patcher_of(filled(comfy.model_base.WAN21(_config("WAN21_T2V", settings, 3), device=CPU), seed))


def tiny_qwen(seed: int = 0) -> Any:
    """Return ComfyUI's Qwen-Image, of two blocks."""
    import comfy.model_base

    settings = dict(
        image_model="qwen_image",
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    return patcher_of(filled(comfy.model_base.QwenImage(_config("QwenImage", settings, 3), device=CPU), seed))


def tiny_lumina(seed: int = 0, **settings: Any) -> Any:
    """Return ComfyUI's Lumina 2, of two layers and one that refines."""
    import comfy.model_base

    tiny = dict(
        image_model="lumina2",
        patch_size=2,
        in_channels=4,
        dim=32,
        cap_feat_dim=16,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        multiple_of=16,
        ffn_dim_multiplier=1.0,
        qk_norm=True,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 64, 64],
    )
    kind = "ZImage" if settings else "Lumina2"
    return patcher_of(filled(comfy.model_base.Lumina2(_config(kind, tiny | settings), device=CPU), seed))


def tiny_z_image(seed: int = 0) -> Any:
    """Return ComfyUI's Z-Image: Lumina 2 with other modulation, times and padding."""
    import comfy.supported_models

    if not hasattr(comfy.supported_models, "ZImage"):
        pytest.skip("this ComfyUI is older than Z-Image")
    settings = dict(dim=256, axes_dims=[32, 48, 48], z_image_modulation=True, time_scale=1000.0)
    return tiny_lumina(seed, **settings, pad_tokens_multiple=32)


def tiny_ltx(seed: int = 0) -> Any:
    """Return ComfyUI's LTX-Video, of two blocks."""
    import comfy.model_base

    settings = dict(
        image_model="ltxv",
        in_channels=4,
        cross_attention_dim=32,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=16,
        num_layers=2,
    )
    return patcher_of(filled(comfy.model_base.LTXV(_config("LTXV", settings, 3), device=CPU), seed))


UNET = dict(
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
)


def tiny_unet(seed: int = 0, v_prediction: bool = False) -> Any:
    """Return ComfyUI's U-Net of Stable Diffusion 1, of two levels."""
    import comfy.model_base

    kind = comfy.model_base.ModelType.V_PREDICTION if v_prediction else comfy.model_base.ModelType.EPS
    return patcher_of(filled(comfy.model_base.BaseModel(_config("SD15", UNET), kind, device=CPU), seed))


def tiny_sdxl(seed: int = 0) -> Any:
    """Return ComfyUI's U-Net of Stable Diffusion XL, of two levels: it is told sizes and a pooled text, too."""
    import comfy.model_base

    settings = {
        **UNET,
        "use_linear_in_transformer": True,
        "transformer_depth": [0, 2],
        "transformer_depth_output": [0, 0, 2, 2],
        "num_classes": "sequential",
        "adm_in_channels": 8 + 6 * 256,
    }
    return patcher_of(filled(comfy.model_base.SDXL(_config("SDXL", settings), device=CPU), seed))


def conditioning(seed: int, width: int = 16, **more: Any) -> list:
    """Return a random CONDITIONING of six tokens."""
    random = torch.Generator().manual_seed(seed)
    text = torch.randn(1, 6, width, generator=random)
    return [[text, {"pooled_output": torch.randn(1, 8, generator=random), **more}]]
