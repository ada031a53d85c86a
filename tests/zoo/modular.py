"""Modular pipelines, with guiders."""

from typing import Any

import diffusers as d

from zoo.flux import SQUARE, flux_parts
from zoo.image import qwen_parts, z_image_parts, z_image_text
from zoo.parts import STEPS, TOKENS, WIDTH, Specimen, entry, noise, tiny
from zoo.video import wan_parts


def modular(blocks: Any, components: dict[str, Any], drop: tuple[str, ...] = ("text_encoder",), **arguments: Any) -> Specimen:
    """Build a pipeline of blocks less those named in `drop`; it gives the latents, not a picture."""
    for name in drop:
        blocks.sub_blocks.pop(name)
    pipe = blocks.init_pipeline()
    pipe.update_components(**components)
    for block in vars(pipe).values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
    pipe.set_progress_bar_config(disable=True)
    return Specimen(pipe, {"num_inference_steps": STEPS, "output_type": "latent", "output": "latents", **arguments})


@entry
def modular_flux() -> Specimen:
    from diffusers.modular_pipelines.flux.modular_blocks_flux import FluxAutoBlocks

    embeds = dict(prompt_embeds=noise(1, TOKENS, WIDTH), pooled_prompt_embeds=noise(1, WIDTH))
    return modular(FluxAutoBlocks(), flux_parts(), ("text_encoder", "decode"), **embeds, **SQUARE)
