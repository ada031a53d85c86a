"""The sampler as numbers: what a scheduler's `step` makes of latents, outputs and noise, found by impulses on a copy.

Whatever a sampler remembers of its past, each of its steps is linear in what it was handed so far,

    x_{s+1} = sum_{j <= s} latents[s, j] x_j + sum_{k <= s} outputs[s, k] v_k + sum_d noise[s, d] e_d

with x_j and v_k the latents and outputs handed to `step` at steps j and k, and e_d the unit noise of its random draws.
Running a copy on impulses reads these numbers off for any class, with nothing known of it. A sampler that clips is no
such sum, and is refused by name.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TOLERANCE = 1e-4
"""How far a step may be from its sum, relative to the sum's terms: far above float32's rounding, below any clipping."""

NOT_AFFINE = ("clip_sample", "clip_denoised", "thresholding")
"""Settings under which a step is no weighted sum."""

NEIGHBOURS = {"timestep_back": -1, "prev_timestep": 1, "r_timestep": 1}
"""Arguments of `step` that are another step's timestep: how many steps on."""

Call = dict[str, Any]
"""The arguments of one call of `step`, by name."""


@dataclass(frozen=True, eq=False)
class Sampler:
    """Hold the S steps of a run as numbers (float64, on the CPU), per step and chained.

    The chained numbers hold where each step is handed the latents that the last one gave. A pipeline that rewrites the
    latents in between (inpainting) has the numbers per step alone.
    """

    latents: Tensor
    """(S, S): coefficient of the latents x_j in x_{s+1}; 0 for j > s."""
    outputs: Tensor
    """(S, S): coefficient of the output v_k in x_{s+1}; 0 for k > s."""
    noise: Tensor
    """(S, D): coefficient in x_{s+1} of the D random draws of the run, in their order."""

    def __len__(self) -> int:
        """Return the number of steps S."""
        return len(self.outputs)

    @property
    def injects_noise(self) -> bool:
        """Tell whether noise enters the latents; a draw that no step uses does not count."""
        return bool((self.noise != 0).any())

    @property
    def decay(self) -> Tensor:
        """Return dx_s / dx_0, shape (S + 1,); decay[0] = 1."""
        return self._chained[:, 0]

    @property
    def response(self) -> Tensor:
        """Return dx_s / dv_k, shape (S + 1, S); response[0] = 0."""
        return self._chained[:, 1 : 1 + len(self)]

    @property
    def noise_response(self) -> Tensor:
        """Return dx_s / de_d, shape (S + 1, D); noise_response[0] = 0."""
        return self._chained[:, 1 + len(self) :]

    @cached_property
    def _chained(self) -> Tensor:
        fresh = torch.cat([self.outputs, self.noise], 1)
        chained = fresh.new_zeros(len(self) + 1, 1 + fresh.shape[1])
        chained[0, 0] = 1
        for s in range(len(self)):
            chained[s + 1] = self.latents[s, : s + 1] @ chained[: s + 1]
            chained[s + 1, 1:] += fresh[s]
        return chained


def of(scheduler: Any, *args: Any, **kwargs: Any) -> Sampler:
    """Read a run's numbers off a copy of `scheduler`, as it is at the run's first `step`, called with these arguments.

    The later calls follow from the first: the next of the scheduler's `timesteps` each, what `step` wants handed back
    (`old_pred_original_sample`), everything else as it was. Neither the scheduler nor a generator nor a global random
    state changes. The copy carries whatever the scheduler's `__dict__` does, and its class's `step` is called: who
    patches that has to look away meanwhile.

    Raises: ValueError if a step is no weighted sum (the sampler clips), if its numbers differ from place to place of
        the latents, or if the later calls do not follow from the first.
    """
    first = bind(scheduler, *args, **kwargs)
    return read(scheduler, _calls(scheduler, first))


def bind(scheduler: Any, *args: Any, **kwargs: Any) -> Call:
    """Return the arguments of a call of the scheduler's `step` by name.

    Raises: ValueError if the output is not of the latents' shape (a denoiser that predicts variances too).
    """
    call = dict(inspect.signature(scheduler.step).bind(*args, **kwargs).arguments)
    output, sample = call["model_output"].shape, call["sample"].shape
    if output != sample:
        raise ValueError(
            f"the output that a sampler is handed has the shape of the latents, {tuple(sample)}, got {tuple(output)}; "
            "use a denoiser that predicts no variances."
        )
    return call


def read(scheduler: Any, calls: Sequence[Call]) -> Sampler:
    """Read a run's numbers off a copy of `scheduler`, as it is before the first of the run's `calls`.

    Raises: ValueError if a step is no weighted sum, or if its numbers differ from place to place of the latents.
    """
    return _read(scheduler, calls, draws=0)


def _read(scheduler: Any, calls: Sequence[Call], draws: int) -> Sampler:
    """Read the numbers of a run with so many random draws; if it turns out to have more, read again with these."""
    steps, inputs = len(calls), 2 * len(calls) + draws
    mixed = torch.randn(inputs, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed[:, 1] *= 1024
    run = _Run(scheduler, calls, torch.cat([torch.eye(inputs, dtype=torch.float64), mixed], 1))
    if run.draws > draws or len(run.latents) < steps:
        return _read(scheduler, calls[: len(run.latents)], run.draws)
    numbers = torch.stack([_numbers(scheduler, s, latents, mixed) for s, latents in enumerate(run.latents)])
    return Sampler(*numbers.split([steps, steps, draws], dim=1))


def _numbers(scheduler: Any, step: int, latents: Tensor, mixed: Tensor) -> Tensor:
    """Return a step's coefficients, shape (inputs,), from the latents it gave: places x (impulses, mixed inputs).

    Raises: ValueError if the places differ, or if the mixed inputs do not give what the coefficients say.
    """
    coefficients = latents[0, : len(mixed)]
    expected = torch.cat([coefficients, coefficients @ mixed])
    terms = torch.cat([coefficients.abs().amax().expand(len(mixed)), coefficients.abs() @ mixed.abs()])
    # Not "any above": numbers that are not finite have to be refused too.
    if ((latents - expected).abs() <= TOLERANCE * terms).all():
        return coefficients
    raise ValueError(
        f"a sampler as numbers gives each step as one weighted sum of latents and outputs, which step {step} of this "
        f"{type(scheduler).__name__} is not: {_cause(scheduler, coefficients)}"
    )


def _cause(scheduler: Any, coefficients: Tensor) -> str:
    """Say why a step is no weighted sum, as far as the scheduler's settings tell, and what to do."""
    config = getattr(scheduler, "config", {})
    if settings := [name for name in NOT_AFFINE if config.get(name)]:
        return f"it clips its data prediction ({settings[0]}=True); set {settings[0]}=False."
    if not coefficients.isfinite().all():
        return "its coefficients are not finite; use time steps and a prediction type that it can divide by."
    return "what it gives depends on the values or on their place; use a sampler that treats all values alike."


class _Run:
    """Run a copy of a scheduler on inputs that stand side by side in the last dimension of the latents.

    `inputs` holds a row for the latents of each step, one for the output of each, and one for each random draw; draws
    without a row are 0. The other dimensions are places: each is handed the same, times a power of 2 of its own.
    `latents` lists what the steps gave, shape (places, inputs), these powers taken out; `draws` counts the draws.
    """

    def __init__(self, scheduler: Any, calls: Sequence[Call], inputs: Tensor) -> None:
        """Run all `calls`, but the last where it is the end of the run alone (SCM's last timestep)."""
        sample = calls[0]["sample"]
        places = 2 ** (sample.ndim - 1)
        self._inputs = inputs.to(sample.device, torch.float32 if sample.device.type == "mps" else torch.float64)
        self._powers = 2.0 ** (torch.arange(places, device=sample.device) * 5 % 13 - 1).to(self._inputs)[:, None]
        self._shape = (2,) * (sample.ndim - 1) + inputs.shape[1:]
        self._steps = len(calls)
        self.latents: list[Tensor] = []
        self.draws = 0
        with _undisturbed(sample.device), _Draws(self.draw):
            self._run(copy.deepcopy(scheduler), calls)

    def _run(self, scheduler: Any, calls: Sequence[Call]) -> None:
        back = None
        for s, call in enumerate(calls):
            try:
                result = scheduler.step(**{name: self._argument(call, name, s, back) for name in call})
            except IndexError:
                if s == 0 or s + 1 < len(calls):
                    raise
                return
            back = result[1] if "old_pred_original_sample" in call else None
            latents = result[0].reshape(len(self._powers), -1) / self._powers
            self.latents.append(latents.to("cpu", torch.float64))

    def _argument(self, call: Call, name: str, step: int, back: Tensor | None) -> Any:
        """Return an argument of the call at `step`, with all that has the latents' shape put in terms of the inputs."""
        value, sample = call[name], call["sample"]
        if name == "old_pred_original_sample":
            return back
        if isinstance(value, list) and value and isinstance(value[0], torch.Generator):
            value = value[0]  # one for each picture of the batch
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if name == "timestep":
            return value if len(value) == 1 else value[:1].expand(self._shape[0])
        if value is sample:
            return self._place(step)
        if value is call["model_output"]:
            return self._place(self._steps + step)
        return value.new_zeros(self._shape) if value.shape == sample.shape else value

    def _place(self, row: int) -> Tensor:
        return (self._powers * self._inputs[row]).reshape(self._shape)

    def draw(self, drawn: Tensor) -> Tensor:
        """Return what a random draw gives in place of `drawn`: its row of the inputs, or 0.

        Raises: ValueError if noise does not have the latents' shape.
        """
        if drawn.ndim == 0 or drawn.dtype == torch.int64:
            return drawn.zero_()
        if drawn.shape != self._shape:
            raise ValueError(
                f"the noise of a sampler has the shape of its latents, {self._shape}, got {tuple(drawn.shape)}; use a "
                "sampler that draws its noise value by value."
            )
        row = 2 * self._steps + self.draws
        self.draws += 1
        return drawn.copy_(self._place(row)) if row < len(self._inputs) else drawn.zero_()


class _Draws(TorchDispatchMode):
    """Hand every random draw to `draw`, which writes over it."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._draw = draw

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawn = func(*args, **(kwargs or {}))
        return self._draw(drawn) if torch.Tag.nondeterministic_seeded in func.tags else drawn


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Leave the global random states as they are, and no trace in autograd; ignore an autocast of the caller's."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def _calls(scheduler: Any, first: Call) -> list[Call]:
    """Return the calls of a whole run from its first.

    Raises: ValueError if tokens or frames have timesteps of their own: what the later ones are, the first does not tell.
    """
    time = first["timestep"]
    if first.get("per_token_timesteps") is not None or (isinstance(time, Tensor) and time.unique().numel() > 1):
        raise ValueError(
            f"a sampler as numbers has one timestep a step, got a {type(scheduler).__name__} that is handed some for "
            "each token or frame; use the recorded calls of a run, or a pipeline without such conditions."
        )
    times = scheduler.timesteps[start_of(scheduler, time) :]
    neighbours = {name: steps for name, steps in NEIGHBOURS.items() if name in first}
    return [first] + [
        first
        | {"timestep": _like(time, times[s])}
        | {name: times[s + k] if s + k < len(times) else None for name, k in neighbours.items()}
        for s in range(1, len(times))
    ]


def start_of(scheduler: Any, time: Any) -> int:
    """Return the place of a run's first timestep among the scheduler's.

    Raises: ValueError if it is not among them.
    """
    if (index := getattr(scheduler, "begin_index", None)) is not None:
        return index
    value = time.flatten()[0].to(scheduler.timesteps) if isinstance(time, Tensor) else time
    found = (scheduler.timesteps == value).nonzero()
    if not len(found):
        raise ValueError(
            f"a run starts at one of its scheduler's timesteps, got {float(value):g}, which this "
            f"{type(scheduler).__name__} has not; call set_timesteps first."
        )
    # Where times repeat (Heun), a scheduler that counts may take another than the first of them for its start.
    ask = getattr(scheduler, "index_for_timestep", None)
    return int(ask(value)) if ask else int(found[0])


def _like(first: Any, time: Tensor) -> Any:
    """Return `time` in the form of the first call's timestep: a number, or a tensor of its shape."""
    if isinstance(first, Tensor):
        return time.to(first).expand(first.shape)
    return type(first)(time.item())
