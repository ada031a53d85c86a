"""The site: every block of Python on it runs, every public name is on it, and it is built without a warning."""

import dataclasses
import inspect
import os
import re
import subprocess
import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
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
PROMPTS_TRIED, FEW = 1, dict(most=1, refine=0, rivals=False, pictures=False, progress=False)
"""What a calibration takes here: that the block runs is the question, and not how good it is."""


def blocks(page: Path) -> list[str]:
    return test_pages.blocks(page, "python")


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder to work in."""
    set_up(tmp_path, monkeypatch)
    return tmp_path


def set_up(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Give a folder prompts and the repository's models; load tiny pipelines for all others, and calibrate briefly."""
    for file in FILES:
        (folder / file).write_text("\n".join(PROMPTS * 4))
    (folder / "models").symlink_to(ROOT / "models")
    patch.chdir(folder)
    instead(patch)
    patch.setattr(calibrate, "LARGE", 0)  # real weights are called one prompt at a time
    ours = lesa.calibrate

    def briefly(pipe: Any, calls: Any, *args: Any, options: Any = None, **more: Any) -> Any:
        few = dataclasses.replace(options or calibrate.CalibrateOptions(), **FEW)
        return ours(pipe, calls[:PROMPTS_TRIED], *args, options=few, **more)

    patch.setattr(lesa, "calibrate", briefly)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=test_pages.name)
def test_the_blocks_of_a_page_run(page, desk, recwarn):
    """One after the other, as they stand, on a pipeline of the reader's own where the page loads none."""
    if any("export_to_video" in block for block in blocks(page)):
        for module in ("imageio", "imageio_ffmpeg"):
            pytest.importorskip(module, reason=f"diffusers writes clips with {module} (the extra `video`)")
    known: dict[str, Any] = {} if loads(page) else {"pipe": stand_in("flux"), "lesa": lesa}
    for block in blocks(page):
        exec(compile(block.replace(", ...]", "]"), f"{test_pages.name(page)}, {block[:40]!r}", "exec"), known)


def loads(page: Path) -> bool:
    """Whether a page's first block says where its pipeline is from."""
    return bool(re.search(r"^pipe = ", blocks(page)[0], re.MULTILINE))


# --- names, links, and the site as a whole


def named() -> list[str]:
    """Return what the page of the API shows."""
    return re.findall(r"^::: lesa\.(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)


def test_every_public_name_is_on_the_page_of_the_api_once():
    assert sorted(named()) == sorted(lesa.__all__)


def members(kind: type) -> list[str]:
    """Return the public methods and properties that a class states itself."""
    kinds = (staticmethod, classmethod, property)
    return [k for k, v in vars(kind).items() if k[0] != "_" and (inspect.isfunction(v) or isinstance(v, kinds))]


@pytest.mark.parametrize("name", [name for name in lesa.__all__ if inspect.isclass(getattr(lesa, name))])
def test_what_a_public_class_can_do_is_documented(name):
    kind = getattr(lesa, name)
    assert not [one for one in members(kind) if not inspect.getdoc(getattr(kind, one))]


def slugs(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = [re.sub(r"\]\([^)]*\)", "", title) for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)]
    found = {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}
    return found | ({f"lesa.{name}" for name in named()} if page.name == "api.md" else set())


@pytest.fixture(scope="module")
def hooks():
    """What the site is built with."""
    spec = spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=test_pages.name)
def test_links_of_a_page_lead_somewhere_on_the_site(page, hooks):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for _, target, after in hooks.LINK.findall(text):
        if not re.match(r"\w+:", target):
            file = (page.parent / target).resolve()
            path = file.relative_to(ROOT).as_posix()
            assert file.is_file() and (path in hooks.OUTSIDE or file.parent == ROOT / "docs"), target
            assert after == ")" or after[1:-1] in slugs(file), f"{target}{after}"
    for anchor in re.findall(r"\]\(#([^)]*)\)", text):
        assert anchor in slugs(page), anchor


@pytest.mark.parametrize(
    ("at", "link", "turned"),
    [
        ("index.md", "[a](docs/flux.md#x)", "[a](flux.md#x)"),
        ("index.md", "[a](CONTRIBUTING.md)", "[a](CONTRIBUTING.md)"),
        ("figures.md", "[a](../README.md)", "[a](index.md)"),
        ("figures.md", "[a](https://a.b/c)", "[a](https://a.b/c)"),
        ("models/emoji-qwen/README.md", "![a](sheet.png)", "![a](sheet.png)"),
        ("models/emoji-qwen/README.md", "[a](../../docs/flux.md)", "[a](../../flux.md)"),
    ],
)
def test_links_hold_where_the_site_has_pages_elsewhere(hooks, at, link, turned):
    assert hooks.with_links(link, at) == turned


@pytest.mark.skipif(not find_spec("mkdocs"), reason="mkdocs is not installed here (the extra `docs`)")
def test_the_site_is_built_without_a_warning(tmp_path):
    """Broken links, missing anchors, pages that nothing leads to and names that cannot be shown are warnings.

    (With `--quiet` mkdocs does not count them.)
    """
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=quiet, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    api = (tmp_path / "api.html").read_text()
    assert not [name for name in lesa.__all__ if f'id="lesa.{name}"' not in api]
