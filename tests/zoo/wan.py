"""Wan and its kin: videos of latents that the Wan VAE made."""

from typing import Any

import diffusers as d

from zoo.flux import flow
from zoo.parts import WIDTH, Specimen, clip, entry, mask, noise, picture, specimen, stub, tiny, wan_vae

FILM: dict[str, Any] = dict(height=16, width=16, num_frames=9)


def unipc(**config: Any) -> d.UniPCMultistepScheduler:
    return d.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, **config)


def wan(seed: int = 0, conditioning: int = 0, channels: int = 4, **config: Any) -> d.WanTransformer3DModel:
    return tiny(d.WanTransformer3DModel, seed, in_channels=channels + conditioning, out_channels=channels, **config)


def wan_parts(channels: int = 4, **config: Any) -> dict[str, Any]:
    return dict(transformer=wan(channels=channels, **config), vae=wan_vae(channels), scheduler=unipc())


def with_image(subject: Specimen) -> Specimen:
    """Stand in for the image encoder: the picture is 4 tokens of noise."""
    return stub(subject, encode_image=noise(1, 4, WIDTH))


@entry
def wan21_guided() -> Specimen:
    return specimen(d.WanPipeline, wan_parts(), **FILM)


@entry
def wan21_euler_guided() -> Specimen:
    return specimen(d.WanPipeline, dict(wan_parts(), scheduler=flow(shift=3.0)), **FILM)


@entry
def wan22_guided() -> Specimen:
    parts = dict(wan_parts(), transformer_2=wan(1), boundary_ratio=0.875)
    return specimen(d.WanPipeline, parts, guidance_scale_2=3.0, **FILM)


@entry
def wan22_expanded_guided() -> Specimen:
    # The 5B model: a timestep for every token
    return specimen(d.WanPipeline, dict(wan_parts(), expand_timesteps=True), **FILM)


@entry
def wan_i2v_guided() -> Specimen:
    parts = wan_parts(conditioning=8, image_dim=WIDTH)
    return with_image(specimen(d.WanImageToVideoPipeline, parts, image=picture(), **FILM))


@entry
def wan22_i2v_guided() -> Specimen:
    parts = dict(wan_parts(conditioning=8), transformer_2=wan(1, 8), boundary_ratio=0.9)
    return specimen(d.WanImageToVideoPipeline, parts, image=picture(), **FILM)


@entry
def wan22_i2v_expanded_guided() -> Specimen:
    return specimen(d.WanImageToVideoPipeline, dict(wan_parts(), expand_timesteps=True), image=picture(), **FILM)


@entry
def wan_v2v_guided() -> Specimen:
    return specimen(d.WanVideoToVideoPipeline, wan_parts(), video=clip(9), strength=0.8, height=16, width=16)


@entry
def wan_vace_guided() -> Specimen:
    vace = dict(vace_layers=[0, 1], vace_in_channels=4 + 4 + 64)
    transformer = tiny(d.WanVACETransformer3DModel, in_channels=4, out_channels=4, **vace)
    parts = dict(wan_parts(), transformer=transformer)
    return specimen(d.WanVACEPipeline, parts, video=clip(9), mask=[mask()] * 9, **FILM)


@entry
def lucy_edit_guided() -> Specimen:
    parts = dict(wan_parts(conditioning=4), transformer_2=wan(1, 4), boundary_ratio=0.9)
    return specimen(d.LucyEditPipeline, parts, video=clip(9), **FILM)


@entry
def wan_animate_guided() -> Specimen:
    motion = dict(
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8},
        motion_encoder_size=16,
        motion_style_dim=8,
        motion_dim=4,
        motion_encoder_dim=16,
    )
    face = dict(face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2)
    transformer = tiny(
        d.WanAnimateTransformer3DModel,
        in_channels=12,
        latent_channels=4,
        out_channels=4,
        image_dim=WIDTH,
        **motion,
        **face,
    )
    parts = dict(wan_parts(), transformer=transformer)
    more = dict(image=picture(), pose_video=clip(13), face_video=clip(13), segment_frame_length=9, guidance_scale=3.0)
    return with_image(specimen(d.WanAnimatePipeline, parts, **more, height=16, width=16))


@entry
def chrono_edit_guided() -> Specimen:
    transformer = tiny(d.ChronoEditTransformer3DModel, in_channels=12, out_channels=4, image_dim=WIDTH)
    parts = dict(wan_parts(), transformer=transformer)
    more = dict(image=picture(), height=16, width=16, num_frames=9)
    reasoning = dict(enable_temporal_reasoning=True, num_temporal_reasoning_steps=3)
    return with_image(specimen(d.ChronoEditPipeline, parts, **reasoning, **more))


def skyreels_parts(conditioning: int = 0, **config: Any) -> dict[str, Any]:
    transformer = tiny(d.SkyReelsV2Transformer3DModel, in_channels=4 + conditioning, out_channels=4, **config)
    return dict(transformer=transformer, vae=wan_vae(), scheduler=unipc())


@entry
def skyreels_guided() -> Specimen:
    return specimen(d.SkyReelsV2Pipeline, skyreels_parts(), **FILM)


@entry
def skyreels_i2v_guided() -> Specimen:
    parts = skyreels_parts(8, image_dim=WIDTH)
    return with_image(specimen(d.SkyReelsV2ImageToVideoPipeline, parts, image=picture(), **FILM))


@entry
def skyreels_forcing_guided() -> Specimen:
    return specimen(d.SkyReelsV2DiffusionForcingPipeline, skyreels_parts(), base_num_frames=9, **FILM)


@entry
def skyreels_forcing_asynchronous_guided() -> Specimen:
    # Frames of one call at different noise levels
    more = dict(base_num_frames=9, ar_step=2, causal_block_size=1)
    return specimen(d.SkyReelsV2DiffusionForcingPipeline, skyreels_parts(num_frame_per_block=1), **more, **FILM)


@entry
def skyreels_forcing_long_guided() -> Specimen:
    more = dict(base_num_frames=9, overlap_history=5, height=16, width=16, num_frames=13)
    return specimen(d.SkyReelsV2DiffusionForcingPipeline, skyreels_parts(), **more)


@entry
def skyreels_forcing_i2v_guided() -> Specimen:
    more = dict(image=picture(), base_num_frames=9)
    return specimen(d.SkyReelsV2DiffusionForcingImageToVideoPipeline, skyreels_parts(), **more, **FILM)


@entry
def skyreels_forcing_v2v_guided() -> Specimen:
    more = dict(video=clip(5), overlap_history=5, base_num_frames=9, height=16, width=16, num_frames=13)
    return specimen(d.SkyReelsV2DiffusionForcingVideoToVideoPipeline, skyreels_parts(), **more)


def anyflow_parts(cls: type, **config: Any) -> dict[str, Any]:
    transformer = tiny(cls, in_channels=4, out_channels=4, deltatime_type="r", **config)
    return dict(transformer=transformer, vae=wan_vae(), scheduler=d.FlowMapEulerDiscreteScheduler(shift=5.0))


@entry
def anyflow_guided() -> Specimen:
    return specimen(d.AnyFlowPipeline, anyflow_parts(d.AnyFlowTransformer3DModel), guidance_scale=3.0, **FILM)


@entry
def anyflow_far_guided() -> Specimen:
    parts = anyflow_parts(d.AnyFlowFARTransformer3DModel, chunk_partition=(1, 1), compressed_patch_size=(1, 4, 4))
    return specimen(d.AnyFlowFARPipeline, parts, guidance_scale=3.0, height=32, width=32, num_frames=5)


def helios_parts(channels: int = 4, **config: Any) -> dict[str, Any]:
    sizes = dict(in_channels=channels, out_channels=channels, rope_dim=(4, 4, 8))
    scheduler = d.HeliosScheduler(use_dynamic_shifting=True, **config)
    return dict(transformer=tiny(d.HeliosTransformer3DModel, **sizes), vae=wan_vae(channels), scheduler=scheduler)


@entry
def helios_guided() -> Specimen:
    parts = helios_parts(stage_range=[0, 1], stages=1)
    return specimen(d.HeliosPipeline, parts, num_latent_frames_per_chunk=3, **FILM)


@entry
def helios_pyramid_guided() -> Specimen:
    more = dict(num_latent_frames_per_chunk=3, pyramid_num_inference_steps_list=[3, 3, 3])
    parts = helios_parts(gamma=0.3)  # at 1 / 3 its noise has a covariance that not every CPU can factorise
    return specimen(d.HeliosPyramidPipeline, parts, **more, height=64, width=64, num_frames=9)
