"""Several processes share the work, and end with what one ends with."""

import json
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch.distributed
from torch.distributed import HashStore

from lesa.bench import records
from lesa.cli import main
from lesa.host.loading import own_device
from lesa.learn import ranks
from lesa.learn.ranks import Ranks

PROMPTS = [
    f"{size} {colour} apple on white, left" for size in ("small", "large") for colour in ("red", "green", "blue")
]
CALL = dict(height=32, width=32, num_inference_steps=4, max_sequence_length=16)
SCRIPT = """
import json, sys
import torch.distributed
from lesa.learn import ranks
from lesa.cli import main

with ranks.together() as at:
    for arguments in json.loads(sys.argv[1]):
        assert main(arguments) == 0, arguments
    assert not torch.distributed.is_initialized()  # caches that find a group decide together
    if at.leads:
        assert main(json.loads(sys.argv[2])) == 0
"""


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_all_of_the_work_and_nothing_twice(count):
    work = list(range(5))
    shares = [Ranks(rank, count).share(work) for rank in range(count)]
    assert sorted(part for share in shares for part in share) == work
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_ranks_are_read_from_the_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.here() == Ranks(0, 1) == ranks.ALONE
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(ValueError, match="got 3 of 1; use torchrun"):
        ranks.here()
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks.here() == Ranks(3, 4) and not ranks.here().leads


def test_each_process_of_a_machine_has_its_gpu(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert own_device("cuda") == "cuda"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (own_device("cuda"), own_device("cuda:3"), own_device("cpu")) == ("cuda:1", "cuda:3", "cpu")


def test_all_wait_for_the_last_and_nothing_takes_them_for_a_group():
    store, came = HashStore(), []
    meetings = [ranks.Meeting(store, rank, 3) for rank in range(3)]

    def come(meeting, pause):
        for number in range(3):
            time.sleep(pause)
            came.append(number)
            meeting.wait()

    threads = [threading.Thread(target=come, args=(one, 0.05 * k)) for k, one in enumerate(meetings)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert came == [0, 0, 0, 1, 1, 1, 2, 2, 2] and not torch.distributed.is_initialized()


@pytest.fixture(scope="module")
def model(tiny_flux, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-flux")
    tiny_flux.save_pretrained(folder)
    (folder / "call.json").write_text(json.dumps(CALL))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def commands(model: Path, out: Path) -> list[list[str]]:
    common = [str(model), "--prompts", str(model / "prompts.txt"), "--batch-size", "2"]
    bench = ["--budgets", "", "--schedules", "every:2", "--timed", "0", "--no-bound", "--only", "reuse", "fewer steps"]
    return [
        ["collect", *common, "--tokens", "4", "--out", str(out / "runs")],
        ["bench", *common, *bench, "--out", str(out / "bench")],
    ]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".safetensors")}


def test_two_processes_end_with_what_one_ends_with(model, tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two"
    for command in commands(model, one):
        assert main(command) == 0

    # the second of two processes is killed in the middle of its last line, before the first has begun
    with monkeypatch.context() as patched:
        patched.setattr(ranks, "together", lambda: nullcontext(Ranks(1, 2)))
        patched.setattr(Ranks, "wait", lambda self: None)
        for command in commands(model, two):
            assert main(command) == 0
    torn = two / "bench" / "records-1.jsonl"
    torn.write_bytes(torn.read_bytes()[:-9])
    assert len(list((two / "runs").glob("*.safetensors"))) == 2

    first = str(one / "bench" / "records.jsonl")
    script = tmp_path / "both.py"
    script.write_text(SCRIPT)
    arguments = [json.dumps(commands(model, two)), json.dumps(["reproduce", first, "8"])]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    done = subprocess.run([*launch, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]

    assert files(one / "runs") == files(two / "runs") and len(files(one / "runs")) == 7
    alone, shared = records.load(one / "bench"), records.load(two / "bench")
    assert shared.setting == alone.setting
    assert list(shared.records) == list(alone.records) and shared.records == alone.records
    assert len(list((two / "bench").glob("records*.jsonl"))) == 2
    assert "PSNR" in done.stdout and "6 prompts" in done.stdout
