"""The denoiser seam: the call of a module that a pipeline's loop runs once or more a step.

At the output tap nothing of the module runs on a skipped step, neither its forward nor the hooks around it (offloading
brings no weights over), and what the caller gets is made of what the module returned before. At a feature tap its own
forward runs with empty lists of blocks, and the features that enter its final modules are exchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from lesa.host.intercept import intercept
from lesa.host.tap import part_of
from lesa.rows.tap import Tap

COMPILE_BLOCKS = "compile its repeated blocks instead: transformer.compile_repeated_blocks(fullgraph=True)."


class Passage(Protocol):
    """What becomes of one call of a denoiser: it is of a full step, or it is not, and then a forecast is passed on."""

    full: bool

    def keep(self, feature: Any, part: int = 0) -> None:
        """Take what passed on a full step: what the denoiser returned, or what entered its `part`-th final module."""
        ...

    def forecast(self, part: int = 0) -> Any:
        """Return what stands for it on a skipped step."""
        ...


Begin = Callable[[tuple, dict], "Passage | None"]
"""(arguments, named arguments of a call) -> what becomes of it; None lets it pass by"""


def attach(denoiser: nn.Module, tap: Tap, begin: Begin) -> Callable[[], None]:
    """Let `begin` say what becomes of every call of a denoiser; returns the call that leaves the denoiser as it was.

    Raises: ValueError if a feature tap names what the denoiser does not have, or the denoiser is compiled as a whole.
    """
    if not tap.modules:
        return intercept(denoiser, "__call__", partial(_exchange_output, begin))
    check(denoiser, tap)
    return _AtModules(denoiser, tap, begin).attach()


def check(denoiser: nn.Module, tap: Tap) -> None:
    """Raise ValueError unless a denoiser has what a tap names, and its forward can be run with its blocks shut."""
    refuse_compiled(denoiser)
    lists = all(isinstance(part_of(denoiser, name), nn.ModuleList) for name in tap.blocks)
    if not (lists and all(isinstance(part_of(denoiser, name), nn.Module) for name in tap.modules)):
        raise ValueError(
            f"a tap names block lists and modules of its denoiser, got {tuple(tap)} for a {type(denoiser).__name__}; "
            "correct the tap, or take tap='output'."
        )


def compiled_from(denoiser: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` made a denoiser of, or the denoiser itself."""
    while isinstance(inner := getattr(denoiser, "_orig_mod", None), nn.Module):
        denoiser = inner
    return denoiser


def refuse_compiled(denoiser: nn.Module) -> None:
    """Raise ValueError if a denoiser is compiled as a whole, or is called by one that is."""
    whole = type(denoiser).__name__ == "OptimizedModule" or getattr(denoiser, "_compiled_call_impl", None) is not None
    if whole or callable(get_eval_frame_callback()):
        raise ValueError(
            f"a transformer that skips its blocks is not compiled as a whole, but this one is; take tap='output', or "
            f"{COMPILE_BLOCKS}"
        )


def _exchange_output(begin: Begin, go_on: Callable, _denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
    passage = begin(args, kwargs)
    if passage is None:
        return go_on(*args, **kwargs)
    if not passage.full:
        return passage.forecast()
    output = go_on(*args, **kwargs)
    passage.keep(output)
    return output


class _Here(threading.local):
    """The call of a denoiser that one thread is in, and how many of its modules the feature has yet to enter."""

    passage: Passage | None = None
    awaited: frozenset[int] = frozenset()

    @property
    def shut(self) -> bool:
        return self.passage is not None and not self.passage.full


class _AtModules:
    """Exchanges the first inputs of a denoiser's final modules, also of one that takes its place (a LoRA's layer)."""

    def __init__(self, denoiser: nn.Module, tap: Tap, begin: Begin):
        self._denoiser, self._tap, self._begin = denoiser, tap, begin
        self._here = _Here()
        self._hooked: dict[int, tuple[nn.Module, Any]] = {}

    def attach(self) -> Callable[[], None]:
        with ExitStack() as undo:
            for name in self._tap.blocks:
                blocks = part_of(self._denoiser, name)
                undo.callback(setattr, blocks, "__class__", type(blocks))
                for block in nn.ModuleList.__iter__(blocks):
                    undo.callback(intercept(block, "__call__", self._refuse))
                blocks.__class__ = _gated(type(blocks), self._here)
            undo.callback(intercept(self._denoiser, "__call__", self._call))
            undo.callback(self._unhook)
            self._follow()
            return undo.pop_all().close

    def _follow(self) -> None:
        """Hook the final modules where they are now."""
        for part, name in enumerate(self._tap.modules):
            module, (hooked, hook) = part_of(self._denoiser, name), self._hooked.get(part, (None, None))
            if module is not hooked:
                if hook is not None:
                    hook.remove()
                handle = module.register_forward_pre_hook(_Entering(self._enter, part), with_kwargs=True)
                self._hooked[part] = module, handle

    def _unhook(self) -> None:
        for _, hook in self._hooked.values():
            hook.remove()
        self._hooked.clear()

    def _call(self, go_on: Callable, denoiser: nn.Module, *args: Any, **kwargs: Any) -> Any:
        refuse_compiled(denoiser)
        passage, here = self._begin(args, kwargs), self._here
        if passage is None:
            return go_on(*args, **kwargs)
        self._follow()
        here.passage, here.awaited = passage, frozenset(range(len(self._tap.modules)))
        try:
            output = go_on(*args, **kwargs)
            missed = here.awaited
        finally:
            here.passage, here.awaited = None, frozenset()
        if missed:
            names = ", ".join(self._tap.modules[part] for part in sorted(missed))
            raise RuntimeError(
                f"a {type(denoiser).__name__} ran but no feature entered its {names!r}; correct the tap, or take "
                "tap='output'."
            )
        return output

    def _enter(self, part: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        passage = self._here.passage
        if passage is None or part not in self._here.awaited:  # called by someone else than the denoiser's forward
            return None
        self._here.awaited -= {part}
        name, feature = (None, args[0]) if args else next(iter(kwargs.items()))
        if passage.full:
            passage.keep(feature, part)
            return None
        forecast = _fitting(passage.forecast(part), feature)
        return ((forecast, *args[1:]), kwargs) if args else (args, {**kwargs, name: forecast})

    def _refuse(self, go_on: Callable, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._here.shut:
            raise RuntimeError(
                f"no block runs on a skipped step, got a call of a {type(block).__name__}: another cache, or a forward "
                f"that does not iterate over its {', '.join(self._tap.blocks)}, runs them; take that away, or take "
                "tap='output'."
            )
        return go_on(*args, **kwargs)


def _fitting(forecast: Tensor, feature: Tensor) -> Tensor:
    """Return a forecast; its dtype is that of the newest full step, whatever comes in with the blocks shut.

    Raises: RuntimeError if it has another shape or is elsewhere.
    """
    if forecast.shape != feature.shape or forecast.device != feature.device:
        raise RuntimeError(
            f"a feature keeps its shape and device during a run, got {tuple(feature.shape)}, {feature.device} after "
            f"{tuple(forecast.shape)}, {forecast.device}; start the run anew."
        )
    return forecast


class _Entering:
    """A hook before a module's forward; copies of the module and pickles keep one that does nothing."""

    def __init__(self, enter: Callable | None = None, part: int = 0):
        self._hook = enter, part

    def __call__(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        enter, part = self._hook
        return enter(part, args, kwargs) if enter else None

    def __deepcopy__(self, _memo: dict) -> _Entering:
        return _Entering()

    def __reduce__(self) -> tuple:
        return _Entering, ()


def _gated(kind: type[nn.ModuleList], here: _Here) -> type[nn.ModuleList]:
    """Make a kind of block list that yields no block on skipped steps.

    The list itself stays in place, with its length, indices and parameters: only a loop over it finds nothing to run.
    Copies and pickles of it are of the kind that it was.
    """

    def __iter__(self: nn.ModuleList) -> Iterator[nn.Module]:
        return iter(()) if here.shut else kind.__iter__(self)

    def __reduce_ex__(self: nn.ModuleList, _protocol: int) -> tuple:
        return kind.__new__, (kind,), self.__dict__

    members = {"__iter__": __iter__, "__reduce_ex__": __reduce_ex__, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)
