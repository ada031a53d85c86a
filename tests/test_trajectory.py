"""Trajectories come back as they were written, and a store never shows half of one."""

import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from lesa.learn.trajectory import Collection, Store, Trajectory, draw_tokens
from lesa.predictors.disk import write_atomically

STEPS = 4


def trajectory(prompt: str = "a red apple", seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Trajectory:
    random = torch.Generator().manual_seed(seed)

    def per_stream(*shape: int) -> dict[str, torch.Tensor]:
        return {name: torch.randn(shape, generator=random).to(dtype) for name in ("cond", "uncond")}

    return Trajectory(
        prompt=prompt,
        seed=seed,
        grid=torch.linspace(1, 0, STEPS + 1, dtype=torch.float64) ** 0.7,
        full=(0, 1, 3),
        tokens=torch.tensor([1, 4, 5]),
        latents=torch.randn(STEPS + 1, 3, 2, generator=random).to(dtype),
        features=per_stream(STEPS, 3, 5),
        outputs=per_stream(STEPS, 3, 2),
        conditioning=per_stream(STEPS, 6),
    )


def collection(**changes) -> Collection:
    facts = Collection(
        model="models/tiny",
        pipeline="FluxPipeline",
        weights="0123",
        tap="norm_out",
        call={"height": 32, "guidance_scale": 0.1 + 0.2, "negative_prompt": None},
        batch_size=2,
        sample=None,
        prompts=("a red apple", "ein großer Fisch", "a red apple"),
        seeds=(0, 10, 9),
        grid=(1.0, 0.1 + 0.2, 0.0),
        tokens=(1, 4, 5),
    )
    return replace(facts, **changes)


def assert_same(a: Trajectory, b: Trajectory) -> None:
    assert (a.prompt, a.seed, a.full, a.streams) == (b.prompt, b.seed, b.full, b.streams)
    ours, theirs = a._tensors(), b._tensors()
    assert list(ours) == list(theirs)
    for name, x in ours.items():
        assert x.dtype == theirs[name].dtype
        assert torch.equal(x, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_trajectory_comes_back_as_it_was_saved(tmp_path, dtype):
    ours = trajectory("ein großer Fisch", 7, dtype)
    ours.save(tmp_path / "one.safetensors")
    assert_same(Trajectory.load(tmp_path / "one.safetensors"), ours)
    assert [path.name for path in tmp_path.iterdir()] == ["one.safetensors"]


def test_the_same_trajectory_gives_the_same_bytes(tmp_path):
    files = [tmp_path / name for name in "abcdefgh"]
    for file in files:
        trajectory().save(file)
    assert len({file.read_bytes() for file in files}) == 1
    trajectory(seed=1).save(files[0])
    assert files[0].read_bytes() != files[1].read_bytes()


def test_tensors_that_are_views_are_saved_alone(tmp_path):
    whole = torch.randn(50, STEPS + 1, 3, 2)
    replace(trajectory(), latents=whole[3]).save(tmp_path / "view")
    assert (tmp_path / "view").stat().st_size < whole.nbytes
    assert torch.equal(Trajectory.load(tmp_path / "view").latents, whole[3])


def test_bytes_are_counted():
    ours = trajectory()
    per_stream = STEPS * (3 * 5 + 3 * 2 + 6) * 2
    assert ours.nbytes == 2 * per_stream + (STEPS + 1) * 3 * 2 * 2 + (STEPS + 1) * 8 + 3 * 8
    assert ours.steps == STEPS


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "one.safetensors"
    trajectory().save(path)
    whole = path.read_bytes()
    for damaged in (b"", whole[:5], whole[: len(whole) // 2], whole[:-1], whole + b"\0", b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"one.safetensors is no whole trajectory .*; delete it"):
            Trajectory.load(path)
    save_file({"grid": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match="is no whole trajectory"):
        Trajectory.load(path)
    save_file({"grid": torch.zeros(3)}, path, {"trajectory": '{"prompt": "", "seed": 0, "full": [], "streams": ["c"]}'})
    with pytest.raises(ValueError, match="is no whole trajectory"):
        Trajectory.load(path)
    with pytest.raises(FileNotFoundError):
        Trajectory.load(tmp_path / "none")


def test_a_collection_survives_json():
    assert Collection.from_json(collection().to_json()) == collection()
    assert Collection.from_json(collection(sample=3).to_json()) != collection()


def test_a_store_is_in_the_order_of_its_prompts(tmp_path):
    store = Store.create(tmp_path / "new" / "runs", collection())
    pairs = [(0, 0), (1, 10), (2, 9)]
    assert store.collection.pairs == pairs
    for number, seed in reversed(pairs[1:]):
        trajectory(store.collection.prompts[number], seed).save(store.path(number, seed))
    assert len(store) == 0  # opened before they were there
    store = Store.open(store.folder)
    assert len(store) == 2
    assert [(t.prompt, t.seed) for t in store] == [(store.collection.prompts[n], seed) for n, seed in pairs[1:]]
    assert_same(store.load(1), trajectory("a red apple", 9))
    with pytest.raises(IndexError):
        store.load(2)


def test_the_digest_tells_contents_apart(tmp_path):
    def digest(name: str, seeds: tuple[int, ...], **changes) -> str:
        store = Store.create(tmp_path / name, collection(**changes))
        for seed in seeds:
            number = store.collection.seeds.index(seed)
            trajectory(seed=seed).save(store.path(number, seed))
        return Store.open(tmp_path / name).digest()

    first = digest("a", (0, 10))
    assert first == digest("b", (10, 0))
    assert len({first, digest("c", (0, 9)), digest("d", (0,)), digest("e", (0, 10), model="other")}) == 4
    trajectory(seed=5).save(Store.open(tmp_path / "b").path(1, 10))
    assert Store.open(tmp_path / "b").digest() != first


def test_a_missing_or_damaged_store_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no trajectories"):
        Store.open(tmp_path)
    for text in ("", "{", "[]", '{"model": "x"}', '{"unknown": 1}'):
        (tmp_path / "collection.json").write_text(text)
        with pytest.raises(ValueError, match=r"collection.json is damaged .*; delete the folder"):
            Store.open(tmp_path)


SAMPLES = {1: 1, 16: 16, 41: 41, 64: 41, 4095: 41, 4096: 40, 9000: 90}


@pytest.mark.parametrize(("available", "count"), SAMPLES.items())
def test_the_default_sample_is_41_tokens_or_a_hundredth(available, count):
    tokens = draw_tokens(available)
    assert tokens.dtype == torch.int64
    assert len(tokens) == count
    assert tokens.tolist() == sorted(set(tokens.tolist()) & set(range(available)))


def test_tokens_are_drawn_anew_for_each_seed_only():
    assert torch.equal(draw_tokens(64, 10), draw_tokens(64, 10))
    assert not torch.equal(draw_tokens(64, 10), draw_tokens(64, 10, seed=1))
    for count in (0, -1, 65):
        with pytest.raises(ValueError, match="64 image tokens"):
            draw_tokens(64, count)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, failing):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("no")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (events.append("replace"), rename(*paths)))
    write_atomically(tmp_path / "file", b"data")
    assert events == ["fsync", "replace", "fsync"]
