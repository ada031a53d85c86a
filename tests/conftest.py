"""What the tests share: tiny pipelines and the arguments that fit their calls."""

from typing import Any

import pytest
import torch

torch.set_num_threads(1)


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
