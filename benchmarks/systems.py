"""Put several runs of `lesa bench` into one table, a model each: what the same cost buys in each system.

    python benchmarks/systems.py out/bench out/bench-qwen out/bench-video

For every number of full steps there are, on the paper's schedule, the same sampler with fewer steps, the better Taylor
order, L2P and LESA; on planned schedules the best method without training, each on the schedule planned for it, and the
best LESA. Held are the bytes of the history, of all streams, for one picture or clip. The last column is how much LESA
is above that line, pair by pair. Bootstrap 95 % intervals; everything comes from the records.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from lesa.bench import records
from lesa.bench.records import REFERENCE, Comparison, Result
from lesa.bench.report import markdown

HEADS = (
    "model",
    "full steps",
    "method",
    "schedule",
    "PSNR, dB [95 %]",
    "SSIM",
    "as prompted",
    "held, kB",
    "LESA above it, dB",
)
TRAINED = ("L2P", "LESA")
PLANNED, PAPERS = "at", "paper"


def best(results: list[Result], *names: str) -> list[Result]:
    """Return the whole method with the highest PSNR of those whose names begin with one of these, if any."""
    named = [one for one in results if one.method.startswith(names) and "phase" not in one.method]
    return sorted(named, key=lambda one: one.psnr)[-1:]


def chosen(results: list[Result], full_steps: int) -> Iterator[tuple[Result, Result]]:
    """Yield the lines of a number of full steps, each with the LESA that it is set beside."""
    equal = [one for one in results if round(one.full_steps) == full_steps]
    papers, planned = ([one for one in equal if one.kind == kind] for kind in (PAPERS, PLANNED))
    fewer = [one for one in equal if one.method == "fewer steps"]
    for lesa in best([one for one in papers if one.method == "LESA"], "LESA"):
        lines = [*fewer, *best(papers, "Taylor"), *(one for one in papers if one.method in TRAINED)]
        lines += [one for one in papers if one.method in ("LESA (norm tap)", "LESA (output tap)")]
        yield from ((line, lesa) for line in lines)
    for lesa in best(planned, "LESA"):
        yield from ((line, lesa) for line in [*best(planned, "reuse", "Taylor", "Lagrange"), lesa])


def rows(comparison: Comparison) -> Iterator[list[str]]:
    """Yield the lines of a model."""
    results = comparison.results()
    budgets = sorted({round(one.full_steps) for one in results if one.kind in (PLANNED, PAPERS)}, reverse=True)
    name = Path(comparison.setting["model"]).name
    for full_steps in budgets:
        for line, lesa in chosen(results, full_steps):
            cost = comparison.costs.get((line.method, line.schedule))
            gain = comparison.difference((lesa.method, lesa.schedule), (line.method, line.schedule))
            yield [
                *(name, str(full_steps), line.method, line.schedule),
                f"{line.psnr:.2f} [{line.psnr_low:.2f}, {line.psnr_high:.2f}]",
                f"{line.ssim:.3f}",
                "-" if line.prompted is None else f"{line.prompted:.1%}",
                f"{cost.bytes_held / 1000:.1f}" if cost and cost.bytes_held else "-",
                "" if line is lesa else f"{gain:+.2f}",
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a lesa bench")
    options = parser.parse_args()
    lines = []
    for comparison in map(records.load, options.runs):
        full = next(one for one in comparison.results() if (one.method, one.schedule) == REFERENCE)
        print(f"- {comparison.setting['model']}: {full.pairs} pairs, {full.full_steps:.0f} steps")
        lines += rows(comparison)
    print(f"\n{markdown(HEADS, lines, text=4)}")


if __name__ == "__main__":
    main()
