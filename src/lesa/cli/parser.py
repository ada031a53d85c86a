"""The parser of the command line: a group of commands from each file of `parsers`."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from typing import NoReturn

from lesa.cli.parsers import bench, doctor, facts, learn, run, shelf

EPILOG = """exit codes:
  0    done; compare, reproduce: no difference
  1    compare, reproduce: they differ; doctor: the pipeline would be refused
  2    an error: one line says what must hold, what was got, and what to do (--traceback says where)
  3    calibrate, train: done and kept, but rows without training are as good
  130  stopped by Ctrl-C; the same command goes on from there

to begin with:
  lesa doctor MODEL
  lesa calibrate MODEL --prompts FILE --budget 8
  lesa generate MODEL 'a red apple'"""


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """Return the parser; what it parses names the `command` to call with it."""
    words = "Faster diffusers pipelines: the features of skipped steps are forecast."
    raw = argparse.RawDescriptionHelpFormatter
    found = _Parser(prog="lesa", description=words, epilog=EPILOG, formatter_class=raw)
    found.add_argument(
        "--version", action="store_const", const=_print_version, dest="command", help="print the version"
    )
    found.add_argument("--traceback", action="store_true", help="show where an error comes from")
    found.set_defaults(command=lambda _: found.print_help())
    commands = found.add_subparsers(metavar="COMMAND")
    for group in (run, learn, shelf, doctor, bench, facts):
        group.add(commands)
    return found


def _print_version(_options: argparse.Namespace) -> None:
    print(f"lesa {version('lesa-cache')}")
