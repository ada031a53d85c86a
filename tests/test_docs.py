"""The site: every block of Python on it runs, every public name is on it, and it is built without a warning."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import test_pages
from zoo.standin import instead, stand_in

import lesa
from lesa.learn import calibrate

ROOT = Path(__file__).parents[1]
PAGES = [*test_pages.PAGES, ROOT / "models" / "emoji-qwen" / "lightning" / "README.md", ROOT / "CONTRIBUTING.md"]
PROMPTS = ["small red apple on white, left", "large blue fish on grey, right", "small green pear on pink, left"]
FILES = ["train.txt", "validation.txt", "heldout.txt"]
FEW = calibrate.CalibrateOptions(most=2, refine=0, progress=False)
"""What a calibration tries here: that the block runs is the question, and not how good it is."""


def blocks(page: Path) -> list[str]:
    return test_pages.blocks(page, "python")


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with prompts and the repository's models, pipelines of the zoo for all others, and short calibrations."""
    for file in FILES:
        (tmp_path / file).write_text("\n".join(PROMPTS * 4))
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    instead(monkeypatch)
    monkeypatch.setattr(calibrate, "LARGE", 0)  # real weights are called one prompt at a time
    ours = lesa.calibrate
    monkeypatch.setattr(lesa, "calibrate", lambda *args, **kwargs: ours(*args, **{"options": FEW, **kwargs}))
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=test_pages.name)
def test_the_blocks_of_a_page_run(page, desk, recwarn):
    """One after the other, as they stand, on a pipeline of the reader's own where the page loads none."""
    known: dict[str, Any] = {} if loads(page) else {"pipe": stand_in("flux"), "lesa": lesa}
    for block in blocks(page):
        exec(compile(block.replace(", ...]", "]"), f"{test_pages.name(page)}, {block[:40]!r}", "exec"), known)


def loads(page: Path) -> bool:
    """Whether a page's first block says where its pipeline is from."""
    return bool(re.search(r"^pipe = ", blocks(page)[0], re.MULTILINE))
