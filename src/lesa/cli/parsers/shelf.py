"""What the command for what was calibrated is asked with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lesa.cli import options


def add(commands: Any) -> None:
    """Add the command."""
    words = "list, show, remove, export and push what was calibrated"
    examples = ("lesa shelf", "lesa shelf show NAME", "lesa shelf export NAME MODEL/lesa/NAME")
    what = options.add(commands, "shelf", "shelf.listed", words, examples).add_subparsers(metavar="WHAT")
    options.add(what, "list", "shelf.listed", "the names of what is kept", "lesa shelf list")
    for name, help, example in (
        ("show", "what one is for, and what was measured of it", "lesa shelf show NAME"),
        ("remove", "remove one, also one that cannot be read", "lesa shelf remove NAME"),
        ("export", "copy one into a folder, such as lesa/NAME beside a model", "lesa shelf export NAME FOLDER"),
        ("push", "upload one to the Hugging Face hub", "lesa shelf push NAME OWNER/REPO --private"),
    ):
        one = options.add(what, name, f"shelf.{name}", help, example)
        one.add_argument("name", metavar="NAME", help="as lesa shelf lists it")
        if name == "export":
            one.add_argument("folder", metavar="FOLDER", type=Path)
        if name == "push":
            one.add_argument("repo", metavar="REPO", help="owner/name")
            one.add_argument("--private", action="store_true")
