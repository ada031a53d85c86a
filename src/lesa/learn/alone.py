"""A folder that one process at a time writes runs to."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout


@contextmanager
def alone_in(folder: Path, rank: int) -> Iterator[None]:
    """Make a folder, and keep other processes of this rank from collecting into it; explain a full disk."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / (f".lock-{rank}" if rank else ".lock"), timeout=0):
            yield
    except Timeout as error:
        raise RuntimeError(f"another process is collecting into {folder}; wait for it, or end it.") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        advice = "the disk is full; free some space and collect again: it goes on after the runs stored so far"
        raise OSError(error.errno, advice, str(folder)) from error
