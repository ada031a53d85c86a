"""The files of a run's records: what their lines are, whole, torn or of another run."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lesa.bench.ledger import lines_of
from lesa.bench.lines import Key, Start, from_text
from lesa.predictors import disk

FORMAT, UNSEALED = "lesa-records-2", "lesa-records-1"
"""The format of files, and that of before, whose batches have no digest."""
FILES = "records*.jsonl"
BEGINNING = {"kind": "run", "format": FORMAT}
"""What the first line of a file begins with."""


def name_of(shard: int) -> str:
    """Return the name of the file of a process."""
    return f"records-{shard}.jsonl" if shard else "records.jsonl"


def shard_of(path: Path) -> int | None:
    """Return the process whose file this is, None if it was brought from elsewhere."""
    number = path.stem.removeprefix("records").removeprefix("-") or "0"
    return int(number) if number.isdecimal() and path.name == name_of(int(number)) else None


def setting_of(path: Path) -> dict[str, Any]:
    """Return what all records of a file have in common: its first line.

    Raises: ValueError if that is another.
    """
    try:
        entries = json.loads(lines_of(path)[0])
        if entries.pop("kind") != "run" or entries["format"] not in (FORMAT, UNSEALED):
            raise ValueError(f"its format is not {FORMAT!r}")
        if not isinstance(entries.setdefault("pairs", []), list) or not all(map(_is_pair, entries["pairs"])):
            raise ValueError("its pairs are no prompts with seeds")
        return entries
    except disk.DAMAGED as error:
        raise ValueError(f"{path} does not begin as records do ({error!r}); measure into another folder.") from error


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, list) and list(map(type, pair)) == [str, int]


def header(setting: Mapping[str, Any]) -> str:
    """Return the first line of a file of records."""
    return json.dumps({**BEGINNING, **setting}, ensure_ascii=False) + "\n"


def check_same(path: Path, setting: Mapping[str, Any]) -> bool:
    """Check that a file is one of records of this setting; returns whether it has its first line yet.

    Raises: ValueError if it is another.
    """
    if not lines_of(path):
        if not _may_be_torn(path.read_text(encoding="utf-8", errors="replace")):
            raise ValueError(f"{path} does not begin as records do; measure into another folder.")
        return False
    there, here = setting_of(path), json.loads(header(setting))
    del here["kind"], here["format"], there["format"]
    for name in {**there, **here}:
        if there.get(name) != here.get(name):
            shown = f"{reprlib.repr(there.get(name))} there, {reprlib.repr(here.get(name))} here"
            raise ValueError(
                f"{path} holds records of another {name}: {shown}; measure into another folder (--out), or with what "
                "it was begun with. Records of another setting are never removed: move them away to use their folder."
            )
    return True


def _may_be_torn(text: str) -> bool:
    """Tell whether a kill may have left this of a first line."""
    starts = [json.dumps({**BEGINNING, "format": name}).removesuffix("}") for name in (FORMAT, UNSEALED)]
    return any(text.startswith(start) or start.startswith(text) for start in starts)


def keys_of(path: Path) -> Iterator[Key]:
    """Yield the methods that a file of records names; a damaged line names none."""
    for text in lines_of(path)[1:]:
        try:
            line = from_text(text)
        except ValueError:
            continue
        if isinstance(line, Start):
            yield from ((method["name"], method["schedule"]) for method in line.methods)
        else:
            yield line.method, line.schedule
