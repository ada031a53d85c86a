"""Distil few-step models: `schnell` (models/emoji-schnell) and `lightning`, a LoRA (models/emoji-qwen/lightning).

    python models/emoji_students.py runs schnell
    python models/emoji_students.py train schnell
    python models/emoji_students.py export schnell
    python models/emoji_students.py evaluate schnell

The teacher's 50-step runs, with its guidance if it has any, are recorded at the times of the student's grid, many of
their steps forecast. The student starts as the teacher and learns one Euler step for each window between two of these
times: first from the teacher's latents (the mean velocity of a window, as in PeRFlow, arXiv 2405.07510), then from its
own, unrolled from noise to picture. Recording and training write to .runs/ every four minutes and go on from there.
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from composed_emoji import Atlas
from diffusers import FlowMatchEulerDiscreteScheduler
from emoji_flux import Flux
from emoji_qwen import Qwen
from emoji_training import CHECKPOINT_SECONDS, IMAGE_TOKENS, Recipe, contact_sheet, cosine, prompts, save_atomically
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import lesa
from lesa.learn import metrics

MODELS = Path(__file__).parent
WINDOWS_SHARE = 0.4  # of the training's time, before the runs are unrolled
SPLITS = ("train", "validation")
FIRST_SEED = {"train": 3_000_000, "validation": 4_000_000}
VALIDATION_RUNS = 16


@dataclass(frozen=True)
class Student:
    """A few-step model: its teacher, its grid and what of it is trained."""

    recipe: Recipe
    teacher: Path
    folder: Path
    call: dict[str, Any]
    scheduler: FlowMatchEulerDiscreteScheduler
    fast: dict[str, Any]  # how `lesa.accelerate` makes the teacher's runs, which end some -50 dB from full ones
    rank: int | None = None  # of a LoRA; without, all of the transformer is trained

    @property
    def steps(self) -> int:
        return self.call["num_inference_steps"]

    def grid(self) -> Tensor:
        """Return the S + 1 times that the pipeline will walk."""
        self.scheduler.set_timesteps(
            sigmas=np.linspace(1, 1 / self.steps, self.steps), mu=self.scheduler.config.max_shift
        )
        return self.scheduler.sigmas

    def pipeline(self) -> Any:
        """Return the teacher's pipeline with nothing but the student's parameters to be trained."""
        pipe = lesa.load(self.teacher)
        for part in ("transformer", *self.recipe.text_encoders):
            getattr(pipe, part).requires_grad_(False)
        if self.rank is None:
            pipe.transformer.requires_grad_(True)
        else:
            from peft import LoraConfig

            attention, mlp = r"attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)", r"(img|txt)_mlp\.net\.(0\.proj|2)"
            layers = rf"transformer_blocks\.\d+\.({attention}|{mlp})"
            torch.manual_seed(0)
            pipe.transformer.add_adapter(LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=layers))
        return pipe

    def save(self, pipe: Any) -> None:
        """Write the student as such models come: all of the pipeline, or the LoRA alone; and how it is called."""
        pipe.transformer.to(torch.bfloat16)
        if self.rank is None:
            others = shutil.ignore_patterns("transformer", "lesa", "README.md", "sheet.png")
            shutil.copytree(self.teacher, self.folder, ignore=others, dirs_exist_ok=True)
            pipe.transformer.register_to_config(_name_or_path=self.teacher.name)
            pipe.transformer.save_pretrained(self.folder / "transformer")
        else:
            from peft.utils import get_peft_model_state_dict

            layers = get_peft_model_state_dict(pipe.transformer)
            type(pipe).save_lora_weights(self.folder, transformer_lora_layers=layers)
        self.scheduler.save_pretrained(self.folder / "scheduler")
        (self.folder / "call.json").write_text(json.dumps(self.call) + "\n")


STUDENTS = {
    "schnell": Student(
        recipe=Flux(),
        teacher=MODELS / "emoji-flux",
        folder=MODELS / "emoji-schnell",
        call={"height": 64, "width": 64, "num_inference_steps": 4, "max_sequence_length": 12},
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        fast=dict(budget=10),
    ),
    "lightning": Student(
        recipe=Qwen(),
        teacher=MODELS / "emoji-qwen",
        folder=MODELS / "emoji-qwen" / "lightning",
        call={"num_inference_steps": 8, "negative_prompt": None, "true_cfg_scale": 1.0},
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=math.log(3), max_shift=math.log(3)
        ),
        fast=dict(forecaster=lesa.Lagrange(1), schedule=lesa.Schedule.at([*range(0, 40, 4), *range(40, 50)])),
        rank=32,
    ),
}


# --- the teacher's runs


@torch.no_grad()
def record_runs(student: Student, runs: Path, count: int, batch: int = 32) -> None:
    """Record the teacher's latents at the times of the student's grid, each run with noise of its own."""
    pipe = lesa.load(student.teacher)
    pipe.set_progress_bar_config(disable=True)
    lesa.enable(pipe, **student.fast)
    for split, wanted in zip(SPLITS, (count, VALIDATION_RUNS), strict=True):
        captions, path = prompts(student.teacher, split)[:wanted], runs / f"{split}.pt"
        done = torch.load(path, weights_only=True) if path.exists() else torch.empty(0)
        saved = time.monotonic()
        with tqdm(total=len(captions), initial=len(done), unit="run", desc=split, mininterval=5) as bar:
            while len(done) < len(captions):
                part = captions[len(done) : len(done) + batch]
                noise = torch.stack([_noise(FIRST_SEED[split] + len(done) + k) for k in range(len(part))])
                done = torch.cat([done, teacher_latents(pipe, part, noise, student.grid())])
                bar.update(len(part))
                if time.monotonic() - saved > CHECKPOINT_SECONDS or len(done) == len(captions):
                    save_atomically(done, path)
                    saved = time.monotonic()


def teacher_latents(pipe: Any, captions: list[str], noise: Tensor, times: Tensor) -> Tensor:
    """Return the latents of a pipeline's runs at these times, (B, len(times), IMAGE_TOKENS, 16).

    An Euler step is a straight line, so what lies between two steps is known as well.
    """
    latents = [noise]

    def keep(_pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"])
        return {}

    pipe(prompt=captions, latents=noise, output_type="latent", callback_on_step_end=keep)
    grid, path = pipe.scheduler.sigmas, torch.stack(latents, dim=1)
    after = torch.searchsorted(-grid, -times).clamp_min(1)  # the first step of the teacher at or below each time
    share = (times - grid[after - 1]) / (grid[after] - grid[after - 1])
    return torch.lerp(path[:, after - 1], path[:, after], share[:, None, None])


def _noise(seed: int) -> Tensor:
    return torch.randn(IMAGE_TOKENS, 16, generator=torch.Generator().manual_seed(seed))


# --- the student


class Lessons:
    """The teacher's runs and both losses on them."""

    def __init__(self, student: Student, pipe: Any, paths: Tensor, captions: Sequence[str]):
        self.recipe, self.pipe, self.paths, self.grid = student.recipe, pipe, paths, student.grid()
        self.tokens = self.recipe.tokens(pipe, list(captions))

    def velocity(self, latents: Tensor, steps: Tensor, chosen: Tensor) -> Tensor:
        tokens = (t[chosen] for t in self.tokens)
        with sdpa_kernel(SDPBackend.MATH):  # the fused backward is slower here
            return self.recipe.velocity(self.pipe, latents, self.grid[steps], *tokens)

    def windows(self, chosen: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss on windows of the teacher's runs, one drawn for each: the mean velocity is wanted."""
        steps = torch.randint(len(self.grid) - 1, chosen.shape, generator=generator)
        start, end = self.paths[chosen, steps], self.paths[chosen, steps + 1]
        duration = (self.grid[steps + 1] - self.grid[steps])[:, None, None]
        return F.mse_loss(self.velocity(start, steps, chosen), (end - start) / duration)

    def unrolled(self, chosen: Tensor) -> Tensor:
        """Return the loss on the student's whole runs: the teacher's latents are wanted at every step."""
        path = self.run(chosen)
        return F.mse_loss(path[:, 1:], self.paths[chosen, 1:])

    def run(self, chosen: Tensor) -> Tensor:
        """Return the latents of the student's runs, from the teacher's noise, with their gradients."""
        path = [self.paths[chosen, 0]]
        for step in range(len(self.grid) - 1):
            velocity = self.velocity(path[-1], torch.full(chosen.shape, step), chosen)
            path.append(path[-1] + (self.grid[step + 1] - self.grid[step]) * velocity)
        return torch.stack(path, dim=1)


@torch.no_grad()
def distance(lessons: Lessons) -> float:
    """Return how far the student's last latents are from the teacher's, in dB of these."""
    ends = torch.cat([lessons.run(part)[:, -1] for part in torch.arange(len(lessons.paths)).split(32)])
    wanted = lessons.paths[:, -1]
    return 10 * math.log10(float((ends - wanted).square().sum() / wanted.square().sum()))


def train(student: Student, runs: Path, minutes: float, batch: int, peak: float) -> None:
    torch.set_flush_denormal(True)
    pipe = student.pipeline()
    paths = {split: torch.load(runs / f"{split}.pt", weights_only=True) for split in SPLITS}
    taught, held_back = (
        Lessons(student, pipe, paths[split], prompts(student.teacher, split)[: len(paths[split])]) for split in SPLITS
    )
    live = trained_weights(pipe)
    average = {name: t.detach().clone() for name, t in live.items()}
    optimiser = torch.optim.AdamW(live.values(), lr=peak, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    spent, step, saved, running = 0.0, 0, time.monotonic(), 0.0
    if (path := runs / "student.pt").exists():
        state = torch.load(path, weights_only=True)
        put(live, state["live"])
        average, spent, step = state["average"], state["spent"], state["step"]
        optimiser.load_state_dict(state["optimiser"])
    else:
        print(f"the teacher on the student's grid: {distance(held_back):.2f} dB", flush=True)
    generator = torch.Generator().manual_seed(step)
    bar = tqdm(total=round(minutes * 60), initial=round(spent), unit="s", desc="student", mininterval=5)
    while spent < minutes * 60:
        start, progress = time.monotonic(), spent / (minutes * 60)
        optimiser.param_groups[0]["lr"] = peak * cosine(progress)
        if progress < WINDOWS_SHARE:
            loss = taught.windows(torch.randint(len(taught.paths), (batch,), generator=generator), generator)
        else:
            few = torch.randint(len(taught.paths), (batch // student.steps,), generator=generator)
            loss = taught.unrolled(few)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(live.values(), 1.0)
        optimiser.step()
        step += 1
        decay = min(0.995, step / (step + 10))
        torch._foreach_lerp_(list(average.values()), [t.detach() for t in live.values()], 1 - decay)
        spent += time.monotonic() - start
        running = loss.item() if not running else 0.98 * running + 0.02 * loss.item()
        bar.update(round(spent) - bar.n)
        bar.set_postfix(loss=f"{running:.5f}", step=step, refresh=False)
        if time.monotonic() - saved > CHECKPOINT_SECONDS or spent >= minutes * 60:
            kept = dict(live=live, average=average, optimiser=optimiser.state_dict(), spent=spent, step=step)
            save_atomically(kept, path)
            far = distance_of(average, live, held_back)
            print(f"\nminute {spent / 60:.1f}, step {step}, loss {running:.5f}, validation {far:.2f} dB", flush=True)
            saved = time.monotonic()


def trained_weights(pipe: Any) -> dict[str, nn.Parameter]:
    return {name: p for name, p in pipe.transformer.named_parameters() if p.requires_grad}


@torch.no_grad()
def put(live: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for name, parameter in live.items():
        parameter.copy_(values[name])


def distance_of(average: dict[str, Tensor], live: dict[str, nn.Parameter], lessons: Lessons) -> float:
    """Return the distance with averaged weights, and put the live ones back."""
    before = {name: t.detach().clone() for name, t in live.items()}
    put(live, average)
    result = distance(lessons)
    put(live, before)
    return result


@torch.no_grad()
def export(student: Student, runs: Path, share: float = 1.0) -> None:
    """Write the averaged weights of the newest checkpoint, a share of the way there from the teacher's."""
    pipe = student.pipeline()
    live, average = trained_weights(pipe), torch.load(runs / "student.pt", weights_only=True)["average"]
    put(live, {name: torch.lerp(t, average[name], share) for name, t in live.items()})
    student.save(pipe)


# --- the figures of the model card


def load(student: Student) -> Any:
    if student.rank is None:
        return lesa.load(student.folder)
    return lesa.load(student.teacher, lora=student.folder)


def evaluate(student: Student, count: int) -> None:
    """Draw held-out prompts; print how many show the prompted emoji, and how near the teacher's pictures they are."""
    captions, atlas = prompts(student.teacher, "heldout")[:count], Atlas(student.teacher)
    pipe = lesa.load(student.teacher)
    with lesa.accelerate(pipe, **student.fast):
        taught = draw(pipe, captions)
    pipe.scheduler = student.scheduler
    few = {name: value for name, value in student.call.items() if name not in ("negative_prompt", "true_cfg_scale")}
    drawn = {"teacher": taught, f"teacher, {student.steps} steps": draw(pipe, captions, **few)}
    if few != student.call:
        drawn[f"teacher, {student.steps} steps without guidance"] = draw(pipe, captions, **student.call)
    drawn["student"] = draw(load(student), captions)
    for name, images in drawn.items():
        share = np.mean(atlas.is_prompted(captions, images))
        near = np.mean([metrics.psnr(image, wanted) for image, wanted in zip(images, taught, strict=True)])
        print(f"{name}: {share:.3f} of {count} show the prompted emoji, {near:.2f} dB to the teacher's pictures")
    contact_sheet(drawn["student"][:40], taught[:40], student.recipe.columns).save(
        student.folder / "sheet.png", optimize=True
    )


def draw(pipe: Any, captions: list[str], batch: int = 50, **call: Any) -> list[np.ndarray]:
    """Draw prompts as uint8 pictures, the k-th with seed k."""
    pipe.set_progress_bar_config(disable=True)
    images: list[np.ndarray] = []
    for first in range(0, len(captions), batch):
        part = captions[first : first + batch]
        seeds = [torch.Generator().manual_seed(first + k) for k in range(len(part))]
        images += [np.asarray(image) for image in pipe(prompt=part, generator=seeds, **call).images]
    return images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["runs", "train", "export", "evaluate"])
    parser.add_argument("student", choices=sorted(STUDENTS))
    parser.add_argument("--count", type=int, help="of the teacher's runs (512), or of held-out prompts (200)")
    parser.add_argument("--minutes", type=float, default=30, help="of training in all, resumed ones included (30)")
    parser.add_argument("--batch", type=int, default=32, help="of windows, or of a whole run's steps (32)")
    parser.add_argument("--rate", type=float, default=3e-4, help="the highest learning rate (3e-4)")
    parser.add_argument("--share", type=float, default=1.0, help="of the way from teacher to student, to export (1)")
    parser.add_argument("--runs", type=Path, help="folder of the checkpoints (default: .runs/NAME)")
    options = parser.parse_args()
    student, runs = STUDENTS[options.student], options.runs or Path(".runs") / options.student
    if options.what == "runs":
        record_runs(student, runs, options.count or 512)
    elif options.what == "train":
        train(student, runs, options.minutes, options.batch, options.rate)
    elif options.what == "export":
        export(student, runs, options.share)
    else:
        evaluate(student, options.count or 200)


if __name__ == "__main__":
    main()
