"""The command that draws: generate."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lesa.cli import options
from lesa.host import needs
from lesa.host.loading import loaded
from lesa.host.pipelines import is_mp4, is_wav, pictures_of, rate_of, save_picture, save_sound
from lesa.host.runtime import Run, accelerate


def generate(given: Namespace) -> None:
    """Draw a picture or a clip."""
    import torch
    from PIL import Image

    if Path(given.out).suffix.lower() not in {*Image.registered_extensions(), ".mp4", ".wav"}:
        raise ValueError(f"--out names a picture file such as picture.png, or clip.gif, or a .wav, got {given.out!r}.")
    if is_mp4(given.out):
        needs.check("an MP4", "mp4")
    options.folder(Path(given.out).parent)
    pipe, seeded = loaded(options.load_options(given)), dict(generator=torch.Generator().manual_seed(given.seed))
    rate = rate_of(pipe)
    if is_wav(given.out) != (rate is not None):
        kind = "sound: --out names a .wav" if rate else "pictures: --out names no .wav"
        raise ValueError(f"a {type(pipe).__name__} makes {kind}, got {given.out!r}.")
    if given.full:
        drawn = pictures_of(pipe(given.prompt, **seeded))
    else:
        with _accelerated(pipe, given) as run:
            drawn = pictures_of(pipe(given.prompt, **seeded))
        print(run.summary())
    if rate is None:
        save_picture(drawn[0], given.out)
    else:
        save_sound(drawn[0], rate, given.out)
    options.say(given.out)
    _hint(given)


def _hint(given: Namespace) -> None:
    """Say what may come next: the same in full to compare with, or fewer full steps than without training."""
    model = options.as_given(given)
    if given.full:
        options.say_next("generate", *model, given.prompt, "--seed", given.seed)
    elif given.forecaster:
        options.say_next("calibrate", *model, "--prompts", "FILE", "--budget", 8)
    else:
        beside = Path(given.out).with_stem(f"{Path(given.out).stem}-full")
        options.say_next("generate", *model, given.prompt, "--seed", given.seed, "--full", "--out", beside)


def _accelerated(pipe: Any, given: Namespace) -> Run:
    """Accelerate a pipeline as asked.

    Raises: LookupError if a schedule is named alone, and no predictor is shipped for it with the model.
    """
    forecaster = options.forecaster_of(given)
    asked = dict(budget=given.budget, quality=given.quality, fallback=given.fallback)
    try:
        named = {name: value for name, value in asked.items() if value is not None}
        return accelerate(pipe, forecaster, schedule=given.schedule, **named)
    except LookupError as error:
        if forecaster is not None:
            raise
        raise LookupError(
            f"no predictor is shipped with {given.lora or given.model} that fits; name one (--predictor FOLDER), make "
            "one of a few prompts (lesa calibrate), or draw without training: --forecaster default, or --forecaster "
            "lagrange:1 --schedule every:3."
        ) from error
