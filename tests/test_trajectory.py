"""Trajectories come back as they were written, and a store never shows half of one."""

import json
import os
from dataclasses import replace
from pathlib import Path

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


def test_every_changed_byte_of_a_run_is_noticed(tmp_path):
    """Numbers, names and facts alike; blanks in a header, which mean nothing, aside."""
    path = tmp_path / "one.safetensors"
    ours = trajectory()
    ours.save(path)
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in [*range(0, header, 37), *range(header, len(whole), 11)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        if whole[place] != ord(" "):
            with pytest.raises(ValueError, match="is no whole trajectory"):
                Trajectory.load(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["latents", "features", "outputs", "conditioning"])
def test_a_reference_run_is_of_finite_numbers(tmp_path, part, number):
    whole = replace(trajectory(), full=tuple(range(STEPS)))
    tensor = getattr(whole, part)
    (tensor if part == "latents" else tensor["uncond"])[1, 0] = number
    whole.save(tmp_path / "one")
    with pytest.raises(ValueError, match=rf"one is no whole trajectory \(the {part}.* are finite numbers, got NaN or"):
        Trajectory.load(tmp_path / "one")
    replace(whole, full=(0, 1)).save(tmp_path / "forecast")  # such a run may diverge
    assert not Trajectory.load(tmp_path / "forecast").is_finite


def old(path, run: Trajectory) -> None:
    """Write a run as releases before did, without a digest."""
    tensors = {name: tensor.contiguous() for name, tensor in run._tensors().items()}
    save_file(tensors, path, {"trajectory": json.dumps(run._facts())})


def test_runs_of_before_are_read_and_that_is_said_once(tmp_path):
    store = Store.create(tmp_path, collection())
    for number, seed in store.collection.pairs:
        old(store.path(number, seed), trajectory(store.collection.prompts[number], seed))
    store = Store.open(tmp_path)
    with pytest.warns(UserWarning, match="have no digest") as said:
        assert [run.signed for run in store] == [False] * 3 and not store.load(0).signed
    assert len(said) == 1


def test_a_run_of_another_prompt_or_collection_is_refused(tmp_path):
    stores = [Store.create(tmp_path / name, collection(weights=name)) for name in "ab"]
    for store in stores:
        for number, seed in store.collection.pairs:
            store.add(number, seed, trajectory(store.collection.prompts[number], seed))
    first, other = (Store.open(store.folder) for store in stores)
    first.paths[1].write_bytes(first.paths[0].read_bytes())
    with pytest.raises(
        ValueError, match=r"00001-10.safetensors is the run of 'ein .* got that of 'a red apple', seed 0"
    ):
        list(first)
    first.paths[1].write_bytes(other.paths[1].read_bytes())
    with pytest.raises(ValueError, match=r"00001-10.safetensors is no whole .* a run of another collection"):
        list(first)
    assert first.is_whole(0, 0) and not first.is_whole(1, 10)


@pytest.mark.parametrize(
    "changes",
    [
        dict(seeds=["../../0", 1, 2]),
        dict(seeds=[0, 1]),
        dict(seeds=7),
        dict(prompts=[1, 2, 3]),
        dict(prompts="abc"),
        dict(model=["x"]),
        dict(call=[]),
        dict(grid=[1, "0"]),
        dict(tokens=[True]),
        dict(tap=1),
        dict(batch_size=2.5),
    ],
)
def test_the_fields_of_a_collection_are_of_their_types(tmp_path, changes):
    text = json.dumps({**json.loads(collection().to_json()), **changes})
    (tmp_path / "collection.json").write_text(text)
    with pytest.raises(ValueError, match=r"collection.json is damaged"):
        Store.open(tmp_path)


def test_a_text_that_nests_deeply_is_damaged(tmp_path):
    (tmp_path / "collection.json").write_text('{"a":' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"collection.json is damaged"):
        Store.open(tmp_path)


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_names_the_file(tmp_path):
    (tmp_path / "file.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_atomically(tmp_path / "file", b"data")
    assert caught.value.filename == str(tmp_path / "file") and not list(tmp_path.iterdir())


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
