"""What runs recorded, and the folder that keeps it."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from lesa.predictors.disk import DAMAGED, write_atomically
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
    signed: bool = field(default=True, repr=False)
    """Whether its numbers are known to be those recorded; files of before have no digest."""

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

    @property
    def is_finite(self) -> bool:
        """Tell whether no number is infinite or NaN."""
        return all(bool(x.isfinite().all()) for x in self._tensors().values())

    def save(self, path: str | Path, of: str = "") -> None:
        """Write one safetensors file, whole or not at all; the same trajectory gives the same bytes.

        It holds a digest, which `load` verifies, and names what it is a run `of`.
        """
        tensors = {name: tensor.contiguous() for name, tensor in self._tensors().items()}
        facts = self._facts() | ({"of": of} if of else {})
        facts["sha256"] = _digest(facts, tensors)
        # one metadata entry, since safetensors writes several in no fixed order
        write_atomically(Path(path), to_bytes(tensors, {"trajectory": json.dumps(facts)}))

    @classmethod
    def load(cls, path: str | Path, of: str = "") -> Trajectory:
        """Read a trajectory that `save` wrote.

        Raises: FileNotFoundError if there is none; ValueError if the file is damaged, changed or holds something else,
            a run `of` something else included, or if a reference run's numbers are not all finite.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                facts = json.loads(file.metadata()["trajectory"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            signed = facts.pop("sha256", None)
            if signed not in (None, _digest(facts, tensors)):
                raise ValueError("it is not as it was recorded")
            if of and signed and facts.get("of", of) != of:
                raise ValueError("it is a run of another collection")
            return cls._of(facts, tensors, signed is not None)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise OSError(f"{path} cannot be read: {error}") from error
        except DAMAGED as error:
            raise ValueError(f"{path} is no whole trajectory ({error}); delete it and collect again.") from error

    @classmethod
    def _of(cls, facts: dict[str, Any], tensors: dict[str, Tensor], signed: bool) -> Trajectory:
        """Make a trajectory of what a file holds."""
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
            signed=signed,
        )
        loaded._check()
        return loaded

    def _check(self) -> None:
        """Raise ValueError unless all tensors are of the same steps and tokens: what is made of one fits the others."""
        if not isinstance(self.prompt, str) or type(self.seed) is not int:
            raise ValueError(f"a run has a prompt and a seed, got {self.prompt!r:.60} and {self.seed!r:.60}")
        steps, tokens = len(times_in_order(self.grid)) - 1, len(self.tokens)
        if not tokens or not set(self.full) <= set(range(steps)):
            raise ValueError(f"its {steps} steps have tokens, and full ones, got {tokens} and {self.full[:8]}")
        wanted = {"latents": (steps + 1, tokens), "conditioning": (steps,)}
        for name, tensor in self._tensors().items():
            shape = wanted.get(name.partition(".")[0], (steps, tokens))
            if name.partition(".")[0] in ("latents", *_GROUPS) and tensor.shape[:-1] != shape:
                raise ValueError(f"{name} is {shape} and its channels, got {tuple(tensor.shape)}")
        self.check_finite()

    def check_finite(self) -> None:
        """Raise ValueError if a reference run has numbers that are not finite: nothing is planned or fitted by such.

        A run with forecasts may end in them, which its drift tells.
        """
        if self.whole and not self.is_finite:
            bad = next(name for name, x in self._tensors().items() if not x.isfinite().all())
            raise ValueError(
                f"the {bad} of a reference run ({self.prompt!r:.60}, seed {self.seed}) are finite numbers, got NaN or "
                "infinity; see that the pipeline draws this without lesa, in a dtype that holds its numbers."
            )

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


def _digest(facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of what a run's file holds, however it is laid out."""
    total = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, x in sorted(tensors.items()):
        total.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        total.update(x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _sampler(tensors: Mapping[str, Tensor]) -> Sampler | None:
    latents = tensors.get("sampler.latents")
    if latents is None:
        return None
    return Sampler(latents, tensors["sampler.outputs"], latents.new_zeros(len(latents), 0))


_LISTS = ("prompts", "seeds", "grid", "tokens")
_KINDS: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "pipeline": (str,),
    "weights": (str,),
    "tap": (str, type(None)),
    "call": (dict,),
    "batch_size": (int,),
    "sample": (int, type(None)),
    "prompts": (str,),
    "seeds": (int,),
    "grid": (float, int),
    "tokens": (int,),
    "seam": (bool,),
}
"""The types of a collection's fields, or of what its lists hold."""


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
        found = cls(**fields)
        found._check()
        return found

    def _check(self) -> None:
        """Raise ValueError unless the fields are of their types: a name of a file is made of them."""
        for name, kinds in _KINDS.items():
            value = getattr(self, name)
            parts = value if name in _LISTS and isinstance(value, tuple) else [value] if name not in _LISTS else [...]
            if not all(type(part) in kinds for part in parts):
                wanted = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"its {name} is made of {wanted}, got {value!r:.60}")
        if len(self.prompts) != len(self.seeds):
            raise ValueError(f"each prompt has a seed, got {len(self.prompts)} and {len(self.seeds)}")
        times_in_order(self.grid)

    @property
    def mark(self) -> str:
        """Name what all of its runs have in common, which each of their files repeats."""
        varying = ("model", "prompts", "seeds", "batch_size", "sample")  # it may grow, and folders move
        shared = {name: value for name, value in vars(self).items() if name not in varying}
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:16]


class Store:
    """A folder of trajectories: `collection.json` and one safetensors file each, in the order of its prompts.

    It can be opened while a collection fills it, and then holds the trajectories that were whole at that moment.
    """

    def __init__(self, folder: Path, collection: Collection):
        self.folder = folder
        self.collection = collection
        self.paths = [path for path in (self.path(*pair) for pair in collection.pairs) if path.exists()]
        self._told = False

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
        except DAMAGED as error:
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
        return map(self.load, range(len(self.paths)))

    def load(self, k: int) -> Trajectory:
        """Read the `k`-th trajectory.

        Raises: IndexError if there are not so many; ValueError if its file is damaged, or of another run.
        """
        path = self.paths[k]
        run = Trajectory.load(path, self.collection.mark)
        number = int(path.name.partition("-")[0])
        if (run.prompt, run.seed) != (self.collection.prompts[number], self.collection.seeds[number]):
            raise ValueError(
                f"{path} is the run of {self.collection.prompts[number]!r:.60} and its seed, got that of "
                f"{run.prompt!r:.60}, seed {run.seed}; delete it and collect again."
            )
        if not run.signed and not self._told:
            self._told = True
            warnings.warn(f"runs in {self.folder} have no digest, as those of before: unverified.", stacklevel=2)
        return run

    def is_whole(self, number: int, seed: int) -> bool:
        """Tell whether the trajectory of a prompt is there as it was recorded."""
        path = self.path(number, seed)
        if not path.exists():
            return False
        if path not in self.paths:
            self.paths = [other for pair in self.collection.pairs if (other := self.path(*pair)).exists()]
        try:
            self.load(self.paths.index(path))
        except ValueError:
            return False
        return True

    def add(self, number: int, seed: int, run: Trajectory) -> None:
        """Write the trajectory of a prompt."""
        run.save(self.path(number, seed), self.collection.mark)

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
