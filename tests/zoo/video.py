"""Videos of other families."""

from typing import Any

import diffusers as d
import torch

from zoo.flux import flow
from zoo.hunyuan import hunyuan_video_vae
from zoo.parts import TOKENS, WIDTH, Specimen, clip, entry, kl, noise, picture, specimen, tiny, wan_vae
from zoo.wan import FILM, wan_parts, with_image


def cogvideo_vae() -> d.AutoencoderKLCogVideoX:
    blocks = dict(down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4)
    return tiny(
        d.AutoencoderKLCogVideoX,
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        **blocks,
    )


def cogvideo_parts(
    scheduler: Any, conditioning: int = 0, cls: Any = d.CogVideoXTransformer3DModel, **config: Any
) -> dict[str, Any]:
    sizes = dict(
        in_channels=4 + conditioning,
        out_channels=4,
        sample_width=2,
        sample_height=2,
        sample_frames=9,
        max_text_seq_length=TOKENS,
    )
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
    sizes = dict(
        in_channels=4 + conditioning,
        out_channels=4,
        mlp_ratio=2,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
    )
    return dict(transformer=tiny(d.CosmosTransformer3DModel, **sizes, **config), vae=wan_vae(), scheduler=scheduler)


def cosmos1_parts(conditioning: int = 0) -> dict[str, Any]:
    edm = d.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, final_sigmas_type="sigma_min", prediction_type="epsilon"
    )
    vae = tiny(
        d.AutoencoderKLCosmos,
        latent_channels=4,
        encoder_block_out_channels=(8,) * 4,
        decode_block_out_channels=(8,) * 4,
        attention_resolutions=(8,),
        resolution=64,
        spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )
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
    parts = dict(
        cosmos_parts(
            d.UniPCMultistepScheduler(
                use_karras_sigmas=True,
                use_flow_sigmas=True,
                prediction_type="flow_prediction",
                sigma_min=0.15,
                sigma_max=200.0,
            ),
            1,
        ),
        safety_checker=Unchecked(),
    )
    return specimen(d.Cosmos2_5_PredictBasePipeline, parts, **FILM)


@entry
def mochi_guided() -> Specimen:
    transformer = tiny(d.MochiTransformer3DModel, in_channels=12, max_sequence_length=TOKENS)
    vae = tiny(
        d.AutoencoderKLMochi,
        latent_channels=12,
        encoder_block_out_channels=(32,) * 4,
        decoder_block_out_channels=(32,) * 4,
        layers_per_block=(1,) * 5,
    )
    parts = dict(transformer=transformer, vae=vae, scheduler=flow())
    return specimen(d.MochiPipeline, parts, masks=torch.bool, height=16, width=16, num_frames=7)


@entry
def allegro_guided() -> Specimen:
    transformer = tiny(
        d.AllegroTransformer3DModel,
        attention_head_dim=12,
        cross_attention_dim=24,
        sample_width=2,
        sample_height=2,
        sample_frames=2,
    )
    blocks = dict(down_block_types=("AllegroDownBlock3D",) * 4, up_block_types=("AllegroUpBlock3D",) * 4)
    vae = tiny(
        d.AutoencoderKLAllegro,
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_downsample_blocks=(True, True, False, False),
        temporal_upsample_blocks=(False, True, True, False),
        **blocks,
    )
    parts = dict(transformer=transformer, vae=vae, scheduler=d.EulerAncestralDiscreteScheduler())
    return specimen(d.AllegroPipeline, parts, height=16, width=16, num_frames=8)


@entry
def latte_guided() -> Specimen:
    sizes = dict(
        in_channels=4,
        out_channels=8,
        sample_size=8,
        patch_size=2,
        video_length=2,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        attention_bias=True,
        activation_fn="gelu-approximate",
    )
    parts = dict(
        transformer=tiny(d.LatteTransformer3DModel, **sizes),
        vae=kl(blocks=2),
        scheduler=d.DDIMScheduler(clip_sample=False),
    )
    return specimen(d.LattePipeline, parts, video_length=2, height=16, width=16)


def easyanimate_parts(conditioning: int = 0, **config: Any) -> dict[str, Any]:
    sizes = dict(
        in_channels=4 + conditioning,
        out_channels=4,
        patch_size=2,
        sample_width=8,
        sample_height=8,
        mmdit_layers=1,
        attention_head_dim=16,
    )
    transformer = tiny(d.EasyAnimateTransformer3DModel, **sizes, **config)
    blocks = dict(
        down_block_types=("SpatialDownBlock3D", *("SpatialTemporalDownBlock3D",) * 3),
        up_block_types=("SpatialUpBlock3D", *("SpatialTemporalUpBlock3D",) * 3),
    )
    vae = tiny(
        d.AutoencoderKLMagvit,
        latent_channels=4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=2,
        spatial_group_norm=False,
        **blocks,
    )
    return dict(transformer=transformer, vae=vae, scheduler=flow(shift=5.0))


@entry
def easyanimate_guided() -> Specimen:
    return specimen(d.EasyAnimatePipeline, easyanimate_parts(), height=16, width=16, num_frames=5)


@entry
def motif_video_guided() -> Specimen:
    transformer = tiny(d.MotifVideoTransformer3DModel, in_channels=9, out_channels=4, patch_size=1)
    parts = dict(
        wan_parts(),
        transformer=transformer,
        scheduler=flow(shift=7.0),
        guider=d.AdaptiveProjectedGuidance(guidance_scale=4.0),
    )
    return specimen(d.MotifVideoPipeline, parts, **FILM)


def skip_layer() -> d.SkipLayerGuidance:
    """Guide by a third call that skips a block, on a part of the steps."""
    layers = d.LayerSkipConfig(indices=[1], fqn="transformer_blocks")
    return d.SkipLayerGuidance(
        4.0, skip_layer_guidance_start=0.2, skip_layer_guidance_stop=0.7, skip_layer_config=layers
    )


@entry
def motif_video_i2v_guided() -> Specimen:
    transformer = tiny(
        d.MotifVideoTransformer3DModel, in_channels=9, out_channels=4, patch_size=1, image_embed_dim=WIDTH
    )
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
    sizes = dict(
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=WIDTH,
        in_text_dim2=WIDTH,
        time_dim=16,
        model_dim=WIDTH,
        ff_dim=64,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(8, 12, 12),
        visual_cond=visual_cond,
    )
    return dict(transformer=tiny(d.Kandinsky5Transformer3DModel, **sizes), vae=vae, scheduler=flow(shift=7.0))


def kandinsky5_text() -> dict[str, Any]:
    ends = torch.tensor([0, TOKENS], dtype=torch.int32)
    names = {
        f"{sign}prompt_embeds_{kind}": noise(*shape, seed=seed)
        for seed, sign in enumerate(["", "negative_"])
        for kind, shape in dict(qwen=(1, TOKENS, WIDTH), clip=(1, WIDTH)).items()
    }
    return dict(names, prompt_cu_seqlens=ends, negative_prompt_cu_seqlens=ends.clone())


@entry
def kandinsky5_t2v_guided() -> Specimen:
    parts = kandinsky5_parts(hunyuan_video_vae(), False)
    return specimen(d.Kandinsky5T2VPipeline, parts, **kandinsky5_text(), **FILM)


@entry
def kandinsky5_i2v_guided() -> Specimen:
    parts = kandinsky5_parts(hunyuan_video_vae(), True)
    return specimen(
        d.Kandinsky5I2VPipeline, parts, image=picture(), **kandinsky5_text(), height=32, width=32, num_frames=17
    )


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
