"""Train `emoji-qwen`: a small QwenImagePipeline that draws composed emoji (see models/emoji-qwen/README.md).

    python models/emoji_qwen.py vae models/emoji-qwen
    python models/emoji_qwen.py qwen models/emoji-qwen
    python models/emoji_qwen.py export models/emoji-qwen
    python models/emoji_qwen.py evaluate models/emoji-qwen

The trainings write checkpoints to .runs/emoji-qwen every four minutes and resume from them: run the same command again.
"""

import json

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from emoji_training import IMAGE_TOKENS, Recipe, all_prompts, main, start_at_identity
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

TEMPLATE_TOKENS = 34  # of the prompt template; the pipeline drops them
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


class Qwen(Recipe):
    name = "qwen"
    text_encoders = ("text_encoder",)
    unconditional = ("", " ")
    dropped = 0.1
    vae_batch = 8
    batch = 64

    def build_vae(self) -> AutoencoderKLQwenImage:
        vae = AutoencoderKLQwenImage(
            base_dim=16,
            z_dim=4,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        )
        for module in vae.modules():
            if isinstance(module, QwenImageCausalConv3d):
                nn.init.zeros_(module.weight[:, :, :-1])
        return vae

    def encode(self, vae, pictures):
        return vae.encode(pictures[:, :, None]).latent_dist

    def decode(self, vae, latents):
        return vae.decode(latents).sample[:, :, 0]

    def whiten(self, vae, means):
        channels = means.transpose(0, 1).flatten(1)
        vae.register_to_config(latents_mean=channels.mean(1).tolist(), latents_std=channels.std(1).tolist())

    def build_pipeline(self, folder):
        tokenizer = build_tokenizer(all_prompts(folder))
        text_encoder = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(
                text_config=dict(
                    vocab_size=len(tokenizer),
                    hidden_size=128,
                    intermediate_size=256,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    num_key_value_heads=2,
                    rope_theta=1e6,
                    rope_scaling={"mrope_section": [4, 6, 6], "rope_type": "default", "type": "default"},
                    tie_word_embeddings=True,
                    bos_token_id=None,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                ),
                vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=128),
                tie_word_embeddings=True,
            )
        )
        transformer = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=5,
            attention_head_dim=32,
            num_attention_heads=5,
            joint_attention_dim=128,
            axes_dims_rope=(4, 14, 14),
        )
        start_at_identity(transformer, ("img_mod.1", "txt_mod.1"))
        scheduler = FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            shift_terminal=0.02,
            base_image_seq_len=IMAGE_TOKENS // 16,
            max_image_seq_len=IMAGE_TOKENS + 12,  # as far below it as 1328 x 1328 pixels are in Qwen-Image
        )
        vae = AutoencoderKLQwenImage.from_pretrained(folder / "vae")
        return QwenImagePipeline(scheduler, vae, text_encoder, tokenizer, transformer)

    def pack(self, pipe, means):
        mean, std = (
            torch.tensor(x).view(1, -1, 1, 1, 1) for x in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        means = ((means - mean) / std).squeeze(2)
        return pipe._pack_latents(means, *means.shape)

    def tokens(self, pipe, captions):
        padded = pipe.tokenizer([TEMPLATE.format(c) for c in captions], padding=True, return_tensors="pt")
        return padded.input_ids, padded.attention_mask

    def velocity(self, pipe, noised, sigma, ids, mask):
        context = pipe.text_encoder.model.language_model(ids, attention_mask=mask).last_hidden_state
        side = int(IMAGE_TOKENS**0.5)
        return pipe.transformer(
            noised,
            context[:, TEMPLATE_TOKENS:],
            mask[:, TEMPLATE_TOKENS:],
            timestep=sigma,
            img_shapes=[[(1, side, side)]] * len(noised),
            return_dict=False,
        )[0]


def one_frame(self: QwenImageCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """Convolve a first frame: all frames before it are zeros, so that it meets the newest slice of the kernel alone."""
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x.squeeze(2), self.weight[:, :, -1]))
    return F.conv2d(x, weight, self.bias, self.stride[1:], (self._padding[2], self._padding[0]))[:, :, None]


def build_tokenizer(corpus: list[str]) -> Qwen2Tokenizer:
    """Make Qwen2's kind of tokenizer with one token for each word of the template and the corpus."""
    base = Qwen2Tokenizer().backend_tokenizer
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.normalizer = base.pre_tokenizer, base.normalizer
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    template = TEMPLATE.format("")
    for token in special:
        template = template.replace(token, "")
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special[:1], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    pairs.train_from_iterator([template] * 200 + corpus, trainer)
    learned = json.loads(pairs.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return Qwen2Tokenizer(vocab=learned["vocab"], merges=merges, additional_special_tokens=special[1:])


if __name__ == "__main__":
    QwenImageCausalConv3d.forward = one_frame
    main(Qwen(), __doc__)
