"""The first hours of new users, as scripts: they run, and what is said at a command's end is a command."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lesa.cli.parser import parser

SCRIPTS = sorted((Path(__file__).parent / "first_hour").glob("*.sh"))
MADE = {
    "own_pipeline": ["curve.svg", "apple.png", "apple-full.png"],
    "compare_caches": ["mine/report.md", "mine/psnr-over-ratio.pdf", "mine/pictures.png"],
    "train_for_a_team": ["runs/collection.json", "lesa/config.json", "apple.png", "bench/report.md"],
}


def commands(script: Path) -> list[list[str]]:
    """Return the arguments of every command of a script, with its variables as they are by default."""
    text = script.read_text().replace("\\\n", " ")
    values = dict(re.findall(r"(\w+)=\$\{\w+:-([^}]*)\}", text))
    lines = [line for line in text.splitlines() if line.startswith("$LESA")]
    words = [
        shlex.split(re.sub(r"\$\((?:[^()]|\([^()]*\))*\)", "1", line).split("||")[0], comments=True) for line in lines
    ]
    return [[re.sub(r"\$(\w+)", lambda found: values.get(found[1], "x"), word) for word in one[1:]] for one in words]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_commands_of_a_first_hour_are_commands(script):
    found = commands(script)
    assert len(found) > 5
    for words in found:
        assert callable(parser().parse_args(words).command)


@pytest.mark.broad
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_first_hour_runs(script, tmp_path):
    asked = {"LESA": f"{sys.executable} -m lesa.cli", "PYTHON": sys.executable, "OUT": str(tmp_path / "out")}
    home = {"LESA_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    done = subprocess.run([script], env={**os.environ, **asked, **home}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    hints = re.findall(r"^next: lesa (.*)$", done.stderr, re.MULTILINE)
    assert len(hints) >= len(commands(script)) - 2  # what is refused has none
    for hint in hints:
        assert callable(parser().parse_args(shlex.split(hint)).command)
    assert not [name for name in MADE[script.stem] if not (tmp_path / "out" / name).exists()]
    bars = [line for line in done.stderr.splitlines() if "%|" in line]
    assert all(line.count("%|") == 1 for line in bars)
