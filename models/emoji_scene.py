"""Train `emoji-scene`: a FluxPipeline that draws two or three emoji in a scene (see models/emoji-scene/README.md).

    python models/scene_atlas.py models/emoji-flux models/emoji-scene
    python models/emoji_scene.py vae models/emoji-scene
    python models/emoji_scene.py scene models/emoji-scene
    python models/emoji_scene.py export models/emoji-scene
    python models/emoji_scene.py evaluate models/emoji-scene

The trainings write checkpoints to .runs/emoji-scene every four minutes and resume from them. Their minutes are those of
one core, whatever else runs beside them.
"""

import math
import random
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from emoji_flux import Flux
from emoji_training import main, packed_latents
from quick_flux import quicken
from scenes import PIXELS, Atlas, parse
from torch import nn

CUT = 64  # pixels along each side of what the autoencoder learns from
FLUX_VAE = Path(__file__).parent / "emoji-flux" / "vae"
LOUD = 3.0  # root mean square of the embedded noise


class Scene(Flux):
    name = "scene"
    dropped = 0.1
    batch = 16
    haste = 2.0
    shift = 2.5
    vae_batch = 24
    text_tokens = 20
    image_tokens = 256
    width = 256
    clock = staticmethod(time.process_time)

    def pictures(self, folder, captions):
        atlas = Atlas(folder)
        drawn = np.stack([atlas.draw(parse(c), random.Random(k)) for k, c in enumerate(captions)])
        return torch.from_numpy(drawn).permute(0, 3, 1, 2).contiguous()

    def cut(self, drawn, progress, generator):
        y, x = torch.randint(PIXELS - CUT + 1, (2,), generator=generator).tolist()
        return drawn[..., y : y + CUT, x : x + CUT]

    def build_vae(self):
        """Start from the autoencoder of emoji-flux, without its attention over the whole picture."""
        known = AutoencoderKL.from_pretrained(FLUX_VAE)
        config = {**known.config, "mid_block_add_attention": False, "sample_size": PIXELS}
        vae = AutoencoderKL.from_config(config)
        vae.load_state_dict({key: known.state_dict()[key] for key in vae.state_dict()})
        return vae

    def vae_optimisers(self, vae):
        return [torch.optim.AdamW(vae.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0)]

    def build_pipeline(self, folder):
        pipe = super().build_pipeline(folder)
        hand_on(pipe.transformer)
        quicken(pipe.transformer)
        return pipe

    def latents(self, pipe, folder, captions):
        """Draw each picture anew: what captions leave to chance differs from time to time."""
        atlas = Atlas(folder)
        scenes = [parse(caption) for caption in captions]

        def drawn(chosen: torch.Tensor) -> torch.Tensor:
            chance = random.Random(str(chosen.tolist()))
            pictures = np.stack([atlas.draw(scenes[k], chance) for k in chosen.tolist()])
            with torch.autocast(pipe.vae.device.type, torch.bfloat16):
                return packed_latents(self, pipe, torch.from_numpy(pictures).movedim(-1, 1)).float()

        return drawn


@torch.no_grad()
def hand_on(transformer: nn.Module) -> None:
    """Let the untrained transformer return the noise that it is given, as large models do where all is noise.

    What the blocks add is then the picture, and at first nothing. With an embedding this loud, they add little where a
    run begins and more as the picture comes.
    """
    enter, leave = transformer.x_embedder, transformer.proj_out
    width, channels = enter.weight.shape
    nn.init.orthogonal_(enter.weight, gain=math.sqrt(width / channels) * LOUD)
    nn.init.zeros_(enter.bias)
    leave.weight.copy_(enter.weight.T * (channels / (width * LOUD)))


if __name__ == "__main__":
    main(Scene(), __doc__)
