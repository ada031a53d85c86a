"""Tables of what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lesa.bench.lines import DIFFERING, DRIFT, FLOAT_PSNR, TRAINING, Key
from lesa.bench.recogniser import PROMPTED
from lesa.bench.records import AGREE, REFERENCE, Comparison, Result, paired
from lesa.learn.metrics import MOST_FLOAT_PSNR, MOST_PSNR, Interval

NOT_HAD, UNSTEADY = "n/a", "unsteady"
PSNR, FLOATS = "PSNR, dB [95 %]", f"{FLOAT_PSNR}, dB [95 %]"
HEAD = ("method", "schedule", "full steps", "step ratio", "speedup", "whole call", PSNR, FLOATS, "SSIM")
"""What stands of every result in the table of results, before other scores."""


def summary(comparison: Comparison, against: str | None = None) -> str:
    """Write down in Markdown all that a comparison says in words: tables, what is lacking, and the machine."""
    parts = [table(comparison.results(), list(lacking(comparison))), cost_table(comparison)]
    if against is not None:
        parts += [differences(comparison, against), at_equal_cost(comparison, against)]
    return "\n\n".join(part for part in [*parts, notes(comparison)] if part) + "\n"


def notes(comparison: Comparison) -> str:
    """List what a comparison is without, what its words mean, and the machine."""
    total = len(comparison.setting.get("pairs", ()))
    begun = [one for one in comparison.results() if one.pairs < total]
    waiting = [" on ".join(key) for key in comparison.waiting]
    unfinished = [f"not measured so far: {', '.join(waiting)}"] if waiting else []
    unfinished += [f"{one.method} on {one.schedule} has {one.pairs} of {total} pairs so far" for one in begun]
    reasons = [f"{name} could not be had: {why}" for name, why in lacking(comparison).items()]
    failures = [f"{', '.join(names)} failed: {why}" for why, names in _failed(comparison).items()]
    machines = {_machine(start.machine): None for start in comparison.starts}
    said = [*unfinished, *_unsteady(comparison), *_capped(comparison)]
    return "\n".join(f"- {note}" for note in [*said, *reasons, *failures, *machines])


def _capped(comparison: Comparison) -> list[str]:
    """Say how many pictures at PSNR's cap are the reference run's, where that was measured."""
    others = [one for key, records in comparison.records.items() if key != REFERENCE for one in records]
    shares = [one.scores[DIFFERING] for one in others if one.psnr == MOST_PSNR and DIFFERING in one.scores]
    same = shares.count(0.0)
    most = f", the others differ in up to {max(shares):.1%} of their values" if same < len(shares) else ""
    cap = f"of {len(shares)} pictures at {MOST_PSNR:.0f} dB, the most that PSNR goes to here,"
    return [f"{cap} {same} are identical to the reference run's{most}"] if shares else []


def _unsteady(comparison: Comparison) -> list[str]:
    """Say what 'unsteady' means where a line says it."""
    if all(one.steady for one in comparison.results()):
        return []
    apart = f"the two fastest runs of the method, or of the reference run, are more than {AGREE - 1:.0%} apart"
    return [f"{UNSTEADY}: {apart}, as on a busy machine, and say nothing of its speed; time it again"]


def lacking(comparison: Comparison) -> dict[str, str]:
    """Return the scores that were asked for and could not be had, each with the reason."""
    return {name: why for start in comparison.starts for name, why in start.lacking.items()}


def _failed(comparison: Comparison) -> dict[str, list[str]]:
    """Return the errors of methods that failed, each with the methods that it stopped."""
    failed: dict[str, list[str]] = {}
    for key, why in comparison.failures.items():
        failed.setdefault(why, []).append(" on ".join(key))
    return failed


def _machine(facts: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "diffusers") if name in facts)
    threads = f"{facts['threads']} thread{'s' if facts['threads'] != 1 else ''}"
    on = facts.get("gpu") or f"{facts['cpu']}, {facts['cores']} cores"
    return f"measured on {facts['date'][:10]} on {on}, {versions}, {threads}"


def table(results: Sequence[Result], lacking: Sequence[str] = ()) -> str:
    """Lay results out as a Markdown table that reads as well in a terminal.

    Speedup is that of the denoising loop at batch 1, the whole call's is beside it, and 'unsteady' where repeats do not
    agree; float PSNR is that of the decoded pictures before rounding to 8 bits; 'as prompted' is the share of
    pictures that still show what their prompts name, 'motion' the PSNR of what changes between the frames of clips,
    'drift' how far the last latents are from the reference run's, in dB, the lower the better, and 'values differ' the
    share of the pictures' 8-bit values that are not the reference run's. PSNR ends at 60 dB, the most that a pair can
    have: '>= 60' are pictures that are all there, 'identical' such as differ in no value.
    Scores that are `lacking` have a column that says so.
    """
    scores = list(dict.fromkeys(name for result in results for name in result.scores))
    columns = [*scores, *(name for name in lacking if name not in (*scores, PROMPTED))]
    rows = [[*cells(result), *_scores(result, columns, lacking)] for result in results]
    return markdown((*HEAD, *columns, PROMPTED), rows, text=2)


def _scores(result: Result, columns: Sequence[str], lacking: Sequence[str]) -> list[str]:
    """Return the scores of a result, and last whether it shows what was prompted."""
    found = [_or_dash(result.scores.get(name), "{:.3f}", _without(name, lacking)) for name in columns]
    return [*found, _or_dash(result.prompted, "{:.1%}", _without(PROMPTED, lacking))]


def cells(result: Result) -> list[str]:
    """Return what stands of a result under `HEAD`."""
    return [
        result.method,
        result.schedule,
        f"{result.full_steps:.3g}",
        f"{result.step_ratio:.2f}",
        _or_dash(result.speedup, "{:.2f}x", "-" if result.steady else UNSTEADY),
        _or_dash(result.call_speedup, "{:.2f}x", "-" if result.steady else UNSTEADY),
        _psnr_cell(result),
        _float_psnr_cell(result),
        f"{result.ssim:.3f}",
    ]


def _without(name: str, lacking: Sequence[str]) -> str:
    return NOT_HAD if name in lacking else "-"


def _psnr_cell(result: Result) -> str:
    """Return the PSNR with its interval; where all pictures are at the cap, that, and 'identical' where they are."""
    if (result.method, result.schedule) == REFERENCE or result.scores.get(DIFFERING) == 0:
        return "identical"
    if result.psnr == MOST_PSNR:
        return f">= {MOST_PSNR:.0f}"
    return f"{Interval(result.psnr, result.psnr_low, result.psnr_high)}"


def _float_psnr_cell(result: Result) -> str:
    """Return the float PSNR with its interval; where all pictures are the same to the last bit, that."""
    if result.float_psnr is None:
        return "-"
    return "identical" if result.float_psnr.mean == MOST_FLOAT_PSNR else f"{result.float_psnr}"


def _or_dash(value: float | None, form: str, without: str = "-") -> str:
    return without if value is None else form.format(value)


def cost_table(comparison: Comparison) -> str:
    """Lay out what a run takes at batch 1, of each method whose cost was measured.

    FLOPs are the transformer's, counted, and their ratio is to the reference run's; 'held' is by the history,
    'resident' the growth of the process, 'CUDA' the peak of the GPU. 'Trained' is how long, and on how large
    recorded runs, the method's predictor was.
    """
    cost = ("GFLOPs", "FLOP ratio", "skipped step, ms", "held, MB", "resident, MB", "CUDA, MB")
    head = ("method", "schedule", *cost, "trained, s", "on, MB")
    rows = [_cost_cells(comparison, key) for key in comparison.records if key in comparison.costs]
    return markdown(head, rows, text=2) if rows else ""


def _cost_cells(comparison: Comparison, key: Key) -> list[str]:
    cost, timing = comparison.costs[key], comparison.timings.get(key)
    reference = comparison.costs.get(REFERENCE)
    ratio = reference.flops / cost.flops if reference and reference.flops and cost.flops else None
    skipped = None if timing is None or timing.skipped is None else timing.skipped * 1e3
    megabytes = [count and count / 1e6 for count in (cost.bytes_held, cost.resident_growth, cost.cuda_peak)]
    seconds, size = (comparison.entry(key)["recipe"].get(name) for name in TRAINING)
    return [
        *key,
        _or_dash(cost.flops and cost.flops / 1e9, "{:.2f}"),
        _or_dash(ratio, "{:.2f}"),
        _or_dash(skipped, "{:.3f}"),
        *(_or_dash(count, "{:.2f}") for count in megabytes),
        _or_dash(seconds, "{:.0f}"),
        _or_dash(size and size / 1e6, "{:.1f}"),
    ]


def differences(comparison: Comparison, ours: str) -> str:
    """Lay out by how many dB the method named `ours` is above every other of as many full steps, pair by pair.

    By how much its float PSNR is above, and its latents drift less, stands beside it: these go on where PSNR ends, at
    its cap. Full steps that differ from run to run are rounded. Planned schedules and the paper's are not set beside
    each other.

    Raises: ValueError if there is no such method.
    """
    results = comparison.results()
    if ours not in (names := dict.fromkeys(result.method for result in results)):
        raise ValueError(f"the methods are {', '.join(names)}, got {ours!r}; name one of them.")
    rows = [
        [
            f"{ours} - {other.method}",
            f"{mine.schedule} - {other.schedule}",
            f"{mine.full_steps:.3g}",
            f"{comparison.difference((ours, mine.schedule), (other.method, other.schedule)):+.2f}",
            _gain(comparison, (ours, mine.schedule), (other.method, other.schedule), FLOAT_PSNR),
            _gain(comparison, (other.method, other.schedule), (ours, mine.schedule), DRIFT),
        ]
        for mine in results
        for other in results
        if mine.method == ours and other is not mine and round(other.full_steps) == round(mine.full_steps)
        if {mine.kind, other.kind} != {"at", "paper"}
    ]
    scores = (PSNR, FLOATS, "less drift, dB [95 %]")
    head = ("difference", "schedules", "full steps", *scores)
    return markdown(head, rows, text=2)


def _gain(comparison: Comparison, one: Key, other: Key, score: str) -> str:
    if not _have(comparison, score, one, other):
        return "-"  # measured before there was this score
    return f"{comparison.difference(one, other, score):+.2f}"


def _have(comparison: Comparison, score: str, *keys: Key) -> bool:
    return score == "PSNR" or all(score in record.scores for key in keys for record in comparison.records[key])


def at_equal_cost(comparison: Comparison, ours: str) -> str:
    """Set every other method beside the best of ours that takes no more FLOPs, pair by pair.

    Ours are the methods whose names begin with `ours`. FLOPs are as a ratio, the reference run's to theirs; a dash
    where none of ours is that cheap. The best, and what is above, are so in float PSNR, or in PSNR where that was not
    measured for all.
    """
    rows = equal_cost_rows(comparison, ours)
    above = (f"{ours} above it, dB [95 %]", f"in {FLOAT_PSNR}", "")
    best = (f"{ours} at no more FLOPs", "its schedule", "its ratio", *above)
    return markdown(("method", "schedule", "FLOP ratio", "PSNR, dB", *best), rows, text=2) if rows else ""


def equal_cost_rows(comparison: Comparison, ours: str) -> list[list[str]]:
    """Return the rows of `at_equal_cost`, which end with 'above', 'level', 'below' or a dash; none without ours."""
    shares, results = comparison.shares, comparison.results()
    psnr = {(result.method, result.schedule): result.psnr for result in results}
    floats = {(one.method, one.schedule): one.float_psnr.mean for one in results if one.float_psnr is not None}
    by, scored = (FLOAT_PSNR, floats) if set(shares) <= set(floats) else ("PSNR", psnr)
    mine = [key for key in shares if key[0].startswith(ours)]
    rows = []
    for other in [key for key in shares if key not in mine and key != REFERENCE]:
        row = [*other, f"{1 / shares[other]:.2f}", f"{psnr[other]:.2f}"]
        cheaper = [key for key in mine if shares[key] <= shares[other] * (1 + 1e-9)]
        if cheaper:
            best = max(cheaper, key=scored.__getitem__)
            gains = [_gain(comparison, best, other, score) for score in ("PSNR", FLOAT_PSNR)]
            row += [*best, f"{1 / shares[best]:.2f}", *gains, _verdict(comparison.difference(best, other, by))]
        rows.append(row + ["-"] * (10 - len(row)))
    return rows if mine else []


def _verdict(gain: Interval) -> str:
    return "above" if gain.low > 0 else "below" if gain.high < 0 else "level"


# --- two runs


class Change(NamedTuple):
    """By how much a method's score in one run is above that in another, over the pairs that both have."""

    key: Key
    difference: Interval
    pairs: int

    def beyond(self, tolerance: float) -> bool:
        """Tell whether the whole interval is farther from 0 than the tolerance."""
        return self.difference.low > tolerance or self.difference.high < -tolerance


def changes(before: Comparison, after: Comparison, score: str = "PSNR") -> list[Change]:
    """Compare two runs method by method, pair by pair.

    The intervals hold for all methods together with 95 % (Bonferroni): of sixty methods that are the same, none should
    be seen to differ by chance.

    Raises: ValueError if no method was measured on the same pairs in both; LookupError if there is no such score.
    """
    common = [key for key in before.records if _common(before, after, key)]
    if not common:
        raise ValueError("two runs are compared on methods and pairs that both have, got none; name two such runs.")
    level = 1 - 0.05 / len(common)
    return [
        Change(key, paired(after.records[key], before.records[key], score, level=level), _common(before, after, key))
        for key in common
    ]


def _common(before: Comparison, after: Comparison, key: Key) -> int:
    ours, theirs = ({record.pair for record in run.records.get(key, [])} for run in (before, after))
    return len(ours & theirs)


def changes_table(found: Sequence[Change], score: str, tolerance: float) -> str:
    """Lay out what `changes` found; of what differs by more than the tolerance the last column says so."""
    rows = [
        [*change.key, str(change.pairs), f"{change.difference:+.3f}", "yes" if change.beyond(tolerance) else "no"]
        for change in found
    ]
    return markdown(("method", "schedule", "pairs", f"{score}, second - first", "differs"), rows, text=2)


def other_settings(before: Comparison, after: Comparison) -> list[str]:
    """Name what the settings of two runs differ in."""
    names = dict.fromkeys([*before.setting, *after.setting])
    return [name for name in names if before.setting.get(name) != after.setting.get(name)]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]], text: int) -> str:
    """Align a Markdown table: the first `text` columns to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = ["-" * width if k < text else "-" * (width - 1) + ":" for k, width in enumerate(widths)]
    lines = []
    for cells in (head, rule, *rows):
        sized = enumerate(zip(cells, widths, strict=True))
        lines.append(" | ".join(cell.ljust(width) if k < text else cell.rjust(width) for k, (cell, width) in sized))
    return "\n".join(f"| {line} |" for line in lines)
