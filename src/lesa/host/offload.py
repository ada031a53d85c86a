"""Put a pipeline on a device whole, or in parts as they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from packaging.version import Version

from lesa.host import needs

if TYPE_CHECKING:
    from torch import nn

GROUPS_ANYWHERE = "0.41"
OFFLOADS = ("none", "model", "sequential", "group")


def place(pipe: Any, device: str, offload: str = "none") -> None:
    """Put a pipeline on a device, or keep its weights in the CPU's memory and bring them over when they run.

    'model' brings one component at a time and keeps it until the next is called: a transformer stays for a whole run.
    'sequential' and 'group' bring one layer at a time; the latter is diffusers' newer way. On a skipped step no block
    is brought over, as none runs. What follows the tap is small, and stays on the device: training differentiates it.

    Raises: ValueError and ImportError as `check` does.
    """
    check(device, offload)
    if offload == "none":
        pipe.to(device)
    elif offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
        _keep_head(pipe.transformer, device)
    else:
        pipe.enable_group_offload(device, offload_type="leaf_level")


def check(device: str, offload: str) -> None:
    """Check that a pipeline can be put on a device in this way.

    Raises: ValueError if there is no such way, or none for the device; ImportError if weights are to be brought
        over and accelerate, which does so, is not installed.
    """
    import torch

    if offload not in OFFLOADS:
        raise ValueError(
            f"a pipeline is offloaded in one of the ways {', '.join(OFFLOADS)}, got {offload!r}; name one."
        )
    if offload == "sequential" and torch.device(device).type == "cpu":
        raise ValueError("accelerate brings layers over to another device than the CPU; take 'group' or 'model' there.")
    if offload != "none":  # diffusers' own way, too, moves tensors by accelerate's calls
        needs.check(f"offloading ({offload})", "offload")
    if offload == "group" and not groups_layers():
        raise ValueError(
            f"before {GROUPS_ANYWHERE} diffusers brings groups of layers to accelerators alone, and here is none; take "
            "'model', or a newer diffusers."
        )


def groups_layers() -> bool:
    """Tell whether diffusers can bring groups of layers over here; its older releases ask for an accelerator."""
    import diffusers
    import torch

    new = Version(diffusers.__version__) >= Version(GROUPS_ANYWHERE)
    return new or torch.accelerator.is_available()


def _keep_head(transformer: nn.Module, device: str) -> None:
    from accelerate.hooks import remove_hook_from_module
    from torch import nn

    from lesa.host.tap import NORM, PROJECTION

    for name in (NORM, PROJECTION):
        module = getattr(transformer, name, None)
        if isinstance(module, nn.Module):
            remove_hook_from_module(module, recurse=True)  # with it go the empty weights in place of the real ones
            module.to(device)
