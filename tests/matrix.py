"""Every environment that can be had here: made, tested, and listed in docs/versions.md. `make test-matrix`.

python tests/matrix.py [--only NAME ...] [--quick] [--again] [--make] [--out docs/versions.md]

Environments are kept in .venv-matrix/, each with what its newest run gave, and in said.txt what pytest says while it
runs. A Python that is not on this machine is told and left out. With --again, after what was mended, those tests alone
run that failed in an environment's newest run; what passed before is added, and the page says so.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / ".venv-matrix"
PINNED, OLDEST, NEWEST = "constraints.txt", "constraints-oldest.txt", ""
TOOLS = ("pytest", "pytest-xdist", "hypothesis", "scipy")
"""What the tests themselves need."""
SHOWN = ("torch", "diffusers", "transformers", "huggingface_hub", "numpy")
QUICK = {
    "rows": ["row", "plan", "sampler"],
    "predictors": ["predictor", "shelf", "facts"],
    "host": ["choice", "needs"],
    "learn": ["kinds", "trajectory"],
    "bench": ["records", "report"],
    "cli": ["command_line"],
    "the whole": ["package"],
}
"""The tests of a quick run, by their files' names: of every room of the house, in about 90 s of one core. Where
more is installed, those of the forms that it gives weights."""
RESULT = "result.json"
SAID = "said.txt"
"""What pytest says, in the environment's folder while it runs."""
CACHE = "pytest"
FAILED = f"{CACHE}/v/cache/lastfailed"
"""Which tests failed in the newest run, as pytest keeps it."""


@dataclass(frozen=True)
class Environment:
    """One environment: a Python, versions, and what of lesa is installed, from this checkout or as a wheel.

    Where the newest versions are taken, `held` names packages that stay as pinned.
    """

    name: str
    python: str
    constraints: str
    extras: tuple[str, ...] = ("bench", "models", "video")
    wheel: bool = False
    also: tuple[str, ...] = ()
    held: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        return PLACE / self.name

    @property
    def program(self) -> Path:
        return self.folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")

    @property
    def versions(self) -> str:
        what = {PINNED: "as pinned", OLDEST: "the oldest declared", NEWEST: "the newest there are"}[self.constraints]
        return f"{what}, but for {' and '.join(self.held)} as pinned" if self.held else what

    @property
    def installed(self) -> str:
        what = "a wheel" if self.wheel else "the checkout"
        more = ", ".join((*self.extras, *self.also))
        return f"{what} with {more}" if more else f"{what} without extras"


ENVIRONMENTS = [
    Environment("python-3.10", "3.10", PINNED),
    Environment("python-3.11", "3.11", PINNED),
    Environment("python-3.12", "3.12", PINNED),
    Environment("newest", "3.13", NEWEST, held=("torch",)),
    Environment("oldest", "3.11", OLDEST),
    Environment("wheel", "3.11", PINNED, wheel=True),
    Environment("core", "3.11", PINNED, extras=(), wheel=True),
    Environment("quantised", "3.11", PINNED, also=("torchao", "optimum-quanto", "gguf")),
]


def find_python(version: str) -> str | None:
    """Return a Python of a version, such as '3.12', that runs here: on the path, or one of pyenv's."""
    kept = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), sys.executable, *map(str, kept.glob(f"{version}.*/bin/python"))]
    words = "import sys; print('%d.%d' % sys.version_info[:2])"
    for program in filter(None, found):
        said = subprocess.run([program, "-c", words], capture_output=True, text=True, check=False)
        if said.stdout.strip() == version:
            return program
    return None


def make(environment: Environment, python: str) -> None:
    """Make an environment where it is not there yet, or was made of other declarations.

    Raises: CalledProcessError if it cannot be.
    """
    stamp = environment.folder / "made-of"
    wanted = _declared(environment)
    if stamp.exists() and stamp.read_text() == wanted and not environment.wheel:
        return
    if not environment.program.exists():
        run([python, "-m", "venv", str(environment.folder)])
    pip = [str(environment.program), "-m", "pip", "--disable-pip-version-check", "install"]
    pip += ["-c", str(ROOT / environment.constraints)] if environment.constraints else ["--upgrade"]
    extras = f"[{','.join(environment.extras)}]" if environment.extras else ""
    if environment.wheel:
        with tempfile.TemporaryDirectory() as folder:
            run([*pip[:-3], "wheel", "--no-deps", "-w", folder, str(ROOT)])
            (wheel,) = Path(folder).glob("*.whl")
            run([*pip, f"{wheel}{extras}", *TOOLS])
            run([*pip, "--no-deps", "--force-reinstall", str(wheel)])
    else:
        run([*pip, "-e", f"{ROOT}{extras}", *TOOLS, *environment.also, *map(pinned, environment.held)])
    stamp.write_text(wanted)


def pinned(package: str) -> str:
    """Return a package as it is pinned: 'torch==2.13.0'."""
    return next(line for line in (ROOT / PINNED).read_text().splitlines() if line.startswith(f"{package}=="))


def _declared(environment: Environment) -> str:
    files = ["pyproject.toml", *([environment.constraints] if environment.constraints else [])]
    return repr(environment) + "".join((ROOT / file).read_text() for file in files)


def run(command: Sequence[str], **options: Any) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, check=True, **options)


def surroundings() -> dict[str, str]:
    """Return an environment in which nothing but what is installed is found."""
    return {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def tested(environment: Environment, quick: bool, workers: int) -> dict[str, Any]:
    """Run the tests in an environment, and of a wheel what a user does with it alone; returns what that gave."""
    some = ["types"] if environment.also else [name for names in QUICK.values() for name in names]
    files = [f"tests/test_{name}.py" for name in some] if quick else []
    shutil.rmtree(environment.folder / CACHE, ignore_errors=True)  # what failed in older runs
    return {**_run_tests(environment, workers, files), "quick": quick}


def tested_again(environment: Environment, workers: int) -> dict[str, Any]:
    """Run what failed in an environment's newest run; returns what that and what passed before give together.

    Raises: Stopped if there is no such run, nothing failed in it, or what failed is not there any more.
    """
    kept = environment.folder / RESULT
    before = json.loads(kept.read_text()) if kept.exists() else {}
    if not _failures(before):
        raise Stopped(f"{environment.name}: it has no run in which tests failed: run it without --again")
    wrong = list(json.loads((environment.folder / FAILED).read_text()))
    found = _run_tests(environment, workers, wrong)
    if sum(found["counts"].values()) < len(wrong):
        raise Stopped(f"{environment.name}: not all that failed is there any more: run it whole, without --again")
    counts = {name: before["counts"].get(name, 0) + found["counts"].get(name, 0) for name in ("passed", "skipped")}
    counts |= {name: found["counts"][name] for name in ("failed", "error") if name in found["counts"]}
    return {**found, "counts": counts, "quick": before["quick"], "again": before.get("again", len(wrong))}


class Stopped(Exception):
    """An environment's tests did not all run: what they gave is no row."""


def _failures(found: dict[str, Any]) -> int:
    return sum(found.get("counts", {}).get(name, 0) for name in ("failed", "error"))


def _run_tests(environment: Environment, workers: int, arguments: Sequence[str]) -> dict[str, Any]:
    """Run pytest in an environment, which keeps what failed, and of a wheel what a user does with it alone.

    Raises: Stopped if the tests did not run to their end.
    """
    began, program = time.time(), str(environment.program)
    command = [program, "-m", "pytest", "-q", "-n", str(workers), "--dist", "loadfile", *arguments]
    command += ["-o", f"cache_dir={environment.folder / CACHE}"]
    with (environment.folder / SAID).open("w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=ROOT, env=surroundings(), stdout=file, stderr=subprocess.STDOUT, check=False)
    said = (environment.folder / SAID).read_text(encoding="utf-8")
    print(said[-6000:], flush=True)
    if done.returncode not in (0, 1):
        raise Stopped(f"{environment.name}: pytest ended with {done.returncode} before its tests had all run")
    last = next((line for line in reversed(said.splitlines()) if re.search(r"\d+ (passed|failed|error)", line)), "")
    return {
        "versions": _versions(program),
        "counts": {name: int(count) for count, name in re.findall(r"(\d+) (passed|failed|skipped|error)", last)},
        "code": done.returncode,
        "outside": outside_of(program) if environment.wheel else 0,
        "seconds": time.time() - began,
        "date": time.strftime("%Y-%m-%d"),
    }


def outside_of(program: str) -> int:
    """Do with an installed wheel what somebody does who has no checkout; returns how that ended."""
    command = [program, str(ROOT / "tests" / "outside.py")]
    done = subprocess.run(command, env=surroundings(), capture_output=True, text=True, check=False)
    print(done.stdout[-4000:], done.stderr[-2000:], flush=True)
    return done.returncode


def _versions(program: str) -> dict[str, str]:
    words = "import importlib.metadata as m, json, sys; found = {'python': sys.version.split()[0]}; "
    words += f"found |= {{n: m.version(n) for n in {SHOWN!r}}}; print(json.dumps(found))"
    said = subprocess.run([program, "-c", words], capture_output=True, text=True, check=True, env=surroundings())
    return json.loads(said.stdout)


HEADINGS = (
    *("environment", "versions", "installed", "Python"),
    *SHOWN,
    *("passed", "failed", "skipped", "outside", "tests", "run on"),
)
HEAD = """# Versions

Written by `make test-matrix`, which makes each of these environments and runs the tests in it. `outside` is what
somebody does with the wheel and no checkout, in an empty folder (`tests/outside.py`): every command's help; a tiny
model collected for, trained for, calibrated and run by the program `lesa`; the demo, or what it says that it lacks.
A row stays until its environment runs again. Where `tests` has some of them again, these failed in the whole run and,
after what was mended, ran alone (`python tests/matrix.py --again`); what else passed did so before.

What `pyproject.toml` declares: {bounds}. Python 3.10 ends with diffusers 0.41 and
transformers 5.20, the newest that are made for it.
"""


def page(results: Sequence[tuple[Environment, dict[str, Any] | None]], before: str = "") -> str:
    """Return docs/versions.md: a table of the environments, each with what its newest run gave.

    Where one has not run here, its row of the page `before` stays.
    """
    rows = [list(HEADINGS), ["---"] * (4 + len(SHOWN)) + ["---:"] * 3 + ["---"] * 3]
    known = {cells[0]: cells for cells in map(_cells_of, before.splitlines()) if len(cells) == len(HEADINGS)}
    for one, found in results:
        missing = "not run" if find_python(one.python) else "not had here"
        row = [one.name, one.versions, one.installed]
        never = [*row, one.python, *[""] * (len(HEADINGS) - 6), missing, ""]
        rows.append([*row, *_cells(found, one.wheel)] if found else known.get(one.name, never))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{HEAD.format(bounds=', '.join(f'`{one}`' for one in declared()))}\n{table}\n"


def _cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def declared() -> list[str]:
    """Return the lower bounds in pyproject.toml."""
    text = (ROOT / "pyproject.toml").read_text()
    python = re.findall(r'^requires-python = "(.*)"', text, re.M)
    return [*re.findall(r'^    "(\w+>=[\d.]+)",$', text, re.M)[:4], *(f"Python {one}" for one in python)]


def _cells(found: dict[str, Any], wheel: bool) -> list[str]:
    counts, again = found["counts"], found.get("again", 0)
    versions = [found["versions"][name].split("+")[0] for name in ("python", *SHOWN)]
    told = [str(counts.get("passed", 0)), str(_failures(found)), str(counts.get("skipped", 0))]
    return [
        *versions,
        *told,
        "failed" if found["outside"] else "works" if wheel else "",
        ("a subset" if found["quick"] else "all") + (f", {again} of them again" if again else ""),
        found["date"],
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[one.name for one in ENVIRONMENTS], help="these alone")
    parser.add_argument("--quick", action="store_true", help="some files of tests, of every room")
    parser.add_argument("--again", action="store_true", help="what failed in the newest run; what passed is added")
    parser.add_argument("--make", action="store_true", help="make the environments and test nothing")
    parser.add_argument("--workers", type=int, default=2, help="processes that share the files of tests (2; 0: none)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "versions.md")
    options = parser.parse_args()
    if options.again and options.quick:
        parser.error("--again runs what failed in the newest run, whole or --quick: leave out --quick")
    wrong = []
    for environment in ENVIRONMENTS:
        if options.only and environment.name not in options.only:
            continue
        python = find_python(environment.python)
        if python is None:
            print(f"{environment.name}: no Python {environment.python} is here; it is left out", flush=True)
            continue
        make(environment, python)
        if options.make:
            continue
        print(f"\n== {environment.name}", flush=True)
        try:
            if options.again:
                found = tested_again(environment, options.workers)
            else:
                found = tested(environment, options.quick, options.workers)
        except Stopped as error:
            print(f"{error}; its row stays", flush=True)
            wrong.append(environment.name)
            continue
        (environment.folder / RESULT).write_text(json.dumps(found, indent=1))
        if found["code"] or found["outside"]:
            wrong.append(environment.name)
    if not options.make:
        kept = [(one, one.folder / RESULT) for one in ENVIRONMENTS]
        results = [(one, json.loads(file.read_text()) if file.exists() else None) for one, file in kept]
        before = options.out.read_text(encoding="utf-8") if options.out.exists() else ""
        options.out.write_text(page(results, before), encoding="utf-8")
    print("failed: " + ", ".join(wrong) if wrong else "none failed")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
