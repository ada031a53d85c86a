"""Count the bytes that offloading brings over in a run: full, accelerated, and with other projects' caches.

    python benchmarks/offload.py
    python benchmarks/offload.py --ways group --device cuda

Weights lie in the CPU's memory and are brought over as they run: 'model' brings a component as a whole and keeps it
until the next is called, 'sequential' (accelerate) and 'group' (diffusers, at its leaves) bring one layer at a time.
What is counted are the bytes of the weights that their hooks are asked for in one call of the pipeline, so it needs no
GPU: on the CPU the hooks run alike, and what they bring is there already. On a GPU seconds stand beside it, the least
of three. Peers that cannot run so are listed with their error.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import cpu_offload
from accelerate import hooks as layers
from diffusers.hooks.group_offloading import ModuleGroup
from torch import Tensor, nn

import lesa
from lesa.bench import benchmark, peers
from lesa.bench.compare import shipped
from lesa.bench.lines import Pair
from lesa.bench.methods import REFERENCE, Method, forecast, label
from lesa.bench.report import markdown
from lesa.host import offload
from lesa.host.loading import STEPS, LoadOptions, loaded
from lesa.host.pipelines import steps_of
from lesa.host.tap import OUTPUT
from lesa.learn.call_files import read_prompts

WAYS, BUDGET, REPEATS = ("model", "sequential", "group"), 8, 3
PEERS = {
    ("TaylorSeer, MLPs too, order 2 (diffusers)", "interval 7"),
    ("TaylorSeer lite, order 2 (diffusers)", "interval 7"),
    ("First Block Cache (diffusers)", "threshold 0.2"),
    ("MagCache (diffusers)", "threshold 0.12, 4 in a row"),
    ("FasterCache (diffusers)", "range 6"),
    ("PAB (diffusers)", "range 6"),
    ("DBCache (cache-dit)", "mask fast"),
    ("HiCache++ Hermite (hicache-pp)", "interval 8"),
}
"""One setting of each peer, by the names of `lesa bench --peers all`."""
HEADS = (
    "offloading",
    "method",
    "setting",
    "of the FLOPs",
    "denoiser, MB",
    "of the full run's",
    "other components, MB",
    "s",
)


def bring(pipe: Any, way: str, device: str) -> None:
    """Offload a pipeline; layer by layer to the CPU too, for which accelerate needs the weights in a map."""
    if way != "sequential" or torch.device(device).type != "cpu":
        offload.place(pipe, device, way)
        return
    for part in parts(pipe).values():
        weights = {name: nn.Parameter(x, False) for name, x in part.state_dict().items()}
        cpu_offload(part, torch.device(device), offload_buffers=True, state_dict=weights)


def parts(pipe: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def size(tensors: Iterator[Tensor]) -> int:
    return sum(x.nbytes for x in tensors)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@contextmanager
def counted(pipe: Any) -> Iterator[Counter[str]]:
    """Count the bytes that the hooks of all three ways bring over meanwhile, by the pipeline's component."""
    owners = {id(module): name for name, part in parts(pipe).items() for module in part.modules()}
    brought: Counter[str] = Counter()
    here: set[int] = set()
    of_layer, of_model, back, of_group = (
        layers.set_module_tensor_to_device,
        layers.CpuOffload.pre_forward,
        layers.CpuOffload.init_hook,
        ModuleGroup.onload_,
    )

    def layer(module: nn.Module, name: str, device: Any, value: Tensor | None = None, **how: Any) -> None:
        if value is not None and str(device) != "meta":
            brought[owners[id(module)]] += value.nbytes
        of_layer(module, name, device, value=value, **how)

    def model(hook: Any, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if id(module) not in here:
            here.add(id(module))
            brought[owners[id(module)]] += size(tensors_of(module))
        return of_model(hook, module, *args, **kwargs)

    def taken_back(hook: Any, module: nn.Module) -> Any:
        here.discard(id(module))
        return back(hook, module)

    def group(some: ModuleGroup) -> None:
        tensors = {id(x): x for module in some.modules for x in tensors_of(module)}
        tensors |= {id(x): x for x in (*some.parameters, *some.buffers)}
        brought[owners[id(some.offload_leader)]] += size(iter(tensors.values()))
        of_group(some)

    with ExitStack() as undo:
        for place, name, handler in (
            (layers, "set_module_tensor_to_device", layer),
            (layers.CpuOffload, "pre_forward", model),
            (layers.CpuOffload, "init_hook", taken_back),
            (ModuleGroup, "onload_", group),
        ):
            undo.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, handler)
        yield brought


def line_up(pipe: Any, prompt: str) -> list[Method]:
    """Line up the full run, rows at the output, the shipped predictors for as many full steps, and the peers."""
    steps = steps_of(pipe) or STEPS
    ours = [one for one in shipped(pipe, variants=False) if one.schedule.rule == "at" and one.is_for(budget=BUDGET)]
    return [
        REFERENCE,
        forecast("Taylor-1 (output tap)", lesa.Taylor(1), lesa.Schedule.every(steps // BUDGET), OUTPUT),
        *(forecast(label(one), one, one.schedule_for(torch.tensor(one.origin.grid), BUDGET)) for one in ours),
        *(one for one in peers.line_up(list(peers.FAMILIES), steps, prompt) if one.key in PEERS),
    ]


class Measured(NamedTuple):
    """FLOPs of the denoiser in a run, bytes brought over of it and of the other components, and seconds on a GPU."""

    flops: float
    denoiser: int
    rest: int
    seconds: float | None


def measure(pipe: Any, method: Method, pair: Pair) -> Measured:
    """Count what one call brings over, once the method is turned on: some peers run the pipeline to calibrate."""
    brought: Counter[str] = Counter()

    @contextmanager
    def switch(pipe: Any) -> Iterator[Any]:
        with method.switch(pipe) as run, counted(pipe) as counts:
            yield run
        brought.update(counts)

    drawn = benchmark.observe(pipe, replace(method, switch=switch), [pair])
    rest = brought.total() - brought["transformer"]
    return Measured(drawn.flops[0], brought["transformer"], rest, seconds(pipe, method, pair))


def seconds(pipe: Any, method: Method, pair: Pair) -> float | None:
    """Return the least seconds of some calls, of which the first is not counted; None where there is no GPU."""
    if torch.device(pipe._execution_device).type != "cuda":
        return None
    found = []
    with method.switch(pipe):
        for _ in range(1 + REPEATS):
            began = time.perf_counter()
            benchmark.decoded(pipe, [pair], **method.call)
            torch.cuda.synchronize()
            found.append(time.perf_counter() - began)
    return min(found[1:])


def lines(model: str, way: str, device: str, prompts: Sequence[str]) -> Iterator[list[str]]:
    """Yield the table's lines of one way of offloading; the first prompt is for peers that calibrate themselves."""
    full: Measured | None = None
    for method in line_up(loaded(LoadOptions(model)), prompts[0]):
        pipe = loaded(LoadOptions(model))  # anew: peers and offloading both put hooks on modules
        bring(pipe, way, device)
        try:
            found = measure(pipe, method, Pair(prompts[1], 0))
        except Exception as error:
            if not method.optional:
                raise
            yield [way, *method.key, f"{type(error).__name__}: {' '.join(str(error).split())[:120]}", "", "", "", ""]
            continue
        full = full or found
        shares = f"{found.flops / full.flops:.1%}", f"{found.denoiser / full.denoiser:.1%}"
        sizes = f"{found.denoiser / 1e6:.1f}", f"{found.rest / 1e6:.1f}"
        took = "" if found.seconds is None else f"{found.seconds:.2f}"
        yield [way, *method.key, shares[0], sizes[0], shares[1], sizes[1], took]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/emoji-flux")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    prompts = [read_prompts(Path(options.model) / "prompts" / f"{part}.txt")[0] for part in ("train", "heldout")]
    table = []
    for way in options.ways:
        for line in lines(options.model, way, options.device, prompts):
            table.append(line)
            print(*line, sep="  ", flush=True)
    print(f"\n{markdown(HEADS, table, text=3)}")


if __name__ == "__main__":
    main()
