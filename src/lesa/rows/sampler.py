"""The sampler as numbers: what a scheduler's `step` makes of latents, outputs and noise, found by impulses on a copy.

Whatever a sampler remembers of its past, each of its steps is linear in what it was handed so far,

    x_{s+1} = sum_{j <= s} latents[s, j] x_j + sum_{k <= s} outputs[s, k] v_k + sum_d noise[s, d] e_d

with x_j and v_k the latents and outputs handed to `step` at steps j and k, and e_d the unit noise of its random draws.
Running a copy on impulses reads these numbers off for any class, with nothing known of it. A sampler that clips is no
such sum, and is refused by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lesa.rows.impulses import Call, Run

TOLERANCE = 1e-4
"""How far a step may be from its sum, relative to the sum's terms: far above float32's rounding, below any clipping."""

NOT_AFFINE = ("clip_sample", "clip_denoised", "thresholding")
"""Settings under which a step is no weighted sum."""

MOVING = {"timestep": 0, "per_token_timesteps": 0, "timestep_back": -1, "prev_timestep": 1, "r_timestep": 1}
"""Arguments of `step` that go with the timesteps, and how many steps ahead of its own they are."""


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

    The later calls follow from the first: the next of the scheduler's `timesteps` each, to their end, what `step` wants
    handed back (`old_pred_original_sample`), everything else as it was. Neither the scheduler nor a generator nor a
    global random state changes. The copy carries whatever the scheduler's `__dict__` does, and its class's `step` is
    called: who patches that has to look away meanwhile.

    Raises: ValueError if a step is no weighted sum (the sampler clips), if its numbers differ from place to place of
        the latents, or if the later calls do not follow from the first.
    """
    first = bind(scheduler, *args, **kwargs)
    return read(scheduler, _calls(scheduler, first))


def bind(scheduler: Any, *args: Any, **kwargs: Any) -> Call:
    """Return the arguments of a call of the scheduler's `step` by name.

    Raises: ValueError if the output is not of the latents' shape (as where variances are predicted too).
    """
    call = dict(inspect.signature(scheduler.step).bind(*args, **kwargs).arguments)
    output, sample = call["model_output"].shape, call["sample"].shape
    if output != sample:
        raise ValueError(
            f"the output that a sampler is handed has the shape of the latents, {tuple(sample)}, got {tuple(output)}; "
            "use a denoiser that predicts this and no more."
        )
    return call


def read(scheduler: Any, calls: Sequence[Call]) -> Sampler:
    """Read a run's numbers off a copy of `scheduler`, as it is before the first of the run's `calls`.

    Raises: ValueError if a step is no weighted sum, or if its numbers differ from place to place of the latents.
    """
    for call in calls:
        _check_one_level(call)
    return _read(scheduler, calls, draws=0)


def _read(scheduler: Any, calls: Sequence[Call], draws: int) -> Sampler:
    """Read the numbers of a run with so many random draws; if it turns out to have more, read again with these."""
    steps, inputs = len(calls), 2 * len(calls) + draws
    mixed = torch.randn(inputs, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mixed[:, 1] *= 1024
    run = _run(scheduler, calls, torch.cat([torch.eye(inputs, dtype=torch.float64), mixed], 1))
    if run.draws > draws or len(run.latents) < steps:
        return _read(scheduler, calls[: len(run.latents)], run.draws)
    numbers = torch.stack([_numbers(scheduler, s, latents, mixed) for s, latents in enumerate(run.latents)])
    return Sampler(*numbers.split([steps, steps, draws], dim=1))


def _run(scheduler: Any, calls: Sequence[Call], inputs: Tensor) -> Run:
    """Run a scheduler's copy on these inputs.

    Raises: ValueError if it cannot be run on anything but its own latents.
    """
    try:
        return Run(scheduler, calls, inputs)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"a sampler as numbers takes latents of any values and of any size, which this {type(scheduler).__name__} "
            f"does not ({type(error).__name__}: {error}); use another sampler."
        ) from error


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


def _calls(scheduler: Any, first: Call) -> list[Call]:
    """Return the calls of a whole run from its first, to the end of the scheduler's timesteps."""
    start = start_of(scheduler, first["timestep"])
    return [first] + [
        first | {name: _later(scheduler, first, name, step) for name in first if name in MOVING}
        for step in range(start + 1, len(scheduler.timesteps))
    ]


def _later(scheduler: Any, first: Call, name: str, step: int) -> Any:
    """Return what an argument that goes with the timesteps is at a later step, in the form of the first call."""
    place = step + MOVING[name]
    if place == len(scheduler.timesteps):
        return None
    time = scheduler.timesteps[place]
    if name == "per_token_timesteps":
        return first[name].clamp(max=time.to(first[name]))  # what is already below waits
    form = first["timestep"]
    return time.to(form).expand(form.shape) if isinstance(form, Tensor) else type(form)(time.item())


def _check_one_level(call: Call) -> None:
    """Check that a step has one noise level.

    Raises: ValueError if tokens or frames have timesteps of their own.
    """
    for name in ("timestep", "per_token_timesteps"):
        value = call.get(name)
        if isinstance(value, Tensor) and value.unique().numel() > 1:
            raise ValueError(
                f"a sampler as numbers has one noise level a step, got {value.unique().numel()} in {name}; read the "
                "numbers of each kind of tokens or frames on its own, from their part of the latents."
            )


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
