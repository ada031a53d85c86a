"""Tiny instances of every transformer class that pipelines denoise with, and of SDXL's UNet, with a call of each."""

from functools import cache
from typing import Any

from zoo.oracle import DENOISERS
from zoo.pipelines import ZOO

# A pipeline of the zoo for each class: its denoiser, and the first call that it makes of it
MODELS: dict[str, str] = {
    "AceStepTransformer1DModel": "ace_step_guided",
    "AllegroTransformer3DModel": "allegro_guided",
    "AnyFlowFARTransformer3DModel": "anyflow_far_guided",
    "AnyFlowTransformer3DModel": "anyflow_guided",
    "AuraFlowTransformer2DModel": "aura_flow_guided",
    "BriaFiboTransformer2DModel": "bria_fibo_guided",
    "BriaTransformer2DModel": "bria_guided",
    "ChromaTransformer2DModel": "chroma_guided",
    "ChronoEditTransformer3DModel": "chrono_edit_guided",
    "CogVideoXTransformer3DModel": "cogvideox_dpm_guided",
    "CogView3PlusTransformer2DModel": "cogview3_plus_guided",
    "CogView4Transformer2DModel": "cogview4_guided",
    "ConsisIDTransformer3DModel": "consisid_guided",
    "Cosmos3OmniTransformer": "cosmos3_guided",
    "CosmosTransformer3DModel": "cosmos_text2world_guided",
    "DiTTransformer2DModel": "dit_guided",
    "EasyAnimateTransformer3DModel": "easyanimate_guided",
    "ErnieImageTransformer2DModel": "ernie_image_guided",
    "Flux2Transformer2DModel": "flux2",
    "FluxTransformer2DModel": "flux",
    "GlmImageTransformer2DModel": "glm_image_guided",
    "HeliosTransformer3DModel": "helios_guided",
    "HiDreamImageTransformer2DModel": "hidream_guided",
    "HunyuanDiT2DModel": "hunyuan_dit_guided",
    "HunyuanImageTransformer2DModel": "hunyuan_image_guided",
    "HunyuanVideo15Transformer3DModel": "hunyuan_video15_guided",
    "HunyuanVideoFramepackTransformer3DModel": "framepack_guided",
    "HunyuanVideoTransformer3DModel": "hunyuan_video",
    "Ideogram4Transformer2DModel": "ideogram4_guided",
    "JoyImageEditPlusTransformer3DModel": "joy_image_edit_plus_guided",
    "JoyImageEditTransformer3DModel": "joy_image_edit_guided",
    "Kandinsky5Transformer3DModel": "kandinsky5_t2v_guided",
    "Krea2Transformer2DModel": "krea2_guided",
    "LTX2VideoTransformer3DModel": "ltx2_guided",
    "LTXVideoTransformer3DModel": "ltx_guided",
    "LatteTransformer3DModel": "latte_guided",
    "LongCatAudioDiTTransformer": "longcat_audio_guided",
    "LongCatImageTransformer2DModel": "longcat_image_guided",
    "Lumina2Transformer2DModel": "lumina2_guided",
    "LuminaNextDiT2DModel": "lumina_next_guided",
    "MochiTransformer3DModel": "mochi_guided",
    "MotifVideoTransformer3DModel": "motif_video_guided",
    "NucleusMoEImageTransformer2DModel": "nucleus_moe_guided",
    "OmniGenTransformer2DModel": "omnigen_guided",
    "OvisImageTransformer2DModel": "ovis_image_guided",
    "PRXTransformer2DModel": "prx_guided",
    "PixArtTransformer2DModel": "pixart_alpha_guided",
    "QwenImage21Transformer2DModel": "qwen_image21_guided",
    "QwenImageTransformer2DModel": "qwen_image_guided",
    "SD3Transformer2DModel": "sd3_guided",
    "SanaTransformer2DModel": "sana_guided",
    "SanaVideoTransformer3DModel": "sana_video_guided",
    "SkyReelsV2Transformer3DModel": "skyreels_guided",
    "StableAudio3DiTModel": "stable_audio3_guided",
    "StableAudioDiTModel": "stable_audio_edm_guided",
    "WanAnimateTransformer3DModel": "wan_animate_guided",
    "WanTransformer3DModel": "wan21_guided",
    "WanVACETransformer3DModel": "wan_vace_guided",
    "ZImageTransformer2DModel": "z_image_guided",
    "UNet2DConditionModel": "sdxl_guided",
}


class Caught(Exception):
    """The first call of a denoiser has been seen."""


@cache
def model_call(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Give a tiny module of the class `name`, and the arguments of a call of it as its pipeline makes them."""
    subject = ZOO[MODELS[name]]()
    parts = vars(subject.pipe) | subject.pipe.components
    module = next(parts[part] for part in DENOISERS if parts.get(part) is not None)
    seen: list[tuple[Any, ...]] = []

    def catch(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))
        raise Caught

    hook = module.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        subject.call()
    except Caught:
        pass
    finally:
        hook.remove()
    return module, *seen[0]
