"""What is said of published PSNRs: the figures of the page are those that its command prints, and no other page passes
wrapped figures on as PSNR."""

import re
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT, PAGE = ROOT / "benchmarks" / "published.py", ROOT / "docs" / "published.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "models").glob("**/README.md"))]
WRAPPED = {
    *("28.94", "28.61", "30.17", "28.38", "29.65", "31.46", "30.63", "30.03"),  # FLUX.1-dev
    *("28.60", "28.58", "30.18", "28.14", "29.23", "30.62", "32.1"),  # Qwen-Image, and with Lightning
    *("30.29", "30.77", "30.76", "30.96"),  # LESA's ablation
}
"""The papers' PSNRs of pictures."""


@pytest.fixture(scope="module")
def printed() -> list[str]:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out:
        patch.setattr(sys, "argv", ["published.py"])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return out.getvalue().splitlines()


def test_the_pages_table_is_what_the_command_prints(printed):
    page = PAGE.read_text()
    assert "python benchmarks/published.py" in page and "\n".join(printed) in page


def test_published_figures_rise_to_28_db_where_psnr_falls_to_10(printed):
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed[2:]]
    true, wrapped, low, high = ([float(row[k]) for row in rows] for k in range(1, 5))
    assert true[0] < 11 and 27 < low[0] <= high[0] < 28.5  # unrelated photographs
    assert all(f"{of:.0f} dB" in row[0] for of, row in zip(true[1:], rows[1:], strict=True))
    assert wrapped[1] < wrapped[4] + 1 < wrapped[1] + 2 and true[4] - true[1] == pytest.approx(12, abs=0.05)
    assert wrapped[-1] == pytest.approx(true[-1], abs=0.05)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_page_passes_a_wrapped_figure_on_as_psnr(page):
    """A paragraph that speaks of a paper and has one of its figures says what they are, or where that is said."""
    for paragraph in re.split(r"\n\s*\n", page.read_text()):
        speaks = re.search(r"\bpapers?\b(?!:)", paragraph)  # paper:7 is a schedule
        if page != PAGE and speaks and set(re.findall(r"\d+\.\d+", paragraph)) & WRAPPED:
            assert "published.md" in paragraph
