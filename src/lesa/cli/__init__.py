"""The command `lesa`: options in, one library call, words out."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

USER_ERRORS = (ValueError, LookupError, OSError, RuntimeError, ImportError)
COMPLETES = "_ARGCOMPLETE"
"""What a shell sets where it asks how a line may go on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; errors that a user can cause end as one line, and 2. Three commands answer a question by 0 or 1,
    and 3 is a training that was of no use."""
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("lesa: stopped", file=sys.stderr)
        return 130


def _run(arguments: Sequence[str] | None) -> int:
    from lesa.cli.parser import parser

    asked = parser()
    if COMPLETES in os.environ:
        _complete(asked)
    options = asked.parse_args(arguments)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return options.command(options) or 0
    except USER_ERRORS as error:
        if options.traceback or isinstance(error, (KeyError, IndexError)):
            raise
        print(f"lesa: {_as_typed(' '.join(str(error).split()), vars(options))}", file=sys.stderr)
        return 2


def _complete(asked: argparse.ArgumentParser) -> None:
    """Answer a shell that asks how a line may go on, which ends the process; without argcomplete say nothing."""
    with suppress(ModuleNotFoundError):
        import_module("argcomplete").autocomplete(asked)


def _warn(message: Warning | str, *_where: Any, **_more: Any) -> None:
    """Say a warning in one line: where in the code it comes from is of no use to whoever typed a command."""
    print(f"lesa: {_as_command(' '.join(str(message).split()))}", file=sys.stderr)


def _as_command(text: str) -> str:
    """Write calls that a text advises as the commands that do the same."""

    def command(found: re.Match[str]) -> str:
        given = [part.strip().split("=") for part in found[1].replace("'", "").split(",") if "=" in part]
        return "lesa calibrate MODEL --prompts FILE" + "".join(f" --{name} {value}" for name, value in given)

    return re.sub(r"lesa\.calibrate\(pipe, prompts([^()]*)\)", command, text)


def _as_typed(text: str, options: Sequence[str] | dict) -> str:
    """Write the arguments that an error names, such as tap='output', as this command's options are typed."""
    names = "|".join(sorted(options, key=len, reverse=True))
    value = r"(?:'([^']*)'|([\w:-]*(?:\.\w+)*))(?=[\s,;)]|\.(?:\s|$)|$)"

    def typed(found: re.Match[str]) -> str:
        return f"--{found[1].replace('_', '-')} {found[2] or found[3] or ''}".rstrip()

    return re.sub(rf"(?<![\w(.-])({names})={value}", typed, _as_command(text))
