"""Which process this is, where `torchrun` or `accelerate launch` started several: they share work by number."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

PATIENCE, PAUSE = timedelta(days=7), 0.1
Part = TypeVar("Part")


class Meeting:
    """Lets processes wait for each other by counting themselves in a store that they share.

    A process group could do it as well, but whatever finds one takes it for its own: cache-dit would average its
    decisions over all processes, each of which draws other pictures.
    """

    def __init__(self, store: Any, rank: int, count: int):
        self._store, self._rank, self._count = store, rank, count
        self._number = 0

    def wait(self) -> None:
        """Return when all processes have called this as often. The first, which may hold the store, leaves last."""
        self._number += 1
        self._store.add(f"lesa-{self._number}-here", 1)
        self._until(f"lesa-{self._number}-here")
        self._store.add(f"lesa-{self._number}-left", 1)
        if self._rank == 0:
            self._until(f"lesa-{self._number}-left")

    def _until(self, key: str) -> None:
        end = time.monotonic() + PATIENCE.total_seconds()
        while self._store.add(key, 0) < self._count:
            if time.monotonic() > end:
                raise RuntimeError(f"some of {self._count} processes did not come in {PATIENCE}; start them again.")
            time.sleep(PAUSE)


class Ranks(NamedTuple):
    """The number of this process, how many there are, and how they wait for each other."""

    rank: int = 0
    count: int = 1
    meeting: Meeting | None = None

    @property
    def leads(self) -> bool:
        """Does this process do what only one does: print, time, sum up?"""
        return self.rank == 0

    def share(self, parts: Sequence[Part]) -> list[Part]:
        """Return this process's share of the parts of some work: every `count`-th."""
        return list(parts[self.rank :: self.count])

    def wait(self) -> None:
        """Wait until all processes are here. There is nothing to wait for where one is alone."""
        if self.meeting is not None:
            self.meeting.wait()


ALONE = Ranks()


def here() -> Ranks:
    """Read from the environment which process this is.

    Raises: ValueError if RANK and WORLD_SIZE do not fit together.
    """
    ranks = Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if not 0 <= ranks.rank < ranks.count:
        raise ValueError(f"RANK counts from 0 to WORLD_SIZE - 1, got {ranks.rank} of {ranks.count}; use torchrun.")
    return ranks


_met: list[Ranks] = []
"""Those of the block that is being run, if any."""


@contextmanager
def together() -> Iterator[Ranks]:
    """Let the processes that were started together wait for each other; files alone pass between them.

    A block in such a block is part of it.
    """
    ranks = here()
    if ranks.count == 1 or _met:
        yield _met[0] if _met else ranks
        return
    from torch.distributed import rendezvous

    store, _, _ = next(rendezvous("env://", timeout=PATIENCE))
    _met.append(ranks._replace(meeting=Meeting(store, ranks.rank, ranks.count)))
    try:
        yield _met[0]
        _met[0].wait()  # whoever ends first would take the store with it that others wait at
    finally:
        _met.clear()
