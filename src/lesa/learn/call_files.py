"""What runs are made of: prompts, or calls of a pipeline with all their arguments, from files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lesa.learn.calls import Call, plain_calls
from lesa.predictors.disk import DAMAGED

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def read_calls(path: str | Path) -> list[dict[str, Any]]:
    """Read calls from a file in UTF-8: each line a JSON object, the keyword arguments of one call.

    A value that ends like a picture's file is one, named from the folder of this file on, and is opened; so are those
    in a list. Arguments that have 'prompt' in their names are texts. Blank lines are left out.

    Raises: ValueError if there is no call, one twice, a line that is no JSON object, or a file outside of the folder or
        that is no picture; FileNotFoundError if one is not there.
    """
    path = Path(path)
    calls: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(_lines(path), start=1):
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


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is a text in UTF-8, got other bytes ({error}); write it anew.") from error
    except OSError as error:
        raise type(error)(f"{path} cannot be read ({error.strerror}); name a text file that is there.") from error


def _object(line: str, where: str) -> dict[str, Any]:
    try:
        arguments = json.loads(line)
    except DAMAGED as error:
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
    except (OSError, SyntaxError, Image.DecompressionBombError, *DAMAGED) as error:
        raise ValueError(f"{file} is no whole picture ({error}); replace it.") from error


def prompts_of(runs: Sequence[Call]) -> list[str]:
    """Return the prompts of runs that have nothing else.

    Raises: ValueError if a call has other arguments: what is drawn side by side takes prompts alone.
    """
    found = []
    for number, run in enumerate(plain_calls(runs), start=1):
        arguments = {"prompt": run} if isinstance(run, str) else dict(run)
        prompt = arguments.pop("prompt", None)
        if arguments or not isinstance(prompt, str):
            raise ValueError(
                f"runs that are set side by side have a prompt and nothing else, got call {number} with "
                f"{', '.join(sorted(arguments)) or 'no prompt'}; give what all calls share to the pipeline (lesa.load "
                "and call.json, --call)."
            )
        found.append(prompt)
    return found


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts from a text file in UTF-8, one a line; blank lines and blanks around a prompt are left out.

    Raises: ValueError if there is none, or one twice; OSError if the file cannot be read.
    """
    prompts: dict[str, int] = {}
    for number, line in enumerate(_lines(Path(path)), start=1):
        prompt = line.strip()
        if prompt in prompts:
            raise ValueError(f"{path} has {prompt!r} in line {prompts[prompt]} and again in line {number}; remove one.")
        if prompt:
            prompts[prompt] = number
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line.")
    return list(prompts)
