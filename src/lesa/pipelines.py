"""Load a pipeline together with the call arguments that belong to it."""

from __future__ import annotations

import functools
import inspect
import json
from pathlib import Path
from typing import Any

CALL_FILE = "call.json"


def load(path: str | Path, **options: Any) -> Any:
    """Load a diffusers pipeline whose calls start from the arguments in the `call.json` beside its `model_index.json`.

    Options go to `DiffusionPipeline.from_pretrained`. Without such a file the pipeline keeps its own defaults. The
    arguments of a call win:

        pipe = lesa.load("models/emoji-flux")
        pipe("small red apple on blue, left", num_inference_steps=20)

    Raises: ValueError if the file holds no arguments of this pipeline's call.
    """
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(str(path), **options)
    file = Path(path) / CALL_FILE
    if not file.exists():
        return pipe
    try:
        return with_call(pipe, dict(json.loads(file.read_text())))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} holds the arguments of a call as a JSON object: {error}") from error


def with_call(pipe: Any, arguments: dict[str, Any]) -> Any:
    """Let a pipeline's calls start from these arguments; returns the pipeline.

    A text among them (such as `negative_prompt`) goes with every prompt of a call.

    Raises: ValueError if the pipeline's call takes no such argument.
    """
    kind = type(pipe)
    signature = inspect.signature(kind.__call__)
    if unknown := sorted(set(arguments) - set(signature.parameters)):
        raise ValueError(
            f"{kind.__name__} takes other arguments in a call, got {', '.join(unknown)}; see its __call__."
        )

    @functools.wraps(kind.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        missing = {k: v for k, v in arguments.items() if k not in given}
        return kind.__call__(self, *args, **for_each(given.get("prompt"), missing), **kwargs)

    # a subclass of the same name, which diffusers writes when it saves the pipeline
    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__})
    return pipe


def for_each(prompt: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Repeat the texts among the arguments of a call for each of its prompts, where there is a list of them."""
    if not isinstance(prompt, (list, tuple)):
        return arguments
    return {k: [v] * len(prompt) if "prompt" in k and isinstance(v, str) else v for k, v in arguments.items()}
