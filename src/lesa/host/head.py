"""What a transformer does after its feature tap, and its latents as tokens: what training at a feature tap needs."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from lesa.host.tap import PROJECTION, part_of
from lesa.rows.tap import Tap


def head(transformer: nn.Module, tap: Tap) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what the transformer does after its tap: a call that turns features and conditioning into outputs.

    For FLUX it is proj_out(norm_out(feature, conditioning)). Features are (..., n, C), of any n tokens, conditioning is
    (..., D), both with the same leading dimensions; all is done on the device and in the dtype of the transformer's
    weights, and the outputs come back to the device of the features. After the norm no conditioning is needed, and
    after the output tap nothing is left to be done.

    Raises: ValueError if the transformer has no such modules; the call does if leading dimensions differ.
    """
    if tap.module is None:
        return lambda features, _conditioning: features
    module = part_of(transformer, tap.modules[0]) if len(tap.modules) == 1 else None
    projection = getattr(transformer, PROJECTION, None)
    if module is None or projection is None:
        raise ValueError(
            f"a head is a final norm and {PROJECTION!r}, got a {type(transformer).__name__} tapped at {tap.module!r}; "
            "write the call that turns its features into outputs by hand."
        )
    if module is projection:
        return Projection(projection)
    weight = next(projection.parameters())

    def outputs(features: Tensor, conditioning: Tensor) -> Tensor:
        *leading, tokens, channels = features.shape
        if list(conditioning.shape[:-1]) != leading:
            raise ValueError(
                "features (..., n, C) and conditioning (..., D) have the same leading dimensions, got shapes "
                f"{tuple(features.shape)} and {tuple(conditioning.shape)}; expand one of them."
            )
        flat = features.to(weight).reshape(-1, tokens, channels)
        normed = module(flat, conditioning.to(weight).reshape(len(flat), -1))
        return projection(normed).reshape(*leading, tokens, -1).to(features.device)

    return outputs


class Projection:
    """The head behind the tap at the last projection: affine, whatever the conditioning.

    So what forecasts make of features, sums but for their offsets, they make of the `folded` features as well, which
    are as small as outputs.
    """

    def __init__(self, projection: nn.Linear):
        self._projection = projection

    def __call__(self, features: Tensor, _conditioning: Tensor) -> Tensor:
        return self._projection(features.to(self._projection.weight)).to(features.device)

    def fold(self, features: Tensor) -> Tensor:
        """Return features (..., C) as outputs (..., C_out) without the bias."""
        weight = self._projection.weight
        return functional.linear(features.to(weight), weight).to(features.device)

    def of_folded(self, folded: Tensor) -> Tensor:
        """Return the outputs."""
        bias = self._projection.bias
        return folded if bias is None else folded + bias.to(folded)

    def of_ones(self) -> Tensor:
        """Return what an offset of 1 in all channels is in folded features, (C_out,)."""
        return self._projection.weight.sum(1)


def to_tokens(transformer: nn.Module, x: Tensor) -> Tensor:
    """Bring latents or outputs of a transformer to its tokens, (B, N, C), in the order in which its head gives them.

    Pictures are such tokens already. Videos, (B, C, T, H, W), are cut into the patches that the transformer makes of
    them; each token holds the C p_t p p numbers of one.

    Raises: ValueError if they are neither.
    """
    if x.ndim == 3:
        return x
    time, side = _patch_of(transformer, x)
    patches = x.unflatten(4, (-1, side)).unflatten(3, (-1, side)).unflatten(2, (-1, time))  # B, C, T, p_t, H, p, W, p
    return patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)


def from_tokens(transformer: nn.Module, tokens: Tensor, like: Tensor) -> Tensor:
    """Undo `to_tokens`: put tokens together to latents of the shape of others.

    Raises: ValueError if those are neither pictures' tokens nor videos.
    """
    if like.ndim == 3:
        return tokens
    time, side = _patch_of(transformer, like)
    _, channels, frames, height, width = like.shape
    patches = tokens.unflatten(2, (channels, time, side, side))
    patches = patches.unflatten(1, (frames // time, height // side, width // side))  # B, T, H, W, C, p_t, p, p
    return patches.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6).flatten(4, 5).flatten(2, 3)


def _patch_of(transformer: nn.Module, x: Tensor) -> tuple[int, int]:
    """Return how many frames and how many rows and columns of a video go into one token."""
    config = getattr(transformer, "config", None)
    time, side = (getattr(config, name, None) for name in ("patch_size_t", "patch_size"))
    if x.ndim != 5 or not isinstance(time, int) or not isinstance(side, int):
        raise ValueError(
            "latents are tokens (B, N, C), or videos (B, C, T, H, W) of a transformer that names its patches, got "
            f"{tuple(x.shape)} from a {type(transformer).__name__}; only such runs can be recorded."
        )
    return time, side
