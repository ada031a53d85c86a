"""Measure what a trained predictor keeps of its gain where something differs from what it was trained on.

    python benchmarks/transfer.py
    python benchmarks/transfer.py --predictors lesa-planned6 --conditions "as trained" "bfloat16"

Draws held-out prompts under each condition with each predictor and prints one table. PSNR is against the same
pipeline's own pictures with every step full, under the same condition. The one to judge by is the best method without
training (Taylor, Lagrange) on the same schedule under the same condition; the difference is pair by pair; all with
bootstrap 95 % intervals. Where a predictor refuses (another grid, a stream that it does not know), the table says so
and gives what its rows would do all the same, used as they are.

FLUX's embedded guidance does nothing in a transformer without guidance embeddings, as emoji-flux's is; true guidance,
which runs a second stream, stands in for it. The LoRA (rank 8, grey pictures) is trained first, in some minutes, and
kept in --lora. It needs peft.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from tqdm import tqdm
from transformers.utils import logging

import lesa
from lesa.bench.benchmark import batches, draw, pair_up
from lesa.bench.lines import Pair
from lesa.bench.methods import REFERENCE, Method, forecast, untrained
from lesa.bench.report import markdown
from lesa.learn.call_files import read_prompts
from lesa.learn.metrics import interval, paired_interval, psnr
from lesa.rows.grid import from_scheduler
from lesa.rows.plan import compile

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from composed_emoji import Atlas, parse

MODEL = "models/emoji-flux"
LORA_LAYERS = r".*blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2)|proj_mlp|proj_out)"
HEADS = ("condition", "predictor", "runs", "PSNR, dB [95 %]", "best without training", "difference, dB [95 %]")


class Condition(NamedTuple):
    """What differs from the runs that a predictor was trained on; a text in `call` goes with every prompt."""

    name: str
    call: Mapping[str, Any] = MappingProxyType({})
    reword: Callable[[str], str] = str
    dtype: torch.dtype = torch.float32
    lora: bool = False


def backwards(prompt: str) -> str:
    """Say the same in another order: 'on green, right: large hibiscus'."""
    name, (size, colour, place) = parse(prompt)
    return f"on {colour}, {place}: {size} {name}"


def two(prompt: str) -> str:
    """Ask for two emoji, which no prompt of the training did."""
    name, (size, colour, place) = parse(prompt)
    return f"{size} {name} and small red apple on {colour}, {place}"


def painted(prompt: str) -> str:
    """Ask for the emoji without its composition, and in words that the model has not seen."""
    return f"{parse(prompt)[0]}, an oil painting"


CONDITIONS = [
    Condition("as trained"),
    Condition("true guidance 2", {"true_cfg_scale": 2.0, "negative_prompt": ""}),
    Condition("true guidance 4", {"true_cfg_scale": 4.0, "negative_prompt": ""}),
    Condition("LoRA", lora=True),
    Condition("96 x 64 pixels", {"height": 64, "width": 96}),
    Condition("80 x 80 pixels", {"height": 80, "width": 80}),
    Condition("bfloat16", dtype=torch.bfloat16),
    Condition("upper case", reword=str.upper),
    Condition("other order", reword=backwards),
    Condition("two emoji", reword=two),
    Condition("unknown words", reword=painted),
]


# --- the LoRA


def train_lora(pipe: Any, model: Path, out: Path, updates: int, batch: int = 32, rank: int = 8) -> None:
    """Teach a pipeline's transformer to draw in grey, by flow matching on the model's training pictures."""
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    transformer, atlas = pipe.transformer.requires_grad_(False), Atlas(model)
    transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_LAYERS))
    numbers = [one for one in transformer.parameters() if one.requires_grad]
    optimiser = torch.optim.AdamW(numbers, lr=2e-3, weight_decay=0.0)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, updates)
    prompts = read_prompts(model / "prompts" / "train.txt")
    random = torch.Generator().manual_seed(0)
    for _ in (bar := tqdm(range(updates), desc="LoRA", unit="update")):
        chosen = [prompts[k] for k in torch.randint(len(prompts), (batch,), generator=random).tolist()]
        drawn = torch.stack([torch.tensor(atlas.draw(*parse(prompt))) for prompt in chosen])
        clean, text, ids = encode(pipe, drawn.float().mean(-1, keepdim=True).expand(drawn.shape), chosen)
        noise = torch.randn(clean.shape, generator=random)
        time = torch.rand(batch, generator=random)
        noised = torch.lerp(clean, noise, time[:, None, None])
        velocity = transformer(noised, timestep=time, **text, **ids, return_dict=False)[0]
        loss = functional.mse_loss(velocity, noise - clean)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        falling.step()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(transformer))
    type(pipe).save_lora_weights(out, transformer_lora_layers=state)


@torch.no_grad()
def encode(pipe: Any, drawn: torch.Tensor, prompts: Sequence[str]) -> tuple[torch.Tensor, dict, dict]:
    """Return pictures (B, H, W, 3) as the transformer's latents, and its other arguments."""
    vae = pipe.vae
    means = vae.encode(drawn.movedim(-1, 1) / 127.5 - 1).latent_dist.mean
    means = (means - vae.config.shift_factor) * vae.config.scaling_factor
    height, width = means.shape[2] // 2, means.shape[3] // 2
    words, pooled, text_ids = pipe.encode_prompt(list(prompts), None, max_sequence_length=12)
    image_ids = pipe._prepare_latent_image_ids(1, height, width, means.device, means.dtype)
    text = {"encoder_hidden_states": words, "pooled_projections": pooled}
    return pipe._pack_latents(means, *means.shape), text, {"txt_ids": text_ids, "img_ids": image_ids}


# --- the table


def pipeline(options: argparse.Namespace, condition: Condition) -> Any:
    pipe = lesa.load(options.model, torch_dtype=condition.dtype)
    pipe.set_progress_bar_config(disable=True)
    if condition.lora:
        if not options.lora.exists():
            train_lora(lesa.load(options.model), Path(options.model), options.lora, options.updates)
        pipe.load_lora_weights(options.lora)
    return pipe


def shoot(pipe: Any, condition: Condition, method: Method, pairs: Sequence[Sequence[Pair]]) -> list[Any]:
    """Draw all pairs under a condition, batch by batch."""
    drawn: list[Any] = []
    for batch in pairs:
        call = {k: [v] * len(batch) if isinstance(v, str) else v for k, v in condition.call.items()}
        drawn += draw(pipe, replace(method, call=call), batch)[0]
    return drawn


def unbound(predictor: lesa.Predictor, grid: torch.Tensor) -> lesa.Forecaster:
    """Take a predictor's rows as they are: for every stream, and for another grid of as many steps."""
    plan = compile(predictor, predictor.grid, predictor.schedule, predictor.begins[0])
    frozen = plan.freeze()
    frozen.grid = grid
    return frozen


def rows(
    pipe: Any, condition: Condition, predictors: dict[str, lesa.Predictor], pairs: Sequence[Sequence[Pair]], bar: tqdm
) -> list[tuple[str, ...]]:
    """Measure every predictor under one condition, beside the methods without training on its schedule."""
    exact = shoot(pipe, condition, REFERENCE, pairs)
    grid = from_scheduler(pipe.scheduler)

    def quality(name: str, forecaster: lesa.Forecaster, schedule: lesa.Schedule) -> list[float]:
        pictures = shoot(pipe, condition, forecast(name, forecaster, schedule), pairs)
        bar.update()
        return [psnr(*both) for both in zip(pictures, exact, strict=True)]

    found = []
    for name, predictor in predictors.items():
        schedule = predictor.schedule
        plain = {other: quality(other, one, schedule) for other, one in untrained(False, lagrange=True).items()}
        best = max(plain, key=lambda other: sum(plain[other]))
        try:
            runs, ours = "yes", quality(name, predictor, schedule)
        except ValueError as refusal:
            tqdm.write(f"{condition.name}, {name}: {refusal}")
            runs, ours = "refuses", quality(name, unbound(predictor, grid), schedule)
        against = f"{interval(plain[best]).mean:.2f} ({best})"
        difference = f"{paired_interval(ours, plain[best]):+.2f}"
        found.append((condition.name, name, runs, f"{interval(ours):.2f}", against, difference))
    return found


def main() -> None:
    names = [condition.name for condition in CONDITIONS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--predictors", nargs="+", default=["lesa-planned6", "lesa-paper7"])
    parser.add_argument("--conditions", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--pairs", type=int, default=48, help="how many prompts, the k-th with seed k (48)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--updates", type=int, default=150, help="of the LoRA's training (150)")
    parser.add_argument("--lora", type=Path, default=Path("out/lora"), help="where the LoRA lies, or is put (out/lora)")
    options = parser.parse_args()

    logging.set_verbosity_error()  # prompts that are cut short
    folder = Path(options.model) / "lesa"
    predictors = {name: lesa.Predictor.from_pretrained(folder / name) for name in options.predictors}
    prompts = read_prompts(Path(options.model) / "prompts" / "heldout.txt")[: options.pairs]
    chosen = [condition for condition in CONDITIONS if condition.name in options.conditions]
    measured = []
    with tqdm(total=len(chosen) * len(predictors) * 6, desc="methods", unit="method") as bar:
        for condition in chosen:
            reworded = [condition.reword(prompt) for prompt in prompts]
            pairs = batches(pair_up(reworded, range(len(prompts))), options.batch_size)
            measured += rows(pipeline(options, condition), condition, predictors, pairs, bar)
    print(f"\n{options.model}, {len(prompts)} held-out prompts\n\n{markdown(HEADS, measured, text=3)}")


if __name__ == "__main__":
    main()
