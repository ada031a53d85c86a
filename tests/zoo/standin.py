"""Tiny pipelines in the place of those whose weights cannot be had: what pages load, of the same class, from the zoo.

`instead` makes `from_pretrained` of any pipeline, and so `lesa.load`, give one; a folder is loaded as it is.
"""

import functools
import inspect
import re
import zlib
from collections.abc import Mapping
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from zoo.pipelines import ZOO

SUPPORT = Path(__file__).parents[2] / "docs" / "support.md"
STEPS = 12
"""The most that a run in another's place takes."""
OFFLOADS = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_group_offload")
PLACING = ("to", "load_lora_weights", *OFFLOADS)
"""What says where weights are, or brings more of them: nothing that tiny ones need."""
KEPT = ("num_inference_steps", "generator", "output_type")
"""The arguments of a call that its stand-in takes as they are; the others are those of the zoo."""


def instead(patch: pytest.MonkeyPatch) -> None:
    """Let pipelines that are no folder here be loaded as tiny ones."""
    ours = diffusers.DiffusionPipeline.from_pretrained.__func__  # type: ignore[attr-defined]

    def from_pretrained(cls: type, name: Any, **options: Any) -> Any:
        return ours(cls, name, **options) if Path(name).is_dir() else stand_in(str(name), cls)

    patch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(from_pretrained))


def stand_in(name: str, cls: type = diffusers.DiffusionPipeline) -> Any:
    """Build the pipeline of the zoo that is of this class, or any, and whose name is most like a repository's."""
    any_kind = cls is diffusers.DiffusionPipeline
    known = [zoo for kind, zoo in kinds_of_the_zoo() if any_kind or kind == cls.__name__]
    if not known:
        raise LookupError(f"there is no {cls.__name__} in the zoo, nor on the page of what is accelerated.")
    wanted = plain(name.rpartition("/")[2])
    entry = max(known, key=lambda zoo: (alike(wanted, plain(zoo)), -len(zoo)))
    specimen = ZOO[entry]()
    return called_as_real(specimen.pipe, specimen.arguments)


def kinds_of_the_zoo() -> list[tuple[str, str]]:
    """Read the classes of the zoo's pipelines off the page of what is accelerated, which is made of all of them."""
    return re.findall(r"^\| (\w+) +\| (\w+) +\|", SUPPORT.read_text(), re.MULTILINE)


def plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def alike(one: str, other: str) -> int:
    """Return how many characters in a row two names share."""
    return SequenceMatcher(None, one, other, autojunk=False).find_longest_match().size


def called_as_real(pipe: Any, arguments: Mapping[str, Any]) -> Any:
    """Let a tiny pipeline be called as one with weights: with prompts, sizes and what its class takes, and no else."""
    kind = type(pipe)
    signature = inspect.signature(kind.__call__)

    @functools.wraps(kind.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        known = {name: given[name] for name in KEPT if name in given}
        known["num_inference_steps"] = min(known.get("num_inference_steps", STEPS), STEPS)
        with torch.no_grad():
            return kind.__call__(self, **{**prompted(arguments, given.get("prompt")), **known})

    ignored = {name: lambda self, *_args, **_kwargs: self for name in PLACING if hasattr(kind, name)}
    pipe.__class__ = type(kind.__name__, (kind,), {"__call__": __call__, "__module__": kind.__module__, **ignored})
    return pipe


def prompted(arguments: Mapping[str, Any], prompt: Any) -> dict[str, Any]:
    """Let the embeddings of a call depend on its prompt, or have one of each of its prompts."""
    decoded = {name: value for name, value in arguments.items() if (name, value) != ("output_type", "latent")}
    several = prompt if isinstance(prompt, list) else [prompt]
    return {name: torch.cat([of(one, name, value) for one in several]) if is_text(name, value) else value
            for name, value in decoded.items()}  # fmt: skip


def is_text(name: str, value: Any) -> bool:
    """Tell whether an argument of a call is of its prompts, and there is one for each of them."""
    return isinstance(value, Tensor) and any(word in name for word in ("prompt", "pooled", "attention_mask"))


def of(prompt: Any, name: str, value: Tensor) -> Tensor:
    """Move an embedding to where the prompt has it; masks and what is negative stay."""
    if not value.is_floating_point() or name.startswith("negative"):
        return value
    generator = torch.Generator().manual_seed(zlib.crc32(str(prompt).encode()))
    return value + torch.randn(value.shape, generator=generator)
