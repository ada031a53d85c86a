"""What a call of a pipeline takes: time of its denoising loop and of its steps, full steps, FLOPs, memory."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from lesa.host import needs
from lesa.host.head import to_tokens
from lesa.host.intercept import intercept
from lesa.host.tap import part_of, tap_of
from lesa.learn.calls import takes
from lesa.learn.trajectory import draw_tokens

OnStepEnd = Callable[[Any, int, Any, dict[str, Any]], dict[str, Any]]
"""(pipeline, step, time step, tensors by name) -> what is put in place of some of these"""
PACKAGES = ("lesa-cache", "torch", "diffusers", "transformers", "numpy", "scikit-image")


class Watch:
    """Looks at one call of a pipeline from the outside: times its denoising loop, or sees what its steps do.

    The loop begins when the transformer is first called and ends with what the pipeline tells of its last step, which
    comes right after the scheduler's step: text encoders and decoder are outside, and what an acceleration does in the
    transformer's calls is inside. Work queued on a GPU is waited for at both ends. A step is full if the last block ran
    in it, in whatever stream; seeing that hooks a block, so it is left to calls that are not timed.
    """

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe
        self._marks: list[Any] = []
        self._began: float | None = None
        self._ran = False
        self._passed: list[Tensor] = []
        self.seconds = 0.0
        self.full: list[int] = []
        self.flops = 0
        self.features: list[Tensor | None] = []
        self.latents: Tensor | None = None

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Set `seconds`, and those that `step_seconds` returns, by the call made inside."""
        with ExitStack() as undo:  # around an acceleration that is there, whose plan is made before the first forward
            undo.callback(intercept(self._pipe.transformer, "__call__", self._begin))
            yield

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Set `full`, the full steps, by the call made inside."""
        transformer = self._pipe.transformer
        last_block = getattr(transformer, tap_of(transformer).blocks[-1])[-1]
        hook = last_block.register_forward_pre_hook(self._see_block)
        try:
            yield
        finally:
            hook.remove()

    @contextmanager
    def counting_flops(self) -> Iterator[None]:
        """Set `flops`, those of the transformer, by the call made inside."""
        transformer = self._pipe.transformer

        def counted(go_on: Callable, _transformer: Any, *args: Any, **kwargs: Any) -> Any:
            with Flops() as counter:
                output = go_on(*args, **kwargs)
            self.flops += counter.total
            return output

        with ExitStack() as undo:
            undo.callback(intercept(transformer, "__call__", counted))
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Set `features` by the call made inside: a step's at some tokens, of all streams, (streams x pairs, n, C).

        Of a step in which nothing passed the class's usual tap it is None. A forecast is seen as the feature it is.
        """
        transformer = self._pipe.transformer
        module = next(iter(tap_of(transformer).modules), None)
        with ExitStack() as undo:
            if module is None:
                undo.callback(intercept(transformer, "__call__", self._returned))
            else:
                hook = part_of(transformer, module).register_forward_pre_hook(self._pass, with_kwargs=True)
                undo.callback(hook.remove)
            yield

    @property
    def full_steps(self) -> int:
        """How many steps were full."""
        return len(self.full)

    def step_seconds(self) -> list[float]:
        """Return how long each step of the timed loop took."""
        marks = self._marks
        if marks and isinstance(marks[0], torch.cuda.Event):
            return [a.elapsed_time(b) / 1000 for a, b in pairwise(marks)]
        return [b - a for a, b in pairwise(marks)]

    def on_step_end(self, pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """What a pipeline's call is to tell the end of each step (see `telling`): keeps the last `latents`, and changes
        nothing."""
        if self._ran:
            self.full.append(step)
        self.features.append(torch.cat(self._passed) if self._passed else None)
        self._ran, self._passed = False, []
        if self._began is not None:
            self._marks.append(_mark(pipe.transformer))
        if step == getattr(pipe, "num_timesteps", len(pipe.scheduler.timesteps)) - 1:
            _wait_for(pipe.transformer)
            self.seconds = time.perf_counter() - (self._began or 0.0)
            self.latents = tensors["latents"]
        return {}

    def _begin(self, go_on: Callable, transformer: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._began is None:
            _wait_for(transformer)
            self._began = time.perf_counter()
            self._marks = [_mark(transformer)]
        return go_on(*args, **kwargs)

    def _see_block(self, _block: torch.nn.Module, _inputs: Any) -> None:
        self._ran = True

    def _returned(self, go_on: Callable, _transformer: Any, *args: Any, **kwargs: Any) -> Any:
        output = go_on(*args, **kwargs)
        self._keep(output[0])
        return output

    def _pass(self, _module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._keep(args[0] if args else next(iter(kwargs.values())))

    def _keep(self, feature: Tensor) -> None:
        tokens = to_tokens(self._pipe.transformer, feature.detach())
        self._passed.append(tokens[:, draw_tokens(tokens.shape[1])].float().cpu())


def telling(pipe: Any, on_step_end: OnStepEnd) -> dict[str, Any]:
    """Return the argument by which a pipeline's call tells of the end of each step.

    The `callback` that some classes have in place of `callback_on_step_end` is told the latents and cannot change them.

    Raises: ValueError if the pipeline's call has neither.
    """
    if takes(pipe, "callback_on_step_end"):
        return {"callback_on_step_end": on_step_end}
    if not takes(pipe, "callback"):
        raise ValueError(
            f"a call that is watched tells of its steps, got a {type(pipe).__name__}, whose call does not."
        )

    def tell(step: int, time: Any, latents: Tensor) -> None:
        on_step_end(pipe, step, time, {"latents": latents})

    return {"callback": tell}


def _on_gpu(module: torch.nn.Module) -> bool:
    return next(module.parameters()).is_cuda


def _wait_for(module: torch.nn.Module) -> None:
    if _on_gpu(module):
        torch.cuda.synchronize()


def _mark(module: torch.nn.Module) -> Any:
    """Mark a moment: on a GPU in its queue, which nobody has to wait for."""
    if not _on_gpu(module):
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


# --- FLOPs and memory


class Flops(TorchDispatchMode):
    """Counts the FLOPs of matrix products, convolutions and attention, by the formulas of torch's `FlopCounterMode`.

    That one also sorts them by module, for which a small model waits longer than for its products, and knows no
    formula of the attention on CPUs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out, operation = func(*args, **kwargs), func.overloadpacket
        if operation in flop_registry:
            self.total += flop_registry[operation](*args, **kwargs, out_val=out)
        elif operation is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += sdpa_flop_count(*(states.shape for states in args[:3]))
        return out


def flops(pipe: Any, run: Callable[[], Any]) -> int | None:
    """Count the FLOPs that a pipeline's transformer does in a run: matrix products, convolutions and attention.

    A forecast is a weighted sum, and counts as none. None if the transformer was not called.
    """
    watch = Watch(pipe)
    with watch.counting_flops():
        run()
    return watch.flops or None


class Memory:
    """The growth of the process and the peak of the GPU, from its making on."""

    def __init__(self, device: torch.device):
        self._device = device
        self._before = resident()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.growth: int | None = None

    def look(self, *_: Any) -> None:
        """See how large the process is now."""
        now = resident()
        if now is not None and self._before is not None:
            self.growth = max(self.growth or 0, now - self._before)

    def cuda_peak(self) -> int | None:
        """Return the most bytes that the GPU held, None where there is none."""
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else None


def resident() -> int | None:
    """Return the bytes that this process keeps in memory, None without psutil (the extra `bench`)."""
    return None if needs.lacking("memory") else needs.module("memory").Process().memory_info().rss


# --- the machine


def machine() -> dict[str, Any]:
    """Describe what is measured on, with which versions, and when."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name))},
        "torch": torch.__version__,  # says for which device it was built, which its package's version may not
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)
    return None


def _cpu() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
