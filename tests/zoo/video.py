"""Videos, with and without sound."""

from typing import Any

import diffusers as d
import torch

from zoo.flux import flow, shifted
from zoo.parts import TOKENS, WIDTH, Specimen, clip, entry, kl, mask, noise, picture, specimen, stub, tiny, wan_vae

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
    motion = dict(motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_encoder_size=16, motion_style_dim=8, motion_dim=4, motion_encoder_dim=16)
    face = dict(face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2)
    transformer = tiny(d.WanAnimateTransformer3DModel, in_channels=12, latent_channels=4, out_channels=4, image_dim=WIDTH, **motion, **face)
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


@entry
def helios_guided() -> Specimen:
    transformer = tiny(d.HeliosTransformer3DModel, in_channels=4, out_channels=4, rope_dim=(4, 4, 8))
    scheduler = d.HeliosScheduler(stage_range=[0, 1], stages=1, use_dynamic_shifting=True)
    parts = dict(transformer=transformer, vae=wan_vae(), scheduler=scheduler)
    return specimen(d.HeliosPipeline, parts, num_latent_frames_per_chunk=3, **FILM)


@entry
def helios_pyramid_guided() -> Specimen:
    transformer = tiny(d.HeliosTransformer3DModel, in_channels=4, out_channels=4, rope_dim=(4, 4, 8))
    parts = dict(transformer=transformer, vae=wan_vae(), scheduler=d.HeliosScheduler(use_dynamic_shifting=True))
    more = dict(num_latent_frames_per_chunk=3, pyramid_num_inference_steps_list=[3, 3, 3], height=64, width=64, num_frames=9)
    return specimen(d.HeliosPyramidPipeline, parts, **more)


def ltx_vae() -> d.AutoencoderKLLTXVideo:
    """Build a video VAE of 4 channels that shrinks each side and time by 4."""
    sizes = dict(block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1))
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
    return specimen(d.LTXConditionPipeline, dict(ltx_parts(), scheduler=flow(shift=3.0)), image=noise(1, 3, 32, 32).clamp(-1, 1), **LTX)


def ltx2_parts() -> dict[str, Any]:
    audio = dict(audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8, audio_cross_attention_dim=16)
    sizes = dict(in_channels=4, out_channels=4, rope_double_precision=False, rope_type="split")
    transformer = tiny(d.LTX2VideoTransformer3DModel, **sizes, **audio)
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    connector = {f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in CONNECTOR.items()}
    connectors = tiny(LTX2TextConnectors, text_proj_in_factor=1, connector_rope_base_seq_len=32, rope_double_precision=False, causal_temporal_positioning=False, rope_type="split", **connector)
    blocks = dict(down_block_types=("LTX2VideoDownBlock3D",), downsample_type=("spatial",), upsample_type=("spatial",))
    vae = tiny(d.AutoencoderKLLTX2Video, latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,), layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,), decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False), upsample_residual=(False,), upsample_factor=(1,), patch_size=1, **blocks)
    audio_vae = tiny(d.AutoencoderKLLTX2Audio, base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, attn_resolutions=None, in_channels=2, resolution=32, latent_channels=2, mel_bins=8)
    vocoder = tiny(LTX2Vocoder, in_channels=16, hidden_channels=16, out_channels=2, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2], resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]])
    return dict(transformer=transformer, connectors=connectors, vae=vae, audio_vae=audio_vae, vocoder=vocoder, scheduler=shifted())


CONNECTOR = dict(num_attention_heads=2, attention_head_dim=16, num_layers=1, num_learnable_registers=None)
LTX2: dict[str, Any] = dict(height=32, width=32, num_frames=5, frame_rate=25.0, spatio_temporal_guidance_blocks=[1], use_cross_timestep=False)


@entry
def ltx2_guided() -> Specimen:
    return specimen(d.LTX2Pipeline, ltx2_parts(), **LTX2)


@entry
def ltx2_i2v_guided() -> Specimen:
    return specimen(d.LTX2ImageToVideoPipeline, ltx2_parts(), image=picture(32), image_crf=0, **LTX2)


def hunyuan_video_vae() -> d.AutoencoderKLHunyuanVideo:
    blocks = dict(down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4)
    return tiny(d.AutoencoderKLHunyuanVideo, latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False, **blocks)


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
    sizes = dict(in_channels=4, out_channels=4, patch_size=2, has_image_proj=True, image_proj_dim=WIDTH, has_clean_x_embedder=True)
    parts = dict(hunyuan_video_parts(), transformer=tiny(d.HunyuanVideoFramepackTransformer3DModel, **sizes))
    more = dict(image=picture(32), true_cfg_scale=3.0, latent_window_size=3, height=32, width=32, num_frames=13)
    return with_image(specimen(d.HunyuanVideoFramepackPipeline, parts, **more))


def hunyuan15_parts(task: str) -> dict[str, Any]:
    sizes = dict(in_channels=9, out_channels=4, text_embed_2_dim=WIDTH, image_embed_dim=WIDTH, target_size=16, task_type=task)
    transformer = tiny(d.HunyuanVideo15Transformer3DModel, **sizes)
    vae = tiny(d.AutoencoderKLHunyuanVideo15, latent_channels=4, block_out_channels=(16, 16), layers_per_block=1, spatial_compression_ratio=4, temporal_compression_ratio=2, downsample_match_channel=False, upsample_match_channel=False)
    return dict(transformer=transformer, vae=vae, scheduler=flow(shift=7.0), guider=d.ClassifierFreeGuidance(3.0))


@entry
def hunyuan_video15_guided() -> Specimen:
    return specimen(d.HunyuanVideo15Pipeline, hunyuan15_parts("t2v"), **FILM)


@entry
def hunyuan_video15_i2v_guided() -> Specimen:
    subject = specimen(d.HunyuanVideo15ImageToVideoPipeline, hunyuan15_parts("i2v"), image=picture(), num_frames=9)
    return with_image(subject)


def cogvideo_vae() -> d.AutoencoderKLCogVideoX:
    blocks = dict(down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4)
    return tiny(d.AutoencoderKLCogVideoX, latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, **blocks)


def cogvideo_parts(scheduler: Any, conditioning: int = 0, cls: Any = d.CogVideoXTransformer3DModel, **config: Any) -> dict[str, Any]:
    sizes = dict(in_channels=4 + conditioning, out_channels=4, sample_width=2, sample_height=2, sample_frames=9, max_text_seq_length=TOKENS)
    return dict(transformer=tiny(cls, **sizes, **config), vae=cogvideo_vae(), scheduler=scheduler)


@entry
def cogvideox_ddim_guided() -> Specimen:
    return specimen(d.CogVideoXPipeline, cogvideo_parts(d.CogVideoXDDIMScheduler()), **FILM)


@entry
def cogvideox_dpm_guided() -> Specimen:
    parts = cogvideo_parts(d.CogVideoXDPMScheduler(), use_rotary_positional_embeddings=True)
    return specimen(d.CogVideoXPipeline, parts, use_dynamic_cfg=True, **FILM)


@entry
def cogvideox_i2v_guided() -> Specimen:
    rotary = dict(use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True)
    parts = cogvideo_parts(d.CogVideoXDPMScheduler(), 4, **rotary)
    return specimen(d.CogVideoXImageToVideoPipeline, parts, image=picture(), **FILM)


@entry
def cogvideox_v2v_guided() -> Specimen:
    parts = cogvideo_parts(d.CogVideoXDDIMScheduler())
    return specimen(d.CogVideoXVideoToVideoPipeline, parts, video=clip(9), strength=0.8, height=16, width=16)


@entry
def cogvideox_fun_control_guided() -> Specimen:
    parts = cogvideo_parts(d.CogVideoXDDIMScheduler(), 4)
    return specimen(d.CogVideoXFunControlPipeline, parts, control_video=clip(9), height=16, width=16)


def cosmos_parts(scheduler: Any, conditioning: int = 0, **config: Any) -> dict[str, Any]:
    sizes = dict(in_channels=4 + conditioning, out_channels=4, mlp_ratio=2, adaln_lora_dim=4, max_size=(4, 32, 32), concat_padding_mask=False)
    return dict(transformer=tiny(d.CosmosTransformer3DModel, **sizes, **config), vae=wan_vae(), scheduler=scheduler)


def cosmos1_parts(conditioning: int = 0) -> dict[str, Any]:
    edm = d.EDMEulerScheduler(sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min", prediction_type="epsilon")
    vae = tiny(d.AutoencoderKLCosmos, latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4, attention_resolutions=(8,), resolution=64, spatial_compression_ratio=4, temporal_compression_ratio=4)
    return dict(cosmos_parts(edm, conditioning), vae=vae, safety_checker=Unchecked())


class Unchecked(torch.nn.Module):
    """Stand in for the safety checker: everything passes."""

    device, dtype = torch.device("cpu"), torch.float32

    def check_text_safety(self, text: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


@entry
def cosmos_text2world_guided() -> Specimen:
    return specimen(d.CosmosTextToWorldPipeline, cosmos1_parts(), **FILM)


@entry
def cosmos_video2world_guided() -> Specimen:
    return specimen(d.CosmosVideoToWorldPipeline, cosmos1_parts(1), image=picture(), **FILM)


@entry
def cosmos2_text2image_guided() -> Specimen:
    parts = dict(cosmos_parts(flow(use_karras_sigmas=True)), safety_checker=Unchecked())
    return specimen(d.Cosmos2TextToImagePipeline, parts, height=16, width=16)


@entry
def cosmos2_video2world_guided() -> Specimen:
    parts = dict(cosmos_parts(flow(use_karras_sigmas=True), 1), safety_checker=Unchecked())
    return specimen(d.Cosmos2VideoToWorldPipeline, parts, image=picture(), **FILM)


@entry
def cosmos25_predict_guided() -> Specimen:
    parts = dict(cosmos_parts(d.UniPCMultistepScheduler(use_karras_sigmas=True, use_flow_sigmas=True, prediction_type="flow_prediction", sigma_min=0.15, sigma_max=200.0), 1), safety_checker=Unchecked())
    return specimen(d.Cosmos2_5_PredictBasePipeline, parts, **FILM)


@entry
def mochi_guided() -> Specimen:
    transformer = tiny(d.MochiTransformer3DModel, in_channels=12, max_sequence_length=TOKENS)
    vae = tiny(d.AutoencoderKLMochi, latent_channels=12, encoder_block_out_channels=(32,) * 4, decoder_block_out_channels=(32,) * 4, layers_per_block=(1,) * 5)
    parts = dict(transformer=transformer, vae=vae, scheduler=flow())
    return specimen(d.MochiPipeline, parts, masks=torch.bool, height=16, width=16, num_frames=7)


@entry
def allegro_guided() -> Specimen:
    transformer = tiny(d.AllegroTransformer3DModel, attention_head_dim=12, cross_attention_dim=24, sample_width=2, sample_height=2, sample_frames=2)
    blocks = dict(down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4)
    vae = tiny(d.AutoencoderKLAllegro, latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, temporal_downsample_blocks=(True, True, False, False), temporal_upsample_blocks=(False, True, True, False), **blocks)
    parts = dict(transformer=transformer, vae=vae, scheduler=d.EulerAncestralDiscreteScheduler())
    return specimen(d.AllegroPipeline, parts, height=16, width=16, num_frames=8)


@entry
def latte_guided() -> Specimen:
    sizes = dict(in_channels=4, out_channels=8, sample_size=8, patch_size=2, video_length=2, num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False, attention_bias=True, activation_fn="gelu-approximate")
    parts = dict(transformer=tiny(d.LatteTransformer3DModel, **sizes), vae=kl(blocks=2), scheduler=d.DDIMScheduler(clip_sample=False))
    return specimen(d.LattePipeline, parts, video_length=2, height=16, width=16)


def easyanimate_parts(conditioning: int = 0, **config: Any) -> dict[str, Any]:
    sizes = dict(in_channels=4 + conditioning, out_channels=4, patch_size=2, sample_width=8, sample_height=8, mmdit_layers=1, attention_head_dim=16)
    transformer = tiny(d.EasyAnimateTransformer3DModel, **sizes, **config)
    blocks = dict(down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3), up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3))
    vae = tiny(d.AutoencoderKLMagvit, latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, spatial_group_norm=False, **blocks)
    return dict(transformer=transformer, vae=vae, scheduler=flow(shift=5.0))


@entry
def easyanimate_guided() -> Specimen:
    return specimen(d.EasyAnimatePipeline, easyanimate_parts(), height=16, width=16, num_frames=5)


@entry
def motif_video_guided() -> Specimen:
    transformer = tiny(d.MotifVideoTransformer3DModel, in_channels=9, out_channels=4, patch_size=1)
    parts = dict(wan_parts(), transformer=transformer, scheduler=flow(shift=7.0), guider=d.AdaptiveProjectedGuidance(guidance_scale=4.0))
    return specimen(d.MotifVideoPipeline, parts, **FILM)


def skip_layer() -> d.SkipLayerGuidance:
    """Guide by a third call that skips a block, on a part of the steps."""
    layers = d.LayerSkipConfig(indices=[1], fqn="transformer_blocks")
    return d.SkipLayerGuidance(4.0, skip_layer_guidance_start=0.2, skip_layer_guidance_stop=0.7, skip_layer_config=layers)


@entry
def motif_video_i2v_guided() -> Specimen:
    transformer = tiny(d.MotifVideoTransformer3DModel, in_channels=9, out_channels=4, patch_size=1, image_embed_dim=WIDTH)
    parts = dict(wan_parts(), transformer=transformer, scheduler=flow(shift=7.0), guider=skip_layer())
    return with_image(specimen(d.MotifVideoImage2VideoPipeline, parts, image=picture(), **FILM))


def sana_video_parts(scheduler: Any) -> dict[str, Any]:
    transformer = tiny(d.SanaVideoTransformer3DModel, in_channels=4, out_channels=4, sample_size=2)
    return dict(transformer=transformer, vae=wan_vae(), scheduler=scheduler)


SANA: dict[str, Any] = dict(use_resolution_binning=False, complex_human_instruction=None, height=32, width=32, frames=9)


@entry
def sana_video_guided() -> Specimen:
    scheduler = d.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=8.0)
    return specimen(d.SanaVideoPipeline, sana_video_parts(scheduler), **SANA)


@entry
def sana_video_noise_guided() -> Specimen:
    return specimen(d.SanaVideoPipeline, sana_video_parts(d.DPMSolverMultistepScheduler()), **SANA)


@entry
def sana_video_i2v_guided() -> Specimen:
    return specimen(d.SanaImageToVideoPipeline, sana_video_parts(flow(shift=8.0)), image=picture(32), **SANA)


def kandinsky5_parts(vae: Any, visual_cond: bool) -> dict[str, Any]:
    sizes = dict(in_visual_dim=4, out_visual_dim=4, in_text_dim=WIDTH, in_text_dim2=WIDTH, time_dim=16, model_dim=WIDTH, ff_dim=64, num_text_blocks=1, num_visual_blocks=2, axes_dims=(8, 12, 12), visual_cond=visual_cond)
    return dict(transformer=tiny(d.Kandinsky5Transformer3DModel, **sizes), vae=vae, scheduler=flow(shift=7.0))


def kandinsky5_text() -> dict[str, Any]:
    ends = torch.tensor([0, TOKENS], dtype=torch.int32)
    names = {f"{sign}prompt_embeds_{kind}": noise(*shape, seed=seed) for seed, sign in enumerate(["", "negative_"]) for kind, shape in dict(qwen=(1, TOKENS, WIDTH), clip=(1, WIDTH)).items()}
    return dict(names, prompt_cu_seqlens=ends, negative_prompt_cu_seqlens=ends.clone())


@entry
def kandinsky5_t2v_guided() -> Specimen:
    parts = kandinsky5_parts(hunyuan_video_vae(), False)
    return specimen(d.Kandinsky5T2VPipeline, parts, **kandinsky5_text(), **FILM)


@entry
def kandinsky5_i2v_guided() -> Specimen:
    parts = kandinsky5_parts(hunyuan_video_vae(), True)
    return specimen(d.Kandinsky5I2VPipeline, parts, image=picture(), **kandinsky5_text(), height=32, width=32, num_frames=17)


@entry
def kandinsky5_t2i_guided() -> Specimen:
    parts = kandinsky5_parts(kl(blocks=2), False)
    subject = specimen(d.Kandinsky5T2IPipeline, parts, **kandinsky5_text(), height=16, width=16)
    subject.pipe.resolutions = [(16, 16)]  # the pipeline knows large ones alone
    return subject


@entry
def kandinsky5_i2i_guided() -> Specimen:
    parts = kandinsky5_parts(kl(blocks=4), True)
    subject = specimen(d.Kandinsky5I2IPipeline, parts, image=picture(32), **kandinsky5_text(), height=32, width=32)
    subject.pipe.resolutions = [(32, 32)]
    return subject
