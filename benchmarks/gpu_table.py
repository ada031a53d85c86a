"""The rows of `gpu.py`: what one holds, how they are written, and whether they reach the goals."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

NOT_REACHED = "not reached"
ALL_FULL, OUTPUT = "every step full", "output"
LEAST_OF_RATIO, MOST_OF_STEP = 0.97, 0.003
HEAD = ("model", "how", "tap", "full step", "skipped step", "of a full one", "all full", "accelerated", "speedup")
HEAD += ("step ratio", "of it", "peak memory", "history", "moved: first step, full, skipped, after the run", "note")


class NoTime(Exception):
    """A measurement would end after the budget."""


@dataclass
class Row:
    """What is known of one way to run a model: seconds, bytes, and the reason for what is missing.

    `full_step` and `skipped_step` are medians over single steps, of the transformer's calls in them; `all_full` and
    `loop` are whole loops. `step_ratio` of another project's cache is the ratio of FLOPs. `moved` are the bytes that go
    to or from the GPU in a run's first step, in a later full and in a skipped one, and after the run.
    """

    model: str
    how: str
    tap: str
    full_step: float | None = None
    skipped_step: float | None = None
    all_full: float | None = None
    loop: float | None = None
    step_ratio: float | None = None
    peak: int | None = None
    history: int | None = None
    moved: list[int] | None = None
    note: str = NOT_REACHED

    @property
    def share(self) -> float | None:
        """What a skipped step takes of a full one."""
        return None if not (self.full_step and self.skipped_step) else self.skipped_step / self.full_step

    @property
    def speedup(self) -> float | None:
        """Measured, of the loop."""
        return None if not (self.all_full and self.loop) else self.all_full / self.loop

    @property
    def of_ratio(self) -> float | None:
        """What the speedup is of the step ratio."""
        return None if not (self.speedup and self.step_ratio) else self.speedup / self.step_ratio

    def give_up(self, error: BaseException) -> None:
        """Say why the row has no more figures."""
        self.note = reason(error)

    def entry(self) -> dict[str, Any]:
        """Return the row as JSON holds it."""
        return {**asdict(self), "share": self.share, "speedup": self.speedup, "of_ratio": self.of_ratio}

    def cells(self) -> list[str]:
        """Return the row as the table shows it."""
        times = [_in_words(self.full_step, 1e3, "ms"), _in_words(self.skipped_step, 1e3, "ms"), _percent(self.share)]
        loops = [_in_words(self.all_full, 1, "s"), _in_words(self.loop, 1, "s"), _in_words(self.speedup, 1, "x")]
        ratios = [_in_words(self.step_ratio, 1, ""), _in_words(self.of_ratio, 1, "", 3)]
        moved = "-" if self.moved is None else ", ".join(map(_bytes, self.moved))
        memory = ["-" if held is None else _bytes(held) for held in (self.peak, self.history)]
        return [self.model, self.how, self.tap, *times, *loops, *ratios, *memory, moved, self.note.replace("|", "\\|")]


def _in_words(value: float | None, scale: float, unit: str, digits: int = 2) -> str:
    return "-" if value is None else f"{value * scale:.{digits}f} {unit}".strip()


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.3%}"


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} GB"


def reason(error: BaseException) -> str:
    """Say in a line why a measurement was not made."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "does not fit into memory"
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    words = " ".join(str(error).split())
    return words if isinstance(error, NoTime) else f"{type(error).__name__}: {words}"[:400]


class Report:
    """All rows, written to a folder as JSON and Markdown whenever one of them has changed."""

    def __init__(self, folder: Path, machine: dict[str, Any], rows: Sequence[Row], judged: bool):
        self.folder, self.machine, self.rows, self.judged = folder, machine, list(rows), judged
        folder.mkdir(parents=True, exist_ok=True)
        self.write()

    @contextmanager
    def attempt(self, *rows: Row) -> Iterator[None]:
        """Measure something of some rows; if it cannot be had, they say why and the others go on.

        Of several rows those that were reached before have their own words.
        """
        try:
            yield
        except Exception as error:
            for row in rows:
                if len(rows) == 1 or row.note == NOT_REACHED:
                    row.give_up(error)
        self.write()

    def write(self) -> None:
        """Write both files anew, each at once."""
        goals = self.goals()
        entries = {"machine": self.machine, "goals": goals, "rows": [row.entry() for row in self.rows]}
        for name, text in (("report.json", json.dumps(entries, indent=1) + "\n"), ("report.md", self.markdown())):
            fresh = self.folder / f"{name}.new"
            fresh.write_text(text)
            os.replace(fresh, self.folder / name)

    def goals(self) -> list[dict[str, Any]]:
        """Say of each loop and each skipped step in bfloat16, nothing else done to it, whether it reaches its goal."""
        found = []
        for row in self.rows if self.judged else []:
            if row.how == "bfloat16" and row.of_ratio is not None:
                met = row.of_ratio >= LEAST_OF_RATIO
                found.append(_goal(row, "speedup of the step ratio", row.of_ratio, f">= {LEAST_OF_RATIO}", met))
            if row.how == "bfloat16" and row.tap == OUTPUT and row.share is not None:
                met = row.share <= MOST_OF_STEP
                found.append(_goal(row, "a skipped step of a full one", row.share, f"<= {MOST_OF_STEP}", met))
        return found

    def markdown(self) -> str:
        """Return machine, table and goals."""
        facts = ", ".join(f"{name} {fact}" for name, fact in self.machine.items() if fact is not None)
        lines = [facts, "", *_table(HEAD, [row.cells() for row in self.rows])]
        if self.judged:
            verdicts = [
                [*(str(goal[name]) for name in ("model", "tap", "what", "goal")), f"{goal['figure']:.4f}", goal["met"]]
                for goal in self.goals()
            ]
            lines += ["", *_table(("model", "tap", "goal", "is", "measured", "met"), verdicts)]
        return "\n".join(lines) + "\n"


def _goal(row: Row, what: str, figure: float, goal: str, met: bool) -> dict[str, Any]:
    return dict(model=row.model, tap=row.tap, what=what, goal=goal, figure=figure, met="yes" if met else "no")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(head), _line(["---"] * len(head)), *map(_line, rows)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
