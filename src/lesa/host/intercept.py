"""Stand in the way of a method of one instance, whatever its class, and leave no trace.

Python looks `__call__` up on the class, pipelines compare and pickle classes, and offloading puts a `forward` of its
own on a module. So the class's method is patched while anything is attached, and acts on instances with a mark only.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

_MARK = "_lesa_mark"
_ORIGINAL = "_lesa_original"
_lock = threading.RLock()
_counts: dict[tuple[type, str], int] = {}

Handler = Callable[..., Any]
"""(what goes on, the instance that was called, *its arguments) -> what the caller gets"""


class Mark:
    """What stands in the way of one instance's methods: per method its handlers, the outermost last.

    A copy of the instance carries the mark of the original, but is let pass unless one of `of_copies` says that it
    counts now. Pickled, a mark is nothing.
    """

    def __init__(self, owner: Any):
        self._owner = weakref.ref(owner)
        self.handlers: dict[str, list[Handler]] = {}
        self.of_copies: list[Callable[[], bool]] = []
        self.run: Any = None
        self._inside = threading.local()

    def is_of(self, instance: Any) -> bool:
        """Tell whether this is the instance's own mark; one that came with a copy is another's."""
        return self._owner() is instance

    def __deepcopy__(self, _memo: dict) -> Mark:
        return self

    def __reduce__(self) -> tuple:
        return type(None), ()

    def call(self, original: Callable, instance: Any, name: str, args: tuple, kwargs: dict) -> Any:
        """Call a method of the instance, through its handlers unless it calls itself (as a subclass's does)."""
        inside: set[str] = self._inside.__dict__.setdefault("names", set())
        mine = self.is_of(instance) or any(count() for count in self.of_copies)
        if not mine or name in inside or not self.handlers.get(name):
            return original(instance, *args, **kwargs)
        call = functools.partial(original, instance)
        for handler in self.handlers[name]:
            call = functools.partial(handler, call, instance)
        inside.add(name)
        try:
            return call(*args, **kwargs)
        finally:
            inside.discard(name)


def intercept(
    instance: Any, name: str, handler: Handler, *, inner: bool = False, of_copies: Callable[[], bool] | None = None
) -> Callable[[], None]:
    """Let a handler stand in the way of a method of an instance; returns the call that takes it away.

    It is put around the handlers that are there, or, if `inner`, inside of them. Copies of the instance count while
    `of_copies` says so.
    """
    with _lock:
        mark = mark_of(instance)
        if mark is None:
            mark = instance.__dict__[_MARK] = Mark(instance)
        handlers = mark.handlers.setdefault(name, [])
        handlers.insert(0 if inner else len(handlers), handler)
        if of_copies is not None:
            mark.of_copies.append(of_copies)
        kind = type(instance)
        _patch(kind, name)

    restored = weakref.finalize(instance, _restore, kind, name)  # also where the instance is forgotten while attached
    restored.atexit = False
    owner = weakref.ref(instance)

    def undo() -> None:
        with _lock:
            if handler in handlers:
                handlers.remove(handler)
                restored()
                if of_copies is not None:
                    mark.of_copies.remove(of_copies)
            watched = owner()
            if watched is not None and not any(mark.handlers.values()) and watched.__dict__.get(_MARK) is mark:
                del watched.__dict__[_MARK]

    return undo


def mark_of(instance: Any) -> Mark | None:
    """Return the mark of an instance that is watched."""
    mark = getattr(instance, "__dict__", {}).get(_MARK)
    return mark if mark is not None and mark.is_of(instance) else None


def unmarked(instance: Any) -> Any:
    """Return a shallow copy of an instance that nobody watches."""
    other = copy.copy(instance)
    other.__dict__.pop(_MARK, None)
    return other


def _patch(kind: type, name: str) -> None:
    key = kind, name
    _counts[key] = _counts.get(key, 0) + 1
    if _counts[key] > 1 and hasattr(kind.__dict__.get(name), _ORIGINAL):
        return
    original = getattr(kind, name)
    original = getattr(original, _ORIGINAL, (original,))[0]  # a parent's may be patched as well

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        mark = self.__dict__.get(_MARK)
        if mark is None:
            return original(self, *args, **kwargs)
        return mark.call(original, self, name, args, kwargs)

    setattr(method, _ORIGINAL, (original, name in kind.__dict__))
    setattr(kind, name, method)


def _restore(kind: type, name: str) -> None:
    with _lock:
        key = kind, name
        _counts[key] -= 1
        if _counts[key]:
            return
        del _counts[key]
        original, own = getattr(kind.__dict__.get(name), _ORIGINAL, (None, True))
        if original is None:  # somebody else put another method over it, and that one may call it
            return
        if own:
            setattr(kind, name, original)
        else:
            delattr(kind, name)
