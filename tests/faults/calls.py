"""Calls without end, of changing size, steps, batch, guidance and forecaster: what a process holds stays as it is."""

from __future__ import annotations

import gc
from pathlib import Path
from random import Random
from typing import Any

import torch

import lesa

FORECASTERS = [lesa.Reuse(), lesa.Taylor(1), lesa.Taylor(2), lesa.Lagrange(1), lesa.Lagrange(2)]
HISTORIES = ["model", "int8", "fp8", "cpu"]


def resident() -> float:
    """Return this process's resident memory in MB; 0 where the system does not say."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * 4096 / 1e6 if status.exists() else 0.0


def one(pipe: Any, random: Random, seed: int) -> None:
    """Make a call that is unlike the last one."""
    steps = random.randint(3, 9)
    side = random.choice([32, 48, 64])
    call: dict[str, Any] = dict(height=side, width=random.choice([32, 48, 64]), num_inference_steps=steps)
    if random.random() < 0.5:
        call |= dict(negative_prompt="fish", true_cfg_scale=2.0)
    schedule = lesa.Schedule.at(sorted({0, *random.sample(range(steps), random.randint(1, steps - 1))}))
    generator = torch.Generator().manual_seed(seed)
    common = dict(max_sequence_length=16, output_type="latent", num_images_per_prompt=random.randint(1, 3))
    with lesa.accelerate(pipe, random.choice(FORECASTERS), schedule=schedule, history=random.choice(HISTORIES)) as run:
        pipe("small red apple", generator=generator, **common, **call)
        assert run.summary()["cond"].full_steps == len(schedule.full_steps(steps))


def held(pipe: Any, count: int, seed: int = 0) -> list[float]:
    """Make so many calls; returns the resident memory after each, in MB."""
    random, found = Random(seed), []
    for number in range(count):
        one(pipe, random, number)
        if number % 10 == 0:
            gc.collect()
        found.append(resident())
    return found


def alive() -> int:
    """Return how many tensors of this process are alive."""
    gc.collect()
    return sum(isinstance(one, torch.Tensor) for one in gc.get_objects())
