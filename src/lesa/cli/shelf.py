"""The command for what was calibrated: shelf."""

from __future__ import annotations

from argparse import Namespace

from lesa.cli.options import say, say_next
from lesa.predictors.calibration import Calibration
from lesa.predictors.shelf import Shelf


def listed(_given: Namespace) -> None:
    """List what is kept."""
    shelf = Shelf()
    kept = shelf.all()
    for one in kept:
        say(f"{one.name}  {', '.join(map(str, one.budgets))} full of {one.steps} steps  {one.when[:10]}")
    if kept:
        say_next("shelf", "show", kept[0].name)
    else:
        say(f"nothing is calibrated yet in {shelf.folder}")
        say_next("calibrate", "MODEL", "--prompts", "FILE", "--budget", 8)


def show(given: Namespace) -> None:
    """Show what one is for, and what was measured of it."""
    for line in _told(Shelf().find(given.name)):
        say(line)
    say_next("shelf", "export", given.name, "FOLDER")


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
    say_next("shelf")


def export(given: Namespace) -> None:
    """Copy one into a folder."""
    say(str(Shelf().export(given.name, given.folder)))
    say_next("doctor", "MODEL")


def push(given: Namespace) -> None:
    """Upload one to the hub."""
    say(Shelf().push(given.name, given.repo, private=given.private or None))
    say_next("doctor", "MODEL")
