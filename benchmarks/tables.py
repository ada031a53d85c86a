"""Write the tables that pages have of results/*.csv into their marked blocks.

    python benchmarks/tables.py            # after benchmarks/all.py
    python benchmarks/tables.py --check    # says which pages are not as the CSV files have it; 1 if there are any

A block lies between `<!-- table: NAME -->` and `<!-- end of table -->`, and NAME is one of `TABLES`. Tables whose
figures other commands print are named in `OTHERWISE`, each with its command.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence

import like_for_like
import measured
from measured import ABOVE, BELOW, FEWER, LEVEL, PAPER, ROOT, Line

from lesa.bench.methods import CALIBRATED
from lesa.bench.report import markdown
from lesa.learn.metrics import MOST_PSNR, Interval

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?P<begin><!-- table: (?P<name>[\w-]+) -->\n).*?(?P<end><!-- end of table -->)", re.DOTALL)
FLUX = "emoji-flux"
OTHERWISE = {
    "docs/bench.md": "make bench",
    "docs/peers.md": "make bench",
    "docs/results.md": "the command that stands at each table",
    "docs/figures.md": "make bench bench-qwen bench-video",
    "docs/calibrate.md": "the command that stands at each table",
    "docs/planners.md": "the command that stands at each table",
    "docs/unseen.md": "python benchmarks/calibrate.py",
    "docs/published.md": "python benchmarks/published.py",
    "docs/stable-audio.md": "python benchmarks/sound.py",
}
"""Which commands print the figures in dB of tables that stand in no block, by the pages that have some."""


def of(lines: Iterable[Line], *kinds: str, budget: int) -> list[Line]:
    return [one for one in lines if one.kind in kinds and one.budget == budget]


def best(lines: Sequence[Line]) -> Line | None:
    """Return what ends nearest to the reference runs: found on the held-out prompts themselves, which favours it."""
    return min(lines, key=lambda one: one.drift, default=None)


def cell(line: Line | None) -> str:
    """Return a line's float PSNR and drift."""
    return f"{line.float_psnr:.1f} / {line.drift:.1f}" if line else ""


def named(line: Line | None) -> str:
    return f"{cell(line)} ({line.method})" if line else ""


def gained(line: Line) -> str:
    """Return by how much calibrated rows have less drift than a line, and what that makes them."""
    if line.less_drift is None or line.less_drift_low is None or line.less_drift_high is None:
        return ""
    interval = Interval(line.less_drift, line.less_drift_low, line.less_drift_high)
    return f"{interval:+.1f}, {line.calibrated}"


def budgets(lines: Iterable[Line]) -> list[int]:
    return sorted({one.budget for one in lines if one.kind == CALIBRATED}, reverse=True)


def first(lines: Sequence[Line]) -> str:
    """Return the table of the first page: methods of emoji-flux by full steps."""
    ours = [one for one in lines if one.model == FLUX]
    heads = ("full steps", "step ratio", "fewer steps", "Taylor-2, the paper's schedule", "LESA, the paper's schedule")
    heads += ("a better sampler, planned", "rows without training, planned", "LESA, planned", "calibrated")
    rows = []
    for budget in budgets(ours):
        on_rule = {one.method: one for one in of(ours, PAPER, budget=budget)}
        paper = [on_rule.get(name) for name in ("Taylor-2 (our tap)", "LESA")]
        kinds = [best(of(ours, kind, budget=budget)) for kind in ("sampler", "untrained", "trained", CALIBRATED)]
        ratio = f"{next(one.steps for one in ours) / budget:.2f}"
        rows.append([str(budget), ratio, *map(cell, [best(of(ours, FEWER, budget=budget)), *paper, *kinds])])
    return markdown(heads, rows, text=0)


def everywhere(lines: Sequence[Line]) -> str:
    """Return the table over all models: the best of each kind of methods, and calibrated rows beside it."""
    heads = ("model", "full steps", "fewer steps", "a better sampler, planned", "rows without training, planned")
    heads += ("trained, planned", "calibrated", "less drift than the best of the others, dB [95 %]")
    rows = []
    for model, ours in by_model(lines):
        for budget in budgets(ours):
            kinds = [best(of(ours, kind, budget=budget)) for kind in (FEWER, "sampler", "untrained", "trained")]
            rival = best([one for one in kinds if one])
            cells = [cell(kinds[0]), *map(named, kinds[1:]), cell(best(of(ours, CALIBRATED, budget=budget)))]
            rows.append([model, str(budget), *cells, gained(rival) if rival else ""])
    return markdown(heads, rows, text=1)


def verdicts(lines: Sequence[Line]) -> str:
    """Return how many methods calibrated rows are above, level with and below, by model, and which the latter are."""
    rows = []
    for model, ours in by_model(lines):
        counts = [sum(one.calibrated == word for one in ours) for word in (ABOVE, LEVEL, BELOW)]
        rows.append([model, *map(str, counts)])
    table = markdown(("model", ABOVE, LEVEL, BELOW), rows, text=1)
    others = [
        f"- {one.calibrated}: {model}, {one.budget} full steps, {one.method} on {one.schedule}: {gained(one)}"
        for model, ours in by_model(lines)
        for one in ours
        if one.calibrated in (LEVEL, BELOW)
    ]
    return "\n".join([table, *(["", *others] if others else [])])


def every(lines: Sequence[Line]) -> str:
    """Return every line."""
    heads = ("model", "method", "schedule", "full steps", "of the FLOPs", "PSNR, dB [95 %]", "float PSNR, dB [95 %]")
    heads += ("drift, dB [95 %]", "SSIM", "values differ", "as prompted", "calibrated rows: less drift, dB [95 %]")
    return markdown(heads, [[one.model, one.method, one.schedule, *numbers(one)] for one in lines], text=3)


def numbers(one: Line) -> Iterator[str]:
    yield f"{one.full_steps:.3g}"
    yield f"{one.flops:.1%}"
    capped = one.psnr >= MOST_PSNR
    yield f">= {MOST_PSNR:.0f}" if capped else f"{Interval(one.psnr, one.psnr_low, one.psnr_high):.1f}"
    yield f"{Interval(one.float_psnr, one.float_psnr_low, one.float_psnr_high):.1f}"
    yield f"{Interval(one.drift, one.drift_low, one.drift_high):.1f}"
    yield f"{one.ssim:.3f}"
    yield f"{one.values_differ:.1%}"
    yield "" if one.as_prompted is None else f"{one.as_prompted:.0%}"
    yield gained(one)


def models(lines: Sequence[Line]) -> str:
    """Return what was measured where: each model's call, prompts and seeds, machine, versions and commit."""
    heads = ("model", "call", "prompts", "seeds", "date", "processor", "torch", "diffusers", "commit")
    rows = [
        [model, f"`{one.call}`", str(one.pairs), one.seeds, one.date, one.cpu, one.torch, one.diffusers, one.commit]
        for model, (one, *_) in by_model(lines)
    ]
    return markdown(heads, rows, text=9)


def by_model(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    for model in dict.fromkeys(one.model for one in lines):
        yield model, [one for one in lines if one.model == model]


TABLES: dict[str, Callable[[Sequence[Line]], str]] = {
    "first": first,
    "everywhere": everywhere,
    "verdicts": verdicts,
    "every": every,
    "models": models,
    "like-for-like": lambda _: like_for_like.table(like_for_like.PAGE.read_text()),
}


def written(text: str, lines: Sequence[Line]) -> str:
    """Return a page with its blocks written anew.

    Raises: KeyError if a block has a name that is none of `TABLES`.
    """
    return BLOCK.sub(lambda block: f"{block['begin']}{TABLES[block['name']](lines)}\n{block['end']}", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    lines = measured.read()
    changed = [page for page in PAGES if written(page.read_text(), lines) != page.read_text()]
    for page in changed:
        print(f"{page.relative_to(ROOT)} {'is not as results/*.csv have it' if options.check else 'written'}")
        if not options.check:
            page.write_text(written(page.read_text(), lines))
    return int(options.check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
