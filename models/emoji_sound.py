"""Train `emoji-sound`: a small StableAudioPipeline that says the names of emoji (see models/emoji-sound/README.md).

    python models/emoji_voices.py models/emoji-flux models/emoji-sound
    python models/emoji_sound.py vae models/emoji-sound
    python models/emoji_sound.py sound models/emoji-sound
    python models/emoji_sound.py export models/emoji-sound
    python models/emoji_sound.py evaluate models/emoji-sound

The trainings write checkpoints to .runs/emoji-sound every four minutes and resume from them.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderOobleck,
    CosineDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from emoji_flux import build_t5_tokenizer
from emoji_training import KernelMuon, Recipe, all_prompts, contact_sheet, main, prompts, start_at_identity
from spoken_emoji import RATE, SAMPLES, Tape, parse
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

import lesa
from lesa.bench.recogniser import recogniser
from lesa.bench.sounds import log_mel_distance, signal_to_noise, sound_picture

CHANNELS, TOKENS, TEXT_TOKENS = 16, 32, 12
WIDTH, HEADS, LAYERS, TEXT_WIDTH = 192, 3, 4, 128
SECONDS = SAMPLES / RATE
CUT = 4096  # samples that the autoencoder learns from at once
WINDOWS = (64, 256, 1024)  # samples, of the spectra that it is to restore
QUIET = 3e-4  # of full scale: what spectra hold below it counts as silence
SHOWN = 24  # clips of the sheet
LEAST_NOISE = 0.25  # trained on; the sampler's last step begins at 0.3


class Sound(Recipe):
    name = "sound"
    text_encoders = ("text_encoder", "projection_model")
    dropped = 0.1
    vae_batch = 4
    batch = 16
    muon = False
    columns = 6
    haste = 1.3
    vae_minutes, minutes = 9.0, 11.0
    clock = staticmethod(time.process_time)

    def pictures(self, folder, captions):
        """Say captions as float samples of shape (N, 1, SAMPLES)."""
        tape = Tape(folder)
        return torch.from_numpy(np.stack([tape.say(*parse(c)) for c in captions]))[:, None]

    def to_unit(self, drawn):
        return drawn

    def cut(self, drawn, progress, generator):
        first = int(torch.randint(SAMPLES - CUT + 1, (), generator=generator))
        return drawn[..., first : first + CUT]

    def distortion(self, decoded, real):
        spectral = sum(spectral_distance(decoded.squeeze(1), real.squeeze(1), window) for window in WINDOWS)
        return 4 * (decoded - real).abs().mean() + spectral

    def build_vae(self) -> AutoencoderOobleck:
        vae = AutoencoderOobleck(
            encoder_hidden_size=2 * CHANNELS,
            downsampling_ratios=[8, 8, 4],
            channel_multiples=[2, 4, 8],
            decoder_channels=24,
            decoder_input_channels=CHANNELS,
            audio_channels=1,
            sampling_rate=RATE,
        )
        nn.init.constant_(vae.encoder.conv2.bias[CHANNELS:], -4.0)  # little noise until there is something to hide
        return vae

    def vae_optimisers(self, vae):
        kernels = [p for name, p in vae.named_parameters() if name.endswith("weight_v")]
        taken = {id(p) for p in kernels}
        others = [p for p in vae.parameters() if id(p) not in taken]
        return [KernelMuon(kernels, lr=5e-3), torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)]

    def encode(self, vae, pictures):
        return vae.encode(pictures).latent_dist

    def decode(self, vae, latents):
        return vae.decode(latents).sample

    def whiten(self, vae, means):
        """Fold each channel's mean and spread into the convolutions next to the latents."""
        channels = means.transpose(0, 1).flatten(1)
        mean, std = channels.mean(1), channels.std(1)
        last, first = vae.encoder.conv2, vae.decoder.conv1
        with torch.no_grad():
            last.weight_g[:CHANNELS] /= std.view(-1, 1, 1)
            last.bias[:CHANNELS] = (last.bias[:CHANNELS] - mean) / std
            last.bias[CHANNELS:] -= std.log()  # softplus is near exp where little noise is added
            kernel = first.weight_g * first.weight_v / first.weight_v.norm(dim=(1, 2), keepdim=True)
            first.bias += (kernel * mean.view(1, -1, 1)).sum((1, 2))
            first.weight_v.copy_(kernel * std.view(1, -1, 1))
            first.weight_g.copy_(first.weight_v.norm(dim=(1, 2), keepdim=True))

    def build_pipeline(self, folder):
        tokenizer = build_t5_tokenizer(all_prompts(folder))
        tokenizer.model_max_length = TEXT_TOKENS  # the pipeline pads to it
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=TEXT_WIDTH,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
        projection_model = StableAudioProjectionModel(
            text_encoder_dim=TEXT_WIDTH, conditioning_dim=WIDTH, min_value=0, max_value=2
        )
        transformer = StableAudioDiTModel(
            sample_size=TOKENS,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            num_layers=LAYERS,
            attention_head_dim=64,
            num_attention_heads=HEADS,
            num_key_value_attention_heads=HEADS,
            cross_attention_dim=WIDTH,
            cross_attention_input_dim=WIDTH,
            global_states_input_dim=2 * WIDTH,
            time_proj_dim=64,
        )
        start_at_identity(transformer, ("to_out.0", "ff.net.2"))
        vae = AutoencoderOobleck.from_pretrained(folder / "vae")
        return StableAudioPipeline(
            vae, text_encoder, projection_model, tokenizer, transformer, CosineDPMSolverMultistepScheduler()
        )

    def pack(self, pipe, means):
        return means

    def tokens(self, pipe, captions):
        told = pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        kept = torch.tensor([[bool(caption)] for caption in captions])
        return told.input_ids, told.attention_mask, kept

    def disturb(self, clean, noise, uniform):
        """Go from latents to noise along a quarter of a circle, as the scheduler does; its timestep is the share."""
        lowest = 2 / math.pi * math.atan(LEAST_NOISE)
        share = lowest + (1 - lowest) * self.shift * uniform / (1 + (self.shift - 1) * uniform)
        angle = (share * math.pi / 2).view(-1, 1, 1)
        return share, angle.cos() * clean + angle.sin() * noise, angle.cos() * noise - angle.sin() * clean

    def velocity(self, pipe, noised, sigma, ids, mask, kept):
        seconds = torch.full((len(ids),), SECONDS, device=ids.device)
        told = pipe.projection_model(pipe.text_encoder(ids, attention_mask=mask)[0], 0 * seconds, seconds)
        ends = told.seconds_start_hidden_states, told.seconds_end_hidden_states
        states = torch.cat([told.text_hidden_states * mask[:, :, None], *ends], dim=1)
        return pipe.transformer(
            noised,
            sigma,
            encoder_hidden_states=states * kept[:, :, None],  # what the pipeline guides away from is all zeros
            global_hidden_states=torch.cat(ends, dim=2),
            rotary_embedding=get_1d_rotary_pos_embed(
                pipe.rotary_embed_dim, TOKENS + 1, use_real=True, repeat_interleave_real=False
            ),
            return_dict=False,
        )[0]


def spectral_distance(decoded: Tensor, real: Tensor, window: int) -> Tensor:
    """Return by how much magnitudes differ, as a share of the real ones and in their logarithms (nepers)."""
    shape = torch.hann_window(window)
    pair = torch.cat([decoded, real])
    spectra = torch.stft(pair, window, window // 4, window=shape, return_complex=True).abs() / shape.sum()
    ours, wanted = spectra.chunk(2)
    share = (ours - wanted).norm() / wanted.norm()
    return share + 0.5 * ((ours + QUIET).log() - (wanted + QUIET).log()).abs().mean()


def evaluate(recipe: Sound, folder: Path, count: int, batch: int = 32) -> None:
    """Say held-out prompts with every step full; print how many say what is prompted, and draw a sheet of spectra."""
    pipe, is_prompted = lesa.load(folder), recogniser(folder)
    captions = prompts(folder, "heldout")[:count]
    said: list[np.ndarray] = []
    for first in range(0, len(captions), batch):
        chosen = captions[first : first + batch]
        seeds = [torch.Generator().manual_seed(first + k) for k in range(len(chosen))]
        said += list(pipe(prompt=chosen, generator=seeds, output_type="np").audios)
    real = recipe.pictures(folder, captions)
    with torch.no_grad():
        restored = recipe.decode(pipe.vae, recipe.encode(pipe.vae, real).mean)
    for name, clips in (("said", said), ("the autoencoder alone", list(restored.numpy()))):
        share = float(np.mean(is_prompted(captions, clips)))
        pairs = list(zip(clips, real.numpy(), strict=True))
        apart = np.median([log_mel_distance(*pair, RATE) for pair in pairs])
        noise = np.median([signal_to_noise(*pair) for pair in pairs])
        print(
            f"{len(captions)} held-out prompts, {name}: {share:.3f} are nearest to what is prompted, "
            f"median log-mel distance {apart:.1f} dB, median signal-to-noise {noise:.1f} dB"
        )
    shown = [[sound_picture(clip, RATE) for clip in clips[:SHOWN]] for clips in (said, list(real.numpy()))]
    contact_sheet(*shown, recipe.columns).save(folder / "sheet.png", optimize=True)


if __name__ == "__main__":
    main(Sound(), __doc__, evaluate)
