"""Calls are read from a file, with their pictures."""

import json

import pytest
from PIL import Image

from lesa.learn.call_files import prompts_of, read_calls


@pytest.fixture
def folder(tmp_path):
    inside = tmp_path / "calls"
    (inside / "pictures").mkdir(parents=True)
    Image.new("RGB", (8, 4), "red").save(inside / "a.png")
    Image.new("L", (2, 2), 7).save(inside / "pictures" / "mask.WEBP", lossless=True)
    Image.new("RGB", (3, 3), "blue").save(tmp_path / "outside.png")
    return inside


def write(folder, *calls):
    lines = [call if isinstance(call, str) else json.dumps(call) for call in calls]
    (folder / "calls.jsonl").write_text("\ufeff" + "\n".join(lines) + "\n\n", encoding="utf-8")
    return folder / "calls.jsonl"


def test_a_line_is_a_call_and_names_of_pictures_are_pictures(folder):
    path = write(
        folder,
        {"prompt": "an apple.png", "image": "a.png", "strength": 0.5},
        "",
        {"negative_prompt": "a.png", "images": ["a.png", "pictures/mask.WEBP"], "height": 32, "mode": "fast"},
    )
    first, second = read_calls(path)
    assert first.pop("image").getpixel((0, 0)) == (255, 0, 0) and first == {"prompt": "an apple.png", "strength": 0.5}
    pictures = second.pop("images")
    assert [picture.size for picture in pictures] == [(8, 4), (2, 2)]
    assert second == {"negative_prompt": "a.png", "height": 32, "mode": "fast"}


@pytest.mark.parametrize("absolute", [False, True])
def test_pictures_outside_of_the_folder_are_refused(folder, absolute):
    outside = folder.parent / "outside.png"
    with pytest.raises(ValueError, match="lie in the folder of their file"):
        read_calls(write(folder, {"image": str(outside) if absolute else "../outside.png"}))
    (folder / "link.png").symlink_to(outside)
    with pytest.raises(ValueError, match="lie in the folder of their file"):
        read_calls(write(folder, {"images": ["a.png", "link.png"]}))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "holds no call"),
        (["", "  "], "holds no call"),
        (['{"prompt": "x"}', "{"], "in line 2 of .*calls.jsonl"),
        (['["x"]'], "a JSON object of arguments, got"),
        (["{}"], "a JSON object of arguments, got"),
        (['{"prompt": "x", "seed": 1}', '{"seed": 1, "prompt": "x"}'], "got that of line 2 of .* again"),
        (['{"image": "calls.png"}'], "no whole picture"),
    ],
)
def test_what_is_no_call_is_refused(folder, lines, words):
    (folder / "calls.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=words):
        read_calls(write(folder, *lines))


def test_a_picture_that_is_not_there_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"image='b.png' is not there"):
        read_calls(write(folder, {"image": "b.png"}))


def test_calls_of_prompts_alone_are_recorded_and_others_refused():
    assert prompts_of(["a", {"prompt": "b"}]) == ["a", "b"]
    with pytest.raises(ValueError, match="got call 2 with image, seed"):
        prompts_of(["a", {"prompt": "b", "image": 1, "seed": 2}])
    with pytest.raises(ValueError, match="got call 1 with no prompt"):
        prompts_of([{}])
    with pytest.raises(ValueError, match=r"a list of prompts .*, got a str; list it"):
        prompts_of("a red apple")
