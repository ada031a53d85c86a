"""Train `emoji-flux`: a small FluxPipeline that draws composed emoji (see models/emoji-flux/README.md).

    python models/emoji_flux.py vae models/emoji-flux
    python models/emoji_flux.py flux models/emoji-flux
    python models/emoji_flux.py export models/emoji-flux
    python models/emoji_flux.py evaluate models/emoji-flux

The trainings write checkpoints to .runs/emoji-flux every four minutes and resume from them.
"""

import json
import math
from collections import Counter

import torch
from composed_emoji import PIXELS
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from emoji_training import IMAGE_TOKENS, Recipe, all_prompts, main, start_at_identity
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

TEXT_TOKENS = 12


class Flux(Recipe):
    name = "flux"
    text_encoders = ("text_encoder", "text_encoder_2")
    dropped = 0.05
    text_tokens = TEXT_TOKENS
    image_tokens = IMAGE_TOKENS
    width = 192
    shifts = (0.5, 1.15)  # of the sampler: at a sixteenth of the image tokens and at all of them

    def build_vae(self) -> AutoencoderKL:
        return AutoencoderKL(
            block_out_channels=(16, 32, 64),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            use_quant_conv=False,
            use_post_quant_conv=False,
            sample_size=PIXELS,
            shift_factor=0.0,
            scaling_factor=1.0,
        )

    def encode(self, vae, pictures):
        return vae.encode(pictures).latent_dist

    def decode(self, vae, latents):
        return vae.decode(latents).sample

    def whiten(self, vae, means):
        vae.register_to_config(shift_factor=means.mean().item(), scaling_factor=1 / means.std().item())

    def build_pipeline(self, folder):
        clip, t5 = build_tokenizers(all_prompts(folder), self.text_tokens)
        clip_model = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=self.text_tokens,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        t5_model = T5EncoderModel(
            T5Config(
                vocab_size=len(t5),
                d_model=128,
                d_kv=32,
                d_ff=256,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                dropout_rate=0.0,
            )
        )
        transformer = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=4,
            attention_head_dim=64,
            num_attention_heads=self.width // 64,
            joint_attention_dim=128,
            pooled_projection_dim=64,
            guidance_embeds=False,
            axes_dims_rope=(8, 28, 28),
        )
        start_at_identity(transformer, ("norm1.linear", "norm1_context.linear", "norm.linear"))
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=self.shifts[0],
            max_shift=self.shifts[1],
            base_image_seq_len=self.image_tokens // 16,
            max_image_seq_len=self.image_tokens,
        )
        vae = AutoencoderKL.from_pretrained(folder / "vae")
        return FluxPipeline(scheduler, vae, clip_model, clip, t5_model, t5, transformer)

    def pack(self, pipe, means):
        means = (means - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        return pipe._pack_latents(means, *means.shape)

    def tokens(self, pipe, captions):
        padding = dict(padding="max_length", max_length=self.text_tokens, truncation=True, return_tensors="pt")
        return tuple(tokenizer(captions, **padding).input_ids for tokenizer in (pipe.tokenizer, pipe.tokenizer_2))

    def velocity(self, pipe, noised, sigma, clip, t5):
        side = int(self.image_tokens**0.5)
        return pipe.transformer(
            noised,
            pipe.text_encoder_2(t5)[0],
            pipe.text_encoder(clip).pooler_output,
            timestep=sigma,
            img_ids=pipe._prepare_latent_image_ids(1, side, side, noised.device, torch.float32),
            txt_ids=torch.zeros(self.text_tokens, 3, device=noised.device),
            return_dict=False,
        )[0]


def build_clip_tokenizer(corpus: list[str], length: int) -> CLIPTokenizer:
    """Make CLIP's kind of tokenizer with one token for each word of the corpus."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    base = CLIPTokenizer().backend_tokenizer
    pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    pairs.pre_tokenizer, pairs.normalizer = base.pre_tokenizer, base.normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=special, end_of_word_suffix="</w>", initial_alphabet=alphabet
    )
    pairs.train_from_iterator(corpus, trainer)
    learned = json.loads(pairs.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=length)


def build_tokenizers(corpus: list[str], length: int) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Make CLIP's and T5's kinds of tokenizer with one token for each word of the corpus."""
    return build_clip_tokenizer(corpus, length), build_t5_tokenizer(corpus)


def build_t5_tokenizer(corpus: list[str]) -> T5TokenizerFast:
    """Make T5's kind of tokenizer with one token for each word of the corpus."""
    # a trained unigram vocabulary splits the rarer names, so this one is the words themselves, and letters for the rest
    counts = Counter(f"▁{word}" for line in corpus for word in line.lower().replace(",", "").split())
    total = sum(counts.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, math.log(count / total)) for word, count in counts.most_common()]
    pieces += [(letter, -20.0) for letter in "▁,.'-&abcdefghijklmnopqrstuvwxyz0123456789"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


if __name__ == "__main__":
    main(Flux(), __doc__)
