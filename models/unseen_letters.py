"""Train `unseen-letters`: a small StableDiffusion3Pipeline that draws letters (see models/unseen-letters/README.md).

    python models/unseen_letters.py prompts models/unseen-letters
    python models/unseen_letters.py sd3 models/unseen-letters --minutes 58
    python models/unseen_letters.py export models/unseen-letters
    python models/unseen_letters.py evaluate models/unseen-letters

The training writes checkpoints to .runs/unseen-letters every four minutes and resumes from them.
"""

import letters
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from emoji_flux import build_clip_tokenizer
from emoji_training import all_prompts, start_at_identity
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from unseen_training import PixelRecipe, main

PATCH, TEXT_TOKENS = 4, 10


class StableDiffusion3(PixelRecipe):
    name = "sd3"
    text_encoders = ("text_encoder", "text_encoder_2")
    dropped = 0.1
    batch = 32
    splits = (12000, 400, 1000)

    def captions(self):
        return [letters.caption(letter) for letter in letters.LETTERS]

    def draw(self, prompt, chance):
        return letters.draw(letters.parse(prompt), chance)

    def build_pipeline(self, folder):
        clip = build_clip_tokenizer(all_prompts(folder), TEXT_TOKENS)
        transformer = SD3Transformer2DModel(
            sample_size=letters.PIXELS,
            patch_size=PATCH,
            in_channels=3,
            out_channels=3,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=128,
            caption_projection_dim=128,
            pooled_projection_dim=128,
            pos_embed_max_size=letters.PIXELS // PATCH,
            qk_norm="rms_norm",
        )
        start_at_identity(transformer, ("norm1.linear", "norm1_context.linear", "norm_out.linear"))
        return StableDiffusion3Pipeline(
            transformer,
            FlowMatchEulerDiscreteScheduler(shift=3.0),
            self.build_vae(),
            clip_encoder(len(clip)),
            clip,
            clip_encoder(len(clip)),
            clip,
            None,  # Stable Diffusion 3 does without its T5: zeros stand in
            None,
        )

    def tokens(self, pipe, captions):
        padding = dict(padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
        return (pipe.tokenizer(captions, **padding).input_ids,)

    def velocity(self, pipe, noised, sigma, clip):
        read = [encoder(clip, output_hidden_states=True) for encoder in (pipe.text_encoder, pipe.text_encoder_2)]
        joined = torch.cat([one.hidden_states[-2] for one in read], dim=-1)
        no_t5 = joined.new_zeros(len(joined), 1, joined.shape[-1])  # max_sequence_length = 1
        return pipe.transformer(
            noised,
            torch.cat([joined, no_t5], dim=1),
            torch.cat([one.text_embeds for one in read], dim=-1),
            timestep=1000 * sigma,
            return_dict=False,
        )[0]


def clip_encoder(words: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=words,
            hidden_size=64,
            intermediate_size=128,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


if __name__ == "__main__":
    main(StableDiffusion3(), __doc__)
