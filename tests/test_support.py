"""The page of what is accelerated: written by running pipelines of the zoo, and of all of them."""

import runpy
import sys
from pathlib import Path

from zoo.pipelines import ZOO

ROOT = Path(__file__).parents[1]
SOME = ["flux_guided", "sd3_heun_guided", "latent_consistency", "skyreels_forcing_asynchronous_guided"]


def rows(page: str) -> dict[str, list[str]]:
    """The cells of a page's table by the name in the zoo."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:1] == "|"]
    return {cells[1]: cells for cells in lines[2:]}


def test_the_page_says_what_runs_did(tmp_path, monkeypatch):
    page = tmp_path / "support.md"
    monkeypatch.setattr(sys, "argv", ["support.py", "--only", *SOME, "--out", str(page)])
    runpy.run_path(str(ROOT / "benchmarks" / "support.py"), run_name="__main__")
    text = page.read_text()
    flux, heun, noisy, refused = (rows(text)[name] for name in SOME)
    assert flux == [
        *("FluxPipeline", "flux_guided", "FluxTransformer2DModel", "FlowMatchEulerDiscreteScheduler"),
        *("6", "2", "equal", "8 of 12", ""),
    ]
    assert heun[4:8] == ["11", "1", "equal", "7 of 11"]  # two evaluations a step, but for the last
    assert noisy[3] == "LCMScheduler" and noisy[6] == "equal" and noisy[8] == "data"
    assert int(noisy[7].split()[0]) > 0
    assert refused[4:] == ["-", "-", "-", "-", "refused"]
    reasons = text.partition("## What is refused")[2]
    assert "frames at different noise levels" in reasons
    assert "- 3 end with the same bits" in text and "- 1 have samplers that add noise" in text


def test_the_committed_page_is_of_the_whole_zoo():
    found = rows((ROOT / "docs" / "support.md").read_text())
    assert set(found) == set(ZOO), "make support writes the page anew"
    assert not [name for name, cells in found.items() if "DIFFERS" in cells]
