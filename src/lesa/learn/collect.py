"""Run a pipeline and record trajectories.

What a run takes: per step and stream, n tokens of the feature and of the output and one vector of conditioning; per
step, n tokens of the latents. FLUX at 1024 x 1024 with 50 steps in bfloat16 and the default of n = 40 tokens:
40 x 50 x 3072 x 2 bytes = 12.3 MB of features, 0.3 MB each of conditioning, outputs and latents; 13 MB a run, 1.3 GB
for 100 prompts (whole features: 1.26 GB a run). One batch is held in memory at a time.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lesa.host.head import to_tokens
from lesa.host.intercept import intercept
from lesa.host.pipelines import for_each
from lesa.host.streams import hear
from lesa.host.tap import PAPER, part_of, tap_of
from lesa.learn.alone import alone_in
from lesa.learn.calls import NO_PROMPT, Call, Calls, arguments, described, label, listed, seeded, takes
from lesa.learn.progress import Bar
from lesa.learn.ranks import ALONE, Ranks
from lesa.learn.seam import SeamRecorder, checked, refuse_noise
from lesa.learn.stored import add, begun, is_there
from lesa.learn.trajectory import Store, Trajectory, draw_numbers, draw_tokens
from lesa.predictors.fingerprint import pipeline_fingerprint
from lesa.rows import grid as grids
from lesa.rows.sampler import Sampler
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
    prompts: Sequence[Call],
    seeds: Sequence[int],
    tokens: Tensor | Callable[[int], Tensor] | None = None,
    tap: Tap | None = None,
    *,
    seam: bool | None = None,
    **call: Any,
) -> list[Trajectory]:
    """Run each prompt, or call, with the seed beside it, and return what passed.

    A call is a prompt, or any arguments by name (images, masks, class labels, embeddings); other arguments here go with
    all of them, and a text among these (such as `negative_prompt`) with every prompt. Prompts are run in one batch,
    other calls one by one. `tokens` are the positions to keep, (n,) int64, or a function that draws them from how many
    there are. An accelerated pipeline is recorded as it runs, with its forecasts.

    With `seam` runs are recorded at the sampler, which any pipeline has: the velocity after guidance and the latents,
    of each picture as numbers in a row. Without, per stream at a feature `tap` of the paper's three classes, by default
    the class's usual one; at the output tap the features are then the outputs, and the conditioning is empty; latents
    and outputs of videos are kept as the tokens that the transformer makes of them. By default a pipeline of these
    classes is recorded the latter way if it is given prompts, and all others at the sampler.

    Raises: ValueError if the calls and seeds do not pair up, if an argument is the recording's own, if the pipeline
        does not walk its whole grid, or per stream not once, if it is accelerated at another tap, if its sampler adds
        noise, or if a run with every step full has numbers that are not finite.
    """
    _check_pairs(prompts, seeds)
    found = _record(pipe, prompts, seeds, tokens, tap, seam, call)
    for run in found:
        run.check_finite()
    return found


def _record(
    pipe: Any,
    prompts: Sequence[Call],
    seeds: Sequence[int],
    tokens: Tensor | Callable[[int], Tensor] | None,
    tap: Tap | None,
    seam: bool | None,
    call: dict[str, Any],
) -> list[Trajectory]:
    if not is_at_sampler(pipe, prompts, tap, seam):
        given = draw_tokens if tokens is None else tokens
        return _record_tokens(pipe, _only_prompts(prompts), seeds, given, tap, call)
    draw = draw_numbers if tokens is None else tokens if callable(tokens) else lambda _: tokens
    if len(prompts) > 1 and all(isinstance(one, str) for one in prompts) and takes(pipe, "prompt"):
        return _record_batch(pipe, _only_prompts(prompts), seeds, draw, call)
    return [
        run
        for one, seed in zip(prompts, seeds, strict=True)
        for run in _record_call(pipe, one, seed, arguments(pipe, one, seed, call), draw)
    ]


def is_at_sampler(pipe: Any, calls: Sequence[Call], tap: Tap | None = None, seam: bool | None = None) -> bool:
    """Tell where runs are recorded.

    Raises: ValueError if that is at the sampler, but a feature tap is asked for.
    """
    inner = tap is not None and bool(tap.modules)
    if seam is None:
        kinds = {parent.__name__ for parent in type(getattr(pipe, "transformer", None)).__mro__}
        seam = not ((inner or kinds & PAPER.keys()) and all(isinstance(call, str) for call in calls))
    if seam and inner:
        raise ValueError(
            f"at a feature tap prompts are recorded, got other calls, or seam=True, at {tap}; leave the tap out: the "
            "sampler is where any pipeline is recorded."
        )
    return seam


def _only_prompts(calls: Sequence[Call]) -> list[str]:
    if other := [call for call in calls if not isinstance(call, str)]:
        raise ValueError(f"runs are recorded per stream for prompts, got {label(other[0])}; leave out seam=False.")
    return [call for call in calls if isinstance(call, str)]


def _record_call(pipe: Any, call: Call, seed: int, given: Mapping[str, Any], draw: Any) -> list[Trajectory]:
    recorder = SeamRecorder(pipe, draw)
    with recorder.listening(), seeded(seed), torch.no_grad():
        pipe(**given)
    found = recorder.trajectories([label(call)], [seed])
    return found if isinstance(call, str) else [replace(run, call=call) for run in found]


def _record_batch(
    pipe: Any, prompts: list[str], seeds: Sequence[int], draw: Any, call: Mapping[str, Any]
) -> list[Trajectory]:
    recorder = SeamRecorder(pipe, draw, len(prompts))
    given = {**for_each(prompts, dict(call)), "prompt": prompts}
    if takes(pipe, "generator"):
        given["generator"] = [torch.Generator().manual_seed(seed) for seed in seeds]
    if takes(pipe, "output_type"):
        given.setdefault("output_type", "latent")
    with recorder.listening(), seeded(seeds[0]), torch.no_grad():
        pipe(**given)
    return recorder.trajectories(prompts, seeds)


def _record_tokens(
    pipe: Any,
    prompts: list[str],
    seeds: Sequence[int],
    tokens: Tensor | Callable[[int], Tensor],
    tap: Tap | None,
    call: dict[str, Any],
) -> list[Trajectory]:
    """Record prompts in one batch, per stream at a tap of one of the paper's classes."""
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


def rerun(
    pipe: Any, runs: Sequence[Trajectory], tap: Tap | None = None, calls: Sequence[Call] = (), **call: Any
) -> list[Trajectory]:
    """Record the calls of recorded runs once more, as the pipeline is now, where and at the positions that they were.

    What a store keeps of a call may be its label alone; those `calls` are given again, in any order.

    Raises: ValueError if one is missing, or as `record` does.
    """
    known = {label(one): one for one in calls}
    again = [known.get(run.prompt, run.call or run.prompt) for run in runs]
    seam = runs[0].at_sampler
    if lost := [one for one in again if isinstance(one, str) and one.startswith(f"{NO_PROMPT}{{")]:
        raise ValueError(f"large arguments are kept by their digest alone, got {lost[0]}; give such calls: calls=...")
    seeds = [run.seed for run in runs]
    return record(pipe, again, seeds, runs[0].tokens, None if seam else tap, seam=seam, **call)


def _check_pairs(prompts: Sequence[Call], seeds: Sequence[int]) -> None:
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
        self._sampler: Sampler | str | None = None
        self._kept: dict[str, dict[str, list[Tensor]]] = {}  # stream, then group; one tensor per step

    @contextmanager
    def listening(self) -> Iterator[None]:
        # around an acceleration that is there, so that its forecasts are seen
        with ExitStack() as undo:
            undo.callback(intercept(self._transformer, "__call__", self._call))
            undo.callback(intercept(self._scheduler, "step", self._read_sampler))
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

    def _read_sampler(self, go_on: Callable, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        if self._sampler is None:
            self._sampler = refuse_noise(scheduler, *args, **kwargs)
        return go_on(*args, **kwargs)

    def _see_block(self, *_: Any) -> None:
        self._full.add(self._step)

    def _enter(self, transformer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        latents = args[0] if args else kwargs["hidden_states"]
        self._step = grids.step_of(self._scheduler) or 0
        if not self._latents:
            self._shape = latents.shape
            available = to_tokens(transformer, latents).shape[1]
            self._tokens = checked(self._draw(available), available)
        kept = self._kept.setdefault(self._stream, {"features": [], "conditioning": [], "outputs": []})
        if len(kept["outputs"]) != self._step:
            raise ValueError(
                f"a recorded run walks its whole grid once per stream; stream {self._stream!r} was called at step "
                f"{self._step} after {len(kept['outputs'])} calls. Record text-to-image runs of pipelines that name "
                "their streams with transformer.cache_context(...), or any at the sampler (seam=True)."
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
        passed: list[dict[str, Any]] = [
            {group: {name: runs[k] for name, runs in streams.items()} for group, streams in kept.items()}
            for k in range(len(prompts))
        ]
        return [
            Trajectory(
                prompt=prompt,
                seed=seed,
                grid=grid,
                full=tuple(sorted(self._full)),
                tokens=self._tokens,
                latents=latents[k],
                sampler=self._sampler if isinstance(self._sampler, Sampler) else None,
                refusal=self._sampler if isinstance(self._sampler, str) else "",
                **passed[k],
            )
            for k, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]


def _per_run(steps: list[Tensor]) -> tuple[Tensor, ...]:
    """Turn one tensor per step, (B, ...), into one per run, (steps, ...)."""
    return torch.stack(steps, dim=1).unbind()


def collect(
    pipe: Any,
    prompts: Calls,
    seeds: Sequence[int],
    folder: str | Path,
    *,
    model: str,
    tokens: int | None = None,
    batch_size: int = 1,
    tap: Tap | None = None,
    at: Ranks = ALONE,
    seam: bool | None = None,
    **call: Any,
) -> Store:
    """Record each prompt, or call, with the seed beside it, every step full, into a store on disk.

    Called again after it was stopped, at whatever moment, it goes on and ends with the same bytes as if it had not been
    stopped: its batches are fixed by number, and a batch that is partly there is run again as a whole; a run that is
    damaged is recorded again. More prompts, after those that are there, let a collection grow. `prompts` are
    prompts, calls (see `record`), or a function from a number to one. `model` is the name that the store remembers;
    `tokens` how many tokens, or at the sampler numbers, are kept (see `draw_tokens`); `tap` where the features are
    taken, by default at the class's usual tap; `seam` is that of `record`; the rest goes to the pipeline. Several
    processes (`at`) share the batches, and end with the same bytes as one; the store holds everything once all of them
    are done.

    Raises: ValueError if prompts and seeds do not pair up or a pair is repeated, if the folder holds another
    collection, or if the pipeline is accelerated; RuntimeError if another process collects into the folder; OSError if
    the disk is full: what is stored by then stays.
    """
    calls = listed(prompts, len(seeds))
    seam = is_at_sampler(pipe, calls, tap, seam)
    tap = Tap() if seam else tap or tap_of(pipe.transformer)
    folder, wanted = Path(folder), _describe(pipe, calls, seeds, model, tokens, batch_size, tap, seam, call)

    def recorded(batch: Sequence[tuple[int, int]]) -> list[Trajectory]:
        draw = draw_numbers if seam else draw_tokens
        some = [calls[number] for number, _ in batch]
        drawn = record(pipe, some, [seed for _, seed in batch], lambda n: draw(n, tokens), tap, seam=seam, **call)
        if not drawn[0].whole:
            raise ValueError(
                "a collection records reference runs, got an accelerated pipeline; call lesa.disable first."
            )
        return drawn

    with alone_in(folder, at.rank):
        store = begun(folder, wanted)
        pairs = list(enumerate(seeds))
        batches = at.share([pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)])
        runs = sum(map(len, batches))
        with _quiet(pipe), Bar(total=runs, desc="collect", unit="run", disable=not at.leads) as bar:
            for batch in batches:
                if store is None or not all([is_there(store, *pair) for pair in batch]):
                    store = add(store, batch, recorded(batch), folder, wanted)
                bar.update(len(batch))
    at.wait()
    return Store.open(folder)


def record_kept(
    pipe: Any,
    prompts: Sequence[Call],
    seeds: Sequence[int],
    tokens: Tensor,
    tap: Tap,
    folder: str | Path,
    batch_size: int,
    seam: bool | None = None,
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
            runs = [Trajectory.load(path, Path(folder).name) for path in paths]
        except (FileNotFoundError, ValueError):
            runs = []
        if [run.prompt for run in runs] != [label(one) for one in prompts[batch]]:
            runs = record(pipe, prompts[batch], seeds[batch], tokens, tap, seam=seam, **call)
            for path, run in zip(paths, runs, strict=True):
                run.save(path, Path(folder).name)
        found += runs
    return found


def kept_paths(folder: str | Path, seeds: Sequence[int]) -> list[Path]:
    """Return the files in which `record_kept` keeps the runs of these seeds."""
    return [Path(folder) / f"{number:05d}-{seed}.safetensors" for number, seed in enumerate(seeds)]


def _describe(
    pipe: Any,
    calls: Sequence[Call],
    seeds: Sequence[int],
    model: str,
    tokens: int | None,
    batch_size: int,
    tap: Tap,
    seam: bool,
    call: dict[str, Any],
) -> dict[str, Any]:
    """Check the arguments of a collection; returns the fields of `Collection` that are known before it runs."""
    _check_pairs(calls, seeds)
    prompts = [label(one) for one in calls]
    pairs = list(zip(prompts, seeds, strict=True))
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"each pair of a prompt and a seed is collected once; got {reprlib.repr(pairs)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    plain = described(call)
    return {
        "model": model,
        "pipeline": type(pipe).__name__,
        "weights": pipeline_fingerprint(pipe),
        "tap": tap.module,
        "call": plain,
        "batch_size": batch_size,
        "sample": tokens,
        "prompts": tuple(prompts),
        "seeds": tuple(seeds),
        **({"seam": True} if seam else {}),
    }


@contextmanager
def _quiet(pipe: Any) -> Iterator[None]:
    """Hide the pipeline's own progress bar, which would draw a line per batch."""
    before = getattr(pipe, "_progress_bar_config", {})
    if not hasattr(pipe, "set_progress_bar_config"):
        yield
        return
    pipe.set_progress_bar_config(**{**before, "disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)
