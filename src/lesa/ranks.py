"""Which process this is, where `torchrun` or `accelerate launch` started several: they share work by number."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

PATIENCE = timedelta(days=7)
Part = TypeVar("Part")


class Ranks(NamedTuple):
    """The number of this process, and how many there are."""

    rank: int = 0
    count: int = 1

    @property
    def leads(self) -> bool:
        """Does this process do what only one does: print, time, sum up?"""
        return self.rank == 0

    def share(self, parts: Sequence[Part]) -> list[Part]:
        """Return this process's share of the parts of some work: every `count`-th."""
        return list(parts[self.rank :: self.count])

    def wait(self) -> None:
        """Wait until all processes are here. There is nothing to wait for where one is alone."""
        if self.count > 1:
            import torch.distributed

            torch.distributed.barrier()


ALONE = Ranks()


def here() -> Ranks:
    """Read from the environment which process this is.

    Raises: ValueError if RANK and WORLD_SIZE do not fit together.
    """
    ranks = Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if not 0 <= ranks.rank < ranks.count:
        raise ValueError(f"RANK counts from 0 to WORLD_SIZE - 1, got {ranks.rank} of {ranks.count}; use torchrun.")
    return ranks


@contextmanager
def together() -> Iterator[Ranks]:
    """Let the processes that were started together wait for each other, by gloo; files alone pass between them.

    Where their group is there already it is used, and stays.
    """
    import torch.distributed

    ranks = here()
    if ranks.count == 1 or torch.distributed.is_initialized():
        yield ranks
        return
    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield ranks
        ranks.wait()  # whoever ends first would end the group that others wait in
    finally:
        torch.distributed.destroy_process_group()


def device(name: str) -> str:
    """Give each process of a machine a GPU of its own where a name leaves its number open."""
    local = os.environ.get("LOCAL_RANK")
    return f"{name}:{local}" if name == "cuda" and local is not None else name
