"""Recorded runs are what the pipeline did; a collection that was killed ends as if it had not been."""

import copy
import errno
import multiprocessing
import os
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from filelock import FileLock

import lesa.learn.collect
import lesa.learn.trajectory
from lesa.host.runtime import accelerate
from lesa.host.tap import tap_of
from lesa.learn.call_files import read_prompts
from lesa.learn.collect import collect, record
from lesa.learn.trajectory import COLLECTION, Store
from lesa.rows.forecasters import Reuse
from lesa.rows.schedule import Schedule

CALL = dict(height=32, width=32, num_inference_steps=4, max_sequence_length=16)
ALL = torch.arange(16)
PROMPTS = ["small red apple on white, left", "large blue fish on grey, right", "small green pear on grey, left"]
TWICE = [prompt for prompt in PROMPTS for _ in range(2)]
RUNS = dict(prompts=TWICE, seeds=[3, 20] * 3, batch_size=4, model="tiny", **CALL)  # two batches, of four and of two


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a store; the locks beside them are empty."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".lock")}


@pytest.fixture(scope="module")
def reference(tiny_flux, tmp_path_factory) -> Path:
    """A collection that was never stopped."""
    folder = tmp_path_factory.mktemp("reference")
    collect(tiny_flux, folder=folder, **RUNS)
    return folder


# what is recorded


@pytest.mark.parametrize("guided", [False, True])
def test_a_recording_is_the_run_itself(tiny_flux, guided):
    call = {**CALL, **(dict(negative_prompt="fish", true_cfg_scale=3.0) if guided else {})}
    [run] = record(tiny_flux, PROMPTS[:1], [5], ALL, **call)
    expected = tiny_flux(PROMPTS[0], output_type="latent", generator=torch.Generator().manual_seed(5), **call).images
    assert run.streams == (("cond", "uncond") if guided else ("cond",))
    assert run.full == (0, 1, 2, 3)
    assert torch.equal(run.latents[-1], expected[0])

    velocity = run.outputs["cond"]
    if guided:
        velocity = run.outputs["uncond"] + 3.0 * (velocity - run.outputs["uncond"])
    torch.testing.assert_close(run.latents.diff(dim=0), run.grid.diff().float()[:, None, None] * velocity)

    transformer = tiny_flux.transformer
    for stream in run.streams:
        with torch.no_grad():
            outputs = transformer.proj_out(transformer.norm_out(run.features[stream], run.conditioning[stream]))
        torch.testing.assert_close(outputs, run.outputs[stream])


def test_a_batch_records_each_prompt_with_its_own_seed(tiny_flux):
    together = record(tiny_flux, PROMPTS, [5, 6, 5], ALL, **CALL, negative_prompt="fish", true_cfg_scale=2.0)
    for run, prompt, seed in zip(together, PROMPTS, [5, 6, 5], strict=True):
        [alone] = record(tiny_flux, [prompt], [seed], ALL, **CALL, negative_prompt="fish", true_cfg_scale=2.0)
        assert (run.prompt, run.seed) == (prompt, seed)
        for name, x in alone._tensors().items():
            torch.testing.assert_close(run._tensors()[name], x, msg=lambda text, name=name: f"{name}: {text}")


def test_a_sample_is_part_of_the_whole(tiny_flux):
    tokens = torch.tensor([2, 3, 11])
    [whole] = record(tiny_flux, PROMPTS[:1], [5], ALL, **CALL)
    [sample] = record(tiny_flux, PROMPTS[:1], [5], lambda available: tokens if available == 16 else None, **CALL)
    assert torch.equal(sample.tokens, tokens)
    assert torch.equal(sample.latents, whole.latents[:, tokens])
    for ours, theirs in ((sample.features, whole.features), (sample.outputs, whole.outputs)):
        assert torch.equal(ours["cond"], theirs["cond"][:, tokens])
    assert torch.equal(sample.conditioning["cond"], whole.conditioning["cond"])


def test_features_keep_the_dtype_of_the_model(tiny_flux):
    pipe = copy.deepcopy(tiny_flux).to(torch.bfloat16)
    [run] = record(pipe, PROMPTS[:1], [5], ALL, **CALL)
    numbers = ("grid", "tokens", "sampler.latents", "sampler.outputs")
    assert {x.dtype for name, x in run._tensors().items() if name not in numbers} == {torch.bfloat16}


def test_an_accelerated_run_is_recorded_with_its_forecasts(tiny_flux):
    with accelerate(tiny_flux, Reuse(), schedule=Schedule.at([0, 2]), tap="feature"):
        [run] = record(tiny_flux, PROMPTS[:1], [5], ALL, **CALL)
        accelerated = tiny_flux(
            PROMPTS[0], output_type="latent", generator=torch.Generator().manual_seed(5), **CALL
        ).images
    feature = run.features["cond"]
    assert run.full == (0, 2)
    assert torch.equal(feature[1], feature[0]) and torch.equal(feature[3], feature[2])
    assert not torch.equal(feature[2], feature[0])
    assert torch.equal(run.latents[-1], accelerated[0])


def test_a_run_accelerated_at_the_output_is_recorded_there(tiny_flux):
    tap = tap_of(tiny_flux.transformer, "output")
    [whole] = record(tiny_flux, PROMPTS[:1], [5], ALL, **CALL)
    [same] = record(tiny_flux, PROMPTS[:1], [5], ALL, tap=tap, **CALL)
    assert torch.equal(same.features["cond"], whole.outputs["cond"]) and same.conditioning["cond"].shape == (4, 0)
    with accelerate(tiny_flux, Reuse(), schedule=Schedule.at([0, 2]), tap=tap):
        [run] = record(tiny_flux, PROMPTS[:1], [5], ALL, tap=tap, **CALL)
        with pytest.raises(ValueError, match="'norm_out' at each step of a recorded run, got none at step 1"):
            record(tiny_flux, PROMPTS[:1], [5], ALL, **CALL)
    output = run.outputs["cond"]
    assert run.full == (0, 2)
    assert torch.equal(run.features["cond"], output)
    assert torch.equal(output[1], output[0]) and torch.equal(output[3], output[2])
    assert torch.equal(output[0], whole.outputs["cond"][0]) and not torch.equal(output[2], output[0])


def test_a_recording_leaves_the_transformer_as_it_was(tiny_flux):
    transformer = tiny_flux.transformer

    def state() -> tuple:
        hooks = [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in transformer.modules()]
        return hooks, sorted(vars(transformer))

    before = state()
    record(tiny_flux, PROMPTS[:1], [5], ALL, **CALL)
    assert state() == before
    with pytest.raises(ZeroDivisionError):
        record(tiny_flux, PROMPTS[:1], [5], ALL, callback_on_step_end=lambda *_: 1 / 0, **CALL)
    assert state() == before


def test_runs_that_cannot_be_recorded_are_refused(tiny_flux):
    def refused(message: str, prompts=PROMPTS[:1], seeds=(5,), tokens=ALL, **call) -> None:
        with pytest.raises(ValueError, match=message):
            record(tiny_flux, prompts, seeds, tokens, **{**CALL, **call})

    def interrupt(pipe, step, _time, tensors):
        pipe._interrupt = step == 1
        return tensors

    refused("each prompt needs one seed, got 1 prompts and 2 seeds", seeds=[5, 6])
    refused("each prompt needs one seed, got 0 prompts", prompts=[], seeds=[])
    refused("sets generator, output_type itself", generator=None, output_type="pil")
    refused("positions from 0 to 15", tokens=torch.tensor([3, 16]))
    refused("positions from 0 to 15", tokens=torch.tensor([-1]))
    refused("whole grid of 4 steps; 'cond' stopped early", callback_on_step_end=interrupt)


def test_a_run_that_starts_within_its_grid_is_refused(tiny_flux):
    pipe = FluxImg2ImgPipeline(**tiny_flux.components)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="stream 'cond' was called at step 2 after 0 calls"):
        record(pipe, PROMPTS[:1], [5], ALL, image=torch.zeros(1, 3, 32, 32), strength=0.5, **CALL)


# the collection


def test_a_collection_holds_each_prompt_with_each_seed(tiny_flux, reference):
    store = Store.open(reference)
    assert [(run.prompt, run.seed) for run in store] == [(prompt, seed) for prompt in PROMPTS for seed in (3, 20)]
    assert store.collection.call == CALL
    assert store.collection.tokens == tuple(range(16))
    [alone] = record(tiny_flux, PROMPTS[1:2], [20], ALL, **CALL)
    torch.testing.assert_close(store.load(3).features["cond"], alone.features["cond"])
    assert store.load(3).grid.tolist() == list(store.collection.grid) == alone.grid.tolist()


def test_a_whole_collection_is_not_run_again(tiny_flux, reference, monkeypatch):
    before = contents(reference)
    monkeypatch.setattr(lesa.learn.collect, "record", None)
    assert len(collect(tiny_flux, folder=reference, **RUNS)) == 6
    assert contents(reference) == before


def test_a_missing_run_is_filled_in(tiny_flux, reference, tmp_path):
    for name, data in contents(reference).items():
        if not name.startswith("00001-20"):
            (tmp_path / name).write_bytes(data)
    assert len(Store.open(tmp_path)) == 5
    collect(tiny_flux, folder=tmp_path, **RUNS)
    assert contents(tmp_path) == contents(reference)


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:-3] + b"xyz", lambda _: b""])
def test_a_damaged_run_is_recorded_again(tiny_flux, reference, tmp_path, damage):
    for name, data in contents(reference).items():
        (tmp_path / name).write_bytes(damage(data) if name.startswith("00001-20") else data)
    with pytest.warns(UserWarning, match=r"00001-20.safetensors is not as it was recorded; it is recorded again"):
        collect(tiny_flux, folder=tmp_path, **RUNS)
    assert contents(tmp_path) == contents(reference)


def test_a_collection_grows(tiny_flux, reference, tmp_path):
    fewer = {**RUNS, "prompts": TWICE[:4], "seeds": [3, 20] * 2}
    collect(tiny_flux, folder=tmp_path, **fewer)
    before = contents(tmp_path)
    assert len(collect(tiny_flux, folder=tmp_path, **RUNS)) == 6
    after = contents(tmp_path)
    assert after == contents(reference)  # the first batch was whole
    assert {name: after[name] for name in before if name != COLLECTION}.items() <= before.items()


def test_a_run_of_numbers_that_are_not_finite_is_not_recorded(tiny_flux, tmp_path):
    def spoil(_pipe, step, _time, tensors):
        return {"latents": tensors["latents"] * (float("nan") if step == 1 else 1.0)}

    for tokens in (ALL, None):
        with pytest.raises(
            ValueError, match=r"of a reference run \('small red .*, seed 5\) are finite numbers, got NaN"
        ):
            record(tiny_flux, PROMPTS[:1], [5], tokens, **CALL, callback_on_step_end=spoil)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "another"}, "other model: 'tiny' there, 'another' here"),
        ({"seeds": [3, 21, *[3, 20] * 2]}, "other seeds: number 1 is 20 there, 21 here"),
        ({"prompts": TWICE[:4], "seeds": [3, 20] * 2}, "other prompts: number 4 is .* there, missing here"),
        ({"prompts": [*TWICE[:5], "x"]}, "other prompts: number 5 is 'small green .*' there, 'x' here"),
        ({"batch_size": 2}, "other batch_size: 4 there, 2 here"),
        ({"tokens": 7}, "other sample: None there, 7 here"),
        ({"num_inference_steps": 5}, "other call: .*4.* there, .*5.* here"),
        ({"guidance_scale": 2.0}, "other call: "),
    ],
)
def test_a_folder_of_another_collection_is_refused(tiny_flux, reference, changes, message):
    before = contents(reference)
    with pytest.raises(ValueError, match=message):
        collect(tiny_flux, folder=reference, **{**RUNS, **changes})
    assert contents(reference) == before


def test_a_retrained_model_is_refused(tiny_flux, reference):
    bias = tiny_flux.transformer.proj_out.bias
    before = bias.detach().clone()
    try:
        with torch.no_grad():
            bias.add_(1e-3)
        with pytest.raises(ValueError, match="other weights"):
            collect(tiny_flux, folder=reference, **RUNS)
    finally:
        bias.data.copy_(before)


def test_bad_arguments_are_refused_before_anything_runs(tiny_flux, tmp_path):
    def refused(message: str, **changes) -> None:
        with pytest.raises(ValueError, match=message):
            collect(tiny_flux, folder=tmp_path / "new", **{**RUNS, **changes})
        assert not (tmp_path / "new").exists()

    refused("each prompt needs one seed, got 0 prompts and 6 seeds", prompts=[])
    refused("each prompt needs one seed, got 6 prompts and 2 seeds", seeds=[1, 2])
    refused("each pair of a prompt and a seed is collected once", seeds=[1] * 6)
    refused("batch_size must be at least 1, got 0", batch_size=0)
    refused("kept as JSON", callback_on_step_end=print)


def test_an_accelerated_pipeline_is_refused(tiny_flux, tmp_path):
    with (
        accelerate(tiny_flux, Reuse(), schedule=Schedule.at([0, 2]), tap="feature"),
        pytest.raises(ValueError, match="got an accelerated pipeline"),
    ):
        collect(tiny_flux, folder=tmp_path, **RUNS)
    assert not contents(tmp_path)


def test_two_processes_do_not_share_a_folder(tiny_flux, tmp_path):
    with FileLock(tmp_path / ".lock"), pytest.raises(RuntimeError, match="another process is collecting"):
        collect(tiny_flux, folder=tmp_path, **RUNS)


@pytest.mark.parametrize("lines", ["", "\n\n", "  \n\t\n"])
def test_a_file_without_prompts_is_refused(tmp_path, lines):
    file = tmp_path / "prompts.txt"
    file.write_text(lines)
    with pytest.raises(ValueError, match=r"prompts.txt holds no prompt"):
        read_prompts(file)


def test_prompts_are_lines(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffein großer Fisch\r\n\r\n  a pear \nan apple".encode())
    assert read_prompts(file) == ["ein großer Fisch", "a pear", "an apple"]
    file.write_text("a\nb\n\n a\n")
    with pytest.raises(ValueError, match="has 'a' in line 1 and again in line 4; remove one"):
        read_prompts(file)


# stopped, and gone on with


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize(("file", "stored"), [(COLLECTION, 0), ("00001-20.safetensors", 1), ("00004-3.safetensors", 4)])
def test_a_full_disk_is_explained_and_loses_nothing(tiny_flux, reference, tmp_path, file, stored):
    (tmp_path / f"{file}.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="the disk is full; free some space and collect again") as caught:
        collect(tiny_flux, folder=tmp_path, **RUNS)
    assert caught.value.errno == errno.ENOSPC
    left = contents(tmp_path)
    assert len(left) == (stored and stored + 1)
    assert left.items() <= contents(reference).items()
    collect(tiny_flux, folder=tmp_path, **RUNS)
    assert contents(tmp_path) == contents(reference)


class WatchedFile:
    """A file that is written in two halves, with a moment before each."""

    def __init__(self, path: Path, mode: str, happens: Callable[[str], None]):
        self._file = open(path, mode)  # noqa: SIM115
        self._happens = happens

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)

    def write(self, data):
        self._happens("opened")
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._happens("half written")
        self._file.write(data[len(data) // 2 :])


@contextmanager
def watched(pipe, happens: Callable[[str], None]) -> Iterator[None]:
    """Call `happens` at each moment at which a collection does something to its files or calls the transformer."""

    def around(name: str) -> Callable:
        original = getattr(os, name)

        def call(*args):
            happens(f"before {name}")
            original(*args)
            happens(f"after {name}")

        return call

    hook = pipe.transformer.register_forward_pre_hook(lambda *_: happens("transformer"))
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lesa.learn.trajectory, "open", lambda *args: WatchedFile(*args, happens), raising=False)
            patch.setattr(os, "fsync", around("fsync"))
            patch.setattr(os, "replace", around("replace"))
            yield
    finally:
        hook.remove()


def collect_and_die(pipe, folder: Path, moment: int) -> None:
    """Collect in this process, which is killed outright when the moment has come."""
    moments = iter(range(moment + 1))

    def happens(_what: str) -> None:
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    with watched(pipe, happens):
        collect(pipe, folder=folder, **RUNS)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="a warm process must be forked")
def test_a_collection_killed_at_random_goes_on_to_the_same_bytes(tiny_flux, reference, tmp_path):
    whole = contents(reference)
    events: list[str] = []
    with watched(tiny_flux, events.append):
        collect(tiny_flux, folder=tmp_path / "watched", **RUNS)
    assert contents(tmp_path / "watched") == whole
    moments = random.Random(0).sample(range(len(events)), 20)
    assert len({events[moment] for moment in moments}) >= 5
    for moment in moments:
        folder = tmp_path / str(moment)
        child = multiprocessing.get_context("fork").Process(target=collect_and_die, args=(tiny_flux, folder, moment))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        visible = {name: data for name, data in contents(folder).items() if not name.endswith(".partial")}
        assert visible.items() <= whole.items()
        if COLLECTION in visible:
            assert len(list(Store.open(folder))) == len(visible) - 1
        collect(tiny_flux, folder=folder, **RUNS)
        assert contents(folder) == whole, f"killed at {events[moment]!r}"
