"""The denoiser seam: the call of a module that a pipeline's loop runs once or more a step.

At the output tap nothing of the module runs on a skipped step, neither its forward nor the hooks around it (offloading
brings no weights over), and what the caller gets is made of what the module returned before. At a feature tap its own
forward runs with empty lists of blocks, and the features that enter its final modules are exchanged.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from lesa.host.intercept import intercept
from lesa.host.structure import leaves, replace
from lesa.host.tap import part_of
from lesa.rows.tap import Tap

DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "prior", "unet", "unet_2")
"""What the modules that a pipeline's loop calls are named in diffusers."""
COMPILE_BLOCKS = "compile its repeated blocks instead: transformer.compile_repeated_blocks(fullgraph=True)."


def denoisers_of(pipe: Any, named: Sequence[str] | None = None) -> tuple[str, ...]:
    """Return the names of the modules that a pipeline's loop calls; of a module alone, one for it.

    They are those `named`, else those that the pipeline says itself (`pipe.denoisers = ("model",)`), else those that it
    has under diffusers' names for them.

    Raises: ValueError if it has none, or not those named, or no scheduler that tells its steps.
    """
    if isinstance(pipe, nn.Module):
        return (DENOISERS[0],)
    named = named or getattr(pipe, "denoisers", None)
    wanted = (named,) if isinstance(named, str) else tuple(named or DENOISERS)
    names = tuple(name for name in wanted if isinstance(getattr(pipe, name, None), nn.Module))
    if not names or (named and len(names) < len(wanted)):
        modules = sorted(name for name, part in getattr(pipe, "components", {}).items() if isinstance(part, nn.Module))
        looked = f"with the modules {', '.join(modules) or 'none'}, none of which is {' or '.join(wanted)}"
        if names:
            looked = f"without {' and '.join(name for name in wanted if name not in names)}"
        raise ValueError(
            f"the modules that a pipeline's loop calls are accelerated; got a {type(pipe).__name__} {looked}; name "
            f"them: pipe.denoisers = ({modules[0] if modules else '...'!r},), whichever they are."
        )
    scheduler = getattr(pipe, "scheduler", None)
    if not (hasattr(scheduler, "step") and hasattr(scheduler, "set_timesteps")):
        raise ValueError(
            f"a pipeline's scheduler tells its steps, but a {type(pipe).__name__} has none; accelerate its "
            f"{names[0]} in a loop of your own: lesa.accelerate(pipe.{names[0]}, ..., grid=grid)."
        )
    return names


class Passage(Protocol):
    """What becomes of one call of a denoiser: it is of a full step, or it is not, and then a forecast is passed on.

    `full` is set where a step that was to be skipped turns out to need a full one.
    """

    full: bool

    def keep(self, feature: Any, part: int = 0) -> None:
        """Take what passed on a full step: what the denoiser returned, or what entered its `part`-th final module."""
        ...

    def returned(self, output: Any) -> None:
        """Take what the denoiser returned on a full step; by default nothing comes of it."""
        return None

    def fits(self, feature: Any, part: int = 0) -> bool:
        """Tell whether a forecast has the shape of what enters on a skipped step; by default it has."""
        return True

    def forecast(self, part: int = 0) -> Any:
        """Return what stands for it on a skipped step."""
        ...


Begin = Callable[[tuple, dict], "Passage | None"]
"""(arguments, named arguments of a call) -> what becomes of it; None lets it pass by"""


def attach(denoiser: nn.Module, tap: Tap, begin: Begin, *, verify: bool = False) -> Callable[[], None]:
    """Let `begin` say what becomes of every call of a denoiser; returns the call that leaves the denoiser as it was.

    With `verify` the first full step at a feature tap runs twice, to see that the tap is right (see `check_tap`).

    Raises: ValueError if a feature tap names what the denoiser does not have, or the denoiser is compiled as a whole.
        With `verify`, the first full step raises ValueError if the tap is wrong.
    """
    if not tap.modules:
        return intercept(denoiser, "__call__", partial(_exchange_output, begin))
    check(denoiser, tap)
    return _AtModules(denoiser, tap, begin, verify).attach()


def check_tap(denoiser: nn.Module, tap: Tap, args: tuple = (), kwargs: dict | None = None) -> None:
    """Check that a tap holds all that a denoiser's blocks give to what follows them, by a call with these arguments.

    It runs in full, and again with its blocks shut and what entered the tapped modules put back: the output must be the
    same to the bit. The output tap is right for every denoiser.

    Raises: ValueError if it is not, or as `attach` does.
    """
    undo = attach(denoiser, tap, lambda _args, _kwargs: _Repeated(), verify=True)
    try:
        with torch.no_grad():
            denoiser(*args, **(kwargs or {}))
    finally:
        undo()


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
        _refuse_gradients(args, kwargs)
        return passage.forecast()
    output = go_on(*args, **kwargs)
    passage.returned(output)
    passage.keep(output)
    return output


class _Here(threading.local):
    """The call of a denoiser that one thread is in, and how many of its modules the feature has yet to enter."""

    passage: Passage | None = None
    awaited: frozenset[int] = frozenset()
    unfit: _Unfit | None = None

    @property
    def shut(self) -> bool:
        return self.passage is not None and not self.passage.full


class _Repeated:
    """Passage of a step that is run twice: in full, and with what entered the final modules put back.

    Of a step of some run, what enters goes on to its own passage as well.
    """

    def __init__(self, passage: Passage | None = None):
        self.full = True
        self._passage, self._features = passage, {}

    def keep(self, feature: Any, part: int = 0) -> None:
        self._features[part] = replace(feature, Tensor, torch.clone)
        if self._passage is not None:
            self._passage.keep(feature, part)

    def returned(self, output: Any) -> None:
        if self._passage is not None:
            self._passage.returned(output)

    def fits(self, feature: Any, part: int = 0) -> bool:
        return feature.shape == self._features[part].shape

    def forecast(self, part: int = 0) -> Any:
        return self._features[part]


class _Unfit(Exception):
    """A feature of another shape than those held enters a final module on a skipped step."""

    def __init__(self, part: int, shape: torch.Size):
        super().__init__(part, shape)
        self.part, self.shape = part, shape


class _AtModules:
    """Exchanges the first inputs of a denoiser's final modules, also of one that takes its place (a LoRA's layer)."""

    def __init__(self, denoiser: nn.Module, tap: Tap, begin: Begin, verify: bool):
        self._denoiser, self._tap, self._begin, self._unverified = denoiser, tap, begin, verify
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
        passage = self._begin(args, kwargs)
        if passage is None:
            return go_on(*args, **kwargs)
        self._follow()
        if passage.full and self._unverified:
            return self._verify(_Repeated(passage), go_on, args, kwargs)
        if passage.full:
            return self._pass(passage, go_on, args, kwargs)
        _refuse_gradients(args, kwargs)
        try:
            return self._pass(passage, go_on, args, kwargs)
        except _Unfit as error:  # as where a first step prefills tokens: the next one is full as well
            passage.full, unfit = True, error
        return self._pass(passage, go_on, args, kwargs, unfit)

    def _verify(self, passage: _Repeated, go_on: Callable, args: tuple, kwargs: dict) -> Any:
        """Run a full step twice, the second time with blocks shut, on copies, as pipelines' caches are written to."""
        copied = replace((args, kwargs), Tensor, torch.clone)
        output = self._pass(passage, go_on, args, kwargs)
        passage.full, self._unverified, why = False, False, None
        try:
            with torch.no_grad(), torch.random.fork_rng(_gpus(output)):
                same = _same(output, self._pass(passage, go_on, *copied))
        except Exception as error:  # whatever a forward raises that misses something
            same, why = False, error
        if not same:
            raise ValueError(
                "with its blocks shut and what entered the tapped modules put back a denoiser returns what it did, but "
                f"a {type(self._denoiser).__name__} with {tuple(self._tap)} {f'failed ({why})' if why else 'did not'}; "
                "name all modules that features enter behind all of its blocks, or take tap='output'."
            ) from why
        return output

    def _pass(self, passage: Passage, go_on: Callable, args: tuple, kwargs: dict, unfit: _Unfit | None = None) -> Any:
        """Run the denoiser, and see that a feature enters each of its modules."""
        here = self._here
        here.passage, here.awaited, here.unfit = passage, frozenset(range(len(self._tap.modules))), unfit
        try:
            output = go_on(*args, **kwargs)
            missed = here.awaited
        finally:
            here.passage, here.awaited, here.unfit = None, frozenset(), None
        if missed:
            names = ", ".join(self._tap.modules[part] for part in sorted(missed))
            raise RuntimeError(
                f"a {type(self._denoiser).__name__} ran but no feature entered its {names!r}; correct the tap, or take "
                "tap='output'."
            )
        if passage.full:
            passage.returned(output)
        return output

    def _enter(self, part: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        passage = self._here.passage
        if passage is None or part not in self._here.awaited:  # called by someone else than the denoiser's forward
            return None
        self._here.awaited -= {part}
        name, feature = (None, args[0]) if args else next(iter(kwargs.items()))
        if passage.full:
            self._check_shape(feature, part)
            passage.keep(feature, part)
            return None
        if not passage.fits(feature, part):
            raise _Unfit(part, feature.shape)
        forecast = passage.forecast(part)
        return ((forecast, *args[1:]), kwargs) if args else (args, {**kwargs, name: forecast})

    def _check_shape(self, feature: Tensor, part: int) -> None:
        """Raise RuntimeError if the blocks change a feature's shape, so that no forecast would ever fit."""
        unfit = self._here.unfit
        if unfit is not None and unfit.part == part and unfit.shape != feature.shape:
            who = f"the {self._tap.modules[part]!r} of a {type(self._denoiser).__name__}"
            raise RuntimeError(
                f"with its blocks shut what enters {who} has the shape that it has after them, got "
                f"{tuple(unfit.shape)} and {tuple(feature.shape)}; correct the tap, or take tap='output'."
            )

    def _refuse(self, go_on: Callable, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._here.shut:
            raise RuntimeError(
                f"no block runs on a skipped step, got a call of a {type(block).__name__}: another cache, or a forward "
                f"that does not iterate over its {', '.join(self._tap.blocks)}, runs them; take that away, or take "
                "tap='output'."
            )
        return go_on(*args, **kwargs)


def _gpus(structure: Any) -> list[int]:
    """Return the GPUs that a structure has tensors on, whose random numbers count."""
    return sorted({x.device.index for _, x in leaves(structure) if isinstance(x, Tensor) and x.is_cuda})


def _same(one: Any, other: Any) -> bool:
    """Tell whether two structures have tensors of the same numbers, to the bit."""
    pairs = [[x for _, x in leaves(each) if isinstance(x, Tensor)] for each in (one, other)]
    return len(pairs[0]) == len(pairs[1]) and all(
        x.shape == y.shape and bool(((x == y) | ((x != x) & (y != y))).all()) for x, y in zip(*pairs, strict=True)
    )


def _refuse_gradients(args: tuple, kwargs: dict) -> None:
    """Raise RuntimeError if a skipped step is to be differentiated: its forecast depends on none of its inputs."""
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for _, x in leaves((args, kwargs))):
        raise RuntimeError(
            "a skipped step has no gradient, got an input that requires one; call the denoiser within torch.no_grad(), "
            "or without lesa."
        )


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
