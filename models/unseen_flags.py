"""Train `unseen-flags`: a small PixArtSigmaPipeline that draws waving flags (see models/unseen-flags/README.md).

    python models/unseen_flags.py prompts models/unseen-flags
    python models/unseen_flags.py pixart models/unseen-flags --minutes 58
    python models/unseen_flags.py export models/unseen-flags
    python models/unseen_flags.py evaluate models/unseen-flags

The training writes checkpoints to .runs/unseen-flags every four minutes and resumes from them.
"""

import flags
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
    batch = 32
    splits = (9000, 400, 1000)
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")

    def captions(self):
        return [flags.caption(flag) for flag in flags.FLAGS]

    def draw(self, prompt, chance):
        return flags.draw(flags.parse(prompt), chance)

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


if __name__ == "__main__":
    main(PixArt(), __doc__)
