"""The calls that are recorded: a prompt, or any arguments by name, made reproducible by a seed."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Call = str | Mapping[str, Any]
"""A prompt, or the arguments of a pipeline's call by name."""
Calls = Sequence[Call] | Callable[[int], Call]
"""Calls in order, or a function from the number of a call to it."""

NO_PROMPT = "call "
"""What a label begins with that is no prompt."""


def plain(call: Call) -> Call:
    """Return a call that has a prompt and nothing else as the prompt."""
    if isinstance(call, str):
        return call
    prompt = call.get("prompt")
    return prompt if set(call) == {"prompt"} and isinstance(prompt, str) else call


def plain_calls(calls: Sequence[Call]) -> list[Call]:
    """Return calls in order, those that have a prompt and nothing else as the prompt.

    Raises: ValueError if it is one call alone: its letters, or its arguments' names, are no prompts.
    """
    if isinstance(calls, (str, Mapping)):
        raise ValueError(f"calls are a list of prompts or of arguments by name, got a {type(calls).__name__}; list it.")
    return [plain(one) for one in calls]


def listed(calls: Calls, count: int) -> list[Call]:
    """Return the calls in order; a function is asked for `count` of them."""
    return [plain(calls(number)) for number in range(count)] if callable(calls) else plain_calls(calls)


def label(call: Call) -> str:
    """Name a call, the same each time: a prompt as it is, else its arguments as JSON, large ones by their digest.

    Raises: ValueError if an argument is nothing that can be told from another.
    """
    if isinstance(call, str):
        return call
    return f"{NO_PROMPT}{json.dumps(described(call), ensure_ascii=False, sort_keys=True)}"


def described(value: Any) -> Any:
    """Return a value as JSON can hold it: tensors, arrays and pictures by kind, size and digest.

    Raises: ValueError if it holds something else.
    """
    if isinstance(value, Mapping):
        return {str(name): described(part) for name, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {type(value).__name__: described(vars(value))}
    if isinstance(value, (list, tuple)):
        return [described(part) for part in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {tuple(value.shape)} {_digest(data)}"
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {value.shape} {_digest(np.ascontiguousarray(value).tobytes())}"
    picture: Any = value
    if hasattr(picture, "tobytes") and hasattr(picture, "size"):
        return f"{getattr(picture, 'mode', 'picture')} {picture.size} {_digest(picture.tobytes())}"
    raise ValueError(
        f"the call's arguments are kept as JSON, tensors and pictures by a digest, got a {type(value).__name__}; pass "
        "numbers, texts, lists, tensors and pictures."
    )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def takes(pipe: Any, name: str) -> bool:
    """Tell whether a pipeline's call has an argument of this name."""
    return name in inspect.signature(type(pipe).__call__).parameters


def takes_any(pipe: Any) -> bool:
    """Tell whether a pipeline's call takes arguments of any name, as modular ones do."""
    known = inspect.signature(type(pipe).__call__).parameters.values()
    return any(parameter.kind is parameter.VAR_KEYWORD for parameter in known)


def arguments(pipe: Any, call: Call, seed: int, common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of one recorded call: its own, those `common` to all, the seed's generator, and nothing
    decoded where the pipeline can leave that out."""
    given = {**common, **({"prompt": call} if isinstance(call, str) else call)}
    if takes(pipe, "generator") or takes_any(pipe):
        given.setdefault("generator", torch.Generator().manual_seed(seed))
    if takes(pipe, "output_type"):
        given.setdefault("output_type", "latent")
    return given


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Let torch's own random numbers be a seed's meanwhile: some pipelines take no generator, or draw besides it."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        yield
