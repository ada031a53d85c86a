"""Pipelines that need a stand-in for a processor, a tokenizer or fixed sizes, and long or refined ones."""

import sys
from typing import Any
from unittest import mock

import diffusers as d
import torch
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline  # its package hides it without OpenCV
from diffusers.pipelines.ltx2.pipeline_ltx2_condition import LTX2VideoCondition
from diffusers.pipelines.omnigen.processor_omnigen import OmniGenCollator

from zoo.flux import SQUARE, flow, flux_parts, longcat_parts, shifted
from zoo.image import HUNYUAN_DIT, SANA, bria_fibo, hunyuan_dit_parts, pixart_parts, sana_parts, sd3_parts
from zoo.ltx import LTX2, ltx2_parts, ltx_parts
from zoo.parts import (
    TOKENS,
    WIDTH,
    Specimen,
    entry,
    kl,
    mask,
    noise,
    picture,
    qwen_vae,
    specimen,
    stub,
    tiny,
    wan_vae,
)
from zoo.qwen import small, z_image_parts, z_image_text
from zoo.unet import sdxl_parts
from zoo.video import Unchecked, cogvideo_parts
from zoo.wan import FILM, unipc

EMBEDS = ["prompt_embeds", "negative_prompt_embeds", "prompt_embeds_mask", "negative_prompt_embeds_mask"]


class Tokens:
    """Stand in for a tokenizer or a processor whose tokens do not matter."""

    eos_token_id = 1
    tokenizer = image_processor = property(lambda self: self)

    def convert_tokens_to_ids(self, token: str) -> int:
        return 2

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        return [[3, 4]]

    def encode(self, text: str) -> list[int]:
        return [5]


def joy_parts(cls: type) -> dict[str, Any]:
    transformer = tiny(cls, in_channels=4, rope_dim_list=[4, 4, 8])
    return dict(transformer=transformer, vae=wan_vae(), scheduler=flow(shift=4.0))


@entry
def joy_image_edit_guided() -> Specimen:
    subject = specimen(d.JoyImageEditPipeline, joy_parts(d.JoyImageEditTransformer3DModel), image=picture(), **SQUARE)
    # The pipeline would scale to some 1024 pixels a side
    subject.pipe.vae_image_processor.get_default_height_width = lambda *args: (16, 16)
    return subject


@entry
def joy_image_edit_plus_guided() -> Specimen:
    parts = joy_parts(d.JoyImageEditPlusTransformer3DModel)
    subject = specimen(
        d.JoyImageEditPlusPipeline, parts, images=[picture(), picture(seed=1)], prompt="", drop=EMBEDS, **SQUARE
    )
    stub(subject, encode_prompt_multiple_images=(noise(1, TOKENS, WIDTH), torch.ones(1, TOKENS, dtype=torch.long)))
    subject.pipe.image_processor.get_default_height_width = lambda *args: (16, 16)
    return subject


class OmniGenTokens:
    """Stand in for the processor of OmniGen, which asks for torchvision: fixed tokens, no pictures."""

    max_image_size = 1024

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.collator = OmniGenCollator()

    def __call__(self, *args: Any, height: int, width: int, **kwargs: Any) -> dict[str, Any]:
        prompt, negative = (dict(input_ids=ids, pixel_values=None, image_sizes=None) for ids in ([5, 6, 7, 8], [9, 10]))
        return self.collator([(prompt, negative, None, [height, width])])


@entry
def omnigen_guided() -> Specimen:
    sizes = dict(
        in_channels=4,
        vocab_size=16,
        pad_token_id=0,
        time_step_dim=16,
        pos_embed_max_size=16,
        max_position_embeddings=64,
        original_max_position_embeddings=64,
    )
    scaling = dict(rope_scaling=dict(long_factor=[1.0] * 8, short_factor=[1.0] * 8, type="su"))
    transformer = tiny(d.OmniGenTransformer2DModel, **sizes, **scaling)
    parts = dict(transformer=transformer, vae=kl(blocks=4), scheduler=flow(invert_sigmas=True, num_train_timesteps=1))
    with mock.patch.object(
        sys.modules[d.OmniGenPipeline.__module__], "OmniGenMultiModalProcessor", OmniGenTokens, create=True
    ):
        return specimen(d.OmniGenPipeline, parts, prompt="", height=64, width=64)


@entry
def qwen_image21_guided() -> Specimen:
    transformer = tiny(d.QwenImage21Transformer2DModel, in_channels=4, out_channels=4, context_in_dim=WIDTH)
    parts = dict(transformer=transformer, vae=qwen_vae(), scheduler=shifted(), processor=Tokens())
    more = dict(true_cfg_scale=3.0, height=64, width=64)
    subject = specimen(d.QwenImage21Pipeline, parts, masks=torch.bool, **more)
    kept = torch.ones(1, TOKENS, dtype=torch.bool)
    encoded = (noise(1, TOKENS, WIDTH), kept, torch.zeros(1, TOKENS, dtype=torch.bool))
    return stub(subject, encode_prompt=encoded)


@entry
def consisid_guided() -> Specimen:
    sizes = dict(
        id_dim=8,
        vit_dim=8,
        depth=2,
        dim_head=8,
        num_heads=2,
        num_id_token=1,
        num_querie=2,
        output_dim=21,
        ff_mult=1,
        num_scale=2,
    )
    face = {f"LFE_{name}": size for name, size in sizes.items()}
    rotary = dict(use_rotary_positional_embeddings=True, use_learned_positional_embeddings=True)
    cross = dict(cross_attn_interval=1, is_train_face=True, cross_attn_dim_head=8, cross_attn_num_heads=2)
    parts = cogvideo_parts(d.CogVideoXDPMScheduler(), 4, d.ConsisIDTransformer3DModel, **rotary, **cross, **face)
    more = dict(image=picture(), id_vit_hidden=[noise(1, 2, 8)] * 2, id_cond=noise(1, 8))
    return specimen(ConsisIDPipeline, parts, **more, **FILM)


@entry
def cosmos3_guided() -> Specimen:
    sizes = dict(latent_channel=4, latent_patch_size=1, patch_latent_dim=4, vocab_size=16, rope_axes_dim=[4, 2, 2])
    transformer = tiny(d.Cosmos3OmniTransformer, **sizes)
    parts = dict(transformer=transformer, text_tokenizer=Tokens(), vae=wan_vae(), scheduler=unipc())
    subject = specimen(d.Cosmos3OmniPipeline, dict(parts, enable_safety_checker=False), prompt="", **FILM)
    return stub(subject, tokenize_prompt=([3, 4, 5, 1, 2], [6, 7, 1, 2]))


@entry
def bria_fibo_edit_guided() -> Specimen:
    more = dict(image=picture(64), _auto_resize=False, height=64, width=64, prompt="{}")
    subject = bria_fibo(d.BriaFiboEditPipeline, **more)
    subject.pipe.check_inputs = lambda *args, **kwargs: None  # it wants the prompt in JSON
    return subject


@entry
def prx_pixel_guided() -> Specimen:
    sizes = dict(
        in_channels=3,
        context_in_dim=WIDTH,
        mlp_ratio=2.0,
        num_heads=2,
        depth=2,
        bottleneck_size=8,
        resolution_embeds=True,
    )
    transformer = tiny(d.PRXTransformer2DModel, axes_dim=[8, 8], **sizes)
    parts = dict(transformer=transformer, scheduler=flow(), prompt_max_tokens=TOKENS)
    return specimen(d.PRXPixelPipeline, parts, use_resolution_binning=False, output_type="pt", **SQUARE)


@entry
def z_image_controlnet_guided() -> Specimen:
    return specimen(d.ZImageControlNetPipeline, z_image_control(4), control_image=picture(), **z_image_text(), **SQUARE)


@entry
def z_image_controlnet_inpaint_guided() -> Specimen:
    more = dict(image=picture(), mask_image=mask(), control_image=picture(seed=1))
    return specimen(d.ZImageControlNetInpaintPipeline, z_image_control(4 + 4 + 1), **more, **z_image_text(), **SQUARE)


def z_image_control(channels: int) -> dict[str, Any]:
    parts = z_image_parts()
    places = dict(control_layers_places=[0], control_refiner_layers_places=[0], control_in_dim=channels)
    controlnet = tiny(d.ZImageControlNetModel, dim=WIDTH, n_refiner_layers=1, n_heads=2, n_kv_heads=2, **places)
    d.ZImageControlNetModel.from_transformer(controlnet, parts["transformer"])
    return dict(parts, controlnet=controlnet)


@entry
def sd3_controlnet_inpaint_guided() -> Specimen:
    controlnet = tiny(
        d.SD3ControlNetModel, in_channels=16, out_channels=16, sample_size=8, extra_conditioning_channels=1
    )
    parts = dict(sd3_parts(), controlnet=controlnet)
    return specimen(
        d.StableDiffusion3ControlNetInpaintingPipeline,
        parts,
        control_image=noise(1, 3, 16, 16),
        control_mask=noise(1, 1, 16, 16),
        **SQUARE,
    )


@entry
def hunyuan_dit_controlnet_guided() -> Specimen:
    parts = dict(
        hunyuan_dit_parts(num_layers=4),
        controlnet=tiny(d.HunyuanDiT2DControlNetModel, transformer_num_layers=4, **HUNYUAN_DIT),
    )
    return specimen(
        d.HunyuanDiTControlNetPipeline, parts, control_image=picture(), use_resolution_binning=False, **SQUARE
    )


@entry
def longcat_image_edit_guided() -> Specimen:
    parts = dict(longcat_parts(), text_processor=Tokens())
    subject = specimen(d.LongCatImageEditPipeline, parts, prompt="", drop=EMBEDS, image=picture())
    places = torch.zeros(TOKENS, 3)
    return small(stub(subject, encode_prompt=(noise(1, TOKENS, WIDTH), places)))


@entry
def ltx2_condition_guided() -> Specimen:
    condition = LTX2VideoCondition(frames=noise(1, 3, 32, 32).sigmoid(), index=0, strength=1.0, crf=0)
    return specimen(d.LTX2ConditionPipeline, ltx2_parts(), conditions=condition, **LTX2)


@entry
def ltx2_in_context_guided() -> Specimen:
    from diffusers.pipelines.ltx2.pipeline_ltx2_ic_lora import LTX2ReferenceCondition

    reference = LTX2ReferenceCondition(frames=noise(1, 3, 32, 32).sigmoid(), strength=1.0)
    more = dict(reference_conditions=[reference], conditioning_attention_strength=0.5)
    return specimen(d.LTX2InContextPipeline, ltx2_parts(), **more, **LTX2)


@entry
def ltx2_hdr() -> Specimen:
    from diffusers.pipelines.ltx2.pipeline_ltx2_hdr_lora import LTX2HDRReferenceCondition

    reference = LTX2HDRReferenceCondition(frames=noise(1, 3, 32, 32).sigmoid(), strength=1.0)
    film = {name: LTX2[name] for name in ("height", "width", "num_frames", "frame_rate")}
    embeds = dict(connector_video_embeds=noise(1, TOKENS, WIDTH), connector_audio_embeds=noise(1, TOKENS, WIDTH))
    return specimen(d.LTX2HDRPipeline, ltx2_parts(), reference_conditions=[reference], drop=DROPS, **embeds, **film)


DROPS = [*EMBEDS, "prompt", "negative_prompt", "prompt_attention_mask", "negative_prompt_attention_mask"]


@entry
def visual_cloze_generation() -> Specimen:
    pictures = [[picture(32), picture(32, 1)], [picture(32, 2), None]]
    parts = dict(flux_parts(conditioning=16 + 16), resolution=32)
    prompts = dict(task_prompt=[""], content_prompt=[""])
    subject = specimen(
        d.VisualClozeGenerationPipeline,
        parts,
        drop=["prompt", "prompt_embeds", "pooled_prompt_embeds"],
        image=[pictures],
        **prompts,
    )
    return stub(subject, encode_prompt=(noise(1, TOKENS, WIDTH), noise(1, WIDTH), torch.zeros(TOKENS, 3)))


@entry
def ltx_long_multi_prompt_guided() -> Specimen:
    more = dict(
        prompt=["", ""],
        guidance_scale=3.0,
        temporal_tile_size=16,
        temporal_overlap=8,
        height=32,
        width=32,
        num_frames=25,
        seed=None,
    )
    subject = specimen(d.LTXI2VLongMultiPromptPipeline, dict(ltx_parts(), scheduler=flow(shift=3.0)), **more)
    kept = torch.ones(1, TOKENS, dtype=torch.bool)
    return stub(subject, encode_prompt=(noise(1, TOKENS, WIDTH), kept, noise(1, TOKENS, WIDTH, seed=1), kept))


@entry
def pixart_sigma_pag_guided() -> Specimen:
    parts = dict(pixart_parts(d.DDIMScheduler(clip_sample=False)), pag_applied_layers=["blocks.1"])
    return specimen(d.PixArtSigmaPAGPipeline, parts, use_resolution_binning=False, pag_scale=2.0, **SQUARE)


@entry
def sana_pag_guided() -> Specimen:
    parts = dict(sana_parts(flow(shift=3.0)), pag_applied_layers=["transformer_blocks.0"])
    return specimen(d.SanaPAGPipeline, parts, pag_scale=2.0, **SANA)


@entry
def hunyuan_dit_pag_guided() -> Specimen:
    parts = dict(hunyuan_dit_parts(), pag_applied_layers=["blocks.1"])
    return specimen(d.HunyuanDiTPAGPipeline, parts, use_resolution_binning=False, pag_scale=2.0, **SQUARE)


@entry
def sdxl_pag_guided() -> Specimen:
    parts = dict(sdxl_parts(d.EulerDiscreteScheduler()), pag_applied_layers=["mid"])
    return specimen(d.StableDiffusionXLPAGPipeline, parts, pag_scale=2.0, **SQUARE)


@entry
def hunyuan_image_refiner_guided() -> Specimen:
    sizes = dict(in_channels=16, out_channels=8, rope_axes_dim=(4, 4, 8), patch_size=(1, 1, 1))
    vae = tiny(
        d.AutoencoderKLHunyuanImageRefiner,
        latent_channels=4,
        block_out_channels=(32, 32),
        layers_per_block=1,
        spatial_compression_ratio=2,
        temporal_compression_ratio=1,
    )
    parts = dict(
        transformer=tiny(d.HunyuanImageTransformer2DModel, **sizes),
        vae=vae,
        scheduler=flow(shift=4.0),
        guider=d.ClassifierFreeGuidance(3.0),
    )
    return specimen(d.HunyuanImageRefinerPipeline, parts, image=picture(), **SQUARE)


@entry
def stable_cascade_prior_guided() -> Specimen:
    sizes = dict(
        conditioning_dim=32,
        block_out_channels=(32, 32),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        in_channels=4,
        out_channels=4,
        clip_text_pooled_in_channels=WIDTH,
        clip_text_in_channels=WIDTH,
        clip_image_in_channels=WIDTH,
        switch_level=(False,),
        down_blocks_repeat_mappers=(1, 1),
        up_blocks_repeat_mappers=(1, 1),
        block_types_per_layer=(("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"),) * 2,
    )
    parts = dict(
        prior=tiny(d.models.unets.StableCascadeUNet, **sizes),
        scheduler=d.DDPMWuerstchenScheduler(),
        resolution_multiple=2.0,
        text_encoder=Unchecked(),
    )
    pooled = dict(prompt_embeds_pooled=noise(1, 1, WIDTH), negative_prompt_embeds_pooled=noise(1, 1, WIDTH, seed=1))
    return specimen(d.StableCascadePriorPipeline, parts, output_type="pt", **pooled, **SQUARE)
