"""What denoises with a UNet, or samples embeddings."""

from typing import Any

import diffusers as d

from zoo.flux import EDIT, SQUARE
from zoo.parts import WIDTH, Specimen, entry, kl, mask, noise, picture, specimen, stub, tiny


def unet(**config: Any) -> d.UNet2DConditionModel:
    """Build a conditional UNet of two levels, of which the lower attends to the prompt."""
    sizes = dict(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
    heads = dict(attention_head_dim=2, num_attention_heads=None)
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    parts = dict(sizes, **heads, down_block_types=down, up_block_types=up)
    return tiny(d.UNet2DConditionModel, **{**parts, **config})


def sd_parts(scheduler: Any, **config: Any) -> dict[str, Any]:
    return dict(unet=unet(**config), vae=kl(blocks=2), scheduler=scheduler, requires_safety_checker=False)


@entry
def stable_diffusion_ddim_guided() -> Specimen:
    return specimen(d.StableDiffusionPipeline, sd_parts(d.DDIMScheduler(clip_sample=False)), **SQUARE)


@entry
def stable_diffusion_pndm_guided() -> Specimen:
    return specimen(d.StableDiffusionPipeline, sd_parts(d.PNDMScheduler(steps_offset=1)), **SQUARE)


@entry
def stable_diffusion_kdpm2_guided() -> Specimen:
    return specimen(d.StableDiffusionPipeline, sd_parts(d.KDPM2DiscreteScheduler()), **SQUARE)


@entry
def stable_diffusion_euler_ancestral_guided() -> Specimen:
    return specimen(d.StableDiffusionPipeline, sd_parts(d.EulerAncestralDiscreteScheduler()), **SQUARE)


@entry
def stable_diffusion_lms_guided() -> Specimen:
    return specimen(d.StableDiffusionPipeline, sd_parts(d.LMSDiscreteScheduler()), **SQUARE)


@entry
def stable_diffusion_deis_guided() -> Specimen:
    return specimen(d.StableDiffusionPipeline, sd_parts(d.DEISMultistepScheduler()), **SQUARE)


@entry
def stable_diffusion_img2img_guided() -> Specimen:
    parts = sd_parts(d.DDIMScheduler(clip_sample=False))
    return specimen(d.StableDiffusionImg2ImgPipeline, parts, **dict(image=picture(), strength=0.8))


@entry
def stable_diffusion_inpaint_guided() -> Specimen:
    # Beside the latents: the mask and those of the masked picture
    parts = sd_parts(d.DDIMScheduler(clip_sample=False), in_channels=9)
    return specimen(d.StableDiffusionInpaintPipeline, parts, mask_image=mask(), **{**EDIT, "strength": 1.0})


@entry
def latent_consistency() -> Specimen:
    parts = sd_parts(d.LCMScheduler(original_inference_steps=50), time_cond_proj_dim=WIDTH)
    return specimen(d.LatentConsistencyModelPipeline, parts, **SQUARE)


def sdxl_parts(scheduler: Any) -> dict[str, Any]:
    width = WIDTH + 6 * 8  # of the pooled prompt and of six numbers: sizes and crops
    added = dict(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=width
    )
    deep = dict(transformer_layers_per_block=(1, 2), use_linear_projection=True)
    return dict(unet=unet(**added, **deep), vae=kl(blocks=2), scheduler=scheduler, add_watermarker=False)


@entry
def sdxl_guided() -> Specimen:
    return specimen(d.StableDiffusionXLPipeline, sdxl_parts(d.EulerDiscreteScheduler()), **SQUARE)


@entry
def sdxl_heun_guided() -> Specimen:
    return specimen(d.StableDiffusionXLPipeline, sdxl_parts(d.HeunDiscreteScheduler()), **SQUARE)


@entry
def sdxl_img2img_guided() -> Specimen:
    parts = sdxl_parts(d.DPMSolverMultistepScheduler())
    return specimen(d.StableDiffusionXLImg2ImgPipeline, parts, image=picture(), strength=0.8)


def unconditional(scheduler: Any) -> dict[str, Any]:
    sizes = dict(
        sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8, attention_head_dim=8
    )
    blocks = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    return dict(unet=tiny(d.UNet2DModel, **sizes, **blocks), scheduler=scheduler)


@entry
def unconditional_ddpm() -> Specimen:
    return specimen(d.DDPMPipeline, unconditional(d.DDPMScheduler(clip_sample=False)), output_type="np")


@entry
def unconditional_ddim_clipped() -> Specimen:
    return specimen(d.DDIMPipeline, unconditional(d.DDIMScheduler(clip_sample=True)), output_type="np")


@entry
def stable_video_diffusion_guided() -> Specimen:
    down, up = (
        ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    )
    sizes = dict(
        sample_size=8,
        block_out_channels=(32, 32),
        in_channels=8,
        out_channels=4,
        layers_per_block=1,
        num_attention_heads=2,
    )
    net = tiny(
        d.UNetSpatioTemporalConditionModel,
        **sizes,
        down_block_types=down,
        up_block_types=up,
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
    )
    vae = tiny(
        d.AutoencoderKLTemporalDecoder,
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
    )
    scheduler = d.EulerDiscreteScheduler(
        prediction_type="v_prediction",
        timestep_type="continuous",
        sigma_min=0.002,
        sigma_max=700.0,
        use_karras_sigmas=True,
    )
    subject = specimen(
        d.StableVideoDiffusionPipeline,
        dict(unet=net, vae=vae, scheduler=scheduler),
        image=picture(),
        num_frames=3,
        **SQUARE,
    )
    subject.pipe._encode_image = lambda *args: noise(2, 1, WIDTH)
    return subject


@entry
def kandinsky22_prior_guided() -> Specimen:
    sizes = dict(embedding_dim=16, num_embeddings=6, clip_embed_dim=16, num_layers=2)
    scheduler = d.UnCLIPScheduler(prediction_type="sample", variance_type="fixed_small_log", num_train_timesteps=100)
    parts = dict(prior=tiny(d.PriorTransformer, **sizes), scheduler=scheduler)
    subject = specimen(d.KandinskyV22PriorPipeline, parts, prompt="", output_type="pt")
    zero = dict(get_zero_embed=noise(1, 16))
    return stub(subject, _encode_prompt=(noise(2, 16), noise(2, 6, 16), noise(2, 6).abs() > 0), **zero)
