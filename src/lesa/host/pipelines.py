"""Load a pipeline together with the call arguments that belong to it."""

from __future__ import annotations

import functools
import inspect
import json
import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lesa.host import needs
from lesa.predictors import hub
from lesa.predictors.disk import DAMAGED, named
from lesa.predictors.shipped import HOME
from lesa.rows.schedule import check_steps

CALL_FILE, SCHEDULER_FOLDER = "call.json", "scheduler"
ARGUMENTS, SOURCE = "_lesa_arguments", "_lesa_source"
"""A loaded pipeline's attributes: the arguments that its calls start from, and its `Source`."""
FRAMES_A_SECOND = 8
MOST = 1 << 14
"""Pixels of a side, frames, text tokens: a call of more is a mistake, or a file's that is meant to take all memory."""


@dataclass(frozen=True)
class Source:
    """Where a pipeline was loaded from, and how: enough to load it again.

    `scheduler` holds the settings of its scheduler that were set otherwise.
    """

    model: str
    lora: str | None = None
    scheduler: Mapping[str, Any] | None = None
    device: str = "cpu"

    @property
    def name(self) -> str:
        """What a recorded run or a predictor remembers as its model."""
        return f"{self.model} with {self.lora}" if self.lora else self.model

    @property
    def home(self) -> Path:
        """The folder, if it is one, with the predictors that are shipped for it."""
        return Path(self.lora or self.model)


def source_of(pipe: Any) -> Source:
    """Return where a pipeline was loaded from; of one that diffusers loaded, its folder or repository."""
    known = getattr(pipe, SOURCE, None)
    return known or Source(str(getattr(pipe, "name_or_path", None) or type(pipe).__name__), device=str(pipe.device))


def arguments_of(pipe: Any) -> dict[str, Any]:
    """Return the arguments that a pipeline's calls start from (see `with_call`)."""
    return dict(getattr(type(pipe), ARGUMENTS, {}))


def steps_of(pipe: Any) -> int | None:
    """Return the number of steps of a pipeline's calls, or None if neither it nor its class says one."""
    usual = inspect.signature(type(pipe).__call__).parameters.get("num_inference_steps")
    steps = arguments_of(pipe).get("num_inference_steps", usual and usual.default)
    return steps if isinstance(steps, int) else None


def load(path: str | Path, *, lora: str | Path | None = None, **options: Any) -> Any:
    """Load a diffusers pipeline whose calls start from the arguments in the `call.json` beside its `model_index.json`.

    Options go to `DiffusionPipeline.from_pretrained`. Without such a file the pipeline keeps its own defaults. The
    arguments of a call win:

        pipe = lesa.load("models/emoji-flux")
        pipe("small red apple on blue, left", num_inference_steps=20)

    `lora` names a folder or a repository with the weights of a LoRA, or such a file in it. A `call.json` and a
    `scheduler` in that folder win over the model's, as a LoRA for few steps needs, and the predictors shipped for the
    pipeline are those that lie there.

    Raises: ValueError if a file is damaged, or holds no arguments of this pipeline's call; OSError if there is no such
        pipeline; ImportError if a LoRA needs peft, or a sampler torchsde, and that is not installed.
    """
    if lora is not None:
        needs.check("a LoRA", "lora")
    from diffusers import DiffusionPipeline

    where = hub.how(str(path), "a pipeline") if hub.is_elsewhere(path) else {}
    try:
        _check_parts(path)
        pipe = DiffusionPipeline.from_pretrained(str(path), **{**where, **_left_out(path), **_memory(), **options})
    except DAMAGED as error:
        raise ValueError(f"{_damaged(path)} cannot be loaded as a pipeline of diffusers: {error}") from error
    except OSError as error:
        if not where:
            raise
        raise FileNotFoundError(f"there is no folder {path}, and the hub cannot be reached from here.") from error
    if lora is not None:
        _add_lora(pipe, lora)
    setattr(pipe, SOURCE, Source(str(path), None if lora is None else str(lora)))
    arguments = call_of(path, lora)
    try:
        return with_call(pipe, arguments) if arguments else pipe
    except ValueError as error:
        raise ValueError(f"{' and '.join(map(str, _call_files(path, lora)))}: {error}") from error


def _damaged(path: str | Path) -> str | Path:
    """Return the first file in a pipeline's folder that is to be JSON and is none, or the folder itself."""
    for file in sorted([*Path(path).glob("*.json"), *Path(path).glob("*/*.json")]):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except DAMAGED:
            return file
    return path


def _check_parts(path: str | Path) -> None:
    """Raise ImportError if a saved pipeline has a sampler that draws its noise from a package that is not installed."""
    import diffusers

    for part in _parts_of(path).values():
        name = str(part[-1]) if isinstance(part, list) and part else ""
        if "torchsde" in getattr(getattr(diffusers, name, None), "_backends", ()):  # what stands there for the class
            needs.check(name, "sound")


def _parts_of(path: str | Path) -> dict[str, Any]:
    """Return what the index of a saved pipeline names, nothing of one that is not a folder."""
    index = Path(path) / "model_index.json"
    parts = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    return parts


def _left_out(path: str | Path) -> dict[str, None]:
    """Name the parts that a saved pipeline was without, such as the third text encoder of Stable Diffusion 3: diffusers
    loads it only if they are named."""
    return {name: None for name, part in _parts_of(path).items() if part == [None, None]}


def _memory() -> dict[str, bool]:
    """Ask for what diffusers can do: without accelerate it loads weights in one way only, and says so at length of each
    pipeline that is loaded in the other."""
    return {"low_cpu_mem_usage": False} if needs.lacking("offload") else {}


def call_of(path: str | Path, lora: str | Path | None = None) -> dict[str, Any]:
    """Return the arguments that a model's calls start from, and those of a LoRA in their place.

    Raises: ValueError if a file holds no JSON object.
    """
    arguments: dict[str, Any] = {}
    for file in _call_files(path, lora):
        arguments |= _arguments(file)
    return arguments


def _arguments(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"got a {type(found).__name__}")
        return found
    except DAMAGED as error:
        raise ValueError(f"{file} holds the arguments of a call as a JSON object: {error}") from error


def _call_files(path: str | Path, lora: str | Path | None) -> list[Path]:
    folders = [path] if lora is None else [path, _parts(lora)[0]]
    return [file for file in (Path(folder) / CALL_FILE for folder in folders) if file.exists()]


def _add_lora(pipe: Any, lora: str | Path) -> None:
    """Load a LoRA, and the scheduler beside it."""
    folder, name = _parts(lora)
    pipe.load_lora_weights(folder, **({"weight_name": name} if name else {}))
    if (Path(folder) / SCHEDULER_FOLDER).is_dir():
        pipe.scheduler = type(pipe.scheduler).from_pretrained(folder, subfolder=SCHEDULER_FOLDER)
    setattr(pipe, HOME, folder)


def _parts(lora: str | Path) -> tuple[str, str | None]:
    """Split what names a LoRA into its folder, or repository, and its file if that is named."""
    place = Path(lora)
    return (str(place.parent), place.name) if place.suffix == ".safetensors" else (str(place), None)


def with_call(pipe: Any, arguments: dict[str, Any]) -> Any:
    """Let a pipeline's calls start from these arguments; returns the pipeline.

    A text among them (such as `negative_prompt`) goes with every prompt of a call.

    Raises: ValueError if the pipeline's call takes no such argument, or none so large.
    """
    check_call(arguments)
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

    def __reduce_ex__(self: Any, _protocol: Any) -> tuple:
        return _again, (known_class(type(self)), arguments_of(self)), dict(self.__dict__)

    # a subclass of the same name, which diffusers writes when it saves the pipeline
    known = {"__call__": __call__, "__module__": kind.__module__, "__reduce_ex__": __reduce_ex__}
    known |= {ARGUMENTS: {**arguments_of(pipe), **arguments}}
    pipe.__class__ = type(kind.__name__, (kind,), known)
    return pipe


def known_class(kind: type) -> type:
    """Return the class of a pipeline's class that has arguments of calls: one that pickle finds by its name."""
    return next(parent for parent in kind.__mro__ if ARGUMENTS not in vars(parent))


def _again(kind: Any, arguments: dict[str, Any]) -> Any:
    """Make a pipeline without its parts that is of a class with these arguments: pickle fills it."""
    return with_call(kind.__new__(kind), arguments)


def check_call(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if a call asks for more steps than a run has, or more pixels, frames or tokens than `MOST`."""
    for name, number in arguments.items():
        if not isinstance(number, int):
            continue
        if name == "num_inference_steps":
            check_steps(number)
        if number > MOST:
            raise ValueError(f"a call's numbers are at most {MOST}, got {name}={number}; lower it.")


def for_each(prompt: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Repeat the texts among the arguments of a call for each of its prompts, where there is a list of them."""
    if not isinstance(prompt, (list, tuple)):
        return arguments
    return {k: [v] * len(prompt) if "prompt" in k and isinstance(v, str) else v for k, v in arguments.items()}


def pictures_of(result: Any) -> list[Any]:
    """Return what a call drew: PIL pictures, of videos a list of such frames for each, of sound clips (channels,
    samples)."""
    return list(next(getattr(result, name) for name in ("frames", "images", "audios") if hasattr(result, name)))


def rate_of(pipe: Any) -> int | None:
    """Return the samples a second of what a pipeline makes if its autoencoder is one of sound, else None."""
    config = getattr(getattr(pipe, "vae", None), "config", {})
    return config.get("sampling_rate") or config.get("sample_rate")


def is_wav(path: str | Path) -> bool:
    """Tell whether a file is to be a WAV, by its name."""
    return Path(path).suffix.lower() == ".wav"


def save_sound(clip: Any, rate: int, path: str | Path) -> None:
    """Write a clip (channels, samples), or (samples,), of floats in [-1, 1] as a WAV of 16 bits a sample.

    What is louder than full scale is cut off there.
    """
    samples = np.atleast_2d(clip.float().cpu().numpy() if hasattr(clip, "cpu") else clip)
    whole = (samples.clip(-1, 1) * (2**15 - 1)).round().astype("<i2")
    with named(Path(path)), wave.open(str(path), "wb") as file:
        file.setnchannels(len(whole))
        file.setsampwidth(whole.itemsize)
        file.setframerate(rate)
        file.writeframes(whole.T.tobytes())


def is_mp4(path: str | Path) -> bool:
    """Tell whether a file is to be an MP4, by its name."""
    return Path(path).suffix.lower() == ".mp4"


def save_picture(picture: Any, path: str | Path) -> None:
    """Write a PIL picture, or the frames of a clip: as GIF, WebP, PNG that moves, or MP4; a picture as one frame of it.

    Raises: ImportError if an MP4 is to be written and imageio or its ffmpeg is not installed (the extra `video`).
    """
    if is_mp4(path):
        needs.check("an MP4", "mp4")
        from diffusers.utils import export_to_video

        frames = list(picture) if isinstance(picture, (list, tuple)) else [picture]
        export_to_video(frames, str(path), fps=FRAMES_A_SECOND)
        return
    with named(Path(path)):
        if not isinstance(picture, (list, tuple)):
            picture.save(path)
            return
        first, *others = picture
        first.save(path, save_all=True, append_images=others, duration=1000 // FRAMES_A_SECOND, loop=0)
