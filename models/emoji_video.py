"""Train `emoji-video`: a small HunyuanVideoPipeline that draws moving emoji (see models/emoji-video/README.md).

    python models/emoji_clips.py models/emoji-flux models/emoji-video
    python models/emoji_video.py vae models/emoji-video
    python models/emoji_video.py video models/emoji-video
    python models/emoji_video.py export models/emoji-video
    python models/emoji_video.py evaluate models/emoji-video

The trainings write checkpoints to .runs/emoji-video every four minutes and resume from them.
"""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from emoji_flux import build_clip_tokenizer
from emoji_training import KernelMuon, Recipe, all_prompts, main, start_at_identity
from moving_emoji import FRAMES, Reel, parse
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel, PreTrainedTokenizerFast

TEMPLATE, TEMPLATE_TOKENS = DEFAULT_PROMPT_TEMPLATE["template"], DEFAULT_PROMPT_TEMPLATE["crop_start"]
TEXT_TOKENS = 12  # max_sequence_length in call.json
CLIP_TOKENS = 77  # the pipeline pads to it
LLAMA_SPLIT = (  # Llama 3's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
START, END, HEADER, HEADER_END, TURN_END = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
LATENT_CHANNELS = 16
SHORT = 5  # frames


class Video(Recipe):
    name = "video"
    text_encoders = ("text_encoder", "text_encoder_2")
    dropped = 0.05
    vae_batch = 8
    batch = 32
    muon = False
    columns = 4
    shift = 3.0

    def pictures(self, folder, captions):
        reel = Reel(folder)
        drawn = np.stack([reel.draw(*parse(c)) for c in captions])
        return torch.from_numpy(drawn).permute(0, 4, 1, 2, 3).contiguous()

    def cut(self, drawn, progress, generator):
        """Learn single frames first, then short clips, and whole ones in the end: they cost far more."""
        if progress < 0.3:
            frame = int(torch.randint(FRAMES, (), generator=generator))
            return drawn[:, :, frame : frame + 1]
        if progress < 0.8:
            first = int(torch.randint(FRAMES - SHORT + 1, (), generator=generator))
            return drawn[:3, :, first : first + SHORT]
        return drawn[:2]

    def build_vae(self) -> AutoencoderKLHunyuanVideo:
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=LATENT_CHANNELS,
            down_block_types=("HunyuanVideoDownBlock3D",) * 4,
            up_block_types=("HunyuanVideoUpBlock3D",) * 4,
            block_out_channels=(8, 16, 32, 64),
            layers_per_block=1,
            norm_num_groups=1,
            scaling_factor=1.0,
        )
        for name, module in vae.named_modules():
            if isinstance(module, HunyuanVideoCausalConv3d):
                nn.init.zeros_(module.conv.weight[:, :, :-1])
            if name.endswith("conv2"):
                nn.init.zeros_(module.conv.weight)
        nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:], -6.0)  # little noise until there is something to hide
        return vae

    def vae_optimisers(self, vae):
        kernels = [p for name, p in vae.named_parameters() if name.endswith(".conv.weight")]
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
        last, first = vae.quant_conv, vae.post_quant_conv
        with torch.no_grad():
            last.weight[: len(mean)] /= std.view(-1, 1, 1, 1, 1)
            last.bias[: len(mean)] = (last.bias[: len(mean)] - mean) / std
            last.bias[len(mean) :] -= 2 * std.log()
            first.bias += first.weight.flatten(1) @ mean
            first.weight *= std.view(1, -1, 1, 1, 1)

    def build_pipeline(self, folder):
        corpus = all_prompts(folder)
        tokenizer, tokenizer_2 = build_llama_tokenizer(corpus), build_clip_tokenizer(corpus, CLIP_TOKENS)
        text_encoder = LlamaModel(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=128,
                intermediate_size=256,
                num_hidden_layers=4,  # the pipeline reads what the second gives
                num_attention_heads=4,
                num_key_value_heads=2,
                rope_theta=500000.0,
                max_position_embeddings=512,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        text_encoder_2 = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer_2),
                hidden_size=64,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=CLIP_TOKENS,
                bos_token_id=0,
                eos_token_id=1,
                pad_token_id=1,
            )
        )
        transformer = HunyuanVideoTransformer3DModel(
            num_attention_heads=3,
            attention_head_dim=64,
            num_layers=2,
            num_single_layers=3,
            num_refiner_layers=1,
            guidance_embeds=False,
            text_embed_dim=128,
            pooled_projection_dim=64,
            rope_axes_dim=(16, 24, 24),
        )
        start_at_identity(transformer, ("norm1.linear", "norm1_context.linear", "norm.linear"))
        scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
        vae = AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae")
        return HunyuanVideoPipeline(text_encoder, tokenizer, transformer, vae, scheduler, text_encoder_2, tokenizer_2)

    def pack(self, pipe, means):
        return means * pipe.vae.config.scaling_factor

    def tokens(self, pipe, captions):
        prompts = [TEMPLATE.format(c) for c in captions]
        padding = dict(padding="max_length", truncation=True, return_tensors="pt")
        llama = pipe.tokenizer(prompts, max_length=TEMPLATE_TOKENS + TEXT_TOKENS, **padding)
        clip = pipe.tokenizer_2(captions, max_length=CLIP_TOKENS, **padding).input_ids
        used = int((clip != pipe.tokenizer_2.pad_token_id).sum(1).max()) + 1  # nothing sees what follows the end
        return llama.input_ids, llama.attention_mask, clip[:, :used]

    def velocity(self, pipe, noised, sigma, ids, mask, clip):
        template = pipe.text_encoder(ids[:1, :TEMPLATE_TOKENS], use_cache=True).past_key_values
        template.batch_repeat_interleave(len(ids))
        states = pipe.text_encoder(
            ids[:, TEMPLATE_TOKENS:], attention_mask=mask, past_key_values=template, output_hidden_states=True
        )
        return pipe.transformer(
            noised,
            timestep=1000 * sigma,
            encoder_hidden_states=states.hidden_states[-3],
            encoder_attention_mask=mask[:, TEMPLATE_TOKENS:],
            pooled_projections=pipe.text_encoder_2(clip).pooler_output,
            return_dict=False,
        )[0]


def frame_or_clip(self: HunyuanVideoCausalConv3d, x: Tensor) -> Tensor:
    """Convolve a clip as ever, and a single frame with the kernel's newest slice: the others are zeros until then."""
    if x.shape[2] > 1:
        return whole(self, x)
    side = self.conv.kernel_size[1] // 2
    x = F.pad(x.squeeze(2), (side,) * 4, mode=self.pad_mode)
    x, weight = (t.contiguous(memory_format=torch.channels_last) for t in (x, self.conv.weight[:, :, -1]))
    return F.conv2d(x, weight, self.conv.bias, self.conv.stride[1:])[:, :, None]


whole = HunyuanVideoCausalConv3d.forward


def build_llama_tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """Make Llama 3's kind of tokenizer with one token for each word of the template and the corpus."""
    pairs = Tokenizer(models.BPE(ignore_merges=True))
    pairs.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    pairs.decoder = decoders.ByteLevel()
    template, special = TEMPLATE.format("\n"), [START, END, HEADER, HEADER_END, TURN_END]
    for token in special:
        template = template.replace(token, "\n")
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    pairs.train_from_iterator([template] * 300 + corpus, trainer)
    pairs.post_processor = processors.TemplateProcessing(f"{START} $A", special_tokens=[(START, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=pairs, bos_token=START, eos_token=END, pad_token=END, padding_side="right"
    )


if __name__ == "__main__":
    HunyuanVideoCausalConv3d.forward = frame_or_clip
    main(Video(), __doc__)
