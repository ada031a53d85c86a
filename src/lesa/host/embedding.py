"""What denoisers make of times before anything else: the vectors by which their blocks are told the noise level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WAVES, EMBEDDING = "Timesteps", "TimestepEmbedding"
"""What diffusers calls the waves that tell a time, and the layers that these go through."""
SCALE = 1000.0
"""By what a time under flow matching is multiplied for the waves."""


def embedding_of(
    denoisers: Iterable[nn.Module], scheduler: Any, times: Sequence[float]
) -> Callable[[Tensor], Tensor] | None:
    """Return a call that embeds times as these denoisers do, (n,) to (n, numbers) float64 on the CPU.

    A transformer's blocks do not run for it. None if no denoiser has an embedding of diffusers' kind, or the scheduler,
    about to walk these `times` and the last one, does not tell it a time as `SCALE` times that.
    """
    told = torch.as_tensor(scheduler.timesteps).double().cpu() if hasattr(scheduler, "timesteps") else torch.empty(0)
    wanted = SCALE * torch.as_tensor(times, dtype=torch.float64)[:-1]
    pairs = [pair for denoiser in denoisers if (pair := _parts(denoiser)) is not None]
    if not pairs or told.shape != wanted.shape or not torch.allclose(told, wanted, rtol=1e-3, atol=0.1):
        return None
    return partial(_embedded, pairs)


def _parts(denoiser: nn.Module) -> tuple[Any, Any] | None:
    """Return a denoiser's waves, and the first embedding that takes them."""
    waves = next(_of_kind(denoiser, WAVES), None)
    if waves is None:
        return None
    takes = (one for one in _of_kind(denoiser, EMBEDDING) if one.linear_1.in_features == waves.num_channels)
    return next(((waves, one) for one in takes), None)


def _of_kind(denoiser: nn.Module, name: str) -> Iterator[Any]:
    return (one for one in denoiser.modules() if any(kind.__name__ == name for kind in type(one).__mro__))


@torch.no_grad()
def _embedded(pairs: Sequence[tuple[Any, Any]], times: Tensor) -> Tensor:
    """Return the embeddings as blocks take them, through SiLU; of several denoisers side by side.

    Times are rounded as they are on the way to an embedding, whose weights are as exact as the latents.
    """
    found = []
    for waves, embedding in pairs:
        weight = next((one for one in embedding.parameters() if one.is_floating_point()), torch.empty(0))
        told = (SCALE * times / waves.scale).to(weight.dtype).float()
        device = "cpu" if weight.is_meta else weight.device  # offloaded layers are fetched as they are called
        made = embedding(waves(told.to(device)).to(weight.dtype))
        found.append(functional.silu(made.double().cpu()))
    return torch.cat(found, 1)
