"""Train `emoji-flux`: a small FluxPipeline that draws composed emoji (see models/emoji-flux/README.md).

    python models/emoji_flux.py vae models/emoji-flux
    python models/emoji_flux.py flux models/emoji-flux
    python models/emoji_flux.py export models/emoji-flux
    python models/emoji_flux.py evaluate models/emoji-flux

The trainings write checkpoints to .runs/emoji-flux every four minutes and resume from them.
"""

import argparse
import json
import math
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

import lesa
from lesa.emoji import PIXELS, Atlas, parse

RUNS = Path(".runs/emoji-flux")
TEXT_TOKENS = 12
IMAGE_TOKENS = 64
CHECKPOINT_SECONDS = 240


def prompts(folder: Path, split: str) -> list[str]:
    return (folder / "prompts" / f"{split}.txt").read_text().splitlines()


def pictures(folder: Path, captions: list[str]) -> Tensor:
    """Draw captions as uint8 of shape (N, 3, PIXELS, PIXELS)."""
    atlas = Atlas(folder)
    drawn = np.stack([atlas.draw(*parse(c)) for c in captions])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()


def to_unit(drawn: Tensor) -> Tensor:
    """uint8 pixels to [-1, 1]."""
    return drawn.float() / 127.5 - 1


def save_atomically(state: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, part := path.with_suffix(".part"))
    os.replace(part, path)


def cosine(progress: float, warmup: float = 0.01) -> float:
    """Learning-rate factor: linear warm-up, then cosine to zero."""
    return min(progress / warmup, 1.0) * (0.5 + 0.5 * math.cos(math.pi * min(progress, 1.0)))


# --- the autoencoder


def build_vae() -> AutoencoderKL:
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


def train_vae(folder: Path, minutes: float) -> None:
    torch.manual_seed(0)
    drawn = pictures(folder, prompts(folder, "train"))
    vae = build_vae()
    optimiser = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)
    spent, step, saved = 0.0, 0, time.monotonic()
    if (path := RUNS / "vae.pt").exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimiser.load_state_dict(state["optimiser"])
        spent, step = state["spent"], state["step"]
    generator = torch.Generator().manual_seed(step)
    bar = tqdm(total=round(minutes * 60), initial=round(spent), unit="s", desc="vae")
    while spent < minutes * 60:
        start = time.monotonic()
        optimiser.param_groups[0]["lr"] = 2e-3 * cosine(spent / (minutes * 60), warmup=0.03)
        batch = drawn[torch.randint(len(drawn), (16,), generator=generator)]
        real = to_unit(batch)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(real).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        difference = decoded.float() - real
        slopes = sum((difference.diff(dim=d)).abs().mean() for d in (2, 3))
        distortion = difference.abs().mean() + difference.square().mean() + 0.5 * slopes
        loss = distortion + 1.25e-6 * posterior.kl().float().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        step += 1
        spent += (elapsed := time.monotonic() - start)
        bar.update(round(spent) - bar.n)
        if step % 50 == 0:
            psnr = -10 * math.log10(difference.square().mean().item() / 4)
            std = posterior.mean.float().std().item()
            bar.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr:.1f}", std=f"{std:.2f}", ms=f"{elapsed * 1e3:.0f}")
        if time.monotonic() - saved > CHECKPOINT_SECONDS or spent >= minutes * 60:
            save_atomically(dict(vae=vae.state_dict(), optimiser=optimiser.state_dict(), spent=spent, step=step), path)
            saved = time.monotonic()

    # whiten: the transformer should see latents of zero mean and unit spread
    with torch.no_grad():
        means = torch.cat([vae.encode(to_unit(part)).latent_dist.mean for part in drawn[:2048].split(64)])
    vae.register_to_config(shift_factor=means.mean().item(), scaling_factor=1 / means.std().item())
    (folder / "vae").mkdir(exist_ok=True)
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    check = drawn[torch.randperm(len(drawn))[:256]]
    with torch.no_grad():
        vae.float()
        restored = vae.decode(vae.encode(to_unit(check)).latent_dist.mean).sample.clamp(-1, 1)
    error = (restored - to_unit(check)).square().mean(dim=(1, 2, 3))
    print(
        f"median PSNR of the autoencoder: {(-10 * torch.log10(error / 4)).median():.1f} dB; "
        f"latents: mean {means.mean():.3f}, std per channel {means.std(dim=(0, 2, 3)).tolist()}"
    )


# --- the text encoders and the transformer


def build_tokenizers(corpus: list[str]) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """Make CLIP's and T5's kinds of tokenizer with one token for each word of the corpus."""
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
    clip = CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=TEXT_TOKENS)

    # a trained unigram vocabulary splits the rarer names, so this one is the words themselves, and letters for the rest
    counts = Counter(f"▁{word}" for line in corpus for word in line.lower().replace(",", "").split())
    total = sum(counts.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(word, math.log(count / total)) for word, count in counts.most_common()]
    pieces += [(letter, -20.0) for letter in "▁,.'-&abcdefghijklmnopqrstuvwxyz0123456789"]
    return clip, T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=512)


def build_pipeline(folder: Path) -> FluxPipeline:
    """Join the trained autoencoder with fresh text encoders and a fresh transformer."""
    clip, t5 = build_tokenizers([c for split in ("train", "heldout", "validation") for c in prompts(folder, split)])
    clip_model = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_TOKENS,
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
        num_attention_heads=3,
        joint_attention_dim=128,
        pooled_projection_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(8, 28, 28),
    )
    for name, module in transformer.named_modules():  # adaLN-zero: every block starts as the identity
        if isinstance(module, nn.Linear) and (name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear"))):
            nn.init.zeros_(module.weight)
    nn.init.zeros_(transformer.proj_out.weight)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=IMAGE_TOKENS // 16,
        max_image_seq_len=IMAGE_TOKENS,
    )
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    return FluxPipeline(scheduler, vae, clip_model, clip, t5_model, t5, transformer)


@torch.no_grad()
def packed_latents(pipe: FluxPipeline, drawn: Tensor) -> Tensor:
    """Encode uint8 pictures as the transformer sees them, shape (N, IMAGE_TOKENS, 16)."""
    vae = pipe.vae
    means = torch.cat([vae.encode(to_unit(part)).latent_dist.mean for part in drawn.split(64)])
    means = (means - vae.config.shift_factor) * vae.config.scaling_factor
    return pipe._pack_latents(means, *means.shape)


class Captions:
    """Captions as token ids; some are dropped in training so that true classifier-free guidance works too."""

    def __init__(self, pipe: FluxPipeline, captions: list[str]):
        def ids(tokenizer):
            padded = tokenizer(
                ["", *captions], padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt"
            )
            return padded.input_ids

        self.clip, self.t5 = ids(pipe.tokenizer), ids(pipe.tokenizer_2)

    def encode(self, pipe: FluxPipeline, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Embed captions by number, -1 the empty one: (B, TEXT_TOKENS, 128) and, pooled, (B, 64)."""
        return pipe.text_encoder_2(self.t5[chosen + 1])[0], pipe.text_encoder(self.clip[chosen + 1]).pooler_output


def optimisers(pipe: FluxPipeline) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices, AdamW on everything else."""
    trained = [pipe.transformer, pipe.text_encoder, pipe.text_encoder_2]
    matrices = [p for name, p in pipe.transformer.named_parameters() if p.ndim == 2 and "transformer_blocks" in name]
    taken = {id(p) for p in matrices}
    others = [p for module in trained for p in module.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=2e-3, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=1.5e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def trained_state(pipe: FluxPipeline) -> dict[str, Tensor]:
    parts = dict(transformer=pipe.transformer, text_encoder=pipe.text_encoder, text_encoder_2=pipe.text_encoder_2)
    return {f"{part}/{key}": t for part, module in parts.items() for key, t in module.state_dict().items()}


def train_flux(folder: Path, minutes: float, batch: int = 96) -> None:
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    captions = prompts(folder, "train")
    pipe = build_pipeline(folder)
    latents = packed_latents(pipe, pictures(folder, captions))
    tokens = Captions(pipe, captions)
    image_ids = pipe._prepare_latent_image_ids(1, 8, 8, "cpu", torch.float32)
    text_ids = torch.zeros(TEXT_TOKENS, 3)
    learners = optimisers(pipe)
    peaks = [o.param_groups[0]["lr"] for o in learners]
    live = trained_state(pipe)
    average = {key: t.clone() for key, t in live.items()}
    spent, step, saved = 0.0, 0, time.monotonic()
    if (path := RUNS / "flux.pt").exists():
        state = torch.load(path, weights_only=True)
        for key, t in live.items():
            t.copy_(state["live"][key])
            average[key].copy_(state["average"][key])
        for learner, kept in zip(learners, state["learners"], strict=True):
            learner.load_state_dict(kept)
        spent, step = state["spent"], state["step"]
    generator = torch.Generator().manual_seed(step)
    bar = tqdm(total=round(minutes * 60), initial=round(spent), unit="s", desc="flux", mininterval=1)
    running = 0.0
    while spent < minutes * 60:
        start = time.monotonic()
        for learner, peak in zip(learners, peaks, strict=True):
            learner.param_groups[0]["lr"] = peak * cosine(spent / (minutes * 60))
        chosen = torch.randint(len(captions), (batch,), generator=generator)
        clean, noise = latents[chosen], torch.randn(batch, IMAGE_TOKENS, 16, generator=generator)
        dropped = torch.rand(batch, generator=generator) < 0.05
        uniform = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
        sigma = 2 * uniform / (1 + uniform)  # a mild shift to noise, where the emoji is decided
        noised = torch.lerp(clean, noise, sigma[:, None, None])
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):  # the fused backward is slower here
            context, pooled = tokens.encode(pipe, torch.where(dropped, -1, chosen))
            velocity = pipe.transformer(
                noised, context, pooled, timestep=sigma, img_ids=image_ids, txt_ids=text_ids, return_dict=False
            )[0]
        loss = F.mse_loss(velocity.float(), noise - clean)
        for learner in learners:
            learner.zero_grad()
        loss.backward()
        for learner in learners:
            nn.utils.clip_grad_norm_(learner.param_groups[0]["params"], 1.0)
            learner.step()
        step += 1
        decay = min(0.999, step / (step + 10))
        with torch.no_grad():
            floats = [key for key, t in live.items() if t.is_floating_point()]
            torch._foreach_lerp_([average[k] for k in floats], [live[k] for k in floats], 1 - decay)
        spent += time.monotonic() - start
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        bar.update(round(spent) - bar.n)
        bar.set_postfix(loss=f"{running:.4f}", step=step, refresh=False)
        if time.monotonic() - saved > CHECKPOINT_SECONDS or spent >= minutes * 60:
            kept = [learner.state_dict() for learner in learners]
            save_atomically(dict(live=live, average=average, learners=kept, spent=spent, step=step), path)
            print(f"\nminute {spent / 60:.1f}, step {step}, loss {running:.4f}", flush=True)
            saved = time.monotonic()


def export(folder: Path) -> FluxPipeline:
    """Write the averaged weights of the newest checkpoint in diffusers' format."""
    pipe = build_pipeline(folder)
    average = torch.load(RUNS / "flux.pt", weights_only=True)["average"]
    for key, t in trained_state(pipe).items():
        t.copy_(average[key])
    pipe.transformer.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    pipe.save_pretrained(folder)
    return pipe


# --- the figures of the model card


def evaluate(folder: Path, count: int = 200, batch: int = 50) -> None:
    """Draw held-out prompts with every step full; print how many show the prompted emoji, and draw a contact sheet."""
    pipe, atlas = lesa.load(folder), Atlas(folder)
    captions = prompts(folder, "heldout")[:count]
    drawn: list[np.ndarray] = []
    for first in range(0, count, batch):
        chosen = captions[first : first + batch]
        seeds = [torch.Generator().manual_seed(first + k) for k in range(len(chosen))]
        images = pipe(prompt=chosen, generator=seeds, output_type="np").images
        drawn += [(image * 255).round().astype(np.uint8) for image in images]
    targets = [atlas.draw(*parse(c)) for c in captions]
    share = float(np.mean(atlas.is_prompted(captions, drawn)))
    errors = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(drawn, targets, strict=True)]
    median = float(np.median([10 * math.log10(255**2 / max(e, 1e-9)) for e in errors]))
    print(f"{count} held-out prompts: {share:.3f} show the prompted emoji, median PSNR to its drawing {median:.1f} dB")
    contact_sheet(drawn[:40], targets[:40]).save(folder / "sheet.png", optimize=True)


def contact_sheet(drawn: list[np.ndarray], targets: list[np.ndarray], columns: int = 10) -> Image.Image:
    """Put each drawn picture above its target."""
    cell = PIXELS + 2
    sheet = Image.new("RGB", (columns * cell, -(-len(drawn) // columns) * (2 * cell + 6)), "white")
    for k, (picture, target) in enumerate(zip(drawn, targets, strict=True)):
        x, y = k % columns * cell, k // columns * (2 * cell + 6)
        sheet.paste(Image.fromarray(picture), (x, y))
        sheet.paste(Image.fromarray(target), (x, y + cell))
    return sheet


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["vae", "flux", "export", "evaluate"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float)
    options = parser.parse_args()
    if options.what == "vae":
        train_vae(options.folder, options.minutes or 12)
    elif options.what == "flux":
        train_flux(options.folder, options.minutes or 120)
    elif options.what == "export":
        export(options.folder)
    else:
        evaluate(options.folder)
