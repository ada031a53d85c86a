"""Run a pipeline and record trajectories.

What a run takes: per step and stream, n tokens of the feature and of the output and one vector of conditioning; per
step, n tokens of the latents. FLUX at 1024 x 1024 with 50 steps in bfloat16 and the default of n = 40 tokens:
40 x 50 x 3072 x 2 bytes = 12.3 MB of features, 0.3 MB each of conditioning, outputs and latents; 13 MB a run, 1.3 GB
for 100 prompts (whole features: 1.26 GB a run). One batch is held in memory at a time.
"""

from __future__ import annotations

import errno
import hashlib
import json
import reprlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from lesa.host.conditions import adds_noise, noise_error
from lesa.host.head import to_tokens
from lesa.host.intercept import intercept, unmarked
from lesa.host.pipelines import for_each
from lesa.host.streams import hear
from lesa.host.tap import part_of, tap_of
from lesa.learn.ranks import ALONE, Ranks
from lesa.learn.trajectory import COLLECTION, Collection, Store, Trajectory, draw_tokens
from lesa.rows import grid as grids
from lesa.rows.tap import Tap

DEFAULT_STREAM = "cond"
_OURS = (
    "prompt",
    "generator",
    "latents",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "output_type",
    "return_dict",
)


def record(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    tokens: Tensor | Callable[[int], Tensor],
    tap: Tap | None = None,
    **call: Any,
) -> list[Trajectory]:
    """Run each prompt with the seed beside it, in one batched call of the pipeline, and return what passed.

    `tokens` are the positions to keep, (n,) int64, or a function that draws them from the number of image tokens. Other
    arguments go to the pipeline; a text (such as `negative_prompt`) goes with every prompt. An accelerated pipeline is
    recorded as it runs, with its forecasts; if it is so at another tap than the class's usual one, name it. At the
    output tap the features are the outputs, and the conditioning is empty. Latents and outputs of videos are kept as
    the tokens that the transformer makes of them.

    Raises: ValueError if the prompts and seeds do not pair up, if an argument is the recording's own, if the pipeline
    does not walk its whole grid once per stream, if it is accelerated at another tap, or if its sampler adds noise.
    """
    _check_pairs(prompts, seeds)
    if reserved := sorted(set(call) & set(_OURS)):
        raise ValueError(f"a recording sets {', '.join(reserved)} itself; leave it out of the call.")
    recorder = _Recorder(pipe, tokens, tap or tap_of(pipe.transformer))
    with recorder.listening():
        final = pipe(
            prompt=list(prompts),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="latent",
            return_dict=False,
            **for_each(prompts, call),
        )[0]
    return recorder.trajectories(prompts, seeds, final)


def _check_pairs(prompts: Sequence[str], seeds: Sequence[int]) -> None:
    if not prompts or len(prompts) != len(seeds):
        raise ValueError(f"each prompt needs one seed, got {len(prompts)} prompts and {len(seeds)} seeds.")


class _Recorder:
    """Hooks on a pipeline's transformer that keep what passes at some of its tokens."""

    def __init__(self, pipe: Any, tokens: Tensor | Callable[[int], Tensor], tap: Tap):
        self._scheduler = pipe.scheduler
        self._transformer: Any = pipe.transformer
        self._tap = tap
        self._draw = tokens if callable(tokens) else lambda _: tokens
        self._tokens = torch.empty(0, dtype=torch.int64)
        self._stream = DEFAULT_STREAM
        self._step = 0
        self._shape = torch.Size()
        self._full: set[int] = set()
        self._latents: dict[int, Tensor] = {}
        self._judged = False
        self._kept: dict[str, dict[str, list[Tensor]]] = {}  # stream, then group; one tensor per step

    @contextmanager
    def listening(self) -> Iterator[None]:
        # around an acceleration that is there, so that its forecasts are seen
        with ExitStack() as undo:
            undo.callback(intercept(self._transformer, "__call__", self._call))
            undo.callback(intercept(self._scheduler, "step", self._refuse_noise))
            for block in list(getattr(self._transformer, self._tap.blocks[0]))[:1]:
                undo.callback(block.register_forward_pre_hook(self._see_block).remove)
            if self._tap.module is not None:
                module = part_of(self._transformer, self._tap.modules[0])
                undo.callback(module.register_forward_pre_hook(self._pass, with_kwargs=True).remove)
            undo.callback(hear(self._transformer, self._within))
            yield

    @contextmanager
    def _within(self, stream: str) -> Iterator[None]:
        self._stream = stream
        try:
            yield
        finally:
            self._stream = DEFAULT_STREAM

    def _call(self, go_on: Callable, transformer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        self._enter(transformer, args, kwargs)
        output = go_on(*args, **kwargs)
        self._leave(transformer, args, output)
        return output

    def _refuse_noise(self, go_on: Callable, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._judged and adds_noise(unmarked(scheduler), *args, **kwargs):
            raise noise_error(scheduler, "runs are recorded with")
        self._judged = True
        return go_on(*args, **kwargs)

    def _see_block(self, *_: Any) -> None:
        self._full.add(self._step)

    def _enter(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        latents = args[0] if args else kwargs["hidden_states"]
        self._step = grids.step_of(self._scheduler) or 0
        if not self._latents:
            self._shape = latents.shape
            available = to_tokens(transformer, latents).shape[1]
            self._tokens = _checked(self._draw(available), available)
        kept = self._kept.setdefault(self._stream, {"features": [], "conditioning": [], "outputs": []})
        if len(kept["outputs"]) != self._step:
            raise ValueError(
                f"a recorded run walks its whole grid once per stream; stream {self._stream!r} was called at step "
                f"{self._step} after {len(kept['outputs'])} calls. Record text-to-image runs of pipelines that name "
                "their streams with transformer.cache_context(...)."
            )
        self._latents[self._step] = self._keep(latents)

    def _pass(self, _module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        feature, *rest = *args, *kwargs.values()
        kept = self._kept[self._stream]
        kept["features"].append(self._keep(feature))
        kept["conditioning"].append(rest[0].detach().cpu() if rest else torch.empty(len(feature), 0))

    def _leave(self, _transformer: nn.Module, _args: tuple, output: Any) -> None:
        kept = self._kept[self._stream]
        if self._tap.module is None:
            self._pass(_transformer, (output[0],), {})
        kept["outputs"].append(self._keep(output[0]))
        if len(kept["features"]) != len(kept["outputs"]):
            raise ValueError(
                f"a feature passes {self._tap.module!r} at each step of a recorded run, got none at step {self._step}; "
                "record a run that is accelerated at another tap with that tap."
            )

    def _keep(self, x: Tensor) -> Tensor:
        return to_tokens(self._transformer, x.detach())[:, self._tokens].cpu()

    def trajectories(self, prompts: Sequence[str], seeds: Sequence[int], final: Tensor) -> list[Trajectory]:
        grid = grids.from_scheduler(self._scheduler)
        steps = len(grid) - 1
        if final.shape != self._shape or len(final) != len(prompts):
            raise ValueError(
                f"a recorded pipeline gives latents as its transformer takes them, one for each of {len(prompts)} "
                f"prompts; got {tuple(final.shape)} from a transformer that takes {tuple(self._shape)}."
            )
        if short := [name for name, kept in self._kept.items() if len(kept["outputs"]) != steps]:
            raise ValueError(f"a recorded run walks its whole grid of {steps} steps; {short[0]!r} stopped early.")
        latents = _per_run([*self._latents.values(), self._keep(final)])
        kept = {
            group: {name: _per_run(of_stream[group]) for name, of_stream in self._kept.items()}
            for group in ("features", "outputs", "conditioning")
        }
        return [
            Trajectory(
                prompt=prompt,
                seed=seed,
                grid=grid,
                full=tuple(sorted(self._full)),
                tokens=self._tokens,
                latents=latents[k],
                **{group: {name: runs[k] for name, runs in streams.items()} for group, streams in kept.items()},
            )
            for k, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]


def _checked(tokens: Tensor, available: int) -> Tensor:
    if not len(tokens) or tokens.min() < 0 or tokens.max() >= available:
        raise ValueError(f"tokens are positions from 0 to {available - 1}, got {tokens.tolist()}; see draw_tokens.")
    return tokens.cpu()


def _per_run(steps: list[Tensor]) -> tuple[Tensor, ...]:
    """Turn one tensor per step, (B, ...), into one per run, (steps, ...)."""
    return torch.stack(steps, dim=1).unbind()


def collect(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    folder: str | Path,
    *,
    model: str,
    tokens: int | None = None,
    batch_size: int = 1,
    tap: Tap | None = None,
    at: Ranks = ALONE,
    **call: Any,
) -> Store:
    """Record each prompt with the seed beside it, every step full, into a store on disk.

    Called again after it was stopped, at whatever moment, it goes on and ends with the same bytes as if it had not been
    stopped: its batches are fixed by number, and a batch that is partly there is run again as a whole. `model` is the
    name that the store remembers; `tokens` how many tokens are kept (see `draw_tokens`); `tap` where the features are
    taken, by default at the class's usual tap; the rest goes to the pipeline. Several processes (`at`) share the
    batches, and end with the same bytes as one; the store holds everything once all of them are done.

    Raises: ValueError if prompts and seeds do not pair up or a pair is repeated, if the folder holds another
    collection, or if the pipeline is accelerated; RuntimeError if another process collects into the folder; OSError if
    the disk is full: what is stored by then stays.
    """
    tap = tap or tap_of(pipe.transformer)
    folder, wanted = Path(folder), _describe(pipe, prompts, seeds, model, tokens, batch_size, tap, call)
    with _alone_in(folder, at.rank):
        store = Store.open(folder) if (folder / COLLECTION).exists() else None
        if store is not None:
            _check_same(store, wanted)
        pairs = list(enumerate(seeds))
        batches = at.share([pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)])
        runs = sum(map(len, batches))
        with _quiet(pipe), tqdm(total=runs, desc="collect", unit="run", disable=not at.leads) as bar:
            for batch in batches:
                if store is None or not all(store.path(*pair).exists() for pair in batch):
                    store = _add(pipe, store, batch, folder, tap, wanted)
                bar.update(len(batch))
    at.wait()
    return Store.open(folder)


def _add(
    pipe: Any, store: Store | None, batch: list[tuple[int, int]], folder: Path, tap: Tap, wanted: dict[str, Any]
) -> Store:
    """Record one batch and write what the store lacks of it; the first batch begins the store."""
    trajectories = record(
        pipe,
        [wanted["prompts"][number] for number, _ in batch],
        [seed for _, seed in batch],
        lambda available: draw_tokens(available, wanted["sample"]),
        tap,
        **wanted["call"],
    )
    first = trajectories[0]
    if len(first.full) < first.steps:
        raise ValueError("a collection records reference runs, got an accelerated pipeline; call lesa.disable first.")
    found: dict[str, Any] = {"grid": tuple(first.grid.tolist()), "tokens": tuple(first.tokens.tolist())}
    with FileLock(folder / ".lock-begin"):  # several processes may come to it at once
        if store is None and not (folder / COLLECTION).exists():
            store = Store.create(folder, Collection(**wanted, **found))
    store = store or Store.open(folder)
    _check_same(store, {**wanted, **found})
    for pair, trajectory in zip(batch, trajectories, strict=True):
        if not store.path(*pair).exists():
            trajectory.save(store.path(*pair))
    return store


def record_kept(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    tokens: Tensor,
    tap: Tap,
    folder: str | Path,
    batch_size: int,
    **call: Any,
) -> list[Trajectory]:
    """Record as `record` does, in batches, and keep each run in a folder: called again, it records what is not there.

    The folder belongs to the pipeline as it is accelerated now and to these arguments; what is damaged in it, or of
    other prompts, is recorded again.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    found: list[Trajectory] = []
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        paths = kept_paths(folder, seeds)[batch]
        try:
            runs = [Trajectory.load(path) for path in paths]
        except (FileNotFoundError, ValueError):
            runs = []
        if [run.prompt for run in runs] != list(prompts[batch]):
            runs = record(pipe, prompts[batch], seeds[batch], tokens, tap, **call)
            for path, run in zip(paths, runs, strict=True):
                run.save(path)
        found += runs
    return found


def kept_paths(folder: str | Path, seeds: Sequence[int]) -> list[Path]:
    """Return the files in which `record_kept` keeps the runs of these seeds."""
    return [Path(folder) / f"{number:05d}-{seed}.safetensors" for number, seed in enumerate(seeds)]


def _describe(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    model: str,
    tokens: int | None,
    batch_size: int,
    tap: Tap,
    call: dict[str, Any],
) -> dict[str, Any]:
    """Check the arguments of a collection; returns the fields of `Collection` that are known before it runs."""
    _check_pairs(prompts, seeds)
    pairs = list(zip(prompts, seeds, strict=True))
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"each pair of a prompt and a seed is collected once; got {reprlib.repr(pairs)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    try:
        plain = json.loads(json.dumps(call))
    except TypeError as error:
        raise ValueError(f"the call's arguments are kept as JSON: {error}; pass numbers, texts and lists.") from error
    return {
        "model": model,
        "pipeline": type(pipe).__name__,
        "weights": fingerprint(pipe),
        "tap": tap.module,
        "call": plain,
        "batch_size": batch_size,
        "sample": tokens,
        "prompts": tuple(prompts),
        "seeds": tuple(seeds),
    }


def fingerprint(pipe: Any) -> str:
    """Name a pipeline's weights by the kind and the first numbers of each: a retrained model gets another name."""
    total = hashlib.sha256()
    for part, module in sorted(pipe.components.items()):
        for name, x in module.state_dict().items() if isinstance(module, nn.Module) else ():
            x = _offloaded(module, name) if x.is_meta else x
            head = [] if x.is_meta else x.flatten()[:8].tolist()
            total.update(f"{part}.{name} {x.dtype} {tuple(x.shape)} {head}\n".encode())
    return total.hexdigest()


def _offloaded(module: nn.Module, name: str) -> Tensor:
    """Return a weight that accelerate's sequential offloading keeps elsewhere, or the empty one in its place."""
    owner, _, weight = name.rpartition(".")
    part = module.get_submodule(owner)
    elsewhere = getattr(getattr(part, "_hf_hook", None), "weights_map", None) or {}
    return elsewhere[weight] if weight in elsewhere else getattr(part, weight)


def _check_same(store: Store, wanted: dict[str, Any]) -> None:
    """Raise a ValueError that says what differs if the store was collected otherwise."""
    for name, here in wanted.items():
        there = getattr(store.collection, name)
        if there != here:
            raise ValueError(
                f"{store.folder} holds a collection with other {name}: {_shown(there, here)}; "
                "collect into another folder, or with what it was begun with."
            )


def _shown(there: Any, here: Any) -> str:
    """Show two different values, of sequences only where they part."""
    if isinstance(there, tuple):
        k = next((k for k, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), min(len(there), len(here)))
        parts = ["missing" if k >= len(x) else repr(x[k]) for x in (there, here)]
        return f"number {k} is {parts[0]} there, {parts[1]} here"
    return f"{there!r} there, {here!r} here"


@contextmanager
def _alone_in(folder: Path, rank: int) -> Iterator[None]:
    """Make a folder, and keep other processes of this rank from collecting into it; explain a full disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / (f".lock-{rank}" if rank else ".lock"), timeout=0):
            yield
    except Timeout as error:
        raise RuntimeError(f"another process is collecting into {folder}; wait for it, or end it.") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = "the disk is full; free some space and collect again: it goes on after the runs stored so far"
        raise OSError(error.errno, advice, str(folder)) from error


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bar, which would draw a line per batch."""
    before = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts from a text file in UTF-8, one a line; blank lines and blanks around a prompt are left out.

    Raises: ValueError if there is none, or one twice.
    """
    prompts: dict[str, int] = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8-sig").split("\n"), start=1):
        prompt = line.strip()
        if prompt in prompts:
            raise ValueError(f"{path} has {prompt!r} in line {prompts[prompt]} and again in line {number}; remove one.")
        if prompt:
            prompts[prompt] = number
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line.")
    return list(prompts)
