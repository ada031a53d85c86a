"""FLUX.1, FLUX.2 and what grew from them: tokens of packed latents, guidance by a second call."""

from typing import Any

import diffusers as d
import torch

from zoo.parts import Specimen, entry, kl, mask, picture, specimen, tiny

SQUARE: dict[str, Any] = dict(height=16, width=16)
EDIT: dict[str, Any] = dict(SQUARE, image=picture(), strength=0.8)


def flow(**config: Any) -> d.FlowMatchEulerDiscreteScheduler:
    return d.FlowMatchEulerDiscreteScheduler(**config)


def shifted() -> d.FlowMatchEulerDiscreteScheduler:
    """Give the scheduler of FLUX: its times depend on the number of tokens."""
    return flow(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=256)


def flux_parts(channels: int = 4, conditioning: int = 0, **config: Any) -> dict[str, Any]:
    """Build the parts of a FLUX pipeline whose input has `conditioning` channels beside the packed latents."""
    sizes = dict(in_channels=4 * channels + conditioning, out_channels=4 * channels)
    transformer = tiny(d.FluxTransformer2DModel, **{**sizes, **config})
    return dict(transformer=transformer, vae=kl(channels, blocks=2), scheduler=shifted())


def flux_controlnet() -> Any:
    return tiny(d.FluxControlNetModel, in_channels=16)


@entry
def flux() -> Specimen:
    embedded = flux_parts(guidance_embeds=True)
    return specimen(
        d.FluxPipeline, embedded, drop=["negative_prompt_embeds", "negative_pooled_prompt_embeds"], **SQUARE
    )


@entry
def flux_guided() -> Specimen:
    return specimen(d.FluxPipeline, flux_parts(), true_cfg_scale=3.0, **SQUARE)


@entry
def flux_img2img_guided() -> Specimen:
    return specimen(d.FluxImg2ImgPipeline, flux_parts(), true_cfg_scale=3.0, **EDIT)


@entry
def flux_inpaint_guided() -> Specimen:
    return specimen(d.FluxInpaintPipeline, flux_parts(), true_cfg_scale=3.0, mask_image=mask(), **EDIT)


@entry
def flux_kontext_guided() -> Specimen:
    area = dict(max_area=256, _auto_resize=False)
    return specimen(d.FluxKontextPipeline, flux_parts(), true_cfg_scale=3.0, image=picture(), **area, **SQUARE)


@entry
def flux_kontext_inpaint_guided() -> Specimen:
    more = dict(mask_image=mask(), max_area=256, _auto_resize=False)
    return specimen(d.FluxKontextInpaintPipeline, flux_parts(), true_cfg_scale=3.0, **more, **EDIT)


@entry
def flux_fill() -> Specimen:
    # Beside the latents: those of the masked picture, and the mask, packed
    parts = flux_parts(conditioning=16 + 16)
    return specimen(d.FluxFillPipeline, parts, image=picture(), mask_image=mask(), **SQUARE)


@entry
def flux_control() -> Specimen:
    return specimen(d.FluxControlPipeline, flux_parts(conditioning=16), control_image=picture(), **SQUARE)


@entry
def flux_control_img2img() -> Specimen:
    return specimen(d.FluxControlImg2ImgPipeline, flux_parts(conditioning=16), control_image=picture(seed=1), **EDIT)


@entry
def flux_control_inpaint() -> Specimen:
    more = dict(control_image=picture(seed=1), mask_image=mask())
    return specimen(d.FluxControlInpaintPipeline, flux_parts(conditioning=16), **more, **EDIT)


@entry
def flux_controlnet_guided() -> Specimen:
    parts = dict(flux_parts(), controlnet=flux_controlnet())
    return specimen(d.FluxControlNetPipeline, parts, true_cfg_scale=3.0, control_image=picture(), **SQUARE)


@entry
def flux_controlnet_img2img() -> Specimen:
    parts = dict(flux_parts(), controlnet=flux_controlnet())
    return specimen(d.FluxControlNetImg2ImgPipeline, parts, control_image=picture(seed=1), **EDIT)


@entry
def flux_controlnet_inpaint() -> Specimen:
    parts = dict(flux_parts(), controlnet=flux_controlnet())
    more = dict(control_image=picture(seed=1), mask_image=mask())
    return specimen(d.FluxControlNetInpaintPipeline, parts, **more, **EDIT)


def flux2_parts(**config: Any) -> dict[str, Any]:
    transformer = tiny(d.Flux2Transformer2DModel, in_channels=16, axes_dims_rope=(4, 4, 4, 4), **config)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    vae = tiny(
        d.AutoencoderKLFlux2,
        block_out_channels=(4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        **blocks,
    )
    return dict(transformer=transformer, vae=vae, scheduler=shifted())


@entry
def flux2() -> Specimen:
    return specimen(d.Flux2Pipeline, flux2_parts(), **SQUARE)


@entry
def flux2_edit() -> Specimen:
    return specimen(d.Flux2Pipeline, flux2_parts(), image=picture(64), **SQUARE)


@entry
def flux2_klein_guided() -> Specimen:
    return specimen(d.Flux2KleinPipeline, flux2_parts(guidance_embeds=False), guidance_scale=4.0, **SQUARE)


@entry
def flux2_klein_inpaint_guided() -> Specimen:
    more = dict(EDIT, image=picture(64), mask_image=mask(64), height=64, width=64)
    return specimen(d.Flux2KleinInpaintPipeline, flux2_parts(guidance_embeds=False), **more)


@entry
def flux2_klein_kv() -> Specimen:
    return specimen(d.Flux2KleinKVPipeline, flux2_parts(guidance_embeds=False), image=picture(64), **SQUARE)


def chroma_parts() -> dict[str, Any]:
    approximator = dict(approximator_num_channels=16, approximator_hidden_dim=32, approximator_layers=1)
    transformer = tiny(d.ChromaTransformer2DModel, in_channels=16, **approximator)
    return dict(transformer=transformer, vae=kl(blocks=2), scheduler=flow(shift=3.0))


@entry
def chroma_guided() -> Specimen:
    return specimen(d.ChromaPipeline, chroma_parts(), masks=torch.bool, **SQUARE)


@entry
def chroma_img2img_guided() -> Specimen:
    return specimen(d.ChromaImg2ImgPipeline, chroma_parts(), **EDIT)


@entry
def bria_guided() -> Specimen:
    transformer = tiny(d.BriaTransformer2DModel, in_channels=16, pooled_projection_dim=None)
    return specimen(d.BriaPipeline, dict(transformer=transformer, vae=kl(blocks=2), scheduler=shifted()), **SQUARE)


@entry
def ovis_image_guided() -> Specimen:
    transformer = tiny(d.OvisImageTransformer2DModel, in_channels=16, out_channels=16)
    return specimen(d.OvisImagePipeline, dict(transformer=transformer, vae=kl(blocks=2), scheduler=shifted()), **SQUARE)


def longcat_parts() -> dict[str, Any]:
    transformer = tiny(d.LongCatImageTransformer2DModel, in_channels=64)
    return dict(transformer=transformer, vae=kl(16, blocks=2), scheduler=shifted())


@entry
def longcat_image_guided() -> Specimen:
    subject = specimen(d.LongCatImagePipeline, longcat_parts(), enable_prompt_rewrite=False, **SQUARE)
    encode = (
        subject.pipe.encode_prompt
    )  # it takes the batch size from prompts, which the call refuses beside embeddings
    subject.pipe.encode_prompt = lambda **arguments: encode(**{**arguments, "prompt": [""]})
    return subject
