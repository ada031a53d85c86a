"""Progress of a work whose length shows as it goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """A bar of tqdm's that says only how it ended, in one line, where nobody watches: in a file, or a pipe."""

    _ends = False

    def display(self, msg: str | None = None, pos: int | None = None) -> bool | None:  # pyright: ignore
        """Draw the bar on a terminal; elsewhere once, as it ends."""
        watched = getattr(self.fp, "isatty", lambda: False)()
        return super().display(msg, pos) if watched or self._ends else None

    def close(self) -> None:
        """End the bar."""
        self._ends = True
        super().close()


class Progress:
    """A bar that counts real runs of calls, and what is expected to remain; as a context manager it ends the bar."""

    def __init__(self, shown: bool = True, what: str = "calibrating"):
        self._bar, self._what = Bar(desc=what, unit="run", disable=not shown, total=0), what

    def counter(self) -> Callable[[int], None]:
        """Return what takes the number of runs done so far, of one place where they are made."""
        known = 0

        def count(done: int) -> None:
            nonlocal known
            self._bar.update(done - known)
            known = done
            if self._bar.total is not None and self._bar.n > self._bar.total:
                self._bar.total = self._bar.n

        return count

    @property
    def done(self) -> int:
        return int(self._bar.n)

    def expect(self, runs: int) -> None:
        """Say how many runs are expected from here on."""
        self._bar.total = self._bar.n + max(runs, 0)
        self._bar.refresh()

    def say(self, doing: str) -> None:
        """Say what is being done."""
        self._bar.set_description(f"{self._what}, {doing}")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_exception: Any) -> None:
        self._bar.close()
