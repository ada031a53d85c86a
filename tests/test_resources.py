"""What models take: the page is what its script writes, of classes as diffusers has them."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "resources.md").read_text()


@pytest.fixture(scope="module")
def script():
    """The script that writes the page."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import resources

        yield resources
        for name in ("resources", "calibration_cost"):
            sys.modules.pop(name)


@pytest.mark.parametrize("name", ["Z-Image", "HunyuanVideo-1.5"])
def test_a_models_lines_are_what_the_script_writes(script, name):
    (one,) = [one for one in script.listed() if one.name == name]
    assert all(line in PAGE.splitlines() for line in script.lines(one))


def test_the_page_has_the_scripts_words_and_models(script):
    said = script.WORDS.format(budget=script.BUDGET, terms=script.TERMS, models="", histories="", calibrations="")
    assert [line for line in said.splitlines() if line and line not in PAGE.splitlines()] == []
    assert all(PAGE.count(f"| {one.name} |") == 3 for one in script.listed())


def test_wans_and_fluxs_calibrations_are_those_of_the_page_that_counts_them(script):
    """`docs/calibrate.md` has the same figures from another script's tables."""
    counted = (ROOT / "docs" / "calibrate.md").read_text()
    for name in ("FLUX.1-dev", "Qwen-Image", "Wan 2.2 A14B"):
        (line,) = [one for one in PAGE.splitlines() if one.startswith(f"| {name}") and "," in one.split("|")[2]][-1:]
        assert line.split("|")[2].strip() in counted
