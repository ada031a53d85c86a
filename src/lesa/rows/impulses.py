"""A run of a scheduler's copy on impulses: the latents that its steps give for inputs known beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Call = dict[str, Any]
"""The arguments of one call of `step`, by name."""

OFFSETS = ("variance_noise", "dmd_noisy_tensor")
"""Arguments of `step`, of the latents' shape, that shift what it gives: they are no part of its coefficients."""


class Run:
    """Run a copy of a scheduler on inputs that stand side by side in the last dimension of the latents.

    `inputs` holds a row for the latents of each step, one for the output of each, and one for each random draw; draws
    without a row are 0. The other dimensions are places: each is handed the same, times a power of 2 of its own.
    `latents` lists what the steps gave, shape (places, inputs), these powers taken out; `draws` counts the draws. One
    that is made again, from the seed that it came from (as a tree of Brownian motion does), is the same draw.
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
        self._rows: dict[bytes, int] = {}  # of the draws, by the numbers drawn
        self._generators: dict[int, torch.Generator] = {}
        with _undisturbed(sample.device), _Draws(self._draw):
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
        """Return an argument of the call at `step`, with all that has the latents' shape put in terms of the inputs.

        Raises: ValueError if a tensor has a value for each place, and nothing tells what it is.
        """
        value = call[name]
        if name == "old_pred_original_sample":
            return back
        if name == "sample":
            return self._place(step)
        if name == "model_output" or value is call["model_output"]:  # Cosmos hands its output over as the data too
            return self._place(self._steps + step)
        if isinstance(value, list) and value and isinstance(value[0], torch.Generator):
            value = value[0]  # one for each picture of the batch
        if isinstance(value, torch.Generator):
            return self._generators.setdefault(id(value), value.clone_state())  # it goes on from step to step
        if name in OFFSETS and isinstance(value, Tensor):
            return value.new_zeros(self._shape)
        if not isinstance(value, Tensor) or value.numel() == 1:
            return value
        if name == "timestep":
            return value[:1].expand(self._shape[0])
        if name == "per_token_timesteps":
            return value[(slice(1),) * value.ndim]
        if value.ndim == 1:
            return value
        raise ValueError(
            f"a sampler as numbers treats all values of the latents alike, got {name} of shape {tuple(value.shape)}, "
            "with a value for each place; leave it out, or use another sampler."
        )

    @property
    def draws(self) -> int:
        return len(self._rows)

    def _place(self, row: int) -> Tensor:
        return (self._powers * self._inputs[row]).reshape(self._shape)

    def _draw(self, drawn: Tensor) -> Tensor:
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
        row = 2 * self._steps + self._rows.setdefault(drawn.double().cpu().numpy().tobytes(), self.draws)
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
