"""Seeded damage to files: bytes, lines, JSON, tensors, and files in the place of others."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from lesa.predictors import base as predictors
from lesa.predictors import disk

Mutation = Callable[[Random, Path, Path], None]
"""(random numbers, the file to damage, the same file of another artefact of its kind)"""
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    2.5,
    1e308,
    10**18,
    10**40,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../../../etc/passwd",
    "nan",
    [],
    {},
    [[[]]],
    [None],
    {"..": ".."},
    [0] * 100_000,
    "x" * 1_000_000,
]
"""What a JSON field is replaced by."""


def _bytes(change: Callable[[Random, bytes], bytes]) -> Mutation:
    return lambda random, file, _: file.write_bytes(change(random, file.read_bytes())) and None


def _lines(change: Callable[[Random, list[bytes]], None]) -> Mutation:
    def changed(random: Random, data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        change(random, lines)
        return b"".join(lines)

    return _bytes(changed)


def _flip(random: Random, data: bytes) -> bytes:
    place = random.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :]


def _early(random: Random, data: bytes) -> bytes:
    place = random.randrange(min(len(data), 400))
    return data[:place] + bytes([data[place] ^ (1 << random.randrange(8))]) + data[place + 1 :]


def _digit(random: Random, data: bytes) -> bytes:
    """Change a digit of a text, or a byte where there is none."""
    places = [k for k, byte in enumerate(data) if chr(byte).isdigit()]
    if not places:
        return _flip(random, data)
    place = random.choice(places)
    other = random.choice([digit for digit in b"0123456789" if digit != data[place]])
    return data[:place] + bytes([other]) + data[place + 1 :]


def _zeros(random: Random, data: bytes) -> bytes:
    place, count = random.randrange(len(data)), random.choice((1, 16, 512))
    return data[:place] + b"\0" * len(data[place : place + count]) + data[place + count :]


def _twice(random: Random, data: bytes) -> bytes:
    place = random.randrange(len(data))
    return data[:place] + data[max(place - 64, 0) : place] + data[place:]


def _drop(random: Random, lines: list[bytes]) -> None:
    lines.pop(random.randrange(len(lines)))


def _double(random: Random, lines: list[bytes]) -> None:
    k = random.randrange(len(lines))
    lines.insert(k, lines[k])


def _exchange(random: Random, lines: list[bytes]) -> None:
    a, b = random.randrange(len(lines)), random.randrange(len(lines))
    lines[a], lines[b] = lines[b], lines[a]


def _swap(_random: Random, file: Path, other: Path) -> None:
    shutil.copy(other, file)


def _beside(random: Random, file: Path, _: Path) -> None:
    """Put another file of the folder, or of one in it, in the place of this one."""
    others = sorted(path for path in file.parent.rglob("*") if path.is_file() and path != file)
    if others:
        shutil.copy(random.choice(others), file)


def _delete(_random: Random, file: Path, _: Path) -> None:
    file.unlink()


def _folder(_random: Random, file: Path, _: Path) -> None:
    file.unlink()
    file.mkdir()


BYTES: dict[str, Mutation] = {
    "a bit flipped": _bytes(_flip),
    "a bit flipped early": _bytes(_early),
    "a digit changed": _bytes(_digit),
    "truncated": _bytes(lambda random, data: data[: random.randrange(len(data))]),
    "emptied": _bytes(lambda _, data: b""),
    "more appended": _bytes(lambda random, data: data + random.randbytes(random.choice((1, 40, 4000)))),
    "a block zeroed": _bytes(_zeros),
    "a piece doubled": _bytes(_twice),
    "other bytes": _bytes(lambda random, data: random.randbytes(len(data))),
    "of another artefact": _swap,
    "of another name": _beside,
    "deleted": _delete,
    "a folder": _folder,
}
LINES: dict[str, Mutation] = {
    "a line dropped": _lines(_drop),
    "a line doubled": _lines(_double),
    "lines exchanged": _lines(_exchange),
}


def places_of(value: Any, here: tuple = ()) -> list[tuple]:
    """Return where in JSON there is something."""
    found = [here] if here else []
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(parts)[:40]:
        found += places_of(part, (*here, key))
    return found


def mutate_json(random: Random, value: Any) -> Any:
    """Change one field of JSON: to something of another kind or size, or none at all."""
    value = json.loads(json.dumps(value))
    places = places_of(value)
    if not places or random.random() < 0.05:
        return random.choice(ODD)
    *path, last = random.choice(places)
    inner = value
    for key in path:
        inner = inner[key]
    what = random.randrange(8)
    if what == 0:
        del inner[last]
    elif what == 1 and isinstance(inner, dict):
        inner["unknown"] = inner[last]
    elif what == 2 and isinstance(inner[last], list):
        inner[last] = inner[last] * 2
    else:
        inner[last] = random.choice(ODD)
    return value


def _json(random: Random, data: bytes) -> bytes:
    """Change a field of a JSON text, or of one of its lines."""
    text = data.decode()
    try:
        return json.dumps(mutate_json(random, json.loads(text))).encode()
    except ValueError:
        lines = text.splitlines()
        k = random.randrange(len(lines))
        lines[k] = json.dumps(mutate_json(random, json.loads(lines[k])))
        return ("\n".join(lines) + "\n").encode()


def _deep(_random: Random, data: bytes) -> bytes:
    return b'{"a":' + b"[" * 100_000 + data


JSON: dict[str, Mutation] = {"a JSON field of another kind": _bytes(_json), "nested deeply": _bytes(_deep)}


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file into its header and the numbers."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: Any, numbers: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + numbers


def _header(random: Random, data: bytes) -> bytes:
    header, numbers = split(data)
    return joined(mutate_json(random, header), numbers)


def _shape(random: Random, data: bytes) -> bytes:
    """Let a tensor claim terabytes."""
    header, numbers = split(data)
    name = random.choice([name for name in header if name != "__metadata__"])
    header[name]["shape"] = random.choice([[10**12], [10**6, 10**6, 10**6], [2**62, 4], [0, 10**12]])
    if random.random() < 0.5:
        header[name]["data_offsets"] = [0, random.choice([10**12, 2**63])]
    return joined(header, numbers)


def _claim(random: Random, data: bytes) -> bytes:
    return struct.pack("<Q", random.choice([2**63, 2**40, len(data), 99_999_999])) + data[8:]


def _not_finite(random: Random, data: bytes) -> bytes:
    """Set a float32 or a float16 to NaN or infinity."""
    header, numbers = split(data)
    floats = {name: x for name, x in header.items() if x.get("dtype") in ("F32", "F16", "BF16", "F64")}
    begin, end = random.choice([x["data_offsets"] for x in floats.values() if len(set(x["data_offsets"])) == 2])
    return joined(header, numbers[:begin] + b"\xff" * (end - begin) + numbers[end:])


TENSORS: dict[str, Mutation] = {
    "a header changed": _bytes(_header),
    "absurd shapes": _bytes(_shape),
    "an absurd header": _bytes(_claim),
    "NaN": _bytes(_not_finite),
}


def _sealed_field(random: Random, file: Path, _: Path) -> None:
    """Change a field of a predictor's configuration, under its own right digest, as who means harm would."""
    entries = json.loads(file.read_text())
    del entries["sha256"]
    other = mutate_json(random, entries)
    _seal(file, other if isinstance(other, dict) else entries)


def _sealed_number(random: Random, file: Path, _: Path) -> None:
    """Set weights of a predictor to NaN, under the right digest."""
    weights = file.with_name("model.safetensors")
    weights.write_bytes(_not_finite(random, weights.read_bytes()))
    entries = json.loads(file.read_text())
    del entries["sha256"]
    _seal(file, entries)


def _signed_field(random: Random, file: Path, _: Path) -> None:
    """Change a field of a calibration, under its own right digest."""
    entries = json.loads(file.read_text())
    other = mutate_json(random, {name: value for name, value in entries.items() if name != disk.SIGNATURE})
    file.write_text(json.dumps(disk.signed(other) if isinstance(other, dict) else other))


def _seal(file: Path, entries: dict[str, Any]) -> None:
    digest = predictors._digest(entries, file.with_name("model.safetensors").read_bytes())
    file.write_text(json.dumps({**entries, "sha256": digest}))


SEALED: dict[str, Mutation] = {
    "a field changed, and sealed": _sealed_field,
    "another field changed, and sealed": _sealed_field,
    "NaN, and sealed": _sealed_number,
}


def fitting(file: Path) -> dict[str, Mutation]:
    """Return the ways to damage a file, by its kind."""
    found = dict(BYTES)
    if file.name == "config.json":
        found |= SEALED
    if file.name == "calibration.json":
        found |= {"a field changed, and sealed": _signed_field, "another field changed, and sealed": _signed_field}
    if file.suffix in (".json", ".jsonl", ".txt"):
        found |= LINES
    if file.suffix in (".json", ".jsonl"):
        found |= JSON
    return found | (TENSORS if file.suffix == ".safetensors" else {})
