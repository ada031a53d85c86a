"""What a pipeline says in each of many runs is said once."""

import logging

import pytest

import lesa
from lesa.learn import said

LONG = "small red apple " * 20


@pytest.fixture
def heard(monkeypatch):
    """Messages that come to a handler of diffusers'; what others say goes on to the root logger's, and here too."""
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    handler, library = Handler(), logging.getLogger("diffusers")
    monkeypatch.setattr(library, "propagate", False)
    for logger in (library, logging.getLogger()):
        monkeypatch.setattr(logger, "handlers", [*logger.handlers, handler])
    return messages


def test_a_message_of_a_library_passes_once_and_others_always(heard):
    library, own = logging.getLogger("diffusers.pipelines.any"), logging.getLogger("my.program")
    with said.once():
        for number in (1, 1, 2):
            library.error("cut: %d", number)
            own.error("mine")
    assert heard == ["cut: 1", "mine", "mine", "cut: 2", "mine"]
    library.error("cut: 1")
    assert heard[-1] == "cut: 1"
    assert not any(handler.filters for name in ("diffusers", "") for handler in logging.getLogger(name).handlers)


def test_a_prompt_that_is_cut_is_told_once_of_all_runs(tiny_flux, heard, tmp_path):
    call = dict(height=32, width=32, max_sequence_length=16)
    options = lesa.CollectOptions(batch_size=1, call={**call, "num_inference_steps": 2})
    tiny_flux(LONG, **call, num_inference_steps=1, output_type="latent")
    told = [text for text in heard if "truncated" in text]
    assert told
    heard.clear()
    assert len(lesa.collect(tiny_flux, [LONG], tmp_path / "runs", options, seeds=[1, 2, 3])) == 3
    assert [text for text in heard if "truncated" in text] == told
