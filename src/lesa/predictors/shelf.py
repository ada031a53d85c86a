"""The shelf: where calibrated predictors are kept and found, by the weights and the facts that they are for."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import platformdirs
from filelock import FileLock

from lesa.predictors.base import Predictor
from lesa.predictors.calibration import CALIBRATION_FILE, Calibration, folder_of
from lesa.predictors.disk import check_free
from lesa.predictors.facts import Facts

HOME_VARIABLE = "LESA_HOME"
SHELF_FOLDER = "shelf"
SHOWN = 16
"""Digits of a fingerprint that its folder is named by."""
PARTIAL, REPLACED, LOCK = ".partial-", ".replaced-", ".lock-"


def home() -> Path:
    """Return the folder that all of lesa's own files are kept in: `LESA_HOME`, or one in the user's cache."""
    named = os.environ.get(HOME_VARIABLE)
    return Path(named).expanduser() if named else platformdirs.user_cache_path("lesa")


class Shelf:
    """Calibrations on disk: `<folder>/<fingerprint>/<calibration>/<J>-full/`, and a `calibration.json` for each.

    Without a folder it is the user's own (see `home`).
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = home() / SHELF_FOLDER if folder is None else Path(folder)

    def put(
        self, fingerprint: str, facts: Facts, predictors: Mapping[int, Predictor], table: Mapping[str, Any]
    ) -> Path:
        """Keep a calibration: a predictor for each budget of full steps; returns its folder.

        `table` is as `Calibration` has it. The folder is there whole or not at all; a calibration of the same weights
        and facts is replaced.

        Raises: ValueError if there is no predictor, or the table does not choose among them.
        """
        place = self.folder / fingerprint[:SHOWN]
        place.mkdir(parents=True, exist_ok=True)
        digests = {budget: predictor.digest() for budget, predictor in predictors.items()}
        made = Calibration(
            place, fingerprint, facts, tuple(sorted(predictors)), dict(table), versions(), _now(), digests
        )
        with FileLock(self.folder / f"{LOCK}{fingerprint[:SHOWN]}"):  # another process may put something here
            _sweep(place)
            target = self._replaced(made) or place / made.name_for(predictors)
            partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=place))
            try:
                for budget, predictor in predictors.items():
                    predictor.save_pretrained(folder_of(partial, budget))
                made.write(partial)
                _exchange(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
        return target

    def _replaced(self, made: Calibration) -> Path | None:
        """Return the folder of the calibration of the same weights and facts, if there is one."""
        for known in self.calibrations(made.fingerprint):
            if known.facts.shape == made.facts.shape and not made.facts.differences(known.facts):
                return known.folder
        return None

    def calibrations(self, fingerprint: str) -> list[Calibration]:
        """Return what is kept for these weights, the newest first; warns of what cannot be read."""
        found = self._read(self.folder / fingerprint[:SHOWN])
        return [one for one in found if one.fingerprint == fingerprint]

    def all(self) -> list[Calibration]:
        """Return what is kept for any weights, the newest first of each; warns of what cannot be read."""
        places = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        return [one for place in places if not place.name.startswith(".") for one in self._read(place)]

    def changed(self, fingerprint: str) -> int:
        """Return a number that is another one once something was put there or removed for these weights."""
        place = self.folder / fingerprint[:SHOWN]
        return place.stat().st_mtime_ns if place.is_dir() else 0

    def _read(self, place: Path) -> list[Calibration]:
        folders = [one for one in place.iterdir() if not one.name.startswith(".")] if place.is_dir() else []
        folders += _between(place)
        found = [one for folder in sorted(folders) if (one := read_or_warn(folder)) is not None]
        return sorted(found, key=lambda one: one.when, reverse=True)

    def find(self, name: str) -> Calibration:
        """Return the calibration of a name: its folder's.

        Raises: LookupError if there is none.
        """
        kept = self.all()
        found = next((one for one in kept if one.name == name), None)
        if found is None:
            names = ", ".join(one.name for one in kept) or "none"
            raise LookupError(f"a name is one of {self.folder}'s calibrations ({names}), got {name!r}; see lesa shelf.")
        return found

    def remove(self, name: str) -> Path:
        """Remove a calibration, also one that cannot be read; returns the folder where it was.

        Raises: LookupError if there is none.
        """
        hidden = not name or name.startswith(".") or Path(name).name != name
        damaged = [] if hidden else [one for one in self.folder.glob(f"*/{name}") if one.is_dir()]
        folder = damaged[0] if damaged else self.find(name).folder
        shutil.rmtree(folder)
        shutil.rmtree(folder.with_name(f"{REPLACED}{name}"), ignore_errors=True)
        if not any(folder.parent.iterdir()):
            folder.parent.rmdir()
        return folder

    def export(self, name: str, folder: str | Path) -> Path:
        """Copy a calibration into a folder, such as `lesa/` beside a model's own files; returns where it is then.

        Raises: LookupError if there is none; ValueError if something is there.
        """
        found, target = self.find(name), Path(folder)
        check_free(target, ["*"], "a calibration")
        shutil.copytree(found.folder, target, dirs_exist_ok=True)
        return target

    def push(self, name: str, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Upload a calibration to a repository of the hub, which is made if there is none; returns its address.

        `lesa.accelerate(pipe, hub=repo_id)` takes it from there.

        Raises: LookupError if there is none.
        """
        from huggingface_hub import HfApi

        found, hub = self.find(name), HfApi(token=token)
        repo_id = hub.create_repo(repo_id, private=private, exist_ok=True).repo_id
        upload = hub.upload_folder(
            repo_id=repo_id, folder_path=found.folder, commit_message=f"Push the calibration {name} using lesa."
        )
        return str(upload)


def read_or_warn(folder: Path) -> Calibration | None:
    """Read the calibration in a folder; where that cannot be, warn and return None."""
    try:
        return Calibration.read(folder)
    except (ValueError, OSError) as error:
        warnings.warn(
            f"{folder} is to hold a calibration, which cannot be read ({error}), and is passed over; calibrate anew, "
            f"or remove it: lesa shelf remove {folder.name}.",
            stacklevel=2,
        )
        return None


def fetch(repo_id: str, **options: Any) -> Calibration | None:
    """Fetch the calibration in a repository of the hub, or in a folder; None if it holds none.

    Options are those of `hf_hub_download`.

    Raises: FileNotFoundError if there is no such repository; ValueError if what it holds cannot be read.
    """
    if Path(repo_id).is_dir():
        folder = Path(repo_id)
        return Calibration.read(folder) if (folder / CALIBRATION_FILE).exists() else None
    from huggingface_hub import snapshot_download

    try:
        patterns = [CALIBRATION_FILE, "*-full/*"]
        folder = Path(snapshot_download(repo_id, allow_patterns=patterns, **options))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{repo_id} is neither a folder here nor a repository of the hub that can be had ({error}); check its name."
        ) from error
    return Calibration.read(folder) if (folder / CALIBRATION_FILE).exists() else None


def _exchange(made: Path, target: Path) -> None:
    """Put a folder in the place of another, which is there under another name until then."""
    old = target.with_name(f"{REPLACED}{target.name}")
    if target.exists():
        os.replace(target, old)
    os.replace(made, target)
    shutil.rmtree(old, ignore_errors=True)


def _between(place: Path) -> list[Path]:
    """Return the folders that a kill left without what was to take their place: they count still."""
    return [old for old in place.glob(f"{REPLACED}*") if not old.with_name(old.name[len(REPLACED) :]).exists()]


def _sweep(place: Path) -> None:
    """Give back its name to what a kill left without, and remove what was left half written: nobody else writes."""
    for old in _between(place):
        os.replace(old, old.with_name(old.name[len(REPLACED) :]))
    for folder in [*place.glob(f"{REPLACED}*"), *place.glob(f"{PARTIAL}*")]:
        shutil.rmtree(folder, ignore_errors=True)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def versions() -> dict[str, str]:
    """Return the versions that a calibration depends on, as far as they are known."""
    found = {}
    for package in ("lesa-cache", "diffusers", "torch"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return found
