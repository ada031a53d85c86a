"""Say what a run of `lesa bench` shows of what the project claims, pair by pair.

    python benchmarks/claims.py out/bench-claims

1. With everything on, LESA (the one predictor for many grids, on its planned schedules) is at least 6 dB above the
   better Taylor order on the paper's schedule with as many full steps, at least 2 dB above every method without
   training on the schedule planned for that method, and above Taylor with 10 full steps on the paper's schedule while
   it takes 6 or fewer.
2. On the paper's schedules LESA is above the better Taylor order by at least 1.2 dB, or half of the headroom: what the
   best free rows gain there, trained in any way on the same runs at the same tap.
3. At the output, where a history is smallest, LESA is at most 2 dB below a LESA at the feature tap.

Each line names the strongest of those that LESA is compared with. PSNR ends at its cap (60 dB), where the
drift of the last latents goes on: by how much LESA's is lower stands beside it, against the method that drifts least.
A claim holds where the whole interval is above what is asked, in PSNR or, where the pictures that it is set beside are
next to that (above 59 dB), in drift. Bootstrap 95 % intervals; everything comes from the records.
"""

import argparse
from collections.abc import Iterator, Sequence

from lesa.bench import records
from lesa.bench.lines import DRIFT
from lesa.bench.records import Comparison, Result
from lesa.bench.report import markdown
from lesa.learn.metrics import Interval

HEADS = (
    "claim",
    "full steps",
    "LESA's schedule",
    "against",
    "asked, dB",
    "PSNR, dB [95 %]",
    "less drift, dB [95 %]",
    "holds",
)
EVERYTHING_ON = ("LESA-CONTINUOUS (output tap)", "LESA-CONTINUOUS")
FREE_ROWS, TAYLOR, UNTRAINED = ("L2P",), ("Taylor",), ("reuse", "Taylor", "Lagrange")
PLANNED, PAPERS, OTHER_TAP = "at", "paper", " tap"
ABOVE_TAYLOR, ABOVE_PLANNED, ON_PAPER, SHARE, AT_OUTPUT = 6.0, 2.0, 1.2, 0.5, 2.0
TAYLORS_STEPS, ENOUGH, SATURATED = 10, 6, 59.0


class Run:
    """A finished run of `lesa bench`.

    Raises: ValueError if it is not finished, or was measured before there was a drift.
    """

    def __init__(self, comparison: Comparison):
        self.comparison, self.results = comparison, comparison.results()
        self.pairs = len(comparison.setting["pairs"])
        for one in self.results:
            if one.pairs < self.pairs or DRIFT not in one.scores:
                what = f"{one.pairs} of {self.pairs} pairs" if one.pairs < self.pairs else "no drift"
                raise ValueError(f"{one.method} on {one.schedule} has {what}; go on with lesa bench, or measure anew.")

    def all(self, kind: str, steps: int, names: Sequence[str]) -> list[Result]:
        """Return the methods of a kind of schedule and a number of full steps whose names begin with one of these."""
        equal = [one for one in self.results if one.kind == kind and round(one.full_steps) == steps]
        return [one for one in equal if one.method.startswith(tuple(names))]

    def named(self, kind: str, steps: int, *names: str) -> list[Result]:
        """Return those of exactly these names."""
        return [one for one in self.all(kind, steps, names) if one.method in names]

    def budgets(self, kind: str) -> list[int]:
        return sorted({round(one.full_steps) for one in self.results if one.kind == kind}, reverse=True)

    def above(self, ours: Result, other: Result) -> Interval:
        return self.comparison.difference((ours.method, ours.schedule), (other.method, other.schedule))

    def less_drift(self, ours: Result, other: Result) -> Interval:
        return self.comparison.difference((other.method, other.schedule), (ours.method, ours.schedule), DRIFT)

    def row(self, claim: str, ours: Result, others: Sequence[Result], asked: float) -> list[str]:
        """Set LESA beside the strongest of some methods, in PSNR and in drift."""
        best, least = max(others, key=lambda one: one.psnr), min(others, key=lambda one: one.scores[DRIFT])
        gain, calmer = self.above(ours, best), self.less_drift(ours, least)
        holds = gain.low >= asked or (best.psnr > SATURATED and calmer.low >= asked)
        against = [f"{one.method}, {one.schedule}" for one in ([best] if best is least else [best, least])]
        steps = f"{ours.full_steps:.3g}" + (f", {best.full_steps:.3g}" if best.full_steps != ours.full_steps else "")
        figures = (f"{asked:+.2f}", f"{gain:+.2f}", f"{calmer:+.2f}", "yes" if holds else "no")
        return [claim, steps, f"{ours.method}, {ours.schedule}", "; ".join(against), *figures]


def rows(run: Run) -> Iterator[list[str]]:
    """Yield a line for each claim and number of full steps that the run has methods of."""
    lesa = {steps: found[0] for steps in run.budgets(PLANNED) if (found := run.named(PLANNED, steps, *EVERYTHING_ON))}
    for steps in run.budgets(PAPERS):
        if steps in lesa and (others := run.all(PAPERS, steps, TAYLOR)):
            yield run.row("above Taylor, paper's schedule", lesa[steps], others, ABOVE_TAYLOR)
    for steps, ours in lesa.items():
        if others := run.all(PLANNED, steps, UNTRAINED):
            yield run.row("above all without training, planned", ours, others, ABOVE_PLANNED)
    for steps, ours in lesa.items():
        if steps <= ENOUGH and (others := run.all(PAPERS, TAYLORS_STEPS, TAYLOR)):
            yield run.row(f"above Taylor with {TAYLORS_STEPS}, paper's schedule", ours, others, 0.0)
    for steps in run.budgets(PAPERS):
        free = [one for one in run.all(PAPERS, steps, FREE_ROWS) if OTHER_TAP not in one.method]
        taylor = [one for one in run.all(PAPERS, steps, TAYLOR) if f"(our{OTHER_TAP})" in one.method]
        for ours in run.named(PAPERS, steps, "LESA") if free and taylor else []:
            better, best = (max(some, key=lambda one: one.psnr) for some in (taylor, free))
            headroom = run.above(best, better)
            claim = f"above Taylor, both on the paper's schedule (headroom {headroom.mean:+.2f})"
            yield run.row(claim, ours, [better], min(ON_PAPER, SHARE * max(0.0, headroom.mean)))
    for steps, ours in lesa.items():
        if ours.method == EVERYTHING_ON[0] and (others := run.named(PLANNED, steps, "LESA")):
            yield run.row("at the output, LESA at the feature tap", ours, others, -AT_OUTPUT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a folder of lesa bench, with planned schedules and the paper's")
    run = Run(records.load(parser.parse_args().run))
    print(f"{run.comparison.setting['model']}, {run.pairs} held-out pairs\n")
    print(markdown(HEADS, list(rows(run)), text=4))


if __name__ == "__main__":
    main()
