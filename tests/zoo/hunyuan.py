"""HunyuanVideo and its kin."""

from typing import Any

import diffusers as d

from zoo.flux import flow
from zoo.parts import WIDTH, Specimen, entry, picture, specimen, tiny
from zoo.wan import FILM, with_image


def hunyuan_video_vae() -> d.AutoencoderKLHunyuanVideo:
    blocks = dict(down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4)
    return tiny(
        d.AutoencoderKLHunyuanVideo,
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
        **blocks,
    )


def hunyuan_video_parts(conditioning: int = 0, **config: Any) -> dict[str, Any]:
    sizes = dict(in_channels=4 + conditioning, out_channels=4, patch_size=1)
    transformer = tiny(d.HunyuanVideoTransformer3DModel, **{**sizes, **config})
    return dict(transformer=transformer, vae=hunyuan_video_vae(), scheduler=flow(shift=7.0))


@entry
def hunyuan_video() -> Specimen:
    return specimen(d.HunyuanVideoPipeline, hunyuan_video_parts(), **FILM)


@entry
def hunyuan_video_guided() -> Specimen:
    return specimen(d.HunyuanVideoPipeline, hunyuan_video_parts(), true_cfg_scale=3.0, **FILM)


@entry
def hunyuan_video_i2v_guided() -> Specimen:
    parts = hunyuan_video_parts(5, guidance_embeds=False, image_condition_type="latent_concat")
    return specimen(d.HunyuanVideoImageToVideoPipeline, parts, image=picture(), true_cfg_scale=3.0, **FILM)


@entry
def hunyuan_video_token_replace_guided() -> Specimen:
    parts = hunyuan_video_parts(guidance_embeds=True, image_condition_type="token_replace")
    return specimen(d.HunyuanVideoImageToVideoPipeline, parts, image=picture(), true_cfg_scale=3.0, **FILM)


@entry
def hunyuan_skyreels_i2v_guided() -> Specimen:
    return specimen(d.HunyuanSkyreelsImageToVideoPipeline, hunyuan_video_parts(4), image=picture(), **FILM)


@entry
def framepack_guided() -> Specimen:
    sizes = dict(
        in_channels=4,
        out_channels=4,
        patch_size=2,
        has_image_proj=True,
        image_proj_dim=WIDTH,
        has_clean_x_embedder=True,
    )
    parts = dict(hunyuan_video_parts(), transformer=tiny(d.HunyuanVideoFramepackTransformer3DModel, **sizes))
    more = dict(image=picture(32), true_cfg_scale=3.0, latent_window_size=3, height=32, width=32, num_frames=13)
    return with_image(specimen(d.HunyuanVideoFramepackPipeline, parts, **more))


def hunyuan15_parts(task: str) -> dict[str, Any]:
    sizes = dict(
        in_channels=9, out_channels=4, text_embed_2_dim=WIDTH, image_embed_dim=WIDTH, target_size=16, task_type=task
    )
    transformer = tiny(d.HunyuanVideo15Transformer3DModel, **sizes)
    vae = tiny(
        d.AutoencoderKLHunyuanVideo15,
        latent_channels=4,
        block_out_channels=(16, 16),
        layers_per_block=1,
        spatial_compression_ratio=4,
        temporal_compression_ratio=2,
        downsample_match_channel=False,
        upsample_match_channel=False,
    )
    return dict(transformer=transformer, vae=vae, scheduler=flow(shift=7.0), guider=d.ClassifierFreeGuidance(3.0))


@entry
def hunyuan_video15_guided() -> Specimen:
    return specimen(d.HunyuanVideo15Pipeline, hunyuan15_parts("t2v"), **FILM)


@entry
def hunyuan_video15_i2v_guided() -> Specimen:
    subject = specimen(d.HunyuanVideo15ImageToVideoPipeline, hunyuan15_parts("i2v"), image=picture(), num_frames=9)
    return with_image(subject)
