"""Train `unseen-flags`: a small PixArtSigmaPipeline that draws waving flags (see models/unseen-flags/README.md).

    python models/unseen_flags.py prompts models/unseen-flags
    python models/unseen_flags.py pixart models/unseen-flags --minutes 50
    python models/unseen_flags.py export models/unseen-flags
    python models/unseen_flags.py evaluate models/unseen-flags

The training writes checkpoints to .runs/unseen-flags every four minutes and resumes from them.
"""

import random
from functools import lru_cache

import flags
import numpy as np
import torch
from diffusers import DDIMScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
from emoji_flux import build_t5_tokenizer
from emoji_training import all_prompts, start_at_identity
from transformers import T5Config, T5EncoderModel
from unseen_training import PixelRecipe, main

PATCH, TEXT_TOKENS = 4, 12


class PixArt(PixelRecipe):
    name = "pixart"
    text_encoders = ("text_encoder",)
    dropped = 0.1
    batch = 64
    copies = 1
    splits = dict(train=12000, validation=400, heldout=1000)
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")

    def captions(self):
        return [flags.caption(flag) for flag in flags.FLAGS]

    def draw(self, prompt, chance):
        return flags.draw(flags.parse(prompt), chance)

    def shows(self, prompt, picture):
        return nearest_flag(picture, flags.parse(prompt)) == flags.parse(prompt)

    def build_pipeline(self, folder):
        tokenizer = build_t5_tokenizer(all_prompts(folder))
        text_encoder = T5EncoderModel(
            T5Config(
                vocab_size=len(tokenizer),
                d_model=128,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
        transformer = PixArtTransformer2DModel(
            sample_size=flags.WIDTH,
            patch_size=PATCH,
            in_channels=3,
            out_channels=3,
            num_layers=5,
            attention_head_dim=32,
            num_attention_heads=4,
            cross_attention_dim=128,
            caption_channels=128,
        )
        start_at_identity(transformer, ("adaln_single.linear",))
        return PixArtSigmaPipeline(tokenizer, text_encoder, self.build_vae(), transformer, self.scheduler)

    def tokens(self, pipe, captions):
        padding = dict(padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
        padded = pipe.tokenizer(captions, **padding)
        return padded.input_ids, padded.attention_mask

    def disturb(self, clean, noise, uniform):
        level = (len(self.scheduler.alphas_cumprod) * uniform).long()
        noised = self.scheduler.add_noise(clean, noise, level)
        return level, noised, self.scheduler.get_velocity(clean, noise, level)

    def velocity(self, pipe, noised, sigma, ids, mask):
        return pipe.transformer(
            noised,
            pipe.text_encoder(ids, attention_mask=mask)[0],
            timestep=sigma,
            encoder_attention_mask=mask,
            added_cond_kwargs=dict(resolution=None, aspect_ratio=None),
            return_dict=False,
        )[0]


def nearest_flag(picture: np.ndarray, flag: flags.Flag) -> flags.Flag:
    """Find the flag whose drawings come nearest in pixels to a picture, with one thing other than prompted or none."""
    others = {
        "layout": flags.LAYOUTS,
        "first": flags.COLOURS,
        "second": flags.COLOURS,
        "colour": flags.COLOURS,
        "emblem": flags.EMBLEMS,
        "place": flags.PLACES,
    }
    near = {flag._replace(**{part: value}): None for part, values in others.items() for value in values}
    return min(near, key=lambda one: ((candidates(one) - picture.astype(np.float32)) ** 2).mean((1, 2, 3)).min())


@lru_cache(maxsize=64)
def candidates(flag: flags.Flag, count: int = 12) -> np.ndarray:
    """Draw a flag as chance may show it: of shape (count, HEIGHT, WIDTH, 3)."""
    return np.array([flags.draw(flag, random.Random(k)) for k in range(count)], dtype=np.float32)


if __name__ == "__main__":
    main(PixArt(), __doc__)
