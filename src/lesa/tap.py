"""Where a transformer's feature is read and written back.

At the feature tap it is what enters the final norm or the last projection, whichever the paper forecasts for the class:
with the blocks bypassed and that tensor put back, everything else of the transformer's own forward does what it does in
a full step. At the output tap it is what the transformer returns, a fraction of that size, and on skipped steps its
forward does not run at all.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional


class Tap(NamedTuple):
    """Name a transformer class's lists of blocks to bypass, and the module whose first input is the feature.

    Without a module the feature is the transformer's output.
    """

    blocks: tuple[str, ...]
    module: str | None


NORM, PROJECTION = "norm_out", "proj_out"
"""What diffusers calls the final norm and the projection that follows it."""
TAPS = {
    "FluxTransformer2DModel": Tap(("transformer_blocks", "single_transformer_blocks"), NORM),
    "QwenImageTransformer2DModel": Tap(("transformer_blocks",), PROJECTION),
    "HunyuanVideoTransformer3DModel": Tap(("transformer_blocks", "single_transformer_blocks"), None),
}
"""Where the paper taps each class: its place called 'feature'."""
MODULES = {"norm": NORM, "projection": PROJECTION, "output": None}
PLACES = ("feature", *MODULES)
COMPILE_BLOCKS = "compile its repeated blocks instead: transformer.compile_repeated_blocks(fullgraph=True)."


def tap_of(transformer: nn.Module, place: str = "feature") -> Tap:
    """Find the tap of a transformer at a place, by the name of its class or of a parent class.

    'norm' is what enters the final norm, 'projection' what enters the last projection, 'output' what the transformer
    returns, and 'feature' the one of them that the paper forecasts for the class.

    Raises: ValueError if the place or the class is unknown, or if the transformer is compiled as a whole.
    """
    if place not in PLACES:
        raise ValueError(f"a tap is at one of {', '.join(PLACES)}, got {place!r}; name one of these, or pass a Tap.")
    _refuse_compiled(transformer)
    for parent in type(transformer).__mro__:
        if parent.__name__ in TAPS:
            tap = TAPS[parent.__name__]
            return tap if place == "feature" else tap._replace(module=MODULES[place])
    raise ValueError(
        f"a tap is known for {', '.join(sorted(TAPS))}, got a {type(transformer).__name__}; pass "
        "tap=lesa.Tap(blocks=(...), module=...) with the names of its block lists and of its final norm."
    )


def place_of(kind: str, tap: Tap) -> str:
    """Name the place of a tap of a class of transformers: 'feature' where it is the class's usual one.

    Of a class that is not known here it is 'feature' too, unless it is the output.
    """
    if tap == TAPS.get(kind):
        return "feature"
    if kind not in TAPS:
        return "output" if tap.module is None else "feature"
    return next((place for place, module in MODULES.items() if module == tap.module), "feature")


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
    module, projection = getattr(transformer, tap.module, None), getattr(transformer, PROJECTION, None)
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


class Listener(Protocol):
    """What a tap talks to: one call before each run of the transformer, one where the feature passes."""

    def begin(self) -> bool:
        """Tell whether the blocks run this time."""
        ...

    def exchange(self, feature: Tensor) -> Tensor:
        """Take the feature that passes and return the one that goes on, in the same shape, dtype and device.

        On a skipped step its values count for nothing; its dtype is that of a full step.
        """
        ...


def attach(transformer: nn.Module, tap: Tap, listener: Listener) -> Callable[[], None]:
    """Put a listener at the tap; returns the call that takes it away and leaves the transformer as it was.

    Raises: ValueError if the transformer has no such lists of blocks or no such module, or is compiled as a whole.
    """
    _check(transformer, tap)
    here = _Passage()
    at = _AtModule(transformer, tap.module, listener, here) if tap.module else _AtOutput(transformer, listener, here)

    def before(*_: Any) -> None:
        if isinstance(at, _AtModule):
            at.follow()
        here.blocks_run = listener.begin()
        here.awaited = True

    def after(_module: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        passed_by, failed, blocks_ran = here.awaited, output is None, here.blocks_run
        here.reset()
        if failed or not passed_by:
            return None
        if blocks_ran and isinstance(at, _AtOutput):
            return at.find_again(args, kwargs, output)
        raise RuntimeError(
            f"a {type(transformer).__name__} ran but no feature passed its {tap.module or 'output'!r}; correct the "
            "tap, or accelerate again if its forward was replaced since, or, if the transformer was compiled as a "
            f"whole, {COMPILE_BLOCKS}"
        )

    with ExitStack() as undo:
        undo.callback(transformer.register_forward_pre_hook(before).remove)
        undo.callback(transformer.register_forward_hook(after, with_kwargs=True, always_call=True).remove)
        for name in tap.blocks:
            blocks = getattr(transformer, name)
            undo.callback(setattr, blocks, "__class__", type(blocks))
            blocks.__class__ = _gated(type(blocks), here)
        at.follow()
        undo.callback(lambda: at.close())
        return undo.pop_all().close


class _AtModule:
    """Exchanges the first input of a transformer's module, also of one that takes its place later (a LoRA's layer)."""

    def __init__(self, transformer: nn.Module, name: str, listener: Listener, here: _Passage):
        self._transformer, self._name, self._listener, self._here = transformer, name, listener, here
        self._module: nn.Module | None = None
        self._dtype: torch.dtype | None = None  # of the newest full step; without the blocks it may be another
        self.close: Callable[[], None] = lambda: None

    def follow(self) -> None:
        module = getattr(self._transformer, self._name)
        if module is not self._module:
            self.close()
            self._module = module
            self.close = module.register_forward_pre_hook(self._before, with_kwargs=True).remove

    def _before(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if not self._here.awaited:  # called by someone else than the transformer's forward
            return None
        exchange = self._of_full_step if self._here.blocks_run else self._of_skipped_step
        self._here.reset()
        if args:
            return (exchange(args[0]), *args[1:]), kwargs
        name, feature = next(iter(kwargs.items()))
        return args, {**kwargs, name: exchange(feature)}

    def _of_full_step(self, feature: Tensor) -> Tensor:
        self._dtype = feature.dtype
        return self._listener.exchange(feature)

    def _of_skipped_step(self, feature: Tensor) -> Tensor:
        return self._listener.exchange(feature.to(self._dtype or feature.dtype))


class _AtOutput:
    """Exchanges what a transformer returns, and lets its forward run on full steps only.

    A forward put over this one later (offloading does so) stays when this one is undone, and then finds it idle. One
    that took its place (diffusers puts its offloading on anew after each call of a pipeline) is seen on the next full
    step, as a run begins with one, and this one is put over it.
    """

    def __init__(self, transformer: nn.Module, listener: Listener, here: _Passage):
        self._transformer, self._listener, self._here = transformer, listener, here
        self._returned: dict[_Kind, tuple[Tensor, Callable[[Tensor], Any]]] = {}  # by kind of call: of a full step
        self.close: Callable[[], None] = lambda: None

    def follow(self) -> None:
        """Put this forward over the transformer's."""
        own = self._transformer.__dict__
        inner, shadowed = self._transformer.forward, own.get("forward")

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            here = self._here
            if not here.awaited:  # called by someone else than the transformer's __call__
                return inner(*args, **kwargs)
            output = inner(*args, **kwargs) if here.blocks_run else None
            here.reset()
            return self._exchange(args, kwargs, output)

        def close() -> None:
            if own.get("forward") is forward:
                del own["forward"]
                if shadowed is not None:
                    own["forward"] = shadowed

        own["forward"], self.close = forward, close

    def find_again(self, args: tuple, kwargs: dict, output: Any) -> Any:
        """Exchange the output of a full step that another forward gave, and follow that one."""
        self.follow()
        return self._exchange(args, kwargs, output)

    def _exchange(self, args: tuple, kwargs: dict, output: Any | None) -> Any:
        """Pass on the output of a full step, or make one of the feature forecast."""
        kind = _kind_of_call(*args, **kwargs)
        if output is not None:
            feature, wrap = unwrap(output)
            self._returned.pop(kind, None)  # the newest is the last
            self._returned[kind] = feature.detach().new_empty(()).expand(feature.shape), wrap  # holds one number
        else:
            feature, wrap = self._known(kind)
        return wrap(self._listener.exchange(feature))

    def _known(self, kind: _Kind) -> tuple[Tensor, Callable[[Tensor], Any]]:
        """Return what stands in for the output of a full step of such a call.

        Latents may change their dtype between steps where the output's is not theirs: with autocast, or a transformer
        that goes its own way, it is known from a step with other latents.
        """
        if kind in self._returned:
            return self._returned[kind]
        autocast = torch.is_autocast_enabled(kind.device.type)
        for other, (feature, wrap) in reversed(self._returned.items()):
            if other._replace(dtype=kind.dtype) == kind and (autocast or feature.dtype != other.dtype):
                return feature, wrap
        raise RuntimeError(
            "the calls of a run keep the shape, dtype and device of their input and their return_dict, got "
            f"{', '.join(map(str, kind))} on a skipped step and none such on a full one; start the run anew."
        )


class _Kind(NamedTuple):
    """What the output of a call goes by: the latents' shape, dtype and device, and `return_dict`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    answer: str


def _kind_of_call(*args: Any, **kwargs: Any) -> _Kind:
    latents = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    return _Kind(tuple(latents.shape), latents.dtype, latents.device, f"return_dict={kwargs.get('return_dict')}")


def unwrap(output: Any) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Take the tensor out of what a transformer returned; returns it with the call that puts another in its place."""
    if isinstance(output, Tensor):
        return output, lambda feature: feature
    parts = dict(output) if isinstance(output, Mapping) else dict(enumerate(output))
    (name, feature), kind = next(iter(parts.items())), type(output)
    if len(parts) == 1 and isinstance(feature, Tensor):
        return feature, lambda feature: (feature,) if kind is tuple else kind(**{name: feature})
    raise RuntimeError(
        f"a transformer tapped at its output returns one tensor, got {len(parts)} parts in a {kind.__name__}; tap a "
        "module of it."
    )


def _check(transformer: nn.Module, tap: Tap) -> None:
    _refuse_compiled(transformer)
    lists = all(isinstance(getattr(transformer, name, None), nn.ModuleList) for name in tap.blocks)
    if not (lists and (tap.module is None or isinstance(getattr(transformer, tap.module, None), nn.Module))):
        raise ValueError(
            f"a tap names block lists and a module of its transformer, got {tuple(tap)} for a "
            f"{type(transformer).__name__}; correct the tap."
        )


def _refuse_compiled(transformer: nn.Module) -> None:
    if type(transformer).__name__ == "OptimizedModule" or getattr(transformer, "_compiled_call_impl", None) is not None:
        raise ValueError(
            f"a transformer that skips its blocks is not compiled as a whole, but this one is; {COMPILE_BLOCKS}"
        )


class _Passage(threading.local):
    """How far the present call of a transformer is, for the thread that asks alone."""

    blocks_run = True
    awaited = False  # the feature is yet to pass

    def reset(self) -> None:
        self.blocks_run, self.awaited = True, False


def _gated(kind: type[nn.ModuleList], here: _Passage) -> type[nn.ModuleList]:
    """Make a kind of block list that yields no block on skipped steps.

    The list itself stays in place, with its length, indices and parameters: only a loop over it finds nothing to run.
    """

    def __iter__(self):
        return kind.__iter__(self) if here.blocks_run else iter(())

    return type(kind.__name__, (kind,), {"__iter__": __iter__, "__module__": kind.__module__})


def hear_streams(transformer: Any, within: Callable[[str], AbstractContextManager]) -> Callable[[], None]:
    """Enter `within(name)` wherever a pipeline says its stream's name with `transformer.cache_context(name)`.

    It needs none of diffusers' private interfaces, and does nothing where a transformer has no `cache_context`. Returns
    the call that undoes it.
    """
    if not hasattr(transformer, "cache_context"):
        return lambda: None
    original, shadowed = transformer.cache_context, transformer.__dict__.get("cache_context")

    @contextmanager
    def cache_context(name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        with within(name), original(name, *args, **kwargs):
            yield

    def undo() -> None:
        del transformer.__dict__["cache_context"]
        if shadowed is not None:
            transformer.__dict__["cache_context"] = shadowed

    transformer.__dict__["cache_context"] = cache_context
    return undo
