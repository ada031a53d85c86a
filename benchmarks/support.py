"""Write docs/support.md: which pipelines of diffusers are accelerated, by running a tiny one of each.

    python benchmarks/support.py

Every pipeline of the tests' zoo (tests/zoo: real classes, random weights) runs plainly, then accelerated with every
step full, which must change no bit, then with every third step full. What is refused is listed with its reason.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import lesa
from lesa.bench.report import markdown
from lesa.host.runtime import denoisers_of

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
PAGE = ROOT / "docs" / "support.md"
HEADS = ("pipeline", "in the zoo", "denoisers", "sampler", "steps", "streams", "all full", "skipped, every:3", "note")
TEXT = """# What is accelerated

**Any pipeline whose loop calls a module and steps a scheduler.** Two calls are all that is known of it: the
*denoiser*'s, whose output a skipped step forecasts, and the *sampler*'s, which tells the steps. No class is named
anywhere; the table is of those that were tried.

`make support` wrote this page with diffusers {diffusers} and torch {torch}: {count} pipelines of {classes} classes,
tiny and with random weights, as tests/zoo builds them. Of these,

- {equal} end with the same bits as without lesa if every step is full;
- {skipping} skip steps on `Schedule.every(3)` with `Taylor(1)`;
- {noisy} have samplers that add noise as they step, and are forecast by rows on the data prediction;
- {refused} cannot be accelerated.

Random weights say that the calls fit, not how near a picture is: that depends on the model, the schedule and the
forecaster ([figures of trained ones](results.md)).

{table}

*Steps* are those of all runs of a call: the first step of a sampler after a call of a denoiser; methods that evaluate
twice a step have more than the call asks for. *Streams* are the calls of a denoiser that one step tells apart, by the
conditioning that they bring. *All full* tells whether the output is the same to the bit; *skipped* are steps of the
streams, of all of them; *data* marks samplers that add noise, where the data prediction is forecast.

## What is refused

{reasons}

And without a row above: a pipeline without a scheduler (accelerate its denoiser in a loop of your own, with `grid=`),
and a denoiser that a pipeline holds under a name of its own, until it is named: `pipe.denoisers = ("name",)`.
"""


@dataclass
class Finding:
    """What came of one pipeline."""

    pipeline: str
    name: str
    denoisers: list[str] = field(default_factory=list)
    sampler: str = ""
    steps: int = 0
    streams: tuple[str, ...] = ()
    equal: bool | None = None
    skipped: tuple[int, int] | None = None
    """Skipped steps of all streams, and all of their steps."""
    noisy: bool = False
    """Whether the data prediction was forecast, as the sampler adds noise."""
    reason: str = ""

    def cells(self) -> tuple[str, ...]:
        note = "refused" if self.reason else "data" if self.noisy else ""
        skipped = "-" if self.skipped is None else f"{self.skipped[0]} of {self.skipped[1]}"
        equal = {None: "-", True: "equal", False: "DIFFERS"}[self.equal]
        streams = str(len(self.streams)) if self.streams else "-"
        denoisers = " + ".join(f"{count} x {name}" if count > 1 else name for name, count in self._counted())
        return (
            self.pipeline,
            self.name,
            denoisers,
            self.sampler,
            str(self.steps or "-"),
            streams,
            equal,
            skipped,
            note,
        )

    def _counted(self) -> Iterable[tuple[str, int]]:
        return Counter(self.denoisers).items()


def tensors_of(specimen: Any) -> list[Tensor]:
    """Draw with one seed, and copy what was drawn."""
    from zoo.oracle import tensors

    return [tensor.clone() for tensor in tensors(specimen.call())]


def look_at(name: str, specimen: Any) -> Finding:
    """Run one pipeline plainly, with every step full, and with every third."""
    pipe = specimen.pipe
    found = Finding(type(pipe).__name__, name, sampler=type(getattr(pipe, "scheduler", None)).__name__)
    try:
        found.denoisers = [type(getattr(pipe, part)).__name__ for part in denoisers_of(pipe)]
        plain = tensors_of(specimen)
        with lesa.accelerate(pipe, lesa.Taylor(1), schedule=lesa.Schedule.every(1), check=False) as run:
            ours = tensors_of(specimen)
        done = run.summary().values()
        found.streams, found.steps = run.streams, max(one.full_steps for one in done)
        found.equal = len(ours) == len(plain) and all(map(torch.equal, ours, plain))
        with lesa.accelerate(pipe, lesa.Taylor(1), schedule=lesa.Schedule.every(3)) as run:
            specimen.call()
        summary = run.summary()
        skipped = sum(one.skipped_steps for one in summary.values())
        found.skipped = skipped, skipped + sum(one.full_steps for one in summary.values())
        found.noisy = summary.data is not None
    except (ValueError, RuntimeError) as error:
        found.reason = str(error)
    return found


def page_of(findings: Sequence[Finding]) -> str:
    """Write the page of what was found."""
    import diffusers

    refused = [one for one in findings if one.reason]
    ordered = sorted(findings, key=lambda one: (one.pipeline.lower(), one.name))
    return TEXT.format(
        diffusers=diffusers.__version__,
        torch=torch.__version__.partition("+")[0],
        count=len(findings),
        classes=len({one.pipeline for one in findings}),
        equal=sum(one.equal is True for one in findings),
        skipping=sum(one.skipped is not None and one.skipped[0] > 0 and not one.reason for one in findings),
        noisy=sum(one.noisy for one in findings),
        refused=len(refused),
        table=markdown(HEADS, [one.cells() for one in ordered], text=4),
        reasons=reasons_of(findings),
    )


def reasons_of(findings: Sequence[Finding]) -> str:
    """List what is refused and why."""
    lines = [f"- `{one.name}`: {one.reason}" for one in findings if one.reason]
    return "\n".join(lines) or "Nothing that was tried."


def survey(names: Iterable[str], zoo: dict[str, Callable[[], Any]]) -> list[Finding]:
    return [look_at(name, zoo[name]()) for name in tqdm(list(names), unit="pipeline")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="pipelines of the zoo (all)")
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (docs/support.md)")
    options = parser.parse_args()
    from zoo.pipelines import ZOO

    findings = survey(options.only or ZOO, ZOO)
    options.out.write_text(page_of(findings), encoding="utf-8")
    print(f"{options.out}: {len(findings)} pipelines, {sum(one.equal is False for one in findings)} that differ")


if __name__ == "__main__":
    main()
