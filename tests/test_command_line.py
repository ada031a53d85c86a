"""The command line as a whole: what it imports, its helps and examples, what it completes, what it says at the end."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

import lesa
from lesa.cli import COMPLETES, main, options
from lesa.cli.parser import parser
from lesa.learn.progress import Bar

HEAVY = ("torch", "numpy", "diffusers", "transformers", "PIL", "matplotlib")


def imported(code: str) -> list[str]:
    """Return what a new process has imported in the end."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('\\n'.join(sys.modules))"],
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def of(modules: list[str], *packages: str) -> list[str]:
    return [name for name in modules if name.split(".")[0] in packages]


def test_to_import_lesa_costs_next_to_nothing():
    modules = imported("import lesa")
    assert of(modules, "lesa") == ["lesa"] and not of(modules, *HEAVY)


def test_to_accelerate_imports_nothing_of_learning_and_benchmarks():
    """Beside torch and diffusers it is lesa's own files that are in use, and few packages more."""
    before = imported("import torch, diffusers")
    after = [name for name in imported("import torch, diffusers, lesa; lesa.accelerate") if name not in before]
    ours = of(after, "lesa")
    assert 0 < len(ours) < 60 and not [
        name for name in ours if name.startswith(("lesa.bench", "lesa.learn", "lesa.cli"))
    ]
    assert len(after) - len(ours) < 60 and not of(after, "matplotlib", "skimage", "scipy", "peft", "accelerate")


def test_to_calibrate_imports_no_benchmarks():
    modules = imported("import lesa; lesa.calibrate")
    assert not [name for name in modules if name.startswith("lesa.bench")] and not of(modules, "matplotlib", "skimage")


def test_the_parser_needs_none_of_what_commands_work_with():
    """A shell that completes a line, and whoever asks for help, do not wait for torch."""
    assert not of(imported("from lesa.cli.parser import parser; parser()"), *HEAVY)


def parsers(of: argparse.ArgumentParser, name: str = "lesa") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Give the parser of every command, those of commands of commands among them."""
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, one in action.choices.items():
                yield f"{name} {word}", one
                yield from parsers(one, f"{name} {word}")


COMMANDS = dict(parsers(parser()))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_help_ends_with_examples_that_are_commands(name):
    text = COMMANDS[name].format_help()
    _, _, examples = text.partition("for example:\n")
    lines = [line.strip() for line in examples.splitlines() if line.strip()]
    assert lines and all(line.startswith(name) for line in lines)
    for line in lines:
        assert callable(parser().parse_args(shlex.split(line)[1:]).command)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_where_it_is_said_to_be(name):
    given = COMMANDS[name].get_default("command")
    module, function = given.name.split(".")
    source = __import__(f"lesa.cli.{module}", fromlist=[function])
    assert callable(getattr(source, function))


def test_exit_codes_are_told(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert [int(code) for code in re.findall(r"^  (\d+) ", text, re.MULTILINE)] == [0, 1, 2, 3, 130]


def test_what_a_shell_asks_is_handed_to_argcomplete(monkeypatch):
    asked = []
    monkeypatch.setenv(COMPLETES, "1")
    module = type(sys)("argcomplete")
    module.autocomplete = lambda found: asked.append(found)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "argcomplete", module)
    with pytest.raises(SystemExit):
        main(["--help"])
    assert [one.prog for one in asked] == ["lesa"]
    monkeypatch.setitem(sys.modules, "argcomplete", None)  # without it nothing is completed, and nothing fails
    with pytest.raises(SystemExit):
        main(["--help"])


def test_lines_are_completed(tmp_path):
    pytest.importorskip("argcomplete")
    line, out = "lesa cali", tmp_path / "out"
    asked = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
    }
    subprocess.run([sys.executable, "-m", "lesa.cli"], env={**os.environ, **asked}, check=False)
    assert out.read_text().strip() == "calibrate"


def test_what_may_come_next_is_quoted_as_a_shell_needs_it(capsys):
    options.say_next("generate", "models/x y", "a red apple", "--budget", 8)
    assert capsys.readouterr().err == "next: lesa generate 'models/x y' 'a red apple' --budget 8\n"


class Terminal:
    def __init__(self, watched: bool):
        self.text, self.watched = "", watched

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        return None

    def isatty(self) -> bool:
        return self.watched


@pytest.mark.parametrize("watched", [False, True])
def test_a_bar_that_nobody_watches_is_one_line(watched):
    file = Terminal(watched)
    with Bar(total=50, desc="collect", file=file, mininterval=0, miniters=1) as bar:
        for _ in range(50):
            bar.update(1)
    lines = [line for line in re.split(r"[\r\n]", file.text) if line.strip()]
    assert "50/50" in lines[-1] and (len(lines) > 10 if watched else len(lines) == 1)


def test_a_bar_of_a_sequence_that_nobody_watches_is_one_line():
    file = Terminal(False)
    assert list(Bar(range(9), file=file, mininterval=0)) == list(range(9))
    assert len([line for line in re.split(r"[\r\n]", file.text) if line.strip()]) == 1


def test_names_of_the_front_door_are_those_of_their_files():
    assert lesa.Default().schedule_for([1 - k / 20 for k in range(21)]).draw(20).count("#") == 9
    assert lesa.plan.__module__ == "lesa.learn.plan" and lesa.bench.__name__ == "lesa.bench"
