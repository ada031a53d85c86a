"""Pictures from transformers that are no kin of FLUX."""

from typing import Any

import diffusers as d
import torch

from zoo.flux import EDIT, SQUARE, flow, flux2_parts, shifted
from zoo.parts import TOKENS, WIDTH, Specimen, entry, kl, mask, noise, picture, qwen_vae, specimen, stub, tiny, wan_vae


def sd3_parts(**config: Any) -> dict[str, Any]:
    sizes = dict(in_channels=16, out_channels=16, sample_size=8)
    transformer = tiny(d.SD3Transformer2DModel, **sizes, **config)
    return dict(transformer=transformer, vae=kl(16, blocks=2), scheduler=flow(shift=3.0))


@entry
def sd3_guided() -> Specimen:
    return specimen(d.StableDiffusion3Pipeline, sd3_parts(), **SQUARE)


@entry
def sd3_heun_guided() -> Specimen:
    parts = dict(sd3_parts(), scheduler=d.FlowMatchHeunDiscreteScheduler(shift=3.0))
    return specimen(d.StableDiffusion3Pipeline, parts, **SQUARE)


@entry
def sd3_pag_guided() -> Specimen:
    parts = dict(sd3_parts(), pag_applied_layers=["blocks.1"])
    return specimen(d.StableDiffusion3PAGPipeline, parts, pag_scale=2.0, **SQUARE)


@entry
def sd3_skip_layer_guided() -> Specimen:
    skip = dict(skip_guidance_layers=[1], skip_layer_guidance_start=0.2, skip_layer_guidance_stop=0.7)
    return specimen(d.StableDiffusion3Pipeline, sd3_parts(), **skip, **SQUARE)


@entry
def sd3_img2img_guided() -> Specimen:
    return specimen(d.StableDiffusion3Img2ImgPipeline, sd3_parts(), **EDIT)


@entry
def sd3_inpaint_guided() -> Specimen:
    return specimen(d.StableDiffusion3InpaintPipeline, sd3_parts(), mask_image=mask(), **EDIT)


@entry
def sd3_controlnet_guided() -> Specimen:
    controlnet = tiny(d.SD3ControlNetModel, in_channels=16, out_channels=16, sample_size=8)
    parts = dict(sd3_parts(), controlnet=controlnet)
    return specimen(d.StableDiffusion3ControlNetPipeline, parts, control_image=picture(), **SQUARE)


@entry
def lumina_next_guided() -> Specimen:
    sizes = dict(sample_size=8, num_kv_heads=2, multiple_of=16)
    transformer = tiny(d.LuminaNextDiT2DModel, **sizes)
    return specimen(d.LuminaPipeline, dict(transformer=transformer, vae=kl(blocks=2), scheduler=flow()), **SQUARE)


@entry
def lumina2_guided() -> Specimen:
    axes = dict(axes_dim_rope=(4, 4, 8), axes_lens=(64, 64, 64))
    transformer = tiny(d.Lumina2Transformer2DModel, in_channels=4, num_kv_heads=2, multiple_of=16, **axes)
    parts = dict(transformer=transformer, vae=kl(blocks=2), scheduler=flow())
    return specimen(d.Lumina2Pipeline, parts, cfg_trunc_ratio=0.7, **SQUARE)


def dc() -> d.AutoencoderDC:
    """Build the VAE of Sana: it shrinks each side by 4."""
    blocks = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in DC.items()}
    types = dict(downsample_block_type="conv", upsample_block_type="interpolate")
    return tiny(d.AutoencoderDC, latent_channels=4, attention_head_dim=4, scaling_factor=0.4, **blocks, **types)


DC = dict(
    block_types="ResBlock", block_out_channels=(8, 8, 8), layers_per_block=(1, 1, 1), qkv_multiscales=((), (), ())
)


def sana_parts(scheduler: Any, **config: Any) -> dict[str, Any]:
    transformer = tiny(d.SanaTransformer2DModel, in_channels=4, out_channels=4, sample_size=8, **config)
    return dict(transformer=transformer, vae=dc(), scheduler=scheduler)


SANA: dict[str, Any] = dict(height=32, width=32, use_resolution_binning=False, complex_human_instruction=None)


@entry
def sana_guided() -> Specimen:
    return specimen(d.SanaPipeline, sana_parts(flow(shift=3.0)), **SANA)


@entry
def sana_dpm_guided() -> Specimen:
    scheduler = d.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    return specimen(d.SanaPipeline, sana_parts(scheduler), **SANA)


@entry
def sana_controlnet_guided() -> Specimen:
    controlnet = tiny(d.SanaControlNetModel, in_channels=4, out_channels=4, sample_size=8)
    parts = dict(sana_parts(flow(shift=3.0)), controlnet=controlnet)
    return specimen(d.SanaControlNetPipeline, parts, control_image=picture(), **SANA)


def sprint_parts() -> dict[str, Any]:
    return sana_parts(d.SCMScheduler(), guidance_embeds=True, qk_norm="rms_norm_across_heads")


@entry
def sana_sprint() -> Specimen:
    return specimen(d.SanaSprintPipeline, sprint_parts(), intermediate_timesteps=None, **SANA)


@entry
def sana_sprint_img2img() -> Specimen:
    more = dict(intermediate_timesteps=None, image=picture(), strength=0.8)
    return specimen(d.SanaSprintImg2ImgPipeline, sprint_parts(), **more, **SANA)


def pixart_parts(scheduler: Any) -> dict[str, Any]:
    transformer = tiny(d.PixArtTransformer2DModel, sample_size=8)
    return dict(transformer=transformer, vae=kl(blocks=2), scheduler=scheduler)


@entry
def pixart_alpha_guided() -> Specimen:
    parts = pixart_parts(d.DPMSolverMultistepScheduler())
    return specimen(d.PixArtAlphaPipeline, parts, use_resolution_binning=False, **SQUARE)


@entry
def pixart_sigma_guided() -> Specimen:
    parts = pixart_parts(d.DDIMScheduler(clip_sample=False))
    return specimen(d.PixArtSigmaPipeline, parts, use_resolution_binning=False, **SQUARE)


@entry
def dit_guided() -> Specimen:
    transformer = tiny(d.DiTTransformer2DModel, out_channels=8, sample_size=8)
    parts = dict(transformer=transformer, vae=kl(blocks=2), scheduler=d.DDIMScheduler(clip_sample=False))
    return specimen(d.DiTPipeline, parts, class_labels=[1], output_type="np")


HUNYUAN_DIT: dict[str, Any] = dict(
    in_channels=4, patch_size=2, sample_size=8, cross_attention_dim_t5=WIDTH, text_len=TOKENS, text_len_t5=TOKENS
)


def hunyuan_dit_parts(**config: Any) -> dict[str, Any]:
    transformer = tiny(d.HunyuanDiT2DModel, **HUNYUAN_DIT, **config)
    scheduler = d.DDPMScheduler(clip_sample=False)
    return dict(transformer=transformer, vae=kl(blocks=2), scheduler=scheduler, requires_safety_checker=False)


@entry
def hunyuan_dit_guided() -> Specimen:
    return specimen(d.HunyuanDiTPipeline, hunyuan_dit_parts(), use_resolution_binning=False, **SQUARE)


@entry
def aura_flow_guided() -> Specimen:
    sizes = dict(sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, pos_embed_max_size=256)
    transformer = tiny(d.AuraFlowTransformer2DModel, **sizes)
    return specimen(d.AuraFlowPipeline, dict(transformer=transformer, vae=kl(blocks=2), scheduler=flow()), **SQUARE)


@entry
def cogview3_plus_guided() -> Specimen:
    sizes = dict(in_channels=4, out_channels=4, sample_size=8, condition_dim=4, pos_embed_max_size=8)
    transformer = tiny(d.CogView3PlusTransformer2DModel, **sizes)
    parts = dict(transformer=transformer, vae=kl(blocks=2), scheduler=d.CogVideoXDDIMScheduler())
    return specimen(d.CogView3PlusPipeline, parts, **SQUARE)


def cogview4_parts(conditioning: int = 0) -> dict[str, Any]:
    sizes = dict(in_channels=4 + conditioning, out_channels=4, sample_size=8, condition_dim=4, rope_axes_dim=(8, 8))
    transformer = tiny(d.CogView4Transformer2DModel, **sizes)
    scheduler = flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear")
    return dict(transformer=transformer, vae=kl(blocks=2), scheduler=scheduler)


@entry
def cogview4_guided() -> Specimen:
    return specimen(d.CogView4Pipeline, cogview4_parts(), **SQUARE)


@entry
def cogview4_control_guided() -> Specimen:
    return specimen(d.CogView4ControlPipeline, cogview4_parts(4), control_image=picture(), **SQUARE)


@entry
def prx_guided() -> Specimen:
    sizes = dict(in_channels=4, context_in_dim=WIDTH, hidden_size=WIDTH, mlp_ratio=2.0, num_heads=2, depth=2)
    transformer = tiny(d.PRXTransformer2DModel, axes_dim=[8, 8], **sizes)
    parts = dict(transformer=transformer, vae=kl(blocks=2), scheduler=flow())
    return specimen(d.PRXPipeline, parts, use_resolution_binning=False, **SQUARE)


def krea2_parts() -> dict[str, Any]:
    sizes = dict(in_channels=16, num_key_value_heads=2, timestep_embed_dim=16, text_hidden_dim=16, num_text_layers=3)
    text = dict(text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=16)
    blocks = dict(num_layerwise_text_blocks=1, num_refiner_text_blocks=1)
    transformer = tiny(d.Krea2Transformer2DModel, **sizes, **text, **blocks)
    return dict(transformer=transformer, vae=qwen_vae(), scheduler=shifted())


@entry
def krea2_guided() -> Specimen:
    embeds = dict(prompt_embeds=noise(1, TOKENS, 3, 16), negative_prompt_embeds=noise(1, TOKENS, 3, 16, seed=1))
    return specimen(d.Krea2Pipeline, krea2_parts(), masks=torch.bool, **embeds, **SQUARE)


@entry
def ernie_image_guided() -> Specimen:
    transformer = tiny(
        d.ErnieImageTransformer2DModel, in_channels=16, out_channels=16, ffn_hidden_size=64, text_in_dim=WIDTH
    )
    parts = dict(flux2_parts(), transformer=transformer, scheduler=flow(shift=3.0))
    return specimen(d.ErnieImagePipeline, parts, use_pe=False, **SQUARE)


@entry
def nucleus_moe_guided() -> Specimen:
    moe = dict(
        num_experts=4,
        moe_intermediate_dim=32,
        capacity_factors=[1.0, 1.0],
        dense_moe_strategy="leave_first_block_dense",
    )
    transformer = tiny(d.NucleusMoEImageTransformer2DModel, in_channels=16, out_channels=4, **moe)
    parts = dict(transformer=transformer, vae=qwen_vae(), scheduler=shifted())
    return specimen(d.NucleusMoEImagePipeline, parts, **SQUARE)


@entry
def glm_image_guided() -> Specimen:
    sizes = dict(in_channels=4, out_channels=4, condition_dim=8, prior_vq_quantizer_codebook_size=64)
    transformer = tiny(d.GlmImageTransformer2DModel, **sizes)
    vae = kl(blocks=2, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    parts = dict(transformer=transformer, vae=vae, scheduler=shifted())
    prior = dict(prior_token_ids=torch.arange(16).unsqueeze(0))
    return specimen(d.GlmImagePipeline, parts, **prior, **SQUARE)


@entry
def hunyuan_image_guided() -> Specimen:
    sizes = dict(in_channels=4, out_channels=4, text_embed_2_dim=WIDTH, rope_axes_dim=(8, 8))
    transformer = tiny(d.HunyuanImageTransformer2DModel, **sizes)
    vae = tiny(
        d.AutoencoderKLHunyuanImage,
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        sample_size=8,
        scaling_factor=0.5,
    )
    guiders = dict(guider=d.ClassifierFreeGuidance(3.0))
    return specimen(
        d.HunyuanImagePipeline, dict(transformer=transformer, vae=vae, scheduler=flow(shift=3.0), **guiders), **SQUARE
    )


@entry
def hidream_guided() -> Specimen:
    sizes = dict(
        patch_size=2,
        in_channels=4,
        out_channels=4,
        caption_channels=[WIDTH, 16],
        text_emb_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(32, 32),
        llama_layers=(0, 1),
        num_layers=1,
        num_single_layers=1,
    )
    transformer = tiny(d.HiDreamImageTransformer2DModel, **sizes)
    llama = [noise(2, 1, TOKENS, 16, seed=seed) for seed in range(2)]
    embeds = dict(
        prompt_embeds_t5=noise(1, TOKENS, WIDTH),
        negative_prompt_embeds_t5=noise(1, TOKENS, WIDTH, seed=1),
        prompt_embeds_llama3=llama[0],
        negative_prompt_embeds_llama3=llama[1],
    )
    parts = dict(transformer=transformer, vae=kl(blocks=2), scheduler=flow(shift=3.0))
    subject = specimen(d.HiDreamImagePipeline, parts, **embeds, height=32, width=32)
    subject.pipe.default_sample_size = 16  # the pipeline scales pictures up to this many latents a side
    return subject


@entry
def ideogram4_guided() -> Specimen:
    # TOKENS of text, then 16 of the picture; `indicator` says which is which
    length = TOKENS + 16
    sizes = dict(in_channels=16, adaln_dim=16, llm_features_dim=WIDTH, intermediate_size=64, mrope_section=(4, 2, 2))
    nets = {
        name: tiny(d.Ideogram4Transformer2DModel, seed, **sizes)
        for seed, name in enumerate(["transformer", "unconditional_transformer"])
    }
    parts = dict(flux2_parts(), scheduler=flow(), **nets) | nets
    more = dict(prompt="", guidance_scale=3.0, guidance_schedule=None, max_sequence_length=TOKENS)
    places = torch.arange(length).unsqueeze(-1).expand(1, length, 3).clone()
    kinds = torch.tensor([[3] * TOKENS + [2] * 16])
    packed = (
        torch.cat([noise(1, TOKENS, WIDTH), torch.zeros(1, 16, WIDTH)], 1),
        places,
        torch.ones(1, length, dtype=torch.long),
        kinds,
    )
    return stub(specimen(d.Ideogram4Pipeline, parts, **more, **SQUARE), encode_prompt=packed)


def bria_fibo(cls: type, **arguments: Any) -> Specimen:
    """Build a FIBO pipeline whose prompts are noise, and every layer's states too."""
    sizes = dict(in_channels=4, joint_attention_dim=2 * WIDTH, text_encoder_dim=WIDTH, pooled_projection_dim=None)
    parts = dict(transformer=tiny(d.BriaFiboTransformer2DModel, **sizes), vae=wan_vae(), scheduler=shifted())
    prompts = [noise(1, TOKENS, 2 * WIDTH, seed=seed) for seed in range(2)]
    layers = [[noise(1, TOKENS, WIDTH, seed=2 * seed + layer) for layer in range(4)] for seed in range(2)]
    kept = torch.ones(1, TOKENS)
    encoded = (*prompts, torch.zeros(1, TOKENS, 3), kept, kept, *layers)
    drop = ["prompt_embeds", "negative_prompt_embeds"]  # an older diffusers refuses them beside a prompt
    return stub(specimen(cls, parts, drop=drop, **arguments), encode_prompt=encoded)


@entry
def bria_fibo_guided() -> Specimen:
    return bria_fibo(d.BriaFiboPipeline, prompt="", height=64, width=64)
