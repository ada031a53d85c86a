"""Find out what a run is known by, at its sampler's first step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lesa.host.clock import Moment, PipelineClock, argument, start_of
from lesa.host.conditions import Noise
from lesa.host.denoiser import attach, denoisers_of
from lesa.host.streams import hear, name_of
from lesa.host.structure import leaves
from lesa.predictors.facts import UNEXPLAINED, Facts, Mixture
from lesa.rows.guidance import Guidance
from lesa.rows.tap import Tap

__all__ = ["Facts", "Heard", "Mixture", "listen"]

RESIDUE = 0.01
"""Where sums of outputs leave more than this share of the streams' distance, norms may have been rescaled."""


class Heard:
    """What the denoisers' calls of a run's first step gave, by their names, and which numbers they were given."""

    def __init__(self) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.embedded: Tensor | None = None  # of the newest call
        self._embedded: list[Tensor] = []

    def hear(self, name: str, kwargs: Mapping[str, Any], output: Any) -> None:
        """Take the name of a call, its named arguments and what it returned."""
        found = next((x for _, x in leaves(output) if isinstance(x, Tensor)), None)
        if found is not None:
            self.outputs[name] = found.detach()
        self.embedded = given = kwargs.get("guidance")
        if isinstance(given, Tensor):
            self._embedded.append(given)

    def facts(self, moment: Moment, noise: Noise, scheduler: Any, args: tuple, kwargs: dict) -> Facts:
        """Return the facts of a run, given its scheduler's first `step`."""
        numbers = {round(float(x), 4) for given in self._embedded for x in given.flatten().float()}
        latents, velocity = (argument(scheduler, name, args, kwargs) for name in ("sample", "model_output"))
        return Facts(
            times=tuple(moment.times.tolist()),
            start=start_of(scheduler, args, kwargs, moment),
            shape=tuple(latents.shape[1:]),
            sampler=type(scheduler).__name__,
            noise=noise.is_added(scheduler, args, kwargs),
            streams=tuple(self.outputs),
            guidance=mixture(list(self.outputs.values()), velocity, latents),
            embedded=tuple(sorted(numbers)),
        )


def mixture(outputs: Sequence[Tensor], velocity: Tensor, latents: Tensor | None = None) -> Mixture | None:
    """Measure what a velocity is made of: whole outputs, or the parts of one that is a batch so many times larger.

    Where these leave much of it unexplained the latents, which some pipelines add to it, are among the parts, without
    a weight of their own. None where there is one part alone, or the outputs are of another form, or nothing moves.
    """
    parts = [part for output in outputs for part in _parts(output, velocity)]
    size = float(velocity.detach().float().norm())
    if len(parts) < 2 or len(parts) < len(outputs) or size == 0:
        return None
    weights, left = _least_squares(parts, velocity)
    if left > UNEXPLAINED and latents is not None and latents.shape == velocity.shape:
        weights, left = _least_squares([*parts, latents], velocity)
    stacked = torch.stack([part.float() for part in parts])
    apart = float((stacked - stacked.mean(dim=0)).norm()) / size
    found = Mixture(_rounded(weights[: len(parts)]), round(left, 6), round(apart, 6))
    others = _rescaled(parts, velocity, apart) if left > RESIDUE * apart else []
    return min([found, *others], key=lambda one: one.unexplained)


def _least_squares(parts: Sequence[Tensor], velocity: Tensor) -> tuple[list[float], float]:
    """Return the weights of the sum of parts that is nearest to a velocity, and the share that it leaves."""
    flat = torch.stack([part.detach().flatten() for part in parts], dim=1).float()
    target = velocity.detach().flatten().float()
    inner, onto = (flat.T @ flat).double().cpu(), (flat.T @ target).double().cpu()
    weights = torch.linalg.lstsq(inner, onto.unsqueeze(1), driver="gelsd").solution.flatten()
    return weights.tolist(), float((flat @ weights.to(flat) - target).norm() / target.norm())


def _rescaled(parts: Sequence[Tensor], velocity: Tensor, apart: float) -> list[Mixture]:
    """Measure classifier-free guidance of two streams under which tokens keep the norms of the one with condition."""
    if len(parts) != 2 or velocity.ndim < 2:
        return []
    as_tokens = [part.float().reshape(len(part), -1, part.shape[-1]) for part in parts]
    target, found = velocity.detach().float().reshape(as_tokens[0].shape), []
    for names in (("cond", "uncond"), ("uncond", "cond")):
        guidance, left = Guidance.between(names, torch.stack(as_tokens, dim=1), target)
        found.append(Mixture(_rounded(guidance.weights.tolist()), round(left, 6), round(apart, 6), guidance.rescaled))
    return found


def _rounded(weights: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(weight, 4) for weight in weights)


def _parts(output: Tensor, velocity: Tensor) -> list[Tensor]:
    """Cut an output into batches as large as the velocity's; an output may have tokens or channels that are not moved.

    Returns none where it is of another form.
    """
    if output.ndim != velocity.ndim or not len(velocity) or len(output) % len(velocity):
        return []
    if any(n < m for n, m in zip(output.shape, velocity.shape, strict=True)):
        return []
    moved = tuple(slice(0, n) for n in velocity.shape[1:])
    return [part[(slice(None), *moved)] for part in output.split(len(velocity))]


class _Full:
    """Passage of a call that runs in any case, and is listened to."""

    def __init__(self, hear: Callable[[Any], None]):
        self.full, self._hear = True, hear

    def returned(self, output: Any) -> None:
        self._hear(output)

    def keep(self, feature: Any, part: int = 0) -> None:
        return None

    def fits(self, feature: Any, part: int = 0) -> bool:
        return True

    def forecast(self, part: int = 0) -> Any:
        raise NotImplementedError


class _Listener:
    """Listens to the runs of a pipeline, each until its first step."""

    def __init__(self, pipe: Any, on_facts: Callable[[Facts], object]):
        self.found: list[Facts] = []
        self._on_facts = on_facts
        self._noise, self._heard = Noise(), Heard()
        self._moment: Moment | None = None
        self._places: dict[str, int] = {}
        self._name = threading.local()
        self.clock = PipelineClock(pipe)
        self.clock.on_first_step, self.clock.on_tick = self._first_step, self.clock.end

    def begin(self, denoiser: str, _args: tuple, kwargs: dict) -> _Full | None:
        """Take note of a call of a denoiser."""
        moment = self.clock.now()
        if moment is None:
            return None
        if moment is not self._moment:
            self._moment, self._heard, self._places = moment, Heard(), {}
        place = self._places[denoiser] = self._places.get(denoiser, -1) + 1
        name = name_of(denoiser, getattr(self._name, "now", None), place)
        return _Full(partial(self._heard.hear, name, kwargs))

    @contextmanager
    def within(self, name: str) -> Iterator[None]:
        """Let the calls of this thread be a stream's."""
        outer, self._name.now = getattr(self._name, "now", None), name
        try:
            yield
        finally:
            self._name.now = outer

    def _first_step(self, scheduler: Any, args: tuple, kwargs: dict) -> None:
        moment, self._moment = self._moment, None
        if moment is not None:
            self.found.append(self._heard.facts(moment, self._noise, scheduler, args, kwargs))
            self._heard = Heard()
            self._on_facts(self.found[-1])


@contextmanager
def listen(
    pipe: Any,
    denoisers: Sequence[str] | None = None,
    on_facts: Callable[[Facts], object] = lambda _facts: None,
) -> Iterator[list[Facts]]:
    """Give the list to which the facts of every run of a pipeline are added, at its first step.

        with listen(pipe) as facts:
            pipe("small red apple on blue, left")
        print(facts[0].steps)

    It is the same list for accelerated runs. `denoisers` names the modules that its loop calls, as for
    `lesa.accelerate`; `on_facts` is called with the facts as they are added, and ends the run there if it raises.

    Raises: ValueError if it has none, or no scheduler that tells its steps.
    """
    listener = _Listener(pipe, on_facts)
    names = denoisers_of(pipe, denoisers)
    with ExitStack() as undo:
        undo.callback(listener.clock.attach())
        for name in names:
            module: nn.Module = getattr(pipe, name)
            undo.callback(attach(module, Tap(), partial(listener.begin, "" if name == names[0] else name)))
            undo.callback(hear(module, listener.within))
        yield listener.found
