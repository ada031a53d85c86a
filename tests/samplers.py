"""Schedulers of diffusers as runs find them: time steps set, at the first call of `step`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import pytest
import torch
from torch import Tensor
from zoo.parts import OLDER

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


class Case(NamedTuple):
    """A scheduler class by its name without 'Scheduler', its settings, and how many steps it can take."""

    name: str
    settings: Mapping[str, Any] = MappingProxyType({})
    noisy: bool = False
    steps: tuple[int, ...] = (6, 20)

    def __str__(self) -> str:
        """Return a name for test reports."""
        return "-".join([self.name, *(f"{key}={value}" for key, value in self.settings.items())])

    def scheduler(self, steps: int) -> Any:
        """Return the scheduler as a pipeline hands it its first output; skip one that an older diffusers lacks."""
        if OLDER and not hasattr(diffusers, f"{self.name}Scheduler"):
            pytest.skip(f"diffusers {diffusers.__version__} has no {self.name}Scheduler")
        scheduler = getattr(diffusers, f"{self.name}Scheduler")(**self.settings)
        mu = {"mu": 1.15} if self.settings.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(steps, **mu)
        if hasattr(scheduler, "is_scale_input_called"):
            scheduler.is_scale_input_called = True  # pipelines do; else it warns at every step
        return scheduler


CASES = [
    Case("FlowMatchEulerDiscrete", {"shift": 3.0}),
    Case("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True}),
    Case("FlowMatchEulerDiscrete", {"stochastic_sampling": True}, noisy=True),
    Case("FlowMatchEulerDiscrete", {"invert_sigmas": True}),
    Case("FlowMatchHeunDiscrete"),
    Case("FlowMatchLCM", noisy=True),
    Case("FlowMapEulerDiscrete"),
    Case("LTXEulerAncestralRF", noisy=True),
    Case("MiniMaxH3"),
    Case("Helios", {"stages": 1}),
    Case("Helios", {"stages": 1, "scheduler_type": "unipc"}),
    Case("EulerDiscrete"),
    Case("EulerDiscrete", {"prediction_type": "v_prediction", "use_karras_sigmas": True}),
    Case("HeunDiscrete"),
    Case("KDPM2Discrete"),
    Case("PNDM"),
    Case("PNDM", {"skip_prk_steps": True}),
    Case("LMSDiscrete"),
    Case("DEISMultistep"),
    Case("DEISMultistep", FLOW),
    Case("IPNDM"),
    Case("UniPCMultistep"),
    Case("UniPCMultistep", FLOW),
    Case("UniPCMultistep", {"solver_order": 3, "prediction_type": "v_prediction"}),
    Case("DPMSolverMultistep"),
    Case("DPMSolverMultistep", {"solver_order": 3, "use_karras_sigmas": True}),
    Case("DPMSolverMultistep", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    Case("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, noisy=True),
    Case("DPMSolverMultistep", FLOW),
    Case("DPMSolverMultistep", FLOW | {"algorithm_type": "sde-dpmsolver++"}, noisy=True),
    Case("DPMSolverSinglestep", {"lower_order_final": True}),
    Case("DPMSolverSinglestep", FLOW | {"lower_order_final": True}),
    Case("DDIM", {"clip_sample": False}),
    Case("DDIM", {"clip_sample": False, "prediction_type": "sample"}),
    Case(
        "DDIM",
        {
            "clip_sample": False,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
        },
        steps=(5, 20),  # others are rounded, to one timestep for the denoiser and to another for the latents
    ),
    Case("DDPM", {"clip_sample": False}, noisy=True),
    Case("CogVideoXDDIM"),
    Case("CogVideoXDPM", noisy=True),
    Case("EDMEuler"),
    Case("EDMEuler", {"prediction_type": "v_prediction"}),
    Case("EDMDPMSolverMultistep"),
    Case("EDMDPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, noisy=True),
    Case("EulerAncestralDiscrete", noisy=True),
    Case("KDPM2AncestralDiscrete", noisy=True),
    Case("LCM", noisy=True),
    Case("SCM", noisy=True, steps=(2,)),
    Case("SASolver", noisy=True),
    Case("SASolver", FLOW, noisy=True),
    Case("TCD", noisy=True),
]


def call(scheduler: Any, output: Tensor, time: Any, latents: Tensor, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of the first call of a scheduler's `step`, by name."""
    names = inspect.signature(scheduler.step).parameters
    old = {name: None for name in ("old_pred_original_sample", "timestep_back") if name in names}
    kept = {name: value for name, value in kwargs.items() if name in names}
    return {"model_output": output, "timestep": time, "sample": latents} | old | kept


def walk(scheduler: Any, outputs: Tensor, latents: Tensor, begin: int = 0, **kwargs: Any) -> list[Tensor]:
    """Return the latents x_0 .. x_S that a scheduler really makes; `latents` may be all that it is handed instead."""
    if OLDER and (generator := kwargs.get("generator")):
        torch.manual_seed(generator.initial_seed())  # FlowMatchEulerDiscrete drew there once
    times = scheduler.timesteps[begin:]
    rewritten = latents.ndim == outputs.ndim
    walked, back = [latents[0] if rewritten else latents], None
    for s, output in enumerate(outputs):
        arguments = call(scheduler, output, times[s], latents[s] if rewritten else walked[-1], **kwargs)
        if "old_pred_original_sample" in arguments:
            arguments |= {
                "old_pred_original_sample": back,
                "timestep_back": times[s - 1] if s else None,
            }
        result = scheduler.step(**arguments, return_dict=False)
        back = result[-1]
        walked.append(result[0])
    return walked


def draws(count: int, shape: tuple[int, ...], seed: int) -> Tensor:
    """Return the noise that a generator of this seed gives in `count` draws."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.stack([torch.randn(shape, generator=generator) for _ in range(count)])
        if count
        else torch.zeros(0, *shape)
    )
