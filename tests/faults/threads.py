"""Threads: what runs at once is as if alone, or is refused before its first step."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import torch

import lesa
from faults.kills import CALL, accelerable
from lesa.host.intercept import intercept

PROMPT = "small red apple on white, left"
SCHEDULE = lesa.Schedule.at([0, 2])


def draw(pipe: Any, seed: int, **more: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(PROMPT, output_type="latent", generator=generator, **CALL, **more).images


def of_its_own(tiny_flux: Any) -> Any:
    """A pipeline with weights of its own."""
    return accelerable(copy.deepcopy(tiny_flux))


def sharing(tiny_flux: Any) -> Any:
    """A pipeline on the same weights, with a scheduler of its own; tokenizers too keep what the newest call set."""
    pipe = accelerable(tiny_flux)
    pipe.tokenizer, pipe.tokenizer_2 = copy.deepcopy(pipe.tokenizer), copy.deepcopy(pipe.tokenizer_2)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return pipe


def at_once(*works: Callable[[], Any]) -> list[Any]:
    """Let works begin at the same time, each in a thread; returns what each gave, or its error."""
    start, found = threading.Barrier(len(works)), [None] * len(works)

    def run(k: int, work: Callable[[], Any]) -> None:
        start.wait()
        try:
            found[k] = work()
        except Exception as error:
            found[k] = error

    threads = [threading.Thread(target=run, args=(k, work)) for k, work in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def one_pipeline(tiny_flux: Any) -> list[str]:
    """One accelerated pipeline from two threads: of both calls at least one is as it was alone, none is another."""
    pipe = of_its_own(tiny_flux)
    with lesa.accelerate(pipe, lesa.Lagrange(1), schedule=SCHEDULE):
        alone = [draw(pipe, seed) for seed in range(2)]
        found = at_once(*(lambda seed=seed: draw(pipe, seed) for seed in range(2)))
    return _judge(found, alone, refusable=True)


def several_pipelines(tiny_flux: Any) -> list[str]:
    pipes = [of_its_own(tiny_flux) for _ in range(3)]
    runs = [lesa.accelerate(pipe, lesa.Lagrange(k), schedule=SCHEDULE) for k, pipe in enumerate(pipes)]
    alone = [draw(pipe, k) for k, pipe in enumerate(pipes)]
    found = at_once(*(lambda k=k, pipe=pipe: draw(pipe, k) for k, pipe in enumerate(pipes)))
    for run in runs:
        run.close()
    return _judge(found, alone)


def shared_weights(tiny_flux: Any) -> list[str]:
    """An accelerated pipeline and a plain one on its weights, with schedulers of their own."""
    ours, plain = sharing(tiny_flux), sharing(tiny_flux)
    wanted = draw(plain, 1)
    with lesa.accelerate(ours, lesa.Lagrange(1), schedule=SCHEDULE):
        alone = [draw(ours, 0), wanted]
        found = at_once(lambda: draw(ours, 0), lambda: draw(plain, 1))
    return _judge(found, alone)


def amid(tiny_flux: Any, method: str) -> list[str]:
    """A plain pipeline's whole call in another thread, each time the accelerated one's scheduler has done something."""
    ours, plain = sharing(tiny_flux), sharing(tiny_flux)
    wanted = draw(plain, 1)
    with lesa.accelerate(ours, lesa.Lagrange(1), schedule=SCHEDULE):
        alone = draw(ours, 0)
        found: list[Any] = []

        def then(go_on: Callable, _scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            result = go_on(*args, **kwargs)
            found.extend(at_once(lambda: draw(plain, 1)))
            return result

        undo = intercept(ours.scheduler, method, then)
        try:
            mine = draw(ours, 0)
        finally:
            undo()
    return _judge([mine, *found], [alone, *[wanted] * len(found)])


KINDS = {
    "one pipeline, several threads": one_pipeline,
    "several pipelines": several_pipelines,
    "one set of weights": shared_weights,
    "one set of weights, after set_timesteps": lambda tiny_flux: amid(tiny_flux, "set_timesteps"),
    "one set of weights, after each step": lambda tiny_flux: amid(tiny_flux, "step"),
}


def _judge(found: list[Any], alone: list[torch.Tensor], refusable: bool = False) -> list[str]:
    wrong = []
    for k, (one, other) in enumerate(zip(found, alone, strict=True)):
        if isinstance(one, Exception):
            if not (refusable and isinstance(one, RuntimeError) and "of its own" in str(one)):
                wrong.append(f"thread {k}: {type(one).__name__}: {one}")
        elif not torch.equal(one, other):
            wrong.append(f"thread {k} drew another picture")
    if all(isinstance(one, Exception) for one in found):
        wrong.append("none of the calls went through")
    return wrong
