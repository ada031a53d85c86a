"""The calls that are recorded: a prompt, or any arguments by name, made reproducible by a seed; also from files."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Call = str | Mapping[str, Any]
"""A prompt, or the arguments of a pipeline's call by name."""
Calls = Sequence[Call] | Callable[[int], Call]
"""Calls in order, or a function from the number of a call to it."""

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
NO_PROMPT = "call "
"""What a label begins with that is no prompt."""


def listed(calls: Calls, count: int) -> list[Call]:
    """Return the calls in order; a function is asked for `count` of them."""
    return [calls(number) for number in range(count)] if callable(calls) else list(calls)


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
    if hasattr(value, "tobytes") and hasattr(value, "size"):  # a picture
        return f"{getattr(value, 'mode', 'picture')} {value.size} {_digest(value.tobytes())}"
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


def read_calls(path: str | Path) -> list[dict[str, Any]]:
    """Read calls from a file in UTF-8: each line a JSON object, the keyword arguments of one call.

    A value that ends like a picture's file is one, named from the folder of this file on, and is opened; so are those
    in a list. Arguments that have 'prompt' in their names are texts. Blank lines are left out.

    Raises: ValueError if there is no call, one twice, a line that is no JSON object, or a file outside of the folder or
        that is no picture; FileNotFoundError if one is not there.
    """
    path = Path(path)
    calls: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        arguments = _object(line, f"line {number} of {path}")
        name = json.dumps(arguments, sort_keys=True)
        if name in calls:
            raise ValueError(f"each call is made once, got that of line {number} of {path} again; remove one.")
        calls[name] = {key: _opened(key, value, path.parent) for key, value in arguments.items()}
    if not calls:
        raise ValueError(f"{path} holds no call; write a JSON object a line, the arguments of one.")
    return list(calls.values())


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(line)
    except ValueError as error:
        raise ValueError(f"a call is a JSON object on a line, got {line[:60]!r} in {where} ({error}).") from error
    if not isinstance(arguments, dict) or not arguments:
        raise ValueError(f"a call is a JSON object of arguments, got {line[:60]!r} in {where}; write {{...}}.")
    return arguments


def _opened(name: str, value: Any, folder: Path) -> Any:
    """Return an argument with its pictures opened."""
    if isinstance(value, list):
        return [_opened(name, one, folder) for one in value]
    if "prompt" in name or not isinstance(value, str) or not value.lower().endswith(PICTURES):
        return value
    file = (folder / value).resolve()
    if not file.is_relative_to(folder.resolve()):
        raise ValueError(f"the pictures of calls lie in the folder of their file, got {name}={value!r}; move it there.")
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the picture {name}={value!r} is not there: {file} does not exist.") from error
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} is no whole picture ({error}); replace it.") from error


def prompts_of(runs: Sequence[Call]) -> list[str]:
    """Return the prompts of runs that have nothing else.

    Raises: ValueError if a call has other arguments: what is run again from its prompt needs nothing else.
    """
    found = []
    for number, run in enumerate(runs, start=1):
        arguments = {"prompt": run} if isinstance(run, str) else dict(run)
        prompt = arguments.pop("prompt", None)
        if arguments or not isinstance(prompt, str):
            raise ValueError(
                f"runs made again by their prompts have nothing else, got call {number} with "
                f"{', '.join(sorted(arguments)) or 'no prompt'}; give what all calls share to the pipeline (lesa.load "
                "and call.json, --call)."
            )
        found.append(prompt)
    return found
