"""The command for what was calibrated: shelf."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from lesa.cli.options import say
from lesa.predictors.calibration import Calibration
from lesa.predictors.shelf import Shelf


def listed(_given: Namespace) -> None:
    """List what is kept."""
    shelf = Shelf()
    kept = shelf.all()
    for one in kept:
        say(f"{one.name}  {', '.join(map(str, one.budgets))} full of {one.facts.steps} steps  {one.when[:10]}")
    if not kept:
        say(f"nothing is calibrated yet in {shelf.folder}: lesa calibrate")


def show(given: Namespace) -> None:
    """Show what one is for, and what was measured of it."""
    for line in _told(Shelf().find(given.name)):
        say(line)


def _told(one: Calibration) -> list[str]:
    facts = one.facts
    guidance = [str(facts.guidance)] * (facts.guidance is not None) + [f"{x:g} as an input" for x in facts.embedded]
    versions = ", ".join(f"{name} {version}" for name, version in one.versions.items())
    return [
        str(one.folder),
        f"weights   {one.fingerprint}",
        f"made      {one.when} with {versions}",
        f"runs      {facts.steps} steps from step {facts.start} on, latents {facts.shape}, {facts.sampler}"
        + (" with noise" if facts.noise else ""),
        f"streams   {', '.join(facts.streams)}; guidance {', '.join(guidance) or 'none'}",
        *(f"{'chosen ' if budget == one.chosen else '':<9} {one.promise(budget)}" for budget in one.budgets),
    ]


def remove(given: Namespace) -> None:
    """Remove one."""
    say(f"removed {Shelf().remove(given.name)}")


def export(given: Namespace) -> None:
    """Copy one into a folder."""
    say(str(Shelf().export(given.name, given.folder)))


def push(given: Namespace) -> None:
    """Upload one to the hub."""
    say(Shelf().push(given.name, given.repo, private=given.private or None))


def add(commands: Any) -> None:
    """Add the command."""
    words = "list, show, remove, export and push what was calibrated"
    parser = commands.add_parser("shelf", help=words, description=words)
    parser.set_defaults(command=listed)
    what = parser.add_subparsers(metavar="WHAT")
    what.add_parser("list", help="the names of what is kept").set_defaults(command=listed)
    for name, run, help in (
        ("show", show, "what one is for, and what was measured of it"),
        ("remove", remove, "remove one, also one that cannot be read"),
        ("export", export, "copy one into a folder, such as lesa/NAME beside a model"),
        ("push", push, "upload one to the Hugging Face hub"),
    ):
        one = what.add_parser(name, help=help, description=help)
        one.add_argument("name", metavar="NAME", help="as lesa shelf lists it")
        one.set_defaults(command=run)
        if run is export:
            one.add_argument("folder", metavar="FOLDER", type=Path)
        if run is push:
            one.add_argument("repo", metavar="REPO", help="owner/name")
            one.add_argument("--private", action="store_true")
