"""A model's own recogniser is found by a file beside the model, and said to be left out where its code is not."""

import json
from pathlib import Path

import pytest
from composed_emoji import COMPOSITIONS, Atlas, caption

from lesa.bench import recogniser as recognisers
from lesa.bench.recogniser import PROMPTED, RECOGNISER_FILE, left_out, recogniser
from lesa.bench.records import Result
from lesa.bench.report import NOT_HAD, table

MODELS = Path(__file__).parents[1] / "models"
EMBEDDED = sorted(file.parent for file in MODELS.glob("*/model_index.json"))


def test_pictures_are_recognised():
    folder = MODELS / "emoji-flux"
    recognise = recogniser(folder)
    first, second, *_ = Atlas(folder).names
    drawn = Atlas(folder).draw(first, COMPOSITIONS[0])
    prompts = [caption(name, COMPOSITIONS[0]) for name in (first, second)]
    assert recognise is not None and recognise(prompts, [drawn, drawn]) == [True, False]


@pytest.mark.parametrize("folder", EMBEDDED, ids=lambda folder: folder.name)
def test_every_embedded_model_has_one(folder):
    assert callable(recogniser(folder)) and left_out(folder) is None


def test_a_model_without_one_is_asked_nothing(tmp_path):
    assert recogniser(tmp_path) is None and left_out(tmp_path) is None


def test_where_the_code_is_not_it_is_left_out_and_said_so(monkeypatch, tmp_path):
    """As in an installed package."""
    monkeypatch.setattr(recognisers, "CODE", tmp_path)
    folder = MODELS / "emoji-flux"
    assert recogniser(folder) is None
    assert "run lesa from a checkout, where it is models/composed_emoji.py" in str(left_out(folder))


def test_a_table_says_that_it_was_left_out():
    result = Result("LESA", "every:5", 10, 5.0, 50.0, 49.0, 51.0, 0.99, prompted=None)
    for lacking, cell in ([PROMPTED], NOT_HAD), ([], "-"):
        head, _, row = (line.strip("| ").split("|") for line in table([result], lacking).splitlines())
        assert head[-1].strip() == PROMPTED and len([one for one in head if PROMPTED in one]) == 1
        assert row[-1].strip() == cell


@pytest.mark.parametrize(
    "entry", ['{"code": "../evil.py"}', '{"code": "/tmp/evil.py"}', "{}", "[]", '{"code": 3}', "no"]
)
def test_code_comes_with_the_library_alone(entry, tmp_path):
    (tmp_path / "evil.py").write_text("raise AssertionError('it was run')")
    model = tmp_path / "model"
    model.mkdir()
    (model / RECOGNISER_FILE).write_text(entry)
    with pytest.raises(ValueError, match="repair it"):
        recogniser(model)


def test_a_file_without_a_recogniser_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(recognisers, "CODE", tmp_path)
    (tmp_path / "tells_nothing.py").write_text("")
    (tmp_path / RECOGNISER_FILE).write_text(json.dumps({"code": "tells_nothing.py"}))
    with pytest.raises(ValueError, match="names a file with a recogniser"):
        recogniser(tmp_path)
