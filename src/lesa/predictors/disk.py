"""Whose files are whose: a run writes over and removes what runs of ours wrote, and nothing else.

A folder is ours if it holds what every run begins with: the records of a benchmark, the settings of a training, the
configuration of a predictor. In any other folder the names of what a run would write must be free.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

PARTIAL = ".partial"
SIGNATURE = "sha256"
DAMAGED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, SafetensorError)
"""What reading a file may raise that is damaged, or was made to be: deep JSON is a RuntimeError, a huge number one of
arithmetic."""


def check_free(folder: str | Path, patterns: Iterable[str], what: str) -> None:
    """Check that nothing in a folder has a name of `what` is to be written there, where the folder is none of ours.

    `patterns` are those of `Path.glob`.

    Raises: ValueError if something has.
    """
    found = sorted({str(path.relative_to(folder)) for pattern in patterns for path in Path(folder).glob(pattern)})
    if found:
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"{folder} is to hold {what}, which would write over what is none of it: {', '.join(found[:3])}{more}; "
            "name another folder, or move that away."
        )


def remove(files: Iterable[Path], within: Path) -> None:
    """Remove these files, with what a kill left half written of them, and the folders in `within` that are empty then.

    What is not there is passed over.
    """
    folders: dict[Path, None] = {}
    for file in files:
        for path in (file, file.with_name(file.name + PARTIAL)):
            path.unlink(missing_ok=True)
        folders |= dict.fromkeys(folder for folder in file.parents if within in folder.parents)
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        with suppress(OSError):
            folder.rmdir()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, whatever happens meanwhile.

    Raises: OSError if it cannot be written, which names the file; nothing of it is left then.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        with named(path):
            with open(partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Let an error of the disk say what could not be written: a full one does not."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _sync(folder: Path) -> None:
    """Make a renaming in a folder last; Windows has no such call."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def signed(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return entries as JSON holds them, with a digest of all: nothing of them changes unnoticed."""
    plain = json.loads(json.dumps(entries))
    return {**plain, SIGNATURE: _digest(plain)}


def unsigned(entries: Any) -> dict[str, Any]:
    """Return what was signed.

    Raises: ValueError if that is not as it was.
    """
    plain = {name: value for name, value in dict(entries).items() if name != SIGNATURE}
    if entries.get(SIGNATURE) != _digest(plain):
        raise ValueError("it is not as it was written")
    return plain


def _digest(entries: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
