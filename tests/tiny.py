"""Tiny pipelines with seeded random weights."""

import json
from itertools import product
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from lesa.learn.outcome import GAINED_NOTHING

TRAINED = (0, GAINED_NOTHING)
"""How a training ends: one of a few updates may well be of no use."""
TEXT_TOKENS = 16
PARTS = (["small", "large"], ["red", "green", "blue"], ["apple", "pear", "fish"], ["white", "grey"], ["left", "right"])
CORPUS = [f"{size} {colour} {thing} on {ground}, {place}" for size, colour, thing, ground, place in product(*PARTS)]
WORDS = [word for part in PARTS for word in part] + ["on"]


def tokenizers() -> tuple[CLIPTokenizer, T5TokenizerFast]:
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.pre_tokenizer = CLIPTokenizer().backend_tokenizer.pre_tokenizer
    bpe.train_from_iterator(CORPUS, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    pieces = ["\u2581" + word for word in WORDS] + list("\u2581,abcdefghijklmnopqrstuvwxyz")
    unigram = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -(len(piece) ** 0.5)) for piece in pieces)]
    return (
        CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=TEXT_TOKENS),
        T5TokenizerFast(vocab=unigram, extra_ids=0, model_max_length=64),
    )


def build_transformer(seed: int = 0, **config: Any) -> FluxTransformer2DModel:
    """A FluxTransformer2DModel of 2 + 2 blocks and 24 channels with seeded random weights."""
    torch.manual_seed(seed)
    small = dict(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 4),
    )
    return FluxTransformer2DModel(**{**small, **config}).eval()


def build_pipeline() -> FluxPipeline:
    """A whole FluxPipeline with seeded random weights: 32 x 32 pixels are 16 image tokens."""
    clip, t5 = tokenizers()
    transformer = build_transformer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    text_2 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=32,
            d_kv=16,
            d_ff=64,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        sample_size=32,
        shift_factor=0.1,
        scaling_factor=0.36,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=4, max_image_seq_len=64
    )
    pipe = FluxPipeline(scheduler, vae.eval(), text.eval(), clip, text_2.eval(), t5, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer to which each word of the template is one token, so that the pipeline drops all 34 and no more."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=special[:1],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    template = QWEN_TEMPLATE.replace(special[1], "").replace(special[2], "")
    bpe.train_from_iterator([template] * 200 + CORPUS, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    return Qwen2Tokenizer(vocab=learned["vocab"], merges=merges, additional_special_tokens=special[1:])


def build_qwen_transformer(seed: int = 0, **config: Any) -> QwenImageTransformer2DModel:
    """A QwenImageTransformer2DModel of 2 blocks and 24 channels with seeded random weights."""
    torch.manual_seed(seed)
    small = dict(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 4),
    )
    return QwenImageTransformer2DModel(**{**small, **config}).eval()


def build_qwen_pipeline() -> QwenImagePipeline:
    """A whole QwenImagePipeline with seeded random weights: 32 x 32 pixels are 16 image tokens."""
    tokenizer, transformer = qwen_tokenizer(), build_qwen_transformer()
    text = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=dict(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                rope_scaling={"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
            ),
            vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32),
        )
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1] * 4,
        latents_std=[2.0] * 4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        shift_terminal=0.02,
        base_image_seq_len=4,
        max_image_seq_len=64,
    )
    pipe = QwenImagePipeline(scheduler, vae.eval(), text.eval(), tokenizer, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


HUNYUAN_START, HUNYUAN_END = "<|begin_of_text|>", "<|end_of_text|>"
HUNYUAN_SPECIAL = (HUNYUAN_START, HUNYUAN_END, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def hunyuan_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer to which each word of the template is one token, so that the pipeline crops all 95 and no more."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    template = DEFAULT_PROMPT_TEMPLATE["template"].format("\n")
    for token in HUNYUAN_SPECIAL:
        template = template.replace(token, "\n")
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=list(HUNYUAN_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([template] * 300 + CORPUS, trainer)
    bpe.post_processor = processors.TemplateProcessing(f"{HUNYUAN_START} $A", special_tokens=[(HUNYUAN_START, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=HUNYUAN_START,
        eos_token=HUNYUAN_END,
        pad_token=HUNYUAN_END,
        padding_side="right",
    )


def build_hunyuan_transformer(seed: int = 0, **config: Any) -> HunyuanVideoTransformer3DModel:
    """A HunyuanVideoTransformer3DModel of 2 + 2 blocks and 24 channels with seeded random weights."""
    torch.manual_seed(seed)
    small = dict(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 4, 4),
    )
    return HunyuanVideoTransformer3DModel(**{**small, **config}).eval()


def build_hunyuan_pipeline() -> HunyuanVideoPipeline:
    """A whole HunyuanVideoPipeline with seeded random weights: 5 frames of 32 x 48 pixels are 12 tokens of 16."""
    llama_tokenizer, clip = hunyuan_tokenizer(), tokenizers()[0]
    transformer = build_hunyuan_transformer()
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=len(llama_tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    pipe = HunyuanVideoPipeline(llama.eval(), llama_tokenizer, transformer, vae.eval(), scheduler, text.eval(), clip)
    pipe.set_progress_bar_config(disable=True)
    return pipe
