"""What README and docs tell people to type is there, and what must not be said is not."""

import copy
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import lesa
from lesa.cli.parser import parser
from lesa.host.pipelines import with_call
from lesa.predictors.shipped import SHIPPED_FOLDER

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "models").glob("*/README.md"))]
CHANGELOG = ROOT / "CHANGELOG.md"
REAL = ("flux", "flux2", "qwen-image", "hunyuanvideo", "hunyuanvideo-1.5", "wan", "z-image", "ltx-2", "sdxl")
OF_REAL_MODELS = [ROOT / "docs" / f"{name}.md" for name in REAL]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    """Return a page's blocks of code of one language, '' for commands."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [code for of, code in found if of == language]


def commands(page: Path) -> list[list[str]]:
    """Return the arguments of every `lesa ...` that a page's blocks hold, with the variables that they set put in."""
    values: dict[str, list[str]] = {}
    found = []
    for line in "".join(blocks(page, "")).replace("\\\n", " ").splitlines():
        words = [word for one in shlex.split(line, comments=True) for word in values.get(one, [one])]
        if len(words) == 1 and (setting := re.fullmatch(r"(\w+)=(.*)", words[0])):
            name, value = setting.groups()
            values[f"${name}"] = [value] if value.startswith("{") else value.split()  # JSON stays one argument
        elif words[:1] == ["lesa"]:
            found.append(words[1:])
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=name)
def test_commands_of_a_page_are_commands(page):
    for words in commands(page):
        assert callable(parser().parse_args(words).command)


def exists(dotted: str) -> bool:
    """Whether a dotted name is a module of the package, or something in one."""
    parts = dotted.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value: Any = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(value, part):
                return False
            value = getattr(value, part)
        return True
    return False


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md", CHANGELOG], ids=name)
def test_names_of_the_package_on_a_page_exist(page):
    text = page.read_text()
    if page == CHANGELOG:
        text = re.sub(r"^\| `lesa\..*$", "", text, flags=re.MULTILINE)  # what modules were called
    names = set(re.findall(r"(?<![\w./-])lesa(?:\.[A-Za-z_]\w*)+", text))
    assert not sorted(one for one in names if not exists(one))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name)
def test_files_of_the_repository_on_a_page_exist(page):
    folders = "src|tests|docs|benchmarks|integrations"
    named = set(re.findall(rf"\b(?:{folders})/[\w./-]*\w\.(?:py|sh|md|json|png)\b", page.read_text()))
    assert [file for file in sorted(named) if not (ROOT / file).exists() and not (page.parent / file).exists()] == []


def test_names_that_do_not_exist_are_seen():
    assert exists("lesa.learn.planning.detours") and exists("lesa.Schedule.every")
    assert not any(map(exists, ("lesa.planning.detours", "lesa.learn.planning.nothing", "lesa.Schedule.nothing")))


def test_what_modules_are_called_now_exists():
    moved = re.findall(r"^\| (`lesa\..*?) \| (`lesa\..*?) \|$", CHANGELOG.read_text(), re.MULTILINE)
    now = [one for _, new in moved for one in re.findall(r"`([\w.]+)`", new)]
    assert len(moved) > 20 and not [one for one in now if not exists(one)]


@pytest.mark.parametrize("page", OF_REAL_MODELS, ids=name)
def test_pages_of_real_models_begin_with_few_prompts(page):
    assert any(words[0] == "calibrate" for words in commands(page))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_nothing_is_installed_from_an_index_under_the_projects_name(page):
    """It is not published: a checkout is what there is."""
    assert not re.search(r"pip install [^`\n]*lesa", page.read_text())


def test_the_readme_begins_with_any_pipeline(tiny_flux, call):
    """Its first block runs, as it stands, on a pipeline that nobody trained for: what it calibrates, it finds."""
    block = blocks(ROOT / "README.md", "python")[0]
    assert "lesa.load" not in block and "lesa.accelerate(pipe) as run" in block
    printed: list[object] = []
    del call["generator"]  # a calibration's runs have noise of their own
    pipe = with_call(copy.copy(tiny_flux), {**call, "num_inference_steps": 10})
    exec(block.replace(", ...]", "]"), {"pipe": pipe, "print": printed.append})
    assert printed[0]["cond"].full_steps == 8 and printed[0].promise


def block_with(page: str, text: str) -> str:
    """Return the first block of Python on a page of docs/ that says this."""
    return next(block for block in blocks(ROOT / "docs" / page, "python") if text in block)


def test_what_needs_no_calibrating_is_that(tiny_flux, call):
    """The first block of how to run needs nothing but a pipeline."""
    block = blocks(ROOT / "docs" / "run.md", "python")[0]
    assert "lesa.Taylor(1), schedule=lesa.Schedule.every(3)" in block
    run: dict[str, Any] = {"pipe": with_call(copy.copy(tiny_flux), call), "print": lambda _summary: None}
    exec(block, run)
    assert run["run"].summary()["cond"].skipped_steps == 5  # of 8


def test_a_model_that_comes_with_predictors_has_some():
    """The block holds for the model that it loads, and of no other: the page must not promise more."""
    block = block_with("train.md", "takes the one for many grids")
    folder = re.search(r'lesa\.load\("(.*?)"\)', block)
    assert folder and list((ROOT / folder[1] / SHIPPED_FOLDER).glob("*/config.json"))
    assert "lesa.accelerate(pipe) as" in block and "Pipeline" not in block


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_rows_without_training_are_not_advised_on_the_papers_schedules(page):
    """Under guidance they are below as few steps of the same sampler there."""
    for block in blocks(page, "python"):
        assert not re.search(r"lesa\.(Reuse|Taylor|Lagrange)\(.*Schedule\.paper", block)


def test_the_headline_run_is_not_short():
    """A call of a model that comes with predictors, strictly: no forecast has less past than it is made for."""
    pipe = lesa.load(ROOT / "models" / "emoji-flux")
    pipe.set_progress_bar_config(disable=True)
    with lesa.accelerate(pipe, strict=True) as run:
        pipe("small red apple on blue, left", output_type="latent")
    assert run.summary()["cond"].short_rows == 0 and "fewer past" not in str(run.summary())
