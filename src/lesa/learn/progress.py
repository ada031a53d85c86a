"""Progress of a work whose length shows as it goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tqdm import tqdm


class Progress:
    """A bar that counts real runs of calls, and what is expected to remain; as a context manager it ends the bar."""

    def __init__(self, shown: bool = True, what: str = "calibrating"):
        self._bar, self._what = tqdm(desc=what, unit="run", disable=not shown, total=0), what

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
