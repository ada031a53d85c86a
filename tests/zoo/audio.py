"""Sound, and shapes in three dimensions."""

from typing import Any

import diffusers as d
import torch

from lesa.host import needs
from zoo.flux import flow
from zoo.parts import TOKENS, WIDTH, Specimen, entry, noise, specimen, stub, tiny


def oobleck(channels: int) -> d.AutoencoderOobleck:
    """Build an audio VAE that shrinks time by 2, at 4 samples a second."""
    sizes = dict(encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=4, channel_multiples=[1, 2])
    return tiny(d.AutoencoderOobleck, decoder_input_channels=channels, sampling_rate=4, **sizes)


def stable_audio_parts(scheduler: Any) -> dict[str, Any]:
    sizes = dict(in_channels=4, out_channels=4, sample_size=16, num_key_value_attention_heads=2, time_proj_dim=16)
    widths = dict(cross_attention_dim=WIDTH, cross_attention_input_dim=WIDTH, global_states_input_dim=2 * WIDTH)
    transformer = tiny(d.StableAudioDiTModel, **sizes, **widths)
    projection = tiny(
        d.StableAudioProjectionModel, text_encoder_dim=WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=32
    )
    return dict(transformer=transformer, vae=oobleck(4), projection_model=projection, scheduler=scheduler)


def stable_audio(scheduler: Any) -> Specimen:
    drop = ["attention_mask", "negative_attention_mask"]
    return specimen(d.StableAudioPipeline, stable_audio_parts(scheduler), drop=drop, audio_end_in_s=4.0)


@entry
def stable_audio_guided() -> Specimen:
    needs.check("its own scheduler", "sound")
    return stable_audio(d.CosineDPMSolverMultistepScheduler())


@entry
def stable_audio_edm_guided() -> Specimen:
    return stable_audio(
        d.EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=500.0, sigma_data=1.0, prediction_type="v_prediction")
    )


def stable_audio3_parts(**config: Any) -> dict[str, Any]:
    from diffusers.pipelines.stable_audio_3.modeling_stable_audio_3 import StableAudio3DurationEmbedder

    sizes = dict(io_channels=8, embed_dim=WIDTH, depth=2, num_heads=2, cond_token_dim=WIDTH, global_cond_dim=WIDTH)
    more = dict(local_add_cond_dim=9, timestep_features_dim=16, ff_mult=2, num_memory_tokens=3)
    transformer = tiny(d.StableAudio3DiTModel, **sizes, **more)
    vae_sizes = dict(
        patch_size=2,
        encoder_channels=8,
        encoder_c_mults=(2,),
        encoder_strides=(2,),
        encoder_transformer_depths=(1,),
        latent_dim=8,
        dim_heads=4,
        ff_mult=2,
        sampling_rate=16,
    )
    embedder = tiny(StableAudio3DurationEmbedder, output_dim=WIDTH, fourier_dim=16)
    scheduler = flow(num_train_timesteps=1, **config)
    return dict(
        transformer=transformer,
        vae=tiny(d.AutoencoderSAME, **vae_sizes),
        duration_embedder=embedder,
        scheduler=scheduler,
    )


@entry
def stable_audio3_guided() -> Specimen:
    return specimen(d.StableAudio3Pipeline, stable_audio3_parts(), duration=2.0, guidance_scale=3.0)


@entry
def stable_audio3_stochastic() -> Specimen:
    return specimen(d.StableAudio3Pipeline, stable_audio3_parts(stochastic_sampling=True), duration=2.0)


@entry
def stable_audio3_audio_to_audio() -> Specimen:
    more = dict(audio=noise(1, 2, 32) / 4, duration=2.0, init_noise_level=0.7)
    return specimen(d.StableAudio3AudioToAudioPipeline, stable_audio3_parts(), **more)


@entry
def stable_audio3_inpaint() -> Specimen:
    more = dict(audio=noise(1, 2, 32) / 4, duration=2.0, mask_start_seconds=0.5, mask_end_seconds=1.0)
    return specimen(d.StableAudio3InpaintPipeline, stable_audio3_parts(), **more)


@entry
def ace_step_guided() -> Specimen:
    from diffusers.pipelines.ace_step import AceStepConditionEncoder

    transformer = tiny(d.AceStepTransformer1DModel, in_channels=24, audio_acoustic_hidden_dim=8, sliding_window=16)
    layers = dict(num_lyric_encoder_hidden_layers=1, num_timbre_encoder_hidden_layers=1, sliding_window=16)
    encoder = tiny(AceStepConditionEncoder, text_hidden_dim=WIDTH, timbre_hidden_dim=8, **layers)
    parts = dict(
        transformer=transformer, condition_encoder=encoder, vae=oobleck(8), scheduler=flow(num_train_timesteps=1)
    )
    subject = specimen(d.AceStepPipeline, parts, prompt="", audio_duration=4.0)
    kept = torch.ones(1, TOKENS, dtype=torch.bool)
    return stub(subject, encode_prompt=(noise(1, TOKENS, WIDTH), kept, noise(1, TOKENS, WIDTH, seed=1), kept))


@entry
def longcat_audio_guided() -> Specimen:
    from diffusers.models.autoencoders.autoencoder_longcat_audio_dit import LongCatAudioDiTVae

    sizes = dict(dit_dim=WIDTH, dit_depth=2, dit_heads=2, dit_text_dim=WIDTH, latent_dim=8, text_conv=False)
    vae = tiny(
        LongCatAudioDiTVae,
        channels=16,
        c_mults=[1, 2],
        strides=[2],
        latent_dim=8,
        encoder_latent_dim=16,
        downsampling_ratio=2,
    )
    parts = dict(transformer=tiny(d.LongCatAudioDiTTransformer, **sizes), vae=vae)
    subject = specimen(d.LongCatAudioDiTPipeline, parts, prompt="", audio_duration_s=0.002)
    return stub(subject, encode_prompt=(noise(1, TOKENS, WIDTH), torch.tensor([TOKENS])))


def prior_parts(**config: Any) -> dict[str, Any]:
    sizes = dict(embedding_dim=16, num_embeddings=8, embedding_proj_dim=16, clip_embed_dim=32, additional_embeddings=0)
    names = dict(
        time_embed_act_fn="gelu",
        norm_in_type="layer",
        encoder_hid_proj_type=None,
        added_emb_type=None,
        time_embed_dim=WIDTH,
    )
    heun = d.HeunDiscreteScheduler(
        beta_schedule="exp", num_train_timesteps=1024, prediction_type="sample", use_karras_sigmas=True, **config
    )
    return dict(prior=tiny(d.PriorTransformer, **sizes, **names), scheduler=heun)


@entry
def shap_e_guided() -> Specimen:
    subject = specimen(d.ShapEPipeline, prior_parts(), prompt="")
    return stub(subject, _encode_prompt=noise(2, 16))


@entry
def shap_e_clipped_guided() -> Specimen:
    subject = specimen(d.ShapEPipeline, prior_parts(clip_sample=True, clip_sample_range=1.0), prompt="")
    return stub(subject, _encode_prompt=noise(2, 16))
