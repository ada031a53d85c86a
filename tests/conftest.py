"""What the tests share: tiny pipelines and the arguments that fit their calls."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from lesa.bench import recogniser
from lesa.host import needs

torch.set_num_threads(1)
ROOT = Path(__file__).parents[1]
recogniser.CODE = ROOT / "models"
"""What tells pictures is code of the checkout, which the tests are in; lesa may be a wheel, which has none."""

EXTRAS = ("accelerate", "peft", "matplotlib", "skimage", "emoji", "espeakng_loader", "imageio", "torchsde")
LACKING = [name for name in EXTRAS if not find_spec(name)]
"""What of the extras is not installed here, as where lesa's core is tested alone."""
refused: list[str] = []
"""What lesa said, in the test that runs, that it lacks."""


def _lacks(excinfo: Any) -> str | None:
    """Return why a test cannot be had here: it imports what is not installed, or lesa said in one line that it lacks
    that, in the test or in what several tests share."""
    if isinstance(excinfo.value, ImportError) and ": pip install " in str(excinfo.value):
        return str(excinfo.value)
    missing = re.search(r"No module named '(\w+)", str(excinfo.value))
    paths = [Path(str(entry.path)) for entry in excinfo.traceback]
    ours = {ROOT / "models", ROOT / "tests"} & set(paths[-1].parents)
    by_lesa = not ours and any("lesa" in path.parts for path in paths)
    if missing and missing[1] in LACKING and not by_lesa:
        return f"needs {missing[1]}"
    return refused[0] if refused else None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    missing = re.search(r"No module named '(\w+)", str(report.longrepr)) if report.failed else None
    if missing and missing[1] in LACKING:
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, f"Skipped: needs {missing[1]}")
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if report.failed and LACKING and (why := _lacks(call.excinfo)):
        report.outcome, report.longrepr = "skipped", (str(item.path), 0, f"Skipped: {why}")
    return report


@pytest.fixture(autouse=bool(LACKING))
def _refusals(monkeypatch):
    """Remember what lesa says that it lacks."""
    check = needs.check
    refused.clear()

    def remembered(who: str, *asked: str) -> None:
        try:
            check(who, *asked)
        except ImportError as error:
            refused.append(str(error))
            raise

    monkeypatch.setattr(needs, "check", remembered)


@pytest.fixture(scope="session", autouse=True)
def _no_home_of_ours(tmp_path_factory):
    """Keep what is made before a test, in fixtures that it shares, away from the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LESA_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def lesa_home(_no_home_of_ours, tmp_path_factory, monkeypatch):
    """Where a test's own shelf is, empty at first: none sees the user's, or another test's."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("LESA_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny_flux():
    """A tiny FluxPipeline with random weights, shared by all tests: leave it as it was."""
    from tiny import build_pipeline  # it takes seconds to import, and few tests need it

    return build_pipeline()


@pytest.fixture(scope="session")
def tiny_qwen():
    """A tiny QwenImagePipeline with random weights, shared by all tests: leave it as it was."""
    from tiny import build_qwen_pipeline

    return build_qwen_pipeline()


@pytest.fixture(scope="session")
def tiny_hunyuan():
    """A tiny HunyuanVideoPipeline with random weights, shared by all tests: leave it as it was."""
    from tiny import build_hunyuan_pipeline

    return build_hunyuan_pipeline()


@pytest.fixture
def call() -> dict[str, Any]:
    """Arguments of a small call of `tiny_flux`: `pipe(prompt, **call).images` are latents, (1, 16, 16)."""
    return dict(
        height=32,
        width=32,
        num_inference_steps=8,
        max_sequence_length=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    )
