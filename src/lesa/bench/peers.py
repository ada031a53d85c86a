"""What else makes a pipeline faster, as methods: other projects' caches as they are installed, and better samplers.

Each is turned on for the very pipeline that is measured, in the same process, with its own public calls, and leaves no
trace when it is turned off. One that is not installed, or cannot run on the pipeline, raises when it is turned on, so
that a benchmark can list it with its error.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout
from dataclasses import replace
from functools import lru_cache, partial
from io import StringIO
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lesa.bench.methods import FEATURE, Method
from lesa.host import needs, structure
from lesa.host.clock import Moment, PipelineClock
from lesa.host.denoiser import Passage, attach
from lesa.host.tap import OUTPUT, tap_of
from lesa.rows.forecasters import Forecaster, Reuse, Taylor
from lesa.rows.rivals import Hermite
from lesa.rows.schedule import Schedule

INTERVALS, RANGES = (4, 7, 10), (2, 6)
FIRST_BLOCK_THRESHOLDS = (0.1, 0.2, 0.4)
MAGCACHE = ((0.06, 3), (0.12, 4), (0.48, 10))
"""Its threshold, and how many steps in a row it may skip; the first pair is its default."""
DBCACHE_THRESHOLDS, DBCACHE_WARMUP = (0.1, 0.25, 0.6), 4
MASKS = ("medium", "fast", "ultra")
HICACHE_INTERVALS, HICACHE_WARMUP, HICACHE_HISTORY = (5, 8), 4, 6
"""The latter two are those of its quick start."""
SAMPLER_STEPS = (10, 8, 6, 5)

Switch = Callable[[Any], AbstractContextManager[Any]]
Options = Callable[[], dict[str, Any]]
Plan = Callable[[Forecaster, int, str], Schedule]
"""(forecaster, budget, tap) -> the schedule planned for it"""


class Runs(NamedTuple):
    """What is accelerated: runs of so many steps; the prompt is for peers that calibrate themselves on a run."""

    steps: int
    prompt: str


def line_up(names: Sequence[str], steps: int, prompt: str) -> list[Method]:
    """Line up peers by the names of their families, each with all of its settings, for runs of `steps` steps.

    `prompt` is for those that calibrate themselves; it is none of those that are measured.

    Raises: ValueError if a name is none of `FAMILIES`.
    """
    if unknown := sorted(set(names) - set(FAMILIES)):
        raise ValueError(f"the peers are {', '.join(FAMILIES)}, got {', '.join(unknown)}; name some of them.")
    return [
        replace(method, recipe={"peer": name, "steps": steps, "prompt": prompt})
        for name in dict.fromkeys(names)
        for method in FAMILIES[name](Runs(steps, prompt))
    ]


class OnPlan(NamedTuple):
    """A peer that takes a set of full steps: what its schedule is planned for, rows like its own and where they act,
    and what turns it on for runs on that schedule."""

    like: Forecaster
    tap: str
    switch: Callable[[Runs, Schedule], Switch]


def line_up_planned(
    names: Sequence[str],
    steps: int,
    prompt: str,
    budgets: Sequence[int],
    plan: Plan,
    only: Collection[str] | None = None,
) -> list[Method]:
    """Line up the peers of these families that take a set of full steps, on the schedules planned for them; or those of
    these names `only`."""
    return [
        _on_plan(family, name, Runs(steps, prompt), plan(one.like, budget, one.tap))
        for budget in budgets
        for family in dict.fromkeys(names)
        for name, one in ON_PLANS.get(family, {}).items()
        if only is None or name in only
    ]


def _on_plan(family: str, name: str, runs: Runs, schedule: Schedule) -> Method:
    method = peer(name, str(schedule), ON_PLANS[family][name].switch(runs, schedule))
    return replace(method, recipe={"peer": family, "planned": True, **runs._asdict()})


def rebuild(entry: Mapping[str, Any]) -> Method:
    """Make a peer again from what records say of it.

    Raises: ValueError as `line_up` does; LookupError if its family has no such setting.
    """
    recipe, key = entry["recipe"], (entry["name"], entry["schedule"])
    if recipe.get("planned") and entry["name"] in ON_PLANS.get(recipe["peer"], {}):
        runs = Runs(recipe["steps"], recipe["prompt"])
        return _on_plan(recipe["peer"], entry["name"], runs, Schedule.parse(entry["schedule"]))
    for method in line_up([recipe["peer"]], recipe["steps"], recipe["prompt"]):
        if method.key == key:
            return method
    raise LookupError(f"{recipe['peer']} has no {' with '.join(key)} any more; measure it again.")


def peer(name: str, setting: str, switch: Switch, *, alone: bool = False) -> Method:
    """Make a method of another project's cache: it may fail, and it may skip parts of a step."""

    @contextmanager
    def without_trace(pipe: Any) -> Iterator[None]:
        with restored(pipe), switch(pipe):
            yield

    return Method(name, setting, switch=without_trace, optional=True, partial=True, alone=alone)


@contextmanager
def restored(pipe: Any) -> Iterator[None]:
    """Undo what is set meanwhile on a pipeline, on its class and on the modules of its transformer.

    The order of a module's children is part of it: some caches take the first block that they find for the first.
    """
    modules = list(pipe.transformer.modules())
    places = [pipe, type(pipe), *modules]
    before = [dict(vars(place)) for place in places]
    children = [dict(module._modules) for module in modules]
    try:
        yield
    finally:
        for module, known in zip(modules, children, strict=True):
            if list(module._modules.items()) != list(known.items()):
                module._modules.clear()
                module._modules.update(known)
        for place, known in zip(places, before, strict=True):
            for name in [name for name in vars(place) if name not in known]:
                delattr(place, name)
            for name in [name for name, value in known.items() if vars(place).get(name) is not value]:
                setattr(place, name, known[name])


# --- diffusers


def cached(config: str, of_pipe: Callable[[Any], dict[str, Any]] = lambda _: {}, **options: Any) -> Switch:
    """Return the switch of one of diffusers' caches: its configuration has these options, and some of the pipeline."""

    @contextmanager
    def switch(pipe: Any) -> Iterator[None]:
        import diffusers

        pipe.transformer.enable_cache(getattr(diffusers, config)(**options, **of_pipe(pipe)))
        try:
            yield
        finally:
            pipe.transformer.disable_cache()

    return switch


ATTENTION_AND_MLPS = dict(
    cache_identifiers=[
        r"transformer_blocks\.\d+\.(attn|ff|ff_context|img_mlp|txt_mlp)",
        r"single_transformer_blocks\.\d+\.proj_out",
    ],
    skip_predict_identifiers=[r"single_transformer_blocks\.\d+\.(attn|proj_mlp)"],
)
"""What TaylorSeer's paper forecasts: by default diffusers forecasts attention alone, and every MLP is computed."""


def taylorseer(_runs: Runs) -> list[Method]:
    """diffusers' TaylorSeer on its own schedule: as it is by default, with MLPs too, and its lite mode.

    Its factors have the transformer's dtype, where its default is bfloat16 for all.
    """

    def factors(pipe: Any) -> dict[str, Any]:
        return dict(taylor_factors_dtype=pipe.transformer.dtype)

    lite = dict(use_lite_mode=True)
    kinds = (("", 1, {}), (", MLPs too", 2, ATTENTION_AND_MLPS), (" lite", 1, lite), (" lite", 2, lite))
    return [
        peer(
            f"TaylorSeer{kind}, order {order} (diffusers)",
            f"interval {interval}",
            cached("TaylorSeerCacheConfig", factors, cache_interval=interval, max_order=order, **options),
        )
        for kind, order, options in kinds
        for interval in INTERVALS
    ]


def first_block_cache(_runs: Runs) -> list[Method]:
    """diffusers' First Block Cache: it decides on means over the whole batch."""
    return [
        peer(
            "First Block Cache (diffusers)",
            f"threshold {threshold}",
            cached("FirstBlockCacheConfig", threshold=threshold),
            alone=True,
        )
        for threshold in FIRST_BLOCK_THRESHOLDS
    ]


def magcache(runs: Runs) -> list[Method]:
    """diffusers' MagCache: what it found in one run says which steps are skipped in all others."""
    ratios = lru_cache(maxsize=1)(lambda pipe: magnitudes(pipe, runs))
    return [
        peer(
            "MagCache (diffusers)",
            f"threshold {threshold}, {in_a_row} in a row",
            cached(
                "MagCacheConfig",
                lambda pipe: dict(mag_ratios=list(ratios(pipe))),
                threshold=threshold,
                max_skip_steps=in_a_row,
                num_inference_steps=runs.steps,
            ),
        )
        for threshold, in_a_row in MAGCACHE
    ]


def magnitudes(pipe: Any, runs: Runs) -> list[float]:
    """Calibrate MagCache on a run of the pipeline; it prints what it finds, as a list in its last line."""
    printed = StringIO()
    with cached("MagCacheConfig", calibrate=True, num_inference_steps=runs.steps)(pipe), redirect_stdout(printed):
        pipe(runs.prompt, generator=torch.Generator().manual_seed(0), num_inference_steps=runs.steps)
    return ast.literal_eval(printed.getvalue().split("\n")[-3])


def _now(pipe: Any) -> dict[str, Any]:
    return dict(current_timestep_callback=lambda: pipe.current_timestep)


def attention_broadcast(_runs: Runs) -> list[Method]:
    """diffusers' Pyramid Attention Broadcast: attention is reused, everything else is computed."""
    config = "PyramidAttentionBroadcastConfig"
    return [
        peer("PAB (diffusers)", f"range {n}", cached(config, _now, spatial_attention_block_skip_range=n))
        for n in RANGES
    ]


def fastercache(_runs: Runs) -> list[Method]:
    """diffusers' FasterCache for models without a second, unconditional half of the batch."""
    options = dict(is_guidance_distilled=True, attention_weight_callback=lambda _: 0.5)
    config = "FasterCacheConfig"
    return [
        peer(
            "FasterCache (diffusers)",
            f"range {n}",
            cached(config, _now, spatial_attention_block_skip_range=n, **options),
        )
        for n in RANGES
    ]


# --- cache-dit


def dbcache(runs: Runs) -> list[Method]:
    """cache-dit's DBCache, alone and with each of its calibrators, by its threshold, and on its fixed masks.

    By its threshold it decides on means over the whole batch. The first block of every step is computed; its default of
    eight blocks is more than a small model has.
    """

    def by_mask(policy: str) -> dict[str, Any]:
        mask = needs.module("cache-dit", "DBCache").steps_mask(mask_policy=policy, total_steps=runs.steps)
        return dict(steps_computation_mask=mask, steps_computation_policy="static")

    thresholds: list[tuple[str, Options]] = [
        (f"threshold {t}", partial(dict, residual_diff_threshold=t)) for t in DBCACHE_THRESHOLDS
    ]
    masks: list[tuple[str, Options]] = [(f"mask {policy}", partial(by_mask, policy)) for policy in MASKS]
    calibrators: dict[str, tuple[str, list[tuple[str, Options]]]] = {
        "": ("", thresholds + masks),
        " + TaylorSeer": ("TaylorSeerCalibratorConfig", thresholds + masks),
        " + FoCa": ("FoCaCalibratorConfig", thresholds),
        " + DMD": ("DMDCalibratorConfig", thresholds),
    }
    return [
        peer(
            f"DBCache{name} (cache-dit)",
            setting,
            _dbcache(runs, options, calibrator),
            alone=setting.startswith("threshold"),
        )
        for name, (calibrator, settings) in calibrators.items()
        for setting, options in settings
    ]


def _masked(calibrator: str, runs: Runs, schedule: Schedule) -> Switch:
    """Return the switch of DBCache with a mask that is this schedule."""
    full = schedule.full_steps(runs.steps)
    mask = [int(step in full) for step in range(runs.steps)]
    return _dbcache(runs, lambda: dict(steps_computation_mask=mask, steps_computation_policy="static"), calibrator)


def _dbcache(runs: Runs, options: Options, calibrator: str) -> Switch:
    @contextmanager
    def switch(pipe: Any) -> Iterator[None]:
        os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")
        cache_dit = needs.module("cache-dit", "DBCache")
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, max_warmup_steps=DBCACHE_WARMUP, num_inference_steps=runs.steps, **options()
        )
        forecast = getattr(cache_dit, calibrator)() if calibrator else None
        cache_dit.enable_cache(pipe, cache_config=config, calibrator_config=forecast)
        try:
            yield
        finally:
            cache_dit.disable_cache(pipe)

    return switch


# --- hicache-pp


class HiCache(Passage):
    """Lets hicache-pp say which steps are full and what the transformer returns on the others, as its quick start does.

    It has no calls for pipelines, so it listens at our tap of the output. It takes no set of full steps either, but an
    interval, which is counted at every step: where the `full` ones are given, it is 1 there and longer than a run
    elsewhere.
    """

    def __init__(self, pipe: Any, backend: str, interval: int, steps: int, full: Collection[int] = ()):
        self._its = hicache_pp = needs.module("hicache-pp", "HiCache++")
        self.clock = PipelineClock(pipe)
        self._run: Moment | None = None
        self._full = full
        options = dict(first_enhance=0 if full else HICACHE_WARMUP, history=HICACHE_HISTORY, backend=backend)
        self._state = hicache_pp.hicache_init(num_steps=steps, interval=interval, **options)
        self._forecast = {
            "hermite": hicache_pp.hicache_forecast,
            "dmd": hicache_pp.dmd_forecast_state,
            "auto": hicache_pp.auto_forecast_state,
        }[backend]

    def begin(self, _args: tuple, _kwargs: dict) -> HiCache | None:
        """Decide on the step.

        Raises: RuntimeError if the transformer is called more than once a step: what is forecast is of one call.
        """
        run = self.clock.now()
        if run is None:
            return None
        if run is not self._run:
            self._run = run
            self._its.hicache_reset(self._state)
        if run.step != self._state["step"]:
            raise RuntimeError(f"hicache-pp forecasts one call a step, got a second one at step {run.step}.")
        if self._full:
            self._state["interval"] = 1 if run.step in self._full else self._state["num_steps"] + 1
        self.full = self._its.hicache_decide(self._state) == "full"
        return self

    def keep(self, feature: Any, part: int = 0) -> None:
        """Show it what the transformer returned."""
        output = feature[0].detach()
        self._its.hicache_update_derivatives(self._state, output)
        self._its.dmd_update_snapshots(self._state, output, self._state["history"])
        self._like = feature
        self._state["step"] += 1

    def forecast(self, part: int = 0) -> Any:
        """Take its forecast."""
        forecast = self._forecast(self._state)
        self._state["step"] += 1
        return structure.replace(self._like, Tensor, lambda _: forecast)


def hicache(runs: Runs) -> list[Method]:
    """hicache-pp at the output, with each of its forecasts; those but Hermite's are fitted to the whole batch."""
    names = {"hermite": "Hermite", "dmd": "DMD", "auto": "auto"}
    return [
        peer(f"HiCache++ {name} (hicache-pp)", f"interval {n}", _hicache(runs, backend, n), alone=backend != "hermite")
        for backend, name in names.items()
        for n in HICACHE_INTERVALS
    ]


def _hicache(runs: Runs, backend: str, interval: int, full: Collection[int] = ()) -> Switch:
    @contextmanager
    def on(pipe: Any) -> Iterator[None]:
        listener = HiCache(pipe, backend, interval, runs.steps, full)
        with ExitStack() as undo:
            undo.callback(listener.clock.attach())
            undo.callback(attach(pipe.transformer, tap_of(pipe.transformer, OUTPUT), listener.begin))
            yield

    return on


def _hermite(runs: Runs, schedule: Schedule) -> Switch:
    """Return the switch of hicache-pp's Hermite forecasts on a schedule."""
    return _hicache(runs, "hermite", runs.steps, schedule.full_steps(runs.steps))


# --- samplers


def sampler(name: str, scheduler: str) -> list[Method]:
    """Another sampler of the same velocities with fewer steps, on the grid of the pipeline's own."""

    @contextmanager
    def switch(pipe: Any) -> Iterator[None]:
        import diffusers

        own = pipe.scheduler
        flow = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
        pipe.scheduler = getattr(diffusers, scheduler).from_config(own.config, **flow)
        try:
            yield
        finally:
            pipe.scheduler = own

    return [
        Method(name, f"{steps} steps", call={"num_inference_steps": steps}, switch=switch, optional=True)
        for steps in SAMPLER_STEPS
    ]


FAMILIES: dict[str, Callable[[Runs], list[Method]]] = {
    "unipc": lambda _: sampler("fewer steps, UniPC", "UniPCMultistepScheduler"),
    "dpm++": lambda _: sampler("fewer steps, DPM++ 2M", "DPMSolverMultistepScheduler"),
    "taylorseer": taylorseer,
    "first-block-cache": first_block_cache,
    "magcache": magcache,
    "fastercache": fastercache,
    "pab": attention_broadcast,
    "dbcache": dbcache,
    "hicache": hicache,
}
"""What `line_up` takes, by the names that `lesa bench --peers` knows."""

ON_PLANS: dict[str, dict[str, OnPlan]] = {
    "dbcache": {
        "DBCache@plan (cache-dit)": OnPlan(Reuse(), FEATURE, partial(_masked, "")),
        "DBCache + TaylorSeer@plan (cache-dit)": OnPlan(
            Taylor(1), FEATURE, partial(_masked, "TaylorSeerCalibratorConfig")
        ),
    },
    "hicache": {"HiCache++ Hermite@plan (hicache-pp)": OnPlan(Hermite(1), OUTPUT, _hermite)},
}
"""The peers that take a set of full steps, by their families and names. Others have rules of their own: diffusers'
TaylorSeer an interval between two limits, First Block Cache and the thresholds of DBCache what they see, MagCache what
it has calibrated."""
