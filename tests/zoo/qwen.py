"""Qwen-Image and Z-Image."""

import sys
from dataclasses import replace
from typing import Any
from unittest import mock

import diffusers as d

from zoo.flux import EDIT, SQUARE, shifted
from zoo.parts import WIDTH, Specimen, entry, kl, mask, noise, picture, qwen_vae, specimen, tiny


def qwen_parts(**config: Any) -> dict[str, Any]:
    transformer = tiny(d.QwenImageTransformer2DModel, in_channels=16, out_channels=4, **config)
    return dict(transformer=transformer, vae=qwen_vae(), scheduler=shifted())


@entry
def qwen_image_guided() -> Specimen:
    return specimen(d.QwenImagePipeline, qwen_parts(), true_cfg_scale=4.0, **SQUARE)


@entry
def qwen_image_img2img_guided() -> Specimen:
    return specimen(d.QwenImageImg2ImgPipeline, qwen_parts(), **EDIT)


@entry
def qwen_image_inpaint_guided() -> Specimen:
    return specimen(d.QwenImageInpaintPipeline, qwen_parts(), mask_image=mask(), **EDIT)


def small(subject: Specimen, side: int = 16) -> Specimen:
    """Let the pipeline size its pictures for a square of `side` pixels in place of 1024, for its calls alone."""
    module = sys.modules[type(subject.pipe).__module__]
    number = len(module.calculate_dimensions(1024, 1.0))  # of what it gives: a side twice, in some modules None too

    def sizes(area: int, ratio: float) -> tuple[int | None, ...]:
        return (side, side, None)[:number]

    return replace(subject, around=lambda: mock.patch.object(module, "calculate_dimensions", sizes))


@entry
def qwen_image_edit_guided() -> Specimen:
    return small(specimen(d.QwenImageEditPipeline, qwen_parts(), image=picture(), **SQUARE))


@entry
def qwen_image_edit_inpaint_guided() -> Specimen:
    return small(specimen(d.QwenImageEditInpaintPipeline, qwen_parts(), mask_image=mask(), **EDIT))


@entry
def qwen_image_edit_plus_guided() -> Specimen:
    return small(specimen(d.QwenImageEditPlusPipeline, qwen_parts(), image=[picture(), picture(seed=1)], **SQUARE))


@entry
def qwen_image_controlnet_guided() -> Specimen:
    parts = dict(qwen_parts(), controlnet=tiny(d.QwenImageControlNetModel, in_channels=16, out_channels=4))
    return specimen(d.QwenImageControlNetPipeline, parts, control_image=picture(), **SQUARE)


@entry
def qwen_image_controlnet_inpaint_guided() -> Specimen:
    sizes = dict(in_channels=16, out_channels=4, extra_condition_channels=4)
    parts = dict(qwen_parts(), controlnet=tiny(d.QwenImageControlNetModel, **sizes))
    return specimen(d.QwenImageControlNetInpaintPipeline, parts, control_image=picture(), control_mask=mask(), **SQUARE)


def z_image_parts() -> dict[str, Any]:
    sizes = dict(in_channels=4, dim=WIDTH, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2)
    axes = dict(axes_dims=[4, 4, 8], axes_lens=[256, 64, 64])
    return dict(transformer=tiny(d.ZImageTransformer2DModel, **sizes, **axes), vae=kl(blocks=2), scheduler=shifted())


def z_image_text() -> dict[str, Any]:
    """Give the embeddings as lists, one tensor a prompt, as these pipelines want them."""
    return dict(prompt_embeds=[noise(7, WIDTH)], negative_prompt_embeds=[noise(5, WIDTH, seed=1)])


@entry
def z_image_guided() -> Specimen:
    return specimen(d.ZImagePipeline, z_image_parts(), **z_image_text(), **SQUARE)


@entry
def z_image_truncated() -> Specimen:
    return specimen(d.ZImagePipeline, z_image_parts(), cfg_truncation=0.5, **z_image_text(), **SQUARE)


@entry
def z_image_img2img_guided() -> Specimen:
    return specimen(d.ZImageImg2ImgPipeline, z_image_parts(), **z_image_text(), **EDIT)


@entry
def z_image_inpaint_guided() -> Specimen:
    return specimen(d.ZImageInpaintPipeline, z_image_parts(), mask_image=mask(), **z_image_text(), **EDIT)
