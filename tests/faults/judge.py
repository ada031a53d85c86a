"""One fault and what came of it: refused in one line, harmless, or a failure of ours."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import sysconfig
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from test_bombs import little

import lesa
from faults.mutations import fitting
from faults.subjects import SUBJECTS
from lesa.cli import USER_ERRORS

SECONDS = 60
"""A reading that takes longer hangs."""
HARMLESS, REFUSED, TOLD, AGAIN = "harmless", "refused", "told", "made again"
FINE = (HARMLESS, REFUSED, TOLD, AGAIN)
"""What may come of a fault: the same as without; one line and nothing else; a warning and the rest; or what a
stop would have left, which goes on from there."""
AROUND = [sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(Path(lesa.__file__).parents[2])]
AROUND += ["/dev/null", "/dev/urandom", "/proc", "/sys", "/etc/mime.types", "/etc/apache2", "/etc/httpd"]
RUN = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "socket.getaddrinfo")
WRITTEN = {"os.remove": 1, "os.rename": 2, "os.mkdir": 2, "os.rmdir": 1, "shutil.rmtree": 1}
"""Which argument of each names the open folder, if any, that its path begins in: `shutil.rmtree` removes so."""


class Fault(NamedTuple):
    """One damage to one file of an artefact; all of it follows from these."""

    subject: str
    file: str
    damage: str
    seed: int

    def __str__(self) -> str:
        return f"{self.subject}, {self.file}: {self.damage} ({self.seed})"


_watching: list[tuple[Path, list[str]]] = []


def _hear(event: str, args: tuple) -> None:
    """Take note of what is read, written or run outside of the folder that is read."""
    if not _watching:
        return
    folder, seen = _watching[-1]
    if event == "open" and args[1] is None and sys._getframe(1).f_code.co_filename == shutil.__file__:
        return  # folders within an open one, of which nothing tells which: what is removed there does
    if event in RUN:
        seen.append(f"{event} {args!r:.200}")
    elif (event == "open" or event in WRITTEN) and isinstance(args[0], (str, bytes)):
        path = str(_begun_in(args, WRITTEN.get(event)) / os.fsdecode(args[0]))
        if not any(path.startswith(str(place)) for place in (folder, *AROUND)) or "/.." in path:
            seen.append(f"{event} {path}")


def _begun_in(args: tuple, at: int | None) -> Path:
    """Return the folder that a path begins in: an open one, or this process's own."""
    opened = args[at] if at is not None and at < len(args) else None
    place = Path(f"/proc/self/fd/{opened}")
    return place.readlink() if isinstance(opened, int) and opened >= 0 and place.exists() else Path.cwd()


sys.addaudithook(_hear)


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """Collect what happens outside of a folder."""
    _watching.append((folder, []))
    try:
        yield _watching[-1][1]
    finally:
        _watching.pop()


@contextmanager
def bounded() -> Iterator[None]:
    """Let nothing take long, or much memory: 20 MB of objects, and tensors of 200 000 numbers."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"it took more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        with little():
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Case:
    """An artefact as it should be, and another of its kind, in a folder."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder, self.subject = name, folder, SUBJECTS[name]
        for number in range(2):
            (folder / f"whole-{number}").mkdir(parents=True)
            self.subject.make(folder / f"whole-{number}", number)
        whole = folder / "whole-0"
        self.files = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
        self.files = [file for file in self.files if not Path(file).name.startswith(".lock")]
        self.wanted = self.subject.use(self._copy())
        self.other = self.subject.use(folder / "whole-1")

    def _copy(self) -> Path:
        place = self.folder / "damaged"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(self.folder / "whole-0", place)
        return place

    def faults(self, count: int, seed: int = 0) -> list[Fault]:
        """Draw faults: each kind of damage to each kind of file in turn."""
        random = Random(f"{self.name} {seed}")
        kinds = [(file, damage) for file in self.files for damage in fitting(Path(file))]
        random.shuffle(kinds)
        return [Fault(self.name, *kinds[k % len(kinds)], seed=seed * 10_000 + k) for k in range(count)]

    def try_out(self, fault: Fault) -> tuple[str, str]:
        """Damage a copy, read it, and judge what came of it; returns a verdict and what was said."""
        place = self._copy()
        file = place / fault.file
        fitting(file)[fault.damage](Random(str(fault)), file, self.folder / "whole-1" / fault.file)
        with warnings.catch_warnings(record=True) as said, watched(place) as outside:
            warnings.simplefilter("always")
            verdict, words = self._read(place, fault)
        if outside:
            return "outside", outside[0]
        told = [" ".join(str(one.message).split()) for one in said if issubclass(one.category, UserWarning)]
        if verdict == "silent" and told:
            return (TOLD if any(self._names(place, one) for one in told) else "nameless"), told[0]
        return verdict, words

    def _read(self, place: Path, fault: Fault) -> tuple[str, str]:
        try:
            with bounded():
                found = self.subject.use(place)
            if "sealed" in fault.damage and "NaN" not in fault.damage:
                return HARMLESS, ""  # another predictor, which works
        except AssertionError as error:
            return "allocation", str(error)
        except TimeoutError as error:
            return "hang", str(error)
        except USER_ERRORS as error:
            words = " ".join(str(error).split())
            if isinstance(error, (KeyError, IndexError, RecursionError)) or not words:
                return "traceback", _where(error)
            return (REFUSED, words) if self._names(place, words) else ("nameless", words)
        except Exception as error:
            return "traceback", _where(error)
        if not self.subject.signed or found == self.wanted:
            return HARMLESS, ""
        return (AGAIN, "") if self._same(found) else ("silent", "")

    def _names(self, place: Path, words: str) -> bool:
        return str(place) in words or any(Path(file).name in words for file in self.files) or self.name in words

    def _same(self, found: Any) -> bool:
        """Tell whether what was read is what should have been.

        Rounds and records may end early, as where a process was stopped, and of a calibration budgets may lack: what
        lacks is made again. A file that is a whole artefact of another may be that.
        """
        if len(self.files) == 1 and found == self.other:
            return True
        if isinstance(found, list):
            return found == self.wanted[: len(found)]
        if isinstance(found, dict) and "lines" not in found:
            return found.items() <= self.wanted.items()
        return isinstance(found, dict) and _begins(found, self.wanted)


def _begins(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Tell whether records are some of those wanted, of the same run, each once and as it was."""
    lines, pictures = found["lines"], found["pictures"]
    same = found["setting"] == wanted["setting"] and found["planned"] in ({}, wanted["planned"])
    once = all(lines.count(line) == 1 and line in wanted["lines"] for line in lines)
    return same and once and all(set(kept) <= set(wanted["pictures"][key]) for key, kept in pictures.items())


def _where(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {str(error)[:160]} at {Path(frame.filename).name}:{frame.lineno}"


def campaign(folder: Path, count: int, seed: int = 0) -> tuple[dict[str, Counter[str]], list[tuple[Fault, str, str]]]:
    """Try so many faults of each kind of artefact; returns the verdicts, and the failures."""
    verdicts: dict[str, Counter[str]] = {}
    failures = []
    for name in SUBJECTS:
        case = Case(name, folder / name.replace(" ", "-"))
        verdicts[name] = Counter()
        for fault in case.faults(count, seed):
            verdict, words = case.try_out(fault)
            verdicts[name][verdict] += 1
            if verdict not in FINE:
                failures.append((fault, verdict, words))
    return verdicts, failures
