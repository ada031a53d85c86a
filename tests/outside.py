"""What somebody does with the package alone, in an empty folder: `python tests/outside.py` with the Python it is in.

Every command's help; a tiny model collected for, planned for, trained for, calibrated and run by the program `lesa`;
and what commands say, in one line, that lack a package or a model. Fails where anything ends otherwise, or a library
says something that its user can make nothing of.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
LESA = Path(sys.executable).with_name("lesa")
PROMPTS = ["small red apple on white, left", "large blue fish on grey, right", "small green pear on grey, left"]
CALL = dict(height=32, width=32, num_inference_steps=4, max_sequence_length=16)
HELP = """
from lesa.cli.parser import parser
for action in parser()._subparsers._group_actions:
    for command in action.choices.values():
        assert command.format_help().startswith("usage: lesa")
"""
USELESS = 3
"""How a training or calibration of a few runs may well end: it was of no use, and says so."""
LACKS = 2
PUZZLING = ("Traceback", "Warning", "deprecated", "[transformers]", "[diffusers]", "`accelerate`")
"""What no command says: words of libraries that its user has not called."""


def make_model(folder: Path) -> None:
    """Save a tiny random pipeline, by a process that knows the tests; no other one does."""
    words = f"import sys; sys.path.insert(0, {str(HERE)!r}); from tiny import build_pipeline; "
    subprocess.run([sys.executable, "-c", f"{words}build_pipeline().save_pretrained({str(folder)!r})"], check=True)
    (folder / "call.json").write_text(json.dumps(CALL))
    (folder / "prompts").mkdir()
    (folder / "prompts" / "heldout.txt").write_text("\n".join(PROMPTS) + "\n")


def lesa(*arguments: str, ends: tuple[int, ...] = (0,), says: str = "") -> None:
    """Run a command; raises SystemExit if it does not end, or say, what it should."""
    done = subprocess.run([str(LESA), *arguments], capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    print(f"{done.returncode} lesa {' '.join(arguments)}", flush=True)
    wrong = [words for words in PUZZLING if words in said]
    if done.returncode not in ends or says not in said or wrong:
        raise SystemExit(
            f"lesa {' '.join(arguments)} ended with {done.returncode}, not {ends} and {says!r} and without "
            f"{wrong}: {said}"
        )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["LESA_HOME"] = str(Path(folder) / "home")
        make_model(Path("model"))
        prompts, few = ("--prompts", "model/prompts/heldout.txt"), ("--limit", "2")
        lesa("--version")
        subprocess.run([sys.executable, "-c", HELP], check=True)
        lesa("generate", "model", "a red apple", "--full", "--out", "full.png")
        lesa("collect", "model", *prompts, *few, "--out", "runs")
        lesa("plan", "model", "--data", "runs", "--budgets", "2", "--no-refine")
        training = ("--method", "l2p", "--schedule", "at:0,2", "--rounds", "1", "--updates", "2", "2")
        validated = ("--validation-prompts", prompts[1], "--validation", "1")
        lesa("train", "model", "--data", "runs", *validated, *training, "--out", "trained", ends=(0, USELESS))
        lesa("generate", "model", "a red apple", "--predictor", "trained", "--out", "trained.png")
        lesa("calibrate", "model", *prompts, *few, "--budget", "2", "--out", "solved", ends=(0, USELESS))
        lesa("shelf", says="model-4-steps-16x16")
        lesa("generate", "model", "a red apple", "--predictor", "solved", "--out", "solved.png")
        lesa("demo", ends=(LACKS,), says="lesa: ")
        measured = ("--pairs", "2", "--budgets", ",", "--timed", "0", "--out", "bench")
        if find_spec("matplotlib") and find_spec("skimage"):
            lesa("demo", "--model", "model", *prompts, *measured)
            assert any(Path("bench").rglob("*.png"))
        else:
            lesa("demo", "--model", "model", *prompts, *measured, ends=(LACKS,), says="pip install")
        assert all(Path(name).stat().st_size for name in ("full.png", "trained.png", "solved.png"))
    print("all as it should be")


if __name__ == "__main__":
    main()
