"""Which feature taps the classes of diffusers have, as facts.

What is forecast at a feature tap enters the final norm or the last projection, whichever the paper takes for the class:
with the blocks bypassed and that tensor put back, everything else of the denoiser's own forward does what it does in a
full step. At the output tap it is what the denoiser returns, a fraction of that size, and none of it runs on skipped
steps; that needs no fact of a class.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lesa.rows.tap import OUTPUT, PLACES, Tap

NORM, PROJECTION = "norm_out", "proj_out"
"""What diffusers calls the final norm and the projection that follows it."""
ONE, TWO = ("transformer_blocks",), ("transformer_blocks", "single_transformer_blocks")
FINAL = {
    "AceStepTransformer1DModel": Tap(("layers",), NORM),
    "AllegroTransformer3DModel": Tap(ONE, NORM),
    "AnyFlowFARTransformer3DModel": Tap(("blocks",), NORM),
    "AnyFlowTransformer3DModel": Tap(("blocks",), NORM),
    "AuraFlowTransformer2DModel": Tap(("joint_transformer_blocks", "single_transformer_blocks"), NORM),
    "BriaFiboTransformer2DModel": Tap(TWO, NORM),
    "BriaTransformer2DModel": Tap(TWO, NORM),
    "ChromaTransformer2DModel": Tap(TWO, NORM),
    "ChronoEditTransformer3DModel": Tap(("blocks",), NORM),
    "CogVideoXTransformer3DModel": Tap(ONE, "norm_final"),
    "CogView3PlusTransformer2DModel": Tap(ONE, NORM),
    "CogView4Transformer2DModel": Tap(ONE, NORM),
    "ConsisIDTransformer3DModel": Tap(ONE, "norm_final"),
    "Cosmos3OmniTransformer": Tap(("layers",), "norm_moe_gen"),
    "CosmosTransformer3DModel": Tap(ONE, NORM),
    "DiTTransformer2DModel": Tap(ONE, NORM),
    "EasyAnimateTransformer3DModel": Tap(ONE, "norm_final"),
    "ErnieImageTransformer2DModel": Tap(("layers",), "final_norm"),
    "Flux2Transformer2DModel": Tap(TWO, NORM),
    "FluxTransformer2DModel": Tap(TWO, NORM),
    "GlmImageTransformer2DModel": Tap(ONE, NORM),
    "HeliosTransformer3DModel": Tap(("blocks",), NORM),
    "HiDreamImageTransformer2DModel": Tap(("double_stream_blocks", "single_stream_blocks"), "final_layer"),
    "HunyuanDiT2DModel": Tap(("blocks",), NORM),
    "HunyuanImageTransformer2DModel": Tap(TWO, NORM),
    "HunyuanVideo15Transformer3DModel": Tap(ONE, NORM),
    "HunyuanVideoFramepackTransformer3DModel": Tap(TWO, NORM),
    "HunyuanVideoTransformer3DModel": Tap(TWO, NORM),
    "Ideogram4Transformer2DModel": Tap(("layers",), "final_layer"),
    "JoyImageEditPlusTransformer3DModel": Tap(("double_blocks",), NORM),
    "JoyImageEditTransformer3DModel": Tap(("double_blocks",), NORM),
    "Kandinsky5Transformer3DModel": Tap(("text_transformer_blocks", "visual_transformer_blocks"), "out_layer"),
    "Krea2Transformer2DModel": Tap(ONE, "final_layer"),
    "LTX2VideoTransformer3DModel": Tap(ONE, ("norm_out", "audio_norm_out")),
    "LTXVideoTransformer3DModel": Tap(ONE, NORM),
    "LatteTransformer3DModel": Tap(("transformer_blocks", "temporal_transformer_blocks"), NORM),
    "LongCatAudioDiTTransformer": Tap(("blocks",), NORM),
    "LongCatImageTransformer2DModel": Tap(TWO, NORM),
    "Lumina2Transformer2DModel": Tap(("layers",), NORM),
    "LuminaNextDiT2DModel": Tap(("layers",), NORM),
    "MochiTransformer3DModel": Tap(ONE, NORM),
    "MotifVideoTransformer3DModel": Tap(TWO, NORM),
    "NucleusMoEImageTransformer2DModel": Tap(ONE, NORM),
    "OmniGenTransformer2DModel": Tap(("layers",), "norm"),
    "OvisImageTransformer2DModel": Tap(TWO, NORM),
    "PRXTransformer2DModel": Tap(("blocks",), "final_layer"),
    "PixArtTransformer2DModel": Tap(ONE, NORM),
    "QwenImage21Transformer2DModel": Tap(ONE, NORM),
    "QwenImageTransformer2DModel": Tap(ONE, NORM),
    "SD3Transformer2DModel": Tap(ONE, NORM),
    "SanaTransformer2DModel": Tap(ONE, NORM),
    "SanaVideoTransformer3DModel": Tap(ONE, NORM),
    "SkyReelsV2Transformer3DModel": Tap(("blocks",), NORM),
    "StableAudio3DiTModel": Tap(ONE, "proj_out"),
    "StableAudioDiTModel": Tap(ONE, "proj_out"),
    "WanAnimateTransformer3DModel": Tap(("blocks", "face_adapter"), NORM),
    "WanTransformer3DModel": Tap(("blocks",), NORM),
    "WanVACETransformer3DModel": Tap(("vace_blocks", "blocks"), NORM),
    "ZImageTransformer2DModel": Tap(("layers",), "all_final_layer.2-1"),
}
"""The block lists of every class, and the modules that features enter behind them: with the blocks shut and the tapped
inputs put back, the output is the same to the bit."""
PAPER = {
    "FluxTransformer2DModel": Tap(TWO, NORM),
    "QwenImageTransformer2DModel": Tap(ONE, PROJECTION),
    "HunyuanVideoTransformer3DModel": Tap(TWO),
}
"""Where the paper taps its classes."""
TAPS = {**FINAL, **PAPER}
"""Each class's place called 'feature'."""


def tap_of(denoiser: nn.Module, place: str = "feature") -> Tap:
    """Find the tap of a denoiser at a place, by the name of its class or of a parent class.

    'output' is what the denoiser returns, which every module has; 'norm' what enters the final norm, 'projection' what
    enters the last projection, and 'feature' the one that the paper forecasts for the class, elsewhere the final norm.

    Raises: ValueError if the place is none of these, or is a module inside of a class that is not known here.
    """
    if place not in PLACES:
        raise ValueError(f"a tap is at one of {', '.join(PLACES)}, got {place!r}; name one of these, or pass a Tap.")
    kind = next((parent.__name__ for parent in type(denoiser).__mro__ if parent.__name__ in FINAL), None)
    if kind is None and place == OUTPUT:
        return Tap()
    if kind is None:
        raise ValueError(
            f"the feature taps of {len(FINAL)} classes are known, got a {type(denoiser).__name__}; take tap='output', "
            "or pass tap=lesa.Tap(blocks=(...), module=...) with the names of its block lists and of its final norm."
        )
    modules = {"feature": TAPS[kind].module, "norm": FINAL[kind].module, "projection": PROJECTION, OUTPUT: None}
    return FINAL[kind]._replace(module=modules[place])


def place_of(kind: str, tap: Tap) -> str:
    """Name the place of a tap of a class of denoisers: 'feature' where it is the class's usual one.

    Of a class that is not known here it is 'feature' too, unless it is the output.
    """
    if tap == TAPS.get(kind) or (kind not in FINAL and tap.modules):
        return "feature"
    if not tap.modules:
        return OUTPUT
    return {FINAL[kind].module: "norm", PROJECTION: "projection"}.get(tap.module, "feature")


def part_of(module: nn.Module, name: str) -> Any:
    """Return what a module has under a dotted name, or None."""
    found: Any = module
    for part in name.split("."):
        found = found[part] if isinstance(found, nn.ModuleDict) and part in found else getattr(found, part, None)
    return found
