"""LTX-Video, and LTX-2 with its sound."""

from typing import Any

import diffusers as d
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

from zoo.flux import flow, shifted
from zoo.parts import Specimen, entry, noise, picture, specimen, tiny


def ltx_vae() -> d.AutoencoderKLLTXVideo:
    """Build a video VAE of 4 channels that shrinks each side and time by 4."""
    sizes = dict(
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
    )
    scaling = dict(spatio_temporal_scaling=(True, True), decoder_spatio_temporal_scaling=(True, True))
    rest = dict(decoder_inject_noise=(False,) * 3, upsample_residual=(False,) * 2, upsample_factor=(1, 1), patch_size=1)
    blocks = dict(down_block_types=("LTXVideoDownBlock3D",) * 2, downsample_type=("conv",) * 2)
    return tiny(d.AutoencoderKLLTXVideo, latent_channels=4, **sizes, **scaling, **rest, **blocks)


def ltx_parts() -> dict[str, Any]:
    transformer = tiny(d.LTXVideoTransformer3DModel, in_channels=4, out_channels=4)
    return dict(transformer=transformer, vae=ltx_vae(), scheduler=shifted())


LTX: dict[str, Any] = dict(height=32, width=32, num_frames=9)


@entry
def ltx_guided() -> Specimen:
    return specimen(d.LTXPipeline, ltx_parts(), guidance_rescale=0.5, **LTX)


@entry
def ltx_i2v_guided() -> Specimen:
    return specimen(d.LTXImageToVideoPipeline, ltx_parts(), image=picture(32), **LTX)


@entry
def ltx_condition_guided() -> Specimen:
    return specimen(
        d.LTXConditionPipeline,
        dict(ltx_parts(), scheduler=flow(shift=3.0)),
        image=noise(1, 3, 32, 32).clamp(-1, 1),
        **LTX,
    )


def ltx2_transformer() -> d.LTX2VideoTransformer3DModel:
    audio = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16)
    sizes = dict(in_channels=4, out_channels=4, rope_double_precision=False, rope_type="split")
    return tiny(d.LTX2VideoTransformer3DModel, **sizes, **{f"audio_{name}": size for name, size in audio.items()})


def ltx2_connectors() -> LTX2TextConnectors:
    """Build what turns the prompt into conditions of the video and of its sound."""
    kinds = {f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in CONNECTOR.items()}
    rope = dict(connector_rope_base_seq_len=32, rope_double_precision=False, rope_type="split")
    return tiny(LTX2TextConnectors, text_proj_in_factor=1, causal_temporal_positioning=False, **rope, **kinds)


def ltx2_vae() -> d.AutoencoderKLLTX2Video:
    """Build a video VAE of 4 channels that shrinks each side by 2."""
    sizes = dict(block_out_channels=(8,), layers_per_block=(1,), spatio_temporal_scaling=(True,))
    decoder = dict(block_out_channels=(8,), layers_per_block=(1, 1), spatio_temporal_scaling=(True,))
    blocks = dict(down_block_types=("LTX2VideoDownBlock3D",), downsample_type=("spatial",), upsample_type=("spatial",))
    rest = dict(decoder_inject_noise=(False, False), upsample_residual=(False,), upsample_factor=(1,), patch_size=1)
    both = dict(sizes, **{f"decoder_{name}": size for name, size in decoder.items()})
    return tiny(d.AutoencoderKLLTX2Video, latent_channels=4, **both, **blocks, **rest)


def ltx2_sound() -> dict[str, Any]:
    """Build the VAE of mel spectrograms and the vocoder."""
    sizes = dict(base_channels=4, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, latent_channels=2, mel_bins=8)
    vae = tiny(d.AutoencoderKLLTX2Audio, in_channels=2, output_channels=2, resolution=32, **sizes)
    up = dict(upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2])
    net = dict(resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]])
    return dict(
        audio_vae=vae, vocoder=tiny(LTX2Vocoder, in_channels=16, hidden_channels=16, out_channels=2, **up, **net)
    )


def ltx2_parts() -> dict[str, Any]:
    parts = dict(transformer=ltx2_transformer(), connectors=ltx2_connectors(), vae=ltx2_vae(), scheduler=shifted())
    return dict(parts, **ltx2_sound())


CONNECTOR = dict(num_attention_heads=2, attention_head_dim=16, num_layers=1, num_learnable_registers=None)
LTX2: dict[str, Any] = dict(
    height=32, width=32, num_frames=5, frame_rate=25.0, spatio_temporal_guidance_blocks=[1], use_cross_timestep=False
)


@entry
def ltx2_guided() -> Specimen:
    return specimen(d.LTX2Pipeline, ltx2_parts(), **LTX2)


@entry
def ltx2_i2v_guided() -> Specimen:
    return specimen(d.LTX2ImageToVideoPipeline, ltx2_parts(), image=picture(32), image_crf=0, **LTX2)
