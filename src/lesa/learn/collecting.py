"""The runs of a pipeline that learning is fed: collected on request, and found again."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lesa.host.loading import LoadOptions
from lesa.host.pipelines import source_of, steps_of
from lesa.host.tap import tap_of
from lesa.learn import collect as collector
from lesa.learn import said
from lesa.learn.calls import Call, plain_calls
from lesa.learn.ranks import ALONE, Ranks
from lesa.learn.trajectory import Store
from lesa.rows.tap import Tap

VALIDATION_SEED, TRAINING_SEED = 1_000_000, 2_000_000
"""The first seeds of runs to validate on and to train on; held-out pairs count from 0, so none coincide."""


@dataclass(frozen=True)
class CollectOptions:
    """How runs are recorded.

    `tap` is the place where features are taken (see `lesa.accelerate`). `tokens` are kept of each run; None keeps a
    hundredth, or up to 41. `call` holds more arguments of the pipeline's calls, which the collection remembers.

    Raises: ValueError if `tokens` or `batch_size` is no number from 1 on.
    """

    tap: str = "feature"
    tokens: int | None = None
    batch_size: int = 16
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.tokens is not None and self.tokens < 1):
            raise ValueError(
                f"batch_size= and tokens= are at least 1, got {self.batch_size} and {self.tokens}; raise them."
            )


@said.once()
def collect(
    pipe: Any,
    prompts: Sequence[Call],
    folder: str | Path,
    options: CollectOptions = CollectOptions(),
    *,
    seeds: Sequence[int] | None = None,
    at: Ranks = ALONE,
) -> Store:
    """Record runs of a pipeline with every step full into a folder, to plan and to train on; resumable.

    Each prompt (or call: its keyword arguments) is run with each of the seeds; by default each with one of its own.
    Several processes (`at`) share the work.

        runs = lesa.collect(pipe, ["small red apple on blue, left"], "runs")

    Raises: as `lesa.learn.collect.collect` does.
    """
    calls = plain_calls(prompts)
    pairs = [(one, seed) for k, one in enumerate(calls) for seed in seeds or [TRAINING_SEED + k]]
    steps = steps_of(pipe)
    return collector.collect(
        pipe,
        [one for one, _ in pairs],
        [seed for _, seed in pairs],
        folder,
        model=source_of(pipe).name,
        tokens=options.tokens,
        batch_size=options.batch_size,
        tap=tap_for(pipe, calls, options.tap),
        at=at,
        **{**({"num_inference_steps": steps} if steps else {}), **options.call},
    )


def tap_for(pipe: Any, calls: Sequence[Call], place: str) -> Tap | None:
    """Return the tap of a place where a pipeline is recorded per stream; None where it is recorded at the sampler."""
    return None if collector.is_at_sampler(pipe, calls) else tap_of(pipe.transformer, place)


def opened(data: Store | str | Path) -> Store:
    """Open a store of recorded runs, unless it is one; says so if runs of it are not there (yet)."""
    if isinstance(data, Store):
        return data
    store = Store.open(data)
    if len(store) < (wanted := len(store.collection.seeds)):
        words = "others were not collected yet, or are lost: lesa collect adds them"
        warnings.warn(f"{store.folder} holds {len(store)} of {wanted} runs; {words}.", stacklevel=2)
    return store


def as_collected(options: LoadOptions, store: Store) -> LoadOptions:
    """Let a pipeline run as it did when the runs of a store were collected.

    Raises: ValueError if other steps or arguments are asked for.
    """
    there = {**store.collection.call, "num_inference_steps": len(store.collection.grid) - 1}
    here = options.asked
    if other := [f"{name}={here[name]}" for name in here if there.get(name, here[name]) != here[name]]:
        known = ", ".join(f"{name}={value}" for name, value in there.items())
        raise ValueError(
            f"plans are for runs like those of data={str(store.folder)!r} ({known}), got {', '.join(other)}; leave "
            "that out, or collect such runs."
        )
    call = {**there, **here}
    return replace(options, steps=call.pop("num_inference_steps"), call=call)


def recorded(store: Store, tap: Tap) -> Tap:
    """Return a tap that a collection's features are of; outputs are part of every collection.

    Raises: ValueError if they are of another.
    """
    if tap.module not in (None, store.collection.tap):
        raise ValueError(
            f"{store.folder} was collected at the tap {store.collection.tap!r}, got {tap.module!r}; collect with the "
            "tap= that is wanted."
        )
    return tap
