"""Load a pipeline as it is to be run: where, how, and with which arguments of its calls."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from packaging.version import Version

from lesa.host import offload
from lesa.host.pipelines import SOURCE, call_of, load, source_of, with_call

CPU, STEPS = "cpu", 50
"""The device and the number of steps where neither the model nor its caller names one."""
DTYPE_SINCE = "0.40"
"""The release of diffusers that warns of `torch_dtype`."""


@dataclass(frozen=True)
class LoadOptions:
    """What is loaded and how: all that commands which run a model share.

    `model` names a folder or repository, `lora` one of a LoRA, or its file. `steps` and `call` are arguments of its
    calls that win over its own; `scheduler` are settings of its scheduler that do. `device` is the CPU if none is
    named, `offload` one of `lesa.host.offload.OFFLOADS`, `dtype` a name such as 'bfloat16'; `variant` and `revision`
    are diffusers'.

    Raises: ValueError and ImportError as `lesa.host.offload.check` does, and ValueError if there is no such dtype.
    """

    model: str
    lora: str | None = None
    steps: int | None = None
    device: str | None = None
    offload: str = "none"
    dtype: str | None = None
    variant: str | None = None
    revision: str | None = None
    vae_tiling: bool = False
    scheduler: Mapping[str, Any] | None = None
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        import torch

        if self.dtype and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"a dtype is one of torch's, such as bfloat16, got {self.dtype!r}.")
        offload.check(self.device or CPU, self.offload)

    @property
    def asked(self) -> dict[str, Any]:
        """The arguments of a call that are asked for, its steps among them."""
        return {**self.call, **({"num_inference_steps": self.steps} if self.steps else {})}


def loaded(options: LoadOptions) -> Any:
    """Load a pipeline whose calls start from its own arguments and those asked for; it draws no bar of its own.

    Raises: as `lesa.load` and `lesa.host.offload.place` do; ValueError if there is no such device.
    """
    import diffusers
    import torch
    from transformers.utils import logging

    _check_device(own_device(options.device or CPU))
    logging.disable_progress_bar()  # of the weights of each component; that of the components stays on a terminal
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
    dtype = getattr(torch, options.dtype) if options.dtype else None
    how = {_dtype_name(): dtype, "variant": options.variant, "revision": options.revision}
    pipe = load(options.model, lora=options.lora, **{name: value for name, value in how.items() if value})
    if options.scheduler:
        pipe.scheduler = type(pipe.scheduler).from_config({**pipe.scheduler.config, **options.scheduler})
    if options.vae_tiling:
        pipe.vae.enable_tiling()
    offload.place(pipe, own_device(options.device or CPU), options.offload)
    pipe.set_progress_bar_config(disable=True)
    setattr(pipe, SOURCE, replace(source_of(pipe), scheduler=options.scheduler, device=options.device or CPU))
    steps = call_of(options.model, options.lora).get("num_inference_steps", STEPS)
    return with_call(pipe, {**options.call, "num_inference_steps": options.asked.get("num_inference_steps") or steps})


def _dtype_name() -> str:
    """Return what diffusers calls the argument; its newer releases warn of the older name."""
    import diffusers

    return "dtype" if Version(diffusers.__version__) >= Version(DTYPE_SINCE) else "torch_dtype"


def _check_device(device: str) -> None:
    """Raise ValueError if there is no such device, before any weights are read for it."""
    import torch

    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError, NotImplementedError) as error:  # not built for it, no driver, no such number
        reason = str(error).splitlines()[0]
        raise ValueError(f"the device {device!r} cannot be used here: {reason}; name another, such as cpu.") from error


def own_device(name: str) -> str:
    """Give each process of a machine a GPU of its own where a name leaves its number open."""
    local = os.environ.get("LOCAL_RANK")
    return f"{name}:{local}" if name == "cuda" and local is not None else name
