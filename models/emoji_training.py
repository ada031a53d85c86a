"""What the trainings of the embedded models share: pictures, loops that resume, and the figures of a model card."""

import argparse
import math
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from composed_emoji import Atlas, parse
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import lesa
from lesa.bench.recogniser import recogniser
from lesa.host.pipelines import pictures_of

IMAGE_TOKENS = 64
CHECKPOINT_SECONDS = 240


class Recipe(ABC):
    """One embedded model: how its pipeline is built and how its parts are called in training."""

    name: str  # of its transformer's training
    text_encoders: tuple[str, ...]  # the pipeline's components that are trained along with the transformer
    unconditional: tuple[str, ...] = ("",)  # what a dropped caption reads
    dropped: float  # share of the captions that are dropped, so that classifier-free guidance works
    vae_batch = 16
    batch = 96
    muon = True  # it pays where bfloat16 products are fast
    decay = 0.999  # of the weights' average, a step
    haste = 1.0  # factor of the learning rates: a short training takes longer strides
    columns = 10  # of the contact sheet
    shift = 2.0  # of the times trained on, as schedulers have it
    vae_minutes, minutes = 12.0, 120.0  # of the autoencoder's training, and of the transformer's
    clock = staticmethod(time.monotonic)  # seconds that count as training

    def pictures(self, folder: Path, captions: list[str]) -> Tensor:
        """Draw captions as uint8 of shape (N, 3, PIXELS, PIXELS), or (N, 3, frames, PIXELS, PIXELS)."""
        atlas = Atlas(folder)
        drawn = np.stack([atlas.draw(*parse(c)) for c in captions])
        return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()

    def cut(self, drawn: Tensor, progress: float, generator: torch.Generator) -> Tensor:
        """Return what the autoencoder learns from at this share of its training: all of the pictures."""
        return drawn

    def to_unit(self, drawn: Tensor) -> Tensor:
        """Bring what was drawn to [-1, 1]."""
        return to_unit(drawn)

    def distortion(self, decoded: Tensor, real: Tensor) -> Tensor:
        """Return by how much decoded pictures in [-1, 1] differ from real ones: what the training lowers."""
        difference = decoded - real
        slopes = sum((difference.diff(dim=d)).abs().mean() for d in (-2, -1))
        return difference.abs().mean() + difference.square().mean() + 0.5 * slopes

    @abstractmethod
    def build_vae(self) -> Any: ...

    def vae_optimisers(self, vae: Any) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0)]

    @abstractmethod
    def encode(self, vae: Any, pictures: Tensor) -> Any:
        """Return the posterior of pictures in [-1, 1]."""

    @abstractmethod
    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Return pictures of the shape that is encoded."""

    @abstractmethod
    def whiten(self, vae: Any, means: Tensor) -> None:
        """Register what gives the transformer latents of zero mean and unit spread; means are a sample of latents."""

    @abstractmethod
    def build_pipeline(self, folder: Path) -> Any:
        """Join the trained autoencoder with fresh text encoders and a fresh transformer."""

    @abstractmethod
    def pack(self, pipe: Any, means: Tensor) -> Tensor:
        """Make of the autoencoder's latents what the transformer sees."""

    def prepare(self, pipe: Any, folder: Path, captions: list[str]) -> None:  # noqa: B027  (most have nothing to do)
        """Do what comes before the transformer's first step; a training that is resumed has it behind it."""

    def aside(self, pipe: Any, folder: Path, captions: list[str]) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Return the call that gives, after a forward pass, what is to be lowered beside the velocity's error."""
        return None

    def latents(self, pipe: Any, folder: Path, captions: list[str]) -> Callable[[Tensor], Tensor]:
        """Return the call that gives the latents of captions by their indices: each caption's picture is one."""
        return packed_latents(self, pipe, self.pictures(folder, captions)).__getitem__

    @abstractmethod
    def tokens(self, pipe: Any, captions: list[str]) -> tuple[Tensor, ...]:
        """Return token ids, and what else belongs to the captions, one row each."""

    def disturb(self, clean: Tensor, noise: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return noise levels, one for each number in [0, 1], the latents there and what is to be told of them."""
        sigma = self.shift * uniform / (1 + (self.shift - 1) * uniform)  # towards noise: it decides what is drawn
        return sigma, torch.lerp(clean, noise, sigma.view(-1, *[1] * (clean.ndim - 1))), noise - clean

    @abstractmethod
    def velocity(self, pipe: Any, noised: Tensor, sigma: Tensor, *tokens: Tensor) -> Tensor:
        """Run text encoders and transformer on noised latents."""


def prompts(folder: Path, split: str) -> list[str]:
    return (folder / "prompts" / f"{split}.txt").read_text().splitlines()


def all_prompts(folder: Path) -> list[str]:
    return [c for split in ("train", "heldout", "validation") for c in prompts(folder, split)]


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


class KernelMuon(torch.optim.Optimizer):
    """Muon for the kernels of convolutions, each a matrix of what it gives by what it takes; in float32."""

    def __init__(self, kernels: list[nn.Parameter], lr: float, momentum: float = 0.95):
        super().__init__(kernels, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for kernel in (p for p in group["params"] if p.grad is not None):
                mean = self.state[kernel].setdefault("mean", torch.zeros_like(kernel))
                mean.lerp_(kernel.grad, 1 - group["momentum"])
                change = orthogonal(kernel.grad.lerp(mean, group["momentum"]).flatten(1))
                size = 0.2 * max(change.shape) ** 0.5  # the root mean square of AdamW's
                kernel.sub_(change.view_as(kernel), alpha=group["lr"] * size)


def orthogonal(matrix: Tensor) -> Tensor:
    """Bring the singular values near 1 by five Newton-Schulz steps of Muon's quintic."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        square = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def train_vae(recipe: Recipe, folder: Path, runs: Path, minutes: float, float32: bool = False) -> None:
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    drawn = recipe.pictures(folder, prompts(folder, "train"))
    vae = recipe.build_vae()
    learners = recipe.vae_optimisers(vae)
    peaks = [learner.param_groups[0]["lr"] for learner in learners]
    spent, step, saved = 0.0, 0, time.monotonic()
    if (path := runs / "vae.pt").exists():
        state = torch.load(path, weights_only=True)
        vae.load_state_dict(state["vae"])
        for learner, kept in zip(learners, state["learners"], strict=True):
            learner.load_state_dict(kept)
        spent, step = state["spent"], state["step"]
    generator, mixed = torch.Generator().manual_seed(step), torch.autocast("cpu", torch.bfloat16, enabled=not float32)
    bar = tqdm(total=round(minutes * 60), initial=round(spent), unit="s", desc="vae", mininterval=5)
    while spent < minutes * 60:
        start = recipe.clock()
        for learner, peak in zip(learners, peaks, strict=True):
            learner.param_groups[0]["lr"] = peak * cosine(spent / (minutes * 60), warmup=0.03)
        batch = drawn[torch.randint(len(drawn), (recipe.vae_batch,), generator=generator)]
        real = recipe.to_unit(recipe.cut(batch, spent / (minutes * 60), generator))
        with mixed:
            posterior = recipe.encode(vae, real)
            decoded = recipe.decode(vae, posterior.sample())
        loss = recipe.distortion(decoded.float(), real) + 1.25e-6 * posterior.kl().float().mean()
        vae.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for learner in learners:
            learner.step()
        step += 1
        spent += (elapsed := recipe.clock() - start)
        bar.update(round(spent) - bar.n)
        if step % 50 == 0:
            psnr = -10 * math.log10(F.mse_loss(decoded.float(), real).item() / 4)
            std = posterior.mean.float().std().item()
            bar.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr:.1f}", std=f"{std:.2f}", ms=f"{elapsed * 1e3:.0f}")
        if time.monotonic() - saved > CHECKPOINT_SECONDS or spent >= minutes * 60:
            kept = [learner.state_dict() for learner in learners]
            save_atomically(dict(vae=vae.state_dict(), learners=kept, spent=spent, step=step), path)
            saved = time.monotonic()
    save_vae(recipe, vae, drawn, folder)


def save_vae(recipe: Recipe, vae: Any, drawn: Tensor, folder: Path) -> None:
    """Whiten the latents, write the autoencoder in bfloat16 and print how well it restores pictures."""
    with torch.no_grad():
        means = torch.cat([recipe.encode(vae, recipe.to_unit(part)).mean for part in drawn[:512].split(64)])
    recipe.whiten(vae, means)
    (folder / "vae").mkdir(exist_ok=True)
    vae.to(torch.bfloat16).save_pretrained(folder / "vae")
    check = drawn[torch.randperm(len(drawn))[:64]]
    with torch.no_grad():
        vae.float()
        restored = recipe.decode(vae, recipe.encode(vae, recipe.to_unit(check)).mean).clamp(-1, 1)
    error = (restored - recipe.to_unit(check)).square().flatten(1).mean(dim=1)
    spread = means.transpose(0, 1).flatten(1).std(dim=1)
    print(
        f"median PSNR of the autoencoder: {(-10 * torch.log10(error / 4)).median():.1f} dB; "
        f"latents: mean {means.mean():.3f}, std per channel {spread.tolist()}"
    )


# --- the text encoders and the transformer


def start_at_identity(transformer: nn.Module, endings: tuple[str, ...]) -> None:
    """Zero the blocks' modulations and the last projection (adaLN-zero)."""
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(endings):
            nn.init.zeros_(module.weight)
    nn.init.zeros_(transformer.proj_out.weight)


@torch.no_grad()
def packed_latents(recipe: Recipe, pipe: Any, drawn: Tensor) -> Tensor:
    """Encode uint8 pictures as the transformer sees them."""
    parts = [recipe.to_unit(part.to(pipe.vae.device)) for part in drawn.split(64)]
    return recipe.pack(pipe, torch.cat([recipe.encode(pipe.vae, part).mean for part in parts]).cpu())


def trained_parts(recipe: Recipe, pipe: Any) -> dict[str, nn.Module]:
    return {part: getattr(pipe, part) for part in ("transformer", *recipe.text_encoders)}


def trained_state(recipe: Recipe, pipe: Any) -> dict[str, Tensor]:
    parts = trained_parts(recipe, pipe)
    return {f"{part}/{key}": t for part, module in parts.items() for key, t in module.state_dict().items()}


def optimisers(recipe: Recipe, pipe: Any) -> list[torch.optim.Optimizer]:
    """Muon on the blocks' matrices and AdamW on everything else, or AdamW alone."""
    adam = dict(lr=1.5e-3 * recipe.haste, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    if not recipe.muon:
        return [torch.optim.AdamW([p for m in trained_parts(recipe, pipe).values() for p in m.parameters()], **adam)]
    matrices = [p for name, p in pipe.transformer.named_parameters() if p.ndim == 2 and "transformer_blocks" in name]
    taken = {id(p) for p in matrices}
    others = [p for module in trained_parts(recipe, pipe).values() for p in module.parameters() if id(p) not in taken]
    return [
        torch.optim.Muon(matrices, lr=2e-3 * recipe.haste, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, **adam),
    ]


def resume(
    path: Path,
    live: dict[str, Tensor],
    average: dict[str, Tensor],
    learners: list[torch.optim.Optimizer],
    device: str,
) -> tuple[float, int]:
    """Fill in what a checkpoint kept, if there is one; return the seconds spent and the steps done."""
    if not path.exists():
        return 0.0, 0
    state = torch.load(path, weights_only=True, map_location=device)
    for key, t in live.items():
        t.copy_(state["live"][key])
        average[key].copy_(state["average"][key])
    for learner, kept in zip(learners, state["learners"], strict=True):
        learner.load_state_dict(kept)
    return state["spent"], state["step"]


def train_transformer(
    recipe: Recipe, folder: Path, runs: Path, minutes: float, float32: bool = False, device: str = "cpu"
) -> None:
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    captions = prompts(folder, "train")
    pipe = recipe.build_pipeline(folder)
    path = runs / f"{recipe.name}.pt"
    if not path.exists():
        recipe.prepare(pipe, folder, captions)
    pipe = pipe.to(device)
    latents = recipe.latents(pipe, folder, captions)
    aside = recipe.aside(pipe, folder, captions)
    tokens = [part.to(device) for part in recipe.tokens(pipe, [*recipe.unconditional, *captions])]
    clock = recipe.clock if device == "cpu" else time.monotonic
    learners = optimisers(recipe, pipe)
    peaks = [o.param_groups[0]["lr"] for o in learners]
    live = trained_state(recipe, pipe)
    average = {key: t.clone() for key, t in live.items()}
    spent, step = resume(path, live, average, learners, device)
    saved = time.monotonic()
    generator = torch.Generator().manual_seed(step)
    batch, mixed = recipe.batch, torch.autocast(device, torch.bfloat16, enabled=not float32)
    bar = tqdm(total=round(minutes * 60), initial=round(spent), unit="s", desc=recipe.name, mininterval=5)
    running = 0.0
    while spent < minutes * 60:
        start = clock()
        for learner, peak in zip(learners, peaks, strict=True):
            learner.param_groups[0]["lr"] = peak * cosine(spent / (minutes * 60))
        chosen = torch.randint(len(captions), (batch,), generator=generator)
        clean = latents(chosen)
        noise = torch.randn(clean.shape, generator=generator)
        dropped = torch.rand(batch, generator=generator) < recipe.dropped
        empty = torch.randint(len(recipe.unconditional), (batch,), generator=generator)
        rows = torch.where(dropped, empty, len(recipe.unconditional) + chosen).to(device)
        uniform = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
        level, noised, target = recipe.disturb(*(t.to(device) for t in (clean, noise, uniform)))
        with mixed, sdpa_kernel(SDPBackend.MATH):  # the fused backward is slower here
            velocity = recipe.velocity(pipe, noised, level, *(t[rows] for t in tokens))
            beside = aside(chosen, dropped) if aside else 0.0
        loss = F.mse_loss(velocity.float(), target)
        for learner in learners:
            learner.zero_grad()
        (loss + beside).backward()
        for learner in learners:
            nn.utils.clip_grad_norm_(learner.param_groups[0]["params"], 1.0)
            learner.step()
        step += 1
        decay = min(recipe.decay, step / (step + 10))
        with torch.no_grad():
            floats = [key for key, t in live.items() if t.is_floating_point()]
            torch._foreach_lerp_([average[k] for k in floats], [live[k] for k in floats], 1 - decay)
        spent += clock() - start
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        bar.update(round(spent) - bar.n)
        bar.set_postfix(loss=f"{running:.4f}", beside=f"{float(beside):.3f}", step=step, refresh=False)
        if time.monotonic() - saved > CHECKPOINT_SECONDS or spent >= minutes * 60:
            kept = [learner.state_dict() for learner in learners]
            save_atomically(dict(live=live, average=average, learners=kept, spent=spent, step=step), path)
            print(f"\nminute {spent / 60:.1f}, step {step}, loss {running:.4f}", flush=True)
            saved = time.monotonic()


def export(recipe: Recipe, folder: Path, runs: Path) -> None:
    """Write the averaged weights of the newest checkpoint in diffusers' format."""
    pipe = recipe.build_pipeline(folder)
    average = torch.load(runs / f"{recipe.name}.pt", weights_only=True, map_location="cpu")["average"]
    for key, t in trained_state(recipe, pipe).items():
        t.copy_(average[key])
    pipe.transformer.to(torch.bfloat16)
    pipe.vae.to(torch.bfloat16)
    pipe.save_pretrained(folder)


# --- the figures of the model card


def evaluate(recipe: Recipe, folder: Path, count: int = 200, batch: int = 50) -> None:
    """Draw held-out prompts with every step full; print how many show what is prompted, and draw a contact sheet."""
    pipe, is_prompted = lesa.load(folder), recogniser(folder)
    assert is_prompted is not None, f"{folder} has no emoji"
    captions = prompts(folder, "heldout")[:count]
    drawn: list[np.ndarray] = []
    for first in range(0, count, batch):
        chosen = captions[first : first + batch]
        seeds = [torch.Generator().manual_seed(first + k) for k in range(len(chosen))]
        images = pictures_of(pipe(prompt=chosen, generator=seeds, output_type="np"))
        drawn += [(image * 255).round().astype(np.uint8) for image in images]
    targets = list(recipe.pictures(folder, captions).movedim(1, -1).numpy())
    for name, pictures in (("drawn", drawn), ("the autoencoder alone", restored(recipe, pipe.vae, targets))):
        share = float(np.mean(is_prompted(captions, pictures)))
        errors = [np.mean((a.astype(float) - b) ** 2) for a, b in zip(pictures, targets, strict=True)]
        median = float(np.median([10 * math.log10(255**2 / max(e, 1e-9)) for e in errors]))
        print(f"{count} held-out prompts, {name}: {share:.3f} show what is prompted, median PSNR {median:.1f} dB")
    contact_sheet(drawn[:40], targets[:40], recipe.columns).save(folder / "sheet.png", optimize=True)


@torch.no_grad()
def restored(recipe: Recipe, vae: Any, pictures: list[np.ndarray]) -> list[np.ndarray]:
    """Encode and decode pictures: the best that a transformer could draw."""
    shown = []
    for part in torch.from_numpy(np.stack(pictures)).movedim(-1, 1).split(16):
        decoded = recipe.decode(vae, recipe.encode(vae, to_unit(part)).mean).clamp(-1, 1)
        shown += list(((decoded + 1) * 127.5).round().byte().movedim(1, -1).numpy())
    return shown


def contact_sheet(drawn: list[np.ndarray], targets: list[np.ndarray], columns: int) -> Image.Image:
    """Put each drawn picture above its target; of clips the first, the middle and the last frame."""
    drawn, targets = ([_still(picture) for picture in pictures] for pictures in (drawn, targets))
    height, width = (size + 2 for size in drawn[0].shape[:2])
    sheet = Image.new("RGB", (columns * width, -(-len(drawn) // columns) * (2 * height + 6)), "white")
    for k, (picture, target) in enumerate(zip(drawn, targets, strict=True)):
        x, y = k % columns * width, k // columns * (2 * height + 6)
        sheet.paste(Image.fromarray(picture), (x, y))
        sheet.paste(Image.fromarray(target), (x, y + height))
    return sheet


def _still(picture: np.ndarray) -> np.ndarray:
    if picture.ndim == 3:
        return picture
    return np.concatenate(picture[[0, len(picture) // 2, -1]], axis=1)


def main(recipe: Recipe, description: str | None, evaluate: Callable[[Any, Path, int], None] = evaluate) -> None:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["vae", recipe.name, "export", "evaluate"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, help="of training in all, resumed ones included")
    parser.add_argument("--runs", type=Path, help="folder of the checkpoints (default: .runs/ and the model's name)")
    parser.add_argument("--float32", action="store_true", help="train without bfloat16, where it is slower")
    parser.add_argument("--device", default="cpu", help="that the transformer is trained on")
    parser.add_argument("--batch", type=int, default=recipe.batch, help="pictures a step (default: %(default)s)")
    parser.add_argument("--count", type=int, default=200, help="held-out prompts to evaluate")
    options = parser.parse_args()
    runs = options.runs or Path(".runs") / options.folder.name
    if options.what == "vae":
        train_vae(recipe, options.folder, runs, options.minutes or recipe.vae_minutes, options.float32)
    elif options.what == recipe.name:
        recipe.batch = options.batch
        train_transformer(
            recipe, options.folder, runs, options.minutes or recipe.minutes, options.float32, options.device
        )
    elif options.what == "export":
        export(recipe, options.folder, runs)
    else:
        evaluate(recipe, options.folder, options.count)
