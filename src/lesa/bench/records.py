"""What a benchmark measured: a JSON line for each picture, time and cost, appended as they come.

A run is a folder. Each process writes one file of it, `records.jsonl` or `records-1.jsonl`, ..., and reads all. The
first line says what all records have in common: the model and its weights, the call, the pairs and how they are
batched; the lines after it are sealed in batches (`lesa.bench.ledger`). A start follows for every time that a process
went to work: on which machine, with which methods. Then come the records. Whatever a table or a plot says is worked out
from these lines.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple, cast
from urllib.parse import quote

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lesa.bench import files, ledger
from lesa.bench.ledger import lines_of
from lesa.bench.lines import FLOAT_PSNR, Cost, Failure, Key, Line, Pair, Record, Start, Time, from_text, to_text
from lesa.bench.planned import PLANNED, planned
from lesa.host.pipelines import save_sound
from lesa.learn import metrics
from lesa.learn.metrics import Interval
from lesa.predictors import disk
from lesa.predictors.disk import write_atomically

FORMAT, UNSEALED = files.FORMAT, files.UNSEALED
FILES, PICTURES, FRAMES, MARK = files.FILES, "pictures", "frames", "sha256"
REPORT, SHEET, MOVING = "report.md", "pictures.png", "clips.gif"
SUFFIXES = ("png", "pdf", "svg")
PLOTS = ("psnr-over-ratio", "psnr-over-speedup", "error-per-step", "rows")
_DRAWN = tuple(f"{name}.{suffix}" for name in PLOTS for suffix in SUFFIXES)
WRITTEN = (REPORT, SHEET, MOVING, *_DRAWN, PLANNED, f"{PICTURES}/*/{'[0-9]' * 5}.png")
"""What a run writes beside its records, as patterns."""
REFERENCE = ("all full", "every:1")
"""The run that all others are measured against."""
MOST_PIXELS = 1 << 26
"""Of a picture that is kept: one of more is none of ours, or meant to take all memory."""


# --- all of them


AGREE = 1.1
"""Repeats agree if the second fastest takes at most so much longer than the fastest."""


class Timing(NamedTuple):
    """Least seconds of some repeats in the denoising loop, in the whole call, and in a skipped step.

    Whatever else a machine does makes a run longer, never shorter. Where repeats do not agree, as the fastest of them
    was not reached again, they are not `steady`: nobody knows then how long it takes.
    """

    loop: float
    call: float
    skipped: float | None = None
    steady: bool = True


@dataclass(frozen=True)
class Result:
    """One line of a table: a method over all pairs. Seconds and speedup are those of the denoising loop at batch 1.

    `full_steps` is the mean over the runs: a method that decides for itself may take more in one than in another, and
    one that skips parts of steps counts as many as cost the same. `steady` tells whether times that were measured agree
    with each other: where they do not, there are no seconds and no speedup. `float_psnr` is None where it was not
    measured for every pair.
    """

    method: str
    schedule: str
    full_steps: float
    step_ratio: float
    psnr: float
    psnr_low: float
    psnr_high: float
    ssim: float
    prompted: float | None
    seconds: float | None = None
    speedup: float | None = None
    call_seconds: float | None = None
    call_speedup: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    pairs: int = 0
    steady: bool = True
    float_psnr: Interval | None = None

    @property
    def kind(self) -> str:
        """The kind of its schedule, its first word: 'paper', 'at', 'threshold', ...; '' of a number of steps."""
        return re.split(r"[:\d ]", self.schedule)[0]


@dataclass
class Comparison:
    """Everything that was measured: what all records have in common, the records, and pictures of the first pairs."""

    setting: Mapping[str, Any] = field(default_factory=dict)
    starts: list[Start] = field(default_factory=list)
    records: dict[Key, list[Record]] = field(default_factory=dict)
    times: dict[Key, list[Time]] = field(default_factory=dict)
    costs: dict[Key, Cost] = field(default_factory=dict)
    failures: dict[Key, str] = field(default_factory=dict)
    pictures: dict[Key, list[np.ndarray]] = field(default_factory=dict)

    def add(self, line: Line) -> None:
        """Take a line in; of what was measured twice, the first counts."""
        if isinstance(line, Start):
            self.starts.append(line)
            return
        key = line.method, line.schedule
        if isinstance(line, Record) and line.pair not in {one.pair for one in self.records.get(key, [])}:
            self.records.setdefault(key, []).append(line)
        elif isinstance(line, Time) and line.pair not in {one.pair for one in self.times.get(key, [])}:
            self.times.setdefault(key, []).append(line)
        elif isinstance(line, Cost):
            self.costs.setdefault(key, line)
        elif isinstance(line, Failure):
            self.failures[key] = line.error

    def holds(self, key: Key, pairs: Sequence[Pair]) -> bool:
        """Tell whether a method has a record of each of these pairs."""
        return set(pairs) <= {record.pair for record in self.records.get(key, [])}

    def timed(self, key: Key, pairs: Sequence[Pair]) -> bool:
        """Tell whether a method has a time of each of these pairs."""
        return set(pairs) <= {time.pair for time in self.times.get(key, [])}

    def sort(self) -> None:
        """Bring methods into the order in which they were lined up, and records into that of the pairs."""
        lined_up = [(m["name"], m["schedule"]) for start in self.starts for m in start.methods]
        place = {key: k for k, key in reversed(list(enumerate(lined_up)))}
        order = {tuple(pair): k for k, pair in enumerate(self.setting.get("pairs", ()))}
        groups: Any = (self.records, self.times)
        for group in groups:
            for key in sorted(group, key=lambda key: place.get(key, len(place))):
                group[key] = sorted(group.pop(key), key=lambda line: order.get(line.pair, len(order)))

    @property
    def full_steps(self) -> dict[Key, float]:
        """The number of full steps of each method, on average over its runs; of one that skips parts, by its FLOPs."""
        steps = max((len(one.full) for one in self.records.get(REFERENCE, [])), default=0)
        return {
            key: fmean(len(one.full) or (one.share or 0.0) * steps for one in records)
            for key, records in self.records.items()
        }

    @property
    def shares(self) -> dict[Key, float]:
        """The FLOPs of each method in proportion to the reference run's, on average; of those whose were counted."""
        counted = {key: [one.share for one in records] for key, records in self.records.items()}
        return {key: fmean(cast("list[float]", shares)) for key, shares in counted.items() if None not in shares}

    @property
    def timings(self) -> dict[Key, Timing]:
        """The least of each method's times."""
        return {key: _least(times) for key, times in self.times.items()}

    @property
    def waiting(self) -> list[Key]:
        """The methods of the newest start that have neither a record nor failed."""
        known = {*self.records, *self.failures}
        newest = self.starts[-1].methods if self.starts else ()
        return [key for one in newest if (key := (one["name"], one["schedule"])) not in known]

    def entry(self, key: Key) -> Mapping[str, Any]:
        """Return what the newest start says of a method.

        Raises: LookupError if no start names it.
        """
        for start in reversed(self.starts):
            for entry in start.methods:
                if (entry["name"], entry["schedule"]) == key:
                    return entry
        raise LookupError(f"no start names the method {key}; take a line of a record of a run.")

    def results(self) -> list[Result]:
        """Sum up every method, in the order in which they ran."""
        full, timings = self.full_steps, self.timings
        return [self._result(key, full, timings) for key in self.records]

    def difference(self, key: Key, other: Key, score: str = "PSNR") -> Interval:
        """Return by how much the PSNR in dB, or another score, of one method is above another's, pair by pair."""
        return paired(self.records[key], self.records[other], score)

    def _result(self, key: Key, full: Mapping[Key, float], timings: Mapping[Key, Timing]) -> Result:
        records = self.records[key]
        prompted = [record.prompted for record in records if record.prompted is not None]
        means = _means([record.scores for record in records])
        floats = [record.scores[FLOAT_PSNR] for record in records] if means.pop(FLOAT_PSNR, None) is not None else None
        return Result(
            *key,
            full[key],
            full[REFERENCE] / full[key],
            *metrics.interval([record.psnr for record in records]),
            fmean(record.ssim for record in records),
            fmean(prompted) if prompted else None,
            **(_speedups(timings[key], timings[REFERENCE]) if key in timings and REFERENCE in timings else {}),
            scores=means,
            pairs=len(records),
            float_psnr=metrics.interval(floats) if floats else None,
        )


def paired(records: Sequence[Record], others: Sequence[Record], score: str = "PSNR", **options: Any) -> Interval:
    """Return by how much a score of some records is above that of others, over the pairs that both have.

    Raises: ValueError if they have none in common.
    """
    theirs = {record.pair: value_of(record, score) for record in others}
    ours = {record.pair: value_of(record, score) for record in records if record.pair in theirs}
    return metrics.paired_interval(list(ours.values()), [theirs[pair] for pair in ours], **options)


def value_of(record: Record, score: str) -> float:
    """Return a score of a record by its name in tables.

    Raises: LookupError if it was not measured.
    """
    known = {"PSNR": record.psnr, "SSIM": record.ssim, **record.scores}
    if score not in known:
        raise LookupError(f"the scores of these records are {', '.join(known)}, got {score!r}; name one of them.")
    return known[score]


def _least(times: Sequence[Time]) -> Timing:
    skipped = [time.skipped for time in times if time.skipped is not None]
    loops, calls = sorted(time.loop for time in times), sorted(time.call for time in times)
    steady = all(some[1] <= AGREE * some[0] for some in (loops, calls) if len(some) > 1)
    return Timing(loops[0], calls[0], min(skipped) if skipped else None, steady)


def _speedups(ours: Timing, reference: Timing) -> dict[str, Any]:
    """Return what a result says of times, nothing if those of either do not agree with each other."""
    if not (ours.steady and reference.steady):
        return dict(steady=False)
    return dict(
        seconds=ours.loop,
        speedup=reference.loop / ours.loop,
        call_seconds=ours.call,
        call_speedup=reference.call / ours.call,
    )


def _means(scores: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the scores that every record has."""
    names = [name for name in (scores[0] if scores else ()) if all(name in one for one in scores)]
    return {name: fmean(one[name] for one in scores) for name in names}


# --- the folder


class Log:
    """The lines of a run that is being measured: those that are there, and a file that more are appended to.

    Without a folder they are kept in memory alone.
    """

    def __init__(self, folder: Path | None = None, shard: int = 0, setting: Mapping[str, Any] | None = None):
        self.folder = folder
        self.path = folder / files.name_of(shard) if folder else None
        self.comparison = Comparison(setting or {})

    def add(self, *lines: Line) -> None:
        """Append lines to the file, all with one write, and take them in."""
        if self.path is not None and lines:
            ledger.append(self.path, [to_text(line) for line in lines])
        for line in lines:
            self.comparison.add(line)

    def keep(self, key: Key, number: int, picture: np.ndarray) -> None:
        """Keep the picture of the pair of this number, as a file if there is a folder."""
        self.comparison.pictures.setdefault(key, []).append(picture)
        if self.folder is not None:
            path, file = picture_path(self.folder, key, number), BytesIO()
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_picture(picture, file, _mark(self.comparison.setting, key, number, picture))
            write_atomically(path, file.getvalue())

    def keep_sound(self, key: Key, number: int, clip: np.ndarray, rate: int) -> None:
        """Write the clip of the pair of this number beside its picture, if there is a folder, for listening."""
        if self.folder is not None:
            save_sound(clip, rate, sound_path(self.folder, key, number))

    def refresh(self) -> None:
        """Read again what all processes wrote, and bring it into order."""
        if self.folder is not None:
            self.comparison = load(self.folder)
        self.comparison.sort()


@contextmanager
def writing(folder: str | Path, setting: Mapping[str, Any], shard: int = 0) -> Iterator[Log]:
    """Open a run's folder to measure on: a new one, or one that holds the same setting.

    The last line of this process's file is removed if a kill tore it. In a folder without records nothing may have the
    name of what a run writes.

    Raises: ValueError if the folder holds another setting, a damaged file, or one that is none of ours in the place of
        one of a run; RuntimeError if another process writes the same file.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    log = Log(folder, shard)
    assert log.path is not None
    with _alone(folder, shard):
        if not any([files.check_same(path, setting) for path in sorted(folder.glob(FILES))]):
            disk.check_free(folder, WRITTEN, "a run of its own")
        planned(folder)
        ledger.repair(log.path)
        if not log.path.exists():
            ledger.write(log.path, files.header(setting))
        log.refresh()
        yield log


def clear(folder: str | Path, setting: Mapping[str, Any]) -> None:
    """Begin a run's records anew: remove the pictures that they name, the schedules planned, and all their lines.

    Whatever else the folder holds stays. A folder without records is left as it is.

    Raises: ValueError and RuntimeError as `writing` does; nothing is removed then.
    """
    folder = Path(folder)
    paths = sorted(folder.glob(FILES))
    with ExitStack() as locks:
        for shard in sorted(shard for path in paths if (shard := files.shard_of(path)) is not None):
            locks.enter_context(_alone(folder, shard))
        begun = [path for path in paths if files.check_same(path, setting)]
        if not begun:
            return
        planned(folder)
        keys = {key for path in begun for key in files.keys_of(path)}
        numbers = range(len(setting.get("pairs", ())))
        kept = [path(folder, *of) for of in product(keys, numbers) for path in (picture_path, sound_path)]
        disk.remove([*kept, folder / PLANNED], folder)
        # Not before: the lines name what is removed.
        write_atomically(folder / files.name_of(0), files.header(setting).encode())
        disk.remove([path for path in paths if path != folder / files.name_of(0)], folder)


@contextmanager
def _alone(folder: Path, shard: int) -> Iterator[None]:
    """Keep other processes from measuring into the same file."""
    try:
        with FileLock(folder / f".lock-{shard}", timeout=0):
            yield
    except Timeout as error:
        path = folder / files.name_of(shard)
        raise RuntimeError(f"another process measures into {path}; wait for it, or end it.") from error


def load(folder: str | Path) -> Comparison:
    """Read all that was measured into a folder, while a process measures or afterwards.

    Raises: FileNotFoundError if it holds no records; ValueError if a file is damaged, or they are of different runs.
    """
    paths = sorted(path for path in Path(folder).glob(FILES) if lines_of(path))
    if not paths:
        raise FileNotFoundError(f"{folder} holds no records ({FILES}); run lesa bench.")
    comparison = Comparison(files.setting_of(paths[0]))
    for path in paths:
        files.check_same(path, comparison.setting)
        for line in ledger.read(path):
            comparison.add(line)
    comparison.sort()
    for key in comparison.records:
        numbers = range(len(comparison.setting.get("pairs", ())))
        paths = {number: path for number in numbers if (path := picture_path(Path(folder), key, number)).exists()}
        if kept := [_read_picture(path, comparison.setting, key, number) for number, path in paths.items()]:
            comparison.pictures[key] = kept
    return comparison


def at_line(path: str | Path, number: int | None = None) -> tuple[Record, Mapping[str, Any], Mapping[str, Any]]:
    """Read the record in a line of a file, from 1 on; returns it with its method's entry and the run's setting.

    Without a number it is the last picture's.

    Raises: FileNotFoundError if there is no such file; ValueError if the line holds no picture's record; LookupError if
        no method that was run made it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is no file here; name the {FILES} of a lesa bench.")
    comparison, lines = load(Path(path).parent), lines_of(Path(path))
    line = _picture_in(lines, number)
    if line is None:
        where = f"line {number} of {path}" if number is not None else path
        raise ValueError(f"{where} (it has {len(lines)} lines) holds no picture's record; take another.")
    return line, comparison.entry((line.method, line.schedule)), comparison.setting


def _picture_in(lines: Sequence[str], number: int | None) -> Record | None:
    """Return the picture's record in a line after the first, or the last one; None if there is none."""
    taken = lines[:0:-1] if number is None else lines[number - 1 : number] if number > 1 else []
    return next((one for one in map(from_text, taken) if isinstance(one, Record)), None)


def picture_path(folder: Path, key: Key, number: int) -> Path:
    """Return the file of a method's picture of the pair of this number."""
    return folder / PICTURES / quote(" ".join(key), safe=" (),+") / f"{number:05d}.png"


def sound_path(folder: Path, key: Key, number: int) -> Path:
    """Return the file of a method's clip of sound of the pair of this number: beside its picture."""
    return picture_path(folder, key, number).with_suffix(".wav")


def _mark(setting: Mapping[str, Any], key: Key, number: int, picture: np.ndarray) -> str:
    """Return a digest of a picture, and of the run, the method and the pair that it is of."""
    shared = {name: value for name, value in setting.items() if name not in ("format", "kind")}
    total = hashlib.sha256(json.dumps([shared, key, number, picture.shape], sort_keys=True).encode())
    total.update(np.ascontiguousarray(picture).tobytes())
    return total.hexdigest()


def _write_picture(picture: np.ndarray, file: BytesIO, mark: str) -> None:
    """Write a picture as PNG, and a clip as one picture of its frames from top to bottom, with their number."""
    facts = PngInfo()
    facts.add_text(MARK, mark)
    if picture.ndim == 4:
        facts.add_text(FRAMES, str(len(picture)))
        picture = np.concatenate(picture)
    Image.fromarray(picture).save(file, "PNG", pnginfo=facts)


def _read_picture(path: Path, setting: Mapping[str, Any], key: Key, number: int) -> np.ndarray:
    """Read what `_write_picture` wrote; files of before have no mark.

    Raises: ValueError if it is something else.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"it claims {image.width} x {image.height} pixels")
            picture, frames, mark = np.asarray(image.convert("RGB")), image.info.get(FRAMES), image.info.get(MARK)
        picture = picture if frames is None else np.stack(np.split(picture, int(frames)))
        if mark not in (None, _mark(setting, key, number, picture)):
            raise ValueError("it is not as it was drawn, or of another run")
        return picture
    except (OSError, SyntaxError, Image.DecompressionBombError, *disk.DAMAGED) as error:
        raise ValueError(f"{path} is no whole picture of this run ({error}); delete it.") from error
