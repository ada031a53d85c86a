"""The whole campaign: `make faults` prints its counts and writes docs/reliability.md.

python tests/faults/campaign.py [--out docs/reliability.md] [--seed 0]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "models")]

import torch  # noqa: E402
from tiny import build_pipeline  # noqa: E402

from faults import calls, kills, threads  # noqa: E402
from faults.judge import FINE, campaign  # noqa: E402

FAULTS, KILLS, CALLS, RACES = 60, 20, 300, 20
"""Of each kind of artefact, of each work, in all, and of each kind of threads."""
FLAT, LAST = 20.0, 200
"""By how many MB the resident memory may differ over so many calls, the last ones."""
VERDICTS = {
    "refused": "an error of one line that names the file",
    "harmless": "what was read is what was written",
    "made again": "what lacks is recorded, trained, calibrated or measured again, as after a stop",
    "told": "a warning of one line, and the rest is read",
}
PROMISED = """# What may be relied on

Written by `make faults`, which tries what is told here; `make test` tries a sample of it.

- A recorded run, a predictor, a round of a training, a plan, a calibration, what it has done so far, a batch of records
  and a kept picture each have a digest, which is verified whenever it is read. Files of before, without, are read; of
  recorded runs that is said once.
- What is damaged is refused in one line that names the file, or made again: `lesa collect` records a damaged run again,
  `lesa train` trains from the newest whole round on, `lesa bench` measures what a torn batch held, and of a stopped
  calibration a damaged budget is calibrated again. On the shelf a damaged calibration is passed over, with a warning.
- No number that is not finite enters a fit or a plan: a reference run with one is not recorded, and not read.
- Files are read without running anything, and without anything outside of their folder being read or written; what a
  file claims of sizes is held against its bytes before memory is asked for.
- A work that is killed at any moment goes on when it is called again, to the same bytes (what says when it was done and
  how long it took aside). So does one of two processes that share the work. Ctrl-C ends a command with one line and
  exit code 130.
- A calibration takes the place of another of the same weights and facts at once: a kill leaves the one or the other.
- One process at a time collects into a folder, trains into it, measures into a file of it, or makes a calibration: a
  second one is refused in one line. A process that is gone holds nothing. Different calibrations may be made at once.
- An accelerated pipeline is in one call at a time: a second thread is refused before its first step. Other pipelines,
  those on the same weights with a scheduler and tokenizers of their own among them, run as if alone. (Tokenizers are
  changed by every call: two pipelines of diffusers that share them draw other pictures at times, with lesa or without.)

Not promised: a file in the place of another whole one of its kind (a plan, a checkpoint) is that other one; and a
records file cut at the end of a batch is that of a run which was stopped there, of which the report says what is not
measured.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default=str(Path(__file__).parents[2] / "docs" / "reliability.md"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        parts = [_files(Path(folder) / "files", options.seed, wrong)]
        pipe = build_pipeline()
        parts += [_kills(pipe, Path(folder) / "kills", options.seed, wrong), _calls(pipe, wrong), _races(pipe, wrong)]
    text = "\n\n".join([PROMISED.rstrip(), *parts]) + "\n"
    print("\n\n".join(parts))
    print("\n".join(wrong) or "\n0 wrong")
    Path(options.out).write_text(text, encoding="utf-8")
    return int(bool(wrong))


def _files(folder: Path, seed: int, wrong: list[str]) -> str:
    found, failures = campaign(folder, FAULTS, seed)
    wrong += [f"{verdict}: {fault}: {words}" for fault, verdict, words in failures]
    names = [*VERDICTS, "wrong"]
    rows = [[name, str(counts.total()), *_cells(counts)] for name, counts in found.items()]
    total = sum(found.values(), Counter())
    rows.append(["all", str(total.total()), *_cells(total)])
    meanings = "\n".join(f"- {name}: {meaning}" for name, meaning in VERDICTS.items())
    head = (
        f"## Files\n\n{total.total()} seeded faults: bits, digits, blocks, lines, JSON fields, headers, names, files."
    )
    return f"{head}\n\n{meanings}\n\n{_table(['what', 'faults', *names], rows)}"


def _cells(counts: Counter[str]) -> list[str]:
    return [*(str(counts[name]) for name in VERDICTS), str(sum(n for name, n in counts.items() if name not in FINE))]


def _kills(pipe: Any, folder: Path, seed: int, wrong: list[str]) -> str:
    rows = []
    for name, works in kills.WORKS.items():
        if name in kills.NOT_FORKED:
            rows.append([name, "0: a torch built for CUDA does not train in a forked process", "0"])
            continue
        (folder / name).mkdir(parents=True)
        count = KILLS // len(works)
        found = kills.killed(name, kills.accelerable(pipe), folder / name, count, seed)
        wrong += found
        rows.append([name, str(count), str(len(found))])
    words = "Killed outright at a moment of its work with files, and called again."
    return f"## Kills\n\n{words}\n\n{_table(['work', 'kills', 'other results'], rows)}"


def _calls(pipe: Any, wrong: list[str]) -> str:
    found = calls.held(kills.accelerable(pipe), CALLS)[-LAST:]
    most = max(found) - min(found)
    if most > FLAT:
        wrong.append(f"resident memory differs by {most:.1f} MB over the last {LAST} of {CALLS} calls")
    words = "calls of changing size, steps, batch, guidance, forecaster and history: over the last"
    return f"## Calls\n\n{CALLS} {words} {LAST} the resident memory differs by {most:.1f} MB at most."


def _races(pipe: Any, wrong: list[str]) -> str:
    rows = []
    for name, kind in threads.KINDS.items():
        found = [words for _ in range(RACES) for words in kind(pipe)]
        wrong += [f"{name}: {words}" for words in found]
        rows.append([name, str(RACES), str(len(found))])
    return f"## Threads\n\n{_table(['kind', 'races', 'other results'], rows)}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
