"""A folder that one process at a time works in."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def alone_in(folder: Path, rank: int = 0, doing: str = "collecting", again: str = "collect again") -> Iterator[None]:
    """Make a folder, and keep other processes of this rank from `doing` the same there; explain a full disk.

    The lock goes with its process: one that was killed keeps nobody out.

    Raises: RuntimeError if another process is there; OSError if the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / (f".lock-{rank}" if rank else ".lock"), timeout=0):
            yield
    except Timeout as error:
        raise RuntimeError(f"another process is {doing} into {folder}; wait for it, or end it.") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = f"the disk is full; free some space and {again}: it goes on after what is stored so far"
        raise OSError(error.errno, advice, str(folder)) from error
