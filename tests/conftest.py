"""What the tests share: tiny pipelines and the arguments that fit their calls."""

from typing import Any

import pytest
import torch

torch.set_num_threads(1)


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
