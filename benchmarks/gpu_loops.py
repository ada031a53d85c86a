"""What `gpu.py` measures with: the paper's models with random weights, their denoising loops, clocks and counters."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lesa
from lesa.bench.flops import INPUTS
from lesa.bench.models import MODELS, Model, Size, scheduler_of
from lesa.host.runtime import Run
from lesa.host.tap import tap_of
from lesa.predictors import Origin, configuration
from lesa.rows.grid import from_scheduler

DTYPE, STD = torch.bfloat16, 0.02
GUIDANCE = 4.0
STREAMS = ("cond", "uncond")
TIMES = {"HunyuanVideoTransformer3DModel": 1}
"""By how much a pipeline divides the scheduler's time steps for its transformer, where it is not by 1000."""
_CHANNELS = dict(num_attention_heads=2, attention_head_dim=16, num_layers=2)
_ROPE, _TEXT = (4, 6, 6), dict(joint_attention_dim=32)
SMALL = {
    "FluxTransformer2DModel": dict(
        _CHANNELS, **_TEXT, num_single_layers=2, pooled_projection_dim=32, axes_dims_rope=_ROPE
    ),
    "QwenImageTransformer2DModel": dict(_CHANNELS, **_TEXT, axes_dims_rope=_ROPE),
    "HunyuanVideoTransformer3DModel": dict(
        _CHANNELS, num_single_layers=2, text_embed_dim=32, pooled_projection_dim=32, rope_axes_dim=_ROPE
    ),
}
"""What a small model has in place of the real one's: two blocks of each kind and 32 channels."""


def chosen(tiny: bool) -> list[Model]:
    """Return FLUX.1-dev, Qwen-Image and HunyuanVideo, or models of their classes that a CPU runs in a moment."""
    models = list(MODELS[:3])
    return [shrunk(model) for model in models] if tiny else models


def shrunk(model: Model) -> Model:
    """Make a model of the same class, grid and streams that is small in every other way."""
    frames = 5 if model.size.frames > 1 else 1
    config = {**model.config, **SMALL[model.transformer]}
    return replace(model, config=config, size=Size(64, 48, 16, frames), published=1e-3)


def materialise(model: Model, device: torch.device) -> nn.Module:
    """Make a model's transformer with random weights in bfloat16, each of them made on the device.

    No other copy of the weights is ever there; what the class computes rather than loads is as it computes it.
    """
    import diffusers
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        transformer = getattr(diffusers, model.transformer).from_config(dict(model.config))
    torch.manual_seed(0)
    for module in transformer.modules():
        for name, weight in module.named_parameters(recurse=False):
            values = torch.empty(weight.shape, dtype=DTYPE, device=device).normal_(std=STD)
            module.register_parameter(name, nn.Parameter(values, requires_grad=False))
    return transformer.to(device).eval()


class Loop:
    """A denoising loop of a transformer alone, on the grid and at the size of its model."""

    def __init__(self, model: Model, transformer: nn.Module, device: torch.device):
        self.model, self.transformer, self.device = model, transformer, device
        self.streams = STREAMS[: model.streams]
        self.grid = from_scheduler(scheduler_of(model))
        torch.manual_seed(0)
        self._inputs = {name: self._fill() for name in self.streams}
        for name in self.streams[1:]:  # the streams differ in their text alone
            self._inputs[name]["hidden_states"] = self._inputs[self.streams[0]]["hidden_states"]

    def _fill(self) -> dict[str, Any]:
        """Return what a call of the transformer takes: one for masks and guidance, zero for positions, else noise."""

        def numbers(name: str, like: Any) -> Any:
            if not isinstance(like, Tensor):
                return like
            if name.endswith("_ids"):
                return torch.zeros(like.shape, dtype=DTYPE, device=self.device)
            if name in ("guidance", "encoder_attention_mask"):
                return torch.ones(like.shape, dtype=DTYPE, device=self.device)
            return torch.randn(like.shape, dtype=DTYPE, device=self.device)

        inputs = INPUTS[self.model.transformer](self.transformer.config, self.model)
        return {name: numbers(name, value) for name, value in inputs.items()}

    @torch.no_grad()
    def walk(self, run: Run | None = None, steps: int | None = None, lap: Callable[[int], Any] | None = None) -> Tensor:
        """Denoise for so many steps, by default all; `lap(step)` is a context around the step's transformer calls."""
        scheduler = scheduler_of(self.model, device=self.device)
        scheduler.set_begin_index(0)
        latents = self._inputs[self.streams[0]]["hidden_states"].clone()
        scale = TIMES.get(self.model.transformer, 1000)
        for step, moment in enumerate(scheduler.timesteps[:steps]):
            inputs = dict(hidden_states=latents, timestep=(moment / scale).expand(1).to(DTYPE), return_dict=False)
            if lap is None:
                outputs = self._outputs(run, step, inputs)
            else:
                with lap(step):
                    outputs = self._outputs(run, step, inputs)
            latents = scheduler.step(_guided(outputs), moment, latents, return_dict=False)[0]
        return latents

    def _outputs(self, run: Run | None, step: int, inputs: dict[str, Any]) -> list[Tensor]:
        outputs = []
        for name in self.streams:
            if run is not None:
                run.at(step, name)
            outputs.append(self.transformer(**{**self._inputs[name], **inputs})[0])
        return outputs


def _guided(outputs: list[Tensor]) -> Tensor:
    if len(outputs) == 1:
        return outputs[0]
    cond, uncond = outputs
    return uncond + GUIDANCE * (cond - uncond)


def untrained(loop: Loop, place: str, schedule: str) -> lesa.LESA:
    """Make a LESA predictor that costs what a trained one does: up to eight terms, none of them zero."""
    origin = Origin(
        model=loop.model.name,
        transformer=type(loop.transformer).__name__,
        config=configuration(loop.transformer),
        tap=tap_of(loop.transformer, place),
        grid=tuple(loop.grid.tolist()),
        schedule=schedule,
        streams=loop.streams,
    )
    predictor = lesa.LESA(origin)
    for stream in loop.streams:
        for expert in predictor.stage_experts(stream):
            nn.init.normal_(expert.weight, std=0.1)
    return predictor


def pipeline_of(loop: Loop) -> Any:
    """Put a FLUX transformer into a FluxPipeline without text encoders and decoder."""
    from diffusers import FluxPipeline

    pipe = FluxPipeline(scheduler_of(loop.model), *([None] * 5), loop.transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux_call(loop: Loop) -> dict[str, Any]:
    """Return the arguments of a call of `pipeline_of`, whose pictures are latents."""
    size, config = loop.model.size, loop.transformer.config
    shapes = dict(
        prompt_embeds=(1, size.text_tokens, config.joint_attention_dim),
        pooled_prompt_embeds=(1, config.pooled_projection_dim),
    )
    embeds = {k: torch.randn(v, dtype=DTYPE, device=loop.device) for k, v in shapes.items()}
    return dict(
        embeds, height=size.height, width=size.width, num_inference_steps=loop.model.steps, output_type="latent"
    )


# --- clocks and counters


@contextmanager
def timing(device: torch.device, laps: list[float]) -> Iterator[None]:
    """Append the seconds of what is done inside; on a GPU it is idle before, and done after."""
    if device.type != "cuda":
        began = time.perf_counter()
        yield
        laps.append(time.perf_counter() - began)
        return
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    yield
    end.record()
    end.synchronize()
    laps.append(begin.elapsed_time(end) / 1000)


class Moved(TorchDispatchMode):
    """Counts the bytes that copies bring from one kind of device to another, in either direction.

    It sees every copy that torch makes, whoever asks for it: `Module.to`, diffusers' group offloading, accelerate.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out, operation = func(*args, **(kwargs or {})), func.overloadpacket
        if operation in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if operation is torch.ops.aten.copy_ else args[0]
            if source.device.type != out.device.type:
                self.total += source.nbytes
        return out


def peak(device: torch.device) -> int | None:
    """Return the most bytes that the GPU held since the last call of `reset_peak`, None without one."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    """Begin to look for the peak anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
