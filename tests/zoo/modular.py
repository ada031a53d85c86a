"""Modular pipelines, with guiders."""

from typing import Any

import diffusers as d
import torch

from zoo.flux import EDIT, SQUARE, flow, flux2_parts, flux_parts
from zoo.hunyuan import hunyuan15_parts
from zoo.image import krea2_parts, sd3_parts
from zoo.ltx import LTX, ltx_parts
from zoo.parts import STEPS, TOKENS, WIDTH, Specimen, entry, noise, picture, tiny
from zoo.qwen import qwen_parts, z_image_parts, z_image_text
from zoo.unet import sdxl_parts
from zoo.wan import FILM, helios_parts, wan, wan_parts


def modular(
    blocks: Any, components: dict[str, Any], drop: tuple[str, ...] = ("text_encoder",), **arguments: Any
) -> Specimen:
    """Build a pipeline of blocks less those named in `drop`; it gives the latents, not a picture."""
    for name in drop:
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    pipe.update_components(**components)
    for block in vars(pipe).values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    return Specimen(pipe, {"num_inference_steps": STEPS, "output_type": "latent", "output": "latents", **arguments})


@entry
def modular_flux() -> Specimen:
    from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxAutoBlocks

    embeds = dict(prompt_embeds=noise(1, TOKENS, WIDTH), pooled_prompt_embeds=noise(1, WIDTH))
    return modular(FluxAutoBlocks(), flux_parts(), ("text_encoder", "decode"), **embeds, **SQUARE)


@entry
def modular_flux_img2img() -> Specimen:
    from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxAutoBlocks

    embeds = dict(prompt_embeds=noise(1, TOKENS, WIDTH), pooled_prompt_embeds=noise(1, WIDTH))
    return modular(FluxAutoBlocks(), flux_parts(), ("text_encoder", "decode"), **embeds, **EDIT)


def masked_embeds(masks: torch.dtype = torch.long) -> dict[str, Any]:
    ones = {f"{sign}prompt_embeds_mask": torch.ones(1, TOKENS, dtype=masks) for sign in ("", "negative_")}
    return dict(ones, prompt_embeds=noise(1, TOKENS, WIDTH), negative_prompt_embeds=noise(1, TOKENS, WIDTH, seed=1))


def modular_qwen(guider: Any, **arguments: Any) -> Specimen:
    from diffusers.modular_pipelines.qwenimage.modular_blocks_qwenimage import QwenImageAutoBlocks

    parts = dict(qwen_parts(), guider=guider)
    return modular(
        QwenImageAutoBlocks(), parts, ("text_encoder", "decode"), **masked_embeds(), **{**SQUARE, **arguments}
    )


@entry
def modular_qwen_guided() -> Specimen:
    return modular_qwen(d.ClassifierFreeGuidance(4.0))


@entry
def modular_qwen_interval_guided() -> Specimen:
    # On a part of the steps there is no second call
    return modular_qwen(d.ClassifierFreeGuidance(4.0, start=0.2, stop=0.7))


@entry
def modular_qwen_img2img_guided() -> Specimen:
    return modular_qwen(d.ClassifierFreeGuidance(4.0), **EDIT)


@entry
def modular_flux2_klein_guided() -> Specimen:
    from diffusers.modular_pipelines.flux2.modular_blocks_flux2_klein_base import Flux2KleinBaseAutoBlocks

    parts = dict(flux2_parts(guidance_embeds=False), guider=d.ClassifierFreeGuidance(4.0))
    embeds = dict(prompt_embeds=noise(1, TOKENS, WIDTH), negative_prompt_embeds=noise(1, TOKENS, WIDTH, seed=1))
    return modular(Flux2KleinBaseAutoBlocks(), parts, ("text_encoder", "decode"), **embeds, **SQUARE)


@entry
def modular_wan_guided() -> Specimen:
    from diffusers.modular_pipelines.wan.modular_blocks_wan import WanBlocks

    guider = d.ClassifierFreeZeroStarGuidance(4.0)  # it puts zeros in place of the first velocity
    parts = dict(wan_parts(16), guider=guider)  # the blocks draw noise of 16 channels
    embeds = dict(prompt_embeds=noise(1, TOKENS, WIDTH), negative_prompt_embeds=noise(1, TOKENS, WIDTH, seed=1))
    return modular(WanBlocks(), parts, ("text_encoder", "decode"), num_frames=9, **embeds, **SQUARE)


@entry
def modular_z_image_guided() -> Specimen:
    from diffusers.modular_pipelines.z_image.modular_blocks_z_image import ZImageAutoBlocks

    parts = dict(z_image_parts(), guider=d.ClassifierFreeGuidance(4.0))
    return modular(ZImageAutoBlocks(), parts, ("text_encoder", "decode"), **z_image_text(), **SQUARE)


@entry
def modular_sdxl_guided() -> Specimen:
    from diffusers.modular_pipelines.stable_diffusion_xl.modular_blocks_stable_diffusion_xl import (
        StableDiffusionXLAutoBlocks,
    )

    parts = dict(
        sdxl_parts(d.EulerDiscreteScheduler()),
        guider=d.PerturbedAttentionGuidance(4.0, perturbed_guidance_config=attention_of_a_block()),
    )
    parts.pop("add_watermarker")
    names = dict(prompt_embeds=(1, TOKENS, WIDTH), pooled_prompt_embeds=(1, WIDTH))
    embeds = {
        f"{sign}{name}": noise(*shape, seed=seed)
        for seed, sign in enumerate(["", "negative_"])
        for name, shape in names.items()
    }
    return modular(StableDiffusionXLAutoBlocks(), parts, ("text_encoder", "decode"), **embeds, **SQUARE)


def attention_of_a_block() -> d.LayerSkipConfig:
    return d.LayerSkipConfig(
        indices=[0],
        fqn="mid_block.attentions.0.transformer_blocks",
        skip_attention=False,
        skip_ff=False,
        skip_attention_scores=True,
    )


@entry
def modular_krea2_guided() -> Specimen:
    from diffusers.modular_pipelines.krea2.modular_blocks_krea2 import Krea2AutoBlocks

    parts = dict(krea2_parts(), guider=d.ClassifierFreeGuidance(4.0))
    embeds = dict(
        masked_embeds(torch.bool),
        prompt_embeds=noise(1, TOKENS, 3, 16),
        negative_prompt_embeds=noise(1, TOKENS, 3, 16, seed=1),
    )
    return modular(Krea2AutoBlocks(), parts, ("text_encoder", "decode"), **embeds, **SQUARE)


@entry
def modular_sd3_guided() -> Specimen:
    from diffusers.modular_pipelines.stable_diffusion_3.modular_blocks_stable_diffusion_3 import (
        StableDiffusion3AutoBlocks,
    )

    parts = dict(sd3_parts(), guider=d.ClassifierFreeGuidance(4.0))
    names = dict(prompt_embeds=(1, TOKENS, WIDTH), pooled_prompt_embeds=(1, WIDTH))
    embeds = {
        f"{sign}{name}": noise(*shape, seed=seed)
        for seed, sign in enumerate(["", "negative_"])
        for name, shape in names.items()
    }
    return modular(StableDiffusion3AutoBlocks(), parts, ("text_encoder", "decode"), **embeds, **SQUARE)


@entry
def modular_ltx_guided() -> Specimen:
    from diffusers.modular_pipelines.ltx.modular_blocks_ltx import LTXAutoBlocks

    parts = dict(ltx_parts(), guider=d.ClassifierFreeGuidance(3.0))
    kept = {f"{sign}prompt_attention_mask": torch.ones(1, TOKENS, dtype=torch.long) for sign in ("", "negative_")}
    embeds = dict(prompt_embeds=noise(1, TOKENS, WIDTH), negative_prompt_embeds=noise(1, TOKENS, WIDTH, seed=1))
    return modular(LTXAutoBlocks(), parts, ("text_encoder", "decode"), **embeds, **kept, **LTX)


@entry
def modular_flux_kontext() -> Specimen:
    from diffusers.modular_pipelines.flux.modular_blocks_flux_kontext import FluxKontextAutoBlocks

    embeds = dict(prompt_embeds=noise(1, TOKENS, WIDTH), pooled_prompt_embeds=noise(1, WIDTH))
    more = dict(image=picture(), max_area=256, _auto_resize=False)
    return modular(FluxKontextAutoBlocks(), flux_parts(), ("text_encoder", "decode"), **embeds, **more, **SQUARE)


@entry
def modular_hunyuan_video15_guided() -> Specimen:
    from diffusers.modular_pipelines.hunyuan_video1_5.modular_blocks_hunyuan_video1_5 import HunyuanVideo15AutoBlocks

    names = {
        f"{sign}prompt_embeds{end}": noise(1, TOKENS, WIDTH, seed=seed)
        for seed, sign in enumerate(["", "negative_"])
        for end in ("", "_2")
    }
    kept = {
        f"{sign}prompt_embeds_mask{end}": torch.ones(1, TOKENS, dtype=torch.long)
        for sign in ("", "negative_")
        for end in ("", "_2")
    }
    return modular(
        HunyuanVideo15AutoBlocks(), hunyuan15_parts("t2v"), ("text_encoder", "decode"), **names, **kept, **FILM
    )


@entry
def modular_flux3_guided() -> Specimen:
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3AutoBlocks

    sizes = dict(in_channels=16, cond_in_channels=16, timestep_channels=16, axes_dims_rope=(4, 4, 4, 4))
    parts = dict(flux2_parts(), guider=d.ClassifierFreeGuidance(4.0), scheduler=flow(shift=3.0))
    parts["transformer"] = tiny(d.Flux3Transformer2DModel, **sizes)
    embeds = dict(prompt_embeds=noise(1, TOKENS, WIDTH), negative_prompt_embeds=noise(1, TOKENS, WIDTH, seed=1))
    return modular(Flux3AutoBlocks(), parts, ("prompt_upsampler", "text_encoder", "decode"), **embeds, **SQUARE)


@entry
def modular_minimax_h3() -> Specimen:
    from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3Blocks

    widths = dict(time_embed_hidden_dim=16, time_embed_dim=16, rope_freq_dim=2)
    transformer = tiny(d.MiniMaxH3Transformer3DModel, **widths)
    parts = dict(transformer=transformer, scheduler=d.MiniMaxH3Scheduler(), audio_scheduler=d.MiniMaxH3Scheduler())
    more = dict(prompt_embeds=noise(1, TOKENS, WIDTH), text_token_tags=torch.zeros(TOKENS, dtype=torch.long))
    return modular(MiniMaxH3Blocks(), parts, ("text_encoder", "decode"), height=64, width=64, num_frames=124, **more)


@entry
def modular_wan22_guided() -> Specimen:
    from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22Blocks

    guiders = dict(guider=d.ClassifierFreeGuidance(4.0), guider_2=d.ClassifierFreeGuidance(3.0))
    parts = dict(wan_parts(16), transformer_2=wan(1, channels=16), **guiders)
    embeds = dict(prompt_embeds=noise(1, TOKENS, WIDTH), negative_prompt_embeds=noise(1, TOKENS, WIDTH, seed=1))
    return modular(Wan22Blocks(), parts, ("text_encoder", "decode"), num_frames=9, **embeds, **SQUARE)


@entry
def modular_flux2() -> Specimen:
    from diffusers.modular_pipelines.flux2.modular_blocks_flux2 import Flux2AutoBlocks

    embeds = dict(prompt_embeds=noise(1, TOKENS, WIDTH))
    return modular(Flux2AutoBlocks(), flux2_parts(), ("text_encoder", "decode"), **embeds, **SQUARE)


@entry
def modular_helios_guided() -> Specimen:
    from diffusers.modular_pipelines.helios.modular_blocks_helios import HeliosAutoBlocks

    parts = dict(helios_parts(16, stage_range=[0, 1], stages=1), guider=d.ClassifierFreeGuidance(4.0))
    embeds = dict(prompt_embeds=noise(1, TOKENS, WIDTH), negative_prompt_embeds=noise(1, TOKENS, WIDTH, seed=1))
    more = dict(num_latent_frames_per_chunk=3, num_frames=21)
    return modular(HeliosAutoBlocks(), parts, ("text_encoder", "decode"), **more, **embeds, **SQUARE)


@entry
def modular_qwen_image21_guided() -> Specimen:
    from diffusers.modular_pipelines.qwenimage21.modular_blocks_qwenimage21 import QwenImage21AutoBlocks

    transformer = tiny(d.QwenImage21Transformer2DModel, in_channels=4, out_channels=4, context_in_dim=WIDTH)
    parts = dict(qwen_parts(), transformer=transformer, guider=d.ClassifierFreeGuidance(4.0))
    pads = {f"{sign}image_pad_mask": torch.zeros(1, TOKENS, dtype=torch.bool) for sign in ("", "negative_")}
    more = dict(masked_embeds(torch.bool), **pads, height=64, width=64)
    return modular(QwenImage21AutoBlocks(), parts, ("text_encoder", "decode"), **more)
