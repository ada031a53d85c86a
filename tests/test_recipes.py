"""Every script of models/recipes and benchmarks runs through, and every command in it is one that there is."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lesa.cli.parser import parser

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*ROOT.glob("models/recipes/*.sh"), *ROOT.glob("benchmarks/*.sh")])
PROGRAMS = sorted([*ROOT.glob("models/*.py"), *ROOT.glob("benchmarks/*.py")])
WRITES_DOWN = """#!{python}
import json, sys
from pathlib import Path

with open("calls", "a") as file:  # one line, which programs side by side do not tear
    file.write(json.dumps(sys.argv) + "\\n")
if "train" in sys.argv:
    (Path(sys.argv[sys.argv.index("--out") + 1]) / "ground-truth").mkdir(parents=True, exist_ok=True)
if {{"train", "calibrate"}} & set(sys.argv):
    sys.exit({status})
"""


def calls_of(script: Path, root: Path, status: int) -> list[list[str]]:
    """Run a script in a copy of the scripts, where the programs write down their calls and what learns ends so."""
    for folder in ("models/recipes", "benchmarks"):
        shutil.copytree(ROOT / folder, root / folder)
    (root / "out").mkdir(exist_ok=True)
    (root / ".venv" / "bin").mkdir(parents=True)
    for name in ("lesa", "python", "pip", "torchrun"):
        program = root / ".venv" / "bin" / name
        program.write_text(WRITES_DOWN.format(python=sys.executable, status=status))
        program.chmod(0o755)
    done = subprocess.run([root / script.relative_to(ROOT)], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == (status if status != 3 else 0), done.stderr
    return [json.loads(line) for line in (root / "calls").read_text().splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_calls_what_there_is(script, tmp_path):
    """Trainings and calibrations that are of no use, which exit with 3, do not end it."""
    assert os.access(script, os.X_OK) and re.match(r"#!.*\n# (Makes|Shows) ", script.read_text())
    calls = calls_of(script, tmp_path, status=3)
    assert calls
    for program, *words in calls:
        if "lesa.cli" in words:
            words = words[words.index("lesa.cli") + 1 :]
        elif not program.endswith("lesa"):
            continue
        assert callable(parser().parse_args(words).command)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_what_a_program_imports_is_there(path, monkeypatch):
    """Also of those that no other test runs."""
    monkeypatch.syspath_prepend(path.parent)
    spec = importlib.util.spec_from_file_location(f"_imported_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)


def test_a_training_that_fails_ends_its_script(tmp_path):
    (script,) = [path for path in SCRIPTS if path.stem == "flux-many"]
    trainings = [words for words in calls_of(script, tmp_path, status=1) if "train" in words]
    assert len(trainings) == 1


def test_the_demo_begins_with_a_pipeline_without_predictors_that_is_calibrated_anew(tmp_path):
    (script,) = [path for path in SCRIPTS if path.stem == "demo"]
    (tmp_path / "out" / "demo" / "home").mkdir(parents=True)
    calls = calls_of(script, tmp_path, status=3)
    first, second = (calls[k][1:] for k in (0, 1))
    assert first[0] == "calibrate" and second[:2] == ["benchmarks/side_by_side.py", first[1]]
    assert not (ROOT / first[1] / "lesa").exists() and not (tmp_path / "out" / "demo" / "home").exists()
    *demos, (_, last, sound, *_) = calls[2:]
    assert last == "benchmarks/listen.py" and (ROOT / sound).is_dir()
    given = [parser().parse_args(words[1:]) for words in (calls[0], *demos)]
    assert given[0].budget == int(second[second.index("--budget") + 1])
    assert len({one.out for one in given[1:]}) == len(given[1:]) == 3


def test_a_benchmark_is_a_line_of_the_makefile():
    text = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"benchmarks/[\w-]+\.sh", text))
    assert named == {str(path.relative_to(ROOT)) for path in SCRIPTS if path.parent.name == "benchmarks"}
