"""What runs recorded, and the folder that keeps it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from lesa.predictors.disk import write_atomically
from lesa.rows.grid import times_in_order
from lesa.rows.guidance import ALL
from lesa.rows.sampler import Sampler

COLLECTION = "collection.json"
_GROUPS = ("features", "outputs", "conditioning")


@dataclass(frozen=True, eq=False)
class Trajectory:
    """What one run of a call recorded at `n` of its tokens, in the dtypes that the model used.

    Features, outputs and conditioning are kept per stream. The head (`lesa.host.head.head`) turns a step's features and
    conditioning into its outputs, since it works on each token alone. In a run with skipped steps the features at those
    steps are the forecasts.

    Recorded at the sampler (`at_sampler`), features and outputs are the velocity that `step` was handed, under the one
    name of all streams; there is no conditioning, and a token is one number of the latents.
    """

    prompt: str
    """The prompt, or another call's label (`lesa.learn.calls.label`)."""
    seed: int
    grid: Tensor
    """(S + 1,) float64, falling to 0."""
    full: tuple[int, ...]
    """The steps at which the blocks ran; all S of them in a reference run."""
    tokens: Tensor
    """(n,) int64, the positions that are kept, rising."""
    latents: Tensor
    """(S + 1, n, latent channels): the transformer's input at each step, and what the last update left."""
    features: dict[str, Tensor]
    """(S, n, channels) per stream: what passed the tap."""
    outputs: dict[str, Tensor]
    """(S, n, output channels) per stream: what the transformer returned."""
    conditioning: dict[str, Tensor]
    """(S, conditioning channels) per stream: what the final norm gets beside the feature."""
    begins: tuple[int, ...] = (0,)
    """The steps at which histories begin: the run's first one, and those at which another denoiser takes over."""
    sampler: Sampler | None = None
    """The sampler as numbers, where it was read."""
    refusal: str = ""
    """Why it was not, if it was tried."""
    call: Mapping[str, Any] | None = field(default=None, repr=False)
    """The arguments of a call that is no prompt alone; of a stored one, if all of them are kept."""

    @property
    def at_sampler(self) -> bool:
        return self.streams == (ALL,)

    @property
    def whole(self) -> bool:
        """Tell whether every step is full, as in a reference run."""
        return len(self.full) == self.steps

    @property
    def steps(self) -> int:
        return len(self.grid) - 1

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(self.features)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def __repr__(self) -> str:
        return (
            f"Trajectory({self.prompt!r}, seed={self.seed}, {len(self.full)} of {self.steps} steps full, "
            f"{len(self.tokens)} tokens, streams {', '.join(self.streams)})"
        )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all; the same trajectory gives the same bytes."""
        # one metadata entry, since safetensors writes several in no fixed order
        facts = json.dumps(self._facts())
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        write_atomically(Path(path), to_bytes(tensors, {"trajectory": facts}))

    @classmethod
    def load(cls, path: str | Path) -> Trajectory:
        """Read a trajectory that `save` wrote.

        Raises: FileNotFoundError if there is none; ValueError if the file is damaged or holds something else.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads(file.metadata()["trajectory"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            streams = facts["streams"]
            if tuple(streams) == (ALL,):
                tensors[f"features.{ALL}"] = tensors[f"outputs.{ALL}"]
            loaded = cls(
                prompt=facts["prompt"],
                seed=facts["seed"],
                grid=tensors["grid"],
                full=tuple(facts["full"]),
                tokens=tensors["tokens"],
                latents=tensors["latents"],
                **{group: {name: tensors[f"{group}.{name}"] for name in streams} for group in _GROUPS},
                begins=tuple(facts.get("begins", (0,))),
                sampler=_sampler(tensors),
                refusal=facts.get("refusal", ""),
                call=facts.get("call"),
            )
            loaded._check()
            return loaded
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no whole trajectory ({error}); delete it and collect again.") from error

    def _check(self) -> None:
        """Raise ValueError unless all tensors are of the same steps and tokens: what is made of one fits the others."""
        steps, tokens = len(times_in_order(self.grid)) - 1, len(self.tokens)
        if not tokens or not set(self.full) <= set(range(steps)):
            raise ValueError(f"its {steps} steps have tokens, and full ones, got {tokens} and {self.full[:8]}")
        wanted = {"latents": (steps + 1, tokens), "conditioning": (steps,)}
        for name, tensor in self._tensors().items():
            shape = wanted.get(name.partition(".")[0], (steps, tokens))
            if name.partition(".")[0] in ("latents", *_GROUPS) and tensor.shape[:-1] != shape:
                raise ValueError(f"{name} is {shape} and its channels, got {tuple(tensor.shape)}")

    def _facts(self) -> dict[str, Any]:
        """Return what is no tensor; what a run of a plain prompt has not is left out."""
        facts: dict[str, Any] = dict(prompt=self.prompt, seed=self.seed, full=self.full, streams=self.streams)
        if self.begins != (0,):
            facts["begins"] = self.begins
        if self.refusal:
            facts["refusal"] = self.refusal
        if self.call is not None:
            with suppress(TypeError, ValueError):
                if json.loads(json.dumps(dict(self.call))) == dict(self.call):
                    facts["call"] = dict(self.call)
        return facts

    def _tensors(self) -> dict[str, Tensor]:
        grouped = {f"{group}.{name}": x for group in _GROUPS for name, x in getattr(self, group).items()}
        if self.at_sampler:
            del grouped[f"features.{ALL}"]  # they are the outputs
        if self.sampler is not None:
            grouped |= {"sampler.latents": self.sampler.latents, "sampler.outputs": self.sampler.outputs}
        return {"grid": self.grid, "tokens": self.tokens, "latents": self.latents, **grouped}


def _sampler(tensors: Mapping[str, Tensor]) -> Sampler | None:
    latents = tensors.get("sampler.latents")
    if latents is None:
        return None
    return Sampler(latents, tensors["sampler.outputs"], latents.new_zeros(len(latents), 0))


@dataclass(frozen=True)
class Collection:
    """What all trajectories of a store have in common; each prompt is run with the seed beside it."""

    model: str
    pipeline: str
    """The pipeline's class."""
    weights: str
    """A fingerprint of the pipeline's weights."""
    tap: str | None
    """The module that the features enter; None at the transformer's output."""
    call: dict[str, Any]
    """The arguments of the pipeline's call beside the prompt."""
    batch_size: int
    sample: int | None
    """How many tokens were asked for; None for the default."""
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    grid: tuple[float, ...]
    tokens: tuple[int, ...]
    seam: bool = False
    """Whether it was recorded at the sampler."""

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Number and seed of each trajectory in order."""
        return list(enumerate(self.seeds))

    def to_json(self) -> str:
        fields = {name: value for name, value in vars(self).items() if name != "seam" or value}  # as it always was
        return json.dumps(fields, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Collection:
        fields: dict[str, Any] = json.loads(text)
        fields |= {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**fields)


class Store:
    """A folder of trajectories: `collection.json` and one safetensors file each, in the order of its prompts.

    It can be opened while a collection fills it, and then holds the trajectories that were whole at that moment.
    """

    def __init__(self, folder: Path, collection: Collection):
        self.folder = folder
        self.collection = collection
        self.paths = [path for path in (self.path(*pair) for pair in collection.pairs) if path.exists()]

    @classmethod
    def open(cls, folder: str | Path) -> Store:
        """Open the store in a folder.

        Raises: FileNotFoundError if there is none; ValueError if its `collection.json` is damaged.
        """
        file = Path(folder) / COLLECTION
        try:
            return cls(Path(folder), Collection.from_json(file.read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} holds no trajectories (no {COLLECTION}); run lesa collect.") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} is damaged ({error}); delete the folder and collect again.") from error

    @classmethod
    def create(cls, folder: str | Path, collection: Collection) -> Store:
        """Begin a store in a folder that has none."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_atomically(Path(folder) / COLLECTION, collection.to_json().encode())
        return cls(Path(folder), collection)

    def path(self, number: int, seed: int) -> Path:
        """Return the file of the trajectory of prompt `number`, whose seed is `seed`."""
        return self.folder / f"{number:05d}-{seed}.safetensors"

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[Trajectory]:
        return map(Trajectory.load, self.paths)

    def load(self, k: int) -> Trajectory:
        """Read the `k`-th trajectory.

        Raises: IndexError if there are not so many; ValueError if its file is damaged.
        """
        return Trajectory.load(self.paths[k])

    def digest(self) -> str:
        """Return the SHA-256 of what is stored: the collection and, in order, every trajectory with its file's name."""
        total = hashlib.sha256(self.collection.to_json().encode())
        for path in self.paths:
            total.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return total.hexdigest()


def draw_tokens(available: int, count: int | None = None, seed: int = 0) -> Tensor:
    """Draw `count` of the positions 0 .. available - 1: (count,) int64, rising, the same for the same seed.

    The default count is 41, or all of them where there are fewer; of 4096 and more a hundredth, rounded down.

    Raises: ValueError if there are not so many.
    """
    if count is None:
        count = available // 100 if available >= 4096 else min(available, 41)
    if not 1 <= count <= available:
        raise ValueError(f"the model has {available} image tokens at this size, cannot keep {count}; ask for fewer.")
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:count].sort().values


MOST_NUMBERS = 4096


def draw_numbers(available: int, count: int | None = None) -> Tensor:
    """Draw positions of numbers of the latents as `draw_tokens` does; by default `MOST_NUMBERS`, or all.

    Raises: ValueError if there are not so many.
    """
    return draw_tokens(available, min(available, MOST_NUMBERS) if count is None else count)
