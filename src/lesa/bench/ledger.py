"""Lines of a file that is appended to, sealed in batches: lost, doubled and changed lines are noticed.

All lines of one write are a batch. The last of them ends with a seal: how many they are, and a digest of them and of
the seal before, that of the first batch being the digest of the file's first line. What follows the last seal was torn
by a kill, or is just being written. Files of before have no seals, and go on without.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from lesa.bench.lines import Line, from_text
from lesa.predictors.disk import named

SEAL = re.compile(r', "batch": \[(\d{1,9}), "([0-9a-f]{16})"\]}$')


def append(path: Path, texts: Sequence[str]) -> None:
    """Append lines, JSON objects, to a file that has its first one, all with one write, and seal them."""
    lines = lines_of(path)
    if is_sealed(lines):
        last = next((seal for line in reversed(lines) if (seal := SEAL.search(line))), None)
        digest = _digest(last[2] if last else _digest("", lines[:1]), texts)
        texts = [*texts[:-1], f'{texts[-1][:-1]}, "batch": [{len(texts)}, "{digest}"]}}']
    write(path, "".join(text + "\n" for text in texts))


def write(path: Path, text: str) -> None:
    """Append a text to a file, so that it lasts.

    Raises: OSError if it cannot be written, which names the file.
    """
    with named(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def lines_of(path: Path) -> list[str]:
    """Read the whole lines of a file."""
    return path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []


def is_sealed(lines: Sequence[str]) -> bool:
    """Tell whether a file of these lines has its batches sealed."""
    return '"format": "lesa-records-1"' not in "".join(lines[:1])[:80]


def read(path: Path) -> Iterator[Line]:
    """Yield what the lines after the first one say, but for a torn batch.

    Raises: ValueError if a line is no record, or a batch is not as it was written.
    """
    lines = lines_of(path)
    batch: list[str] = []
    known: list[Line] = []
    digest = _digest("", lines[:1])
    for number, text in enumerate(lines[1:], start=2):
        try:
            known.append(from_text(text))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; remove the line, and measure it again.") from error
        seal = SEAL.search(text)
        batch.append(SEAL.sub("}", text))
        if seal:
            digest = _digest(digest, batch)
            if (int(seal[1]), seal[2]) != (len(batch), digest):
                raise ValueError(
                    f"{path}, lines {number - len(batch) + 1} to {number} or before: lines were lost, doubled or "
                    "changed; bring back the file, or measure anew (--anew, or another folder)."
                )
            yield from known
            batch, known = [], []
    if not is_sealed(lines):
        yield from known


def repair(path: Path) -> None:
    """Remove a torn end: a line without its end, and of a sealed file what follows the last seal."""
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    lines = content[:whole].splitlines(keepends=True)
    if is_sealed([line.decode(errors="replace") for line in lines[:1]]):
        while len(lines) > 1 and not SEAL.search(lines[-1].decode(errors="replace").rstrip("\n")):
            lines.pop()
        whole = sum(map(len, lines))
    if whole < len(content):
        os.truncate(path, whole)
    if not whole:
        path.unlink()


def _digest(before: str, texts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join([before, *texts]).encode()).hexdigest()[:16]
