"""Record runs at the sampler seam, where all pipelines are alike.

What a scheduler's `step` is handed, the velocity after guidance and the latents, has one shape there, whatever the
denoiser takes and however often it is called: patches, packing, batched guidance, condition tokens and channels are on
the other side. Several calls of `step` in one tick (video and sound) are recorded side by side.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lesa.host.clock import Moment, PipelineClock
from lesa.host.conditions import adds_noise, noise_error
from lesa.host.intercept import intercept, mark_of, unmarked
from lesa.host.runtime import denoisers_of
from lesa.host.streams import Call, Stream, Streams, hear
from lesa.learn.trajectory import Trajectory
from lesa.rows import sampler as samplers
from lesa.rows.guidance import ALL
from lesa.rows.sampler import Sampler

REWRITTEN = 1e-2
"""Latents that come into a step are those that went out of the last one if they differ by less, of their usual size."""
EXPLAINED = 1e-2
"""The share of its terms by which a recorded step may miss what its sampler's numbers say; bfloat16 leaves 2e-3."""
KEPT = 64
_known: dict[str, Sampler | str] = {}

Draw = Callable[[int], Tensor]
"""From how many numbers the latents of one picture have to the positions that are kept, (n,) int64."""


def numbers_of(scheduler: Any, *args: Any, **kwargs: Any) -> Sampler | str:
    """Return a scheduler's numbers, as it is at a run's first `step`, called with these arguments; or why it has none.

    Of tokens at several levels, those are meant that are noisiest: condition tokens stay as they are. Numbers that were
    read once are remembered by class, settings, times and options.
    """
    scheduler, given = unmarked(scheduler), samplers.bind(scheduler, *args, **kwargs)
    levels = given.get("per_token_timesteps")
    if isinstance(levels, Tensor):
        given["per_token_timesteps"] = torch.full_like(levels, float(levels.max()))
    key = _key(scheduler, given)
    if not key or key not in _known:
        try:
            found = samplers.of(scheduler, **given)
        except ValueError as error:
            found = str(error)
        if not key:
            return found
        if len(_known) >= KEPT:
            _known.clear()
        _known[key] = found
    return _known[key]


def refuse_noise(scheduler: Any, *args: Any, **kwargs: Any) -> Sampler | str:
    """Return what `numbers_of` does.

    Raises: ValueError if the scheduler adds noise.
    """
    found = numbers_of(scheduler, *args, **kwargs)
    known = isinstance(found, Sampler)
    if found.injects_noise if known else adds_noise(unmarked(scheduler), *args, **kwargs):
        raise noise_error(scheduler, "runs are recorded with")
    return found


def _key(scheduler: Any, given: Mapping[str, Any]) -> str:
    """Name what a run's numbers depend on; '' where they depend on more than can be named."""
    given = dict(given)
    shape, time = given.pop("sample").shape, given.pop("timestep", None)
    given.pop("model_output")
    given.pop("generator", None)
    if any(isinstance(value, (Tensor, list)) for value in given.values()):
        return ""
    times = torch.as_tensor(scheduler.timesteps).tolist()
    first = torch.as_tensor(time).flatten()[:1].tolist() if time is not None else None
    settings = dict(getattr(scheduler, "config", {}))
    return repr((type(scheduler), settings, times, first, getattr(scheduler, "begin_index", None), len(shape), given))


class _Slot(NamedTuple):
    """One call of `step`: whole tensors, and who was stepped."""

    scheduler: Any
    velocity: Tensor
    before: Tensor
    after: Tensor
    sampler: Sampler | str | None


class _Recording:
    """One run, tick by tick; of each tick the chosen positions are kept once it is over."""

    def __init__(self, moment: Moment, pictures: int, draw: Draw):
        self.moment, self._pictures, self._draw = moment, pictures, draw
        self.streams, self._calls, self._ran = Streams(), 0, 0
        self._mine: set[Stream] = set()
        self._before: set[Stream] = set()
        self._places: dict[str, int] = {}
        self._slots: list[_Slot] = []
        self._open = False
        self.begins: list[int] = []
        self.full: list[int] = []
        self.tokens: Tensor | None = None
        self.sampler: Sampler | str = "it was not stepped"
        self.velocity: list[Tensor] = []
        self.before: list[Tensor] = []
        self.after: list[Tensor] = []

    def call(self, name: str, stream: str | None, args: tuple, kwargs: dict) -> None:
        """Take note of a denoiser's call."""
        self.close()
        place = self._places[name] = self._places.get(name, -1) + 1
        self._mine.add(self.streams.find(Call(name, stream, args, kwargs, place), self.moment.ticks))
        self._calls += 1

    def run(self) -> None:
        """Take note that the denoiser really ran."""
        self._ran += 1

    def begin(self) -> None:
        """Begin a tick: the first `step` after the denoiser's calls."""
        tick = len(self.velocity)
        if not self._mine & self._before:
            self.begins.append(tick)
        if self._ran >= self._calls:
            self.full.append(tick)
        self._before, self._mine, self._places = self._mine, set(), {}
        self._calls = self._ran = 0
        self._open = True

    def step(self, slot: _Slot) -> None:
        """Keep a call of `step`. One of the same scheduler, or on the same latents, takes the place of an earlier one
        of its tick: some pipelines step a first time to see the data that is predicted, and set the scheduler back."""
        self._slots = [other for other in self._slots if not _repeated(other, slot)]
        self._slots.append(slot)

    def close(self) -> None:
        """End the tick: keep the chosen positions."""
        if not self._open:
            return
        self._open, slots, self._slots = False, self._slots, []
        if self.tokens is None:
            self.sampler = _one(slots)
        for kept, name in ((self.velocity, "velocity"), (self.before, "before"), (self.after, "after")):
            kept.append(self._keep([getattr(slot, name) for slot in slots]))

    def _keep(self, parts: Sequence[Tensor]) -> Tensor:
        if any(len(x) != self._pictures for x in parts if self._pictures > 1):
            shapes = ", ".join(str(tuple(x.shape)) for x in parts)
            raise ValueError(
                f"calls are recorded in one batch where latents have one row for each of its {self._pictures} "
                f"pictures, got {shapes}; record them one by one (batch_size=1)."
            )
        flat = torch.cat([x.reshape(self._pictures, -1) for x in parts], dim=1)
        if self.tokens is None:
            self._available = flat.shape[1]
            self.tokens = checked(self._draw(self._available), self._available)
        if flat.shape[1] != self._available:
            raise ValueError(
                f"the latents of a recorded run keep their size, got {flat.shape[1]} numbers after {self._available}; "
                "runs that grow their latents are accelerated with forecasters that need no training."
            )
        return flat[:, self.tokens.to(flat.device)].cpu()


def _repeated(one: _Slot, other: _Slot) -> bool:
    counts = one.scheduler is other.scheduler and hasattr(one.scheduler, "step_index")
    return counts or (one.before.shape == other.before.shape and torch.equal(one.before, other.before))


def _one(slots: Sequence[_Slot]) -> Sampler | str:
    """Return the numbers of the samplers of one tick, if they are the same."""
    first = slots[0].sampler
    for other in (slot.sampler for slot in slots):
        if not isinstance(first, Sampler) or not isinstance(other, Sampler):
            return first if isinstance(first, str) else other if isinstance(other, str) else "it was not read"
        if not (len(first) == len(other) and torch.allclose(first.response, other.response, rtol=1e-4, atol=1e-6)):
            return "the samplers of one step, as those of video and sound, have different numbers"
    assert first is not None
    return first


def checked(tokens: Tensor, available: int) -> Tensor:
    """Return positions to keep, on the CPU.

    Raises: ValueError if they are not among those available.
    """
    if not len(tokens) or tokens.min() < 0 or tokens.max() >= available:
        raise ValueError(f"tokens are positions from 0 to {available - 1}, got {tokens.tolist()}; see draw_tokens.")
    return tokens.cpu()


class SeamRecorder:
    """Listens to a pipeline's sampler, and to its denoisers for what they ran; around an acceleration that is there."""

    def __init__(self, pipe: Any, draw: Draw, pictures: int = 1):
        self._pipe, self._draw, self._pictures = pipe, draw, pictures
        self._clock = PipelineClock(pipe)
        self._clock.around_step = self._step
        self._runs: list[_Recording] = []
        self._stream: str | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        with ExitStack() as undo:
            undo.callback(self._clock.attach())
            for name in denoisers_of(self._pipe):
                denoiser = getattr(self._pipe, name)
                _check_output(denoiser)
                undo.callback(intercept(denoiser, "__call__", partial(self._call, name)))
                undo.callback(intercept(denoiser, "__call__", self._run, inner=True))
                undo.callback(hear(denoiser, self._within))
            yield

    @contextmanager
    def _within(self, stream: str) -> Iterator[None]:
        outer, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = outer

    def _call(self, name: str, go_on: Callable, _denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
        moment = self._clock.now()
        self._heard = moment is not None
        if moment is not None:
            if not self._runs or self._runs[-1].moment is not moment:
                self._runs.append(_Recording(moment, self._pictures, self._draw))
            self._runs[-1].call(name, self._stream, args, kwargs)
        return go_on(*args, **kwargs)

    def _run(self, go_on: Callable, _denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._heard:
            self._runs[-1].run()
        return go_on(*args, **kwargs)

    def _step(self, go_on: Callable, scheduler: Any, args: tuple, kwargs: dict) -> Any:
        moment = self._clock.moment
        if not self._runs:
            return go_on(*args, **kwargs)
        run = self._runs[-1]
        if moment is not None and moment.called:
            run.begin()
        given = samplers.bind(scheduler, *args, **kwargs)
        read = numbers_of(scheduler, *args, **kwargs) if run.tokens is None else None
        velocity, before = (given[name].detach().clone() for name in ("model_output", "sample"))
        result = go_on(*args, **kwargs)
        after = result[0] if isinstance(result, tuple) else result.prev_sample
        run.step(_Slot(scheduler, velocity, before, after.detach().clone(), read))
        return result

    def trajectories(self, labels: Sequence[str], seeds: Sequence[int]) -> list[Trajectory]:
        """Return what was recorded, one for each picture; several runs of one call, its sections, side by side.

        Raises: ValueError if there is no run, or one is not whole, or sections have other grids.
        """
        runs = [run for run in self._runs if run.moment.ticks]
        for run in runs:
            run.close()
            _check_whole(run)
        if not runs:
            raise ValueError(
                f"a recorded call steps its scheduler, got a {type(self._pipe).__name__} that did not; record a "
                "pipeline whose loop calls its scheduler's step."
            )
        first = runs[0]
        if any(not _alike(first, run) for run in runs):
            raise ValueError(
                f"the {len(runs)} runs of a recorded call, its sections, walk one grid, got others; record a call "
                "with one section."
            )
        return _joined(runs, labels, seeds)


def _check_output(denoiser: nn.Module) -> None:
    """Raise ValueError if a denoiser is accelerated at a feature tap: there it runs on skipped steps as well."""
    mark = mark_of(denoiser)
    taps = mark.run.taps if mark is not None and mark.run is not None else ()
    for tap in (one for one in taps if (one != "output" if isinstance(one, str) else one.modules)):
        raise ValueError(
            f"runs that are recorded at the sampler are accelerated at the output, got the tap {tap!r}; accelerate "
            "with tap='output', or record at that tap (seam=False)."
        )


def _check_whole(run: _Recording) -> None:
    steps, done = len(run.moment.times) - 1 - run.moment.start, len(run.velocity)
    if done != steps:
        raise ValueError(f"a recorded run walks its whole grid of {steps} steps; this one stopped after {done}.")


def _alike(one: _Recording, other: _Recording) -> bool:
    mine, its = one.moment, other.moment
    same = mine.start == its.start and len(mine.times) == len(its.times) and torch.allclose(mine.times, its.times)
    return same and one.begins == other.begins and one.full == other.full


def _joined(runs: Sequence[_Recording], labels: Sequence[str], seeds: Sequence[int]) -> list[Trajectory]:
    first = runs[0]
    assert first.tokens is not None
    start, grid = first.moment.start, first.moment.times
    parts = [_latents(run) for run in runs]
    velocity = torch.cat([velocity for velocity, _, _ in parts], dim=2)
    latents = torch.cat([latents for _, latents, _ in parts], dim=2)
    sampler = next((found for _, _, found in parts if isinstance(found, str)), parts[0][2])
    velocity = torch.cat([velocity.new_zeros(start, *velocity.shape[1:]), velocity])
    latents = torch.cat([latents[:1].expand(start, *latents.shape[1:]), latents])
    shared: dict[str, Any] = dict(
        grid=grid,
        full=(*range(start), *(start + step for step in first.full)),
        tokens=first.tokens,  # of each section
        begins=tuple(start + step for step in first.begins),
        sampler=_padded(sampler, start) if isinstance(sampler, Sampler) else None,
        refusal=sampler if isinstance(sampler, str) else "",
    )
    found = []
    for k, (label, seed) in enumerate(zip(labels, seeds, strict=True)):
        passed = {ALL: velocity[:, k, :, None]}
        nothing = {ALL: velocity.new_zeros(len(velocity), 0)}
        kept = dict(features=passed, outputs=passed, conditioning=nothing)
        found.append(Trajectory(prompt=label, seed=seed, latents=latents[:, k, :, None], **kept, **shared))
    return found


def _latents(run: _Recording) -> tuple[Tensor, Tensor, Sampler | str]:
    """Return velocities (S, B, n), latents (S + 1, B, n), and the sampler's numbers or why there are none.

    Numbers that the pipeline rewrites in between its steps, as those that an inpainting keeps, are 0 in both: errors
    that a step leaves there are gone at the next.
    """
    velocity, before, after = (torch.stack(steps) for steps in (run.velocity, run.before, run.after))
    latents, sampler = torch.cat([before, after[-1:]]), run.sampler
    if isinstance(sampler, Sampler) and len(sampler) != len(velocity):
        sampler = f"its {len(velocity)} steps are read as {len(sampler)}"
    size = after[:-1].float().square().mean(dim=-1, keepdim=True).sqrt()
    free = ((before[1:] - after[:-1]).float().abs() <= REWRITTEN * size).all(dim=0)
    if not free.any():
        return velocity, latents, "the pipeline rewrites all of the latents in between its steps"
    if not free.all():
        warnings.warn(
            f"of the latents that were recorded, {1 - float(free.float().mean()):.0%} are rewritten in between steps; "
            "errors there do not last, and what is learned looks at the others.",
            stacklevel=2,
        )
    if isinstance(sampler, Sampler) and not sampler.injects_noise:
        missed = _missed(sampler, velocity * free, before * free, after * free)
        if missed > EXPLAINED:
            sampler = f"its numbers leave {missed:.0%} of a recorded step unexplained."
    return velocity * free, latents * free, sampler


def _missed(sampler: Sampler, velocity: Tensor, before: Tensor, after: Tensor) -> float:
    """Return by how much recorded steps miss what a sampler's numbers say, of the size of their terms."""
    worst = 0.0
    handed = torch.stack([before, velocity]).double()
    for step in range(len(velocity)):
        weights = torch.stack([sampler.latents[step], sampler.outputs[step]])
        terms = handed * weights[:, :, None, None]
        size = terms.flatten(2).norm(dim=2).sum()
        worst = max(worst, float((terms.sum(dim=(0, 1)) - after[step].double()).norm() / size))
    return worst


def _padded(sampler: Sampler, start: int) -> Sampler:
    """Put steps in front of a run that do nothing: it begins within its grid."""
    if not start:
        return sampler
    total = start + len(sampler)
    latents, outputs = (torch.zeros(total, total, dtype=torch.float64) for _ in range(2))
    latents[:start, :start] = torch.eye(start, dtype=torch.float64)
    latents[start:, start:], outputs[start:, start:] = sampler.latents, sampler.outputs
    draws = sampler.noise.shape[1]
    return Sampler(latents, outputs, torch.cat([sampler.noise.new_zeros(start, draws), sampler.noise]))
