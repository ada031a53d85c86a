"""Calibrations are kept by weights and facts, and found again; what is damaged is named."""

import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import platformdirs
import pytest
import torch
from test_facts import KNOWN

from lesa.cli import main
from lesa.predictors import Origin, Solved
from lesa.predictors.calibration import Calibration
from lesa.predictors.shelf import Shelf, fetch, home
from lesa.rows.tap import Tap

WEIGHTS, OTHERS = "a" * 64, "b" * 64
TABLE = {
    "chosen": 2,
    "checked": {
        "1": {"psnr": {"mean": 30.0, "worst": 25.0}, "drift": {"mean": -20.0}},
        "2": {"psnr": {"mean": 41.5, "worst": 38.0}, "drift": {"mean": -46.0}},
    },
}


def solved(full: int, times=KNOWN.times) -> Solved:
    schedule = "at:" + ",".join(map(str, range(full)))
    predictor = Solved(Origin("models/Tiny Flux", "T", {}, Tap(), tuple(times), schedule, ("all",)))
    predictor.set_gaps(torch.eye(full, full + 1).double() * full)
    return predictor


TWO = {1: solved(1), 2: solved(2)}


def put(shelf: Shelf, weights: str = WEIGHTS, facts=KNOWN, table=TABLE) -> Path:
    return shelf.put(weights, facts, TWO, table)


def test_it_is_in_the_users_cache_or_where_the_environment_says(lesa_home, monkeypatch):
    assert Shelf().folder == lesa_home / "shelf"
    monkeypatch.delenv("LESA_HOME")
    assert home() == platformdirs.user_cache_path("lesa")
    assert Shelf("here").folder == Path("here")


def test_what_is_put_is_found_again_by_its_weights():
    folder = put(Shelf())
    assert folder.parent == Shelf().folder / ("a" * 16)
    assert folder.name.startswith("tiny-flux-3-steps-4x8x8-")
    assert sorted(path.name for path in folder.iterdir()) == ["1-full", "2-full", "calibration.json"]
    (found,) = Shelf().calibrations(WEIGHTS)
    assert (found.facts, found.table, found.budgets, found.chosen) == (KNOWN, TABLE, (1, 2), 2)
    assert found.versions["torch"] == version("torch") and found.when.startswith("20")
    for budget, predictor in TWO.items():
        assert found.predictor(budget).digest() == predictor.digest()
    assert [one.digest() for one in found.predictors()] == [
        TWO[budget].digest() for budget in sorted(TWO, reverse=True)
    ]
    assert Shelf().calibrations(OTHERS) == Shelf().calibrations("a" * 16 + "c" * 48) == []


def test_the_same_weights_and_facts_are_replaced_and_others_stand_beside():
    first = put(Shelf())
    later = put(Shelf(), facts=replace(KNOWN, embedded=(3.51,)), table={"chosen": 1})
    assert later == first
    (found,) = Shelf().all()
    assert found.chosen == 1
    others = [put(Shelf(), facts=replace(KNOWN, start=1)), put(Shelf(), OTHERS), put(Shelf(), facts=wide())]
    assert len({first, *others}) == 4 == len(Shelf().all())
    assert [one.folder for one in Shelf().calibrations(WEIGHTS)] == [others[2], others[0], first]
    assert not list(Shelf().folder.glob("*/.*"))


def wide():
    """The facts of latents that fit the known ones, and are of another size all the same."""
    return replace(KNOWN, shape=(4, 8, 9))


def test_what_fails_half_way_leaves_what_was_there(monkeypatch):
    folder = put(Shelf())
    monkeypatch.setattr(Calibration, "write", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        put(Shelf(), table={"chosen": 1})
    assert Calibration.read(folder).chosen == 2
    assert list(folder.parent.iterdir()) == [folder]


def test_a_calibration_makes_sense():
    with pytest.raises(ValueError, match=r"predictors for one budget or more, got \[\]"):
        Shelf().put(WEIGHTS, KNOWN, {}, {})
    with pytest.raises(ValueError, match=r"chooses one of the budgets \[1, 2\], got 3"):
        put(Shelf(), table={"chosen": 3})


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "calibration.json").write_text("{"),
        lambda folder: (folder / "calibration.json").write_text("[]"),
        lambda folder: (folder / "calibration.json").write_bytes(b"\xff"),
        lambda folder: (folder / "calibration.json").unlink(),
        lambda folder: shutil.rmtree(folder / "2-full"),
        lambda folder: change(folder, format="x"),
        lambda folder: change(folder, facts={}),
        lambda folder: change(folder, budgets=["x"]),
        lambda folder: change(folder, table={"chosen": 2, "checked": {"2": {"psnr": 3}}}),
        lambda folder: change(folder, table=None),
    ],
)
def test_a_damaged_calibration_is_passed_over_with_a_warning_that_names_it(damage):
    whole, folder = put(Shelf(), facts=replace(KNOWN, start=1)), put(Shelf())
    damage(folder)
    for read in (lambda: Shelf().calibrations(WEIGHTS), Shelf().all):
        with pytest.warns(UserWarning, match=f"{folder} is to hold a calibration, which cannot be read .* remove"):
            assert [one.folder for one in read()] == [whole]
    assert Shelf().remove(folder.name) == folder
    assert [one.folder for one in Shelf().all()] == [whole]


def change(folder: Path, **entries) -> None:
    file = folder / "calibration.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


def test_a_quality_is_kept_by_what_is_promised_of_other_calls():
    """That is less than the mean over those checked, where a calibration says how much less."""
    checked = {"psnr": {"mean": 50.0, "worst": 44.0, "bound": 48.5}, "drift": {"mean": -46.0, "bound": -44.0}}
    found = replace(Calibration.read(put(Shelf())), table={"chosen": 2, "checked": {"2": checked}})
    assert found.budget_for(quality="psnr:48.5") == found.budget_for(quality="drift:-44") == 2
    for quality in ("psnr:48.6", "drift:-44.1"):
        with pytest.raises(ValueError, match=r"(48\.5|-44) at best"):
            found.budget_for(quality=quality)
    words = "psnr 50 dB (others' mean at least 48.5 at 90%, worst 44), drift -46 dB (others' mean at most -44 at 90%)"
    assert found.promise(2).endswith(words)


def test_a_budget_or_a_quality_chooses():
    found = Calibration.read(put(Shelf()))
    assert [found.budget_for(), found.budget_for(1), found.budget_for(2)] == [2, 1, 2]
    assert isinstance(found.predictor(found.budget_for(2.0)), Solved)
    qualities = ("psnr:20", "psnr:41.5", "drift:-15", "drift:-45")
    assert [found.budget_for(quality=one) for one in qualities] == [1, 2, 1, 2]
    for wrong, words in (
        (dict(budget=3), r"calibrated for the budgets 1, 2, got 3; .*lesa\.calibrate\(pipe, prompts, budget=3\)"),
        (dict(quality="psnr:50"), r"promises psnr 41\.5 at best, with 2 full steps, got quality 'psnr:50'"),
        (dict(quality="drift:-50"), r"promises drift -46 at best"),
        (dict(quality="ssim:0.9"), r"drift and psnr was checked, got quality 'ssim:0\.9'"),
        (dict(quality="psnr"), r"quality reads psnr:40"),
        (dict(quality="beauty:3"), r"quality reads psnr:40"),
    ):
        with pytest.raises(ValueError, match=words):
            found.budget_for(**wrong)
    assert found.promise(2) == "2 full of 3 steps: psnr 41.5 dB (worst 38), drift -46 dB"
    assert Calibration.read(put(Shelf(), table={})).promise(1) == "1 full of 3 steps: nothing was checked"


def test_it_is_found_removed_and_exported_by_name(tmp_path):
    folder = put(Shelf())
    assert Shelf().find(folder.name).folder == folder
    target = Shelf().export(folder.name, tmp_path / "there")
    assert fetch(str(target)).table == TABLE and fetch(str(target)).predictor(2).digest() == TWO[2].digest()
    with pytest.raises(ValueError, match="name another folder"):
        Shelf().export(folder.name, target)
    assert Shelf().remove(folder.name) == folder and Shelf().all() == [] and not folder.parent.exists()
    for name in ("", ".", "..", folder.name, f"{'a' * 16}/{folder.name}"):
        for ask in (Shelf().find, Shelf().remove):
            with pytest.raises(LookupError, match=r"calibrations \(none\), got"):
                ask(name)


def test_it_is_pushed_to_the_hub(monkeypatch):
    folder, pushed = put(Shelf()), {}

    class Hub:
        def __init__(self, token):
            pushed["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            pushed["repo"] = repo_id, private, exist_ok
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, commit_message):
            pushed["folder"] = repo_id, folder_path
            return "https://hub/me/mine"

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert Shelf().push(folder.name, "mine", private=True, token="t") == "https://hub/me/mine"
    assert pushed == {"token": "t", "repo": ("mine", True, True), "folder": ("me/mine", folder)}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, allow_patterns: str(folder))
    assert fetch("me/mine").folder == folder
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, allow_patterns: str(folder.parent))
    assert fetch("me/mine") is None
    with pytest.raises(FileNotFoundError, match="neither a folder here nor a repository"):
        monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: (_ for _ in ()).throw(OSError()))
        fetch("me/mine")


def test_the_command_lists_shows_removes_and_exports(capsys, tmp_path, monkeypatch):
    def said(*words: str) -> str:
        assert main(["shelf", *words]) == 0
        return capsys.readouterr().out

    assert said() == f"nothing is calibrated yet in {Shelf().folder}\n"
    folder = put(Shelf())
    assert said() == said("list") and said().startswith(f"{folder.name}  1, 2 full of 3 steps  20")
    shown = said("show", folder.name)
    assert f"{folder}\nweights   {WEIGHTS}" in shown
    assert "streams   cond, uncond; guidance 3 : -2, 3.5 as an input" in shown
    assert "chosen    2 full of 3 steps: psnr 41.5 dB (worst 38), drift -46 dB" in shown
    assert said("export", folder.name, str(tmp_path / "there")) == f"{tmp_path / 'there'}\n"
    monkeypatch.setattr(Shelf, "push", lambda self, name, repo, private: f"{name} {repo} {private}")
    assert said("push", folder.name, "me/mine") == f"{folder.name} me/mine None\n"
    assert said("remove", folder.name) == f"removed {folder}\n"
    assert main(["shelf", "show", folder.name]) == 2
    assert "calibrations (none), got" in capsys.readouterr().err


def test_what_was_written_before_there_were_digests_is_read():
    folder = put(Shelf())
    file = folder / "calibration.json"
    entries = json.loads(file.read_text())
    file.write_text(json.dumps({name: entries[name] for name in entries if name not in ("digests", "sha256")}))
    assert Calibration.read(folder).predictor(2).digest() == TWO[2].digest()


def test_no_other_predictor_is_taken_than_the_one_calibrated():
    folder = put(Shelf())
    other = solved(2)
    other.coefficients.data.mul_(7)
    other.save_pretrained(folder / "2-full")
    with pytest.raises(ValueError, match=f"{folder / '2-full'} holds another predictor than the one calibrated"):
        Calibration.read(folder).predictor(2)


def test_a_stop_between_two_names_loses_nothing(monkeypatch):
    folder, replace_ = put(Shelf()), os.replace

    def stopped(source, target):
        if Path(target).parent == folder.parent and Path(target) == folder:
            raise KeyboardInterrupt
        replace_(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", stopped)
        put(Shelf(), table={"chosen": 1})
    assert not folder.exists() and [one.chosen for one in Shelf().calibrations(WEIGHTS)] == [2]
    assert put(Shelf(), facts=replace(KNOWN, start=1)) != folder
    assert {one.folder: one.chosen for one in Shelf().all()}[folder] == 2
    assert put(Shelf(), table={"chosen": 1}) == folder and Calibration.read(folder).chosen == 1
    assert not [one for one in folder.parent.iterdir() if one.name.startswith(".")]


def test_what_is_put_at_once_is_all_there():
    tables = [{**TABLE, "chosen": 1 + k % 2} for k in range(6)]
    facts = [KNOWN, replace(KNOWN, start=1)]
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda k: put(Shelf(), facts=facts[k % 2], table=tables[k]), range(6)))
    assert sorted(one.folder for one in Shelf().all()) == sorted(set(found)) and len(set(found)) == 2
    for one in Shelf().all():
        assert one.predictor(2).digest() == TWO[2].digest()
