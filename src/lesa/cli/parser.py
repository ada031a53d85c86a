"""The parser of the command line: a group of commands from each of the other files."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from typing import NoReturn

from lesa.cli import bench, facts, learn, run, shelf


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser; what it parses names the `command` to call with it."""
    found = _Parser(prog="lesa", description="Faster diffusers pipelines: the features of skipped steps are forecast.")
    found.add_argument(
        "--version", action="store_const", const=_print_version, dest="command", help="print the version"
    )
    found.add_argument("--traceback", action="store_true", help="show where an error comes from")
    found.set_defaults(command=lambda _: found.print_help())
    commands = found.add_subparsers(metavar="COMMAND")
    for group in (bench, learn, shelf, facts, run):
        group.add(commands)
    return found


def _print_version(_options: argparse.Namespace) -> None:
    print(f"lesa {version('lesa-cache')}")
