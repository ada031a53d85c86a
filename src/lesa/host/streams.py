"""Tell the calls of one step apart: which conditioning a call brings, and which of several alike it is.

Guidance calls a denoiser more than once a step, and most pipelines name none of these calls. What a call brings beside
latents and time lasts from step to step: the very objects, or equal ones where a pipeline makes them anew. So a call
goes on with the stream whose conditioning it brings. One that fits none is a new stream, as is one of other shapes, or
one that comes back after a step without it: guidance may begin, end or pause within a run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lesa.host.denoiser import compiled_from
from lesa.host.intercept import intercept
from lesa.host.structure import leaves

FIRST = "cond"
"""The name of a step's first call where the pipeline names none."""
PLAIN = (bool, int, float, complex, str, bytes, type(None))
_MISSING = object()


class Call:
    """One call of a denoiser, as far as it tells its stream: what goes in, and of which shapes.

    `name` is the stream's name where the pipeline says it, `place` which call of its step it is, from 0 on. Where the
    loop itself tells its streams, `told`, only shapes, and what kind of answer is asked for, are looked at besides.
    """

    def __init__(self, denoiser: str, name: str | None, args: tuple, kwargs: dict, place: int, told: bool = False):
        self.denoiser, self.name, self.place = denoiser, name, place
        self.inputs = dict(leaves((args, kwargs)))
        shapes = ((path, tuple(x.shape), x.device) for path, x in self.inputs.items() if isinstance(x, Tensor))
        self.kind: Hashable = (denoiser, name, tuple(shapes), kwargs.get("return_dict"))
        if told:
            self.inputs = {}

    def repeats(self, path: tuple, other: Call) -> bool:
        """Tell whether two calls bring the very same object there, or the same number or text."""
        x, y = self.inputs[path], other.inputs.get(path, _MISSING)
        return x is y or (isinstance(x, PLAIN) and type(x) is type(y) and x == y)

    def equals(self, path: tuple, other: Call) -> bool:
        """Tell whether two calls bring tensors of the same values there."""
        x, y = self.inputs[path], other.inputs.get(path, _MISSING)
        return isinstance(x, Tensor) and isinstance(y, Tensor) and x.dtype == y.dtype and torch.equal(x, y)


class Stream:
    """The calls that belong together from step to step, as their conditioning tells.

    What repeats from its first call to its second, object by object, has to repeat in all of its calls. What is equal
    there, though made anew (a pipeline may cast its prompt at every step, and a time may come twice), counts as well.
    """

    def __init__(self, call: Call, step: int):
        self.first, self.newest, self.step = call, call, step
        self._before = call
        self._match = 0
        self._repeating: set[tuple] | None = None  # paths, once it was called twice
        self._equal: set[tuple] = set()

    def fit(self, call: Call) -> int:
        """Return how much of its conditioning a call brings, or -1 if it is another stream's."""
        if call.kind != self.first.kind:
            return -1
        return self._fit(self.newest, call)

    def _fit(self, mine: Call, call: Call) -> int:
        if self._repeating is None:
            return sum(mine.repeats(path, call) or mine.equals(path, call) for path in mine.inputs)
        if not all(mine.repeats(path, call) for path in self._repeating):
            return -1
        return len(self._repeating) + sum(mine.equals(path, call) for path in self._equal)

    def follow(self, call: Call, step: int, match: int) -> None:
        """Go on with a call that fits so well."""
        mine = self.newest
        if self._repeating is None:
            self._repeating = {path for path in mine.inputs if mine.repeats(path, call)}
            self._equal = {path for path in mine.inputs.keys() - self._repeating if mine.equals(path, call)}
        self._before, self._match = mine, match
        lasting = self._repeating | self._equal
        call.inputs = {path: x for path, x in call.inputs.items() if path in lasting}  # latents are let go
        self.newest, self.step = call, step

    def rather(self, call: Call) -> bool:
        """Tell whether a call of the same step would have fitted better than the one that was taken."""
        before = self._before
        shared = sum(before.repeats(path, call) or before.equals(path, call) for path in before.inputs)
        return call.kind == self.first.kind and shared > self._match


class Streams:
    """The streams of one run."""

    def __init__(self) -> None:
        self._streams: list[Stream] = []

    def __contains__(self, stream: Stream) -> bool:
        return stream in self._streams

    def find(self, call: Call, step: int) -> Stream:
        """Return the stream of a call; a new one's `first` call is this one.

        Raises: RuntimeError if the conditioning leaves open whose call it is.
        """
        self._streams = [stream for stream in self._streams if stream.step >= step - 1]
        fits = [(stream.fit(call), stream) for stream in self._streams if stream.step == step - 1]
        best, stream = max(fits, key=lambda fit: fit[0], default=(-1, None))
        if stream is not None and best >= 0:
            stream.follow(call, step, best)
            return stream
        known = [taken for taken in self._streams if taken.step == step and taken.newest is not taken.first]
        if any(taken.rather(call) for taken in known):
            raise RuntimeError(
                f"the streams of a step are told apart by the conditioning of their calls, got calls at step {step} "
                "that leave it open which of them goes on; name them: lesa.accelerate(..., stream_of=...)."
            )
        self._streams.append(Stream(call, step))
        return self._streams[-1]


def name_of(denoiser: str, name: str | None, place: int) -> str:
    """Name a stream: as the pipeline does, or by its place in the step; in front its denoiser, but for the first."""
    own = name or (FIRST if place == 0 else f"call {place + 1}")
    return f"{denoiser}.{own}" if denoiser else own


def hear(denoiser: nn.Module, within: Callable[[str], AbstractContextManager]) -> Callable[[], None]:
    """Enter `within(name)` wherever a pipeline says its stream's name with `denoiser.cache_context(name)`.

    It needs none of diffusers' private interfaces, and does nothing where a denoiser has no `cache_context`. Returns
    the call that undoes it.
    """
    denoiser = compiled_from(denoiser)
    if not hasattr(type(denoiser), "cache_context"):
        return lambda: None

    @contextmanager
    def named(go_on: Callable, _denoiser: nn.Module, name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with within(name), go_on(name, *args, **kwargs):
            yield

    return intercept(denoiser, "cache_context", named)
