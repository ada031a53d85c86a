"""Count the FLOPs of a model's steps and runs from its configuration: no weights, and nothing is computed.

A multiply and an add are two. What is counted is what `torch.utils.flop_counter` counts of the transformer (products of
matrices, convolutions, attention) on the `meta` device; of a row, whose sum it does not see, 2 K for K past features of
each element. Text encoders and the VAE, which a run needs once, are left out, as in the papers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lesa.bench.models import Model, build
from lesa.host.denoiser import Passage, attach
from lesa.host.structure import leaves
from lesa.host.tap import NORM
from lesa.rows.schedule import Schedule
from lesa.rows.tap import Tap

PLACES = {"norm": NORM, "output": None}
"""Where a skipped step takes its forecast: before the final norm, or in place of what the transformer returns."""
ROW_TERMS = 8
"""The past features of the paper's largest rows."""
TERA = 1e12


class Cost(NamedTuple):
    """FLOPs of one call of a transformer, in full and skipped without its row, and of a row of `ROW_TERMS` terms."""

    full: int
    skipped: int
    row: int

    def run(self, schedule: Schedule, steps: int, streams: int = 1) -> int:
        """Return the FLOPs of a whole run."""
        full = len(schedule.full_steps(steps))
        return streams * (full * self.full + (steps - full) * (self.skipped + self.row))


def count(model: Model, place: str = "norm") -> Cost:
    """Count what a model's steps cost with its tap at the final norm or at the output.

    The steps go through the tap as they do in a run. The blocks of a list are alike, so one of each is run and counted
    as often as there are blocks.

    Raises: ValueError if the class of the transformer is not one whose inputs are known here, or its blocks differ.
    """
    if model.transformer not in INPUTS:
        raise ValueError(
            f"FLOPs are counted of {', '.join(INPUTS)}, got a {model.transformer}; what its calls take is not known."
        )
    transformer = build(model)
    inputs = INPUTS[model.transformer](transformer.config, model)
    names = tuple(name for name, child in transformer.named_children() if isinstance(child, nn.ModuleList))
    listener = _Listener()
    with _one_block_each(transformer, names) as repeats:
        detach = attach(transformer, Tap(names, PLACES[place]), lambda _args, _kwargs: listener)
        with torch.no_grad():
            full = _counted(transformer, inputs, repeats)
            listener.full = False
            skipped = _counted(transformer, inputs, {})
        detach()
    return Cost(full, skipped, 2 * ROW_TERMS * listener.elements)


class _Listener(Passage):
    """Says which calls are full, and passes their features on where they are not."""

    full, elements = True, 0

    def keep(self, feature: Any, part: int = 0) -> None:
        self._feature = feature
        self.elements = sum(x.numel() for _, x in leaves(feature))

    def forecast(self, part: int = 0) -> Any:
        return self._feature


@contextmanager
def _one_block_each(transformer: nn.Module, names: Sequence[str]) -> Iterator[dict[str, int]]:
    """Leave one block in each list; yields by its name how many more there were, all alike."""
    lists = {name: cast("nn.ModuleList", getattr(transformer, name)) for name in names}
    for name, blocks in lists.items():
        if len({str([(k, p.shape) for k, p in block.named_parameters()]) for block in blocks}) != 1:
            raise ValueError(f"the blocks of a list are counted as one, got different ones in {name!r}.")
        setattr(transformer, name, blocks[:1])
    try:
        yield {f"{type(transformer).__name__}.{name}.0": len(blocks) - 1 for name, blocks in lists.items()}
    finally:
        for name, blocks in lists.items():
            setattr(transformer, name, blocks)


def _counted(transformer: nn.Module, inputs: dict[str, Any], repeats: Mapping[str, int]) -> int:
    """Count one call, and the modules named as often again as they say."""
    with FlopCounterMode(display=False) as counter:
        transformer(**inputs, return_dict=False)
    counts = counter.get_flop_counts()
    return counter.get_total_flops() + sum(more * sum(counts[name].values()) for name, more in repeats.items())


# --- what the classes' calls take


def _flux_inputs(config: Any, model: Model) -> dict[str, Any]:
    tokens, text = model.patches, model.size.text_tokens
    guidance = {"guidance": _meta(1)} if config.guidance_embeds else {}
    return dict(
        hidden_states=_meta(1, tokens, config.in_channels),
        encoder_hidden_states=_meta(1, text, config.joint_attention_dim),
        pooled_projections=_meta(1, config.pooled_projection_dim),
        timestep=_meta(1),
        img_ids=_meta(tokens, 3),
        txt_ids=_meta(text, 3),
        **guidance,
    )


def _qwen_inputs(config: Any, model: Model) -> dict[str, Any]:
    side = 2 * model.scale[0]
    return dict(
        hidden_states=_meta(1, model.patches, config.in_channels),
        encoder_hidden_states=_meta(1, model.size.text_tokens, config.joint_attention_dim),
        timestep=_meta(1),
        img_shapes=[[(1, model.size.height // side, model.size.width // side)]],
    )


def _hunyuan_video_inputs(config: Any, model: Model) -> dict[str, Any]:
    (pixels, frames), size = model.scale, model.size
    latents = ((size.frames - 1) // frames + 1, size.height // pixels, size.width // pixels)
    guidance = {"guidance": _meta(1)} if config.guidance_embeds else {}
    return dict(
        hidden_states=_meta(1, config.in_channels, *latents),
        timestep=_meta(1),
        encoder_hidden_states=_meta(1, size.text_tokens, config.text_embed_dim),
        encoder_attention_mask=torch.ones(1, size.text_tokens, device="meta"),
        pooled_projections=_meta(1, config.pooled_projection_dim),
        **guidance,
    )


INPUTS: dict[str, Callable[[Any, Model], dict[str, Any]]] = {
    "FluxTransformer2DModel": _flux_inputs,
    "QwenImageTransformer2DModel": _qwen_inputs,
    "HunyuanVideoTransformer3DModel": _hunyuan_video_inputs,
}


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


# --- tables


def steps_table(models: Sequence[Model], costs: Mapping[str, Mapping[str, Cost]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table: what steps cost, and whole runs beside the published ones."""
    head = ["model", "size", "text tokens", "streams", "full step", "skipped, at the norm", "its row"]
    head += ["skipped, at the output", "its row", "steps", "whole run", "published", "difference"]
    rows = []
    for model in models:
        size, (norm, output) = model.size, (costs[model.name][place] for place in PLACES)
        whole = norm.run(Schedule.every(1), model.steps, model.streams)
        shape = f"{size.height}x{size.width}" + (f"x{size.frames}" if size.frames > 1 else "")
        cells = [model.name, shape, str(size.text_tokens), str(model.streams)]
        cells += map(_words, (norm.full, norm.skipped, norm.row, output.skipped, output.row))
        cells += [str(model.steps), _words(whole)]
        if model.published is None:
            cells += ["-", "-"]
        else:
            cells += [_words(model.published * TERA), f"{whole / TERA / model.published - 1:+.3%}"]
        rows.append(cells)
    return head, rows


def runs_table(models: Sequence[Model], costs: Mapping[str, Mapping[str, Cost]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table: what runs cost, and how often that goes into a run with every step full."""
    head = ["model", "method", "schedule", "steps", "full steps", "published ratio", "step ratio"]
    head += ["FLOPs at the norm", "ratio", "FLOPs at the output", "ratio"]
    rows = []
    for model in models:
        for method, schedule, ratio, own_steps in model.runs:
            steps = own_steps or model.steps
            full = len(schedule.full_steps(steps))
            cells = [model.name, method, str(schedule), str(steps), str(full)]
            cells += ["-" if ratio is None else f"{ratio:.2f}", f"{model.steps / full:.2f}"]
            for cost in (costs[model.name][place] for place in PLACES):
                flops = cost.run(schedule, steps, model.streams)
                cells += [_words(flops), f"{cost.run(Schedule.every(1), model.steps, model.streams) / flops:.3f}"]
            rows.append(cells)
    return head, rows


def memory_table(models: Sequence[Model], costs: Mapping[str, Mapping[str, Cost]]) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of a table: a transformer's weights and features in bfloat16, each stream's alike."""
    head = ["model", "parameters", "weights", "a feature at the norm", f"{ROW_TERMS} of them"]
    head += ["a feature at the output", f"{ROW_TERMS} of them"]
    rows = []
    for model in models:
        parameters = sum(parameter.numel() for parameter in build(model).parameters())
        sizes = [2 * parameters]
        for cost in (costs[model.name][place] for place in PLACES):
            sizes += [cost.row // ROW_TERMS, cost.row]  # two bytes an element, as it takes two FLOPs a term
        rows.append([model.name, _words(parameters).replace("G", "B"), *(f"{_words(size)}B" for size in sizes)])
    return head, rows


def _words(flops: float) -> str:
    for unit, letter in ((TERA, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if flops >= unit:
            return f"{flops / unit:.2f} {letter}"
    return f"{flops:.0f}"
